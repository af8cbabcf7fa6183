"""Serving: replicas that follow the registry, answer over HTTP and log every answer to the lake."""

from lepton.serving.app import App, start

__all__ = ["App", "start"]
