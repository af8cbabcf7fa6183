"""Reaching Ray: the running cluster, or a quiet local one."""

from __future__ import annotations

import os
import warnings
from typing import Any

LOCAL_CPUS = 6
"""Logical CPUs of a local Ray at least: trainers, readers and replicas fit on a laptop."""


def connect(**options: Any) -> None:
    """Connect to Ray unless this process already is: ``$RAY_ADDRESS``, else a local start.

    Args:
        options: further arguments of ``ray.init`` for a local start.
    """
    import ray

    if ray.is_initialized():
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    common: dict[str, Any] = {"logging_level": "warning"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
        return
    common |= {
        "num_cpus": max(LOCAL_CPUS, os.cpu_count() or 1),
        "include_dashboard": False,
        "logging_config": ray.LoggingConfig(encoding="TEXT", log_level="WARNING"),
    }
    ray.init(**(common | options))
