"""What would be wrong in silence is refused before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.checks import form
from metaplug.errors import RequestError, quoted
from metaplug.inner import InnerLoop, Loss
from metaplug.mirror import set_mode
from metaplug.runtime.seeding import stream
from metaplug.runtime.unchanged import PLAIN, settings
from metaplug.tasks.batch import TaskBatch
from metaplug.values import Kind


def check_model(model: nn.Module, batch_norm: str) -> None:
    """Refuse a model that cannot be meta-trained, or not rightly.

    Raises:
        RequestError: no trainable parameter; a lazy parameter; parameters of several devices or dtypes; a compiled module, which would
            go on running its original weights; a layer in evaluation mode in a model in training mode; frozen batch norm asked of layers
            that store no statistics.
    """
    parameters = dict(model.named_parameters())
    lazy = [name for name, parameter in parameters.items() if isinstance(parameter, nn.parameter.UninitializedParameter)]
    if lazy:
        raise RequestError(f"the model's parameters {quoted(lazy)} have no shape yet: pass one batch through the model first")
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise RequestError("the model has no trainable parameter, so there is nothing to meta-learn: set requires_grad on some")
    forms = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(forms) > 1:
        raise RequestError(
            f"the model's parameters differ in dtype or device ({quoted(map(str, sorted(map(str, forms))))}): call model.to(...) first"
        )
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise RequestError(f"the module '{name or 'model'}' is compiled and would run its original weights: pass it as it was before")
        if batch_norm == "frozen" and isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is None:
            raise RequestError(f"batch_norm 'frozen' needs stored statistics, but the layer '{name}' keeps none: use 'batch'")
        if model.training and not module.training and _heeds_mode(module, batch_norm):
            raise RequestError(
                f"the layer '{name}' is in evaluation mode in a model in training mode, but meta-training is in training mode throughout: "
                "call model.train(), and set what the layer is to do (dropout p = 0, batch_norm = 'frozen')"
            )


def check_loss(loss: Loss | None) -> None:
    """Refuse a loss with weights that would be learned by nobody.

    Raises:
        RequestError: it is a module with a trainable parameter.
    """
    if isinstance(loss, nn.Module) and (trained := [name for name, weight in loss.named_parameters() if weight.requires_grad]):
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
        prediction = _reference(inner, dict(inner.model.named_parameters()), x)
    _check_rows(prediction, x)
    target = tuple(batch.support_y.shape[2:])
    given, needed = tuple(prediction.shape[1:]), target if kind == "regression" else (outputs, *target)
    if given != needed:
        raise RequestError(f"the model answers n examples with {_rows(given)}, but the tasks need {_rows(needed)}: give its head that form")


def check_forward(inner: InnerLoop, batch: TaskBatch, kind: Kind) -> int | None:
    """Run one task forward and backward, patched and as torch itself would, on weights that are not the model's own, and compare.

    Returns:
        The width of the model's output for classification, None for regression.

    Raises:
        RequestError: the model fails on the task; the patched model differs (a forward hook, a closure over the module, …), or runs parts
            of its forward pass again in the backward pass; it writes its input or state of its own; it, or the loss, is another the
            second time, or uses weights that are trained by nobody; its output or loss has not the right form, or is too narrow for the
            labels.
    """
    x, y = batch.support_x[0].clone(), batch.support_y[0]
    weights, given = _perturbed(inner.model), x._version
    expected = _reference(inner, weights, x)
    if x._version != given:
        raise RequestError(
            "the model changes its input in place, and with it the data of the next inner step: give it operations that make new tensors"
        )
    inner.follow()
    before, numbers = [(buffer, buffer._version) for buffer in inner.patched.buffers()], _numbers(inner)
    try:
        with stream(0, x.device):
            prediction = inner.predict(list(weights.values()), x)
    except Exception as error:
        raise RequestError(
            f"the model runs, but not with weights that are not its own ({_reason(error)}): replace that part of it"
        ) from error
    after = [(buffer, buffer._version) for buffer in inner.patched.buffers()]
    if len(before) != len(after) or any(old is not new or was != now for (old, was), (new, now) in zip(before, after, strict=True)):
        raise RequestError(
            "the model writes to a buffer in forward, which would leak from task to task: make its buffers constant in training"
        )
    if changed := [name for name, value in _numbers(inner).items() if numbers.get(name) != value]:
        raise RequestError(f"the model writes to {quoted(changed)} in forward, which would leak from task to task: make it constant there")
    _check_rows(prediction, x)
    if not _close(prediction, expected):
        raise RequestError(
            "the model's forward pass does not follow the weights that it is given (a forward hook such as the old weight_norm, a stored "
            "function that closes over a module, or random numbers from outside torch): replace that part of the model"
        )
    if not _follows_backward(inner, prediction, expected, weights, x):
        raise RequestError(
            "the gradient of the model does not follow the weights of its forward pass (activation checkpointing, which runs forward again "
            "with later weights, a backward hook, or an operation that has no gradient): replace that part of the model"
        )
    with stream(0, x.device):
        again = inner.predict(list(weights.values()), x)
    if not _close(again, prediction):
        raise RequestError("the model answers otherwise when it is asked again, as if it remembered: keep nothing in forward for the next")
    _refuse_strangers("model", prediction, weights.values())
    outputs = _output_width(prediction) if kind == "classification" else None
    if kind == "regression" and prediction.shape != y.shape:
        raise RequestError(
            f"for regression the model must answer in the form of the targets, {tuple(y.shape)} for a task, not {tuple(prediction.shape)}: "
            "reshape one of them"
        )
    batch.check_values(outputs)
    loss = inner.loss(prediction, y)
    if not isinstance(loss, Tensor) or loss.shape != ():
        raise RequestError("the loss must answer with one number for a task, a tensor of shape (): take the mean over its examples")
    with stream(0, x.device):
        first = inner.loss(prediction, y)
    with stream(0, x.device):
        second = inner.loss(prediction, y)
    if not _close(second, first):
        raise RequestError(
            "the loss answers otherwise when it is asked again, as if it remembered, so that tasks would see each other: keep nothing in it"
        )
    _refuse_strangers("loss", loss, weights.values())
    return outputs


def _check_rows(prediction: object, x: Tensor) -> None:
    if not isinstance(prediction, Tensor) or prediction.shape[:1] != x.shape[:1]:
        raise RequestError("the model must answer with one tensor (n, *output), a row for each example: wrap it in a module that does")


def _rows(shape: tuple[int, ...]) -> str:
    return f"({', '.join(['n', *map(str, shape)])})"


def _output_width(prediction: Tensor) -> int:
    if prediction.dim() < 2:
        raise RequestError(
            f"for classification the model must answer (n, classes), not {tuple(prediction.shape)}: give it a head of that form"
        )
    return prediction.shape[1]


def _perturbed(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(parameter.shape, generator=generator).to(parameter) for name, parameter in model.named_parameters()}
    return {
        name: (parameter.detach() + 0.1 * noise[name]).requires_grad_(parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }


def _close(own: Tensor, expected: Tensor) -> bool:
    return torch.allclose(own, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def _follows_backward(inner: InnerLoop, prediction: Tensor, expected: Tensor, weights: Mapping[str, Tensor], x: Tensor) -> bool:
    """Whether the gradient of a forward pass is still its own after a later forward pass with other weights."""
    trainable = [weight for weight in weights.values() if weight.requires_grad]
    if not expected.requires_grad:
        return True  # nothing to follow: the inner loop says so where it asks for a gradient
    with stream(0, x.device):
        inner.predict([2 * weight for weight in weights.values()], x)
    try:
        own, reference = (torch.autograd.grad(output.sum(), trainable, allow_unused=True) for output in (prediction, expected))
    except RuntimeError:
        return False
    return all(_close(*(torch.zeros(()) if one is None else one for one in pair)) for pair in zip(own, reference, strict=True))


def _refuse_strangers(what: str, output: Tensor, weights: Iterable[Tensor]) -> None:
    """Refuse leaves of an output's graph that require a gradient and are not among the model's weights."""
    known, seen, waiting = {id(weight) for weight in weights}, set[Any](), [output.grad_fn]
    strangers: list[Tensor] = []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [source for source, _ in node.next_functions]
            if isinstance(leaf := getattr(node, "variable", None), Tensor) and id(leaf) not in known:
                strangers.append(leaf)
    if strangers:
        forms = ", ".join(str(tuple(leaf.shape)) for leaf in strangers)
        raise RequestError(
            f"the {what} uses tensors that require a gradient and are no parameters of the model (of shape {forms}), so that nothing would "
            "train them: register them with the model, as by nn.Parameter and nn.ModuleList, or call requires_grad_(False) on them"
        )


def _heeds_mode(module: nn.Module, batch_norm: str) -> bool:
    """Whether a module may do something else in evaluation mode that the learner would not do."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return batch_norm != "frozen"
    modal = (nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)
    return isinstance(module, modal) or not type(module).__module__.startswith("torch.nn.")


