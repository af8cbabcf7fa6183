"""The resources that Ray keeps for a run's workers, given back when Ray Train's controller cannot.

Ray removes a placement group when the job that asked for it ends. A notebook's job goes on for
days: whatever a killed controller had asked for would be kept from every later run, unused.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

_messages: Any = gcs_pb2


def release_places(controller: Any) -> None:
    """Remove the placement groups that an actor, which is gone, has asked for."""
    state: Any = cluster_state
    for raw in state._connect_and_get_accessor().get_placement_group_table():
        found = _messages.PlacementGroupTableData.FromString(raw)
        if found.creator_actor_id != controller._actor_id.binary():
            continue
        if found.state != _messages.PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))
