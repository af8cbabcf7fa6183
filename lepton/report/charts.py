"""Charts as inline SVG: the loss curve, the confusion matrix, small digits. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby

from lepton.report.model import Fault, LossPoint, Sample

WIDTH, HEIGHT = 960, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 28, 40


def loss_chart(losses: Sequence[LossPoint], faults: Sequence[Fault]) -> str:
    """Return the loss by step: a line a life of the worker group, faults as vertical marks.

    The vertical axis is logarithmic where the losses span more than a factor of ten.
    """
    points = [p for p in losses if math.isfinite(p.loss)]
    if not points:
        return "<p>No steps were recorded.</p>"
    last = max(p.step for p in points)
    low, high = min(p.loss for p in points), max(p.loss for p in points)
    log = low > 0 and high / low > 10
    scale = _Scale(low, high, log=log)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, last)

    parts = [_grid(scale, last, x)]
    for attempt, group in groupby(points, key=lambda p: p.attempt):
        line = list(group)
        path = " ".join(f"{x(p.step):.1f},{scale.y(p.loss):.1f}" for p in line)
        workers = ", ".join(sorted({str(p.world_size) for p in line}))
        title = f"life {attempt + 1}: steps {line[0].step} to {line[-1].step}, workers {workers}"
        parts.append(
            f'<polyline class="line a{attempt % 4}" points="{path}"><title>{title}</title></polyline>'
        )
    for fault in faults:
        at = x(fault.step)
        parts.append(
            f'<line class="fault" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="fault" x="{at + 6:.1f}" y="{TOP}">{escape(fault.label)}, step '
            f"{fault.step}</text>"
        )
    name = f"Mean loss by step, {len(points)} steps" + (", logarithmic" if log else "")
    return _svg(name, "".join(parts), WIDTH, HEIGHT)


class _Scale:
    """The vertical axis."""

    def __init__(self, low: float, high: float, *, log: bool) -> None:
        self._log = log
        self._low, self._high = (math.log10(low), math.log10(high)) if log else (min(low, 0), high)
        if self._high <= self._low:
            self._high = self._low + 1

    def y(self, value: float) -> float:
        at = math.log10(value) if self._log else value
        share = (at - self._low) / (self._high - self._low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        if not self._log:
            return [self._low + (self._high - self._low) * i / 4 for i in range(5)]
        steps = [m * 10.0**e for e in range(-12, 12) for m in (1, 3)]
        return [s for s in steps if self._low <= math.log10(s) <= self._high]


def _grid(scale: _Scale, last: int, x: Callable[[float], float]) -> str:
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{scale.y(t):.1f}" y2="{scale.y(t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{scale.y(t) + 4:.1f}" text-anchor="end">{t:.3g}</text>'
        for t in scale.ticks()
    ]
    every = _round_up(last / 8)
    parts += [
        f'<text class="tick" x="{x(s):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{s}</text>'
        for s in range(0, last + 1, every)
    ]
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>'
    )
    return "".join(parts)


def _round_up(value: float) -> int:
    """Return the next number at or above ``value`` that is 1, 2 or 5 times a power of ten."""
    for exponent in range(12):
        for base in (1, 2, 5):
            if base * 10**exponent >= value:
                return base * 10**exponent
    return max(1, math.ceil(value))


def confusion_table(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Return a confusion matrix as a shaded table: rows are labels, columns answers."""
    most = max((n for row in confusion for n in row), default=0) or 1
    head = "".join(f"<th scope=col>{escape(label)}</th>" for label in labels)
    body = "".join(
        f"<tr><th scope=row>{escape(labels[i])}</th>"
        + "".join(_cell(n, i == j, n / most) for j, n in enumerate(row))
        + "</tr>"
        for i, row in enumerate(confusion)
    )
    return (
        '<table class="confusion"><caption>Rows: label. Columns: answer.</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(count: int, right: bool, share: float) -> str:
    if not count:
        return "<td>·</td>"
    kind = "right" if right else "wrong"
    return f'<td class="{kind}" style="--share:{0.15 + 0.85 * share:.2f}">{count}</td>'


def sample_grid(samples: Sequence[Sample]) -> str:
    """Return small pictures with their label and answer."""
    return '<div class="samples">' + "".join(_sample(s) for s in samples) + "</div>"


def _sample(sample: Sample) -> str:
    cells = "".join(
        f'<rect x="{c}" y="{r}" width="1.02" height="1.02" fill-opacity="{min(1.0, max(0.0, v)):.2f}"/>'
        for r, row in enumerate(sample.pixels)
        for c, v in enumerate(row)
        if v > 0
    )
    rows = len(sample.pixels)
    columns = max((len(r) for r in sample.pixels), default=0)
    right = sample.label == sample.answer
    name = f"label {sample.label}, answered {sample.answer}"
    verdict = "✓" if right else f"✗ is {sample.label}"
    kind = "right" if right else "wrong"
    return (
        f'<figure class="{kind}">{_svg(name, cells, columns, rows, "digit")}'
        f"<figcaption><b>{escape(sample.answer)}</b> {sample.score:.0%} {escape(verdict)}"
        "</figcaption></figure>"
    )


def _svg(name: str, body: str, width: int, height: int, kind: str = "chart") -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">'
        f"<title>{escape(name)}</title>{body}</svg>"
    )
