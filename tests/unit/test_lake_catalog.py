"""A catalog's name leads to its table."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.data.catalog import Catalog, ReaderFormat, ResolvedSource

import lepton
from lepton.errors import LakeError


class Directory(Catalog):
    """A catalog of folders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def resolve(self, table: str, *, reader: ReaderFormat, **_: Any) -> ResolvedSource:
        at = self.root.joinpath(*table.split("."))
        return ResolvedSource(path=str(at) if at.exists() else None, data_format=reader)


def test_a_name_is_looked_up(tmp_path: Path) -> None:
    lepton.write(pa.table({"x": [1]}), tmp_path / "main" / "sales" / "orders")
    found = lepton.table("main.sales.orders", catalog=Directory(tmp_path))

    assert found.to_arrow()["x"].to_pylist() == [1]
    with pytest.raises(LakeError, match=r"no path for table 'main\.sales\.nothing'"):
        lepton.table("main.sales.nothing", catalog=Directory(tmp_path))
