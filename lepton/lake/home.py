"""Where lepton keeps what it writes itself: one folder, named once.

Layout below the home: ``registry`` (model versions), ``evaluations``, ``answers/<model>`` (the
inference log), ``feedback/<model>``: Delta tables; ``runs/<name>`` (step logs, checkpoints) and
``traces`` (span files): plain files. Every node of a cluster must see it under the same path.
"""

import os
from pathlib import Path

from lepton.errors import LakeError


def home_of(home: str | os.PathLike[str] | None = None) -> str:
    """Return the absolute home folder: the argument, else ``$LEPTON_HOME``, else ``./lepton-home``.

    Raises:
        LakeError: the path is a URL; run folders need a shared file system so far.
    """
    chosen = os.fspath(home) if home is not None else os.environ.get("LEPTON_HOME", "lepton-home")
    if "://" in chosen:
        raise LakeError(
            f"home {chosen!r} is a URL; runs need a file system path that every "
            "node sees (tables and checkpoints= may live anywhere): set LEPTON_HOME to such a path"
        )
    return str(Path(chosen).absolute())
