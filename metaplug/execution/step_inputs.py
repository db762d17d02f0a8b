"""What changes from one meta-step to the next, as a flat list of tensors, and back in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from metaplug.contract.task_batch import TaskBatch
from metaplug.execution.engine import Engine
from metaplug.execution.traced_number import TracedNumber


class Step(NamedTuple):
    """The arguments of `Engine.derive`: the numbers are plain, or tensors of shape ()."""

    batch: TaskBatch
    iteration: Any
    total: Any
    weights: Mapping[int, Any]


Places: TypeAlias = list[tuple[Any, str]]
"""A mapping and the name in it, for each."""


def tensors_of(engine: Engine, step: Step, places: Places) -> list[Tensor]:
    """Return all that a step reads: the model's and plugins' tensors, the tasks, the numbers."""
    inner = engine.inner
    return [
        *(holder[name].detach() for holder, name in places),
        *(tensor.contiguous() for tensor in step.batch.tensors()),
        *(_full(each, torch.float64, inner.device) for each in (step.iteration, step.total)),
        *(_full(each, inner.dtype, inner.device) for each in step.weights.values()),
    ]


def _full(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Made on the device: a copy from the host would wait for it.
    return torch.full((), number, dtype=dtype, device=device)


def form_of(step: Step, places: Places) -> tuple[Any, ...]:
    """Return what a trace takes for granted of its inputs, whatever their numbers.

    A plugin may give a buffer another shape, make one of None, or part two that were one tensor.
    """
    first: dict[int, int] = {}
    own = []
    for holder, name in places:
        each = holder[name]
        same = first.setdefault(id(each), len(first))
        own.append((name, same, *_form(each), each.stride(), each.requires_grad))
    tasks = [(name, *_form(each)) for name, each in step.batch.named_tensors().items()]
    return tuple(own), tuple(tasks), step.batch.sizes, tuple(step.weights)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


@contextmanager
def in_place(engine: Engine, tensors: Sequence[Tensor], like: Step) -> Iterator[Step]:
    """Inside, the engine computes with these tensors; yields the rest of them, in a step's form."""
    places = places_of(engine)
    before = [holder[name] for holder, name in places]
    meta_parameters = dict(engine.meta_parameters)
    # What a hook keeps of a trace, such as its figures, is of use to nobody.
    attributes = [(vars(module), dict(vars(module))) for module in _modules(engine)]
    last = len(tensors) - len(like.weights)
    own, tasks = tensors[: len(places)], tensors[len(places) : last - 2]
    (iteration, total), weights = tensors[last - 2 : last], tensors[last:]
    new: dict[int, Any] = {}
    try:
        for (holder, name), old, tensor in zip(places, before, own, strict=True):
            if id(old) not in new:  # a task parameter's start stands in two places, and is one
                new[id(old)] = tensor.detach().requires_grad_(old.requires_grad)
            holder[name] = new[id(old)]
        engine.meta_parameters.update({name: new[id(old)] for name, old in meta_parameters.items()})
        yield Step(
            like.batch.with_tensors(tasks),
            TracedNumber(like.iteration, iteration),
            TracedNumber(like.total, total),
            dict(zip(like.weights, weights, strict=True)),
        )
    finally:
        for (holder, name), old in zip(places, before, strict=True):
            holder[name] = old
        engine.meta_parameters.update(meta_parameters)
        for now, then in attributes:
            now.clear()
            now.update(then)


def places_of(engine: Engine) -> Places:
    """Where tensors stand that may change from step to step: the model's and the plugins'."""
    holders: list[Any] = [
        holder for module in _modules(engine) for holder in (module._parameters, module._buffers)
    ]
    # The clone that runs takes over the buffers of the model itself at every step.
    holders += [module._buffers for module in engine.inner.functional.model.modules()]
    inner = engine.inner
    found: Places = [
        (holder, name) for holder in (inner.parameters, inner.variables) for name in holder
    ]
    for holder in holders:
        found += [(holder, name) for name, tensor in holder.items() if tensor is not None]
    return found


def _modules(engine: Engine) -> list[nn.Module]:
    return [module for plugin in engine.chain.plugins for module in plugin.modules()]
