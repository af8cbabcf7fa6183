"""Promotion: gates decide, canaries prove, one commit moves the traffic."""

from lepton.promotion.canary import CanaryRule
from lepton.promotion.conditions import Candidate, beats, not_worse, rows_hold
from lepton.promotion.gates import GateResult
from lepton.promotion.judging import any_rows
from lepton.promotion.promote import abort, alias, pause, promote, rollback

__all__ = [
    "CanaryRule",
    "Candidate",
    "GateResult",
    "abort",
    "alias",
    "any_rows",
    "beats",
    "not_worse",
    "pause",
    "promote",
    "rollback",
    "rows_hold",
]
