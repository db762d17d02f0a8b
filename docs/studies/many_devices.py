"""What ranks exchange in a meta-step, and a model of the time that it takes on 8 and 64 GPUs.

Run from the root of the project: python docs/studies/many_devices.py

Nothing here is measured. The numbers of exchanges and bytes are those of the code, which a test
counts in a run; the time is that of a ring all-reduce of n bytes over N ranks,

    t(n) = 2 (N − 1) / N · n / bandwidth + 2 (N − 1) · latency

with the bandwidths and latencies in LINKS, which are assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from metaplug.models.factories import make_model

STEPS = 5
"""Inner steps."""


@dataclass(frozen=True)
class Link:
    """How one rank reaches the next in a ring.

    Attributes:
        bandwidth: bytes a second.
        latency: seconds.
    """

    bandwidth: float
    latency: float


LINKS = {8: Link(300e9, 5e-6), 64: Link(40e9, 10e-6)}
"""Assumed, by the number of ranks: NVLink within a machine, InfiniBand (400 Gb/s) across eight."""

HOST = Link(1e9, 30e-6)
"""Assumed: TCP between processors, over which ranks agree on what they exchange."""


@dataclass(frozen=True)
class Exchanges:
    """What a rank hands to all-reduce in one meta-step, each exchange in bytes.

    Attributes:
        means: means over tasks in the inner loop, and as many in the backward pass.
        last: all meta-gradients, losses and kept statistics, in one exchange.
        host: whole numbers, between processors.
    """

    means: tuple[int, ...]
    last: int
    host: tuple[int, ...]


def exchanges(
    tensors: Sequence[int], *, ranks: int, steps: int = STEPS, sharing: bool, itemsize: int = 4
) -> Exchanges:
    """Return what a meta-step of MAML exchanges, with or without gradient sharing.

    Args:
        tensors: the elements of every parameter, all of which are adapted.
        sharing: by the default settings: one mean of all inner gradients in every step, which is
            kept, and two meta-parameters with a value for each step.
        itemsize: bytes of an element.
    """
    numbers, losses = sum(tensors), 1 + steps + 1 + 2 * len(tensors)
    last, flags = numbers + losses, len(tensors)
    means: tuple[int, ...] = ()
    host: tuple[int, ...] = ()
    if sharing:
        means = (numbers * itemsize,) * (2 * steps)
        last += steps * numbers + 2 * steps
        flags += 2
        host = (8,)  # the number of tasks, which the first mean needs
    # A table with a row for each rank: its tasks, a digest, and which meta-gradients it has.
    return Exchanges(means, last * itemsize, (*host, ranks * (2 + flags) * 8))


def seconds(size: float, ranks: int, link: Link) -> float:
    """Return the time of a ring all-reduce of so many bytes."""
    rounds = 2 * (ranks - 1)
    return rounds / ranks * size / link.bandwidth + rounds * link.latency


def of_model(name: str, shape: tuple[int, ...], settings: dict[str, object]) -> list[int]:
    """Return the elements of the parameters of a model for five classes."""
    with torch.device("meta"):
        return [each.numel() for each in make_model(name, shape, 5, settings).parameters()]


WORKLOADS = {
    "conv4, 64 filters": of_model("conv4", (1, 28, 28), {"filters": 64}),
    "ResNet-12": of_model("resnet12", (3, 84, 84), {}),
    # Two matrices of rank 4 beside query and value of six layers of width 384, and the head.
    "MiniLM, LoRA": [4 * 384] * (6 * 2 * 2) + [384 * 5, 5],
}


def rows() -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    found = []
    for name, tensors in WORKLOADS.items():
        for sharing in (False, True):
            for ranks, link in LINKS.items():
                made = exchanges(tensors, ranks=ranks, sharing=sharing)
                # `metaplug train` also asks every rank whether to stop.
                host = sum(seconds(size, ranks, HOST) for size in (*made.host, ranks * 2 * 8))
                means = sum(seconds(size, ranks, link) for size in made.means)
                last = seconds(made.last, ranks, link)
                size = sum(made.means) + made.last
                least = 9 * (host + means + last)
                found.append(
                    (
                        f"{name}{', gradient sharing' * sharing}",
                        f"{ranks}",
                        f"{len(made.means) + 1} + {len(made.host) + 1}",
                        f"{size / 1e6:.2f}",
                        *(f"{1e3 * each:.2f}" for each in (means, last, host)),
                        f"{1e3 * least:.0f}",
                    )
                )
    return found


HEAD = (
    "model, five inner steps",
    "GPUs",
    "exchanges",
    "MB",
    "means, ms",
    "meta-gradients, ms",
    "agreeing, ms",
    "90 % from, ms",
)


def table() -> str:
    """Return the table in Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
