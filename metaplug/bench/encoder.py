"""A transformer encoder in plain torch: all of it trained, or adapters of a frozen body."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, VOCABULARY = 24, 1000


class Encoder(nn.Module):
    """Embed tokens, run pre-norm layers, and classify the mean over the tokens.

    (n, TOKENS) whole numbers below VOCABULARY → (n, ways). No token is padding, nothing is dropped.
    """

    def __init__(self, width: int, layers: int, heads: int, ways: int = 5) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(TOKENS, width)
        blocks = [_Block(width, heads) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.tokens(x) + self.places(torch.arange(TOKENS, device=x.device))
        logits: Tensor = self.head(self.blocks(embedded).mean(-2))
        return logits


class _Block(nn.Module):
    """Attention, then two linear layers, each with layer norm before and the input added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.mlp_norm = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        projections = (nn.Linear(width, width) for _ in range(4))
        self.query, self.key, self.value, self.out = projections
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(wide, nn.GELU(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        by_head = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(*by_head).transpose(-2, -3).flatten(-2)
        x = x + self.out(attended)
        changed: Tensor = x + self.mlp(self.mlp_norm(x))
        return changed


class _LowRank(nn.Module):
    """A frozen linear layer with a change of low rank that is trained: W x + c + B A x.

    B is 0 at first (Hu et al. 2022, sec. 4.1), with their alpha / rank at 1.
    """

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.frozen(x) + self.up(self.down(x))
        return changed


def with_adapters(encoder: Encoder, rank: int) -> Encoder:
    """Freeze all but the head, and add adapters to the query and value of every layer."""
    encoder.requires_grad_(False)
    encoder.head.requires_grad_(True)
    for block in encoder.blocks[:-1]:
        for name in ("query", "value"):
            setattr(block, name, _LowRank(getattr(block, name), rank))
    return encoder
