"""One quiet local Ray and one S3 server for all cluster tests of a session."""

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lepton import cluster
from tests.cluster.crew import Crew
from tests.cluster.world import World

S3_PYTHON = Path(__file__).parents[2] / ".venv" / "s3" / "bin" / "python"
S3_SERVER = Path(__file__).parents[2] / "benchmarks" / "lake_s3.py"

NOISE = (
    # Ray, Serve and torch warn of their own deprecations and leave sockets to the collector
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::UserWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "cluster":
            for entry in NOISE:
                item.add_marker(pytest.mark.filterwarnings(entry))


@pytest.fixture(autouse=True)
def no_crew_is_left() -> Iterator[None]:
    yield
    for crew in list(Crew.unfinished):
        crew.close()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    with (
        tempfile.TemporaryDirectory(prefix="lep") as scratch,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delenv("RAY_ADDRESS", raising=False)  # never a Ray that somebody else uses
        cluster.connect(object_store_memory=256 * 2**20, _temp_dir=scratch)
        yield
        from ray import serve

        serve.shutdown()
        cluster.disconnect()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> World:
    """A served model with four versions."""
    return World(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a real S3 server listens; it has the bucket ``lake``."""
    if not S3_PYTHON.exists():
        pytest.skip("no S3 server: run the tests by make test")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (tmp_path_factory.mktemp("s3") / "log").open("w") as log:
        command = [str(S3_PYTHON), str(S3_SERVER), str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                httpx.put(f"{url}/lake", timeout=5).raise_for_status()
                break
            except httpx.TransportError:
                assert server.poll() is None
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def options(endpoint: str) -> dict[str, str]:
    """How the S3 server is reached."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "open-sesame",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
