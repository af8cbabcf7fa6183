"""Serving: replicas that follow the registry, answer over HTTP and log every answer to the lake."""

from lepton.serving.app import App, attach, start
from lepton.serving.score import score

__all__ = ["App", "attach", "score", "start"]
