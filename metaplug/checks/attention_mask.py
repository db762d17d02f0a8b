"""Whether a model takes an attention mask that was expanded once for all tasks, outside vmap."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import get_args

import torch
from torch import Tensor

from metaplug.checks.compare_batching import double, in_dtype, perturbed
from metaplug.contract.inputs import Inputs, map_inputs
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.model_calls import MaskForm, expand_mask
from metaplug.execution.batching import refusal
from metaplug.random_streams import stream

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""By dtype, what the answers may differ by, relative to what the mask changes in them."""


def choose_mask(inner: InnerLoop, batch: TaskBatch) -> tuple[MaskForm, bool] | None:
    """Return how the mask is to be expanded for this model; None where it stays as it is.

    Models expand (n, L) masks in forward, and branch on their values, which vmap refuses. Where it
    does, the expanded forms are tried that such models take, and the one is chosen that alone gives
    the model's own answers, on whole examples and without their second token.
    """
    batch = uniform(batch)
    x = batch.support_x
    if not isinstance(x, Mapping) or "attention_mask" not in x or x["attention_mask"].ndim != 3:
        return None
    if refusal(inner, batch) is None:
        return None
    for dtype in dict.fromkeys((double(inner.dtype), torch.float32)):
        try:
            with in_dtype(inner, dtype):
                found = _form(inner, x, dtype)
            return found if found is None or _runs(inner, x, *found) else None
        except Exception:
            continue  # with constants in float32, say
    return None


def _runs(inner: InnerLoop, x: Inputs, form: MaskForm, added: bool) -> bool:
    """Return whether the model takes the mask as it is: frozen weights may be of another dtype."""
    mask = expand_mask(x["attention_mask"][0], form, inner.dtype if added else None)
    own = {**map_inputs(lambda each: each[0], x), "attention_mask": mask}
    for around in (nullcontext, inner.autocast):  # checks run without the one that steps run in
        try:
            with torch.no_grad(), stream(0, inner.device), around():
                inner.functional(list(inner.parameters.values()), own)
        except Exception:
            return False
    return True


def _form(inner: InnerLoop, x: Inputs, dtype: torch.dtype) -> tuple[MaskForm, bool] | None:
    weights = [each[0] for each in perturbed(inner, dtype, 1).values()]

    def answers(mask: Tensor) -> list[Tensor]:
        found = []
        for training in (False, True):  # a model may branch; training comes last, and stays
            inner.functional.begin(training)
            with torch.no_grad(), stream(0, inner.device):
                found.append(inner.functional(weights, {**sample, "attention_mask": mask}))
        return found

    sample = map_inputs(lambda each: each[0], x)
    whole = torch.ones_like(sample["attention_mask"])
    padded = whole.clone()
    padded[:, min(1, padded.shape[1] - 1)] = 0  # the second token, which later ones attend to
    exact = [answers(mask) for mask in (whole, padded)]
    allowed = [
        TOLERANCE.get(dtype, 0.0) * (one - other).norm() for one, other in zip(*exact, strict=True)
    ]
    fits: dict[MaskForm, bool] = {}
    for form, added in itertools.product(get_args(MaskForm), (False, True)):
        try:
            masks = [expand_mask(mask, form, dtype if added else None) for mask in (whole, padded)]
            found = [answers(mask) for mask in masks]
        except Exception:
            continue  # no form that this model takes
        if all(
            one.shape == two.shape and (one - two).norm() < most
            for ours, theirs in zip(found, exact, strict=True)
            for one, two, most in zip(ours, theirs, allowed, strict=True)
        ):
            fits.setdefault(form, added)
    # Where both forms fit, as with a single token, these examples do not say which one is right.
    return next(iter(fits.items())) if len(fits) == 1 else None
