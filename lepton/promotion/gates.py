"""Gates: conditions on a version's metrics, parsed and judged here. Pure.

The language is a small part of Python's expressions: comparisons (chained too) of numbers and
metrics, joined by ``and``, ``or``, ``not``, with ``+ - * /`` and parentheses. ``champion.f1`` is
the champion's metric; ``champion`` alone is its value of the one metric that the comparison is
about. A comparison that cannot be decided is settled by its cause, under ``not`` too: without a
champion what is asked against it counts as met, so that a first version can pass; what is asked of
a value that is not a number (NaN, a division by zero) counts as not met.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lepton.errors import GateError

_COMPARE: dict[type[ast.cmpop], tuple[str, Callable[[float, float], bool]]] = {
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ALLOWED = (
    "a gate compares metrics with numbers, such as 'accuracy >= 0.9662' or "
    "'accuracy >= champion - 0.002 and f1 > champion.f1'"
)


@dataclass(frozen=True, slots=True)
class GateResult:
    """How a gate went.

    Attributes:
        expression: the gate.
        passed: whether it holds.
        details: a line for each comparison, such as "accuracy = 0.981 >= 0.9662: passed".
    """

    expression: str
    passed: bool
    details: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gate:
    """A parsed condition."""

    expression: str
    tree: ast.expr

    @property
    def metrics(self) -> frozenset[str]:
        """Metrics of the candidate that it names."""
        return _names(self.tree)

    @property
    def champions(self) -> frozenset[str]:
        """Metrics of the champion that it names, also by ``champion`` alone."""
        named = {_champion_metric(n) for n in ast.walk(self.tree) if isinstance(n, ast.Attribute)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Compare) and _champion_alone(node):
                named |= _names(node)
        return frozenset(n for n in named if n)

    def check(
        self, metrics: Mapping[str, float], champion: Mapping[str, float] | None = None
    ) -> GateResult:
        """Judge a candidate.

        Raises:
            GateError: it names a metric that was not computed.
        """
        missing = sorted(self.metrics - metrics.keys())
        if missing:
            raise GateError(
                f"gate {self.expression!r} names {', '.join(missing)}, which was not computed; "
                f"there are: {', '.join(sorted(metrics)) or 'no metrics'}"
            )
        judge = _Judge(self.expression, metrics, champion)
        passed = judge.truth(self.tree)
        return GateResult(self.expression, passed, tuple(judge.details))


def parse(expression: str) -> Gate:
    """Parse a gate.

    Raises:
        GateError: it does not parse, or uses something that gates do not have.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        _check_truth(tree, expression)
    except SyntaxError as e:
        place = f"character {e.offset}" if e.offset else "its end"
        raise GateError(
            f"cannot parse the gate {expression!r} at {place}: {_hint(expression)}"
        ) from e
    except (RecursionError, MemoryError) as e:
        raise GateError(f"the gate {expression[:40]!r}... is nested too deeply") from e
    return Gate(expression, tree)


def check_all(
    gates: Sequence[Gate | str],
    metrics: Mapping[str, float],
    champion: Mapping[str, float] | None = None,
) -> list[GateResult]:
    """Judge several gates; all have to pass, all are judged.

    Raises:
        GateError: one does not parse, or names a metric that was not computed.
    """
    parsed = [parse(gate) if isinstance(gate, str) else gate for gate in gates]
    return [gate.check(metrics, champion) for gate in parsed]


def _hint(expression: str) -> str:
    percent = re.search(r"(\d+\.?\d*)\s*%", expression)
    if percent is None:
        return _ALLOWED
    share = f"{float(percent[1]) / 100:.10g}"
    return f"write {percent[1]}% as {share}; {_ALLOWED}"


