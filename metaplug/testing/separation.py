"""Clauses on tasks: their order means nothing, and none sees another but where that is declared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from metaplug.contract.chain import Link
from metaplug.contract.task_batch import TaskBatch
from metaplug.learner import MetaLearner
from metaplug.testing.clauses import BreachError, Example, Subject, clause_on
from metaplug.testing.comparing import SAME_SUMS, Findings, difference, evaluation, training
from metaplug.testing.problems import problem


@clause_on(
    "task-permutation",
    "the order of the tasks means nothing: permuted tasks give permuted results",
    tasks=(2, 4),
)
def task_permutation(subject: Subject, example: Example) -> None:
    """Tasks are a set."""
    batch, order = example.problem.batch, list(reversed(range(example.problem.batch.num_tasks)))
    learner = subject.learner(example)
    if text := difference(
        _training(learner, _rows(batch, order)), _training(learner, batch).rows(order)
    ):
        raise BreachError(
            f"{text}, of the tasks in reverse order and the same put in reverse order afterwards, so that a task's place decides: "
            "treat all rows of axis 0 alike"
        )


@clause_on(
    "tasks-apart",
    "in training no task depends on another of its batch, unless the plugin declares couples_tasks",
    tasks=(2, 4),
)
def tasks_apart(subject: Subject, example: Example) -> None:
    """What depends on the declaration: chunks, many devices, and readers."""
    learner, batch = subject.learner(example), example.problem.batch
    if learner.chain.plugins[0].couples_tasks:
        return
    text = difference(
        _training(learner, batch), _training(learner, _others_replaced(example)), only=[0]
    )
    mend = "declare couples_tasks = True and take step.task_mean, or reduce no axis 0"
    if text:
        raise BreachError(
            f"{text}, when the other tasks of the batch are replaced, and the plugin does not say that it couples tasks: {mend}"
        )
    if "compute_meta_gradients" in subject.hooks:
        pieces = subject.learner(example, chunk_size=1)
        ours, theirs = (Findings({}, each.meta_gradients(batch)) for each in (pieces, learner))
        if text := difference(ours, theirs):
            raise BreachError(
                f"the meta-gradient {text}, taken task by task and of all tasks at once: {mend}"
            )


@clause_on(
    "test-tasks-apart",
    "at evaluation no task depends on another, unless the plugin says that it is transductive",
    tasks=(2, 4),
)
def apart_at_evaluation(subject: Subject, example: Example) -> None:
    """Results are those of tasks that come alone."""
    learner, batch = subject.learner(example), example.problem.batch
    if learner.chain.plugins[0].transductive:
        return
    together = evaluation(learner, batch)
    mend = "use what was stored in training where step.training is False, and draw no random numbers there"
    if text := difference(together, evaluation(learner, _others_replaced(example)), only=[0]):
        raise BreachError(
            f"{text} at evaluation, when the other test tasks are replaced, which must not see each other: {mend}"
        )
    for task in range(batch.num_tasks):
        if text := difference(evaluation(learner, _rows(batch, [task])), together.rows([task])):
            raise BreachError(
                f"{text} at evaluation, of task {task} alone and among others, which must not see each other: {mend}"
            )


@clause_on(
    "vectorized-equals-sequential",
    "tasks in one call and one after the other give the same numbers",
)
def vectorized_equals_sequential(subject: Subject, example: Example) -> None:
    """Batching is a choice of speed."""
    vectorized, sequential = (
        subject.learner(example, task_batching=batching)
        for batching in ("vectorized", "sequential")
    )
    for found in (training, evaluation):
        if text := difference(
            found(vectorized, example.problem.batch),
            found(sequential, example.problem.batch),
            tolerance=SAME_SUMS,
        ):
            raise BreachError(
                f"{text}, vectorised and sequential, where values are equal but laid out otherwise in memory: "
                "depend on values and shapes, not on strides (as randn_like does: draw torch.randn(x.shape))"
            )


def _training(learner: MetaLearner, batch: TaskBatch) -> Findings:
    """What a meta-iteration finds, with the tasks' outer losses as its own plugins leave them."""
    seen: dict[str, torch.Tensor] = {}

    def around(link: Link) -> Link:
        def call(*values: Any) -> Any:
            result = link.function(*values)
            if isinstance(result, torch.Tensor):
                seen["the outer loss"] = result.detach()
            return result

        return replace(link, function=call) if link.hook == "transform_outer_losses" else link

    usual = {link.plugin: link for link in learner.chain.links("transform_outer_losses")}
    learner.chain.wrap(around)
    found = training(learner, batch)
    learner.chain.wrap(
        lambda link: usual[link.plugin] if link.hook == "transform_outer_losses" else link
    )
    return Findings({**found.by_task, **seen}, found.whole)


def _rows(batch: TaskBatch, rows: list[int]) -> TaskBatch:
    return TaskBatch(
        batch.support_x[rows], batch.support_y[rows], batch.query_x[rows], batch.query_y[rows]
    )


def _others_replaced(example: Example) -> TaskBatch:
    """The batch with all tasks but the first replaced by others."""
    case = example.problem
    support, query = case.batch.support_x.shape[1], case.batch.query_x.shape[1]
    others = problem(
        case.name,
        tasks=case.batch.num_tasks - 1,
        support=support,
        query=query,
        seed=case.seed + 1000,
    ).batch
    return TaskBatch.stack([_rows(case.batch, [0]), others])
