"""From a checkpoint to answers: the one path that evaluation and serving share (no skew)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lepton import checkpoints
from lepton.checkpoints import PROGRAM, Manifest
from lepton.errors import CheckpointError
from lepton.export.program import Program, Signature, load_program
from lepton.preprocess import Categories, Fill, Preparation
from lepton.stream.tensors import batch_of

if TYPE_CHECKING:
    import numpy as np


class Predictor:
    """A checkpoint's preparation and program together: raw columns in, outputs out.

    Args:
        manifest: of the checkpoint.
        program: that its weights are put into; None reads the checkpoint's own.
        device: where that one computes, as torch names it; rows and answers are on the CPU.

    Raises:
        CheckpointError: damaged, or the net could not be exported when it was trained.
    """

    def __init__(
        self, manifest: Manifest, program: Program | None = None, device: str = "cpu"
    ) -> None:
        if manifest.signature is None:
            raise CheckpointError(
                f"checkpoint {manifest.uri} cannot answer: {manifest.program_error or 'no program'}"
            )
        self.manifest = manifest
        self.signature = Signature.from_dict(manifest.signature)
        self.inputs = [s.name for s in self.signature.inputs]
        whole = Preparation.from_json(manifest.preparation) if manifest.preparation else None
        self.preparation = whole.only(self.inputs) if whole else None
        self._labels = whole
        self._dtypes = [(s.name, _dtype(s.dtype)) for s in self.signature.inputs]
        state = checkpoints.restore(manifest)
        self.program = program or load_program(manifest.path(PROGRAM), self.signature, device)
        self.program.load_weights(state[self.signature.net])

    def __call__(self, rows: pa.Table) -> dict[str, Any]:
        """Return outputs by name, tensors of shape (rows, …), for raw rows."""
        chosen = rows.select(self.inputs)
        prepared = self.preparation(chosen) if self.preparation else chosen
        return self._answers(batch_of(prepared))

    def of_arrays(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        """Return outputs by name for raw rows in arrays of shape (rows, …).

        Only without a preparation, which takes tables. Torch wants arrays that can be written to.
        """
        import torch

        return self._answers({name: torch.from_numpy(v) for name, v in columns.items()})

    def _answers(self, columns: dict[str, Any]) -> dict[str, Any]:
        for name, dtype in self._dtypes:
            values = columns[name]
            if values.dtype != dtype:
                columns[name] = values.to(dtype)
        return self.program(columns)

    @property
    def filled(self) -> frozenset[str]:
        """Inputs whose missing values the preparation makes up for."""
        steps = self.preparation.steps if self.preparation else ()
        return frozenset(s.column for s in steps if isinstance(s, Fill | Categories))

    def labels(self, rows: pa.Table, column: str) -> Any:
        """Return a label column as training saw it: a NumPy array of whole numbers."""
        chosen = rows.select([column])
        prepared = self._labels.only([column])(chosen) if self._labels else chosen
        return prepared[column].to_numpy().copy()


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
