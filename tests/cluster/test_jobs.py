"""Jobs on a real cluster of two nodes: by ray's command line, and by lepton.jobs."""

import os
import re
import stat
from pathlib import Path

import pytest

from tests.cluster.two_nodes import ROOT, Cluster, two_node_cluster

COUNT_NODES = """
import os
import ray

ray.init(log_to_driver=False)
print("alive nodes:", sum(node["Alive"] for node in ray.nodes()), flush=True)
print("baggage:", os.environ.get("BAGGAGE"), flush=True)
print("trace:", os.environ.get("TRACEPARENT"), "beside:", sorted(os.listdir(".")), flush=True)
"""
SUBMIT = """
import sys
from pathlib import Path
from lepton import jobs

job = jobs.submit(Path("count.py"), working_dir=sys.argv[1], metadata={"by": "a test"})
for line in job.logs():
    print(line)
job.wait(timeout=120)
print(job.status(), job.stop())
"""
FAIL = """
from lepton import jobs
from lepton.errors import LeptonError

try:
    jobs.submit("echo the reason; exit 3").wait(timeout=120)
except LeptonError as error:
    print(error)
"""
STOP = """
import asyncio
from lepton import jobs
from lepton.errors import LeptonError

async def follow():  # in a notebook a loop runs already
    job = jobs.submit("echo started; exec sleep 600")
    print(next(line for line in job.logs() if line == "started"))
    return job

job = asyncio.run(follow())
try:
    job.wait(timeout=0)
except LeptonError as error:
    print(error)
print(job.stop())
try:
    job.wait(timeout=120)
except LeptonError as error:
    print(error)
"""
LINGER = """
import time
import ray

@ray.remote
class Sleeper:
    def greet(self): pass
    def sleep(self): time.sleep(600)

ray.init(log_to_driver=False)
sleepers = [Sleeper.options(num_cpus=1).remote() for _ in range(4)]  # fills both nodes
ray.get([sleeper.greet.remote() for sleeper in sleepers])
rest = [sleeper.sleep.remote() for sleeper in sleepers]
print("lingering", flush=True)
ray.get(rest)
"""
START_LINGERING = """
import sys
from pathlib import Path
from lepton import jobs

job = jobs.submit(Path("linger.py"), working_dir=sys.argv[1])
print(next(line for line in job.logs() if line == "lingering"))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with two_node_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "count.py").write_text(COUNT_NODES)
    return tmp_path


def python(cluster: Cluster, code: str, *arguments: str, **changed: str) -> str:
    done = cluster.run("python", "-W", "error", "-c", code, *arguments, **changed)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_nodes_are_alive_behind_a_private_token(cluster):
    assert cluster.status()["alive_nodes"] == 2
    token = Path(cluster.variables["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())


def test_ray_job_submit(cluster, folder):
    done = cluster.run(
        "ray", "job", "submit", f"--working-dir={folder}", "--", "python", "count.py"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "alive nodes: 2" in done.stdout


def test_submit_sends_the_folder_follows_and_continues_the_trace(cluster, folder):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    output = python(cluster, SUBMIT, str(folder), TRACEPARENT=trace, BAGGAGE="team=core")
    assert "baggage: team=core" in output
    assert "alive nodes: 2" in output
    assert f"trace: {trace} beside: ['count.py']" in output
    assert output.splitlines()[-1] == "SUCCEEDED False"


def test_failed_job_raises_with_its_last_lines(cluster):
    first, *rest = python(cluster, FAIL).splitlines()
    assert re.fullmatch(r"job raysubmit_\w+ ended as FAILED: .* failed with exit code 3", first)
    assert "the reason" in rest


def test_job_can_be_left_waiting_and_stopped(cluster):
    started, waited, stopped, *ended = python(cluster, STOP).splitlines()
    assert (started, stopped) == ("started", "True")
    assert re.match(r"job raysubmit_\w+ is still RUNNING after 0 s of waiting", waited)
    assert re.match(r"job raysubmit_\w+ ended as STOPPED", ended[0])


@pytest.mark.parametrize(
    ("mode", "token", "reason"), [("token", "0" * 64, "Invalid"), ("disabled", "", "Missing")]
)
def test_wrong_token_is_refused(cluster, tmp_path, mode, token, reason):
    (tmp_path / "token").write_text(token)
    changed = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    by_ray = cluster.run("ray", "job", "submit", "--", "echo inside", **changed)
    assert by_ray.returncode != 0
    assert f"{reason} authentication token" in by_ray.stderr
    assert "inside" not in by_ray.stdout
    code = "from lepton import jobs; jobs.submit('echo inside')"
    by_lepton = cluster.run("python", "-W", "error", "-c", code, **changed)
    last = by_lepton.stderr.splitlines()[-1]
    assert last.startswith("lepton.errors.LeptonError: the Ray cluster at http://127.0.0.1:")
    assert "refused the token: set RAY_AUTH_MODE=token" in last
    assert f"{reason} authentication token" in last


def test_wrong_token_learns_nothing_of_the_cluster(cluster, tmp_path):
    (tmp_path / "token").write_text("0" * 64)
    done = cluster.run("ray", "status", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr
    assert "node_" not in done.stdout


def processes_of(directory: Path, temp_dir: str) -> list[str]:
    """Every living process that names the cluster in its command line or environment."""
    mark = f"LEPTON_LOCAL_CLUSTER={directory}".encode()
    found: list[str] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
            if temp_dir.encode() in words or mark in (entry / "environ").read_bytes():
                found.append(words.decode().replace("\0", " "))
        except OSError:
            continue
    return found


def test_stop_ends_this_cluster_with_its_running_job_and_no_other(cluster, tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "linger.py").write_text(LINGER)
    directory = tmp_path / "second"
    with two_node_cluster(directory) as second:
        assert "lingering" in python(second, START_LINGERING, str(tmp_path / "job"))
        temp_dir = re.search('/tmp/lepton-ray-[^"]+', (directory / "cluster.json").read_text())[0]
        before = processes_of(directory, temp_dir)
        assert any("linger.py" in words for words in before)
        assert sum("ray::Sleeper" in words for words in before) == 4
        assert len(before) > 20
        processes = second.status()["processes"]
        second.stop()
        assert processes_of(directory, temp_dir) == []
        assert [pid for pid in processes if is_alive(pid)] == []
        assert not os.path.lexists(temp_dir)
        assert not (directory / "token").exists()
        assert (directory / "logs" / "node-0" / "gcs_server.out").exists()
    assert cluster.status()["alive_nodes"] == 2


def is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_cluster_that_runs_is_not_started_twice(cluster):
    again = cluster.run(
        "python", str(ROOT / "clusters" / "local.py"), "start", f"--dir={cluster.directory}"
    )
    assert again.returncode != 0
    assert "holds a cluster already" in again.stderr
    assert cluster.status()["alive_nodes"] == 2
