"""Amounts as they are written on a command line."""

from __future__ import annotations

import argparse


def workers(text: str) -> int | tuple[int, int]:
    """Return a number, or (fewest, most) of ``N`` or ``MIN-MAX``."""
    parts = text.split("-")
    try:
        numbers = [int(p) for p in parts]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor MIN-MAX")


def shares(text: str) -> float | tuple[float, ...]:
    """Return a share in (0, 1], or several that follow one another, of ``SHARE[,SHARE]``."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share nor several") from None
    return found[0] if len(found) == 1 else found
