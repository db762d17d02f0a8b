"""Models for few-shot tasks: `conv4`, `resnet12`, `wrn28_10` for images, `mlp` for the rest.

`factories` makes a model by its name, a user's or a zoo's included: `torchvision_zoo`,
`transformers_zoo` (with `language_model` and `vision_model`) and `timm_zoo` wrap those of the
libraries. `parts` holds what the models for images share, `lora` and `trained_part` what
pretrained bodies do.
"""

from metaplug.models.conv4 import Conv4
from metaplug.models.mlp import Mlp
from metaplug.models.resnet12 import ResNet12
from metaplug.models.wrn28_10 import WideResNet

__all__ = ["Conv4", "Mlp", "ResNet12", "WideResNet"]
