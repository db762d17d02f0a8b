"""A model and its loss are tried on one task before the first step: what would be wrong in silence is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.checks.model_changes import settings
from metaplug.checks.module_state import Place, changed, is_read, left_as_it_was, numbers, separate
from metaplug.contract.return_checks import form
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Kind
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.optimizers import set_mode
from metaplug.errors import RequestError, quoted, said_by
from metaplug.random_streams import stream


def check_forward(inner: InnerLoop, batch: TaskBatch, kind: Kind) -> int | None:
    """Run one task forward and backward, patched and as torch itself would, on weights that are not the model's own, and compare.

    Returns:
        The width of the model's output for classification, None for regression.

    Raises:
        RequestError: the model fails on the task; the patched model differs (a forward hook, a closure over the module, …), or runs parts
            of its forward pass again in the backward pass; it writes its input or state that matters later; it, or the loss, is another
            the second time, or uses weights that are trained by nobody; its output or loss has not the right form, or is too narrow for
            the labels.
    """
    trial = _Trial(inner, batch)
    inner.follow()
    with left_as_it_was(
        inner.patched, only_after_errors=True
    ):  # a refused model is to be refused for the same reason again
        prediction = trial.predict_first()
        check_rows(prediction, trial.x)
        trial.refuse_sleepers()
        trial.refuse_other_values(prediction)
        trial.refuse_other_gradients(prediction)
        trial.refuse_memory(prediction)
        _refuse_strangers("model", prediction, trial.weights.values())
        outputs = _output_width(prediction) if kind == "classification" else None
        if kind == "regression":
            _check_targets(prediction, trial.y)
        batch.check_values(outputs)
        trial.check_loss(prediction)
    return outputs


def kept_by_forward(inner: InnerLoop, x: Tensor) -> set[Place]:
    """Where the model's forward pass writes to its modules, as far as it gets; the model is left as it was."""
    kept = set[Place]()
    try:
        with torch.no_grad():
            reference(inner, dict(inner.model.named_parameters()), x, kept)
    except RequestError:
        pass  # the pass that follows says so
    return kept


