"""What a user imports: a model, a preset and plugins become a learner that fits, evaluates, adapts, saves and loads."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from metaplug import checkpoint
from metaplug.checks.model import check_loss, check_model
from metaplug.checks.prepare_batch import Intake
from metaplug.contract.chain import Chain
from metaplug.contract.presets import PluginLike, Preset, find_preset, make_plugins
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Context, Kind
from metaplug.core.inner_loop import InnerLoop, Loss
from metaplug.core.optimizers import set_mode
from metaplug.errors import RequestError, quoted, unknown
from metaplug.evaluation.history import History, Record
from metaplug.evaluation.measure import measure
from metaplug.evaluation.results import EvaluationResult, metric_of
from metaplug.execution.batching import Batching, BatchingChoice
from metaplug.execution.engine import Engine
from metaplug.execution.memory import MemoryEstimate, chunk_of, estimate_step, memory_explained
from metaplug.execution.plan import StepWay
from metaplug.execution.precision import Precision, check_precision
from metaplug.execution.ranks import ALONE, World
from metaplug.execution.settings import LearnerSettings, NonFinite
from metaplug.execution.windows import meta_steps
from metaplug.settings import validated
from metaplug.tasks.adapters import LoaderTasks, as_stream
from metaplug.tasks.episodes import TaskStream
from metaplug.tasks.identities import TrainedOn

LOSSES: dict[Kind, Loss] = {
    "classification": nn.functional.cross_entropy,
    "regression": nn.functional.mse_loss,
}
"""The loss of one task where none is given: cross-entropy over class indices, or mean squared error."""


class MetaLearner:
    """Meta-learns the weights of a model, and the meta-parameters of plugins, over tasks.

    Args:
        model: any `nn.Module` from inputs (n, *input) to one tensor (n, *output), on its device, in one floating dtype. Its trainable
            parameters are updated in place; nothing else of it is changed.
        preset: an algorithm: a name that `metaplug plugins` lists, the path of a YAML file (.yaml, .yml), or a Preset. None, like "maml",
            adds no plugin.
        plugins: instances, names, or modules and functions that are named or marked as hooks; applied behind the preset's, in this order.
        inner_lr, inner_steps, inner_optimizer, inner_optimizer_settings, meta_optimizer, meta_lr, batch_norm: None for what the preset
            says of them, else the default named here.
            inner_lr: inner learning rate, 0 to 1000; default 0.4.
            inner_steps: inner steps K, 0 to 1000; default 3.
            inner_optimizer: sgd (default), adam, adamax, adagrad, adadelta or rmsprop, with settings such as {"momentum": 0.9}.
            meta_optimizer: adam (default) or sgd, in the outer loop; meta_lr: its learning rate; default 1e-3.
            batch_norm: "batch" (default; statistics of each task's own batch, in training and at evaluation: transductive, and named so in
            results) or "frozen" (the model's stored statistics, never updated).
        kind: "classification" (targets: class indices, int64) or "regression".
        loss: (prediction, target) of one task → a tensor of shape (). Default: cross-entropy or mean squared error, by kind.
        task_batching: "auto", "vectorized" or "sequential": the same numbers, another speed.
        checkpoint_steps: at least 1: the graph of so many inner steps at a time is kept, and that of the others made again in the backward
            pass: less memory, a third more time, the same numbers. None keeps all of it.
        chunk_size: at least 1: meta-gradients are accumulated over so many tasks at a time: the memory of these. For plugins that do not
            couple tasks. None takes all tasks of a batch at once.
        compile: whether meta-steps are compiled: the same numbers, many times faster for small models, after a minute or more for each form
            of batch. A plugin that cannot be compiled is named in a warning, and training goes on uncompiled.
        capture: whether meta-steps are captured in CUDA graphs, compiled ones too: the same numbers, in the time that the device itself
            takes. "auto": from the 11th step of one form in a row on, where it can be had at all. What cannot be captured, such as random
            numbers, is named in a warning, and training goes on uncaptured.
        metrics_every: at least 1: losses and figures are fetched from the device after so many meta-steps, or at a validation, so that it
            never waits in between; records then come that many at a time, and figures of plugins with the last. Of batches that are on the
            device already, the labels of the first are checked. A step that diverges is found and taken back all the same.
        precision: "float32" (TF32 off), "tf32" (CUDA's matrix products and convolutions round to TF32) or "bfloat16" (the model's run in
            bfloat16); losses and updates stay in float32. The last two are for models in float32.
        deterministic: whether torch may only take algorithms that give the same bits every time, as CUDA's fastest do not; an operation
            that has none stops training, and is named. On a CPU the same seed, versions and number of threads suffice.
        seed: of every random number of training.
        world: the processes that train together, from `metaplug.execution.ranks.joined`: every rank makes the same learner and the
            same calls, and draws its part of the tasks. They start from rank 0's weights. Default: this process alone.

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
        meta_optimizer: Literal["adam", "sgd"] | None = None,
        meta_lr: float | None = None,
        batch_norm: Literal["batch", "frozen"] | None = None,
        task_batching: Batching = "auto",
        checkpoint_steps: int | None = None,
        chunk_size: int | None = None,
        compile: bool = False,  # noqa: A002 -- the field's name, as in torch
        capture: bool | Literal["auto"] = False,
        metrics_every: int = 1,
        precision: Precision = "float32",
        deterministic: bool = False,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        given = {
            "inner_lr": inner_lr,
            "inner_steps": inner_steps,
            "inner_optimizer": inner_optimizer,
            "inner_optimizer_settings": inner_optimizer_settings,
            "meta_optimizer": meta_optimizer,
            "meta_lr": meta_lr,
            "batch_norm": batch_norm,
        }
        preset = None if preset is None else find_preset(preset)
        settings = {} if preset is None else preset.defaults.get("learner", {})
        settings = {
            **settings,
            **{name: value for name, value in given.items() if value is not None},
        }
        self.settings = validated(LearnerSettings, settings, "learner")
        if kind not in LOSSES:
            raise RequestError(f"unknown kind of task '{kind}': classification or regression")
        if task_batching not in get_args(Batching):
            raise unknown("task batching", task_batching, get_args(Batching))
        _check_counts(metrics_every=metrics_every)
        way = StepWay(checkpoint_steps, chunk_size, compile, capture)
        check_model(model, self.settings.batch_norm)
        check_loss(loss)
        self.model, self.kind, self.seed, self.task_batching = model, kind, seed, task_batching
        self.world = ALONE if world is None else world
        self.custom_loss, self.metrics_every = loss is not None, metrics_every
        self.trained_on = TrainedOn()
        """The classes of every stream that was trained on, as far as the streams say."""
        self._warned = self._warned_of_divergence = False
        self.chain = Chain(make_plugins(preset, plugins))
        self.world.align(
            [*model.parameters(), *model.buffers()]
        )  # before plugins start from these values
        trainable = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        layers = {name: type(model.get_submodule(name.rpartition(".")[0])) for name in trainable}
        adapted = self._select_adapted(tuple(trainable), layers)
        reference = next(iter(trainable.values()))
        check_precision(precision, reference.dtype, reference.device)
        way.check_device(reference.device)
        self.chain.setup(
            Context(
                shapes={name: parameter.shape for name, parameter in trainable.items()},
                parameters={name: parameter.detach() for name, parameter in trainable.items()},
                layers=layers,
                adapted=adapted,
                dtype=reference.dtype,
                device=reference.device,
                inner_steps=self.settings.inner_steps,
                inner_lr=self.settings.inner_lr,
                kind=kind,
                ranks=self.world.size,
            )
        )
        self.world.align(
            [
                tensor
                for plugin in self.chain.plugins
                for tensor in (*plugin.parameters(), *plugin.buffers())
            ]
        )
        inner = InnerLoop(
            model,
            self.chain,
            loss or LOSSES[kind],
            adapted=adapted,
            inner_steps=self.settings.inner_steps,
            inner_lr=self.settings.inner_lr,
            optimizer=self.settings.inner_optimizer,
            optimizer_settings=self.settings.inner_optimizer_settings,
            batch_norm=self.settings.batch_norm,
        )
        inner.checkpoint_steps, inner.precision = checkpoint_steps, precision
        self.engine = Engine(
            model,
            self.chain,
            inner,
            meta_optimizer=self.settings.meta_optimizer,
            meta_lr=self.settings.meta_lr,
            seed=seed,
            world=self.world,
        )
        self.engine.deterministic = deterministic
        self.engine.derivation = way.derivation(self.engine)
        self.intake = Intake(self.engine, model, kind, task_batching)
        """What every batch goes through before it is computed with."""

    @property
    def iteration(self) -> int:
        """The meta-iterations done."""
        return self.engine.iteration

    @property
    def batching(self) -> BatchingChoice | None:
        """How tasks are batched and why; known from the first batch on."""
        return self.intake.batching

    @property
    def skipped(self) -> int:
        """How many of them were skipped, as something was NaN or Inf."""
        return self.engine.skipped

    def fit(
        self,
        tasks: TaskStream | Any,
        *,
        iterations: int,
        tasks_per_batch: int = 8,
        validation: TaskStream | Any = None,
        validate_every: int = 50,
        validation_tasks: int = 200,
        non_finite: NonFinite = "stop",
        on_record: Callable[[Record], None] | None = None,
    ) -> History:
        """Meta-train for `iterations` more iterations; `iterate` with its records gathered.

        Args:
            on_record: called after every iteration, for a progress bar or a log of your own.
        """
        history = History()
        steps = self.iterate(
            tasks,
            iterations=iterations,
            tasks_per_batch=tasks_per_batch,
            validation=validation,
            validate_every=validate_every,
            validation_tasks=validation_tasks,
            non_finite=non_finite,
        )
        for record in steps:
            history.records.append(record)
            if on_record:
                on_record(record)
        return history

    def iterate(
        self,
        tasks: TaskStream | Any,
        *,
        iterations: int,
        tasks_per_batch: int = 8,
        validation: TaskStream | Any = None,
        validate_every: int = 50,
        validation_tasks: int = 200,
        non_finite: NonFinite = "stop",
    ) -> Iterator[Record]:
        """Meta-train, one iteration at each step of the iterator: stop whenever you like.

        Args:
            tasks: where the tasks of iteration i come from: `tasks.batch(i, range(tasks_per_batch))`; or a CombinationMetaDataset or
                BatchMetaDataLoader of torchmeta. Of N ranks, rank r asks for the indices r, r + N, r + 2N, ….
            iterations: how many more.
            tasks_per_batch: tasks in a meta-batch, at least 1, and at least the number of ranks.
            validation: tasks that are evaluated every `validate_every` iterations and after the last: always the same `validation_tasks`.
            non_finite: what a batch does in which something is NaN or Inf: "stop" training, or be left out ("skip"): it counts as an
                iteration, updates and commits nothing, and its record says why. The tenth in a row stops training all the same. A
                validation with such a task has NaN as its mean and for that task, and a warning says why.

        Raises:
            RequestError: there are more ranks than tasks, ranks cannot draw different tasks from `tasks`, or `validation` has a class that
                is trained on, here or before.
            RunError: a loss or gradient is NaN or Inf, or memory runs out; the weights are those of the iteration before.
        """
        _check_counts(
            tasks_per_batch=tasks_per_batch,
            validate_every=validate_every,
            validation_tasks=validation_tasks,
        )
        if non_finite not in get_args(NonFinite):
            raise unknown("non_finite", non_finite, get_args(NonFinite))
        if tasks_per_batch < self.world.size:
            raise RequestError(
                f"tasks_per_batch = {tasks_per_batch} on {self.world.size} ranks: a rank without a task would only wait; "
                f"give at least {self.world.size} tasks, or start fewer ranks"
            )
        tasks = self._stream(tasks)
        trained_on = self.trained_on.and_by(tasks) if iterations > 0 else self.trained_on
        if validation is not None:
            trained_on.refuse(
                self._stream(validation),
                self._noun,
                "give validation tasks of other classes, such as tasks.val",
            )
        total, skip = self.iteration + iterations, non_finite == "skip"
        while self.iteration < total:
            own, begun = self.world.shard(range(tasks_per_batch)), self.iteration
            due = (
                total
                if validation is None
                else min(total, (begun // validate_every + 1) * validate_every)
            )
            until = min(begun + self.metrics_every, due)
            batches = (
                self.intake(
                    tasks.batch(iteration, own),
                    trusted=iteration > begun,
                    numbers=own,
                    iteration=iteration,
                    skip=skip,
                )
                for iteration in range(begun, until)
            )
            with memory_explained(self.engine, len(own)):
                if until == begun + 1:
                    steps = iter([self.engine.meta_step(next(batches), total, skip=skip)])
                else:
                    steps = meta_steps(self.engine, batches, total, skip=skip)
                    steps = itertools.chain(
                        [next(steps)], steps
                    )  # here, where memory may run out, all of them are made
            self.trained_on = trained_on
            for step in steps:
                measured = validation is not None and step.iteration == due
                yield Record(
                    step,
                    self._validate(validation, validation_tasks, skip=skip) if measured else None,
                )

    def _validate(self, tasks: TaskStream, num_tasks: int, *, skip: bool) -> EvaluationResult:
        """The result on validation tasks; once in a learner's life, a warning where adaptation makes most support losses larger.

        Args:
            skip: a task whose query loss is NaN or Inf makes the mean NaN, with a warning.
        """
        result, fault = self._measured(
            self._stream(tasks), num_tasks, self.settings.inner_steps, validating=True, skip=skip
        )
        raised, (before, after) = result.raised or 0, result.support_losses or (0.0, 0.0)
        if fault is not None:
            warnings.warn(
                f"the validation after iteration {self.iteration} counts for nothing: {fault}",
                stacklevel=3,
            )
        elif 2 * raised > num_tasks and not self._warned_of_divergence:
            self._warned_of_divergence = True
            changed = quoted(
                link.plugin.name for link in self.chain.links("transform_learning_rates")
            )
            warnings.warn(
                f"adaptation raises the support loss of {raised} of {num_tasks} validation tasks "
                f"(mean {before:.4g} to {after:.4g} over {result.inner_steps} inner steps, inner_lr = {self.settings.inner_lr:.4g}"
                f"{'' if changed == 'none' else f', which plugin {changed} changes'}): the inner loop diverges; lower inner_lr",
                stacklevel=3,
            )
        return result

    def evaluate(
        self,
        tasks: TaskStream | Any,
        *,
        num_tasks: int = 600,
        inner_steps: int | None = None,
        tasks_per_batch: int | None = None,
        allow_training_classes: bool = False,
    ) -> EvaluationResult:
        """Adapt to `num_tasks` tasks that do not see each other, and measure on their query examples. Changes no state.

        Args:
            tasks: task i is `tasks.batch(0, [i])`, whatever the batch.
            inner_steps: default: as in training.
            tasks_per_batch: how many are computed together, each such batch on one rank; the result does not depend on it. Default: 16, or
                the learner's chunk_size where that is less.
            allow_training_classes: measure also on classes that were trained on, which the result then says.

        Raises:
            RequestError: the tasks are of a class that was trained on, and that is not allowed.
            RunError: a task's query loss is NaN or Inf, which no mean should hide; the task is named. Or memory runs out.
        """
        _check_counts(num_tasks=num_tasks)
        tasks = self._stream(tasks)
        if not allow_training_classes:
            self.trained_on.refuse(
                tasks,
                self._noun,
                "evaluate tasks.test, or give allow_training_classes=True (--allow-training-classes) to measure training on purpose",
            )
        return self._measured(tasks, num_tasks, self._steps(inner_steps), tasks_per_batch)[0]

    def _measured(
        self,
        tasks: TaskStream,
        num_tasks: int,
        steps: int,
        tasks_per_batch: int | None = None,
        *,
        validating: bool = False,
        skip: bool = False,
    ) -> tuple[EvaluationResult, str | None]:
        """A result, with the fault that made it NaN where that is to be skipped; support losses are measured when validating."""
        size = min(16, chunk_of(self.engine) or 16) if tasks_per_batch is None else tasks_per_batch
        _check_counts(tasks_per_batch=size)
        batches = [
            range(start, min(start + size, num_tasks)) for start in range(0, num_tasks, size)
        ]
        found = measure(
            self.engine,
            self.intake,
            tasks,
            batches,
            steps=steps,
            kind=self.kind,
            losses=validating,
            skip=skip,
        )
        result = EvaluationResult(
            metric_of(self.kind),
            found.scores,
            steps,
            self.transductive,
            self.trained_on.shared(tasks),
            self.seed,
            *found.growth,
        )
        return result, found.fault

    def adapt(
        self, support_x: Tensor, support_y: Tensor, *, inner_steps: int | None = None
    ) -> nn.Module:
        """A copy of the model, adapted to one new task.

        Args:
            support_x: (n, *input).
            support_y: (n, *target).

        Returns:
            An ordinary module in evaluation mode, which shares nothing with this learner.
        """
        steps = self._steps(inner_steps)
        x, y = support_x.unsqueeze(0), support_y.unsqueeze(0)
        outcome = self.engine.evaluate(self.intake(TaskBatch(x, y, x, y)), steps)
        adapted = copy.deepcopy(self.model)
        set_mode(adapted, False, self.settings.batch_norm)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                parameter.copy_(outcome.query_parameters[name][0])
        return adapted

    def meta_gradients(self, batch: TaskBatch) -> dict[str, Tensor]:
        """The meta-gradients of one batch: by the model's own names, and PLUGIN.NAME for a plugin's. Steps and commits nothing.

        Each rank gives tasks of its own, and all find the meta-gradients of all of them. A meta-parameter that received no gradient is left
        out.
        """
        return dict(
            self.engine.meta_gradients(
                self.intake(batch), self.iteration, self.engine.total
            ).gradients
        )

    def estimate_memory(
        self, batch: TaskBatch, *, tasks_per_batch: int | None = None, iterations: int | None = None
    ) -> MemoryEstimate:
        """What one meta-step will take of memory, from steps of one and two tasks with up to three inner steps. Changes nothing.

        Args:
            batch: tasks of the form that is trained on; two are enough.
            tasks_per_batch: tasks in a meta-batch of all ranks, at least 1; default: as many as `batch` has, on this rank.
            iterations: of the whole run, where schedules depend on it: the estimate is for the next iteration or the last, whichever takes
                more. Default: the run that was begun, or a single iteration.

        Raises:
            RunError: memory runs out in the small steps already.
        """
        batch = self.intake(batch)
        tasks = batch.num_tasks
        if tasks_per_batch is not None:
            _check_counts(tasks_per_batch=tasks_per_batch)
            tasks = len(self.world.shard(range(tasks_per_batch)))
        total = self.engine.total if iterations is None else iterations
        return estimate_step(self.engine, batch, max(tasks, 1), total, self.metrics_every)

    @property
    def transductive(self) -> tuple[str, ...]:
        """What lets the examples of a test batch see each other, in words."""
        reasons = [f"plugin {name} shares between test tasks" for name in self.chain.transductive]
        layers = [
            layer
            for layer in self.model.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ]
        if any(
            self.settings.batch_norm == "batch" or not layer.track_running_stats for layer in layers
        ):
            reasons.append("batch norm uses the statistics of each task's own batch")
        return tuple(reasons)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from: tensors and plain values only."""
        return checkpoint.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any], origin: str = "the state") -> None:
        """Go on from a state of the same model and plugins.

        Raises:
            RunError: the state belongs to another model or to other plugins; `origin` is named, nothing was loaded.
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
        world: World | None = None,
    ) -> MetaLearner:
        """The learner that `save` wrote. Executes no code from the file.

        Args:
            model: needed where the model is not an installed part; any weights of the same shapes.
            plugins: needed where a plugin is not an installed part; the same list, new instances.
            loss: needed where one was given.
            world: as for MetaLearner; it need not have as many ranks as the one that saved.

        Raises:
            RunError: the file is missing, damaged, or of another model or version.
            RequestError: something is needed that the file cannot hold; it is named.
        """
        return checkpoint.load(cls, path, model=model, plugins=plugins, loss=loss, world=world)

    def _select_adapted(
        self, names: tuple[str, ...], layers: Mapping[str, type[nn.Module]]
    ) -> tuple[str, ...]:
        selected = self.chain.fold("select_adapted", names, layers=layers)
        if not selected:
            raise RequestError("the plugins select no parameter to adapt: leave at least one")
        return tuple(name for name in names if name in selected)

    @property
    def _noun(self) -> str:
        """What tasks are drawn from."""
        return "classes" if self.kind == "classification" else "groups of tasks"

    def _stream(self, tasks: TaskStream) -> TaskStream:
        stream = as_stream(tasks, self.seed)
        if self.world.size > 1 and isinstance(stream, LoaderTasks):
            raise RequestError(
                f"a BatchMetaDataLoader decides itself which tasks come next, so that {self.world.size} ranks would train on the same: "
                "give its CombinationMetaDataset instead"
            )
        return stream

    def _steps(self, inner_steps: int | None) -> int:
        trained = self.settings.inner_steps
        steps = trained if inner_steps is None else inner_steps
        if steps < 0:
            raise RequestError(
                f"inner_steps = {steps}: a task cannot be adapted for fewer than 0 steps"
            )
        if steps > trained and self.chain.plugins and not self._warned:
            self._warned = True
            warnings.warn(
                f"adapting for {steps} inner steps, trained with {trained}: later steps use the last step's values",
                stacklevel=3,
            )
        return steps


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise RequestError(f"{name} = {count}: give at least 1")
