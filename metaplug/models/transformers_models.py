"""A body of transformers, pooling, and a linear head, as a module from tensors to logits."""

from __future__ import annotations

import inspect
from typing import Any, final

import torch
from torch import Tensor, nn

from metaplug.errors import RequestError, said_by
from metaplug.models.lora import add_adapters
from metaplug.models.parts import check_images
from metaplug.models.token_masks import additive_mask, kept_tokens, pooled
from metaplug.models.trained_part import freeze_unused, last_layers
from metaplug.models.transformers_config import TransformersConfig
from metaplug.models.zoo_model import ZooModel

_HEAD_STD = 0.02  # as the library starts its heads


class _BodyAndHead(ZooModel):
    """What both kinds of models share. `body` is in evaluation mode when this is made."""

    config: TransformersConfig

    def __init__(
        self,
        name: str,
        body: Any,
        input_shape: tuple[int, ...],
        outputs: int,
        config: TransformersConfig,
    ) -> None:
        super().__init__(name, input_shape, outputs, config)
        self.body = body

    def _train_with_head(self, width: int, *example: Tensor) -> None:
        """Add a head for hidden states of this width, and choose what is trained."""
        if self.config.train == "lora":
            add_adapters(self.name, self.body, self.config)
        else:
            self.body.requires_grad_(self.config.train == "all")
        if self.config.train == "last":
            for layer in last_layers(self.name, self.body, self.config.last_layers):
                layer.requires_grad_(True)
        # A float32 head beside a body in bfloat16 keeps small steps.
        name = "float32" if self.config.dtype == "bfloat16" else self.config.dtype
        self.head = nn.Linear(width, self.outputs, dtype=getattr(torch, name))
        nn.init.normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)
        freeze_unused(self, *example)


@final
class LanguageModel(_BodyAndHead):
    """From tokens to logits: head(pool(body(tokens))).

    Raises:
        RequestError: the body is no plain encoder or decoder, or the tasks have images.
    """

    def __init__(
        self,
        name: str,
        body: Any,
        input_shape: tuple[int, ...],
        outputs: int,
        config: TransformersConfig,
    ) -> None:
        if len(input_shape) > 1:
            raise RequestError(
                f"{name} takes texts, but the tasks have inputs {tuple(input_shape)}: choose tasks "
                "of texts, such as text:FILE"
            )
        super().__init__(name, body, input_shape, outputs, config)
        self.is_causal = any(getattr(layer, "is_causal", False) for layer in body.modules())
        self.most_tokens, self.why_most = _most_tokens(body)
        # Two texts, the second of which is padded.
        ids = torch.arange(8, device=body.device).view(2, 4) % body.config.vocab_size
        mask = (torch.arange(8, device=body.device).view(2, 4) < 7).long()
        self._train_with_head(self._width(ids, mask), ids, mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Answer n texts.

        Args:
            input_ids: (n, tokens), whole numbers.
            attention_mask: (n, tokens), 1 for a token that counts; a mask of attention
                (n, 1, 1 or tokens, tokens) is read as the tokens that its last query may look at.

        Returns:
            (n, outputs), of the head's dtype.

        Raises:
            RequestError: there are more tokens than the body can tell apart by place.
        """
        tokens = input_ids.shape[1]
        if self.most_tokens is not None and tokens > self.most_tokens:
            raise RequestError(
                f"a text has {tokens} tokens, but {self.name} takes {self.most_tokens} "
                f"({self.why_most}): cut texts there, by tasks.settings.max_tokens"
            )
        kept = kept_tokens(attention_mask)
        hidden = self._hidden(input_ids, kept).to(self.head.weight.dtype)
        logits: Tensor = self.head(pooled(hidden, kept, self.config.pooling))
        return logits

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
            theirs = (
                own
                if own.is_meta
                else self.body(input_ids=ids, attention_mask=mask).last_hidden_state
            )
        except Exception as error:
            raise self._unfit(f"fails on a text of four tokens ({said_by(error)})") from error
        difference = ((own - theirs) * kept[:, :, None]).abs().max()
        bound = torch.finfo(own.dtype).eps ** 0.5 * theirs.abs().max().clamp(min=1)
        if not own.is_meta and difference > bound:
            raise self._unfit("reads more from attention_mask than which tokens to look at")
        return own.shape[-1]

    def _unfit(self, reason: str) -> RequestError:
        return RequestError(
            f"the model '{self.name}' ({type(self.body).__name__}) {reason}: choose another, or "
            "make it in a MODULE:FACTORY of your own"
        )


@final
class VisionModel(_BodyAndHead):
    """From images to logits: head(pool(body(images))).

    Raises:
        RequestError: the tasks' inputs are no images, or none that the body takes.
    """

    def __init__(
        self,
        name: str,
        body: Any,
        input_shape: tuple[int, ...],
        outputs: int,
        config: TransformersConfig,
    ) -> None:
        check_images(name, tuple(input_shape), outputs)
        super().__init__(name, body, input_shape, outputs, config)
        self.options = _image_options(name, body, self.input_shape)
        x = torch.zeros(1, *self.input_shape, device=body.device)
        self._train_with_head(self._width(x), x)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) to (n, outputs), of the head's dtype."""
        tokens = self._tokens(x).to(self.head.weight.dtype)
        kept = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device)
        logits: Tensor = self.head(pooled(tokens, kept, self.config.pooling))
        return logits

    def _tokens(self, x: Tensor) -> Tensor:
        """(n, tokens, width); the places of a feature map are its tokens."""
        pixels = x.to(self.body.dtype)
        hidden: Tensor = self.body(pixel_values=pixels, **self.options).last_hidden_state
        return hidden if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def _width(self, x: Tensor) -> int:
        try:
            hidden = self.body(pixel_values=x.to(self.body.dtype), **self.options).last_hidden_state
        except Exception as error:
            raise RequestError(
                f"{self.name} fails on an image of the tasks' form {self.input_shape} "
                f"({said_by(error)}): choose another size of images, or another model"
            ) from error
        if self.config.pooling != "mean" and (hidden.ndim != 3 or self.config.pooling == "last"):
            raise RequestError(
                f"{self.name} has no '{self.config.pooling}' token among the places of an image: "
                "set model.settings.pooling = mean"
            )
        return self._tokens(x).shape[-1]


