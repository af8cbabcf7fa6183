"""Ended spans as they lie in files and as OTLP wants them, both from plain values. Pure.

The SDK's span objects and the protobuf classes cost a span some 60 µs and leave dozens of objects
to the garbage collector. Most of a span is the same as in thousands of others: its name, what its
process is called, its attributes. That part is encoded once and kept; ids and times are put before
it. The result is a JSON line, and a ``Span`` message with the field numbers of OTLP's
``trace.proto`` (https://github.com/open-telemetry/opentelemetry-proto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import orjson

MOST_KEPT = 1024
"""Encoded common parts that are kept; then it begins anew."""
MOST_BYTES = 16_384
"""Of a common part that is kept."""
MOST_TEXT = 65_536
"""Characters of a text that is sent: what waits for a collector is counted in spans, and a span is
not to be as large as anything. A file has all of it."""

_KINDS = {"internal": 1, "server": 2, "client": 3, "producer": 4, "consumer": 5}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
ROOT = struct.Struct("<2s16s2s8scQcQ")
CHILD = struct.Struct("<2s16s2s8s2s8scQcQ")
_LINE = '{"trace_id":"%s","span_id":"%s","parent_id":%s,"start_ns":%d,"end_ns":%d,'
_ROOT_FLAGS, _REMOTE_FLAGS = 0x100, 0x300
"""It is known whether the parent is of another process: no, and yes."""


@dataclass(frozen=True, eq=False, slots=True)
class Common:
    """What many spans may have in common.

    Attributes:
        name: fixed, with no ids in it.
        kind: internal, server, client, producer or consumer.
        error: the kind of error, or an empty string.
        links: traceparents; an empty one counts for nothing.
        attributes: keys as they are.
    """

    name: str
    kind: str = "internal"
    error: str = ""
    links: Sequence[str] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Ended(NamedTuple):
    """A span that is over; ids are hex, the parent's empty where a trace begins.

    Attributes:
        start_ns: Unix nanoseconds.
        end_ns: Unix nanoseconds.
    """

    common: Common
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int


class Encoded(NamedTuple):
    """Spans as lines of a file, and as what :func:`request` takes."""

    line: bytes
    message: bytes


class Encoder:
    """Encodes the spans of one process.

    Args:
        process: what it is called in files.
    """

    def __init__(self, process: str) -> None:
        self._process = process
        self._kept: dict[bytes, Encoded] = {}

    def encode(self, span: Ended, *, sent: bool = True) -> Encoded:
        """Return both forms of a span; the message is empty if it is not to be ``sent``."""
        common, trace_id, span_id, parent_id, start_ns, end_ns = span
        shared = self.shared(common, has_parent=bool(parent_id))
        line = _LINE % (trace_id, span_id, _above(parent_id), start_ns, end_ns)
        line_bytes = line.encode() + shared.line
        if not sent:
            return Encoded(line_bytes, b"")
        ids = (b"\x0a\x10", bytes.fromhex(trace_id), b"\x12\x08", bytes.fromhex(span_id))
        times = (b"\x39", start_ns, b"\x41", end_ns)
        if parent_id:
            head = CHILD.pack(*ids, b"\x22\x08", bytes.fromhex(parent_id), *times)
        else:
            head = ROOT.pack(*ids, *times)
        size = len(head) + len(shared.message)
        return Encoded(line_bytes, b"".join((b"\x12", varint(size), head, shared.message)))

    def shared(self, common: Common, *, has_parent: bool) -> Encoded:
        """Return what spans with this common part share: the ends of their lines and messages."""
        attributes = common.attributes
        if common.error:
            attributes = {**attributes, "error.type": common.error}
        told = {
            "name": common.name,
            "process": self._process,
            "status": "error" if common.error else "ok",
            "attributes": attributes,
            "links": [f"{k[3:35]}:{k[36:52]}" for k in common.links if k],
        }
        line = orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE)
        key = line + common.kind.encode() + (b"" if has_parent else b"/")
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            found = Encoded(line[1:], _message(common, attributes, has_parent=has_parent))
            if (
                len(line) <= MOST_BYTES and b"null" not in line
            ):  # which stands for infinities and NaN alike
                self._kept[key] = found
        return found


def _above(parent_id: str) -> str:
    return f'"{parent_id}"' if parent_id else "null"


def request(resource: Mapping[str, Any], spans: Iterable[bytes]) -> bytes:
    """Return an ``ExportTraceServiceRequest``.

    Args:
        resource: attributes of the process.
        spans: messages of an encoder.
    """
    described = _field(1, b"".join(_field(1, _pair(k, v)) for k, v in resource.items()))
    parts = [_field(1, _field(1, b"lepton")), *spans]  # joined once: it is large
    scope = _tag(2, _BYTES) + varint(sum(map(len, parts)))
    size = len(described) + len(scope) + sum(map(len, parts))
    return b"".join((_tag(1, _BYTES), varint(size), described, scope, *parts))


def _message(common: Common, attributes: Mapping[str, Any], *, has_parent: bool) -> bytes:
    """The fields of a ``Span`` that many have in common."""
    parts = [_field(5, common.name.encode()), _tag(6, _VARINT) + varint(_KINDS[common.kind])]
    parts += [_field(9, _pair(k, v)) for k, v in attributes.items() if v is not None]
    parts += [_field(13, _link(k)) for k in common.links if k]
    told = common.error.encode()
    error = _field(2, told) + _tag(3, _VARINT) + varint(2) if told else b""
    parts.append(_field(15, error))
    parts.append(_flags(16, _REMOTE_FLAGS if has_parent else _ROOT_FLAGS))
    return b"".join(parts)


def _link(traceparent: str) -> bytes:
    trace_id, span_id = bytes.fromhex(traceparent[3:35]), bytes.fromhex(traceparent[36:52])
    return _field(1, trace_id) + _field(2, span_id) + _flags(6, _REMOTE_FLAGS)


def _flags(number: int, flags: int) -> bytes:
    return _tag(number, _FIXED32) + struct.pack("<I", flags)


def _pair(key: str, value: object) -> bytes:
    return _field(1, key.encode()) + _field(2, _value(value))


def _value(value: object) -> bytes:
    """An ``AnyValue``; what it has no kind for is told as text."""
    match value:
        case bool():
            return _tag(2, _VARINT) + varint(value)
        case int():
            return _tag(3, _VARINT) + varint(value & 0xFFFF_FFFF_FFFF_FFFF)
        case float():
            return _tag(4, _FIXED64) + struct.pack("<d", value)
        case list() | tuple():
            several = cast("Sequence[object]", value)
            return _field(5, b"".join(_field(1, _value(v)) for v in several))
        case _:
            return _field(1, str(value)[:MOST_TEXT].encode())


def _field(number: int, content: bytes) -> bytes:
    return _tag(number, _BYTES) + varint(len(content)) + content


def _tag(number: int, kind: int) -> bytes:
    return varint(number << 3 | kind)


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; lengths of spans take two."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
