"""Deletion vectors in every storage and container that the protocol knows, made by hand."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conformance_log import Action, z85

MAGIC = 1681511377
_RUNS, _NO_RUNS = 12347, 12346


def bitmap(rows: Sequence[int], *, runs: bool = False) -> bytes:
    """Return rows (ascending) as a portable 64-bit roaring bitmap, in runs or not."""
    whole = np.asarray(rows, np.int64)
    highs = np.unique(whole >> 32)
    parts = [struct.pack("<iq", MAGIC, len(highs))]
    for high in highs.tolist():
        mine = whole[whole >> 32 == high] & 0xFFFFFFFF
        parts.append(struct.pack("<I", high) + _bitmap(mine, runs=runs))
    return b"".join(parts)


def _bitmap(rows: np.ndarray[Any, Any], *, runs: bool) -> bytes:
    keys = np.unique(rows >> 16).tolist()
    members = [rows[rows >> 16 == k] & 0xFFFF for k in keys]
    heads = b"".join(struct.pack("<HH", k, len(m) - 1) for k, m in zip(keys, members, strict=True))
    bodies = [_run(m) if runs else _plain(m) for m in members]
    if runs:
        flags = np.packbits(np.ones(len(keys), bool), bitorder="little").tobytes()
        begin = struct.pack("<I", _RUNS | (len(keys) - 1) << 16) + flags + heads
    else:
        begin = struct.pack("<II", _NO_RUNS, len(keys)) + heads
    if not runs or len(keys) >= 4:
        at = len(begin) + 4 * len(keys)
        for body in bodies:
            begin += struct.pack("<I", at)
            at += len(body)
    return begin + b"".join(bodies)


def _run(members: np.ndarray[Any, Any]) -> bytes:
    pieces = np.split(members, np.flatnonzero(np.diff(members) != 1) + 1)
    ends = b"".join(struct.pack("<HH", int(p[0]), len(p) - 1) for p in pieces)
    return struct.pack("<H", len(pieces)) + ends


def _plain(members: np.ndarray[Any, Any]) -> bytes:
    if len(members) <= 4096:
        return members.astype("<u2").tobytes()
    bits = np.zeros(2**16, bool)
    bits[members] = True
    return np.packbits(bits, bitorder="little").tobytes()


def framed(data: bytes) -> bytes:
    """Return a vector as it stands in a file: length, vector, checksum."""
    return struct.pack(">i", len(data)) + data + struct.pack(">I", zlib.crc32(data))


def vectored(
    action: Action, rows: Sequence[int], root: Path, storage: str = "u", *, runs: bool = False
) -> Action:
    """Return an add action of which some rows are deleted; its vector is written below ``root``."""
    data = bitmap(rows, runs=runs)
    vector: dict[str, Any] = {
        "storageType": storage,
        "sizeInBytes": len(data),
        "cardinality": len(rows),
    }
    if storage == "i":
        vector["pathOrInlineDv"] = z85(data + bytes(-len(data) % 4))
        return {"add": action["add"] | {"deletionVector": vector}}
    name = uuid.uuid4()
    folder = root / ("ab" if storage == "u" else "")
    folder.mkdir(exist_ok=True, parents=True)
    file = folder / f"deletion_vector_{name}.bin"
    padding = b"\x01another vector"
    file.write_bytes(padding + framed(data))
    place = f"ab{z85(name.bytes)}" if storage == "u" else file.absolute().as_uri()
    vector |= {"pathOrInlineDv": place, "offset": len(padding)}
    return {"add": action["add"] | {"deletionVector": vector}}
