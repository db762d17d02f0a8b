"""The base of models that a zoo makes by name, so a checkpoint can have them made again."""

from __future__ import annotations

from torch import nn

from metaplug.settings import Settings


class ZooModel(nn.Module):
    """A module that its name, input shape, outputs and settings suffice to make again.

    Args:
        name: as the user gave it, such as "transformers:FOLDER".
        input_shape: of one example, as the task source gives it.
        outputs: the width of the head.
        config: the settings.
    """

    def __init__(
        self, name: str, input_shape: tuple[int, ...], outputs: int, config: Settings
    ) -> None:
        super().__init__()
        self.name, self.input_shape, self.outputs = name, tuple(input_shape), outputs
        self.config = config
