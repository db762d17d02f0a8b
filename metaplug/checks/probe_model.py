"""A model and its loss are tried on one task before the first step.

An independent copy of the model, called as its user would call it, says what is right. Whatever the
functional model would do otherwise without a word is refused, with the cause.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metaplug.checks.model_hooks import check_hooks
from metaplug.checks.model_trial import Trial
from metaplug.checks.output_form import (
    check_probabilities,
    check_rows,
    check_targets,
    classes_last,
    count_classes,
)
from metaplug.checks.refuse_memory import refuse_memory, refuse_writes
from metaplug.checks.refuse_other_answers import refuse_other_gradients, refuse_other_values
from metaplug.checks.refuse_other_weights import refuse_unregistered
from metaplug.checks.refuse_sleepers import refuse_sleepers
from metaplug.checks.try_loss import check_loss
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.contract.values import Kind
from metaplug.core.autograd_graph import graph_nodes
from metaplug.core.functional_model import Place
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.losses import cross_entropy
from metaplug.errors import RequestError
from metaplug.random_streams import stream

CHECKPOINTED = (
    "the model uses activation checkpointing, which runs forward again in the backward pass, with "
    "weights that are no longer this step's: switch it off; MetaLearner's checkpoint_steps saves "
    "the same memory"
)


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        outputs: the width of the model's output for classification; None for regression, and where
            targets are no class indices.
        written: where forward writes attributes on modules.
    """

    outputs: int | None
    written: frozenset[Place]


def probe_model(inner: InnerLoop, batch: TaskBatch, kind: Kind) -> Probed:
    """Run one task forward and backward, on weights that are not the model's own, and compare.

    Raises:
        RequestError: the model fails on the task; writes to its input, parameters or buffers; runs
            with weights that it was not given, or runs parts again in the backward pass; it or the
            loss remembers; it uses weights that nothing trains; its output or loss has not the
            right form, or is too narrow for the labels.
    """
    check_hooks(inner.functional.model)  # there may be others than at first
    trial = Trial(inner.functional, inner.device, uniform(batch))
    if trial.checkpointed:
        raise RequestError(CHECKPOINTED)
    check_rows(trial.expected, trial.x)
    refuse_writes(trial)
    refuse_memory(trial)
    inner.functional.watch(trial.written)
    inner.functional.begin(True)
    prediction = trial.predict()
    refuse_sleepers(trial)
    refuse_other_values(trial, prediction)
    refuse_other_gradients(trial, prediction)
    refuse_unregistered(trial, "model", prediction, trial.predict())
    inner.query_graph = _needs_graph(trial)
    inner.first_order_only = _refuses_second_derivative(trial)
    outputs = None
    if kind == "regression":
        check_targets(prediction, trial.y)
    else:
        outputs = count_classes(prediction, trial.y, own_loss=inner.loss is not cross_entropy)
        known = classes_last(trial.ask, prediction, trial.x, trial.y)
        inner.classes_last = inner.classes_last if known is None else known
        if inner.loss is cross_entropy and trial.y.is_floating_point():
            check_probabilities(trial.y)
    batch.check_values(outputs)
    check_loss(trial, inner.loss, prediction)
    return Probed(outputs, frozenset(trial.written))


def written_by_forward(inner: InnerLoop, batch: TaskBatch) -> frozenset[Place]:
    """Return where forward passes on one task write attributes; refuse nothing but a failure."""
    functional = inner.functional
    return frozenset(Trial(functional, inner.device, uniform(batch), functional.module).written)


def _needs_graph(trial: Trial) -> bool:
    """Return whether forward differentiates itself, and so fails where autograd is off."""
    functional = trial.functional
    weights = [weight.detach() for weight in trial.weights.values()]
    functional.begin(False)
    try:
        with torch.no_grad(), stream(0, trial.device):
            functional(weights, trial.x)
    except RuntimeError as error:
        return "does not require grad" in str(error) or "does not have a grad_fn" in str(error)
    except Exception:
        return False  # the evaluation that meets it says so
    finally:
        functional.begin(True)
    return False


def _refuses_second_derivative(trial: Trial) -> bool:
    """Return whether the graph of a first derivative holds torch's error for a second one.

    autograd.grad never visits it, as it does not lie on the way to the weights: it would leave
    that part of the second derivative out.
    """
    trained = [weight for weight in trial.weights.values() if weight.requires_grad]
    prediction = trial.predict()
    if not prediction.requires_grad:
        return False
    value = prediction.square().sum()
    try:
        taken = torch.autograd.grad(value, trained, create_graph=True, allow_unused=True)
    except RuntimeError:
        return False  # the inner loop meets it, too
    nodes = [node for each in taken if each is not None for node in graph_nodes(each)]
    return any(node.name() == "torch::autograd::Error" for node in nodes)
