"""The device that a run computes on."""

from __future__ import annotations

import torch

from metaplug.errors import RequestError


def resolve_device(name: str) -> torch.device:
    """The device for "auto" (a CUDA device where one is present, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        RequestError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"unknown device '{name}': give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device '{name}' is not supported: metaplug runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device '{name}' is not here: torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device
