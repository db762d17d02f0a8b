"""The same bits every time, on CUDA too, where torch otherwise takes what is fastest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from metaplug.errors import RunError


def prepare() -> None:
    """Give cuBLAS a workspace of fixed size, unless the environment has set one.

    cuBLAS repeats itself only with that, and reads the variable once, at its first product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Let torch take only algorithms that give the same bits for the same input.

    Raises:
        RunError: an operation of the model or of a plugin has no such algorithm; it is named.
    """
    if not wanted:
        yield
        return
    prepare()
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    # Which of two exact algorithms is faster changes from run to run.
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error) or isinstance(error, RunError):
            raise
        operation = re.split(r", but you|[.] ", str(error))[0]
        raise RunError(
            f"a deterministic run cannot be had of this model and these plugins ({operation}): "
            "replace that operation, or leave deterministic out"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
        torch.backends.cudnn.benchmark = benchmark
