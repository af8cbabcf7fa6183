"""Judging a candidate: every gate is asked, and all that did not pass are told at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lepton.errors import GateError, LeptonError
from lepton.promotion.conditions import Candidate, Condition
from lepton.promotion.gates import Gate, GateResult, parse
from lepton.promotion.measures import measured
from lepton.registry import ModelVersion

GateLike = str | Condition
"""An expression, or a function that takes a :class:`Candidate`."""


def gates_of(given: GateLike | Sequence[GateLike]) -> list[Gate | Condition]:
    """Return gates, parsed.

    Raises:
        GateError: an expression does not parse.
        TypeError: one is neither an expression nor a function.
    """
    several = [given] if isinstance(given, str) or callable(given) else list(given)
    for gate in several:
        if not (isinstance(gate, str) or callable(gate)):
            raise TypeError(f"gate {gate!r} must be an expression or a function of a Candidate")
    return [parse(gate) if isinstance(gate, str) else gate for gate in several]


def judge(
    gates: Sequence[Gate | Condition], chosen: ModelVersion, champion: ModelVersion | None
) -> list[GateResult]:
    """Ask every gate; return how each went, all passed.

    A comparison with the champion is about the newest snapshot that both were measured on.

    Raises:
        GateError: some did not pass, name a metric that was not computed, or fail themselves.
    """
    results = [
        _judged(gate, chosen, champion)
        if isinstance(gate, Gate)
        else _asked(gate, chosen, champion)
        for gate in gates
    ]
    failed = [r for r in results if not r.passed]
    if failed:
        details = "; ".join(d for r in failed for d in r.details)
        raise GateError(
            f"{chosen.model} version {chosen.version} did not pass its gate: {details}. Nothing "
            "has changed; train it further, or change the gate"
        )
    return results


def _judged(gate: Gate, chosen: ModelVersion, champion: ModelVersion | None) -> GateResult:
    mine, its, where = figures_of(chosen, champion)
    mine |= measured(chosen, gate.metrics)
    if champion is None or its is None:
        return gate.check(mine, None)
    its |= measured(champion, gate.champions)
    result = gate.check(mine, its)
    if gate.champions and where:
        return replace(result, details=(*result.details, where))
    return result


def figures_of(
    chosen: ModelVersion, champion: ModelVersion | None
) -> tuple[dict[str, float], dict[str, float] | None, str]:
    """Return the metrics of both to compare, and on what they were measured, if that is known."""
    mine = _newest(chosen.metrics, chosen.measured)
    if champion is None:
        return mine, None, ""
    both = [at for at in reversed(list(chosen.measured)) if at in champion.measured]
    if both:
        at = both[0]
        ours = {**chosen.metrics, **chosen.measured[at]}
        return ours, {**champion.metrics, **champion.measured[at]}, f"both measured on {at}"
    where = ""
    if chosen.measured and champion.measured:
        tables = (list(v.measured)[-1] for v in (chosen, champion))
        where = "measured on different rows: {} and, the champion, {}".format(*tables)
    return mine, _newest(champion.metrics, champion.measured), where


def _newest(
    metrics: Mapping[str, float], by_table: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    found = dict(metrics)
    for figures in by_table.values():
        found |= figures
    return found


def _asked(gate: Condition, chosen: ModelVersion, champion: ModelVersion | None) -> GateResult:
    name = _name(gate)
    try:
        found = gate(Candidate(version=chosen, champion=champion))
    except LeptonError:
        raise
    except Exception as e:
        raise GateError(
            f"the gate {name} failed on {chosen.model} version {chosen.version}: "
            f"{type(e).__name__}: {e}. Nothing has changed"
        ) from e
    if isinstance(found, GateResult):
        return found
    passed = bool(found)
    return GateResult(name, passed, (f"{name}: {'passed' if passed else 'failed'}",))


def _name(gate: Callable[..., object]) -> str:
    return str(getattr(gate, "__name__", type(gate).__name__))
