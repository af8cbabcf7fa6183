"""Recorded answers: real rows in every checkpoint, and what its net answered to them in training.

Whoever loads the checkpoint later, on another machine or with another torch, compares before it
answers anybody. The rows are prepared ones, as they went into the net: at most :data:`MOST_ROWS`
of the first batch, :data:`MOST_BYTES` in all, and no more than the net answers in :data:`MOST_S`
on a CPU, since the next checkpoint waits for them: a net too large for that records none.
"""

from __future__ import annotations

import logging
import time
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
MOST_S = 2.0
COMPILED = "_orig_mod"
"""Where torch.compile keeps the module that it wraps."""
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
        # as it was written: compiling it for the CPU would take longer than all answers
        self._still: Any = getattr(still, COMPILED, still)
        self._signature = signature
        self._rows = {s.name: t for s, t in zip(signature.inputs, example, strict=True)}
        self._timed = False

    def answers(self, state: Mapping[str, Any]) -> Tensors | None:
        """Return the rows and the answers to them, or None, with a warning, if it cannot answer.

        Args:
            state: of everything attached; the net's weights are used where they lie, not copied.
        """
        import torch

        try:
            weights = state[self._signature.net]
            plain = {n.removeprefix(f"{COMPILED}."): value for n, value in weights.items()}
            self._still.load_state_dict(plain, assign=True)
            net = self._still
            with torch.inference_mode():
                self._choose_rows(net)
                if not self._rows:
                    return None
                found = named_outputs(net(*self._rows.values()))
            told = {f"output/{name}": value.clone().contiguous() for name, value in found.items()}
            kept = {
                f"input/{name}": value.contiguous() for name, value in self._rows.items()
            } | told
        except Exception as e:  # noqa: BLE001 - a checkpoint without recorded answers is whole, too
            log.warning("a checkpoint records no answers: %s: %s", type(e).__name__, e)
            return None
        return kept if _bytes(kept) <= MOST_BYTES else None

    def _choose_rows(self, net: torch.nn.Module) -> None:
        """Once, see how long a row takes, and keep as many as there is time for."""
        if self._timed:
            return
        self._timed = True
        one = [t[:1] for t in self._rows.values()]
        began = time.perf_counter()
        net(*one)
        took = time.perf_counter() - began
        if took > MOST_S:
            log.info("checkpoints record no answers: a row takes the net %.1f s on the CPU", took)
            self._rows = {}
            return
        began = time.perf_counter()
        net(*one)  # the first time, much is done once
        took = max(time.perf_counter() - began, 1e-6)
        self._rows = {name: t[: max(1, int(MOST_S / took))] for name, t in self._rows.items()}


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
