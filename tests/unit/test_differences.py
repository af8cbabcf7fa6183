"""Which names and shapes a saved state differs in."""

from typing import Any

import pytest
import torch

from lepton.errors import CheckpointError
from lepton.training import state
from lepton.training.differences import SHOWN, differences, other_model


def things(width: int = 4, *, kind: Any = torch.optim.Adam, depth: int = 1) -> dict[str, Any]:
    layers = [torch.nn.Linear(3, width)] + [torch.nn.Linear(width, width)] * (depth - 1)
    net = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))
    return {"net": net, "opt": kind(net.parameters(), lr=0.1)}


def saved(attached: dict[str, Any]) -> dict[str, Any]:
    return {name: thing.state_dict() for name, thing in attached.items()}


@pytest.mark.parametrize(
    ("now", "texts"),
    [
        (things(5), ["net.0.weight was (4, 3), is (5, 3)", "net.1.weight was (2, 4), is (2, 5)"]),
        (
            things(depth=2),
            [
                "net.1.weight was (2, 4), is (4, 4)",
                "net.2.bias (2,) is new",
                "opt was over 4 parameters in 1 groups of [4], is over 6",
            ],
        ),
        (things(kind=torch.optim.SGD), ["opt is an optimiser of another kind", "'betas'"]),
        ({"model": things()["net"]}, ["net is saved but not", "model is attached but was not"]),
    ],
    ids=["width", "depth", "optimiser", "names"],
)
def test_a_changed_model_is_refused_with_all_that_changed(
    now: dict[str, Any], texts: list[str]
) -> None:
    before = [
        p.clone() for net in (now.get("net"), now.get("model")) if net for p in net.parameters()
    ]
    with pytest.raises(CheckpointError, match="checkpoint x does not fit") as refused:
        state.load(now, saved(things()), "checkpoint x")

    for text in texts:
        assert text in str(refused.value)
    after = [p for net in (now.get("net"), now.get("model")) if net for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "nothing was loaded"


def test_what_came_with_a_schedule_is_no_difference() -> None:
    before, now = things(), things()
    torch.optim.lr_scheduler.StepLR(before["opt"], 10)
    state.load(now, saved(before))

    assert torch.equal(now["net"][0].weight, before["net"][0].weight)


def test_a_long_list_is_cut() -> None:
    shapes = {f"p{i}": (i,) for i in range(SHOWN + 5)}
    said = other_model("the state", differences({"net": shapes}, {"net": {}}))

    assert said.count("is gone") == SHOWN
    assert said.endswith("and 5 more")


def test_what_only_a_thing_itself_can_tell_is_told_by_it() -> None:
    class Odd:
        def state_dict(self) -> dict[str, int]:
            return {"n": 1}

        def load_state_dict(self, _: Any) -> None:
            raise KeyError("m")

    with pytest.raises(CheckpointError, match="odd: 'm'"):
        state.load({"odd": Odd()}, {"odd": {"n": 1}})
