"""The device that a run computes on."""

from __future__ import annotations

import torch

from metaplug.errors import RequestError
from metaplug.execution.ranks import ALONE, World


def resolve_device(name: str, world: World = ALONE) -> torch.device:
    """Return the device for "auto" (CUDA where there is one, else the CPU), "cpu", "cuda[:N]".

    Of several ranks on a machine, each takes a CUDA device of its own: "cuda" is cuda:LOCAL_RANK.

    Raises:
        RequestError: no such device here, or one device for several ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world.size > 1 and name.startswith("cuda:"):
        raise RequestError(
            f"device '{name}' for {world.size} ranks: each needs a device of its own; give auto, "
            "cuda or cpu"
        )
    if world.size > 1 and name == "cuda":
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"unknown device '{name}': give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device '{name}' is not supported: metaplug runs on cpu and cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RequestError(
            f"device '{name}' is not here: torch finds {count} CUDA devices; use --device cpu"
        )
    return device
