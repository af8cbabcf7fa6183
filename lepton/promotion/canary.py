"""When a canary (or a shadow) takes over and when it is given up. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryRule:
    """What a canary has to show; a shadow too, before it becomes one.

    Attributes:
        bake_s: seconds it must serve before it can take over.
        min_requests: requests of its own that count as proof.
        max_error_rate: failed share of its requests above which it is given up.
        max_latency_ratio: its 99th percentile over the champion's above which it is given up, or
            None; judged once both have ``min_requests``, which is waited for.
        max_difference: how far its answers may be from the champion's, in [0, 1], or None. Of a
            canary: the distance of the two distributions (total variation of the chosen classes;
            Kolmogorov-Smirnov for single numbers), so choose it above what ``min_requests``
            answers differ by chance. Of a shadow: the share of rows answered differently. Judged
            once both have ``min_requests``, which is waited for.
        patience_s: seconds after which nothing more is waited for. A canary with too few requests
            is then taken over if none failed. It is given up if any did, if clients gave up
            waiting for it, or if requests came but too few to judge what was asked for by
            ``max_latency_ratio`` or ``max_difference``.
    """

    bake_s: float = 5.0
    min_requests: int = 20
    max_error_rate: float = 0.01
    max_latency_ratio: float | None = None
    max_difference: float | None = None
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.bake_s <= self.patience_s:  # refuses NaN too
            raise ValueError("bake_s must be at least 0 and patience_s at least bake_s")
        if self.max_latency_ratio is not None and not self.max_latency_ratio > 0:
            raise ValueError("max_latency_ratio must be above 0, or None")
        if self.max_difference is not None and not 0 <= self.max_difference <= 1:
            raise ValueError("max_difference must be in [0, 1], or None")
        if self.min_requests < 1 or not 0 <= self.max_error_rate <= 1:
            raise ValueError("min_requests must be at least 1, max_error_rate in [0, 1]")

    def baking(self, bake_s: float) -> CanaryRule:
        """Return the rule with another time to bake, and patience for at least that.

        Raises:
            ValueError: it is no time.
        """
        patience_s = max(self.patience_s, bake_s)
        return replace(self, bake_s=bake_s, patience_s=patience_s)

    @property
    def compares(self) -> bool:
        """Whether it compares the canary's requests with the champion's."""
        return self.max_latency_ratio is not None or self.max_difference is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """Requests and failures since the canary began, and the 99th percentile of latency in ms.

    ``given_up`` are further requests whose clients had no more time for them.
    """

    requests: int = 0
    errors: int = 0
    p99_ms: float = 0.0
    given_up: int = 0

    def __str__(self) -> str:
        more = f" (and {self.given_up} given up by their clients)" if self.given_up else ""
        return f"{self.requests}{more}"

    @property
    def came(self) -> int:
        """All requests that came."""
        return self.requests + self.given_up


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why."""

    action: Literal["wait", "promote", "rollback"]
    reason: str


def decide(
    rule: CanaryRule,
    canary: Observed,
    champion: Observed,
    elapsed_s: float,
    difference: float = 0.0,
) -> Decision:
    """Judge a canary.

    It is given up at once when its failures exceed what ``max_error_rate`` allows of the requests
    seen, or of ``min_requests`` while fewer were seen: it would fail then even if every request
    still to come succeeded. So one failure condemns it where ``max_error_rate * min_requests`` is
    below 1, as it is by default; raise either to bear some.
    """
    allowed = rule.max_error_rate * max(canary.requests, rule.min_requests)
    if canary.errors > allowed:
        return Decision("rollback", f"{canary.errors} of {canary.requests} requests failed")
    proven = canary.requests >= rule.min_requests
    both = proven and champion.requests >= rule.min_requests
    if both and rule.max_latency_ratio is not None:
        ratio = canary.p99_ms / champion.p99_ms if champion.p99_ms else 0.0
        if ratio > rule.max_latency_ratio:
            return Decision("rollback", f"p99 latency is {ratio:.1f} times the champion's")
    if both and rule.max_difference is not None and difference > rule.max_difference:
        return Decision("rollback", f"its answers are {difference:.3g} from the champion's")
    if elapsed_s < rule.bake_s:
        return Decision("wait", "baking")
    if both or (proven and not rule.compares):
        return Decision("promote", f"{canary.requests} requests, {canary.errors} failed")
    if elapsed_s < rule.patience_s:
        who, seen = ("the champion's ", champion) if proven else ("", canary)
        return Decision("wait", f"{who}{seen.requests} of {rule.min_requests} requests seen")
    return _at_last(rule, canary, champion)


def _at_last(rule: CanaryRule, canary: Observed, champion: Observed) -> Decision:
    """Judge a canary by too few requests, as nothing more is waited for."""
    if canary.errors:
        return Decision("rollback", f"{canary.errors} of only {canary.requests} requests failed")
    if canary.given_up:
        return Decision("rollback", f"only {canary} requests were answered")
    if rule.compares and canary.came + champion.came:
        return Decision(
            "rollback",
            f"only {canary} requests came and, to the champion, {champion}: the rule compares "
            f"them once both have {rule.min_requests}",
        )
    return Decision("promote", f"only {canary.requests} requests came, none failed")
