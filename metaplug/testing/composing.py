"""Clauses on a plugin among others, and on what it does: on, off, and in longer inner loops."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping

import torch

from metaplug.contract.hookspecs import KINDS
from metaplug.contract.plugin import Plugin
from metaplug.contract.plugin_checks import implementations
from metaplug.errors import MetaplugError, RequestError, quoted
from metaplug.testing.clauses import BreachError, Example, Subject, clause, clause_on, fit, in_words
from metaplug.testing.comparing import difference, evaluation, training
from metaplug.testing.first_party import FIRST_PARTY
from metaplug.testing.problems import WITH_BATCH_NORM
from metaplug.testing.strategies import compatible


@clause_on("more-steps", "tasks can be adapted for more inner steps than were trained")
def more_steps(subject: Subject, example: Example) -> None:
    """A user decides how long to adapt."""
    learner, steps, batch = (
        subject.learner(example),
        example.problem.steps + 3,
        example.problem.batch,
    )
    when = f"adapting for {steps} inner steps after training with {example.problem.steps}"
    try:
        found = evaluation(learner, batch, steps=steps)
        learner.adapt(batch.support_x[0], batch.support_y[0], inner_steps=steps)
    except Exception as error:
        raise BreachError(
            f"{in_words(error)}, {when}: take the place of a per-step value from step.slot, which "
            "stays in range, not from step.index"
        ) from error
    if wrong := found.non_finite():
        raise BreachError(f"{wrong}, {when}")


@clause(
    "no-inner-steps",
    "in a loop of no steps it trains and is evaluated, or refuses with a RequestError",
)
def no_inner_steps(subject: Subject) -> None:
    """Starts and outer losses need no inner step."""
    example = subject.example(tasks=2)
    example.problem.steps = 0
    try:
        learner = subject.learner(example)
        found = [run(learner, example.problem.batch) for run in (training, evaluation)]
    except RequestError:
        return
    except Exception as error:
        raise BreachError(
            f"{in_words(error)}, with inner_steps = 0: use nothing of an inner step where there is "
            "none (outcome.support_losses is then empty), or take per-step values from step.slot, "
            "which refuses"
        ) from error
    if wrong := found[0].non_finite() or found[1].non_finite():
        raise BreachError(f"{wrong}, with inner_steps = 0: divide by no number of steps")


@clause_on("off-is-baseline", "with its off settings everything is as without it, bit for bit")
def off_is_baseline(subject: Subject, example: Example) -> None:
    """A comparison needs a baseline."""
    if subject.off is None:
        return
    off, batch = subject.learner(example, subject.off), example.problem.batch
    without = example.problem.learner(task_batching="vectorized")
    fit(without, example, example.done)
    settings = ", ".join(f"{name} = {value!r}" for name, value in subject.off.items())
    for _ in range(2):
        for when, found in (("in training", training), ("at evaluation", evaluation)):
            ours, theirs = found(off, batch), found(without, batch)
            if text := difference(ours.known_to(theirs), theirs, exact=True):
                raise BreachError(
                    f"{text} {when}, with the plugin off ({settings}) and without it: return None "
                    "where there is nothing to do, as even a product with 1 or a sum with 0 can "
                    "round"
                )
        for learner in (off, without):
            fit(learner, example, 1)


@clause(
    "does-something",
    "with its settings something is other than without it, so that the other clauses say something",
)
def does_something(subject: Subject) -> None:
    """A suite that holds nothing would pass."""
    if not set(subject.hooks) - {"setup", "commit", "end_meta_step"}:
        return  # it only watches
    example = subject.example(steps=3)
    learners = [subject.learner(example), example.problem.learner(task_batching="vectorized")]
    for learner in learners:
        fit(learner, example, 3)
    ours, theirs = (evaluation(learner, example.problem.batch) for learner in learners)
    if not difference(ours.known_to(theirs), theirs, exact=True):
        raise BreachError(
            f"with settings = {dict(subject.settings)} weights and predictions are the same as "
            "without it, after 3 iterations: give settings under which it does something, or mark "
            "its hooks @hookimpl"
        )


@clause(
    "composes",
    "it goes together with every first-party plugin in both orders, or says that it does not",
)
def composes(subject: Subject) -> None:
    """Every part of a chain is somebody's."""
    with_batch_norm = tuple(name for name in subject.models if name in WITH_BATCH_NORM)
    example = subject.example(names=with_batch_norm or subject.models, tasks=2)
    case, model = example.problem, copy.deepcopy(example.problem.model)
    before = training(case.learner(), case.batch)
    faults: dict[str, list[str]] = {}
    for name, settings in FIRST_PARTY.items():
        other = Subject(name, settings)
        if subject.make().kind() == name or not _fits(other, example):
            continue
        for chain, where in (
            ([subject.make(), other.make()], "before"),
            ([other.make(), subject.make()], "after"),
        ):
            if fault := _fault_of(chain, example):
                faults.setdefault(name, []).append(f"{where} {name}{fault}")
    if faults:
        raise BreachError(declaring(faults))
    pairs = zip(model.parameters(), case.model.parameters(), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise BreachError(
            "a learner's plugins changed a model that is not theirs: write into no parameter"
        )
    if text := difference(training(case.learner(), case.batch), before, exact=True):
        raise BreachError(
            f"{text}, of a learner without plugins before and after others were made: "
            "keep no state outside the plugin"
        )


def _fits(other: Subject, example: Example) -> bool:
    """Whether the other plugin alone takes this model."""
    try:
        other.learner(example)
    except RequestError:
        return False
    return True


def _answer_one_question(plugins: list[Plugin]) -> bool:
    """Whether two implement a hook that one may answer: who is second is refused, by name."""
    asked = [
        {hook for hook in implementations(type(each)) if KINDS[hook] == "choose"}
        for each in plugins
    ]
    return any(one & other for one, other in itertools.combinations(asked, 2))


def declaring(faults: Mapping[str, list[str]]) -> str:
    """Write the first fault, the other partners, and the lines that declare them all."""
    # Where it goes after the other, that order is all that is to be declared.
    after = [name for name, each in faults.items() if each[0].startswith("before") and not each[1:]]
    never = [name for name in faults if name not in after]
    first, *others = faults
    also = f"; nor does it go with {quoted(others)}" if others else ""
    lines = [
        f"{attribute} = ({', '.join(map(json.dumps, names))}{',' * (len(names) == 1)})"
        for attribute, names in (("conflicts_with", never), ("runs_after", after))
        if names
    ]
    return f"{faults[first][0]}{also}: fix it, or declare {' and '.join(lines)}"


def _fault_of(plugins: list[Plugin], example: Example) -> str | None:
    """Say how two plugins fail together, in words after the other's name; None if they do not."""
    batch = example.problem.batch
    allowed = compatible(plugins)
    try:
        learner = example.problem.learner(plugins=plugins, task_batching="vectorized")
        ours, tests = training(learner, batch), evaluation(learner, batch)
        learner.engine.meta_step(batch, 1)
    except MetaplugError as error:
        # The first of two that answer one question may also have used up what the second needs.
        if _answer_one_question(plugins) or (not allowed and isinstance(error, RequestError)):
            return None
        return f": {error}"
    if wrong := ours.non_finite() or tests.non_finite():
        return f" {wrong}: bound what you divide by"
    for name in learner.chain.named_parameters():
        if f"the meta-gradient of '{name}'" not in ours.whole:
            return f" no meta-gradient reaches {name}, which would never learn"
    return None
