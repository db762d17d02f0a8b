"""What can be refused of a model and a loss as they stand, before a learner runs them."""

from __future__ import annotations

import torch
from torch import nn

from metaplug.checks.model_copy import answer
from metaplug.checks.model_hooks import check_hooks
from metaplug.checks.output_form import check_rows
from metaplug.contract.inputs import tensors_of, with_tensors
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.contract.values import Kind
from metaplug.core.functional_model import clone
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.task_model import Loss
from metaplug.errors import RequestError, quoted


def check_model(model: nn.Module, batch_norm: str) -> None:
    """Refuse a model that cannot be meta-trained, or not rightly.

    Raises:
        RequestError: no trainable parameter; a lazy parameter; parameters of several devices,
            trainable ones of several dtypes, any of whole numbers, or in float16; a compiled,
            scripted or data-parallel module, which runs other weights than a task's; frozen batch
            norm asked of layers that store no statistics; a hook as `check_hooks` says.
    """
    parameters = dict(model.named_parameters())
    lazy = [name for name, value in parameters.items() if nn.parameter.is_lazy(value)]
    if lazy:
        raise RequestError(
            f"the model's parameters {quoted(lazy)} have no shape yet: "
            "pass one batch through the model first"
        )
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise RequestError(
            "the model has no trainable parameter, so there is nothing to meta-learn: "
            "set requires_grad on some"
        )
    whole = [
        name
        for name, parameter in parameters.items()
        if not (parameter.is_floating_point() or parameter.is_complex())
    ]
    if whole:
        raise RequestError(
            f"the model's parameters {quoted(whole[:3])} hold whole numbers, which nothing trains: "
            "make them buffers, by register_buffer"
        )
    if len({parameter.is_complex() for parameter in parameters.values()}) > 1:
        raise RequestError(
            "some of the model's parameters are complex and some are real, but all must be of one "
            "dtype: hold the complex ones as real ones, and read them by torch.view_as_complex"
        )
    trained = {each.dtype for each in parameters.values() if each.requires_grad}
    devices = {each.device for each in parameters.values()}
    if len(trained) > 1 or len(devices) > 1:
        differ = devices if len(devices) > 1 else trained
        raise RequestError(
            "the model's trainable parameters differ in dtype, or its parameters in device "
            f"({quoted(sorted(map(str, differ)))}): call model.to(...) first; frozen parameters "
            "may be of another dtype"
        )
    if torch.float16 in {each.dtype for each in parameters.values()}:
        raise RequestError(
            "the model is in float16, whose largest number is 65504 and whose smallest step loses "
            "a meta-update: call model.float(), and give precision='bfloat16' for speed"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise RequestError(
                f"the module '{name or 'model'}' is scripted and would run its original weights: "
                "pass the module that it was made from"
            )
        if "_orig_mod" in module._modules:
            raise RequestError(
                f"the module '{name or 'model'}' is compiled by torch.compile, which knows nothing "
                "of stacked tasks: pass the module that it was made from; the learner's own "
                "compile=True compiles whole meta-steps"
            )
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise RequestError(
                f"the module '{name or 'model'}' is a {type(module).__name__}, whose replicas do "
                "not follow a task's weights: pass its .module; tasks spread over devices by ranks"
            )
        normalises = isinstance(module, nn.modules.batchnorm._NormBase)
        if batch_norm == "frozen" and normalises and module.running_mean is None:
            raise RequestError(
                f"batch_norm 'frozen' needs stored statistics, but the layer '{name}' keeps none: "
                "use 'batch'"
            )
    check_hooks(model)


def check_loss(loss: Loss | None) -> None:
    """Refuse a loss with weights of its own that nothing would train.

    Raises:
        RequestError: it is a module with a trainable parameter.
    """
    if not isinstance(loss, nn.Module):
        return
    if trained := [name for name, weight in loss.named_parameters() if weight.requires_grad]:
        raise RequestError(
            f"the loss has the trainable parameters {quoted(trained)}, which nothing would train: "
            "make them a plugin's, which changes losses in transform_inner_losses and "
            "transform_outer_losses, or call loss.requires_grad_(False)"
        )


def check_outputs(inner: InnerLoop, batch: TaskBatch, outputs: int, kind: Kind) -> None:
    """Compare the form of the model's output with what the tasks need; nothing changes by it.

    Labels do not show a head that is too wide, which spends its weights, and some of every
    prediction, on classes that no task has.

    Args:
        outputs: the number of classes of the tasks; for regression the targets say what is needed.

    Raises:
        RequestError: the model fails on two examples, does not answer with one tensor, or with one
            of another form.
    """
    batch = uniform(batch)
    parts = zip(tensors_of(batch.support_x), tensors_of(batch.query_x), strict=True)
    joined = [torch.cat([one[0], other[0]])[:2] for one, other in parts]
    x, functional = with_tensors(batch.support_x, joined), inner.functional
    model = clone(functional.model, shared=False)
    with torch.no_grad():
        prediction = answer(model, x, functional.batch_norm, functional.output)
    check_rows(prediction, x)
    target = tuple(batch.support_y.shape[2:])
    given = tuple(prediction.shape[1:])
    needed = target if kind == "regression" else (outputs, *target)
    if given != needed:
        raise RequestError(
            f"the model answers n examples with {_rows(given)}, but the tasks need "
            f"{_rows(needed)}: give its head that form"
        )


def _rows(shape: tuple[int, ...]) -> str:
    return f"({', '.join(['n', *map(str, shape)])})"
