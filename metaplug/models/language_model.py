"""Language models: a body of transformers, pooling over tokens, and a linear head."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from metaplug.errors import RequestError, said_by
from metaplug.models.body_and_head import BodyAndHead
from metaplug.models.token_masks import additive_mask, kept_tokens, pooled

_PLACES = ("position_embeddings", "wpe", "embed_positions")
"""Names of layers that hold a vector for every place in a text."""


@final
class LanguageModel(BodyAndHead):
    """From tokens to logits: head(pool(body(tokens))).

    Raises:
        RequestError: the body is no plain encoder or decoder, or the tasks have images.
    """

    def try_body(self) -> tuple[int, tuple[Tensor, ...]]:
        """Return the hidden width, and two texts, the second of which is padded."""
        if len(self.input_shape) > 1:
            raise RequestError(
                f"{self.name} takes texts, but the tasks have inputs {self.input_shape}: choose "
                "tasks of texts, such as text:FILE"
            )
        body = self.body
        self.is_causal = any(getattr(layer, "is_causal", False) for layer in body.modules())
        self.most_tokens, self.why_most = _most_tokens(body)
        place = torch.arange(8, device=body.device).view(2, 4)
        ids, mask = place % body.config.get_text_config().vocab_size, (place < 7).long()
        return self._width(ids, mask), (ids, mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Answer n texts with (n, outputs) in the head's dtype; arguments as of `features`."""
        logits: Tensor = self.head(self.features(input_ids, attention_mask))
        return logits

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed n texts as what the head is given.

        Args:
            input_ids: (n, tokens), whole numbers.
            attention_mask: (n, tokens), 1 for a token that counts; a mask of attention
                (n, 1, 1 or tokens, tokens) is read as the tokens that its last query may look at.

        Returns:
            (n, width), of the head's dtype.

        Raises:
            RequestError: there are more tokens than the body can tell apart by place.
        """
        tokens = input_ids.shape[1]
        if self.most_tokens is not None and tokens > self.most_tokens:
            raise RequestError(
                f"a text has {tokens} tokens, but {self.name} takes {self.most_tokens} "
                f"({self.why_most}): cut texts there, by tasks.settings.max_length"
            )
        kept = kept_tokens(attention_mask)
        hidden = self._hidden(input_ids, kept).to(self.head.weight.dtype)
        return pooled(hidden, kept, self.config.pooling)

    def _hidden(self, input_ids: Tensor, kept: Tensor) -> Tensor:
        mask = additive_mask(kept, self.body.dtype, causal=self.is_causal)
        hidden: Tensor = self.body(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden

    @torch.no_grad()
    def _width(self, ids: Tensor, mask: Tensor) -> int:
        """Compare with the library's own reading of the mask, and return the hidden width.

        Some architectures read more from it than whom attention may look at, such as places.
        """
        kept = mask == 1
        try:
            own = self._hidden(ids, kept)
            if own.is_meta:  # there are no values to compare
                return own.shape[-1]
            theirs = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        except Exception as error:
            raise self._unfit(f"fails on a text of four tokens ({said_by(error)})") from error
        difference = ((own - theirs) * kept[:, :, None]).abs().max()
        if difference > torch.finfo(own.dtype).eps ** 0.5 * theirs.abs().max().clamp(min=1):
            raise self._unfit("answers otherwise by a mask of attention than by one of tokens")
        return own.shape[-1]

    def _unfit(self, reason: str) -> RequestError:
        return RequestError(
            f"the model '{self.name}' ({type(self.body).__name__}) {reason}: choose another, or "
            "make it in a MODULE:FACTORY of your own"
        )


def _most_tokens(body: Any) -> tuple[int | None, str]:
    """How many tokens the body takes, and why; None for any number."""
    limits: list[tuple[int, str]] = []
    for key, layer in body.named_modules():
        if isinstance(layer, nn.Embedding) and key.rpartition(".")[2] in _PLACES:
            before = 0 if layer.padding_idx is None else layer.padding_idx + 1
            limits.append((layer.num_embeddings - before, "the places that it knows"))
    for field in ("sliding_window", "attention_chunk_size"):
        window = getattr(body.config.get_text_config(), field, None)
        if isinstance(window, int):
            # Up to here, a layer of limited attention sees every token.
            limits.append((window, f"its {field}"))
    return min(limits, default=(None, ""))
