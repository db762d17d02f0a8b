"""A piece of a computation whose graph is not kept: the backward pass makes it again.

torch's own checkpoint would run the piece once more for every inner gradient that is taken inside
it, as that gradient already asks for the graph that was not kept. Here the first run keeps nothing
and takes inner gradients in first order; the second makes the whole graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Piece = Callable[..., Any]
"""(inputs, graph=bool) → outputs, each a nesting of containers with tensors; with `graph` the
outputs can be differentiated twice."""


def rematerialize(piece: Piece, inputs: Any, parameters: Sequence[Tensor]) -> Any:
    """Return `piece(inputs)`, differentiable once, with the memory of its inputs and outputs alone.

    Args:
        piece: depends on nothing that is differentiated but `inputs` and `parameters`. It runs
            twice, with the same random numbers.
        inputs: containers with tensors; one tensor that stands in two places stays one.
        parameters: leaf tensors that the piece uses without being given them.

    Raises:
        RuntimeError: in a second derivative, which the graph that is made again does not reach.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> rematerialize(lambda inputs, graph: inputs["x"] ** 2, {"x": x}, []).backward()
        >>> x.grad
        tensor(6.)
    """
    leaves, spec = tree_flatten(inputs)
    unique = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    places = {key: place for place, key in enumerate(unique)}
    arguments = [places[id(leaf)] if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
    run = _Run(piece, arguments, spec, len(unique))
    found = iter(_Rematerialized.apply(run, *unique.values(), *parameters))
    assert run.outputs is not None
    rest, output_spec = run.outputs
    return tree_unflatten([next(found) if leaf is None else leaf[0] for leaf in rest], output_spec)


class _Run:
    """The piece with the form of its inputs and outputs, and the random state it began with."""

    def __init__(self, piece: Piece, places: Sequence[Any], spec: TreeSpec, count: int) -> None:
        self.piece, self.places, self.spec, self.count = piece, places, spec, count
        self.outputs: tuple[list[Any], TreeSpec] | None = None
        self.random = [generator.get_state() for generator in _generators()]

    def __call__(self, tensors: Sequence[Tensor], *, graph: bool) -> list[Tensor]:
        given = [tensors[each] if isinstance(each, int) else each[0] for each in self.places]
        with torch.enable_grad():
            leaves, spec = tree_flatten(self.piece(tree_unflatten(given, self.spec), graph=graph))
        self.outputs = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], spec
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class _Rematerialized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in run(_leaves(tensors[: run.count]), graph=False))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        leaves = _leaves(ctx.saved_tensors[: run.count])
        with _again(run.random):
            outputs = run(leaves, graph=True)
        pairs = [
            (output, given)
            for output, given in zip(outputs, gradients, strict=True)
            if given is not None and output.requires_grad
        ]
        sources = [*leaves, *ctx.saved_tensors[run.count :]]
        wanted = [source for source in sources if source.requires_grad]
        if not pairs:
            return None, *(None for _ in sources)
        ends, given = zip(*pairs, strict=True)
        with torch.enable_grad():
            taken = torch.autograd.grad(ends, wanted, given, allow_unused=True)
        if torch.is_grad_enabled():  # a second derivative is asked for, or may be
            asked = [each for each in (*gradients, *ctx.saved_tensors) if each is not None]
            taken = _NoSecondDerivative.apply(len(taken), *taken, *asked)
        found = iter(taken)
        return None, *(next(found) if source.requires_grad else None for source in sources)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients on, and refuses to be differentiated.

    The recomputed graph ends at new leaves, so the second derivative would be cut without a word.
    torch's once_differentiable does not help: autograd.grad never visits its error, which stands
    beside the way to the inputs. This one stands on it.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if each is None else each.detach() for each in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> NoReturn:
        raise RuntimeError(
            "steps that are recomputed (checkpoint_steps) cannot be differentiated twice: "
            "leave checkpoint_steps out"
        )


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]


def _generators() -> list[torch.Generator]:
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.default_generator, *(torch.cuda.default_generators if used else ())]


@contextmanager
def _again(states: Sequence[Tensor]) -> Iterator[None]:
    """Inside, random numbers start from these states; outside they go on as they were."""
    generators = _generators()
    before = [generator.get_state() for generator in generators]
    try:
        for generator, state in zip(generators, states, strict=False):
            generator.set_state(state)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
