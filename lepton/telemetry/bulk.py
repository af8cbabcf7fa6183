"""Spans of requests, encoded by the hundred: what each has of its own are columns of a table. Pure.

Requests that were answered alike differ in ids and times alone, and these have always the same
width. So the first is encoded as :mod:`lepton.telemetry.wire` does it, repeated, and NumPy puts the
others' ids and times in their places.
"""

from __future__ import annotations

from binascii import unhexlify
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from lepton.telemetry.wire import CHILD, ROOT, Common, Encoded, Encoder, Ended, varint

FEW = 8
"""Fewer spans are encoded one by one."""

_DIGITS = 19
"""Of Unix nanoseconds, from 2001 to 2286."""
_LENGTH = 55
"""Of a traceparent."""
_TRACE, _SPAN = slice(3, 35), slice(36, 52)


class Left(NamedTuple):
    """A span that is over, as a request leaves it.

    Attributes:
        traceparent: its own; the flag does not count.
        above: its parent's, or an empty string where a trace begins.
        start_ns: Unix nanoseconds.
        end_ns: Unix nanoseconds.
    """

    common: Common
    traceparent: str
    above: str
    start_ns: int
    end_ns: int


def encode_alike(encoder: Encoder, spans: Sequence[Left], *, sent: bool = True) -> Encoded:
    """Return both forms of spans (or tuples like them) with one common part, in any order.

    Args:
        encoder: of this process.
        spans: what was left.
        sent: whether messages are wanted, too.
    """
    if len(spans) < FEW:
        return _one_by_one(encoder, spans, sent=sent)
    _, own, above, starts, ends = zip(*spans, strict=True)
    if any(above) != all(above):
        parts = [[s for s in spans if bool(s[2]) is has_parent] for has_parent in (True, False)]
        found = [encode_alike(encoder, part, sent=sent) for part in parts]
        return Encoded(b"".join([e.line for e in found]), b"".join([e.message for e in found]))
    if not _fits(min(starts), max(starts), min(ends), max(ends)):
        return _one_by_one(encoder, spans, sent=sent)
    return _many(encoder, ended(spans[0]), (own, above, starts, ends), sent=sent)


def _one_by_one(encoder: Encoder, spans: Sequence[Left], *, sent: bool) -> Encoded:
    found = [encoder.encode(ended(span), sent=sent) for span in spans]
    return Encoded(b"".join([e.line for e in found]), b"".join([e.message for e in found]))


def ended(span: Left) -> Ended:
    """Return the same with ids apart."""
    common, traceparent, above, start_ns, end_ns = span
    ids = traceparent[_TRACE], traceparent[_SPAN], above[_SPAN]
    return Ended(common, *ids, start_ns, max(start_ns, end_ns))


def _fits(*times: int) -> bool:
    """Whether their times have the usual width; no clock is asked to be right."""
    return min(times) >= 10 ** (_DIGITS - 1) and max(times) < 2**63


def _many(
    encoder: Encoder,
    example: Ended,
    columns: tuple[Sequence[str], Sequence[str], Sequence[int], Sequence[int]],
    *,
    sent: bool,
) -> Encoded:
    import numpy as np

    first = encoder.encode(example, sent=sent)
    own, above, starts, ends = columns
    text = {"trace": _cut(np, own, _TRACE), "span": _cut(np, own, _SPAN)}
    if above[0]:
        text["parent"] = _cut(np, above, _SPAN)
    times = {"start": starts, "end": list(map(max, starts, ends))}  # a clock may be put back
    digits = {name: "".join(map(str, values)).encode() for name, values in times.items()}
    lines = _filled(np, first.line, _places_in_line(first.line, text), {**text, **digits})
    if not sent:
        return Encoded(lines, b"")
    numbers = {name: np.array(values, "<u8").tobytes() for name, values in times.items()}
    ids = {name: unhexlify(values) for name, values in text.items()}
    places = _places_in_message(first.message, has_parent="parent" in text)
    return Encoded(lines, _filled(np, first.message, places, {**ids, **numbers}))


def _cut(np: Any, traceparents: Sequence[str], part: slice) -> bytes:
    """Return a part of each, one behind the other."""
    letters = np.frombuffer("".join(traceparents).encode(), "u1")
    return letters.reshape(-1, _LENGTH)[:, part].tobytes()


def _places_in_line(line: bytes, text: Mapping[str, bytes]) -> Mapping[str, int]:
    keys = {"trace": b'"trace_id":"', "span": b'"span_id":"', "parent": b'"parent_id":"'}
    wanted = {name: key for name, key in keys.items() if name in text}
    wanted |= {"start": b'"start_ns":', "end": b'"end_ns":'}
    return {name: line.index(key) + len(key) for name, key in wanted.items()}  # the first is ours


def _places_in_message(message: bytes, *, has_parent: bool) -> Mapping[str, int]:
    head = CHILD.size if has_parent else ROOT.size
    size = next(n for n in range(1, 6) if len(varint(len(message) - 1 - n)) == n)
    begin = 1 + size  # behind its tag and its size
    places = {"trace": 2, "span": 20, "start": head - 17, "end": head - 8}
    places |= {"parent": 30} if has_parent else {}
    return {name: begin + place for name, place in places.items()}


def _filled(
    np: Any, example: bytes, places: Mapping[str, int], columns: Mapping[str, bytes]
) -> bytes:
    """Return an encoded span many times over, with columns of their own. All are equally long."""
    count = len(columns["start"]) // (_DIGITS if example[:1] == b"{" else 8)
    content = bytearray(example) * count
    widths = tuple(len(columns[name]) // count for name in places)
    row = _row(tuple(places), tuple(places.values()), widths, len(example))
    table = np.frombuffer(content, row)
    for name in places:
        table[name] = np.frombuffer(columns[name], row[name])
    return bytes(content)


@lru_cache(maxsize=256)
def _row(names: Sequence[str], places: Sequence[int], widths: Sequence[int], size: int) -> Any:
    import numpy as np

    kinds = [_KINDS.get(width, f"V{width}") for width in widths]
    return np.dtype({"names": names, "formats": kinds, "offsets": places, "itemsize": size})


_KINDS: Mapping[int, str] = {8: "<u8"}
"""By their width in bytes: copied as numbers where that is quicker."""
