"""MetaMix: the outer loss on mixtures of support and query examples."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from metaplug import Plugin, PluginConfig, RequestError, TaskBatch, hookimpl, per_task


class MetaMix(Plugin):
    """Replace every query example in meta-training by a mixture with a support example.

        query x ← λ · support x + (1 − λ) · query x        λ[t] ~ Beta(α, α), one for each task
        query y ← λ · support y + (1 − λ) · query y        class labels as probabilities

    Query example j is mixed with support example π(j mod n_support), π a random permutation. With
    "cutmix" a box of the support image of area λ takes the place of the query image's, and λ is the
    share inside. The paper also mixes hidden layers, which is not part of it.

    Source: Yao et al. 2021 (arXiv 2007.13040), MetaMix; Yun et al. 2019 (arXiv 1905.04899) for
    the box.
    """

    class Config(PluginConfig):
        """How examples are mixed."""

        alpha: float = Field(2.0, ge=0, le=1e3, description="α of λ's distribution; 0: no mixing.")
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
        half, support, queries = len(tensors) // 2, batch.support_y.shape[1], batch.query_y.shape[1]
        if outputs is not None and not batch.support_y.is_floating_point():
            for place in (half - 1, -1):  # what is padded counts nowhere
                soft = F.one_hot(tensors[place].clamp_min(0), outputs)
                tensors[place] = soft.to(tensors[0].dtype)
        counts = [each.support for each in batch.sizes or ()] or [support] * batch.num_tasks
        orders = [torch.randperm(count, generator=generator) for count in counts]
        partners = torch.stack([order[torch.arange(queries) % len(order)] for order in orders])
        alphas = torch.full((batch.num_tasks, 2), self.config.alpha, dtype=torch.float64)
        share = inside = torch._sample_dirichlet(alphas, generator)[:, 0]
        if self.config.method == "cutmix":
            inside = _boxes(share, tensors[0].shape[-2:], generator)
            share, inside = inside.mean((1, 2)), inside[:, None, None]
        for place, query in enumerate(tensors[half:]):
            mates = per_task(partners.to(query.device), query)
            weight = per_task((inside if place < half - 1 else share).to(query), query)
            tensors[half + place] = query.lerp(tensors[place].take_along_dim(mates, 1), weight)
        return batch.with_tensors(tensors)

    def _check(self, batch: TaskBatch, outputs: int | None) -> None:
        inputs = [each for name, each in batch.named_tensors().items() if not name.endswith("_y")]
        labels, numbers = (batch.support_y, batch.query_y), batch.support_y.is_floating_point()
        ignored = torch.cat([(y == -100).flatten() for y in labels])
        counted = sum(size.support + size.query for size in batch.sizes or ()) or len(ignored)
        cuts, one = self.config.method == "cutmix", labels[0].ndim == 2 and outputs is not None
        needs = {
            "inputs of a floating dtype": all(x.is_floating_point() for x in inputs),
            "images, for method cutmix": not cuts or all(x.ndim == 5 for x in inputs),
            "one class label, or numbers, for each example": numbers or one,
            "labels other than -100": numbers or int((~ignored).sum()) == counted,
        }
        for what, given in needs.items():
            if not given:
                raise RequestError(
                    f"plugin '{self.name}' needs {what} to mix: give such tasks, or leave it out"
                )


def _boxes(share: Tensor, form: torch.Size, generator: torch.Generator) -> Tensor:
    """(T, height, width) boxes, 1 inside and 0 outside, of these shares of a larger area."""
    centers = torch.rand(len(share), 2, generator=generator, dtype=torch.float64)
    inside: list[Tensor] = []
    for center, length in zip(centers.T, form, strict=True):
        middles = (torch.arange(length) + 0.5) / length
        inside.append((middles - center[:, None]).abs() < share.sqrt()[:, None] / 2)
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).double()
