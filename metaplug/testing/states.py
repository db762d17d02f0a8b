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

from metaplug.learner import MetaLearner
from metaplug.testing.clauses import FAULTS, BreachError, Example, Subject, clause_on, fit, stream
from metaplug.testing.comparing import difference, evaluation, training
from metaplug.testing.watching import Watch, fingerprint, frozen


@clause_on(
    "no-mutation",
    "no hook writes into what it is given, or into the model: neither into a mapping nor into a "
    "tensor",
)
def no_mutation(subject: Subject, example: Example) -> None:
    """What a hook is given, other plugins and autograd use too."""
    if (learner := subject.learner_if_made(Example(example.problem))) is None:
        return
    for name, parameter in learner.model.named_parameters():
        if not torch.equal(parameter, example.problem.model.get_parameter(name)):
            raise BreachError(
                f"setup wrote into the model's parameter '{name}', which is its author's: "
                "clone what you start from"
            )
    if writes := _watched(learner, example).writes:
        raise BreachError(
            f"{writes[0]}, which other plugins and autograd use too: "
            "return a new value, and write none"
        )


@clause_on(
    "no-state-in-loop",
    "only setup and commit change what a plugin remembers: no other hook writes state",
)
def no_state_in_loop(subject: Subject, example: Example) -> None:
    """Hooks in the loop run again, and for nothing."""
    if (learner := subject.learner_if_made(Example(example.problem))) is None:
        return
    if states := _watched(learner, example).states:
        raise BreachError(
            f"{states[0]}, though a hook may run again, or for nothing: "
            "hand it to step.keep, and store it in commit"
        )


def _watched(learner: MetaLearner, example: Example) -> Watch:
    """Watch it train and be evaluated; where that fails, other clauses say so."""
    watch, batch = Watch(learner, learner.chain.plugins[0]), example.problem.batch
    for run in (
        lambda: training(learner, batch),
        lambda: evaluation(learner, batch),
        lambda: fit(learner, example, 1),
    ):
        with suppress(*FAULTS):
            run()
    return watch


@clause_on("deterministic", "the same seed gives the same numbers, bit for bit")
def deterministic(subject: Subject, example: Example) -> None:
    """A run is its seed."""
    one, other = (subject.learner(example) for _ in range(2))
    batch, advice = (
        example.problem.batch,
        (
            "draw with torch, which starts from the seed in every iteration, or from the generator "
            "that transform_tasks is given"
        ),
    )
    first = training(one, batch)
    if text := difference(training(other, batch), first, exact=True):
        raise BreachError(f"{text}, of two learners of one seed: {advice}")
    if text := difference(training(one, batch), first, exact=True):
        raise BreachError(
            f"{text}, of two calls of meta_gradients, which change nothing: {advice}, and write no "
            "state"
        )


@clause_on(
    "evaluation-leaves-no-trace",
    "evaluation changes nothing: neither state nor random numbers nor what is trained afterwards",
    cost=2,
)
def evaluation_leaves_no_trace(subject: Subject, example: Example) -> None:
    """Validation happens in the middle of training."""
    advice, found = "keep nothing where step.training is False", []
    for split in (None, "test", "validation"):
        learner = subject.learner(example)
        if split is not None:
            _evaluated(learner, example, split, advice)
        fit(learner, example, 1)
        found.append(training(learner, example.problem.batch))
    for one, other in ((0, 1), (1, 2)):
        if text := difference(found[one], found[other], exact=True):
            raise BreachError(
                f"{text}, of two learners that differ in what they were evaluated on before: "
                f"{advice}"
            )


def _evaluated(learner: MetaLearner, example: Example, split: str, advice: str) -> None:
    """Evaluate, and hold against it what it may not change."""
    plugin, batch = learner.chain.plugins[0], example.problem.batch
    drawn, state, own = _random_states(), frozen(_state(learner), 8), fingerprint(plugin)
    learner.evaluate(stream(example, split), num_tasks=2)
    learner.adapt(batch.support_x[0], batch.support_y[0])
    for name, now in _random_states().items():
        if not np.array_equal(now, drawn[name]):
            raise BreachError(
                f"an evaluation moves the random numbers of {name}, which are the caller's: "
                "draw none, or from a generator of your own"
            )
    if changed := [path for path, value in fingerprint(plugin).items() if own.get(path) != value]:
        raise BreachError(f"an evaluation changes {changed[0]}: {advice}")
    if frozen(_state(learner), 8) != state:
        raise BreachError(f"an evaluation changes the learner's state: {advice}")


@clause_on(
    "checkpoint",
    "what it remembers is in a checkpoint: a learner that is loaded goes on as the one that was "
    "saved, bit for bit",
    cost=2,
)
def checkpoint(subject: Subject, example: Example) -> None:
    """A plain tensor attribute is in no state_dict."""
    learner, batch = subject.learner(Example(example.problem)), example.problem.batch
    fit(learner, example, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learner.safetensors"
        learner.save(path)
        model = copy.deepcopy(example.problem.model)
        loaded = MetaLearner.load(path, model=model, plugins=[subject.make()])
    for when, found, iterations in (
        ("at evaluation", evaluation, 0),
        ("in the next iteration", training, 0),
        ("an iteration later", training, 1),
    ):
        for each in (learner, loaded):
            fit(each, example, iterations)
        if text := difference(found(loaded, batch), found(learner, batch), exact=True):
            raise BreachError(
                f"{text} {when}, of the learner that was loaded and the one that was saved: "
                "register what must last with register_buffer or as an nn.Parameter, in setup"
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
