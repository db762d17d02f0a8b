"""Models of the library timm by name, with the weights of a local file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, final

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from metaplug.errors import RequestError, did_you_mean, said_by
from metaplug.models.lora import LoraSettings, add_adapters
from metaplug.models.making import imported, made
from metaplug.models.parts import check_images
from metaplug.models.timm_weights import load_weights
from metaplug.models.trained_part import freeze_unused
from metaplug.models.zoo_model import ZooModel
from metaplug.settings import validated

_OWN = ("num_classes", "in_chans", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")


class TimmConfig(LoraSettings):
    """How a model of timm is made and trained; further fields are create_model's arguments."""

    model_config = ConfigDict(extra="allow")

    pretrained: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="A local file of weights in timm's own form, .safetensors or .pth; null starts "
        "at random.",
    )
    train: Literal["all", "head", "lora"] = Field(
        "all", description="What is trained: all, the head alone, or the head and adapters."
    )

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        for field in LoraSettings.model_fields:
            default = type(self).model_fields[field].default
            if self.train != "lora" and getattr(self, field) != default:
                raise ValueError(f"{field} is read by train = lora, not by {self.train}")
        if own := sorted({*_OWN} & (self.model_extra or {}).keys()):
            raise ValueError(f"{own[0]} follows from the tasks and from pretrained: leave it out")
        return self


@final
class TimmModel(ZooModel):
    """A model of timm, called with images alone."""

    def __init__(
        self,
        name: str,
        body: nn.Module,
        input_shape: tuple[int, ...],
        outputs: int,
        config: TimmConfig,
    ) -> None:
        super().__init__(name, input_shape, outputs, config)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) to (n, outputs)."""
        logits: Tensor = self.body(x)
        return logits


def make(
    name: str, wanted: str, input_shape: tuple[int, ...], outputs: int, settings: Mapping[str, Any]
) -> nn.Module:
    """A model of timm with the tasks' channels, size of images and outputs.

    Args:
        name: as the user gave it, timm:NAME.
        wanted: NAME.
        input_shape: (channels, height, width) of one image.
        outputs: the width of the head, >= 1.
        settings: fields of TimmConfig, and further arguments of timm.create_model.

    Raises:
        RequestError: timm is missing, does not know the name, or refuses the settings; the inputs
            are no images that the model takes; or the weights do not fit.
    """
    timm: Any = imported(name, "timm", "vision")
    config = validated(TimmConfig, settings, name)
    if not timm.is_model(wanted):  # a name of a hub or folder would be asked there
        known = timm.list_models()
        raise RequestError(f"unknown timm model '{wanted}': {did_you_mean(wanted, known)}")
    check_images(name, input_shape, outputs)
    given = dict(config.model_extra or {})
    options: dict[str, Any] = {"num_classes": outputs, "in_chans": input_shape[0]}
    known_form = timm.models.get_pretrained_cfg(wanted, allow_unregistered=True)
    is_fixed = known_form is not None and known_form.fixed_input_size
    if is_fixed and not {"img_size", "dynamic_img_size"} & given.keys():
        options["img_size"] = tuple(input_shape[1:])
    body: Any = made(name, timm.create_model, given, wanted, pretrained=False, **options)
    # Without values, as a checkpoint is first compared with its model, there are none to load.
    if config.pretrained is not None and torch.get_default_device().type != "meta":
        load_weights(name, timm, body, wanted, Path(config.pretrained).expanduser())
    head: nn.Module = body.get_classifier()
    if config.train == "lora":
        add_adapters(name, body, config)
    else:
        body.requires_grad_(config.train == "all")
    head.requires_grad_(True)
    model = TimmModel(name, body, input_shape, outputs, config).eval()
    _try(model)
    return model.train()


def _try(model: TimmModel) -> None:
    device = next(model.parameters()).device
    x = torch.zeros(1, *model.input_shape, device=device)
    try:
        with torch.no_grad():
            answer = model(x)
    except Exception as error:
        raise RequestError(
            f"{model.name} fails on an image of the tasks' form {model.input_shape} "
            f"({said_by(error)}): choose another size of images, or another model"
        ) from error
    if not isinstance(answer, Tensor) or answer.shape != (1, model.outputs):
        raise RequestError(
            f"{model.name} does not answer with {model.outputs} logits for an image: choose a "
            "classifier, without arguments that change what it gives"
        )
    freeze_unused(model, x)
