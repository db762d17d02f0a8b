"""The model as a function of its weights, by `torch.func.functional_call`.

The call runs on a clone that shares the parameters and buffers of the user's model, so training
mode, batch norm settings and what forward passes write on modules never reach that model.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaplug.contract.inputs import Inputs
from metaplug.core.hooks import CopiedHooks
from metaplug.core.model_calls import MaskForm, Output, arguments, expand_mask, prediction_of
from metaplug.errors import RequestError, RunError, said_by

Place = tuple[str, str]
"""A module's path in its model, and the name of an attribute."""

PLAIN: tuple[type, ...] = (bool, int, float, complex, str)
"""The types of attributes that count as settings."""

_CONTAINERS = (list, set, deque, dict, OrderedDict, defaultdict)


class FunctionalModel:
    """Calls a model with weights from outside; nothing of the model itself changes by it.

    Args:
        model: any `nn.Module` that `copy.deepcopy` takes.
        batch_norm: "batch" (statistics of each call's own examples) or "frozen" (the stored ones).
        output: the part of the model's answer that is its prediction.

    Attributes:
        mask: how `attention_mask` is expanded before the model sees it, and whether to numbers
            that are added to scores; None leaves it to the model.

    Raises:
        RequestError: the model cannot be copied; the reason is named.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> FunctionalModel(model, "batch")([torch.tensor([[1.0, 2.0]])], torch.ones(1, 2))
        tensor([[3.]])
    """

    def __init__(self, model: nn.Module, batch_norm: str, output: Output = None) -> None:
        self.model, self.batch_norm, self.output = model, batch_norm, output
        self.mask: tuple[MaskForm, bool] | None = None
        self.module = clone(model)
        self._hooks = CopiedHooks(model, self.module)
        index = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        # named_modules yields a module once, even where it stands at two places: functional_call
        # would swap its weights twice, and put the first swap's weights back as its own.
        self._places = {
            f"{path}.{name}".lstrip("."): index[id(parameter)]
            for path, module in self.module.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        set_mode(self.module, True, batch_norm)
        self._training = True
        own = dict(model.named_modules())
        self._buffers = [
            (own[path]._buffers, module._buffers, name)
            for path, module in self.module.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._holders = [
            (f"{path}.{name}".lstrip("."), holder, name)
            for path, module in own.items()
            for holder in (module._parameters, module._buffers)
            for name, tensor in holder.items()
            if tensor is not None
        ]
        self.watch(())

    def __call__(self, weights: Sequence[Tensor], x: Any) -> Any:
        """Return the model's output for one task's examples.

        Args:
            weights: in the order of `model.parameters()`, each of its parameter's shape.
            x: (n, *input), or a mapping or tuple of such tensors.
        """
        values = {place: weights[index] for place, index in self._places.items()}
        positional, named = arguments(x)
        try:
            answer = functional_call(self.module, values, positional, named, tie_weights=False)
            return prediction_of(answer, self.output)
        finally:
            # At once, not after the step: no task may see what another one's pass left behind.
            self._written.put_back()

    def inputs(self, x: Inputs, dtype: torch.dtype) -> Inputs:
        """Return the inputs of all tasks as the model takes them, masks expanded once for all."""
        if self.mask is None:
            return x
        form, added = self.mask
        mask = expand_mask(x["attention_mask"], form, dtype if added else None)
        return {**x, "attention_mask": mask}

    def begin(self, training: bool) -> None:
        """Set the mode, and take over other buffers, and hooks that came or went."""
        self._hooks.follow()
        if self._training is not training:
            set_mode(self.module, training, self.batch_norm)
            self._written.accept("training")
            self._training = training
        for own, shared, name in self._buffers:
            if shared[name] is not own[name]:
                shared[name] = own[name]

    def watch(self, places: Collection[Place]) -> None:
        """Put back what calls write at these modules, and at those that are not torch's own."""
        self._hooks.follow()
        for own, module in zip(self.model.modules(), self.module.modules(), strict=True):
            # Of which kind hooks are is an attribute of its own.
            module._is_full_backward_hook = own._is_full_backward_hook
        paths = {path for path, _ in places}
        self._written = Attributes(
            module
            for path, module in self.module.named_modules()
            if path in paths
            or isinstance(module, nn.RNNBase)  # it would keep the last weights alive
            or not type(module).__module__.startswith("torch.nn.")
        )

    @contextmanager
    def unwritten(self) -> Iterator[None]:
        """Inside, a call that writes in place to the user's parameters or buffers is an error.

        Raises:
            RunError: one was written to. It cannot be undone, so it is not passed over.
        """
        before = [version(holder[name]) for _, holder, name in self._holders]
        yield
        for (path, holder, name), seen in zip(self._holders, before, strict=True):
            if version(holder[name]) != seen:
                raise RunError(
                    f"the model wrote to its own '{path}' in forward, as no pass before it did, "
                    "and its value is no longer the trained one: go on from a checkpoint, and let "
                    "forward make new tensors"
                )


def clone(model: nn.Module, *, shared: bool = True) -> nn.Module:
    """Return a copy of a model that has its parameters, and its other tensors as asked.

    Hooks are shared but for methods of the model's modules, which become those of the copy's.

    Args:
        shared: whether the copy has the model's own buffers.

    Raises:
        RequestError: the model, or something that it holds, cannot be copied.
    """
    tensors = [*model.parameters(), *(model.buffers() if shared else ())]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    for module in model.modules():
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                memo |= {id(one): one for one in value.values()}
            # deepcopy refuses tensors with a graph, as a model that was called before may keep.
            memo |= {
                id(each): each.detach() for each in _tensors(value) if each.grad_fn is not None
            }
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise RequestError(
            f"the model cannot be copied ({said_by(error)}), but tasks run on a copy of its "
            "structure, so that yours stays as it is: leave out of its attributes what "
            "copy.deepcopy refuses, or give its class a __deepcopy__"
        ) from error
    CopiedHooks(model, copied)
    return copied


def give_parameters(model: nn.Module, new: Mapping[int, nn.Parameter]) -> None:
    """Put parameters in the place of those of a clone, by the identity of the old ones."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = new[id(old)]
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


class Attributes:
    """The attributes of modules as they are now, with the contents of their containers."""

    def __init__(self, modules: Any) -> None:
        self._held = [(vars(module), dict(vars(module))) for module in modules]
        own = (
            value
            for _, before in self._held
            for name, value in before.items()
            if name not in _TORCHS_OWN
        )
        self._contents = [(each, copy.copy(each)) for each in _containers(own, set())]

    def accept(self, name: str) -> None:
        """Take over what stands at an attribute now."""
        for now, before in self._held:
            before[name] = now[name]

    def put_back(self) -> None:
        """Give the modules these attributes again."""
        for now, before in self._held:
            if len(now) != len(before) or any(
                now.get(name, self) is not value for name, value in before.items()
            ):
                now.clear()
                now.update(before)
        for container, before in self._contents:
            if _identities(container) != _identities(before):
                container.clear()
                fill = container.extend if isinstance(container, list | deque) else container.update
                fill(before)


def set_mode(module: nn.Module, training: bool, batch_norm: str) -> None:
    """Set the mode, and what `batch_norm` says for layers that keep statistics."""
    module.train(training)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            if batch_norm == "batch":
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            else:
                layer.eval()


def version(tensor: Tensor | None) -> int:
    """Return how often a tensor was written to in place; 0 where torch does not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | set | deque):
        yield from chain.from_iterable(map(_tensors, value))
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_tensors, value.values()))


def _containers(values: Iterable[Any], seen: set[int]) -> Iterator[Any]:
    """Yield the containers among values, and those within them, each once."""
    for value in values:
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            yield value
            yield from _containers(value.values() if isinstance(value, dict) else value, seen)


def _identities(container: Any) -> list[int]:
    if isinstance(container, dict):
        return [id(each) for pair in container.items() for each in pair]
    return [*map(id, container)]


_TORCHS_OWN = frozenset(vars(nn.Module()))
