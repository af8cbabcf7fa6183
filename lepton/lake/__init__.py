"""Delta tables in and out: pinned snapshots, exact reads, atomic writes."""

from lepton.lake.home import home_of
from lepton.lake.snapshot import Snapshot, table
from lepton.lake.write import write

__all__ = ["Snapshot", "home_of", "table", "write"]
