"""A model and its loss are tried on one task before the first step.

An independent copy of the model, called as its user would call it, says what is right. Whatever the
functional model would do otherwise without a word is refused, with the cause.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from metaplug.checks.compare_batching import as_dtype, double, own_functions
from metaplug.checks.model_copy import answer, give_noisy_weights, in_double
from metaplug.checks.module_state import Held, Tally, noting_checkpoints, snapshot
from metaplug.checks.output_form import (
    check_probabilities,
    check_rows,
    check_targets,
    classes_last,
    count_classes,
)
from metaplug.contract.inputs import (
    Inputs,
    count_of,
    map_inputs,
    tensors_of,
)
from metaplug.contract.return_checks import form
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.task_groups import uniform
from metaplug.contract.values import Kind
from metaplug.core.autograd_graph import graph_leaves, graph_nodes
from metaplug.core.functional_model import PLAIN, FunctionalModel, Place, clone, version
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.losses import cross_entropy
from metaplug.core.model_calls import call_model
from metaplug.core.outer_loop import largest
from metaplug.core.vmap_rules import TaskRules
from metaplug.errors import RequestError, quoted, said_by
from metaplug.random_streams import stream

REMEMBERS = (
    "the model answers otherwise when it is asked again, as if it remembered, or drew random "
    "numbers from outside torch's own stream: keep nothing in forward for the next"
)
WRITES = (
    "the model writes to '{}' in forward, which would leak from task to task: "
    "make it constant there"
)
CHECKPOINTED = (
    "the model uses activation checkpointing, which runs forward again in the backward pass, with "
    "weights that are no longer this step's: switch it off; MetaLearner's checkpoint_steps saves "
    "the same memory"
)
OTHER_WEIGHTS = (
    "forward uses the model's own {} and not the weights that it is given, as a stored function "
    "does that closes over a module: reach weights through self, or make that function a method"
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
    probe = _Probe(inner, uniform(batch))
    if probe.checkpointed:
        raise RequestError(CHECKPOINTED)
    check_rows(probe.expected, probe.x)
    probe.refuse_writes()
    probe.refuse_memory()
    inner.functional.watch(probe.written)
    inner.functional.begin(True)
    prediction = probe.predict()
    probe.refuse_sleepers()
    probe.refuse_other_values(prediction)
    probe.refuse_other_gradients(prediction)
    probe.refuse_unregistered("model", prediction, probe.predict())
    inner.query_graph = probe.needs_graph()
    inner.first_order_only = probe.refuses_second_derivative()
    outputs = None
    if kind == "regression":
        check_targets(prediction, probe.y)
    else:
        outputs = count_classes(prediction, probe.y, own_loss=inner.loss is not cross_entropy)
        known = classes_last(probe.ask, prediction, probe.x, probe.y)
        inner.classes_last = inner.classes_last if known is None else known
        if inner.loss is cross_entropy and probe.y.is_floating_point():
            check_probabilities(probe.y)
    batch.check_values(outputs)
    probe.check_loss(prediction)
    return Probed(outputs, frozenset(probe.written))


def written_by_forward(inner: InnerLoop, batch: TaskBatch) -> frozenset[Place]:
    """Return where forward passes on one task write attributes; refuse nothing but a failure."""
    return frozenset(_Probe(inner, uniform(batch), inner.functional.module).written)


class _Probe:
    """One task, and an independent copy of the model with weights that are not its own.

    Attributes:
        x, y: support examples (n, *input) and their targets.
        model: the copy, and `weights`, its parameters by name.
        expected: its answer to x in training mode.
        checkpointed: whether it used activation checkpointing.
        written: where its forward pass writes attributes.
    """

    def __init__(
        self,
        inner: InnerLoop,
        batch: TaskBatch,
        original: nn.Module | None = None,
        functional: FunctionalModel | None = None,
    ) -> None:
        self.inner, self.batch, self.y = inner, batch, batch.support_y[0]
        self.functional = functional or inner.functional
        self.x = map_inputs(lambda each: each[0].clone(), batch.support_x)
        original = self.functional.model if original is None else original
        self.model = clone(original, shared=False)
        self.weights = give_noisy_weights(self.model, original)
        before = snapshot(self.model)
        self._given, self._tensors = versions(self.x), self._values()
        with noting_checkpoints() as noted:
            self.expected = self.ask(self.x)
        self.checkpointed = bool(noted)
        self.written = {
            place for place, value in snapshot(self.model).items() if before.get(place) != value
        }
        # Another number of examples shows what is kept for a number; all would take long.
        count = count_of(self.x)
        others = map_inputs(lambda each: each[-1][: count + 1].clone(), batch.query_x)
        pairs = zip(tensors_of(others), tensors_of(self.x), strict=True)
        if all(torch.equal(one, other) for one, other in pairs):
            others = map_inputs(lambda each: each[:1].expand_as(each).clone(), self.x)
        self.others = others

    def ask(self, x: Inputs, asleep: Collection[str] = ()) -> Tensor:
        """Return the copy's answer in training mode, with these modules in evaluation mode."""
        functional = self.functional
        return answer(self.model, x, functional.batch_norm, functional.output, asleep)

    def predict(self) -> Tensor:
        """Return the functional model's answer to x, with the copy's weights."""
        try:
            with stream(0, self.inner.device), TaskRules():
                prediction: Tensor = self.functional(list(self.weights.values()), self.x)
        except Exception as error:
            raise RequestError(
                f"the model runs, but not with weights that are not its own ({said_by(error)}): "
                "replace that part of it"
            ) from error
        return prediction

    def refuse_writes(self) -> None:
        """Refuse a forward pass that writes to its input, or to the model's parameters or buffers.

        A pass in evaluation mode is looked at too: it may write what training does not.
        """
        if versions(self.x) != self._given:
            raise RequestError(
                "the model changes its input in place, and with it the data of the next inner "
                "step: give it operations that make new tensors"
            )
        self._refuse_written_tensors()
        with torch.no_grad(), stream(0, self.inner.device), _tolerated():
            self.model.eval()
            call_model(self.model, self.x, self.functional.output)
        self._refuse_written_tensors()

    def refuse_memory(self) -> None:
        """Refuse a model that answers otherwise after other forward passes than at first."""
        original = self.functional.model
        fresh = clone(original, shared=False)
        give_noisy_weights(fresh, original)
        after, at_first = None, None
        with torch.no_grad(), _tolerated():
            after = self.ask(self.others)
            functional = self.functional
            at_first = answer(fresh, self.others, functional.batch_norm, functional.output)
        if after is not None and at_first is not None and not _close(after, at_first):
            raise RequestError(REMEMBERS)
        for _ in range(2):  # after other examples, and after its own
            numbers = snapshot(self.model)
            with torch.no_grad():
                again = self.ask(self.x)
            if not _close(again, self.expected):
                raise RequestError(REMEMBERS)
        # A number that goes on changing may matter later than a few passes can show.
        now = snapshot(self.model)
        for path, name in self.written:
            value = vars(self.model.get_submodule(path)).get(name)
            before, after = numbers.get((path, name)), now.get((path, name))
            if before == after:
                continue
            counted = isinstance(value, PLAIN) and value == value and self._reads(path, name)  # noqa: PLR0124
            # An array, a tensor or an object of the user's is not put back after a pass.
            if counted or (isinstance(after, Held) and after.same_place(before)):
                raise RequestError(WRITES.format(f"{path}.{name}".lstrip(".")))

    def refuse_sleepers(self) -> None:
        """Refuse layers in evaluation mode in a model in training mode, if they differ by it."""
        model = self.functional.model
        asleep = [
            name for name, each in model.named_modules() if model.training and not each.training
        ]
        own = self.functional.batch_norm == "batch"
        frozen = [name for name in asleep if own and _stores_statistics(model.get_submodule(name))]
        if frozen or (asleep and not _close(self.ask(self.x, asleep), self.expected)):
            differ = (
                name
                for name in asleep
                if name in frozen or not _close(self.ask(self.x, [name]), self.expected)
            )
            raise RequestError(
                f"the layer '{next(differ, asleep[0])}' is in evaluation mode in a model in "
                "training mode, but meta-training is in training mode throughout: call "
                "model.train(), and set what the layer is to do (dropout p = 0, batch_norm = "
                "'frozen')"
            )

    def refuse_other_values(self, prediction: Tensor) -> None:
        """Refuse a functional model whose answer is not the copy's."""
        self._refuse_closures(prediction)
        self._refuse_closures(self.expected)
        if not _close(prediction, self.expected) and not self._agrees_in_double():
            raise RequestError(
                "the model answers otherwise with torch.func.functional_call than when it is "
                "called (its forward reads weights from elsewhere than its modules, or random "
                "numbers from outside torch): replace that part of the model"
            )

    def refuse_other_gradients(self, prediction: Tensor) -> None:
        """Refuse a gradient that is not the copy's, or no longer so after a later forward pass."""
        if not self._gradients_agree(prediction) and not self._agrees_in_double():
            raise RequestError(
                "the gradient of the model does not follow the weights of its forward pass (a "
                "backward pass that runs forward again, or an operation that has no gradient): "
                "replace that part of the model"
            )

    def refuse_unregistered(self, what: str, output: Tensor, again: Tensor) -> None:
        """Refuse leaves of an output's graph that require a gradient and are no given weights.

        Args:
            again: another output; a leaf that forward makes anew, as an energy's input, is not of
                its graph.
        """
        self._refuse_closures(output, what)
        known = {id(weight) for weight in self.weights.values()}
        stay = {id(leaf) for leaf in graph_leaves(again)} - known
        if leaves := [leaf for leaf in graph_leaves(output) if id(leaf) in stay]:
            forms = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise RequestError(
                f"the {what} uses tensors that require a gradient and are no parameters of the "
                f"model (of shape {forms}), so that nothing would train them: register them with "
                "the model, as by nn.Parameter and nn.ModuleList, or call requires_grad_(False) on "
                "them"
            )

    def needs_graph(self) -> bool:
        """Return whether forward differentiates itself, and so fails where autograd is off."""
        functional = self.functional
        weights = [weight.detach() for weight in self.weights.values()]
        functional.begin(False)
        try:
            with torch.no_grad(), stream(0, self.inner.device):
                functional(weights, self.x)
        except RuntimeError as error:
            return "does not require grad" in str(error) or "does not have a grad_fn" in str(error)
        except Exception:
            return False  # the evaluation that meets it says so
        finally:
            functional.begin(True)
        return False

    def refuses_second_derivative(self) -> bool:
        """Return whether the graph of a first derivative holds torch's error for a second one.

        autograd.grad never visits it, as it does not lie on the way to the weights: it would leave
        that part of the second derivative out.
        """
        trained = [weight for weight in self.weights.values() if weight.requires_grad]
        prediction = self.predict()
        if not prediction.requires_grad:
            return False
        value = prediction.square().sum()
        try:
            taken = torch.autograd.grad(value, trained, create_graph=True, allow_unused=True)
        except RuntimeError:
            return False  # the inner loop meets it, too
        nodes = [node for each in taken if each is not None for node in graph_nodes(each)]
        return any(node.name() == "torch::autograd::Error" for node in nodes)

    def check_loss(self, prediction: Tensor) -> None:
        """Refuse a loss of another form, one that remembers, and one with weights of its own."""
        try:
            loss = self.inner.loss(prediction, self.y)
        except Exception as error:
            raise RequestError(
                f"the loss fails on the model's output ({_form(prediction)}) and the targets of a "
                f"task ({form(self.y)}): {said_by(error)}; give a loss that takes both"
            ) from error
        if not isinstance(loss, Tensor) or loss.shape != ():
            raise RequestError(
                "the loss must answer with one number for a task, a tensor of shape (): "
                "take the mean over its examples"
            )
        alone = prediction.detach()  # what is in the graph now is the loss's own
        with stream(0, self.inner.device):
            first = self.inner.loss(alone, self.y)
        with stream(0, self.inner.device):
            second = self.inner.loss(alone, self.y)
        if not _close(second, first):
            raise RequestError(
                "the loss answers otherwise when it is asked again, as if it remembered, so that "
                "tasks would see each other: keep nothing in it"
            )
        self.refuse_unregistered("loss", first, second)

    def _gradients_agree(self, prediction: Tensor) -> bool:
        """Return whether the gradient is the copy's, after a later forward pass too."""
        trained = [weight for weight in self.weights.values() if weight.requires_grad]
        if not self.expected.requires_grad:
            return True  # the inner loop says so where it asks for a gradient
        with stream(0, self.inner.device):
            self.functional([2 * weight for weight in self.weights.values()], self.x)
        ours, expected = (_gradients(output, trained) for output in (prediction, self.expected))
        if ours is None or expected is None:
            return False
        # A gradient that is zero up to rounding, as a bias's before batch norm, has errors that go
        # with the terms of its sum: with all gradients, not with its own value.
        scale = max((largest(each).item() for each in expected if each.numel()), default=0.0)
        pairs = zip(ours, expected, strict=True)
        return all(_close(own, each, max(scale, 1)) for own, each in pairs)

    def _agrees_in_double(self) -> bool:
        """Return whether the functional model is right in float64: what differs is then rounding.

        Rounding has no bound that results show. Terms that are equal, as those of an image's
        constant background, round alike, so their errors add up; and within rounding of a kink, or
        of two equal maxima, a pass may take the other branch. In float64 both are too small or too
        rare to matter, and a wrong gradient is as wrong as before. A tie that holds for all weights
        stays one, but its branches have the same derivative.
        """
        if self.expected.dtype == double(self.expected.dtype):
            return False
        functional = self.functional
        try:
            wide = in_double(functional.model)
            functional = FunctionalModel(wide, functional.batch_norm, functional.output)
            batch = self.batch.map(lambda each: as_dtype(each, torch.float64))
            probe = _Probe(self.inner, batch, functional=functional)
            functional.watch(probe.written)
            prediction = probe.predict()
            # An operation for float32 alone is not looked at in float64.
            looked_at = own_functions(self.expected) <= own_functions(probe.expected)
            right = _close(prediction, probe.expected) and probe._gradients_agree(prediction)
        except Exception:
            return False  # it takes no float64: float32 decides
        return looked_at and right

    def _refuse_closures(self, output: Tensor, what: str = "model") -> None:
        """Refuse the model's own weights in a graph, which the fast weights should stand in."""
        leaves = {id(leaf) for leaf in graph_leaves(output)}
        named = self.functional.model.named_parameters()
        if own := [name for name, parameter in named if id(parameter) in leaves]:
            if what == "loss":
                raise RequestError(
                    f"the loss reads the model's own {quoted(own[:3])}, not the fast weights of a "
                    "task: give what it makes of weights to a plugin's transform_inner_losses, "
                    "which finds them in step.parameters"
                )
            raise RequestError(OTHER_WEIGHTS.format(quoted(own[:3])))

    def _values(self) -> dict[str, tuple[int, int, Tensor]]:
        """Identity, version and value of every parameter and buffer of the copy."""
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {
            name: (id(each), version(each), each.detach().clone()) for name, each in named.items()
        }

    def _refuse_written_tensors(self) -> None:
        parameters = dict(self.model.named_parameters())
        for name, now in self._values().items():
            before = self._tensors.get(name)
            if before and before[:2] == now[:2] and _same(before[2], now[2]):
                continue
            if before is None:
                raise RequestError(
                    f"the model makes its '{name}' in forward: pass one batch through the model "
                    "first, or make it in __init__"
                )
            if name not in parameters:
                raise RequestError(
                    "the model writes to a buffer in forward, which would leak from task to task: "
                    "make its buffers constant in training"
                )
            raise RequestError(
                f"the model writes to its parameter '{name}' in forward (Embedding(max_norm=...) "
                "does, and statistics that are kept as parameters), but a task's weights change by "
                "its inner steps alone: compute the value anew in forward, without writing it"
            )

    def _reads(self, path: str, name: str) -> bool:
        """Return whether forward does anything with a number that it writes but add to it."""
        attributes = vars(self.model.get_submodule(path))
        attributes[name] = Tally()
        try:
            with torch.no_grad():
                self.ask(self.x)
        except Exception:
            return True
        return not isinstance(attributes.get(name), (Tally, *PLAIN))


def versions(x: Inputs) -> list[int]:
    """Return how often each tensor was written to in place."""
    return [version(each) for each in tensors_of(x)]


def _stores_statistics(module: nn.Module) -> bool:
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return norm and module.running_mean is not None


@contextmanager
def _tolerated() -> Iterator[None]:
    """Errors inside are left to where they matter: these examples may be too few for the model."""
    try:
        yield
    except Exception:
        return


def _gradients(output: Tensor, trained: list[Tensor]) -> list[Tensor] | None:
    try:
        taken = torch.autograd.grad(output.sum(), trained, allow_unused=True)
    except RuntimeError:
        return None
    return [
        torch.zeros_like(weight) if one is None else one.to_dense() if one.is_sparse else one
        for one, weight in zip(taken, trained, strict=True)
    ]


def _close(own: Tensor, expected: Tensor, scale: float = 1.0) -> bool:
    return own.shape == expected.shape and torch.allclose(
        own, expected, rtol=1e-3, atol=1e-4 * scale, equal_nan=True
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _form(value: object) -> str:
    return form(value) if isinstance(value, Tensor) else type(value).__name__
