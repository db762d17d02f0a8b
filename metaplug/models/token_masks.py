"""From a mask of tokens to masks of attention and weights of pooling, in tensor operations alone.

The library's own mask building branches on values, which vmap and tracing refuse.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Pooling: TypeAlias = Literal["mean", "cls", "last"]


def kept_tokens(attention_mask: Tensor) -> Tensor:
    """Find the tokens that count.

    Args:
        attention_mask: (n, tokens), 1 or True for a token that counts; or a mask of attention
            (n, 1, 1 or tokens, tokens), True or 0.0 where a query may look at a key. The last
            query may look at every token that counts, in causal models too.

    Returns:
        (n, tokens), bool.
    """
    if attention_mask.ndim == 2:
        return attention_mask != 0
    last = attention_mask[:, 0, -1, :]
    return last if last.dtype == torch.bool else last == 0


def additive_mask(kept: Tensor, dtype: torch.dtype, *, causal: bool) -> Tensor:
    """Build the mask (n, 1, tokens, tokens) that is added to scores of attention.

    It is 0 where query i may look at key j: j is kept and, in a causal model, j <= i. Elsewhere it
    is the least finite number, not -inf: a query that may look nowhere, of an example that is all
    padding, would turn into nan.

    Args:
        kept: (n, tokens), bool.
        dtype: of the scores.
    """
    tokens = kept.shape[1]
    allowed = kept[:, None, None, :].expand(-1, 1, tokens, tokens)
    if causal:
        place = torch.arange(tokens, device=kept.device)
        allowed = allowed & (place[None, :] <= place[:, None])
    shut = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=kept.device)
    return torch.where(allowed, torch.zeros_like(shut), shut)


def pooled(hidden: Tensor, kept: Tensor, pooling: Pooling) -> Tensor:
    """Pool hidden states (n, tokens, width) to (n, width).

    mean: sum_t kept_t h_t / sum_t kept_t; cls: the first kept token's; last: the last kept
    token's. An example without a kept token gives zeros.
    """
    weights = kept.to(hidden.dtype)
    if pooling == "cls":
        weights = weights * (kept.cumsum(1) == 1)
    elif pooling == "last":
        weights = weights * (kept.cumsum(1) == kept.sum(1, keepdim=True))
    else:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return (weights[:, :, None] * hidden).sum(1)
