"""Spans of requests, encoded by the hundred: what each has of its own are columns of a table. Pure.

Requests that were answered alike differ in ids and times alone, and these have always the same
width. So one of them is encoded as :mod:`lepton.telemetry.wire` does it and repeated; that sheet is
kept, and whoever comes next has only ids and times put in their places.
"""

from __future__ import annotations

from binascii import unhexlify
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lepton.telemetry.wire import CHILD, ROOT, Common, Encoded, Encoder, Ended, varint

FEW = 8
"""Fewer spans are encoded one by one."""
MANY = 240
"""Spans that are encoded at once. For more than 500 numbers (two of each span) NumPy lets go of the
interpreter's lock, and a busy thread keeps it for its 5 ms then."""
MOST_SHEETS = 8
"""That are kept; then it begins anew."""
MOST_BYTES = 4096
"""Of a span's line that has a sheet: what a client asks for is in it, and may be long."""

_DIGITS = 19
"""Of Unix nanoseconds, from 2001 to 2286."""
_LENGTH = 55
"""Of a traceparent."""
_TRACE, _SPAN = slice(3, 35), slice(36, 52)


@dataclass(frozen=True)
class Several:
    """Spans that are over, with one common part, by column.

    Attributes:
        traceparents: their own; the flags do not count.
        above: their parents', or empty strings where traces begin.
        starts: Unix nanoseconds.
        ends: Unix nanoseconds.
    """

    common: Common
    traceparents: Sequence[str]
    above: Sequence[str]
    starts: Sequence[int]
    ends: Sequence[int]

    def __len__(self) -> int:
        return len(self.traceparents)

    @cached_property
    def times(self) -> Any:
        """Begin and end, of shape (2, spans); where a clock was put back, a span took no time."""
        import numpy as np

        found = np.array((self.starts, self.ends), "<i8")
        np.maximum(found[0], found[1], out=found[1])
        return found

    def spans(self) -> list[Ended]:
        """Return them one by one."""
        found: list[Ended] = []
        each = zip(self.traceparents, self.above, self.starts, self.ends, strict=True)
        for own, above, start_ns, end_ns in each:
            ids = own[_TRACE], own[_SPAN], above[_SPAN]
            found.append(Ended(self.common, *ids, start_ns, max(start_ns, end_ns)))
        return found

    def some(self, which: Sequence[int]) -> Several:
        """Return those at some places."""
        columns: Any = (self.traceparents, self.above, self.starts, self.ends)
        return Several(self.common, *([column[at] for at in which] for column in columns))

    def cut(self, most: int) -> list[Several]:
        """Return them in parts of so many at the most."""
        columns: Any = (self.traceparents, self.above, self.starts, self.ends)
        starts = range(0, len(self), most)
        return [Several(self.common, *(c[at : at + most] for c in columns)) for at in starts]


FIELDS = 5
"""Entries of a span in a list that :func:`apart` takes: its common part, then its columns."""


def apart(flat: Sequence[Any], most: int = MANY) -> list[Several]:
    """Put together the spans that have a common part, so many at the most.

    Args:
        flat: :data:`FIELDS` entries for each span, one behind the other.
        most: spans of each part.
    """
    commons, *columns = (flat[field::FIELDS] for field in range(FIELDS))
    found: list[Several] = []
    for common in dict.fromkeys(commons):
        every = Several(common, *columns)
        if commons.count(common) < len(commons):
            every = every.some([at for at, one in enumerate(commons) if one is common])
        found += every.cut(most)
    return found