def _most_tokens(body: Any) -> tuple[int | None, str]:
    """How many tokens the body takes, and why; None for any number."""
    limits: list[tuple[int, str]] = []
    for key, layer in body.named_modules():
        if isinstance(layer, nn.Embedding) and key.rpartition(".")[2] in _PLACES:
            before = 0 if layer.padding_idx is None else layer.padding_idx + 1
            limits.append((layer.num_embeddings - before, "the places that it knows"))
    for field in ("sliding_window", "attention_chunk_size"):
        window = getattr(body.config, field, None)
        if isinstance(window, int):
            # Up to here, a layer of limited attention sees every token.
            limits.append((window, f"its {field}"))
    return min(limits, default=(None, ""))


_PLACES = ("position_embeddings", "wpe", "embed_positions")


def _image_options(name: str, body: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Refuse images that the body would misread; say how the others are given."""
    form = body.config
    channels = getattr(form, "num_channels", shape[0])
    if shape[0] != channels:
        raise RequestError(
            f"{name} takes images of {channels} channels, but the tasks have {shape[0]}: choose "
            "images of as many channels, or another model"
        )
    patch = getattr(form, "patch_size", 1)
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if any(size % side for size, side in zip(shape[1:], sides, strict=True)):
        raise RequestError(
            f"{name} cuts images into patches of {sides[0]} x {sides[1]}, which do not tile "
            f"{shape[1]} x {shape[2]} pixels: choose a multiple as the size of images"
        )
    size = getattr(form, "image_size", shape[1:])
    known = (size, size) if isinstance(size, int) else tuple(size)
    parameters = inspect.signature(type(body).forward).parameters
    if known != shape[1:] and "interpolate_pos_encoding" in parameters:
        return {"interpolate_pos_encoding": True}
    return {}