class _Trial:
    """One task, run with weights that are not the model's own.

    Attributes:
        x, y: support examples (n, *input) and their targets.
        weights: by name.
        expected: what torch gives for x.
        others, expected_of_others: examples that are not x, and what torch gives for them; None where the model fails on them.
    """

    def __init__(self, inner: InnerLoop, batch: TaskBatch) -> None:
        self.x, self.y, self._inner = batch.support_x[0].clone(), batch.support_y[0], inner
        self.weights, given, self._kept = _perturbed(inner.model), self.x._version, set[Place]()
        self.expected = reference(inner, self.weights, self.x, self._kept)
        separate(inner.patched, self._kept)
        if self.x._version != given:
            raise RequestError(
                "the model changes its input in place, and with it the data of the next inner step: give it operations that make new "
                "tensors"
            )
        self.others, self.expected_of_others = batch.query_x[-1].clone(), None
        if torch.equal(self.others, self.x):
            self.others = self.x[:1].expand_as(self.x).clone()
        try:
            with torch.no_grad():
                self.expected_of_others = reference(inner, self.weights, self.others)
        except RequestError:
            pass  # query examples are refused where they are used

    def predict_first(self) -> Tensor:
        """The patched model's prediction; what it writes meanwhile must not leak from task to task."""
        patched, own = self._inner.patched, self._own_places()
        buffers, before = (
            [(buffer, buffer._version) for buffer in patched.buffers()],
            numbers(patched, own),
        )
        try:
            prediction = self.predict()
        except Exception as error:
            raise RequestError(
                f"the model runs, but not with weights that are not its own ({said_by(error)}): replace that part of it"
            ) from error
        after = [(buffer, buffer._version) for buffer in patched.buffers()]
        if len(buffers) != len(after) or any(
            old is not new or was != now
            for (old, was), (new, now) in zip(buffers, after, strict=True)
        ):
            raise RequestError(
                "the model writes to a buffer in forward, which would leak from task to task: make its buffers constant in training"
            )
        once = numbers(patched, own)
        if changed(before, once):
            self._refuse_numbers(once, own)
        return prediction

    def predict(self, x: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """What the patched model gives for x, or for other examples, with the weights or multiples of them."""
        x = self.x if x is None else x
        with stream(0, x.device):
            return self._inner.predict(
                [scale * weight if scale != 1 else weight for weight in self.weights.values()], x
            )

    def refuse_sleepers(self) -> None:
        """Refuse layers that are in evaluation mode in a model in training mode, if that makes a difference."""
        model = self._inner.model
        asleep = [
            name for name, module in model.named_modules() if model.training and not module.training
        ]
        if asleep and not self._as_awake(asleep):
            name = next((name for name in asleep if not self._as_awake([name])), asleep[0])
            raise RequestError(
                f"the layer '{name}' is in evaluation mode in a model in training mode, but meta-training is in training mode throughout: "
                "call model.train(), and set what the layer is to do (dropout p = 0, batch_norm = 'frozen')"
            )

    def refuse_other_values(self, prediction: Tensor) -> None:
        """Refuse a patched model that gives something else than torch does."""
        if not _close(prediction, self.expected):
            raise RequestError(
                "the model's forward pass does not follow the weights that it is given (a forward hook such as the old weight_norm, a "
                "stored function that closes over a module, or random numbers from outside torch): replace that part of the model"
            )

    def refuse_other_gradients(self, prediction: Tensor) -> None:
        """Refuse a gradient that is not torch's, or no longer after a later forward pass with other weights."""
        if not self._follows_backward(prediction):
            raise RequestError(
                "the gradient of the model does not follow the weights of its forward pass (activation checkpointing, which runs forward "
                "again with later weights, a backward hook, or an operation that has no gradient): replace that part of the model"
            )

    def refuse_memory(self, prediction: Tensor) -> None:
        """Refuse a model that answers otherwise after other forward passes than at first."""
        same = _close(self.predict(), prediction)
        if same and self.expected_of_others is not None:
            with torch.no_grad():
                same = _close(self.predict(self.others), self.expected_of_others)
            # These last: what is made once for a size, such as a mask, is then there for the first step, and not made inside vmap.
            same = _close(self.predict(), prediction) and same
        if not same:
            raise RequestError(
                "the model answers otherwise when it is asked again, as if it remembered: keep nothing in forward for the next"
            )

    def check_loss(self, prediction: Tensor) -> None:
        """Refuse a loss of another form, one that remembers, and one with weights that nobody trains."""
        loss = self._inner.loss(prediction, self.y)
        if not isinstance(loss, Tensor) or loss.shape != ():
            raise RequestError(
                "the loss must answer with one number for a task, a tensor of shape (): take the mean over its examples"
            )
        with stream(0, self.x.device):
            first = self._inner.loss(prediction, self.y)
        with stream(0, self.x.device):
            second = self._inner.loss(prediction, self.y)
        if not _close(second, first):
            raise RequestError(
                "the loss answers otherwise when it is asked again, as if it remembered, so that tasks would see each other: keep nothing "
                "in it"
            )
        _refuse_strangers("loss", loss, self.weights.values())

    def _refuse_numbers(self, once: dict[Place, Any], own: set[Place]) -> None:
        """Refuse numbers that go on changing where anything but adding is done with them. Others are judged by what the model answers."""
        try:
            self.predict()
            going_on = changed(once, numbers(self._inner.patched, own))
        except Exception:
            going_on = changed({}, once)
        if read := [
            ".".join(filter(None, place))
            for place in going_on
            if is_read(self._inner.patched, place, self.predict)
        ]:
            raise RequestError(
                f"the model writes to {quoted(read)} in forward, which would leak from task to task: make it constant there"
            )

    def _own_places(self) -> set[Place]:
        """Where the patched model has what the model has, not what patching adds."""
        modules = self._inner.model.named_modules(remove_duplicate=False)
        return self._kept | {(name, key) for name, module in modules for key in settings(module)}

    def _as_awake(self, asleep: Collection[str]) -> bool:
        return _close(reference(self._inner, self.weights, self.x, asleep=asleep), self.expected)

    def _follows_backward(self, prediction: Tensor) -> bool:
        trainable = [weight for weight in self.weights.values() if weight.requires_grad]
        if not self.expected.requires_grad:
            return True  # nothing to follow: the inner loop says so where it asks for a gradient
        self.predict(scale=2)
        try:
            pairs = [
                torch.autograd.grad(output.sum(), trainable, allow_unused=True)
                for output in (prediction, self.expected)
            ]
        except RuntimeError:
            return False
        own, expected = (
            [
                torch.zeros_like(w) if one is None else one
                for one, w in zip(given, trainable, strict=True)
            ]
            for given in pairs
        )
        return all(map(_close, own, expected))


def reference(
    inner: InnerLoop,
    weights: Mapping[str, Tensor],
    x: Tensor,
    kept: set[Place] | None = None,
    *,
    asleep: Collection[str] = (),
) -> Tensor:
    """What torch's own functional call gives for these weights; the model is left as it was.

    Args:
        kept: gets where the model's forward pass wrote to its modules.
        asleep: names of modules in evaluation mode; all others are in training mode.

    Raises:
        RequestError: the model fails on these examples.
    """
    model = inner.model
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
        with left_as_it_was(model) as written:
            model.train() if inner.batch_norm == "batch" else set_mode(model, True, "frozen")
            for name in asleep:
                model.get_submodule(name).training = False
            with stream(0, x.device):
                expected: Tensor = torch.func.functional_call(
                    model, places, (x,), tie_weights=False
                )
    except Exception as error:
        raise RequestError(
            f"the model fails on the support examples of a task, {form(x)} ({said_by(error)}): give it the form and dtype of the tasks"
        ) from error
    if kept is not None:
        kept |= written
    return expected


def check_rows(prediction: object, x: Tensor) -> None:
    """Refuse what is not one tensor with a row for each example."""
    if not isinstance(prediction, Tensor) or prediction.shape[:1] != x.shape[:1]:
        raise RequestError(
            "the model must answer with one tensor (n, *output), a row for each example: wrap it in a module that does"
        )


def _check_targets(prediction: Tensor, y: Tensor) -> None:
    if prediction.shape != y.shape:
        raise RequestError(
            f"for regression the model must answer in the form of the targets, {tuple(y.shape)} for a task, not {tuple(prediction.shape)}: "
            "reshape one of them"
        )


def _output_width(prediction: Tensor) -> int:
    if prediction.dim() < 2:
        raise RequestError(
            f"for classification the model must answer (n, classes), not {tuple(prediction.shape)}: give it a head of that form"
        )
    return prediction.shape[1]


def _perturbed(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, parameter in model.named_parameters()
    }
    return {
        name: (parameter.detach() + 0.1 * noise[name]).requires_grad_(parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }


def _close(own: Tensor, expected: Tensor) -> bool:
    return own.shape == expected.shape and torch.allclose(
        own, expected, rtol=1e-3, atol=1e-4, equal_nan=True
    )


def _refuse_strangers(what: str, output: Tensor, weights: Iterable[Tensor]) -> None:
    """Refuse leaves of an output's graph that require a gradient and are not among the model's weights."""
    known, seen, waiting = {id(weight) for weight in weights}, set[Any](), [output.grad_fn]
    strangers: list[Tensor] = []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [source for source, _ in node.next_functions]
            if (
                isinstance(leaf := getattr(node, "variable", None), Tensor)
                and id(leaf) not in known
            ):
                strangers.append(leaf)
    if strangers:
        forms = ", ".join(str(tuple(leaf.shape)) for leaf in strangers)
        raise RequestError(
            f"the {what} uses tensors that require a gradient and are no parameters of the model (of shape {forms}), so that nothing would "
            "train them: register them with the model, as by nn.Parameter and nn.ModuleList, or call requires_grad_(False) on them"
        )
