"""One seed, any number of independent random streams: nothing to save, nothing to restore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """A 63-bit seed from integers, each of which changes all of its bits (splitmix64)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def random_state(device: torch.device) -> torch.Tensor:
    """Return the state of torch's random numbers on a device, uint8: equal if nothing was drawn."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def stream(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """Start torch's random numbers, on the CPU and on `device`, from `seed`.

    Afterwards the caller's streams are as they were.

    Yields:
        A CPU generator of its own, from the same seed.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield torch.Generator().manual_seed(mix(seed))
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
