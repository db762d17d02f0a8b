"""Several meta-updates in a row, after which the device is waited for once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError
from metaplug.execution.engine import FAILURES, Engine, MetaStep

_ENDS: tuple[type[Exception], ...] = (MetaplugError, *FAILURES)
"""What ends a window, after the steps that went well."""


def meta_steps(
    engine: Engine, batches: Iterable[TaskBatch], total: int, *, skip: bool = False
) -> Iterator[MetaStep]:
    """Make one meta-update on each batch in turn, at least one.

    Only after the last is the device waited for, and do plugins give figures. Where a step fails or
    is to be skipped, all are undone and made again, one by one.

    Raises:
        RunError: as meta_step, after the steps before that batch; what was updated from it on is
            undone.
    """
    begun, before, again, failure = engine.iteration, _snapshot(engine), False, None
    done, told, rates = list[TaskBatch](), list[Tensor](), list[float]()
    try:
        for batch in batches:
            done.append(batch)
            found = engine.meta_gradients(batch, engine.iteration, total)
            told.append(engine.told(found, batch if skip else None))
            rates.append(engine.update(found, total))
    except _ENDS as error:
        if engine.world.size > 1:  # the other ranks may be elsewhere
            _restore(engine, before)
            raise
        # A step that fails will fail again, or be skipped; a batch that cannot be drawn ends this.
        again, failure = True, error if len(done) == len(rates) else None
    rows = torch.stack(told).tolist() if told else []
    if again or not all(finite for *_, finite in rows) or engine.nonfinite_parameter():
        _restore(engine, before)
        yield from _one_by_one(engine, done, failure, total, skip=skip)
        return
    steps = [
        MetaStep(begun + place, outer_loss, norm, rate, {})
        for place, ((outer_loss, norm, _), rate) in enumerate(zip(rows, rates, strict=True), 1)
    ]
    yield from steps[:-1]
    yield replace(steps[-1], figures=engine.chain.figures(engine.iteration - 1, total))


def _one_by_one(
    engine: Engine,
    batches: Sequence[TaskBatch],
    failure: Exception | None,
    total: int,
    *,
    skip: bool,
) -> Iterator[MetaStep]:
    """Repeat the steps of a window that did not go well, then raise what ended it.

    All are made before the first is given.
    """
    steps: list[MetaStep] = []
    for batch in batches:
        try:
            step = engine.meta_step(batch, total, skip=skip)
        except _ENDS as error:
            failure = error
            break
        steps.append(step if len(steps) == len(batches) - 1 else replace(step, figures={}))
    yield from steps
    if failure is not None:
        raise failure


def _snapshot(engine: Engine) -> tuple[Any, ...]:
    weights = {
        name: parameter.detach().clone() for name, parameter in engine.meta_parameters.items()
    }
    states = [copy.deepcopy(plugin.state_dict()) for plugin in engine.chain.plugins]
    counts = engine.iteration, engine.total, engine.skipped, engine.skipped_in_a_row
    return counts, weights, states, copy.deepcopy(engine.optimizer.state_dict())


def _restore(engine: Engine, snapshot: tuple[Any, ...]) -> None:
    counts, weights, states, optimizer = snapshot
    engine.iteration, engine.total, engine.skipped, engine.skipped_in_a_row = counts
    with torch.no_grad():
        for name, weight in weights.items():
            engine.meta_parameters[name].copy_(weight)
    for plugin, state in zip(engine.chain.plugins, states, strict=True):
        plugin.load_state_dict(state)
    engine.optimizer.load_state_dict(optimizer)
