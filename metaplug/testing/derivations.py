"""Clauses on meta-gradients: the derivative of the outer loss, however they are derived."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaplug.contract.link import Link
from metaplug.contract.outcome import Outcome
from metaplug.contract.schedule import iteration_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError, quoted
from metaplug.execution.traced import CompiledDerivation
from metaplug.learner import MetaLearner
from metaplug.testing.clauses import BreachError, Example, Subject, clause, clause_on, fit
from metaplug.testing.comparing import SAME_SUMS, derived, difference, found, training

STEP, ACCURACY = 1e-5, 1e-5
"""Of central differences in float64: the step, and the error allowed relative to the gradient."""

GRADIENTS = "the meta-gradient"
"""How findings of meta-gradients begin."""


@clause(
    "complete-meta-gradients",
    "where it replaces differentiation, every meta-parameter has a gradient; where it asks for "
    "order 0, it replaces it",
)
def complete_meta_gradients(subject: Subject) -> None:
    """A parameter without a gradient stays as it was made, in silence."""
    if not {"compute_meta_gradients", "derivative_order"} & set(subject.hooks):
        return
    example = subject.example(steps=2, tasks=2)
    if (learner := subject.learner_if_made(example)) is None:
        return
    try:
        gradients = found(learner, example.problem.batch).gradients
    except MetaplugError as error:
        if "derivative order 0 leaves no way" in str(error):
            raise
        return  # which other clauses say
    missing = [name for name in learner.engine.meta_parameters if name not in gradients]
    if missing and "compute_meta_gradients" in subject.hooks:
        raise BreachError(
            f"its answer has no gradient of {quoted(missing[:3])}, which would then never learn: "
            "answer all names of meta_parameters, with zeros for what shall stay"
        )


@clause(
    "task-parameters-adapt",
    "every task parameter that it names reaches the model: the inner loop moves it",
)
def task_parameters_adapt(subject: Subject) -> None:
    """One that reaches nothing is adapted by nothing, in silence."""
    if "task_parameters" not in subject.hooks:
        return
    idle: set[str] | None = None
    for seed in range(2):
        example = subject.example(steps=3, seed=seed)
        learner = subject.learner(example)
        outcome = learner.engine.evaluate(learner.prepare_batch(example.problem.batch), 3)
        starts, ends = outcome.initial_parameters, outcome.adapted_parameters
        own = learner.engine.inner.variables
        still = {name for name in own if torch.equal(starts[name], ends[name])}
        idle = still if idle is None else idle & still
    if idle:
        raise BreachError(
            f"no inner gradient reaches its task parameter {quoted(sorted(idle)[:3])}, which stays "
            "as it starts: use it in transform_parameters, by its name PLUGIN.NAME, or a factor on "
            "its way is zero as well: let one of the two start away from zero"
        )


@clause_on(
    "first-order",
    "with derivatives of first order it runs, and the values on the way are those of second order",
)
def first_order(subject: Subject, example: Example) -> None:
    """Inner gradients are constants then, without a graph."""
    learner, batch = subject.learner(example, moved=True), example.problem.batch
    figures = _watch_derivation(learner)
    second = training(learner, batch, order=2)
    second = second.without(GRADIENTS, *figures)
    none = {"derivative_order", "compute_meta_gradients"} <= set(subject.hooks)
    for order, words in ((1, "first"), *([(0, "no")] if none else [])):
        lower = training(learner, batch, order=order)
        if wrong := lower.non_finite():
            raise BreachError(f"{wrong} in {words} order")
        if text := difference(lower.without(GRADIENTS, *figures), second):
            raise BreachError(
                f"{text}, in {words} and in second order, though only derivatives may differ: "
                "let no value depend on requires_grad"
            )


def _watch_derivation(learner: MetaLearner) -> set[str]:
    """Return a set that gets the statistics, in words, which compute_meta_gradients keeps.

    They may be of the derivatives themselves, which differ from order to order.
    """
    figures: set[str] = set()

    def around(link: Link) -> Link:
        def call(*values: Any) -> Any:
            # A plugin that does not take the outcome has nothing to keep a statistic by.
            given = next((value for value in values if isinstance(value, Outcome)), None)
            if given is None:
                return link.function(*values)
            own = link.plugin.name
            before = dict(given.statistics.get(own, {}))
            answer = link.function(*values)
            for name, value in given.statistics.get(own, {}).items():
                if value is not before.get(name):
                    figures.add(f"the statistic '{name}' of {own}")
            return answer

        return replace(link, function=call) if link.hook == "compute_meta_gradients" else link

    learner.chain.wrap(around)
    return figures


@clause_on(
    "recomputed",
    "steps that are taken again in the backward pass (checkpoint_steps) give the same numbers",
    steps=(2, 3),
)
def recomputed(subject: Subject, example: Example) -> None:
    """The first time no graph is kept, and the second time no statistics."""
    plain, batch = subject.learner(example, moved=True), example.problem.batch
    advice = (
        "let a hook depend on its arguments alone, not on how often it was called nor on "
        "step.statistics"
    )
    for kept, order in ((1, None), (example.problem.steps, 1)):
        again = subject.learner(example, moved=True, checkpoint_steps=kept)
        try:
            ours = training(again, batch, order=order)
        except MetaplugError as error:
            raise BreachError(f"with checkpoint_steps={kept}: {error}: {advice}") from error
        if text := difference(ours, training(plain, batch, order=order), tolerance=SAME_SUMS):
            raise BreachError(f"{text}, with checkpoint_steps={kept} and without: {advice}")


@clause(
    "traced-equals-eager",
    "a compiled step gives the eager numbers in three iterations in a row, or it is refused by the "
    "plugin's name",
)
def traced_equals_eager(subject: Subject) -> None:
    """A trace is right only for what it saw: it freezes what Python decided."""
    example = subject.example(steps=2, tasks=2)
    eager, ours = (subject.learner(example, moved=True) for _ in range(2))
    trace = ours.engine.derivation = CompiledDerivation(ours.engine, lambda graph, _: graph)
    advice = (
        "keep what changes between iterations in buffers, and decide on it by torch.where, not by "
        "a Python branch or index"
    )
    for iteration in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a refusal, which is looked at here
            taken = [found(learner, example.problem.batch) for learner in (ours, eager)]
            if trace.refusal is not None and f"'{subject.name}'" not in trace.refusal:
                raise BreachError(
                    f"the compiled step is refused without its name ({trace.refusal}): {advice}"
                )
            if text := difference(*map(derived, taken), tolerance=SAME_SUMS):
                raise BreachError(
                    f"{text} in {iteration_text(iteration)} of a compiled step and of an eager "
                    f"one: {advice}"
                )
            for learner in (ours, eager):
                learner.engine.meta_step(example.problem.batch, 3)


@clause(
    "meta-parameters-learn",
    "every one of its meta-parameters receives a gradient that is not zero, and of those with a "
    "slot for each inner step, every slot",
)
def meta_parameters_learn(subject: Subject) -> None:
    """One that receives none stays as it was made, in silence."""
    idle: set[str] = set()
    for seed in range(3):
        example = subject.example(steps=3, seed=seed)
        learner = subject.learner(example)
        fit(learner, example, 2)
        gradients, own = learner.meta_gradients(example.problem.batch), {}
        for name, parameter in learner.chain.named_parameters().items():
            own[name] = gradients.get(name, torch.zeros_like(parameter))
        if seed == 0:
            longer = subject.learner(subject.example(steps=4)).chain.named_parameters()
        zero = {name for name, gradient in own.items() if not gradient.any()}
        # By the length of a longer loop, since a layer may happen to be as wide as K.
        zero |= {
            f"{name}[{slot}]"
            for name, gradient in own.items()
            if name not in zero and _grows(gradient, longer[name])
            for slot, row in enumerate(gradient)
            if not row.any()
        }
        idle = zero if seed == 0 else idle & zero
        if not idle:
            return
    if not (whole := sorted(name for name in idle if not name.endswith("]"))):
        raise BreachError(
            f"{sorted(idle)[0]} never receives a gradient in a loop of 3 inner steps: a part that "
            "is zero in a step needs no slot there, as a pull to the start in step 0; index by "
            "step.slot, and make no slot that is not used"
        )
    raise BreachError(
        f"no meta-gradient reaches its meta-parameter {quoted(whole[:3])}, which would then "
        "never learn: use it without .detach(), .data, .item() or torch.no_grad(), or make it a "
        "buffer"
    )


def _grows(short: Tensor, longer: Tensor) -> bool:
    """Whether a meta-parameter has one entry more along axis 0 for one inner step more."""
    return short.dim() > 0 and len(longer) == len(short) + 1


@clause_on(
    "meta-gradients",
    "meta-gradients are the derivative of the outer loss, its own meta-parameters included",
    smooth=True,
    tasks=(1, 3),
)
def meta_gradients(subject: Subject, example: Example) -> None:
    """Central differences along a random direction of each meta-parameter, as in gradcheck."""
    if "compute_meta_gradients" in subject.hooks:
        return
    learner, batch = subject.learner(example, moved=True), example.problem.batch
    whole, generator = training(learner, batch, order=2).whole, torch.Generator().manual_seed(0)
    for name, parameter in learner.engine.meta_parameters.items():
        gradient = whole.get(f"{GRADIENTS} of '{name}'", torch.zeros_like(parameter))
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        direction = direction / direction.norm()
        analytic = float((gradient * direction).sum())
        numeric = _slope(learner, batch, parameter, direction)
        if abs(analytic - numeric) > ACCURACY * max(float(gradient.norm()), 1.0):
            raise BreachError(
                f"along a random direction of '{name}' the outer loss rises by {numeric:.6g}, but "
                f"the meta-gradient says {analytic:.6g}: use no .detach(), .data, .item() or "
                "torch.no_grad() on the way from a meta-parameter or weight to what a hook returns"
            )


def _slope(learner: MetaLearner, batch: TaskBatch, parameter: Tensor, direction: Tensor) -> float:
    """dL/dε at 0 of the outer loss L with ε · direction added, by central differences."""
    start, losses = parameter.detach().clone(), []
    for sign in (1, -1, 0):
        with torch.no_grad():
            parameter.copy_(start + sign * STEP * direction)
        if sign:
            losses.append(float(training(learner, batch, order=1).whole["the outer loss"]))
    return (losses[0] - losses[1]) / (2 * STEP)
