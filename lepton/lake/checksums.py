"""Page checksums of data files: whether a file has them, and whether readers verify them."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa


def page_checked(source: pa.NativeFile, offset: int) -> bool:
    """Whether the page header at an offset has a ``crc``.

    A header is Thrift's compact protocol: type and two sizes, then, if there, the checksum. Each
    is a byte 0x15 (the next field, an int32) and a number of seven bits a byte.
    """
    read: Any = source.read_at
    head: bytes = read(64, offset)
    at = 0
    for _ in range(3):
        if head[at : at + 1] != b"\x15":
            raise ValueError(f"no page header at byte {offset}")
        at += 1
        while at < len(head) and head[at] & 0x80:
            at += 1
        at += 1
    return head[at : at + 1] == b"\x15"


def verifies_pages() -> bool:
    """Page checksums are verified where a file has them; ``LEPTON_VERIFY_PAGES=0`` trusts disks."""
    return os.environ.get("LEPTON_VERIFY_PAGES", "1") != "0"
