"""Models for few-shot tasks: Conv4, ResNet12 and WideResNet for images, Mlp for anything that can be flattened."""

from metaplug.models.conv4 import Conv4
from metaplug.models.mlp import Mlp
from metaplug.models.resnet12 import ResNet12
from metaplug.models.wrn28_10 import WideResNet

__all__ = ["Conv4", "Mlp", "ResNet12", "WideResNet"]
