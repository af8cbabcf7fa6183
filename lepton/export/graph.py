"""A saved graph as a function of its arguments and its weights.

Invariant: a graph holds no weights. It takes them as arguments after its own, so that versions of
one architecture share it, none keeps what another one put in, and a call looks nothing up.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True, eq=False)
class Graph:
    """What a net computes.

    Attributes:
        call: takes arguments, then what ``names`` says; returns the outputs, flat.
        names: of the weights and constants that it takes, in order.
        constants: those of them that are no weights.
        shapes: of every weight that a checkpoint of this net has, and its dtype.
        device: where it computes, as torch names it.
    """

    call: Callable[..., Sequence[Any]]
    names: tuple[str, ...]
    constants: Mapping[str, Any]
    shapes: Mapping[str, tuple[Any, Any]]
    device: str

    def blanks(self) -> tuple[Any, ...]:
        """Return weights without numbers, as the graph takes them."""
        return tuple(
            self.constants[name]
            if name in self.constants
            else blank(*self.shapes[name], self.device)
            for name in self.names
        )

    def weights_of(self, state: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return copies of a checkpoint's weights, as the graph takes them.

        Raises:
            CheckpointError: names or shapes differ.
        """
        given = {name: tensor.shape for name, tensor in state.items()}
        wanted = {name: shape for name, (shape, _) in self.shapes.items()}
        if given != wanted:
            every = given.keys() | wanted.keys()
            wrong = sorted(name for name in every if given.get(name) != wanted.get(name))
            raise CheckpointError(
                f"the weights do not fit the program; is the checkpoint of another model? {wrong} "
                "are missing, unknown or of another shape"
            )
        return tuple(
            self.constants[name]
            if name in self.constants
            else state[name].detach().to(self.device, self.shapes[name][1], copy=True)
            for name in self.names
        )


def read_graph(path: Path, device: str = "cpu") -> Graph:
    """Read a saved program, but for its weights.

    Args:
        path: of the file.
        device: where it shall compute.
    """
    import torch
    from torch.export import passes
    from torch.fx.graph import CodeGen

    program: Any = torch.export.load(path)
    if device != "cpu":
        program = passes.move_to_device_pass(program, device)
    module: Any = program.module(check_guards=False)
    state: Mapping[str, Any] = module.state_dict()
    module.graph.set_codegen(CodeGen())  # arguments and outputs as flat tuples
    values = _lift(module)
    # The new module has none of the hooks that check a call once more, for more than a small net
    # costs; ours is the program's own check of shapes.
    call = torch.fx.GraphModule(module, module.graph).forward
    return Graph(
        call=call,
        names=tuple(values),
        constants={n: v.detach() for n, v in values.items() if n not in state},
        shapes={n: (t.shape, t.dtype) for n, t in state.items()},
        device=device,
    )


def blank(shape: Sequence[int], dtype: Any, device: str = "cpu") -> Any:
    """Return a tensor that takes no memory and has no numbers: whoever computes with it gets none.

    Args:
        shape: of the tensor.
        dtype: torch's.
        device: where it is.
    """
    import torch

    nothing = math.nan if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), nothing, dtype=dtype, device=device).expand(tuple(shape))


def _lift(module: Any) -> dict[str, Any]:
    """Make arguments of the tensors that a graph finds in its module; return them, in order."""
    import torch

    graph: Any = module.graph
    found: dict[str, tuple[Any, Any]] = {}
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for node in list(graph.nodes):
        value = _held(module, node.target) if node.op == "get_attr" else None
        if not isinstance(value, torch.Tensor):
            continue
        if node.target not in found:
            with graph.inserting_after(last):
                last = graph.placeholder(f"{node.name}_lifted")
            found[node.target] = (value, last)
        node.replace_all_uses_with(found[node.target][1])
        graph.erase_node(node)
    graph.lint()
    return {name: value for name, (value, _) in found.items()}


def _held(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def digest_of(path: Path) -> bytes:
    """Hash everything in a saved program but the weights: its graph and its constants."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for entry in sorted(archive.infolist(), key=lambda i: i.filename):
            name = entry.filename.partition("/")[2]
            if not name.startswith(("data/weights/weight_", "data/sample_inputs/", ".data/")):
                digest.update(f"{name} {entry.file_size} ".encode())
                digest.update(archive.read(entry))
    return digest.digest()
