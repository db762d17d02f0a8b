"""MetaMix: the outer loss on mixtures of support and query examples."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from metaplug import Plugin, PluginConfig, RequestError, TaskBatch, hookimpl


class MetaMix(Plugin):
    """Replace every query example in meta-training by a mixture with a support example.

        query x ← λ · support x + (1 − λ) · query x        λ[t] ~ Beta(α, α), one for each task
        query y ← λ · support y + (1 − λ) · query y        class labels as probabilities

    Query example j is mixed with support example π(j mod n_support), π a random permutation of the
    task's support set. With "cutmix" images have a box of the support image of area λ in the place
    of theirs, somewhere, and λ is the share that lies inside. The support set stays, but its class
    labels become probabilities too.

    This is the variant on inputs: the paper also mixes hidden layers, one drawn at random.

    Source: Yao et al. 2021 (arXiv 2007.13040), MetaMix; Yun et al. 2019 (arXiv 1905.04899) for
    the box.
    """

    class Config(PluginConfig):
        """How examples are mixed."""

        alpha: float = Field(
            2.0, ge=0, le=1e3, description="α of Beta(α, α), from which λ is drawn; 0: no mixing."
        )
        method: Literal["mixup", "cutmix"] = Field(
            "mixup", description="mixup: all of both inputs; cutmix: a box of one in the other."
        )

    config: Config

    @hookimpl
    def transform_tasks(
        self, batch: TaskBatch, generator: torch.Generator, outputs: int | None
    ) -> TaskBatch | None:
        if self.config.alpha == 0:
            return None
        self._check(batch, outputs)
        tensors = batch.tensors()
        half = len(tensors) // 2
        if outputs is not None and not batch.support_y.is_floating_point():
            for place in (half - 1, -1):  # what is padded counts nowhere
                soft = F.one_hot(tensors[place].clamp_min(0), outputs)
                tensors[place] = soft.to(tensors[0].dtype)
        partners = _partners(batch, generator).to(batch.device)
        mates = [each.take_along_dim(_behind(partners, each), 1) for each in tensors[:half]]
        alphas = torch.full((batch.num_tasks, 2), self.config.alpha, dtype=torch.float64)
        share = inside = torch._sample_dirichlet(alphas, generator)[:, 0]
        if self.config.method == "cutmix":
            inside = _boxes(share, tensors[0].shape[-2:], generator)
            share, inside = inside.mean((1, 2)), inside[:, None, None]
        weights = [*[inside] * (half - 1), share]
        mixed = [
            query.lerp(mate, _behind(weight.to(query), query))
            for query, mate, weight in zip(tensors[half:], mates, weights, strict=True)
        ]
        return batch.with_tensors([*tensors[:half], *mixed])

    def _check(self, batch: TaskBatch, outputs: int | None) -> None:
        cuts = self.config.method == "cutmix"
        for name, each in batch.named_tensors().items():
            if name.endswith("_y"):
                continue
            if not each.is_floating_point():
                raise RequestError(
                    f"plugin '{self.name}' mixes inputs, but {name} is {each.dtype}, and token "
                    "numbers have no mixture: leave it out, or give inputs of a floating dtype"
                )
            if cuts and each.ndim != 5:
                raise RequestError(
                    f"plugin '{self.name}' cuts boxes from images (channels, height, width), but "
                    f"{name} has examples of shape {tuple(each.shape[2:])}: use method = mixup"
                )
        y = batch.support_y
        if y.is_floating_point():
            return
        if y.ndim != 2 or outputs is None:
            raise RequestError(
                f"plugin '{self.name}' mixes one class label for each example, or numbers, but "
                f"support_y is {y.dtype} of shape {tuple(y.shape[2:])} for each: leave it out"
            )
        for part in ("support", "query"):
            labels, sizes = getattr(batch, f"{part}_y"), batch.sizes or ()
            ends = [own.examples(part) for own in sizes] or [labels.shape[1]] * len(labels)
            counted = torch.arange(labels.shape[1]) < torch.tensor(ends)[:, None]
            if bool(((labels == -100) & counted.to(labels.device)).any()):
                raise RequestError(
                    f"plugin '{self.name}' mixes labels, and {part}_y has examples of label -100, "
                    "which count for nothing and have no mixture: leave them out of the tasks"
                )


def _behind(values: Tensor, like: Tensor) -> Tensor:
    """With axes of length 1 behind, as many as `like` has."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim))


def _partners(batch: TaskBatch, generator: torch.Generator) -> Tensor:
    """(T, n_query) places of the support examples that query examples are mixed with."""
    support, query = batch.support_y.shape[1], torch.arange(batch.query_y.shape[1])
    counts = [support] * batch.num_tasks
    if batch.sizes is not None:
        counts = [size.support for size in batch.sizes]
    orders = [torch.randperm(count, generator=generator) for count in counts]
    return torch.stack([order[query % len(order)] for order in orders])


def _boxes(share: Tensor, form: torch.Size, generator: torch.Generator) -> Tensor:
    """(T, height, width) boxes, 1 inside and 0 outside, of these shares of a larger area."""
    centers = torch.rand(len(share), 2, generator=generator, dtype=torch.float64)
    inside = []
    for axis, length in enumerate(form):
        middles, half = (torch.arange(length) + 0.5) / length, share.sqrt() / 2
        inside.append((middles - centers[:, axis : axis + 1]).abs() < half[:, None])
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).double()
