"""Promotion: gates decide, canaries prove, one commit moves the traffic."""

from lepton.promotion.canary import CanaryRule
from lepton.promotion.promote import alias, pause, promote, rollback

__all__ = ["CanaryRule", "alias", "pause", "promote", "rollback"]
