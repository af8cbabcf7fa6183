"""Model versions and who is champion: an event log in one Delta table, no server."""

from lepton.registry.events import Event, ModelState, ModelVersion, Pointer, asked_for_by
from lepton.registry.moves import Registry

__all__ = ["Event", "ModelState", "ModelVersion", "Pointer", "Registry", "asked_for_by"]