def _check_truth(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check_truth(value, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_truth(node.operand, text)
    elif isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        for value in (node.left, *node.comparators):
            _check_number(value, text)
        if _champion_alone(node) and len(_names(node)) != 1:
            raise GateError(
                f"gate {text!r}: 'champion' alone needs exactly one metric beside it; write "
                "champion.accuracy"
            )
    else:
        raise GateError(f"gate {text!r}: {ast.unparse(node)!r} is no comparison; {_hint(text)}")


def _check_number(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        _check_number(node.left, text)
        _check_number(node.right, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _check_number(node.operand, text)
    elif not (isinstance(node, ast.Name) or _is_figure(node) or _champion_metric(node)):
        raise GateError(
            f"gate {text!r}: {ast.unparse(node)!r} is no metric or number; {_hint(text)}"
        )


def _is_figure(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
        and abs(node.value) < 1e300  # 1e999 is infinity, and 10**400 fits no float
    )


def _is_champion(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "champion"


def _champion_alone(node: ast.AST) -> bool:
    if _is_champion(node):
        return True
    if isinstance(node, ast.Attribute):
        return False
    return any(_champion_alone(child) for child in ast.iter_child_nodes(node))


def _champion_metric(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute) and _is_champion(node.value):
        return node.attr
    return None


def _names(node: ast.AST) -> frozenset[str]:
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id != "champion"}
    return frozenset(found)


def _shown(node: ast.expr, value: float) -> str:
    text = ast.unparse(node)
    named = any(isinstance(n, ast.Name) for n in ast.walk(node))
    return f"{text} = {value:.10g}" if named else text


class _NoChampion(Exception):  # noqa: N818 - a signal between the functions below
    pass


class _Judge:
    def __init__(
        self, text: str, metrics: Mapping[str, float], champion: Mapping[str, float] | None
    ) -> None:
        self._text = text
        self._metrics = metrics
        self._champion = champion
        self.details: list[str] = []

    def truth(self, node: ast.expr, wanted: bool = True) -> bool:
        """Return whether a condition holds; ``wanted`` is False under an odd number of nots."""
        if isinstance(node, ast.BoolOp):
            found = [self.truth(v, wanted) for v in node.values]
            return all(found) if isinstance(node.op, ast.And) else any(found)
        if isinstance(node, ast.UnaryOp):
            return not self.truth(node.operand, not wanted)
        assert isinstance(node, ast.Compare)  # noqa: S101 - parse() allows nothing else
        met = self._met(node, wanted)
        return met if wanted else not met

    def _met(self, node: ast.Compare, wanted: bool) -> bool:
        about = next(iter(_names(node)), "")
        operands = (node.left, *node.comparators)
        shape = "{}" if wanted else "not ({})"
        try:
            values = [self._number(v, about) for v in operands]
        except _NoChampion:
            self.details.append(f"{shape.format(ast.unparse(node))}: passed, no champion yet")
            return True
        decided = not any(math.isnan(v) for v in values)
        pairs = zip(values, node.ops, values[1:], strict=False)
        holds = all(_COMPARE[type(op)][1](a, b) for a, op, b in pairs)
        met = decided and holds == wanted
        shown = _shown(operands[0], values[0])
        for op, operand, value in zip(node.ops, operands[1:], values[1:], strict=True):
            shown += f" {_COMPARE[type(op)][0]} {_shown(operand, value)}"
        end = "passed" if met else "failed" if decided else "failed, not a number"
        self.details.append(f"{shape.format(shown)}: {end}")
        return met

    def _number(self, node: ast.expr, about: str) -> float:
        if isinstance(node, ast.BinOp):
            left, right = self._number(node.left, about), self._number(node.right, about)
            try:
                return _ARITHMETIC[type(node.op)](left, right)
            except ZeroDivisionError:
                return math.nan
        if isinstance(node, ast.UnaryOp):
            return -self._number(node.operand, about)
        if isinstance(node, ast.Constant):
            value: Any = node.value
            return float(value)
        name = _champion_metric(node)
        if name is not None or _is_champion(node):
            return self._of_champion(name or about)
        assert isinstance(node, ast.Name)  # noqa: S101 - parse() allows nothing else
        return float(self._metrics[node.id])

    def _of_champion(self, name: str) -> float:
        if self._champion is None:
            raise _NoChampion
        if name not in self._champion:
            raise GateError(
                f"gate {self._text!r} needs the champion's {name}, which was not computed; it has: "
                f"{', '.join(sorted(self._champion)) or 'no metrics'}"
            )
        return float(self._champion[name])
