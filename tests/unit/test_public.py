"""What the world outside relies on: names, a light import, errors that travel."""

import pickle
import subprocess
import sys

import pytest

import lepton
from lepton import errors

NAMES = [
    "App",
    "EarlyStopping",
    "LeptonError",
    "ModelVersion",
    "Preparation",
    "Run",
    "Shard",
    "Snapshot",
    "Stream",
    "Validation",
    "Worker",
    "__version__",
    "app",
    "cross_validate",
    "evaluate",
    "feedback",
    "load",
    "plan",
    "promote",
    "register",
    "rollback",
    "table",
    "train",
    "tune",
    "write",
]


def test_the_public_names_are_these() -> None:
    assert sorted(lepton.__all__) == NAMES
    assert dir(lepton) == NAMES
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = lepton.nope


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    assert getattr(lepton, name).__doc__


def test_importing_loads_nothing_heavy() -> None:
    heavy = ("ray", "torch", "pyarrow", "deltalake")
    script = f"import lepton, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "kind", [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
)
def test_every_error_survives_pickling(kind: type[Exception]) -> None:
    again = pickle.loads(pickle.dumps(kind("what failed")))

    assert type(again) is kind
    assert str(again) == "what failed"
    assert isinstance(again, lepton.LeptonError)
