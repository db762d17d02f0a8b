"""Clauses on what a plugin writes and remembers."""

from __future__ import annotations

import copy
import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaplug.errors import MetaplugError
from metaplug.learner import MetaLearner
from metaplug.testing.clauses import BreachError, Example, Subject, clause_on, fit, stream
from metaplug.testing.comparing import difference, evaluation, training
from metaplug.testing.watching import Watch, fingerprint


@clause_on(
    "no-mutation",
    "no hook writes into what it is given, or into the model: neither into a mapping nor into a tensor",
)
def no_mutation(subject: Subject, example: Example) -> None:
    """What a hook is given, other plugins and autograd use too."""
    learner = subject.learner(Example(example.problem))
    for name, parameter in learner.model.named_parameters():
        if not torch.equal(parameter, example.problem.model.get_parameter(name)):
            raise BreachError(
                f"setup wrote into the model's parameter '{name}', which is its author's: clone what you start from"
            )
    if writes := _watched(learner, example).writes:
        raise BreachError(
            f"{writes[0]}, which other plugins and autograd use too: return a new value, and write none"
        )


@clause_on(
    "no-state-in-loop",
    "only setup and commit change what a plugin remembers: no other hook writes state",
)
def no_state_in_loop(subject: Subject, example: Example) -> None:
    """Hooks in the loop run again, and for nothing."""
    if states := _watched(subject.learner(Example(example.problem)), example).states:
        raise BreachError(
            f"{states[0]}, though a hook may run again, or for nothing: hand it to step.keep, and store it in commit"
        )


def _watched(learner: MetaLearner, example: Example) -> Watch:
    """What is seen while it trains and is evaluated; where that fails, other clauses say so."""
    watch, batch = Watch(learner, learner.chain.plugins[0]), example.problem.batch
    with suppress(MetaplugError, RuntimeError, TypeError, ValueError, LookupError):
        training(learner, batch)
    with suppress(MetaplugError, RuntimeError, TypeError, ValueError, LookupError):
        evaluation(learner, batch)
    with suppress(MetaplugError, RuntimeError, TypeError, ValueError, LookupError):
        fit(learner, example, 1)
    return watch


@clause_on("deterministic", "the same seed gives the same numbers, bit for bit")
def deterministic(subject: Subject, example: Example) -> None:
    """A run is its seed."""
    one, other = (subject.learner(example) for _ in range(2))
    first = training(one, example.problem.batch)
    mend = "draw with torch, which starts from the seed in every iteration, or from the generator that transform_tasks is given"
    if text := difference(training(other, example.problem.batch), first, exact=True):
        raise BreachError(f"{text}, of two learners of one seed: {mend}")
    if text := difference(training(one, example.problem.batch), first, exact=True):
        raise BreachError(
            f"{text}, of two calls of meta_gradients, which change nothing: {mend}, and write no state"
        )


@clause_on(
    "evaluation-leaves-no-trace",
    "evaluation changes nothing: neither state nor random numbers nor what is trained afterwards",
    cost=2,
)
def evaluation_leaves_no_trace(subject: Subject, example: Example) -> None:
    """Validation happens in the middle of training."""
    mend = "keep nothing where step.training is False"
    found = []
    for split in (None, "test", "validation"):
        learner = subject.learner(example)
        if split is not None:
            _evaluated(learner, example, split, mend)
        fit(learner, example, 1)
        found.append(training(learner, example.problem.batch))
    for one, other in ((0, 1), (1, 2)):
        if text := difference(found[one], found[other], exact=True):
            raise BreachError(
                f"{text}, of two learners that differ in what they were evaluated on before: {mend}"
            )


def _evaluated(learner: MetaLearner, example: Example, split: str, mend: str) -> None:
    """Evaluate, and hold against it what it may not change."""
    plugin, batch = learner.chain.plugins[0], example.problem.batch
    random_before, before, own = (
        _random_states(),
        copy.deepcopy(_state(learner)),
        fingerprint(plugin),
    )
    learner.evaluate(stream(example, split), num_tasks=2)
    learner.adapt(batch.support_x[0], batch.support_y[0])
    if moved := [
        name
        for name, state in _random_states().items()
        if not np.array_equal(state, random_before[name])
    ]:
        raise BreachError(
            f"an evaluation moves the random numbers of {moved[0]}, which are the caller's: draw none, or from a generator of your own"
        )
    if changed := [path for path, value in fingerprint(plugin).items() if own.get(path) != value]:
        raise BreachError(f"an evaluation changes {changed[0]}: {mend}")
    if not _same(before, _state(learner)):
        raise BreachError(f"an evaluation changes the learner's state: {mend}")


@clause_on(
    "checkpoint",
    "what it remembers is in a checkpoint: a learner that is loaded goes on as the one that was saved, bit for bit",
    cost=2,
)
def checkpoint(subject: Subject, example: Example) -> None:
    """A plain tensor attribute is in no state_dict."""
    learner = subject.learner(Example(example.problem))
    fit(learner, example, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learner.safetensors"
        learner.save(path)
        loaded = MetaLearner.load(
            path, model=copy.deepcopy(example.problem.model), plugins=[subject.make()]
        )
    mend = "register what must last with register_buffer or as an nn.Parameter, in setup"
    batch = example.problem.batch
    for when, found in (("at evaluation", evaluation), ("in the next iteration", training)):
        if text := difference(found(loaded, batch), found(learner, batch), exact=True):
            raise BreachError(
                f"{text} {when}, of the learner that was loaded and the one that was saved: {mend}"
            )
    for each in (learner, loaded):
        fit(each, example, 1)
    if text := difference(training(loaded, batch), training(learner, batch), exact=True):
        raise BreachError(
            f"{text} an iteration later, of the learner that was loaded and the one that was saved: {mend}"
        )


def _state(learner: MetaLearner) -> dict[str, Any]:
    return {
        "model": learner.model.state_dict(),
        "optimizer": learner.engine.optimizer.state_dict(),
        "iteration": learner.iteration,
    }


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy(),
        "random": np.array(random.getstate()[1]),
        "numpy": np.array([kind, *keys, *rest]),
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)
