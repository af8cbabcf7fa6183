"""The exceptions that lepton raises.

::

    LeptonError
    ├── LakeError          a Delta table cannot be opened, read or written
    │   └── WriteConflict  somebody else committed first; read again and retry
    ├── StreamError        the row stream cannot be planned, read or resumed
    ├── TrainingError      a training run cannot start, go on or be resumed
    ├── CheckpointError    a checkpoint is missing, damaged or of another model
    ├── RegistryError      a model version or alias cannot be found or recorded
    │   └── ConflictError  somebody else moved first; read again and retry
    ├── GateError          a promotion gate does not parse, names a missing metric, or fails
    └── ServingError       the service cannot start, load a model or answer

Arguments of the wrong kind raise ``ValueError`` or ``TypeError``. Every message says what
failed, on which table@version, run or model, and what to do about it. Each class takes
positional arguments only, so that errors survive pickling on their way out of a Ray worker.
"""


class LeptonError(Exception):
    """Base of every error that lepton raises on purpose."""


class LakeError(LeptonError):
    """A Delta table cannot be opened, read or written."""


class WriteConflict(LakeError):  # noqa: N818 (named as people say it)
    """Another writer's commit came first and does not go with this one; nothing was written."""


class StreamError(LeptonError):
    """The row stream cannot be planned, read or resumed."""


class TrainingError(LeptonError):
    """A training run cannot start, go on or be resumed."""


class CheckpointError(LeptonError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class RegistryError(LeptonError):
    """A model version or alias cannot be found or recorded."""


class ConflictError(RegistryError):
    """Another process committed first; read the state again and retry."""


class GateError(LeptonError):
    """A promotion gate does not parse, names a missing metric, or was not passed."""


class ServingError(LeptonError):
    """The service cannot start, load a model, or answer."""
