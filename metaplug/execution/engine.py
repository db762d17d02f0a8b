"""Meta-iterations one by one: meta-gradients over all ranks, meta-update, commit; and evaluation.

θ, φ ← meta-optimizer(∂L/∂θ, ∂L/∂φ)        L as in `metaplug.core.outer_loop`
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from metaplug.contract.chain import Chain
from metaplug.contract.outcome import Outcome
from metaplug.contract.schedule import iteration_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.core.adaptation import adapt
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.inner_update import StepObserver
from metaplug.core.outer_loop import MetaGradients, OuterLoop
from metaplug.core.recording import recording
from metaplug.errors import RankError, RunError, quoted
from metaplug.execution.determinism import repeatable
from metaplug.execution.gradients import first_nonfinite, over_ranks, summed_up
from metaplug.execution.meta_optimizer import META_OPTIMIZERS, step_fused
from metaplug.execution.precision import Precision, arithmetic
from metaplug.execution.ranks import ALONE, World
from metaplug.random_streams import mix, random_state, stream

SKIPS_IN_A_ROW = 10
"""This many skipped batches in a row are no fault of a batch: the last of them stops the run."""

FAILURES: tuple[type[Exception], ...] = (RunError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What plugins and models raise on non-finite values that something else made."""

ONE_AT_A_TIME = threading.RLock()
"""Held while a step is computed: random streams, kernels and rounding are settings of the whole
process, and the fast weights of a learner stand in one model. Threads take turns."""


@dataclass(frozen=True)
class MetaStep:
    """One meta-update.

    Attributes:
        iteration: counted from 1.
        outer_loss, meta_gradient_norm: of the batch; for a skipped one they may be NaN or Inf.
        meta_lr: the meta learning rate of the model's weights.
        figures: what plugins log, by name.
        skipped: why the batch was skipped, and nothing updated; None where it was not.
    """

    iteration: int
    outer_loss: float
    meta_gradient_norm: float
    meta_lr: float
    figures: Mapping[str, float]
    skipped: str | None = None


Derivation = Callable[[TaskBatch, int, int, Mapping[int, float]], MetaGradients]
"""(batch, iteration, total, outer weights) → what `Engine.derive` gives for them."""

Diagnosis = Callable[["Engine", TaskBatch, Exception | None, int, bool], str]
"""(engine, batch, failure, total, alone) → the first non-finite value of a failed iteration."""


