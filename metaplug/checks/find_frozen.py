"""Which modules of a model lie below the first adapted layer, so their outputs may be kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metaplug.contract.inputs import map_inputs
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.core.frozen_features import Call, FrozenFeatures, give_forward
from metaplug.core.inner_loop import InnerLoop
from metaplug.errors import RequestError
from metaplug.random_streams import random_state, stream

_BATCH_NORMS = nn.modules.batchnorm._NormBase


def find_frozen(inner: InnerLoop, batch: TaskBatch) -> FrozenFeatures:
    """Return a store of what the inner loop cannot change in the model.

    Raises:
        RequestError: there is nothing to keep, or it draws random numbers or uses the statistics of
            a batch.
    """
    module = inner.functional.module
    stacked = inner.functional.inputs(uniform(batch).support_x, inner.dtype)
    x = map_inputs(lambda each: each[0], stacked)
    weights = [
        each.detach().requires_grad_(name in inner.adapted)
        for name, each in inner.parameters.items()
    ]
    with _recorded(module, inner.device) as calls, stream(0, inner.device):
        inner.functional(weights, x)
    kept: dict[Call, bool] = {}
    for call, draws in calls.items():
        parents = (other for other in kept if call[0].startswith(f"{other[0]}."))
        if not any(parents):
            kept[call] = draws
    if not kept:
        raise RequestError(
            "cache_frozen keeps what lies below the first adapted layer, but nothing does: the "
            "first module that runs is adapted; leave it out"
        )
    for (path, _), draws in kept.items():
        _refuse(path, module.get_submodule(path), draws=draws, own=inner.functional.batch_norm)
    paths = {path for path, _ in kept}
    read = {
        f"{path}.{name}"
        for path in paths
        for name, _ in module.get_submodule(path).named_parameters(remove_duplicate=False)
    }
    return FrozenFeatures(module, frozenset(kept), frozenset(read & inner.parameters.keys()))


def _refuse(path: str, module: nn.Module, *, draws: bool, own: str) -> None:
    normalises = [
        each for each in module.modules() if isinstance(each, _BATCH_NORMS) and own == "batch"
    ]
    if draws or normalises:
        why, advice = "draws random numbers", "set its dropout to 0"
        if normalises:
            why, advice = "uses the statistics of a batch", "give batch_norm='frozen'"
        raise RequestError(
            f"cache_frozen would keep the output of '{path}', which {why}, so it is another one in "
            f"every step: {advice}, or leave cache_frozen out"
        )


@contextmanager
def _recorded(model: nn.Module, device: torch.device) -> Iterator[dict[Call, bool]]:
    """Inside, note the calls whose output no adapted weight reaches, outermost modules first.

    The value says whether the call drew random numbers.
    """
    found: dict[Call, bool] = {}
    count: Counter[str] = Counter()
    places = Counter(id(each) for _, each in model.named_modules(remove_duplicate=False))
    # A module in two places may run inside another one that is kept, and its calls be miscounted.
    modules = {path: each for path, each in model.named_modules() if path and places[id(each)] == 1}
    before = {path: vars(each).get("forward") for path, each in modules.items()}

    def noting(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            call = path, count[path]
            count[path] += 1
            state = random_state(device)
            found[call] = False  # before those of its own modules
            answer = forward(*args, **kwargs)
            leaves = tree_leaves(answer)
            plain = all(each is None or isinstance(each, Tensor) for each in leaves)
            tensors = [each for each in leaves if isinstance(each, Tensor)]
            if not plain or not tensors or any(each.requires_grad for each in tensors):
                del found[call]
            else:
                found[call] = not torch.equal(state, random_state(device))
            return answer

        return noted

    for path, module in modules.items():
        module.forward = noting(path, module.forward)
    try:
        yield found
    finally:
        for path, module in modules.items():
            give_forward(module, before[path])
