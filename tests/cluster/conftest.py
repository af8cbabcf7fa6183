"""One quiet local Ray and one S3 server for all cluster tests of a session."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from lepton import cluster
from tests.cluster.crew import Crew
from tests.cluster.world import World, wait_until

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


_shared = ExitStack()
"""What ends the shared cluster."""
_files = set[Path]()
"""Files whose tests share it. They come first, so that it is not in the way of the others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "cluster":
            for entry in NOISE:
                item.add_marker(pytest.mark.filterwarnings(entry))
        if shares(item):
            _files.add(item.path)
    here = Path(__file__).parent
    items.sort(key=lambda item: (here in item.path.parents) + (item.path not in _files))


def shares(item: pytest.Item) -> bool:
    return "ray_cluster" in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if item.path in _files and (nextitem is None or nextitem.path not in _files):
        _shared.close()


@pytest.fixture(autouse=True)
def no_crew_is_left() -> Iterator[None]:
    yield
    for crew in list(Crew.unfinished):
        crew.close()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    scratch = _shared.enter_context(tempfile.TemporaryDirectory(prefix="lep"))
    patch = _shared.enter_context(pytest.MonkeyPatch.context())
    patch.delenv("RAY_ADDRESS", raising=False)  # never a Ray that somebody else uses
    cluster.connect(object_store_memory=256 * 2**20, _temp_dir=scratch)
    _shared.callback(cluster.disconnect)
    _shared.callback(end_serve)
    yield
    _shared.close()


def end_serve() -> None:
    from ray import serve

    serve.shutdown()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> World:
    """A served model with four versions."""
    return World(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a real S3 server listens; it has the bucket ``lake``."""
    if not S3_PYTHON.exists():
        pytest.skip("no S3 server: run the tests by make test")
    (port,) = cluster.free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with (tmp_path_factory.mktemp("s3") / "log").open("w") as log:
        command = [str(S3_PYTHON), str(S3_SERVER), str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: server.poll() is not None or made(f"{url}/lake"))
        assert server.poll() is None
        yield url
    finally:
        server.kill()
        server.wait()


def made(bucket: str) -> bool:
    """Whether the server has come up and made a bucket."""
    with suppress(httpx.TransportError):
        return httpx.put(bucket, timeout=60).is_success
    return False


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
