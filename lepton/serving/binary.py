"""The protocol's binary tensor extension, and compressed bodies: bytes to values and back.

Source: the Open Inference Protocol's "Binary Tensor Data Extension". Pure. Numbers never pass
through Python lists; they are little-endian and row-major. A body never unpacks to more than the
limit, whatever its compressed size.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pyarrow as pa

from lepton.serving.inputs import ARROW, MAX_BYTES, BadRequest, Input, dtype_of

_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def unpacked(body: bytes, encoding: str, limit: int = MAX_BYTES) -> bytes:
    """Return a body without its content encoding.

    Args:
        body: as it came.
        encoding: gzip, deflate (zlib's format, as HTTP says), identity or nothing.
        limit: bytes of the result at most.

    Raises:
        BadRequest: another encoding (415), damaged (400) or too large (413).
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _WINDOWS:
        raise BadRequest(f"content encoding {encoding!r} is not known: use gzip or deflate", 415)
    parts: list[bytes] = []
    left = limit
    try:
        while True:  # gzip bodies may have several members
            stream = zlib.decompressobj(_WINDOWS[name])
            part = stream.decompress(body, left + 1)
            left -= len(part)
            if left < 0:
                raise BadRequest(f"the body unpacks to more than {limit} bytes", 413)
            parts.append(part)
            if not stream.eof:
                raise BadRequest(f"the {name} body is cut short")
            body = stream.unused_data
            if not body:
                return b"".join(parts)
    except zlib.error as e:
        raise BadRequest(f"the body is not {name}: {e}") from e


def split(body: bytes, header: str | None) -> tuple[memoryview, memoryview]:
    """Return a body's JSON and the raw tensors after it.

    Args:
        body: unpacked.
        header: of Inference-Header-Content-Length, the length of the JSON in bytes.

    Raises:
        BadRequest: no length within the body.
    """
    view = memoryview(body)
    if header is None:
        return view, view[:0]
    if not (header.isascii() and header.isdigit() and len(header) < 12):
        raise BadRequest(f"Inference-Header-Content-Length is {header!r}, wanted a byte count")
    length = int(header)
    if length > len(view):
        raise BadRequest(
            f"Inference-Header-Content-Length is {length}, the body has {len(view)} bytes"
        )
    return view[:length], view[length:]


def array_of(raw: memoryview, spec: Input, count: int) -> Any:
    """Return ``count`` values of an input as a flat Arrow array.

    NaN stands for a missing value where the model fills these.

    Raises:
        BadRequest: another number of values, or bytes that are none of its datatype.
    """
    if spec.datatype == "BYTES":
        return _texts(raw, spec, count)
    dtype = dtype_of(spec.datatype)
    if len(raw) != count * dtype.itemsize:
        raise BadRequest(
            f"input {spec.name!r} has {len(raw)} raw bytes; "
            f"{count} values of {spec.datatype} are {count * dtype.itemsize}"
        )
    if spec.datatype == "BOOL":
        marks = np.frombuffer(raw, np.uint8)
        if (marks > 1).any():
            raise BadRequest(f"input {spec.name!r}: raw BOOL bytes must be 0 or 1")
        return pa.array(marks.view(np.bool_))
    values = np.require(np.frombuffer(raw, dtype), requirements="A")
    return pa.array(values, type=ARROW[spec.datatype], from_pandas=spec.nullable)


def _texts(raw: memoryview, spec: Input, count: int) -> Any:
    """Each text is preceded by its length in four bytes."""
    texts: list[bytes] = []
    at = 0
    while at + 4 <= len(raw) and len(texts) < count:
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if end > len(raw):
            break
        texts.append(bytes(raw[at + 4 : end]))
        at = end
    if len(texts) != count or at != len(raw):
        raise BadRequest(
            f"input {spec.name!r}: raw bytes hold {len(texts)} whole texts in {at} of "
            f"{len(raw)} bytes, its shape says {count}"
        )
    try:
        return pa.array(texts, pa.binary()).cast(pa.string())
    except pa.ArrowInvalid as e:
        raise BadRequest(f"input {spec.name!r}: a text is not UTF-8") from e


def raw_of(values: np.ndarray[Any, Any]) -> bytes:
    """Return an array as raw tensor bytes."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
