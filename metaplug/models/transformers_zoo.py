"""Models of the library transformers by name: a language or vision body with a new head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from metaplug.errors import RequestError
from metaplug.models.language_model import LanguageModel
from metaplug.models.transformers_config import TransformersConfig
from metaplug.models.transformers_files import load_body
from metaplug.models.vision_model import VisionModel
from metaplug.settings import validated

_KINDS = {"input_ids": LanguageModel, "pixel_values": VisionModel}


def make(
    name: str, wanted: str, input_shape: tuple[int, ...], outputs: int, settings: Mapping[str, Any]
) -> nn.Module:
    """A language or vision model with a new head.

    Args:
        name: as the user gave it, transformers:NAME_OR_FOLDER.
        wanted: NAME_OR_FOLDER.
        input_shape: of one example: (channels, height, width) of images; for texts it may be any.
        outputs: the width of the head, >= 1.
        settings: fields of TransformersConfig.

    Returns:
        A `LanguageModel` or a `VisionModel`, in training mode.

    Raises:
        RequestError: a setting is wrong, a library or file is missing, or the body is none of the
            two kinds or does not fit the inputs.
    """
    config = validated(TransformersConfig, settings, name)
    if outputs < 1:
        raise RequestError(
            f"{name} has at least one output, but the tasks have {outputs}: give tasks with classes"
        )
    body: Any = load_body(name, wanted, config)
    kind = _KINDS.get(body.main_input_name)
    if kind is None:
        raise RequestError(
            f"the model '{name}' takes '{body.main_input_name}', neither tokens nor images: "
            "make it in a MODULE:FACTORY of your own"
        )
    return kind(name, body, input_shape, outputs, config).train()
