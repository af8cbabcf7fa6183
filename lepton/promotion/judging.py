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

_TO_DO = (
    "have both judged on one snapshot by lepton.evaluate(checkpoints.load(version.checkpoint), "
    "table, label=...), and record that by Registry.measure(); or compare them all "
    "the same by gate=any_rows(...) of lepton.promotion"
)


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


def any_rows(expression: str) -> Condition:
    """Return a gate: an expression that may compare figures of different rows; its record says so.

    For a champion that was judged on rows that are gone; an ordinary gate is refused then.

    Raises:
        GateError: it does not parse.
    """
    gate = parse(expression)

    def judged(candidate: Candidate) -> GateResult:
        return _judged(gate, candidate.version, candidate.champion, same_rows=False)

    return judged


def judge(
    gates: Sequence[Gate | Condition], chosen: ModelVersion, champion: ModelVersion | None
) -> list[GateResult]:
    """Ask every gate; return how each went, all passed.

    A metric is compared with the champion's on the newest snapshot that both were measured on by
    it, or else as it was registered, if neither says on which rows.

    Raises:
        GateError: some did not pass, name a metric that was not computed, compare figures of
            different rows, or fail themselves.
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


def _judged(
    gate: Gate, chosen: ModelVersion, champion: ModelVersion | None, *, same_rows: bool = True
) -> GateResult:
    mine = _newest(chosen.metrics, chosen.measured) | measured(chosen, gate.metrics)
    if champion is None:
        return gate.check(mine, None)
    its = _newest(champion.metrics, champion.measured) | measured(champion, gate.champions)
    notes: list[str] = []
    for name in sorted(gate.champions & gate.metrics):
        own, other = rows_of(name, chosen, champion)
        if own != other:
            where = [at or "rows that nobody named" for at in (own, other)]
            note = "{} on {}, the champion's on {}".format(name, *where)
            if same_rows:
                raise GateError(f"gate {gate.expression!r} compares {note}: {_TO_DO}")
            notes.append(f"{note}: other rows, as any_rows() allows")
        elif own:
            mine[name], its[name] = (v.measured[own][name] for v in (chosen, champion))
            notes.append(f"{name}: both measured on {own}")
        elif name in chosen.metrics or name in champion.metrics:
            notes.append(f"{name}: as registered, on rows that nobody named")
    result = gate.check(mine, its)
    return replace(result, details=(*result.details, *notes))


def rows_of(name: str, chosen: ModelVersion, champion: ModelVersion) -> tuple[str, str]:
    """Return on which snapshots two versions' figures of a metric are to be compared.

    The newest of the candidate's that both have, or else the newest of each; empty for a figure
    that was registered without one.
    """
    ours, theirs = (
        [at for at in reversed(list(v.measured)) if name in v.measured[at]]
        for v in (chosen, champion)
    )
    both = next((at for at in ours if at in theirs), "")
    return (both, both) if both else (ours[0] if ours else "", theirs[0] if theirs else "")


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
