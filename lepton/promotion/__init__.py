"""Promotion: gates decide, canaries prove, one commit moves the traffic."""

from lepton.promotion.canary import CanaryRule
from lepton.promotion.promote import promote, rollback

__all__ = ["CanaryRule", "promote", "rollback"]
