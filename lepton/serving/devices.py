"""Where a replica's nets compute: on the GPU that Ray keeps for it, or on the CPU."""

from __future__ import annotations

import logging

from lepton.errors import ServingError
from lepton.serving.service import Service

log = logging.getLogger("lepton")


def device_for(service: Service) -> str:
    """Choose the device of this process, and keep it to its share of the memory.

    A service that has a GPU by its resources, on a node where torch finds none, computes on the
    CPU and says so; one that names its device gets that or does not start.

    Raises:
        ServingError: the device that the service names is not there.
    """
    import torch

    if service.device is not None:
        try:
            torch.empty(1, device=service.device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as e:
            raise ServingError(
                f"device {service.device!r} cannot be used here: {e}; name another one, or none"
            ) from e
        device = service.device
    elif not service.gpus:
        return "cpu"
    elif torch.cuda.is_available():
        device = "cuda"
    else:
        log.warning(
            "this replica has %g of a GPU by Ray, but torch %s finds none: it computes on the CPU",
            *(service.gpus, torch.__version__),
        )
        return "cpu"
    if device.startswith("cuda") and service.gpus < 1:
        torch.cuda.set_per_process_memory_fraction(service.gpus)
    return device
