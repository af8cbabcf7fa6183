"""Nested states taken apart into tensors and a JSON tree, and put together again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from lepton.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


def flatten(
    state: Any, into: Tensors | None = None, *, leave: Collection[str] = ()
) -> tuple[Tensors, Any]:
    """Return copies in CPU memory of all tensors, by path, and a JSON tree of the rest.

    Args:
        state: nested dicts, lists and tuples.
        into: tensors that a former call returned, and nobody reads any more: those of the same
            shape are written over, which is several times faster than new memory.
        leave: paths of tensors that are not to be copied, and not in what is returned.

    Raises:
        CheckpointError: a leaf is neither a tensor nor a plain value.
    """
    import torch

    tensors, tree = split(state)
    copies: Tensors = {}
    for path, tensor in tensors.items():
        if path in leave:
            continue
        copy = (into or {}).get(path)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        copies[path] = copy.copy_(tensor)
    return copies, tree


def split(state: Any) -> tuple[Tensors, Any]:
    """Return all tensors of a state, by path and not copied, and a JSON tree of the rest.

    Raises:
        CheckpointError: a leaf is neither a tensor nor a plain value.
    """
    tensors: Tensors = {}
    return tensors, _flatten(state, "", tensors)


def joined(tree: Any, tensors: Tensors) -> dict[str, Any]:
    """Put a state together again from what :func:`split` or :func:`flatten` returned."""
    return cast("dict[str, Any]", _unflatten(tree, tensors))


def _flatten(value: Any, path: str, tensors: Tensors) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach()
        return {"$tensor": path}
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return {"$dict": [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in pairs]}
    if isinstance(value, list | tuple):
        kind = "$list" if isinstance(value, list) else "$tuple"
        items = cast("list[Any]", value)
        return {kind: [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(items)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"state {path!r} is a {type(value).__name__}, which a checkpoint cannot hold without "
        "pickle: keep tensors, numbers, strings, lists and dicts in state_dict()"
    )


def _unflatten(tree: Any, tensors: Tensors) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, body),) = cast("dict[str, Any]", tree).items()
    if kind == "$tensor":
        return tensors[body]
    if kind == "$dict":
        return {k: _unflatten(v, tensors) for k, v in body}
    items = [_unflatten(v, tensors) for v in body]
    return items if kind == "$list" else tuple(items)
