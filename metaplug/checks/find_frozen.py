"""Which modules of a model lie below the first adapted layer, so their outputs may be kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metaplug.contract.inputs import Inputs, map_inputs
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.core.adaptation import adapt
from metaplug.core.frozen_features import Call, FrozenFeatures, give_forward
from metaplug.core.functional_model import Place
from metaplug.core.inner_loop import InnerLoop
from metaplug.errors import RequestError
from metaplug.random_streams import random_state, stream

_BATCH_NORMS = nn.modules.batchnorm._NormBase


def find_frozen(inner: InnerLoop, batch: TaskBatch, written: Collection[Place]) -> FrozenFeatures:
    """Return a store of what the inner loop cannot change in the model.

    Args:
        written: where forward writes attributes on modules.

    Raises:
        RequestError: there is nothing to keep; it draws random numbers or uses the statistics of a
            batch; or the model would answer otherwise with it.
    """
    module = inner.functional.module
    stacked = inner.functional.inputs(uniform(batch).support_x, inner.dtype)
    x = map_inputs(lambda each: each[0], stacked)
    varying = _varying(inner, batch)
    weights = [
        each.detach().requires_grad_(name in varying) for name, each in inner.parameters.items()
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
    read = {id(each) for path, _ in kept for each in module.get_submodule(path).parameters()}
    # By identity: a tied weight stands in the module by another name than the model's.
    names = tuple(name for name, each in inner.parameters.items() if id(each) in read)
    features = FrozenFeatures(module, frozenset(kept), names)
    inner.functional.watch(written)  # what modules are given back after a call has the store
    try:
        _refuse_other_answers(inner, features, x, varying)
    except RequestError:
        features.remove()
        inner.functional.watch(written)
        raise
    return features


def _varying(inner: InnerLoop, batch: TaskBatch) -> Collection[str]:
    """The parameters that differ from step to step: adapted, or changed in transform_parameters."""
    if not inner.chain.links("transform_parameters"):
        return inner.adapted
    vectorized, inner.vectorized = inner.vectorized, False
    try:
        task = batch.tasks(slice(0, 1))
        found = adapt(inner, task, steps=0, training=False, iteration=0, query_after={0})
    finally:
        inner.vectorized = vectorized
    before, values = found.adapted_parameters, found.query_parameters
    return {*inner.adapted, *(name for name in before if values[name] is not before[name])}


def _refuse_other_answers(
    inner: InnerLoop, features: FrozenFeatures, x: Inputs, varying: Collection[str]
) -> None:
    """Refuse a store with which the model answers otherwise once the adapted weights change.

    Autograd does not show all that reaches a module: a value may be detached, and a model branch at
    evaluation.
    """
    generator = torch.Generator().manual_seed(0)
    first = [each.detach() for each in inner.parameters.values()]
    # Far from the first, so that choices by the largest of some numbers change, too.
    second = [
        0.1 * torch.randn(each.shape, generator=generator).to(each) - each
        if name in varying
        else each
        for name, each in zip(inner.parameters, first, strict=True)
    ]

    def answer(weights: list[Tensor], kept: AbstractContextManager[None], seed: int = 0) -> Tensor:
        with torch.no_grad(), stream(seed, inner.device), kept:
            found: Tensor = inner.functional(weights, x)
        return found

    for training in (False, True):
        inner.functional.begin(training)
        try:
            exact = answer(second, nullcontext())
        except Exception:
            continue  # the evaluation that meets it says so
        with features.batch():
            answer(first, features.examples(0), seed=1)  # shows what draws at evaluation alone
            before, ours = features.versions(), None
            with suppress(Exception):
                ours = answer(second, features.examples(0))
            after = features.versions()
        if changed := [call for call, versions in before.items() if after[call] != versions]:
            raise RequestError(
                f"cache_frozen would keep the output of '{changed[0][0]}', which the model then "
                "changes in place, in every step once more: make a new tensor there, or leave "
                "cache_frozen out"
            )
        allowed = 1e-6 if exact.dtype == torch.float64 else 1e-4
        if ours is None or (ours - exact).norm() > allowed * exact.norm():
            raise RequestError(
                "cache_frozen keeps what autograd says that adapted weights do not reach, but with "
                "it the model answers otherwise once they change (it detaches a value of theirs, "
                "or goes another way at evaluation): leave cache_frozen out"
            )


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
