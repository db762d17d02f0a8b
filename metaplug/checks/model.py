"""What can be refused of a model and a loss as they stand, before a learner runs them."""

from __future__ import annotations

import torch
from torch import nn

from metaplug.checks.probe_model import check_rows, reference
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Kind
from metaplug.core.inner_loop import InnerLoop, Loss
from metaplug.errors import RequestError, quoted


def check_model(model: nn.Module, batch_norm: str) -> None:
    """Refuse a model that cannot be meta-trained, or not rightly.

    Raises:
        RequestError: no trainable parameter; a lazy parameter; parameters of several devices or dtypes; a compiled module, which would
            go on running its original weights; frozen batch norm asked of layers that store no statistics.
    """
    parameters = dict(model.named_parameters())
    lazy = [
        name
        for name, parameter in parameters.items()
        if isinstance(parameter, nn.parameter.UninitializedParameter)
    ]
    if lazy:
        raise RequestError(
            f"the model's parameters {quoted(lazy)} have no shape yet: pass one batch through the model first"
        )
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise RequestError(
            "the model has no trainable parameter, so there is nothing to meta-learn: set requires_grad on some"
        )
    forms = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(forms) > 1:
        raise RequestError(
            f"the model's parameters differ in dtype or device ({quoted(map(str, sorted(map(str, forms))))}): call model.to(...) first"
        )
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise RequestError(
                f"the module '{name or 'model'}' is compiled and would run its original weights: pass it as it was before"
            )
        if (
            batch_norm == "frozen"
            and isinstance(module, nn.modules.batchnorm._NormBase)
            and module.running_mean is None
        ):
            raise RequestError(
                f"batch_norm 'frozen' needs stored statistics, but the layer '{name}' keeps none: use 'batch'"
            )


def check_loss(loss: Loss | None) -> None:
    """Refuse a loss with weights that would be learned by nobody.

    Raises:
        RequestError: it is a module with a trainable parameter.
    """
    if isinstance(loss, nn.Module) and (
        trained := [name for name, weight in loss.named_parameters() if weight.requires_grad]
    ):
        raise RequestError(
            f"the loss has the trainable parameters {quoted(trained)}, which nothing would train: make them a plugin's, which changes "
            "losses in transform_inner_losses and transform_outer_losses, or call loss.requires_grad_(False)"
        )


def check_outputs(inner: InnerLoop, batch: TaskBatch, outputs: int, kind: Kind) -> None:
    """Run two examples of a task forward, and hold the form of the output against what the tasks need; nothing changes by it.

    Labels would not show a head that is too wide, which spends its weights, and some of every prediction, on classes that no task has.

    Args:
        outputs: how many classes the tasks have; for regression the targets say what is needed.

    Raises:
        RequestError: the model fails on them, does not answer with one tensor, or with one of another form.
    """
    x = torch.cat([batch.support_x[0], batch.query_x[0]])[:2]
    with torch.no_grad():
        prediction = reference(inner, dict(inner.model.named_parameters()), x)
    check_rows(prediction, x)
    target = tuple(batch.support_y.shape[2:])
    given, needed = (
        tuple(prediction.shape[1:]),
        target if kind == "regression" else (outputs, *target),
    )
    if given != needed:
        raise RequestError(
            f"the model answers n examples with {_rows(given)}, but the tasks need {_rows(needed)}: give its head that form"
        )


def _rows(shape: tuple[int, ...]) -> str:
    return f"({', '.join(['n', *map(str, shape)])})"
