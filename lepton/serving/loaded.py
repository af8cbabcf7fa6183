"""A registered version in this process: asked as in a replica, without a service.

It is verified, prepares and checks rows, and answers by the code that replicas run; nothing is
logged.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lepton.errors import ServingError
from lepton.lake import home_of
from lepton.registry import ModelVersion, Registry
from lepton.serving.asking import table_of
from lepton.serving.following import Resident, manifest_of, resident_of
from lepton.serving.inputs import MAX_ROWS, BadRequest
from lepton.serving.tables import rows_of


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A version in memory.

    Attributes:
        model: its name.
        version: its number.
    """

    model: str
    version: int
    _resident: Resident = field(repr=False)

    def predict(self, rows: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Return outputs by name, NumPy arrays of shape (rows, …), as a service would.

        Args:
            rows: raw rows: an Arrow table, a pandas frame, or a mapping of names to arrays or
                tensors; as many as there are. Columns the model does not take are left out.

        Raises:
            ServingError: the rows are not what the model takes.
        """
        inputs = self._resident.inputs
        table = table_of(rows, [i.describe() for i in inputs])
        parts = [table.slice(at, MAX_ROWS) for at in range(0, max(1, len(table)), MAX_ROWS)]
        try:
            found = [self._resident.run(rows_of(part, inputs)) for part in parts]
        except BadRequest as e:
            raise ServingError(f"{self.model} version {self.version}: {e}") from e
        return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def load(
    model: ModelVersion | str,
    version: int | str = "champion",
    *,
    home: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> LoadedModel:
    """Load a version of a registered model into this process.

    Args:
        model: what :func:`lepton.register` returned, or a model's name.
        version: number, role or alias, with a name.
        home: where the registry is.
        device: where the net computes, as torch names it.

    Raises:
        RegistryError: there is none.
        LeptonError: its checkpoint is not whole, not the one that was registered, or does not
            answer as in training.
    """
    registry = Registry(f"{home_of(home)}/registry")
    named = (model.model, model.version) if isinstance(model, ModelVersion) else (model, version)
    entry = registry.version(*named)
    return LoadedModel(entry.model, entry.version, resident_of(entry, manifest_of(entry), device))
