"""The base of what looks at, or changes, the torch functions that run while it is active."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class FunctionMode(TorchFunctionMode):
    """A mode whose subclasses say in `call` what becomes of each torch function.

    Torch takes `types` and optional arguments; no mode here needs them as they come.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the call gives; here, what torch's own gives."""
        return func(*args, **kwargs)
