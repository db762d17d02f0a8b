"""What every CUDA test needs: arithmetic whose only difference from the CPU's is rounding."""

import pytest
import torch

EXACT = [
    (torch.backends.cudnn, "allow_tf32", False),
    (torch.backends.cuda.matmul, "allow_tf32", False),
    (torch.backends.cudnn, "deterministic", True),
]


@pytest.fixture(autouse=True)
def exact_arithmetic():
    """Compute without TF32, and by deterministic algorithms.

    By hand, as monkeypatch would delete these attributes instead of restoring them.
    """
    before = [getattr(owner, name) for owner, name, _ in EXACT]
    for owner, name, value in EXACT:
        setattr(owner, name, value)
    yield
    for (owner, name, _), value in zip(EXACT, before, strict=True):
        setattr(owner, name, value)
