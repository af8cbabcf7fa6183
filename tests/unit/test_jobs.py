"""What lepton.jobs says and does before any cluster answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lepton import jobs
from lepton.errors import LeptonError
from lepton.telemetry import Carrier

# Port 9 ("discard") needs privileges to open, and nobody opens it.
NOBODY = "127.0.0.1:9"


def test_importing_jobs_loads_no_ray():
    code = (
        "import sys, lepton.jobs; print(sorted({'ray', 'requests', 'aiohttp'} & set(sys.modules)))"
    )
    asked = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("address", [f"http://{NOBODY}", NOBODY])
def test_unreachable_cluster_says_what_to_do(address):
    with pytest.raises(LeptonError, match="no Ray cluster answers at") as caught:
        jobs.submit("echo hello", address=address)
    assert NOBODY in str(caught.value)
    assert "clusters/local.py start" in str(caught.value)


def test_address_comes_from_the_environment_as_in_ray(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://{NOBODY}")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:7")
    with pytest.raises(LeptonError, match=NOBODY):
        jobs.submit("echo hello")


def test_given_address_wins_and_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:7")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(LeptonError, match=NOBODY):
        jobs.submit("echo hello", address=f"http://{NOBODY}")
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:7"
    assert "RAY_ADDRESS" not in os.environ


def test_address_that_is_none_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        jobs.submit("echo hello", address="nonsense")


def test_script_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"no script absent.py inside working_dir"):
        jobs.submit(Path("absent.py"), working_dir=tmp_path)


def test_script_must_travel_with_the_working_dir(tmp_path):
    (tmp_path / "sent").mkdir()
    script = tmp_path / "script.py"
    script.write_text("print('hello')")
    with pytest.raises(ValueError, match="inside working_dir"):
        jobs.submit(script, working_dir=tmp_path / "sent")


def test_a_job_gets_its_callers_trace_or_the_one_that_is_named(monkeypatch):
    class Client:
        """Keeps what is submitted."""

        def get_address(self):
            return "here"

        def submit_job(self, *, runtime_env, **_):
            told.append(runtime_env.get("env_vars"))
            return "job"

    told = []
    monkeypatch.setattr(jobs, "_connect", lambda _: Client())
    callers = {"TRACEPARENT": "t", "TRACESTATE": "s", "BAGGAGE": "b"}
    for name in callers:
        monkeypatch.delenv(name, raising=False)
    jobs.submit("echo")
    for name, value in callers.items():
        monkeypatch.setenv(name, value)
    jobs.submit("echo", env={"A": "1"})
    jobs.submit("echo", env={"TRACEPARENT": "own"})
    above = Carrier(f"00-{'ab' * 16}-{'cd' * 8}-01", None, "lepton.run=r", "vendor=1")
    jobs.submit("echo", trace=above)

    assert told == [
        None,
        {**callers, "A": "1"},
        {"TRACEPARENT": "own"},
        {"TRACEPARENT": above.traceparent, "BAGGAGE": "lepton.run=r", "TRACESTATE": "vendor=1"},
    ]
