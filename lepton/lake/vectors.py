"""Deletion vectors: which rows of a data file are gone (Delta protocol, "Deletion Vectors").

Pure. A vector is named in the log by a small descriptor and kept as a 64-bit roaring bitmap in the
portable layout (github.com/RoaringBitmap/RoaringFormatSpec): for each value of the upper 32 bits a
32-bit bitmap, which for each value of the next 16 bits has a sorted array, a set of 65,536 bits,
or runs. Whatever is not exactly that is damage and a ValueError: no row is guessed at.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.int64]]

_MAGIC = 1681511377
_RUNS, _NO_RUNS = 12347, 12346
_ARRAY_MOST, _ALWAYS_OFFSETS = 4096, 4
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_DIGIT = {c: i for i, c in enumerate(_Z85)}
_UUID_DIGITS = 20


@dataclass(frozen=True, slots=True)
class Vector:
    """A deletion vector as the log names it.

    Attributes:
        storage: ``u`` (a file in the table's folder, by UUID), ``p`` (a file, by its absolute
            path) or ``i`` (inline).
        place: the file, or the vector itself, as that storage writes it.
        offset: where it begins in the file, bytes; the length comes first.
        size: bytes of the vector itself.
        deleted: rows that it deletes.
    """

    storage: str
    place: str
    offset: int | None
    size: int
    deleted: int


def descriptor_of(vector: Vector) -> dict[str, Any]:
    """Return the descriptor that names a vector in the log."""
    told = {
        "storageType": vector.storage,
        "pathOrInlineDv": vector.place,
        "offset": vector.offset,
        "sizeInBytes": vector.size,
        "cardinality": vector.deleted,
    }
    return {k: v for k, v in told.items() if v is not None}


def vector_of(descriptor: Mapping[str, Any]) -> Vector:
    """Return the vector of a descriptor in an ``add`` action.

    Raises:
        ValueError: the descriptor lacks a part or has one of another type.
    """
    try:
        offset = descriptor.get("offset")
        return Vector(
            storage=str(descriptor["storageType"]),
            place=str(descriptor["pathOrInlineDv"]),
            offset=None if offset is None else int(offset),
            size=int(descriptor["sizeInBytes"]),
            deleted=int(descriptor["cardinality"]),
        )
    except (KeyError, TypeError) as e:
        raise ValueError(f"its descriptor is not whole: {dict(descriptor)}") from e


def file_of(vector: Vector) -> str | None:
    """Return the file that holds a vector, as a data file's path is given; None if inline.

    Raises:
        ValueError: the descriptor names no such place.
    """
    if vector.storage == "i":
        return None
    if vector.storage == "p":
        return unquote(vector.place)
    if vector.storage != "u" or len(vector.place) < _UUID_DIGITS:
        raise ValueError(f"storage {vector.storage!r} at {vector.place!r} is not known")
    folder = vector.place[:-_UUID_DIGITS]
    name = uuid.UUID(bytes=from_z85(vector.place[-_UUID_DIGITS:]))
    return f"{folder}/deletion_vector_{name}.bin" if folder else f"deletion_vector_{name}.bin"


def inline(vector: Vector) -> bytes:
    """Return the bytes of an inline vector.

    Raises:
        ValueError: they are not written as they must be.
    """
    data = from_z85(vector.place)
    if not 0 <= len(data) - vector.size < 4:
        raise ValueError(f"{len(data)} bytes inline, not {vector.size}")
    return data[: vector.size]


def framed(vector: Vector, stored: bytes) -> bytes:
    """Return a vector from its place in a file: length, vector, checksum.

    Raises:
        ValueError: the length is another or the checksum does not hold.
    """
    if len(stored) != vector.size + 8:
        raise ValueError(f"the file ends {vector.size + 8 - len(stored)} bytes too early")
    (size,), (checksum,) = struct.unpack(">i", stored[:4]), struct.unpack(">I", stored[-4:])
    data = stored[4:-4]
    if size != vector.size:
        raise ValueError(f"{size} bytes there, not {vector.size}")
    if zlib.crc32(data) != checksum:
        raise ValueError("its checksum does not hold")
    return data


def deleted_rows(vector: Vector, data: bytes) -> Rows:
    """Return the stored positions that a vector deletes, ascending.

    Raises:
        ValueError: the bytes are no such vector, or not as many rows as the log says.
    """
    try:
        rows = _array(data)
    except struct.error as e:
        raise ValueError("it is cut off") from e
    if len(rows) != vector.deleted:
        raise ValueError(f"it deletes {len(rows)} rows, and the log says {vector.deleted}")
    if len(rows) and (rows[0] < 0 or np.any(np.diff(rows) <= 0)):
        raise ValueError("its rows are not in order")
    return rows


def from_z85(text: str) -> bytes:
    """Decode ZeroMQ's base 85 (rfc.zeromq.org/spec/32): five digits are four bytes.

    Raises:
        ValueError: it is not that.
    """
    if len(text) % 5:
        raise ValueError(f"{len(text)} digits in base 85, which is no multiple of 5")
    digits = np.array([_DIGIT.get(c, -1) for c in text], np.int64).reshape(-1, 5)
    words = digits @ np.array([85**4, 85**3, 85**2, 85, 1], np.int64)
    if np.any(digits < 0) or np.any(words >= 2**32):
        raise ValueError("it is not written in base 85")
    return words.astype(">u4").tobytes()


def _array(data: bytes) -> Rows:
    """The 64-bit bitmap: how many 32-bit ones, then each after its upper bits."""
    magic, count = struct.unpack_from("<iq", data)
    if magic != _MAGIC:
        raise ValueError(f"its magic number is {magic}, not {_MAGIC}")
    at, parts = 12, [np.empty(0, np.int64)]
    for _ in range(count):
        (high,) = struct.unpack_from("<I", data, at)
        found, at = _bitmap(data, at + 4)
        parts += [(high << 32) + part for part in found]
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes too many")
    return np.concatenate(parts)


def _bitmap(data: bytes, at: int) -> tuple[list[Rows], int]:
    """The rows of a 32-bit bitmap that begins at ``at``, and where it ends."""
    (cookie,) = struct.unpack_from("<I", data, at)
    at += 4
    runs = np.zeros(0, bool)
    if cookie & 0xFFFF == _RUNS:
        count = (cookie >> 16) + 1
        flags = _numbers(data, at, (count + 7) // 8, np.dtype("u1"))
        runs = np.unpackbits(flags, bitorder="little")[:count].astype(bool)
        at += len(flags)
    elif cookie == _NO_RUNS:
        (count,) = struct.unpack_from("<I", data, at)
        runs = np.zeros(_sane(count), bool)
        at += 4
    else:
        raise ValueError(f"a bitmap begins with {cookie}, which is no roaring bitmap's beginning")
    heads = _numbers(data, at, 2 * count, np.dtype("<u2")).reshape(-1, 2).astype(np.int64)
    at += 4 * count
    if cookie == _NO_RUNS or count >= _ALWAYS_OFFSETS:
        at += 4 * count  # where each container begins: they follow one another anyway
    found: list[Rows] = []
    for (key, more), run in zip(heads.tolist(), runs.tolist(), strict=True):
        rows, at = _runs(data, at) if run else _members(data, at, more + 1)
        if len(rows) != more + 1:
            raise ValueError(f"a container has {len(rows)} rows, not {more + 1}")
        found.append((key << 16) + rows)
    return found, at


def _sane(count: int) -> int:
    if count > 2**16:
        raise ValueError(f"a bitmap of {count} containers")
    return count


def _runs(data: bytes, at: int) -> tuple[Rows, int]:
    (count,) = struct.unpack_from("<H", data, at)
    pairs = _numbers(data, at + 2, 2 * count, np.dtype("<u2")).reshape(-1, 2).astype(np.int64)
    parts = [np.arange(first, first + more + 1) for first, more in pairs.tolist()]
    return np.concatenate([np.empty(0, np.int64), *parts]), at + 2 + 4 * count


def _members(data: bytes, at: int, count: int) -> tuple[Rows, int]:
    if count <= _ARRAY_MOST:
        return _numbers(data, at, count, np.dtype("<u2")).astype(np.int64), at + 2 * count
    bits = np.unpackbits(_numbers(data, at, 8192, np.dtype("u1")), bitorder="little")
    return np.flatnonzero(bits).astype(np.int64), at + 8192


def _numbers(data: bytes, at: int, count: int, kind: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if at + count * kind.itemsize > len(data):
        raise ValueError("it is cut off")
    return np.frombuffer(data, kind, count, at)