class Engine:
    """Runs meta-iterations for one model and one chain.

    Args:
        model: its trainable parameters are meta-learned, in place.
        chain: set up already, so the plugins' meta-parameters exist.
        inner: the inner loop over the same model and chain.
        meta_optimizer: a name in META_OPTIMIZERS.
        meta_lr: its rate for the model, and for plugins that set none of their own.
        seed: of every random number that a step draws.
        world: the processes that the tasks of a batch are spread over.
        diagnose: names the first non-finite value of an iteration that failed.

    Attributes:
        iteration: meta-iterations done.
        total: of the whole run that the last meta-update belonged to; 0 before the first.
        outputs: the number of classes that the model tells apart, once it is known.
        derivation: takes the place of `derive`, for the same numbers at another cost; on several
            ranks only where no plugin couples tasks.
        skipped, skipped_in_a_row: batches skipped so far, and without a break up to now.
        deterministic: whether torch may only take algorithms that repeat bit for bit.
        precision: how coarsely forward passes and products round.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        inner: InnerLoop,
        *,
        meta_optimizer: str,
        meta_lr: float,
        seed: int,
        world: World = ALONE,
        diagnose: Diagnosis,
    ) -> None:
        self.chain, self.inner, self.seed, self.world = chain, inner, seed, world
        self.outer, self.diagnose = OuterLoop(model, chain, inner), diagnose
        self.derive, self.meta_parameters = self.outer.derive, self.outer.meta_parameters
        self.iteration = self.total = self.skipped = self.skipped_in_a_row = 0
        self.outputs: int | None = None
        self.derivation: Derivation | None = None
        self.deterministic = False
        self.precision: Precision = "float32"
        self.draws_at_evaluation = False
        self.device = inner.device
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [(own, meta_lr)]
        for plugin in chain.plugins:
            lr = meta_lr if plugin.meta_lr is None else plugin.meta_lr
            groups.append((list(plugin.parameters()), lr))
        groups = [(parameters, lr) for parameters, lr in groups if parameters]
        self._rates = [lr for _, lr in groups]
        self.optimizer = META_OPTIMIZERS[meta_optimizer](
            [{"params": parameters, "lr": lr} for parameters, lr in groups]
        )

    def meta_gradients(self, batch: TaskBatch, iteration: int, total: int) -> MetaGradients:
        """Return the meta-gradients that an iteration of a run of `total` would use.

        Steps and commits nothing.
        """
        seed = mix(self.seed, iteration, *self.world.salt)
        with self._computing(seed) as generator, recording():
            transformed = self.chain.fold(
                "transform_tasks",
                batch,
                iteration=iteration,
                generator=generator,
                outputs=self.outputs,
            )
            if transformed is not batch:
                transformed.check_labels(self.outputs)
            share = self.world.share(transformed.num_tasks)
            weights = self.outer.weights(iteration, total)
            if self.derivation is not None:
                found = self.derivation(transformed, iteration, total, weights)
            else:
                # Where no plugin couples tasks, the shares need not be known before the end.
                coupled = any(plugin.couples_tasks for plugin in self.chain.plugins)
                known = share if coupled else None
                found = self.derive(transformed, iteration, total, weights, share=known)
            if share is not None:
                found = over_ranks(found, share, self.meta_parameters)
            with self._common_stream(iteration):
                gradients = self.chain.fold(
                    "transform_meta_gradients", found.gradients, iteration=iteration
                )
        if gradients is found.gradients:
            return found
        return replace(found, gradients=gradients, told=None)

    def meta_step(self, batch: TaskBatch, total: int, *, skip: bool = False) -> MetaStep:
        """Make one meta-update on `batch`, in a run of `total` iterations.

        Args:
            skip: leave out a batch in which something is NaN or Inf, and count it: nothing is
                updated or committed.

        Raises:
            RunError: something is NaN or Inf and is not to be skipped, or so many batches in a row
                were: nothing was updated. Or the update itself left the range of the dtype.
        """
        iteration, found, failure = self.iteration, None, None
        outer_loss, norm, finite = math.nan, math.nan, 0.0
        try:
            found = self.meta_gradients(batch, iteration, total)
            outer_loss, norm, finite = self.told(found, batch if skip else None).tolist()
        except RankError:
            raise
        except FAILURES as error:  # perhaps on a NaN that something else had made
            if self.world.size > 1:
                raise
            failure = error
        if found is None or not finite:
            text = self.diagnose(self, batch, failure, total, not skip)
            self._skip(text, total)
            meta_lr = self._rates[0] * self.factor(iteration, total)
            return MetaStep(self.iteration, outer_loss, norm, meta_lr, {}, text)
        meta_lr = self.update(found, total)
        self._check_update()
        figures = self.chain.figures(iteration, total)
        return MetaStep(self.iteration, outer_loss, norm, meta_lr, figures)

    def update(self, found: MetaGradients, total: int) -> float:
        """Step, commit and count one iteration; return the meta learning rate of the weights."""
        iteration = self.iteration
        factor = self.factor(iteration, total)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        for name, parameter in self.meta_parameters.items():
            parameter.grad = found.gradients.get(name)
        with torch.inference_mode(False):  # else the optimizer would make a state for good
            step_fused(self.optimizer)
        for parameter in self.meta_parameters.values():
            parameter.grad = None
        self.chain.commit(found.statistics, iteration)
        self.iteration, self.total, self.skipped_in_a_row = iteration + 1, total, 0
        meta_lr: float = self.optimizer.param_groups[0]["lr"]
        return meta_lr

    def nonfinite_parameter(self) -> str | None:
        """Return the first meta-parameter that is NaN or Inf; None for none."""
        return first_nonfinite(self.meta_parameters, self.device)

    def _check_update(self) -> None:
        """Look at what the meta-optimizer wrote: finite gradients may leave the dtype's range.

        Raises:
            RunError: a meta-parameter is NaN or Inf.
        """
        if (name := self.nonfinite_parameter()) is None:
            return
        rates = quoted(sorted({f"{group['lr']:.4g}" for group in self.optimizer.param_groups}))
        raise RunError(
            f"{iteration_text(self.iteration - 1)} stopped: the meta-optimizer wrote NaN or Inf "
            f"into '{name}', from finite meta-gradients, at meta learning rates {rates}: go on "
            "from the last checkpoint with a lower meta_lr, or clip the meta-gradient"
        )

    def evaluate(
        self,
        batch: TaskBatch,
        steps: int,
        numbers: Sequence[int] | None = None,
        observe: StepObserver | None = None,
    ) -> Outcome:
        """Adapt test tasks. Touches no graph, state or random stream of the caller's.

        Args:
            numbers: of the tasks; default: their places. A model that draws random numbers at
                evaluation draws by these, so a task's result does not depend on its batch.
            observe: sees every inner step, perhaps twice; then query losses are taken before the
                first step and after each, and all else is the same.
        """
        numbers = range(batch.num_tasks) if numbers is None else numbers
        with self._computing(mix(self.seed)):
            if not self.draws_at_evaluation:
                before = random_state(self.device)
                outcome = self._adapt(batch, steps, None, observe)
                if torch.equal(before, random_state(self.device)):
                    return outcome
                self.draws_at_evaluation = True  # from now on, tasks run one after the other
            return self._adapt(batch, steps, self._task_seeds(numbers), observe)

    def adapted_losses(self, outcome: Outcome, numbers: Sequence[int]) -> Tensor:
        """Return the (T,) support losses of test tasks after their last update."""
        seeds = self._task_seeds(numbers, 1) if self.draws_at_evaluation else None
        with self._computing(mix(self.seed)):
            return self.inner.adapted_losses(outcome, seeds)

    def told(self, found: MetaGradients, batch: TaskBatch | None) -> Tensor:
        """Return (3,): outer loss, norm of the meta-gradient, and 1 where everything is finite.

        Everything is these two, all losses and weights on the way, what plugins keep, and `batch`.
        With a batch, whose tasks are other ones on other ranks, the ranks agree. A norm whose
        square overflows counts as Inf: optimizers square the gradient.
        """
        told = summed_up(found, self.device) if found.told is None else found.told
        if batch is None:
            return told
        for tensor in batch.tensors():
            told[2] *= torch.isfinite(tensor).all()
        told[2] = self.world.sum(1 - told[2]) == 0
        return told

    def _adapt(
        self,
        batch: TaskBatch,
        steps: int,
        seeds: Sequence[int] | None,
        observe: StepObserver | None,
    ) -> Outcome:
        return adapt(
            self.inner,
            batch,
            steps=steps,
            training=False,
            iteration=self.iteration,
            total=self.total,
            query_after={steps} if observe is None else range(steps + 1),
            seeds=seeds,
            observe=observe,
        )

    def _task_seeds(self, numbers: Sequence[int], *salt: int) -> list[int]:
        return [mix(self.seed, number, *salt) for number in numbers]

    @contextmanager
    def _computing(self, seed: int) -> Iterator[torch.Generator]:
        """Inside, random numbers start from a seed, and torch rounds as configured."""
        rounding = arithmetic(self.precision, self.device)
        repeating = repeatable(self.deterministic)
        with ONE_AT_A_TIME, stream(seed, self.device) as generator, rounding, repeating:
            yield generator

    @contextmanager
    def _common_stream(self, iteration: int) -> Iterator[None]:
        """Inside, the ranks draw the same random numbers, or their weights would part."""
        if self.world.size == 1:
            yield
            return
        with stream(mix(self.seed, iteration, self.world.size), self.device):
            yield

    def factor(self, iteration: int, total: int) -> float:
        """Return the factor of every meta learning rate, by the plugins' schedules."""
        factor: float = self.chain.fold(
            "scale_meta_learning_rate", 1.0, iteration=iteration, total=total
        )
        return factor

    def _skip(self, text: str, total: int) -> None:
        """Count one iteration that updates nothing.

        Raises:
            RunError: it is the last of too many.
        """
        if self.skipped_in_a_row + 1 >= SKIPS_IN_A_ROW:
            raise RunError(
                f"{iteration_text(self.iteration)} stopped, nothing was updated: {SKIPS_IN_A_ROW} "
                "batches in a row would be skipped, which is no fault of a batch; the last because "
                f"{text}"
            )
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.iteration, self.total = self.iteration + 1, total
