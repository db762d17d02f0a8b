"""How the graph of a meta-step grows with inner steps, of MAML and of iMAML.

Run from the root of the project: python docs/studies/imaml_memory.py

A perceptron of two hidden layers of 40 on sinusoids, 4 tasks of 10 shots, float32. What is counted
are the bytes that autograd holds for backward passes at a time, at most; each tensor as often as it
is saved. That is exact: neither the allocator nor the machine has a say in it. The picture goes to
docs/images/imaml-memory.png.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from metaplug import MetaLearner
from metaplug.models import Mlp
from metaplug.tasks import Sinusoid

STEPS = (1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
PRESETS = {"maml": "MAML", "fomaml": "first-order MAML", "imaml": "iMAML"}
PICTURE = Path(__file__).parents[1] / "images" / "imaml-memory.png"


class Held:
    """Counts the bytes of the tensors that are saved and not yet released."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def save(self, tensor: Tensor) -> Saved:
        """Note a tensor that autograd saves."""
        return Saved(tensor.detach(), self)

    def change(self, size: int) -> None:
        """Note that so many bytes more are held."""
        self.now += size
        self.most = max(self.most, self.now)


class Saved:
    """A saved tensor, which counts as long as autograd refers to it."""

    def __init__(self, tensor: Tensor, held: Held) -> None:
        self.tensor, self.held = tensor, held
        held.change(tensor.nbytes)

    def __del__(self) -> None:
        self.held.change(-self.tensor.nbytes)


def graph(preset: str, steps: int) -> int:
    """Return the bytes of one meta-step's graph."""
    torch.manual_seed(0)
    tasks = Sinusoid(shots=10)
    model = Mlp(tasks.input_shape, tasks.outputs)
    given: dict[str, Any] = {"kind": "regression", "inner_lr": 0.01, "inner_steps": steps}
    learner = MetaLearner(model, preset=preset, **given)
    batch = tasks.train.batch(0, range(4))
    learner.meta_gradients(batch)  # what is found out about a model once
    held = Held()
    with torch.autograd.graph.saved_tensors_hooks(held.save, lambda saved: saved.tensor):
        learner.meta_gradients(batch)
    return held.most


def draw(found: Mapping[str, Sequence[int]]) -> None:
    """Draw one line for each preset, with its last value beside it."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for preset, sizes in found.items():
        mebibytes = [size / 2**20 for size in sizes]
        axes.plot(STEPS, mebibytes, marker="o", markersize=3, label=PRESETS[preset])
        axes.annotate(
            f"{mebibytes[-1]:.2f}", (STEPS[-1], mebibytes[-1]), (6, 0), textcoords="offset points"
        )
    axes.set(xlabel="inner steps", ylabel="graph of a meta-step, MiB", yscale="log")
    axes.set_xlim(0, 110)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    found = {preset: [graph(preset, steps) for steps in STEPS] for preset in PRESETS}
    for preset, sizes in found.items():
        print(preset, *sizes)
    draw(found)
