"""The same bits every time, on CUDA too, where torch otherwise takes what is fastest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from metaplug.errors import RunError


def prepare() -> None:
    """Set CUBLAS_WORKSPACE_CONFIG where the environment does not yet, for good: cuBLAS reads it at its first product, and never again."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Inside, where it is wanted, torch takes only algorithms that give the same bits for the same input; the setting is put back after.

    cuBLAS repeats itself with a workspace of fixed size alone, which the variable CUBLAS_WORKSPACE_CONFIG gives it: see `prepare`.

    Raises:
        RunError: an operation of the model or of a plugin has no such algorithm; it is named.
    """
    if not wanted:
        yield
        return
    prepare()
    before, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = (
        False  # which of two exact algorithms is faster, changes from run to run
    )
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error) or isinstance(error, RunError):
            raise
        raise RunError(
            f"a deterministic run cannot be had of this model and these plugins ({re.split(r', but you|[.] ', str(error))[0]}): "
            "replace that operation, or leave deterministic out"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
        torch.backends.cudnn.benchmark = benchmark
