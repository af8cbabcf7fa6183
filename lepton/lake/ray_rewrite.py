"""A Ray Dataset as the rows of a merge: they stay in Ray's object store, only keys come here.

Files that change are written anew by Ray tasks, which get the blocks that they need one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from lepton.errors import LakeError
from lepton.lake.ray_sink import cause_of
from lepton.lake.rewrite import Source
from lepton.lake.rows import comparable


def source_of(
    data: ray.data.Dataset, check: Callable[[pa.Table], pa.Table], key: Sequence[str]
) -> Source:
    """Compute a Dataset, check its rows where they are, and fetch its keys.

    Raises:
        LakeError: rows do not fit, or a task failed for good.
    """
    checking: Any = check
    with_checks: Any = data.map_batches(
        checking, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )
    try:
        refs: list[Any] = with_checks.materialize().to_arrow_refs()
        told = _run(_described, [(ref, tuple(key)) for ref in refs])
    except Exception as e:
        raise cause_of(e) or LakeError(f"computing the Ray Dataset failed: {e}") from e
    known = [(ref, one) for ref, one in zip(refs, told, strict=True) if one[0]]
    if not known:
        raise LakeError("the Ray Dataset has no rows, so it has no schema to write")
    return Source(
        blocks=[ref for ref, _ in known],
        rows=np.array([one[0] for _, one in known], np.int64),
        sizes=[one[1] for _, one in known],
        keys=pa.concat_tables([one[2] for _, one in known]) if key else None,
        fetch=_fetched,
        run=_run,
    )


def _described(block: pa.Table, key: tuple[str, ...]) -> tuple[int, int, pa.Table | None]:
    keys = comparable(block, key) if key and len(block) else None
    return len(block), block.nbytes, keys


def _fetched(ref: Any) -> pa.Table:
    get: Any = ray.get
    return get(ref)


def _run(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """Call a function in one task for each of some argument lists; large ones are stored once."""
    task: Any = ray.remote(function)
    stored: dict[int, Any] = {}

    def sent(argument: Any) -> Any:
        if not isinstance(argument, pa.Table):
            return argument
        if id(argument) not in stored:
            stored[id(argument)] = ray.put(argument)
        return stored[id(argument)]

    try:
        return ray.get([task.remote(*(sent(a) for a in call)) for call in calls])
    except Exception as e:
        raise cause_of(e) or LakeError(f"a task of the write failed: {e}") from e
