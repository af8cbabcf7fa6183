"""A sharded checkpoint is committed when every rank has left the note of its portion."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lepton import checkpoints
from lepton.checkpoints.shards import Part
from lepton.errors import CheckpointError
from lepton.telemetry import Carrier
from lepton.training import portions
from lepton.training.plan import Plan
from lepton.training.portions import Portion

FOLDER = "data/step-00000007-g000000"
WHOLE = torch.arange(12.0).reshape(4, 3)
DESCRIBED: dict[str, Any] = {"cursor": {"v": 1, "epoch": 0, "rows": 0, "order": ""}}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(
        folder=str(tmp_path),
        checkpoint_every=1,
        audit=False,
        lineage={},
        preparation=None,
        carrier=Carrier(),
        session="s",
        seed=0,
    )


def portion(rank: int, rows: slice) -> Portion:
    """Return a rank's rows of the whole; rank 0 has what is not sharded, too."""
    own, plain = {"/net/w": WHOLE[rows].clone()}, {"/net/b": torch.ones(2)}
    file = f"shard-{rank:04d}.safetensors"
    tree = {"$dict": [["net", {"$dict": [[n, {"$tensor": f"/net/{n}"}] for n in "wb"]}]]}
    begin, end = rows.start, rows.stop
    return Portion(
        step=7,
        rank=rank,
        ranks=2,
        folder=FOLDER,
        own=own if end > begin else {},
        places={"/net/w": [Part(file, (begin, 0), (end - begin, 3))]} if end > begin else {},
        plain=plain if rank == 0 else {},
        whole={"/net/w": ((4, 3), torch.float32)},
        tree=tree,
    )


@pytest.mark.parametrize("cut", [1, 4])
def test_what_two_ranks_wrote_is_one_checkpoint(plan: Plan, cut: int) -> None:
    first, second = portion(0, slice(0, cut)), portion(1, slice(cut, 4))
    for one in (second, first):
        portions.write(plan, one)
    made = portions.commit(plan, first, DESCRIBED, lambda: False)

    assert made is not None
    assert checkpoints.latest(plan.kept_in) == made
    state = checkpoints.restore(made)["net"]
    assert torch.equal(state["w"], WHOLE)
    assert torch.equal(state["b"], torch.ones(2))


def test_without_a_rank_that_is_lost_nothing_is_committed(plan: Plan) -> None:
    first = portion(0, slice(0, 2))
    portions.write(plan, first)

    assert portions.commit(plan, first, DESCRIBED, lambda: True) is None
    assert checkpoints.all_of(plan.kept_in) == []
    assert checkpoints.prune(plan.kept_in) == 1


def test_a_note_that_came_before_its_rank_was_lost_counts(plan: Plan) -> None:
    first, second = portion(0, slice(0, 2)), portion(1, slice(2, 4))
    portions.write(plan, first)

    def gone() -> bool:
        portions.write(plan, second)
        return True

    assert portions.commit(plan, first, DESCRIBED, gone) is not None


def test_what_a_rank_could_not_write_is_told_to_the_first(plan: Plan) -> None:
    first, second = portion(0, slice(0, 2)), portion(1, slice(2, 4))
    portions.write(plan, first)
    place = Path(plan.kept_in) / FOLDER / second.file
    place.mkdir()  # so that it cannot be written as a file
    with pytest.raises(CheckpointError, match="cannot write the checkpoint of step 7"):
        portions.write(plan, second)

    with pytest.raises(CheckpointError, match="cannot write the checkpoint of step 7"):
        portions.commit(plan, first, DESCRIBED, lambda: False)
    note = json.loads((Path(plan.kept_in) / FOLDER / "shard-0001.json").read_text())
    assert note["measured"] is None
    shutil.rmtree(place)
    assert checkpoints.all_of(plan.kept_in) == []
