"""Recorded answers: real rows in every checkpoint, and what its net answered to them in training.

Whoever loads the checkpoint later, on another machine or with another torch, compares before it
answers anybody. The rows are prepared ones, as they went into the net: at most :data:`MOST_ROWS`
of the first batch, and :data:`MOST_BYTES` in all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lepton.checkpoints import ANSWERS, Manifest
from lepton.errors import CheckpointError
from lepton.export.program import Program, Signature, named_outputs

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

MOST_ROWS = 32
MOST_BYTES = 2**20
TOLERANCE = 1e-3
COARSE_TOLERANCE = 3e-2

log = logging.getLogger("lepton")


def example_of(args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return copies of the first rows of a forward call's arguments, on the CPU; at least one."""
    row_bytes = sum(a[:1].numel() * a.element_size() for a in args)
    rows = min(MOST_ROWS, MOST_BYTES // (2 * max(1, row_bytes)))
    return tuple(a.detach()[: max(1, rows)].to("cpu", copy=True) for a in args)


class Twin:
    """A copy of a net on the CPU, in evaluation mode, that answers with a checkpoint's weights.

    Args:
        still: such a copy; nobody else uses it.
        signature: of its program.
        example: the rows it is asked, in the order of the signature's inputs.
    """

    def __init__(
        self, still: torch.nn.Module, signature: Signature, example: Sequence[torch.Tensor]
    ) -> None:
        self._still = still
        self._signature = signature
        self._rows = {s.name: t for s, t in zip(signature.inputs, example, strict=True)}

    def answers(self, state: Mapping[str, Any]) -> Tensors | None:
        """Return the rows and the answers to them, or None, with a warning, if it cannot answer.

        Args:
            state: of everything attached; the net's weights are used where they lie, not copied.
        """
        import torch

        try:
            self._still.load_state_dict(state[self._signature.net], assign=True)
            with torch.inference_mode():
                found = named_outputs(self._still(*self._rows.values()))
            told = {f"output/{name}": value.clone().contiguous() for name, value in found.items()}
            kept = {
                f"input/{name}": value.contiguous() for name, value in self._rows.items()
            } | told
        except Exception as e:  # noqa: BLE001 - a checkpoint without recorded answers is whole, too
            log.warning("a checkpoint records no answers: %s: %s", type(e).__name__, e)
            return None
        return kept if _bytes(kept) <= MOST_BYTES else None


def recorded_in(manifest: Manifest) -> tuple[Tensors, Tensors] | None:
    """Return the rows, by input, and the answers, by output, that a checkpoint keeps, if any."""
    from safetensors.torch import load_file

    if ANSWERS not in manifest.files:
        return None
    kept = load_file(manifest.path(ANSWERS))
    rows, answers = (
        {name.removeprefix(part): value for name, value in kept.items() if name.startswith(part)}
        for part in ("input/", "output/")
    )
    return rows, answers


def compare(program: Program, manifest: Manifest) -> None:
    """Ask a program the recorded rows and compare; nothing to do where none were recorded.

    Numbers may differ by :data:`TOLERANCE` of the largest recorded one (half precision by
    :data:`COARSE_TOLERANCE`): other machines add up in another order. All else must be equal.

    Raises:
        CheckpointError: they differ by more, or the program cannot answer them.
    """
    recorded = recorded_in(manifest)
    if recorded is None:
        return
    rows, answers = recorded
    try:
        found = program(rows)
    except (RuntimeError, ValueError, KeyError) as e:
        raise CheckpointError(f"{manifest.uri} cannot answer its recorded rows: {e}") from e
    for name, wanted in answers.items():
        why = _difference(found.get(name), wanted)
        if why:
            raise CheckpointError(
                f"{manifest.uri} answers otherwise than it did in training: output {name!r} {why}; "
                "the program does not belong to the weights, or this machine computes otherwise. "
                "Register a checkpoint that was made anew, or look for what differs here"
            )


def _difference(found: torch.Tensor | None, wanted: torch.Tensor) -> str:
    """What is wrong, or an empty string."""
    import torch

    if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
        shown = "is missing" if found is None else f"is {found.dtype} {tuple(found.shape)}"
        return f"{shown}, recorded was {wanted.dtype} {tuple(wanted.shape)}"
    if not wanted.dtype.is_floating_point:
        return "" if torch.equal(found, wanted) else "differs from what was recorded"
    coarse = wanted.dtype in (torch.float16, torch.bfloat16)
    a, b = found.double(), wanted.double()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities too
    finite = b[b.isfinite()].abs()
    allowed = (COARSE_TOLERANCE if coarse else TOLERANCE) * (
        float(finite.max()) if finite.numel() else 0.0
    )
    apart = (a - b).abs()[~same]
    worst = float(apart.nan_to_num(nan=torch.inf).max()) if apart.numel() else 0.0
    return "" if worst <= allowed else f"is off by {worst:.3g}, allowed is {allowed:.3g}"


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
