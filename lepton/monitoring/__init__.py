"""Monitoring: what the inference log says, and how labels turn it into training rows."""

from lepton.monitoring.answers import count_answers, differences, observed
from lepton.monitoring.feedback import feedback

__all__ = ["count_answers", "differences", "feedback", "observed"]
