"""Warnings of Jupyter's and Ray's own making do not fail these tests."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "notebooks":
            for kind in ("DeprecationWarning", "ResourceWarning", "FutureWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
