"""Clauses on tasks: their order means nothing, and none sees another but where declared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from metaplug.contract.link import Link
from metaplug.contract.task_batch import TaskBatch
from metaplug.learner import MetaLearner
from metaplug.testing.clauses import BreachError, Example, Subject, clause_on
from metaplug.testing.comparing import (
    SAME_SUMS,
    Findings,
    derived,
    difference,
    evaluation,
    found,
    training,
)
from metaplug.testing.problems import problem


@clause_on(
    "task-permutation",
    "the order of the tasks means nothing: permuted tasks give permuted results",
    tasks=(2, 4),
)
def task_permutation(subject: Subject, example: Example) -> None:
    """Tasks are a set."""
    learner, batch = subject.learner(example, moved=True), example.problem.batch
    order = list(reversed(range(batch.num_tasks)))
    permuted = _training(learner, _rows(batch, order))
    if text := difference(permuted, _training(learner, batch).rows(order)):
        raise BreachError(
            f"{text}, of the tasks in reverse order and the same put in reverse order afterwards, "
            "so that a task's place decides: treat all rows of axis 0 alike"
        )


@clause_on(
    "tasks-apart",
    "in training no task depends on another of its batch, unless the plugin declares couples_tasks",
    tasks=(2, 4),
)
def tasks_apart(subject: Subject, example: Example) -> None:
    """What depends on the declaration: chunks, many devices, and readers."""
    learner, batch = subject.learner(example, moved=True), example.problem.batch
    if learner.chain.plugins[0].couples_tasks:
        return
    advice = "declare couples_tasks = True and take step.task_mean, or reduce no axis 0"
    ours, theirs = _training(learner, batch), _training(learner, _others_replaced(example))
    if text := difference(ours, theirs, only=[0]):
        raise BreachError(
            f"{text}, when the other tasks of the batch are replaced, and the plugin does not say "
            f"that it couples tasks: {advice}"
        )
    if not {"compute_meta_gradients", "commit"} & set(subject.hooks):
        return  # noise for every task may be drawn otherwise, task by task
    pieces = subject.learner(example, moved=True, chunk_size=1)
    ours, theirs = (derived(found(each, batch)) for each in (pieces, learner))
    if text := difference(ours, theirs):
        if "statistic" in text:
            advice = "keep a mean over tasks, which is the mean of its parts, no sum and no count"
        raise BreachError(f"{text}, taken task by task and of all tasks at once: {advice}")


@clause_on(
    "test-tasks-apart",
    "at evaluation no task depends on another, unless the plugin says that it is transductive",
    tasks=(2, 4),
)
def apart_at_evaluation(subject: Subject, example: Example) -> None:
    """Results are those of tasks that come alone."""
    learner, batch = subject.learner(example, moved=True), example.problem.batch
    if learner.chain.plugins[0].transductive:
        return
    together = evaluation(learner, batch)
    cases = [
        (
            evaluation(learner, _rows(batch, [task])),
            [task],
            f"of task {task} alone and among others",
        )
        for task in range(batch.num_tasks)
    ]
    others = evaluation(learner, _others_replaced(example)).rows([0])
    for alone, rows, how in [(others, [0], "when the other test tasks are replaced"), *cases]:
        if text := difference(alone, together.rows(rows)):
            raise BreachError(
                f"{text} at evaluation, {how}, which must not see each other: use what was stored "
                "in training where step.training is False, and draw no random numbers there"
            )


@clause_on(
    "vectorized-equals-sequential",
    "tasks in one call and one after the other give the same numbers",
)
def vectorized_equals_sequential(subject: Subject, example: Example) -> None:
    """Batching is a choice of speed."""
    learners = [
        subject.learner(example, moved=True, task_batching=batching)
        for batching in ("vectorized", "sequential")
    ]
    for looked in (training, evaluation):
        findings = [looked(learner, example.problem.batch) for learner in learners]
        if text := difference(*findings, tolerance=SAME_SUMS):
            raise BreachError(
                f"{text}, vectorised and sequential, where values are equal but laid out otherwise "
                "in memory: depend on values and shapes, not on strides (as randn_like does: draw "
                "torch.randn(x.shape))"
            )


def _training(learner: MetaLearner, batch: TaskBatch) -> Findings:
    """Find what a meta-iteration computes, with each task's outer loss as its plugins give it."""
    seen: dict[str, torch.Tensor] = {}

    def around(link: Link) -> Link:
        def call(*values: Any) -> Any:
            result = link.function(*values)
            if isinstance(result, torch.Tensor):
                seen["the outer loss"] = result.detach()
            return result

        return replace(link, function=call) if link.hook == "transform_outer_losses" else link

    usual = {
        (link.plugin, link.hook): link for link in learner.chain.links("transform_outer_losses")
    }
    learner.chain.wrap(around)
    taken = training(learner, batch)
    learner.chain.wrap(lambda link: usual.get((link.plugin, link.hook), link))
    return Findings({**taken.by_task, **seen}, taken.whole)


def _rows(batch: TaskBatch, rows: list[int]) -> TaskBatch:
    return batch.map(lambda tensor: tensor[rows])


def _others_replaced(example: Example) -> TaskBatch:
    """The batch with all tasks but the first replaced by others."""
    case, batch = example.problem, example.problem.batch
    others = problem(
        case.name,
        tasks=batch.num_tasks - 1,
        support=batch.support_x.shape[1],
        query=batch.query_x.shape[1],
        seed=case.seed + 1000,
    )
    return TaskBatch.stack([_rows(batch, [0]), others.batch])
