"""Counter-based random numbers: each depends on its place, never on what was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def draw(
    seed: int, split: str, iteration: int, indices: Sequence[int], count: int
) -> NDArray[np.uint64]:
    """Uniform 64-bit words of the tasks (seed, split, iteration, index): splitmix64 over a hash.

    Returns:
        (len(indices), count). A task's words depend on these four alone; its first words do not
        depend on `count`.
    """
    label = int.from_bytes(hashlib.blake2b(split.encode(), digest_size=8).digest(), "little")
    # Arrays, since numpy wraps arrays in silence but warns for scalars.
    state = np.zeros(len(indices), np.uint64)
    for part in (seed, label, iteration):
        state = _mix(state + np.uint64(part & _MASK))
    state = _mix(state + np.asarray(indices, np.int64).astype(np.uint64))
    return _mix(state[:, None] + _GOLDEN * np.arange(count, dtype=np.uint64))


def uniform(words: NDArray[np.uint64], low: float, high: float) -> NDArray[np.float64]:
    """Words as float64 numbers, uniform in [low, high)."""
    unit: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return low + (high - low) * unit


def normal(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Pairs of words (..., 2) as independent standard normal numbers (Box and Muller 1958).

    Returns:
        (..., 2), float64, each number finite and below 9 in size.
    """
    # 1 - u lies in (0, 1], where u itself might be 0 and have no logarithm.
    radius = np.sqrt(-2 * np.log1p(-uniform(words[..., 0], 0, 1)))
    angle = uniform(words[..., 1], 0, 2 * np.pi)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def distinct(words: NDArray[np.uint64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw without replacement, in random order, for every row at once.

    These are the first k places of a Fisher-Yates shuffle of range(size).

    Args:
        words: (..., k).
        sizes: (...): how many there are to draw from, each >= 1. Where a size is below k, the
            places from it on hold numbers >= size.

    Returns:
        (..., k).
    """
    places = np.arange(words.shape[-1], dtype=np.int64)
    left = np.maximum(sizes[..., None] - places, 1)
    drawn: NDArray[np.int64] = places + (words % left.astype(np.uint64)).astype(np.int64)
    # Swap k exchanged places k and drawn[k]: going back through the swaps finds the start of each.
    for place in places[-2::-1]:
        later = drawn[..., place + 1 :]
        np.copyto(later, place, where=later == drawn[..., place, None])
    return drawn


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One splitmix64 step."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
