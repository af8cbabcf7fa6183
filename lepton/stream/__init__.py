"""The row stream: one order at any number of workers, resumable anywhere."""

from lepton.stream.assembly import Part
from lepton.stream.cursor import Cursor, cursor_of
from lepton.stream.mixture import Mixture, mix
from lepton.stream.order import Digest, digest_of
from lepton.stream.shard import Shard
from lepton.stream.stream import Stream

__all__ = [
    "Cursor",
    "Digest",
    "Mixture",
    "Part",
    "Shard",
    "Stream",
    "cursor_of",
    "digest_of",
    "mix",
]
