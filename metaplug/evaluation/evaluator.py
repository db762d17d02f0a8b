"""Evaluation of an engine: results on test tasks, and validations during meta-training."""

from __future__ import annotations

import warnings

from torch import nn

from metaplug.checks.prepare_batch import PrepareBatch
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Kind
from metaplug.core.functional_model import clone, give_parameters, set_mode
from metaplug.core.parametrized import cache_apart
from metaplug.errors import RequestError, quoted
from metaplug.evaluation.measure import measure
from metaplug.evaluation.results import EvaluationResult
from metaplug.evaluation.score_tasks import Scorer
from metaplug.evaluation.scores import ScoreLike, as_score
from metaplug.execution.engine import FAILURES, Engine
from metaplug.execution.memory import chunk_of
from metaplug.tasks.episodes import TaskStream
from metaplug.tasks.identities import TrainedOn

VALIDATE_UNSEEN = "give validation tasks of other classes, such as tasks.val"
MEASURE_UNSEEN = (
    "evaluate tasks.test, or give allow_training_classes=True "
    "(--allow-training-classes) to measure training on purpose"
)
"""What to do where tasks are of classes that were trained on."""


class Evaluator:
    """Adapts an engine to tasks that do not see each other, and scores them. Changes no state.

    Args:
        model: that the engine runs.
        kind: of the tasks.
        score: of predictions, where an evaluation asks for no other.
        seed: of bootstrap intervals.

    Attributes:
        trained_on: the classes of every stream that was trained on, as far as the streams say.
    """

    def __init__(
        self,
        engine: Engine,
        prepare_batch: PrepareBatch,
        model: nn.Module,
        kind: Kind,
        score: ScoreLike | None,
        *,
        seed: int,
    ) -> None:
        self.engine, self.prepare_batch, self.kind, self.seed = engine, prepare_batch, kind, seed
        self.score = as_score(score, kind)
        self.trained_on = TrainedOn()
        self._model = model
        self._warned: set[str] = set()

    @property
    def transductive(self) -> tuple[str, ...]:
        """What lets the examples of a test batch see each other, in words."""
        transductive = self.engine.chain.transductive
        reasons = [f"plugin {name} sees more than a task's support set" for name in transductive]
        norms = nn.modules.batchnorm._BatchNorm
        layers = [layer for layer in self._model.modules() if isinstance(layer, norms)]
        own = self.engine.inner.functional.batch_norm == "batch"
        if any(own or not layer.track_running_stats for layer in layers):
            reasons.append("batch norm uses the statistics of each task's own batch")
        return tuple(reasons)

    def refuse_trained_on(self, tasks: TaskStream, advice: str, trained_on: TrainedOn) -> None:
        """Refuse tasks of a class that was trained on.

        Raises:
            RequestError: names such classes; `advice` says what to do.
        """
        noun = "classes" if self.kind == "classification" else "groups of tasks"
        trained_on.refuse(tasks, noun, advice)

    def check_score(self, batch: TaskBatch) -> None:
        """Refuse a score that is not for the targets of a batch, by the predictions of one task.

        Changes no state.

        Args:
            batch: prepared already.

        Raises:
            RequestError: as `Scorer`.
        """
        scorer, steps = Scorer(self.score, self.kind, self.engine.outputs), self._steps(None)
        scorer.classes_last = self.engine.inner.classes_last
        try:
            outcome = self.engine.evaluate(batch.tasks(slice(0, 1)), steps)
        except FAILURES:  # what is not finite is said by the step that meets it
            return
        own = outcome.batch
        scorer(outcome.query_predictions, own.query_y, own.sizes)

    def evaluate(
        self,
        tasks: TaskStream,
        num_tasks: int,
        inner_steps: int | None = None,
        tasks_per_batch: int | None = None,
        score: ScoreLike | None = None,
        *,
        losses: bool = False,
        skip: bool = False,
        profiled: int = 0,
    ) -> tuple[EvaluationResult, str | None]:
        """Return a result, and the fault that made it NaN where that is to be skipped.

        Args:
            score: default: the evaluator's own.
            losses: measure support losses, too.
            skip: go on after a task whose query loss is NaN or Inf.
            profiled: profile the inner loop of this many tasks, of the first; with `losses` alone.

        Raises:
            RequestError: fewer than one task in a batch, or than no step; or a score that is not
                known, or not for such targets.
            RunError: as `measure`.
        """
        steps, size = self._steps(inner_steps), tasks_per_batch
        if size is None:
            size = min(16, chunk_of(self.engine) or 16)
        if size < 1:
            raise RequestError(f"tasks_per_batch = {size}: give at least 1")
        chosen = self.score if score is None else as_score(score, self.kind)
        batches = [range(at, min(at + size, num_tasks)) for at in range(0, num_tasks, size)]
        found = measure(
            self.engine,
            self.prepare_batch,
            tasks,
            batches,
            steps=steps,
            scorer=Scorer(chosen, self.kind),
            losses=losses,
            skip=skip,
            profiled=min(profiled, num_tasks),
        )
        about = (steps, self.transductive, self.trained_on.shared(tasks), self.seed)
        raised, support_losses = found.growth or (None, None)
        result = EvaluationResult(
            chosen.name,
            found.scores,
            *about,
            raised=raised,
            support_losses=support_losses,
            more_is_better=chosen.more_is_better,
            per_class=found.per_class,
            inner=found.inner,
        )
        return result, found.fault

    def validate(
        self, tasks: TaskStream, num_tasks: int, *, skip: bool, profiled: int = 0
    ) -> EvaluationResult:
        """Return the result on validation tasks, with the inner loop's profile of the first.

        A validation that counts for nothing is a warning; so is, once, adaptation that raises the
        support loss of most tasks.
        """
        engine = self.engine
        result, fault = self.evaluate(tasks, num_tasks, losses=True, skip=skip, profiled=profiled)
        raised, (before, after) = result.raised or 0, result.support_losses or (0.0, 0.0)
        if fault is not None:
            when = f"the validation after iteration {engine.iteration}"
            warnings.warn(f"{when} counts for nothing: {fault}", stacklevel=4)
        elif 2 * raised > num_tasks and "divergence" not in self._warned:
            self._warned.add("divergence")
            links = engine.chain.links("transform_learning_rates")
            changed = f", which plugin {quoted(link.plugin.name for link in links)} changes"
            warnings.warn(
                f"adaptation raises the support loss of {raised} of {num_tasks} validation tasks "
                f"(mean {before:.4g} to {after:.4g} over {result.inner_steps} inner steps, "
                f"inner_lr = {engine.inner.inner_lr:.4g}{changed if links else ''}): the inner "
                "loop diverges; lower inner_lr",
                stacklevel=4,
            )
        return result

    def adapt(self, task: TaskBatch, inner_steps: int | None = None) -> nn.Module:
        """Return a copy of the model in evaluation mode, adapted to a single task."""
        steps, inner = self._steps(inner_steps), self.engine.inner
        values = self.engine.evaluate(self.prepare_batch(task), steps).query_parameters
        adapted = clone(self._model, shared=False)
        own = {
            id(old): nn.Parameter(values[name][0].clone(), old.requires_grad)
            for name, old in self._model.named_parameters()
        }
        give_parameters(adapted, own)
        set_mode(adapted, False, inner.functional.batch_norm)
        cache_apart(adapted)
        return adapted

    def _steps(self, inner_steps: int | None) -> int:
        trained = self.engine.inner.inner_steps
        steps = trained if inner_steps is None else inner_steps
        if steps < 0:
            raise RequestError(
                f"inner_steps = {steps}: a task cannot be adapted for fewer than 0 steps"
            )
        if steps > trained and self.engine.chain.plugins and "steps" not in self._warned:
            self._warned.add("steps")
            warnings.warn(
                f"adapting for {steps} inner steps, trained with {trained}: "
                "later steps use the last step's values",
                stacklevel=4,
            )
        return steps