class Bulk:
    """Encodes spans that have much in common. For one thread at a time.

    Args:
        encoder: of this process.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._sheets: dict[tuple[Common, bool, bool], _Sheet] = {}

    def encode(self, some: Several, *, sent: bool = True) -> Encoded:
        """Return both forms of spans, in any order.

        Args:
            some: :data:`MANY` at the most.
            sent: whether messages are wanted, too.
        """
        if len(some) < FEW or some.times.min() < 10 ** (_DIGITS - 1):  # not the usual width
            return self._one_by_one(some, sent=sent)
        if any(some.above) != all(some.above):
            places = [[n for n, a in enumerate(some.above) if bool(a) is c] for c in (True, False)]
            return _joined([self.encode(some.some(which), sent=sent) for which in places])
        text = _cut(some.traceparents, trace=_TRACE, span=_SPAN)
        if some.above[0]:
            text |= _cut(some.above, parent=_SPAN)
        sheet = self._sheet(some, text, sent=sent)
        return sheet.filled(text, some.times) if sheet else self._one_by_one(some, sent=sent)

    def _one_by_one(self, some: Several, *, sent: bool) -> Encoded:
        return _joined([self._encoder.encode(one, sent=sent) for one in some.spans()])

    def _sheet(self, some: Several, text: Mapping[str, bytes], *, sent: bool) -> _Sheet | None:
        key = some.common, "parent" in text, sent
        found = self._sheets.get(key)
        if found is None:
            example = self._encoder.encode(some.some([0]).spans()[0], sent=sent)
            if len(example.line) > MOST_BYTES:
                return None
            if len(self._sheets) >= MOST_SHEETS:
                self._sheets.clear()
            found = self._sheets[key] = _Sheet(example, text)
        return found


def _joined(found: Sequence[Encoded]) -> Encoded:
    return Encoded(b"".join([e.line for e in found]), b"".join([e.message for e in found]))


class _Sheet:
    """One span in both forms, many times over.

    Args:
        example: the span.
        names: of its ids.
    """

    def __init__(self, example: Encoded, names: Mapping[str, object]) -> None:
        self._lines = _Repeated(example.line, _places_in_line(example.line, names))
        self._messages = None
        if example.message:
            places = _places_in_message(example.message, has_parent="parent" in names)
            self._messages = _Repeated(example.message, places)

    def filled(self, ids: Mapping[str, bytes], times: Any) -> Encoded:
        """Return it with ids, in hexadecimal digits, and times of shape (2, spans)."""
        count = times.shape[1]
        digits = _digits(times)
        half = len(digits) // 2
        lines = self._lines.filled(count, {**ids, "start": digits[:half], "end": digits[half:]})
        if self._messages is None:
            return Encoded(lines, b"")
        columns: dict[str, Any] = {name: unhexlify(digits) for name, digits in ids.items()}
        columns |= {"start": times[0], "end": times[1]}
        return Encoded(lines, self._messages.filled(count, columns))


class _Repeated:
    """Something of a fixed width many times over, with columns to be overwritten.

    Args:
        example: what is repeated.
        places: of each column, its place and width in bytes.
    """

    def __init__(self, example: bytes, places: Mapping[str, tuple[int, int]]) -> None:
        import numpy as np

        kinds = {
            name: np.dtype(_KINDS.get(width, f"V{width}")) for name, (_, width) in places.items()
        }
        row = np.dtype(
            {
                "names": list(places),
                "formats": list(kinds.values()),
                "offsets": [at for at, _ in places.values()],
                "itemsize": len(example),
            }
        )
        self._rows = np.frombuffer(bytearray(example) * MANY, row)
        self._columns = [(name, self._rows[name], kinds[name]) for name in places]

    def filled(self, count: int, columns: Mapping[str, Any]) -> bytes:
        """Return the first ones with columns of their own: bytes, or arrays."""
        import numpy as np

        for name, column, kind in self._columns:
            column[:count] = np.frombuffer(columns[name], kind)
        return self._rows[:count].tobytes()


_KINDS: Mapping[int, str] = {8: "<u8"}
"""By their width in bytes: copied as numbers where that is quicker."""


def _cut(traceparents: Sequence[str], **parts: slice) -> dict[str, bytes]:
    """Return parts of each, one behind the other."""
    import numpy as np

    letters = np.frombuffer("".join(traceparents).encode(), "u1").reshape(-1, _LENGTH)
    return {name: letters[:, part].tobytes() for name, part in parts.items()}


def _digits(times: Any) -> bytes:
    """Return the digits of numbers of equal width, one behind the other."""
    return b"%d" * times.size % tuple(times.ravel().tolist())


def _places_in_line(line: bytes, ids: Mapping[str, object]) -> Mapping[str, tuple[int, int]]:
    widths = {"trace": 32, "span": 16, "parent": 16, "start": _DIGITS, "end": _DIGITS}
    keys = {"trace": b'"trace_id":"', "span": b'"span_id":"', "parent": b'"parent_id":"'}
    wanted = {name: key for name, key in keys.items() if name in ids}
    wanted |= {"start": b'"start_ns":', "end": b'"end_ns":'}
    return {n: (line.index(key) + len(key), widths[n]) for n, key in wanted.items()}  # first: ours


def _places_in_message(message: bytes, *, has_parent: bool) -> Mapping[str, tuple[int, int]]:
    head = CHILD.size if has_parent else ROOT.size
    size = next(n for n in range(1, 6) if len(varint(len(message) - 1 - n)) == n)
    begin = 1 + size  # behind its tag and its size
    places = {"trace": (2, 16), "span": (20, 8)}
    places |= {"parent": (30, 8)} if has_parent else {}
    places |= {"start": (head - 17, 8), "end": (head - 8, 8)}
    return {name: (begin + place, width) for name, (place, width) in places.items()}
