"""What the inner loop cannot change of a model is computed once a batch, not once a step.

Modules below the first adapted layer see the same inputs and weights in every inner step. Their
outputs are kept from the first pass of a batch, with the graph to weights that are meta-learned but
not adapted, so values and meta-gradients are those of computing them anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from metaplug.core.stacked_tensors import as_stacked, from_stacked

Call = tuple[str, int]
"""A module's path, and which of its calls in one forward pass."""


class FrozenFeatures:
    """Keeps the outputs of some modules of a model from pass to pass, within one batch.

    Args:
        model: whose modules' forward methods are wrapped.
        calls: what is kept.
        parameters: names of the parameters that these modules read.

    Attributes:
        parameters: as given.
    """

    def __init__(self, model: nn.Module, calls: frozenset[Call], parameters: tuple[str, ...]):
        self.parameters, self._calls = parameters, calls
        self._kept: dict[Hashable, dict[Call, Any]] | None = None
        self._now: dict[Call, Any] | None = None
        self._count: Counter[str] = Counter()
        self._modules = {path: model.get_submodule(path) for path, _ in calls}
        self._before = {path: vars(each).get("forward") for path, each in self._modules.items()}
        for path, module in self._modules.items():
            module.forward = self._keeping(path, module.forward)

    def remove(self) -> None:
        """Give the modules their own forward methods again."""
        for path, module in self._modules.items():
            give_forward(module, self._before[path])

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Inside, one batch is computed; afterwards nothing of it is kept."""
        before, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = before

    @contextmanager
    def examples(self, of: Hashable) -> Iterator[None]:
        """Inside, one forward pass runs on these examples: what an earlier one kept is used.

        Outside of a batch, as in the passes that hooks of the outer loop ask for, all is computed
        anew: these may be differentiated by themselves, and a graph that is kept only once.
        """
        self._now = None if self._kept is None else self._kept.setdefault(of, {})
        self._count = Counter()
        try:
            yield
        finally:
            self._now = None

    def versions(self) -> dict[Call, list[int]]:
        """Return how often each output that is kept now was written to in place."""
        return {
            call: [leaf._version for leaf, _ in leaves if isinstance(leaf, Tensor)]
            for kept in (self._kept or {}).values()
            for call, (leaves, _) in kept.items()
        }

    def fit(self, values: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> bool:
        """Whether values are the first ones of this batch, for all that the kept modules read."""
        return all(values[name] is initial[name] for name in self.parameters)

    def _keeping(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def kept_forward(*args: Any, **kwargs: Any) -> Any:
            call = path, self._count[path]
            self._count[path] += 1
            if self._now is None or call not in self._calls:
                return forward(*args, **kwargs)
            if call in self._now:
                leaves, form = self._now[call]
                return tree_unflatten([from_stacked(*each) for each in leaves], form)
            answer = forward(*args, **kwargs)
            leaves, form = tree_flatten(answer)
            self._now[call] = [as_stacked(each) for each in leaves], form
            return answer

        return kept_forward


def give_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """Give a module its class's forward method again, or one that was its own before."""
    vars(module).pop("forward", None)
    if own is not None:
        module.forward = own
