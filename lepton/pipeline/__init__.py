"""The whole loop composed: what ``lepton demo`` runs."""

from lepton.pipeline.demo import Demo, demo

__all__ = ["Demo", "demo"]
