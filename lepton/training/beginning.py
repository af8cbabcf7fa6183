"""How a generation begins of which no member has a state: from the newest checkpoint, or equal."""

from __future__ import annotations

from lepton import checkpoints
from lepton.checkpoints import Manifest
from lepton.training import sharding, state
from lepton.training.attached import Attached
from lepton.training.group import Group
from lepton.training.plan import Plan

DERIVED = (checkpoints.PROGRAM,)
"""What all checkpoints share and a run makes anew: damaged, it costs no step."""


def begin(plan: Plan, group: Group, attached: Attached, *, sharded: bool) -> Manifest | None:
    """Load the newest checkpoint on every rank, or make nets equal to rank 0's; collective.

    Args:
        plan: of the run.
        group: the ranks.
        attached: what is trained.
        sharded: each rank takes its own part of a checkpoint.

    Returns:
        the checkpoint; None if there was none.

    Raises:
        PeerLost: a worker went away.
        CheckpointError: the run's checkpoint holds other things than these.
    """
    where, options = plan.kept_in, plan.options
    newest = None
    if group.rank == 0:
        checkpoints.prune(where, options)
        newest = checkpoints.latest(where, options, without=DERIVED)
    step: int = group.share(newest.step if newest else 0, 0)
    saved = None
    if step:
        saved = checkpoints.load(f"{where}/step-{step:08d}.json", options)
        fill = sharding.filler(attached) if sharded else None
        found = checkpoints.restore(saved, fill, without=DERIVED)
        state.load(attached, found, f"checkpoint {saved.uri}")
    for net in attached.nets.values():
        for tensor in sharding.unsharded(net.state_dict().values()):
            group.broadcast(tensor)
    return saved
