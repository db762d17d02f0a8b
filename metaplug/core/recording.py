"""How autograd records where metaplug computes, whatever the caller has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize


@contextmanager
def recording() -> Iterator[None]:
    """Inside, autograd records to any order, whatever surrounds the call.

    Nothing is cast by a surrounding autocast. Attention runs by its math kernel, since the fused
    ones, and the fast path of torch's own layers at evaluation, have no second derivative. A
    surrounding `parametrize.cached` does not reach in: it would keep the weights of one step, or of
    all tasks stacked, for the next.
    """
    cached = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as inside:
            inside.enter_context(torch.inference_mode(False))
            inside.enter_context(torch.enable_grad())
            inside.enter_context(sdpa_kernel(SDPBackend.MATH))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    inside.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        parametrize._cache_enabled, parametrize._cache = cached
