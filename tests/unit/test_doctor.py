"""The doctor finds what is wrong with a machine, by trying, and says what to do."""

import io
import socket
from pathlib import Path

import pytest
from rich.console import Console

from lepton.doctor import Check, check, render
from lepton.doctor.cluster import cluster, temp_dir, token
from lepton.doctor.machine import lower_bound, package, shared_memory, storage
from lepton.doctor.network import collector, haproxy, ports


def test_this_machine_can_run_lepton_and_every_complaint_has_advice(tmp_path: Path) -> None:
    found = check(str(tmp_path / "home"))

    assert [c for c in found if c.level == "fail"] == []
    assert all(c.advice for c in found if not c.ok)
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
    shown = io.StringIO()
    Console(file=shown, width=200).print(render(found))
    assert all(c.name in shown.getvalue() for c in found)


def test_a_home_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    found = storage(str(tmp_path / "file" / "home"))

    assert found[0].level == "fail"
    assert found[0].advice


def test_a_cluster_that_does_not_answer_is_found() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"

    assert cluster(address).level == "fail"
    assert collector({"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}"}).level != "ok"


def test_a_temp_dir_too_long_for_sockets_is_found(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()

    assert temp_dir(str(long)).level == "fail"


def test_a_token_that_others_can_read_is_found(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret")
    path.chmod(0o644)
    env = {"RAY_AUTH_TOKEN_PATH": str(path), "RAY_AUTH_MODE": "token"}

    assert token(env).level == "warn"
    path.chmod(0o600)
    assert token(env).level == "ok"


def test_a_package_that_is_too_old_or_missing_is_found() -> None:
    assert package("numpy", "1.0").level == "ok"
    assert package("numpy", "999.0").level == "fail"
    assert package("no-such-package", "1.0").level == "fail"


def test_a_complaint_without_advice_is_not_possible() -> None:
    with pytest.raises(ValueError, match="gives no advice"):
        Check(name="x", level="warn", detail="y")


def test_a_home_that_is_a_url_is_refused() -> None:
    (found,) = storage("s3://bucket/home")

    assert found.level == "fail"
    assert "s3://bucket/home" in found.detail


def test_what_listens_is_told_from_what_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert collector({"OTEL_EXPORTER_OTLP_ENDPOINT": url}).ok
        assert cluster(url).ok  # an address for jobs
    assert collector({}).ok
    assert cluster("not an address").level == "fail"
    assert ports().ok


def test_a_missing_token_matters_only_where_one_is_asked_for(tmp_path: Path) -> None:
    missing = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}

    assert token(missing).ok
    assert token(missing | {"RAY_AUTH_MODE": "token"}).level == "fail"
    assert token(missing | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}).ok


def test_a_temp_dir_under_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    found = temp_dir(str(tmp_path / "f"))

    assert found.level == "fail"
    assert "RAY_TMPDIR" in found.advice


def test_an_haproxy_that_cannot_run_is_found(tmp_path: Path) -> None:
    (tmp_path / "haproxy").touch(0o644)

    assert haproxy(str(tmp_path / "haproxy")).level == "warn"
    (tmp_path / "haproxy").chmod(0o755)
    assert haproxy(str(tmp_path / "haproxy")).ok


def test_a_system_without_shared_memory_is_no_complaint(tmp_path: Path) -> None:
    assert shared_memory(str(tmp_path / "none")).ok


def test_lower_bounds_come_from_requirements() -> None:
    requirements = ["ray[default,train]>=2.60", "torch>=2.11", "ray>=9; extra == 'x'"]

    assert lower_bound("ray", requirements) == "2.60"
    assert lower_bound("torch", requirements) == "2.11"
    assert lower_bound("pyarrow", requirements) is None
