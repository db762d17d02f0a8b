"""Clauses on what a plugin reads of tasks: neither query labels nor padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError
from metaplug.learner import MetaLearner
from metaplug.testing.clauses import BreachError, Example, Subject, clause, clause_on
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
    if (learner := subject.learner_if_made(Example(example.problem))) is None:
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
    except (MetaplugError, RuntimeError, TypeError, ValueError, LookupError) as error:
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
    small, large = (subject.example(tasks=1, support=n, query=4, seed=n) for n in (3, 5))
    learner = subject.learner(small)
    if learner.chain.plugins[0].transductive:
        return
    ways = CLASSES if small.problem.kind == "classification" else None
    batches = [each.problem.batch for each in (small, large)]
    alone = evaluation(learner, TaskBatch.from_tasks(batches[:1], ways=[ways]))
    together = evaluation(learner, TaskBatch.from_tasks(batches, ways=[ways, ways]))
    if text := difference(alone, together.rows([0])):
        raise BreachError(
            f"{text} at evaluation, alone and beside a task of more support examples: count no "
            "target of -100, and compute from predictions by step.by_task, which leaves out "
            "padding"
        )
