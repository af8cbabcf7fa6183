"""Programs of one graph share its code in memory, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lepton.errors import CheckpointError
from lepton.export.graph import read_graph
from lepton.export.program import Program, export_net, load_program


class Net(torch.nn.Module):
    def __init__(self, seed: int, shift: float, *, persistent: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("shift", torch.tensor(shift), persistent=persistent)
        self.scale = torch.full((2,), shift)  # a constant of the graph

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale + self.shift


def program_of(net: Net, path: Path) -> Program:
    signature = export_net(net, "net", ["x"], [torch.zeros(4, 3)], path)
    loaded = load_program(path, signature)
    loaded.load_weights(net.state_dict())
    return loaded


def answers(program: Program, x: torch.Tensor) -> Any:
    return program({"x": x})["output"]


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_each_keeps_its_own_weights_and_constants(
    tmp_path: Path, persistent: bool, shift: float
) -> None:
    x = torch.randn(4, 3)
    nets = [Net(0, 1.0, persistent=persistent), Net(1, shift, persistent=persistent)]
    with torch.inference_mode():
        wanted = [net(x) for net in nets]
    programs = [program_of(net, tmp_path / f"{i}.pt2") for i, net in enumerate(nets)]

    for program, answer in zip(programs, wanted, strict=True):
        assert torch.allclose(answers(program, x), answer)
    programs[1].load_weights(nets[1].state_dict() | {"layer.bias": torch.full((2,), 9.0)})
    assert torch.allclose(answers(programs[0], x), wanted[0])


def test_a_graph_is_read_once_as_long_as_any_program_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, path, read = Net(0, 1.0, persistent=True), tmp_path / "p.pt2", list[Path]()
    counted: Any = lambda *a: read.append(a[0]) or read_graph(*a)  # noqa: E731
    monkeypatch.setattr("lepton.export.program.read_graph", counted)
    first = program_of(net, path)
    for _ in range(3):
        second = load_program(path, first.signature)
        assert answers(second, torch.zeros(1, 3)).isnan().all()  # it has none of the first's
        del second
    assert len(read) == 1
    del first
    program_of(net, path)
    assert len(read) == 2


def test_weights_are_copied_in(tmp_path: Path) -> None:
    net = Net(0, 1.0, persistent=True)
    program = program_of(net, tmp_path / "p.pt2")
    x = torch.randn(4, 3)
    before = answers(program, x)
    with torch.no_grad():
        net.layer.weight.zero_()
    assert torch.equal(answers(program, x), before)


def test_other_weights_are_refused_and_change_nothing(tmp_path: Path) -> None:
    net = Net(0, 1.0, persistent=True)
    program = program_of(net, tmp_path / "p.pt2")
    x = torch.randn(4, 3)
    before = answers(program, x)
    for wrong in ({"layer.weight": torch.zeros(5, 3)}, {"other": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="do not fit"):
            program.load_weights(net.state_dict() | wrong)
    assert torch.equal(answers(program, x), before)


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    net = Net(0, 1.0, persistent=True)
    signature = export_net(net, "net", ["x"], [torch.zeros(4, 3)], tmp_path / "p.pt2")
    (tmp_path / "p.pt2").write_bytes((tmp_path / "p.pt2").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cannot load the program at .*p\.pt2"):
        load_program(tmp_path / "p.pt2", signature)


def test_a_saved_program_has_no_weights_and_computes_nothing_without(tmp_path: Path) -> None:
    net, path = torch.nn.Linear(3, 100_000), tmp_path / "p.pt2"
    signature = export_net(net, "net", ["x"], [torch.zeros(4, 3)], path)
    assert path.stat().st_size < net.weight.nbytes / 10
    program = load_program(path, signature)
    x = torch.randn(4, 3)
    assert answers(program, x).isnan().all()
    program.load_weights(net.state_dict())
    with torch.inference_mode():
        assert torch.allclose(answers(program, x), net(x))


class Tied(torch.nn.Module):
    """One weight under two names, used twice, and a part in which gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            place = torch.arange(3, dtype=x.dtype, device=x.device)
        return self.second(self.first(x)) + self.first(x) + place


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # the second is handled as any other device
def test_a_program_computes_where_it_is_told(tmp_path: Path, device: str) -> None:
    x, nets = torch.randn(4, 3), [Tied(), Tied()]
    with torch.inference_mode():
        wanted = [net(x) for net in nets]
    signature = export_net(nets[0], "net", ["x"], [x], tmp_path / "p.pt2")
    programs = [load_program(tmp_path / "p.pt2", signature, device) for _ in nets]
    for program, net in zip(programs, nets, strict=True):
        program.load_weights(net.state_dict())
    for program, answer in zip(programs, wanted, strict=True):
        assert program.device == device
        assert torch.allclose(answers(program, x), answer)
        assert not answers(program, x).requires_grad
