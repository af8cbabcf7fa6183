"""``torch.export`` programs: the graph comes from the net, the weights from a checkpoint.

The inputs are the table columns that feed the net. They are found by watching the first forward
call of training: an argument whose name is a column, or that is a batch's tensor itself.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary
from zipfile import BadZipFile

from lepton.errors import CheckpointError
from lepton.export.graph import Graph, blank, digest_of, read_graph

if TYPE_CHECKING:
    import torch


_LOADING = threading.Lock()  # torch.export.load keeps its state in a global
_LOADED: WeakValueDictionary[tuple[bytes, str], Graph] = WeakValueDictionary()


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor: its name, dtype (as torch names it) and shape without the row dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """What a program takes, in argument order, and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    net: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Signature:
        """Read it back."""
        inputs, outputs = (
            tuple(
                TensorSpec(name=s["name"], dtype=s["dtype"], shape=tuple(s["shape"]))
                for s in data[part]
            )
            for part in ("inputs", "outputs")
        )
        return Signature(inputs=inputs, outputs=outputs, net=str(data["net"]))


class Program:
    """An exported net with the weights of one checkpoint; without numbers until it is given them.

    Args:
        graph: what it computes; others with other weights may share it.
        signature: what it takes and gives.
    """

    def __init__(self, graph: Graph, signature: Signature) -> None:
        self._graph = graph
        self._weights = graph.blanks()
        self._names = [spec.name for spec in signature.outputs]
        self._away = graph.device != "cpu"
        self.signature = signature

    @property
    def device(self) -> str:
        """Where it computes, as torch names it."""
        return self._graph.device

    def __call__(self, columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs for prepared columns, each of shape (rows, …), on the CPU.

        Raises:
            ValueError: a column has another shape than the program was exported with.
        """
        arguments = [_fitting(columns[spec.name], spec) for spec in self.signature.inputs]
        if self._away:
            arguments = [values.to(self._graph.device) for values in arguments]
        found = self._graph.call(*arguments, *self._weights)
        if self._away:
            found = [values.cpu() for values in found]
        return dict(zip(self._names, found, strict=True))

    def load_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put in other weights of the same architecture.

        Raises:
            CheckpointError: names or shapes differ.
        """
        self._weights = self._graph.weights_of(state)

    def release(self) -> None:
        """Let go of the weights: it answers no more, and takes next to no memory."""
        self._weights = ()


def _fitting(values: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    if values.shape[1:] != spec.shape:
        raise ValueError(
            f"column {spec.name!r} has rows of shape {tuple(values.shape[1:])}, "
            f"the program takes {spec.shape}"
        )
    return values


def inputs_of(
    net: torch.nn.Module, args: Sequence[Any], batch: Mapping[str, Any]
) -> list[str] | None:
    """Return the columns that feed a forward call, or None where they cannot be told."""
    import torch

    names = list(inspect.signature(net.forward).parameters)
    found: list[str] = []
    for i, value in enumerate(args):
        alike = [c for c, v in batch.items() if isinstance(v, torch.Tensor) and _alike(v, value)]
        named = [c for c in alike if i < len(names) and c == names[i]]
        same = [c for c in alike if batch[c].data_ptr() == value.data_ptr()]
        candidates = named or same
        if len(candidates) != 1:
            return None
        found.append(candidates[0])
    return found or None


def _alike(column: Any, value: Any) -> bool:
    return (
        hasattr(value, "data_ptr")
        and value.shape == column.shape
        and value.dtype == column.dtype
        and column.numel() > 0
    )


def export_net(
    net: torch.nn.Module, name: str, inputs: Sequence[str], example: Sequence[Any], path: Path
) -> Signature:
    """Export a net with a free row dimension and save it; the net itself is left as it is.

    What is saved has no weights: reading them would hold up the interpreter for as long as it
    takes, and a checkpoint has them already.

    Args:
        net: in any mode; the program is in evaluation mode, on the CPU.
        name: what the net is attached as.
        inputs: column names, in argument order.
        example: tensors of at least two rows.
        path: where to save.

    Raises:
        CheckpointError: torch.export cannot express the net.
    """
    import torch

    still = copy.deepcopy(net).to("cpu").eval()
    arguments = tuple(torch.zeros((2, *t.shape[1:]), dtype=t.dtype) for t in example)
    free = tuple({0: torch.export.Dim.AUTO} for _ in arguments)
    try:
        exported = torch.export.export(still, arguments, dynamic_shapes=free)
        _save_graph(exported, path)
        with torch.inference_mode():
            found = still(*arguments)
    except Exception as e:
        raise CheckpointError(
            f"torch.export cannot express the net: {type(e).__name__}: {e}"
        ) from e
    outputs = named_outputs(found)
    odd = [n for n, t in outputs.items() if not isinstance(t, torch.Tensor)]
    if odd:
        raise CheckpointError(f"a net that serves gives tensors, these are none: {odd}")
    return Signature(
        inputs=tuple(_spec(n, t) for n, t in zip(inputs, example, strict=True)),
        outputs=tuple(_spec(n, t) for n, t in outputs.items()),
        net=name,
    )


def _save_graph(exported: Any, path: Path) -> None:
    """Save a program whose weights have their shapes alone; whoever calls it gets no numbers."""
    import torch

    for name, weight in exported.state_dict.items():
        alike = blank(weight.shape, weight.dtype)
        if isinstance(weight, torch.nn.Parameter):
            alike = torch.nn.Parameter(alike, requires_grad=weight.requires_grad)
        exported.state_dict[name] = alike
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(exported, path)


def named_outputs(found: Any) -> dict[str, Any]:
    """Return what a net gave, by the names of a signature's outputs."""
    if hasattr(found, "data_ptr"):
        return {"output": found}
    if isinstance(found, Mapping):
        named = cast("Mapping[str, Any]", found)
        return dict(named)
    return {f"output_{i}": value for i, value in enumerate(found)}


def _spec(name: str, tensor: Any) -> TensorSpec:
    return TensorSpec(
        name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape[1:])
    )


def is_loaded(path: Path, device: str = "cpu") -> bool:
    """Whether a program with the graph of a saved one is in memory; False where that is damaged."""
    try:
        return (digest_of(path), device) in _LOADED
    except (OSError, BadZipFile):
        return False


def load_program(path: Path, signature: Signature, device: str = "cpu") -> Program:
    """Load a saved program; its weights are to be replaced by a checkpoint's.

    Reading a graph takes tens of milliseconds in which Python does nothing else, so that requests
    would wait for a new version. If a program in memory has the same graph, it is shared.

    Args:
        path: of the file.
        signature: what it takes and gives.
        device: where it shall compute, as torch names it.

    Raises:
        CheckpointError: it cannot be read, or not be moved there.
    """
    with _LOADING:
        try:
            key = digest_of(path), device
            graph = _LOADED.get(key) or read_graph(path, device)
        except Exception as e:
            raise CheckpointError(f"cannot load the program at {path}: {e}") from e
        _LOADED[key] = graph
    return Program(graph, signature)
