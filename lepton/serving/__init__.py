"""Serving: replicas that follow the registry, answer over HTTP and log every answer to the lake."""

from lepton.serving.access import Grant, grant
from lepton.serving.app import App, attach, serve_all, start
from lepton.serving.loaded import load
from lepton.serving.score import score
from lepton.serving.service import Service

__all__ = ["App", "Grant", "Service", "attach", "grant", "load", "score", "serve_all", "start"]
