"""Models of images: a body of transformers, pooling over places, and a linear head."""

from __future__ import annotations

import inspect
from typing import Any, final

import torch
from torch import Tensor

from metaplug.errors import RequestError, said_by
from metaplug.models.body_and_head import BodyAndHead
from metaplug.models.parts import check_images
from metaplug.models.token_masks import pooled


@final
class VisionModel(BodyAndHead):
    """From images to logits: head(pool(body(images))).

    Raises:
        RequestError: the tasks' inputs are no images, or none that the body takes.
    """

    def try_body(self) -> tuple[int, tuple[Tensor, ...]]:
        """Return the hidden width, and an image of the tasks' form."""
        check_images(self.name, self.input_shape, self.outputs)
        self.options = _image_options(self.name, self.body, self.input_shape)
        x = torch.zeros(1, *self.input_shape, device=self.body.device)
        return self._width(x), (x,)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) to (n, outputs), of the head's dtype."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) to what the head is given, (n, width)."""
        tokens = self._tokens(x).to(self.head.weight.dtype)
        kept = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device)
        return pooled(tokens, kept, self.config.pooling)

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
