"""The face of metaplug: a model, a preset and plugins become a learner that fits and evaluates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, Unpack, get_args

from torch import Tensor, nn

from metaplug import checkpoint
from metaplug.checks.model import check_loss, check_model
from metaplug.checks.prepare_batch import PrepareBatch
from metaplug.contract.chain import Chain
from metaplug.contract.inputs import Inputs, map_inputs
from metaplug.contract.presets import PluginLike, Preset, find_preset, make_plugins
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_sizes import TaskSize
from metaplug.contract.values import Kind
from metaplug.core.model_calls import Output
from metaplug.core.task_model import Loss
from metaplug.errors import RequestError, at_least_one, unknown
from metaplug.evaluation.evaluator import MEASURE_UNSEEN, VALIDATE_UNSEEN, Evaluator
from metaplug.evaluation.history import History, Record
from metaplug.evaluation.results import EvaluationResult
from metaplug.evaluation.scores import ScoreLike
from metaplug.execution.batching import Batching, BatchingChoice
from metaplug.execution.plan import Computing, StepPlan
from metaplug.execution.precision import Precision
from metaplug.execution.ranks import ALONE, World
from metaplug.execution.settings import NonFinite
from metaplug.tasks.adapters import evaluation_stream, training_stream
from metaplug.tasks.episodes import TaskStream
from metaplug.tasks.identities import TrainedOn
from metaplug.training.assemble import LOSSES, assemble, learner_settings
from metaplug.training.loop import Loop, LoopSettings


class MetaLearner:
    """Meta-learns the weights of a model, and the meta-parameters of plugins, over tasks.

    Several threads may use one learner: they take turns, a step at a time.

    Args:
        model: any `nn.Module` from inputs (n, *input), or several by name or place, to outputs
            (n, *output), on one device, its trainable parameters in one floating dtype. They are
            updated in place; nothing else of it changes.
        preset: an algorithm: a name that `metaplug plugins` lists, the path of a YAML file, or a
            Preset. None, like "maml", adds no plugin.
        plugins: instances, names, or modules and functions that are hooks; applied after the
            preset's, in this order.
        inner_lr: inner learning rate, 0 to 1000. Default of this and of the next six: the preset's,
            else that of LearnerSettings.
        inner_steps: inner steps K, 0 to 1000.
        inner_optimizer, inner_optimizer_settings: sgd, adam, adamax, adagrad, adadelta or rmsprop,
            and settings such as {"momentum": 0.9}.
        meta_optimizer, meta_lr: adam or sgd, in the outer loop, and its learning rate.
        batch_norm: "batch" (statistics of each task's own batch, in training and at evaluation:
            transductive, and named so in results) or "frozen" (the stored statistics).
        kind: "classification" (targets: class indices, int64, -100 ignored; or labels of 0 and 1 in
            the inputs' dtype, with a loss for them) or "regression".
        loss: (prediction, target) of one task → a tensor of shape (). Default: cross-entropy or
            mean squared error, by kind.
        score: a name in metaplug.evaluation.scores.SCORES, a Score, or a function (predictions,
            targets) → (tasks,). Default: accuracy or mean squared error, by kind.
        output: the part of the model's answer that is its prediction: a name ("logits"), key or
            place. Default: the answer itself, or its `logits` where it has them.
        task_batching: "auto", "vectorized" or "sequential": the same numbers, another speed.
        checkpoint_steps: keep the graph of this many inner steps; recompute the rest in the
            backward pass: less memory, a third more time. None keeps all of it.
        chunk_size: accumulate meta-gradients over this many tasks at a time, for plugins that do
            not couple tasks. None takes all tasks of a batch at once.
        cache_frozen: compute what lies below the first adapted layer once a batch, not once a step:
            the same numbers, sooner, in more memory.
        compile: compile meta-steps: many times faster for small models, after a minute or more for
            each form of batch, once: it is kept on disk. "auto": in a process beside the run, where
            enough of the run is left. What cannot be compiled is named in a warning.
        capture: replay meta-steps from CUDA graphs. "auto": from the 11th step of one form in a
            row, where it can be had. What cannot be captured is named in a warning.
        metrics_every: fetch losses and figures from the device after this many meta-steps, so it
            never waits in between. A step that diverges is found and undone all the same.
        precision: "float32" (TF32 off), "tf32" (CUDA's products and convolutions) or "bfloat16"
            (the model's, losses and updates in float32); the last two for models in float32.
        deterministic: let torch take only algorithms that repeat bit for bit. On a CPU the same
            seed, versions and number of threads suffice.
        seed: of every random number of training.
        world: the processes that train together, from `metaplug.execution.ranks.joined`: each makes
            the same learner and the same calls, and draws its part of the tasks.

    Raises:
        RequestError: the model cannot be meta-trained, a name is unknown, or a value out of bounds.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        preset: str | Preset | None = None,
        plugins: Sequence[PluginLike] = (),
        inner_lr: float | None = None,
        inner_steps: int | None = None,
        inner_optimizer: str | None = None,
        inner_optimizer_settings: Mapping[str, Any] | None = None,
        kind: Kind = "classification",
        loss: Loss | None = None,
        score: ScoreLike | None = None,
        meta_optimizer: Literal["adam", "sgd"] | None = None,
        meta_lr: float | None = None,
        batch_norm: Literal["batch", "frozen"] | None = None,
        output: Output = None,
        task_batching: Batching = "auto",
        checkpoint_steps: int | None = None,
        chunk_size: int | None = None,
        cache_frozen: bool = False,
        compile: bool | Literal["auto"] = False,  # noqa: A002 -- the field's name, as in torch
        capture: bool | Literal["auto"] = False,
        metrics_every: int = 1,
        precision: Precision = "float32",
        deterministic: bool = False,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        preset = None if preset is None else find_preset(preset)
        self.settings = learner_settings(preset, dict(locals()))  # the arguments
        if kind not in LOSSES:
            raise RequestError(f"unknown kind of task '{kind}': classification or regression")
        if task_batching not in get_args(Batching):
            raise unknown("task batching", task_batching, get_args(Batching))
        at_least_one(metrics_every=metrics_every)
        plan = StepPlan(checkpoint_steps, chunk_size, compile, capture, cache_frozen)
        check_model(model, self.settings.batch_norm)
        check_loss(loss)
        self.model, self.kind, self.seed, self.task_batching = model, kind, seed, task_batching
        self.world = ALONE if world is None else world
        self.custom_loss, self.metrics_every = loss is not None, metrics_every
        self.chain = Chain(make_plugins(preset, plugins))
        self.engine = assemble(
            model,
            self.chain,
            loss or LOSSES[kind],
            self.settings,
            plan,
            kind=kind,
            precision=precision,
            deterministic=deterministic,
            seed=seed,
            world=self.world,
        )
        self.prepare_batch = PrepareBatch(
            self.engine, model, kind, task_batching, cache_frozen=cache_frozen
        )
        self.evaluator = Evaluator(self.engine, self.prepare_batch, model, kind, score, seed=seed)

    @property
    def iteration(self) -> int:
        """The meta-iterations done."""
        return self.engine.iteration

    @property
    def batching(self) -> BatchingChoice | None:
        """How tasks are batched and why; known from the first batch on."""
        return self.prepare_batch.batching

    @property
    def skipped(self) -> int:
        """The iterations that were skipped, since something was NaN or Inf."""
        return self.engine.skipped

    @property
    def transductive(self) -> tuple[str, ...]:
        """What lets the examples of a test batch see each other, in words."""
        return self.evaluator.transductive

    @property
    def trained_on(self) -> TrainedOn:
        """The classes of every stream that was trained on, as far as the streams say."""
        return self.evaluator.trained_on

    @trained_on.setter
    def trained_on(self, value: TrainedOn) -> None:
        self.evaluator.trained_on = value

    def fit(
        self,
        tasks: TaskStream | Any,
        *,
        iterations: int,
        on_record: Callable[[Record], None] | None = None,
        **settings: Unpack[LoopSettings],
    ) -> History:
        """Meta-train for `iterations` more iterations; `iterate` with its records gathered.

        Args:
            on_record: called after every iteration, for a progress bar or a log of your own.
            settings: the other arguments of `iterate`.
        """
        history = History()
        for record in self.iterate(tasks, iterations=iterations, **settings):
            history.records.append(record)
            if on_record:
                on_record(record)
        return history

    def iterate(
        self,
        tasks: TaskStream | Any,
        *,
        iterations: int,
        total: int | None = None,
        tasks_per_batch: int = 8,
        validation: TaskStream | Any = None,
        validate_every: int = 50,
        validation_tasks: int | None = None,
        non_finite: NonFinite = "stop",
        profile_tasks: int = 16,
    ) -> Iterator[Record]:
        """Meta-train, one iteration at each step of the iterator: stop whenever you like.

        Args:
            tasks: a stream, whose tasks of iteration i are `tasks.batch(i, range(tasks_per_batch))`
                (of N ranks, rank r asks for r, r + N, r + 2N, …); a list, a data set, a DataLoader,
                a generator or another iterable of tasks or batches; a function (seed, iteration,
                index) → task; or a CombinationMetaDataset of torchmeta. A task is a TaskBatch, or a
                tuple (support_x, support_y, query_x, query_y), (examples, *shape) each.
            iterations: how many more.
            total: iterations of the whole run, which schedules follow. Default: those done and
                `iterations`. Give it where a run is made of several calls.
            tasks_per_batch: tasks in a meta-batch, at least 1, and at least the number of ranks.
            validation: tasks, in any of these forms but a generator, that are evaluated every
                `validate_every` iterations and after the last.
            validation_tasks: how many, always the same. Default: 200, or all where those are fewer.
            non_finite: "stop" training at a batch in which something is NaN or Inf, or "skip" it:
                it counts as an iteration and updates nothing, and its record says why. The tenth in
                a row stops training all the same. Of a validation, such a task makes the mean NaN.
            profile_tasks: how many validation tasks, of the first, the `inner` of a validation is
                of: losses, gradients and rates by inner step. 0 for none.

        Raises:
            RequestError: an argument out of bounds, or validation tasks trained on or unscorable.
            RunError: a loss or gradient is NaN or Inf, or memory runs out; the weights are those of
                the iteration before.
        """
        at_least_one(tasks_per_batch=tasks_per_batch, validate_every=validate_every)
        at_least_one(validation_tasks=validation_tasks)
        if iterations < 0:
            raise RequestError(f"iterations = {iterations}: give at least 0")
        if profile_tasks < 0:
            raise RequestError(f"profile_tasks = {profile_tasks}: give at least 0")
        if non_finite not in get_args(NonFinite):
            raise unknown("non_finite", non_finite, get_args(NonFinite))
        ranks, done = self.world.size, self.iteration
        tasks = training_stream(tasks, self.seed, tasks_per_batch, ranks=ranks, iteration=done)
        trained_on = self.trained_on.and_by(tasks) if iterations > 0 else self.trained_on
        skip = non_finite == "skip"
        validate: Callable[[], EvaluationResult] | None = None
        if validation is not None:
            stream, count = evaluation_stream(
                validation, self.seed, validation_tasks, "validation_tasks", ranks=ranks
            )
            self.evaluator.refuse_trained_on(stream, VALIDATE_UNSEEN, trained_on)
            validate = partial(
                self.evaluator.validate, stream, count, skip=skip, profiled=profile_tasks
            )
        loop = Loop(
            self.engine,
            self.prepare_batch,
            tasks,
            end=self.iteration + iterations,
            total=total,
            tasks_per_batch=tasks_per_batch,
            validate=validate,
            check=None if validation is None else self.evaluator.check_score,
            validate_every=validate_every,
            metrics_every=self.metrics_every,
            skip=skip,
        )
        yield from loop.records(lambda: setattr(self, "trained_on", trained_on))

    def evaluate(
        self,
        tasks: TaskStream | Any,
        *,
        num_tasks: int | None = None,
        inner_steps: int | None = None,
        tasks_per_batch: int | None = None,
        score: ScoreLike | None = None,
        allow_training_classes: bool = False,
    ) -> EvaluationResult:
        """Adapt to tasks that do not see each other, and score their query examples.

        Changes no state.

        Args:
            tasks: in any of the forms that `iterate` takes. Of a stream task i is
                `tasks.batch(0, [i])`, whatever the batch; of a list, its i-th; an iterable gives
                its first tasks, and a generator its next.
            num_tasks: how many, at least 1. Default: all of a list or an iterable; 600 of a stream
                or a function.
            inner_steps: default: as in training.
            tasks_per_batch: how many are computed together; the result does not depend on it.
                Default: 16, or the learner's chunk_size where that is less.
            score: as for MetaLearner. Default: the learner's.
            allow_training_classes: also measure on classes that were trained on, and say so.

        Raises:
            RequestError: the tasks cannot be scored, or are of trained classes, unless allowed.
            RunError: a task's query loss is NaN or Inf, which no mean should hide; the task is
                named. Or memory runs out.
        """
        at_least_one(num_tasks=num_tasks)
        ranks = self.world.size
        stream, count = evaluation_stream(tasks, self.seed, num_tasks, "num_tasks", ranks=ranks)
        if not allow_training_classes:
            self.evaluator.refuse_trained_on(stream, MEASURE_UNSEEN, self.trained_on)
        return self.evaluator.evaluate(stream, count, inner_steps, tasks_per_batch, score)[0]

    def adapt(
        self,
        support_x: Inputs,
        support_y: Tensor,
        *,
        inner_steps: int | None = None,
        ways: int | None = None,
    ) -> nn.Module:
        """Return a copy of the model, adapted to one new task.

        It is an ordinary module in evaluation mode, and shares nothing with this learner.

        Args:
            support_x, support_y: (n, *input), or several by name or place, and (n, *target).
            ways: the task's classes, where outputs beyond them are to count for nothing.
        """
        x, y = map_inputs(lambda each: each.unsqueeze(0), support_x), support_y.unsqueeze(0)
        sizes = None if ways is None else (TaskSize(len(support_y), len(support_y), ways),)
        return self.evaluator.adapt(TaskBatch(x, y, x, y, sizes=sizes), inner_steps)

    def meta_gradients(self, batch: TaskBatch) -> dict[str, Tensor]:
        """Return the meta-gradients of one batch. Steps and commits nothing.

        They go by the model's own names, and PLUGIN.NAME for a plugin's. A meta-parameter that
        received no gradient is left out. Each rank gives tasks of its own, and all find the
        meta-gradients of all of them.
        """
        prepared = self.prepare_batch(batch)
        found = self.engine.meta_gradients(prepared, self.iteration, self.engine.total)
        return dict(found.gradients)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training goes on from: tensors and plain values only."""
        return checkpoint.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any], origin: str = "the state") -> None:
        """Go on from a state of the same model and plugins; all settings stay this learner's own.

        Raises:
            RunError: the state belongs to another model or to other plugins; `origin` is named,
                nothing was loaded.
        """
        checkpoint.give_state(self, state, origin)

    def save(self, path: str | Path) -> None:
        """Write the state to a file, atomically."""
        checkpoint.write(Path(path), self.state_dict())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: nn.Module | None = None,
        plugins: Sequence[PluginLike] | None = None,
        loss: Loss | None = None,
        score: ScoreLike | None = None,
        world: World | None = None,
        **runtime: Unpack[Computing],
    ) -> MetaLearner:
        """Return the learner that `save` wrote. Executes no code from the file.

        How a learner computes is not in the file: what differs from the defaults of MetaLearner,
        such as its precision, is given again.

        Args:
            model: needed where the model is not an installed part; any weights of the same shapes.
            plugins: needed where a plugin is not an installed part; the same list, new instances.
            loss: needed where one was given.
            score: needed where one of your own was given; else the one that was.
            world: as for MetaLearner; it need not have as many ranks as the one that saved.
            runtime: precision, deterministic, compile and the others, as for MetaLearner.

        Raises:
            RunError: the file is missing, damaged, or of another model or version.
            RequestError: something is needed that the file cannot hold; it is named.
        """
        return checkpoint.load(
            cls,
            path,
            model=model,
            plugins=plugins,
            loss=loss,
            score=score,
            world=world,
            runtime=runtime,
        )

    def __reduce__(self) -> NoReturn:
        raise RequestError(
            "a MetaLearner is not copied or pickled, since plugins and optimizers hold on to its "
            "model's parameters: save() it and load() it in the other process, or make a new one "
            "and give it load_state_dict(learner.state_dict())"
        )
