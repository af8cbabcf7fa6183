"""One quiet local Ray for all cluster tests of a session."""

import tempfile
from collections.abc import Iterator

import pytest

from lepton import cluster

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