def _numbers(inner: InnerLoop) -> dict[str, Any]:
    """The numbers and texts that the patched model has of the model's own, by place."""
    own = {f"{name}.{key}" if name else key for name, module in inner.model.named_modules() for key in settings(module)}
    found = {
        f"{name}.{key}" if name else key: value for name, module in inner.patched.named_modules() for key, value in vars(module).items()
    }
    return {place: value for place, value in found.items() if place in own and isinstance(value, PLAIN)}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _reference(inner: InnerLoop, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What torch's own functional call gives for these weights; the model is left as it was.

    Raises:
        RequestError: the model fails on these examples.
    """
    model, modes = inner.model, {module: module.training for module in inner.model.modules()}
    values = {id(parameter): weights[name] for name, parameter in model.named_parameters()}
    values |= {id(buffer): buffer.clone() for buffer in model.buffers()}
    # Every place once: where torch ties weights itself, it leaves a module that stands at two places without its parameters.
    places = {
        f"{path}.{name}" if path else name: values[id(tensor)]
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    try:
        model.train()
        if inner.batch_norm == "frozen":
            set_mode(model, True, "frozen")
        with stream(0, x.device):
            expected: Tensor = torch.func.functional_call(model, places, (x,), tie_weights=False)
        return expected
    except Exception as error:
        raise RequestError(
            f"the model fails on the support examples of a task, {form(x)} ({_reason(error)}): give it the form and dtype of the tasks"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
