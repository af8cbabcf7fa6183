"""What a check found, and what a person can do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        level: ``warn`` works, but slower or less safely than it could; ``fail`` does not work.
        advice: what a person can do about it; empty only when ``ok``.
    """

    name: str
    level: Literal["ok", "warn", "fail"] = "ok"
    detail: str
    advice: str = ""

    def __post_init__(self) -> None:
        if not self.ok and not self.advice:
            raise ValueError(f"check {self.name!r} finds {self.detail!r} and gives no advice")

    @property
    def ok(self) -> bool:
        """Whether there is nothing to do."""
        return self.level == "ok"


def ok(name: str, detail: str) -> Check:
    """Return a finding that asks for nothing."""
    return Check(name=name, level="ok", detail=detail)


def warn(name: str, detail: str, advice: str) -> Check:
    """Return a finding of what works, but not as well as it could."""
    return Check(name=name, level="warn", detail=detail, advice=advice)


def fail(name: str, detail: str, advice: str) -> Check:
    """Return a finding of what does not work."""
    return Check(name=name, level="fail", detail=detail, advice=advice)
