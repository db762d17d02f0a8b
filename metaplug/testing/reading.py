"""Clauses on what a plugin reads of tasks: neither query labels nor padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.learner import MetaLearner
from metaplug.testing.clauses import FAULTS, BreachError, Example, Subject, clause, clause_on
from metaplug.testing.comparing import Findings, difference, evaluation, training
from metaplug.testing.problems import CLASSES, problem

_UNDECLARED = "reads the query examples in the inner loop"
"""What the engine says of a plugin that asks for them undeclared."""


@clause_on(
    "query-unseen",
    "no start, inner loss or update depends on query labels, nor on query inputs unless the plugin "
    "says that it is transductive",
    cost=2,
)
def query_unseen(subject: Subject, example: Example) -> None:
    """Query examples measure what was learned from the support set."""
    if (learner := subject.learner_if_made(Example(example.problem), moved=True)) is None:
        return
    batch, other = example.problem.batch, _others(example)
    changes = [("labels", replace(batch, query_y=other.query_y))]
    if not learner.chain.plugins[0].transductive:
        changes.append(("inputs", replace(batch, query_x=other.query_x)))
    # What makes tasks anew sees all of them, in training.
    trained = () if "transform_tasks" in subject.hooks else (("in training", training),)
    for when, run in (*trained, ("at evaluation", evaluation)):
        ours, again = (_inner(run, learner, batch) for _ in range(2))
        if ours is None or again is None or difference(ours, again, exact=True):
            return  # which other clauses say
        for what, changed in changes:
            if (theirs := _inner(run, learner, changed)) is None:
                return
            if text := difference(ours, theirs):
                raise BreachError(
                    f"{text} {when}, when only query {what} are replaced, so tasks are adapted to "
                    "what they are measured by: read the support set alone, or query inputs by "
                    'step.forward(parameters, "query") in a plugin that is transductive'
                )


def _inner(
    run: Callable[[MetaLearner, TaskBatch], Findings], learner: MetaLearner, batch: TaskBatch
) -> Findings | None:
    """Find what the inner loop alone makes of tasks; None where it fails."""
    try:
        found = run(learner, batch)
    except FAULTS as error:
        if _UNDECLARED in str(error):
            raise
        return None
    inner = {name: each for name, each in found.by_task.items() if "the query" not in name}
    return Findings(inner, {})


def _others(example: Example) -> TaskBatch:
    """Other tasks of the same form, of which no label is that of the example."""
    case, batch = example.problem, example.problem.batch
    counts = {"support": batch.support_x.shape[1], "query": batch.query_x.shape[1]}
    other = problem(case.name, tasks=batch.num_tasks, seed=case.seed + 1000, **counts).batch
    labels: Tensor = batch.query_y
    changed = labels + 1 if labels.is_floating_point() else (labels + 1) % CLASSES
    return replace(other, query_y=changed)


@clause(
    "unequal-sizes",
    "a task beside larger ones is adapted as alone: what fills it up counts for nothing",
)
def unequal_sizes(subject: Subject) -> None:
    """Targets and predictions of tasks of unequal size are padded."""
    small, alike, large = (
        subject.example(tasks=1, support=n, query=n + 1, seed=n + beside)
        for n, beside in ((3, 0), (3, 1), (5, 0))
    )
    learner = subject.learner(small, moved=True)
    ways = CLASSES if small.problem.kind == "classification" else None

    def joined(*examples: Example) -> TaskBatch:
        batches = [each.problem.batch for each in examples]
        return TaskBatch.from_tasks(batches, ways=[ways] * len(batches))

    advice = (
        "count no target of -100, and compute from predictions by by_task, which leaves out padding"
    )
    alone, beside_alike, beside_large = (
        _first_task(learner, joined(small, *others), small) for others in ((), (alike,), (large,))
    )
    # Where tasks of one size see each other as well, size is not what decides.
    if not difference(alone, beside_alike) and (text := difference(alone, beside_large)):
        raise BreachError(
            f"{text} at evaluation, alone and beside a task of more examples: {advice}"
        )
    coupled = learner.chain.plugins[0].couples_tasks  # by values, perhaps, that are large alone
    if coupled or _unlike_mean(learner, joined, small, alike):
        return
    text = _unlike_mean(learner, joined, small, large)
    # What makes tasks anew runs here as well, but may draw other numbers for another size.
    if text and "transform_tasks" not in subject.hooks:
        raise BreachError(
            f"{text}, of two tasks of unequal size together and as the mean of each alone, "
            f"though of equal ones they are the same: {advice}"
        )


def _first_task(learner: MetaLearner, batch: TaskBatch, first: Example) -> Findings:
    """Find how the first task is adapted at evaluation, without the rows that fill it up."""
    found = evaluation(learner, batch).rows([0]).by_task
    count = first.problem.batch.query_y.shape[1]
    predictions = found["the query prediction"][:, :count]
    return Findings({**found, "the query prediction": predictions}, {})


def _unlike_mean(
    learner: MetaLearner, joined: Callable[..., TaskBatch], *examples: Example
) -> str | None:
    """Describe where the outer loss or a meta-gradient is not the mean of the tasks'."""
    whole, *alone = (
        training(learner, joined(*each)).without("the statistic").whole
        for each in (examples, *((one,) for one in examples))
    )
    if any(each.keys() != whole.keys() for each in alone):
        return None
    mean = {name: torch.stack([each[name] for each in alone]).mean(0) for name in whole}
    return difference(Findings({}, whole), Findings({}, mean))
