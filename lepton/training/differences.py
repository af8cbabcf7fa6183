"""How a saved state differs from what a loop attached: which names, which shapes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

Shapes = Mapping[str, tuple[int, ...]]
"""Of a net's parameters and buffers, by name."""

Groups = Sequence[tuple[int, frozenset[str]]]
"""Of an optimiser's parameter groups: how many parameters, and the names of the settings."""

Outline = Shapes | Groups | None
"""What a thing's state is made of; None where only the thing itself can tell."""

SHOWN = 20
"""How many differences a message names."""


def differences(saved: Mapping[str, Outline], now: Mapping[str, Outline]) -> list[str]:
    """Return what differs, a line each; nothing if the saved state can be loaded.

    Args:
        saved: by attached name, what the state is made of.
        now: the same of what is attached.
    """
    found = [f"{name} is saved but not attached" for name in saved if name not in now]
    found += [f"{name} is attached but was not saved" for name in now if name not in saved]
    for name in saved:
        found += _of_one(name, saved[name], now.get(name))
    return found


def _of_one(name: str, was: Outline, now: Outline) -> Iterator[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        yield from _shapes(name, was, now)
    elif isinstance(was, Sequence) and isinstance(now, Sequence):
        yield from _groups(name, was, now)


def _shapes(name: str, was: Shapes, now: Shapes) -> Iterator[str]:
    for key, shape in was.items():
        if key not in now:
            yield f"{name}.{key} {shape} is gone"
        elif shape != now[key]:
            yield f"{name}.{key} was {shape}, is {now[key]}"
    for key, shape in now.items():
        if key not in was:
            yield f"{name}.{key} {shape} is new"


def _groups(name: str, was: Groups, now: Groups) -> Iterator[str]:
    counts, present = ([n for n, _ in groups] for groups in (was, now))
    if counts != present:
        yield f"{name} was over {_words(counts)}, is over {_words(present)}"
        return
    for (_, before), (_, after) in zip(was, now, strict=True):
        gone, new = sorted(before - after), sorted(after - before)
        if gone and new:  # a setting more or less comes with another version or a schedule
            yield f"{name} is an optimiser of another kind: it had {gone}, it has {new}"
            return


def _words(counts: Sequence[int]) -> str:
    return f"{sum(counts)} parameters in {len(counts)} groups of {list(counts)}"


def other_model(where: str, found: Sequence[str]) -> str:
    """Describe a state that does not fit what the loop attached."""
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"{where} does not fit what the loop attached, it is of another model; use another run "
        f"name, or attach the model as it was: {'; '.join(found[:SHOWN])}{more}"
    )
