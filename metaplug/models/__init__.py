"""Models for few-shot tasks: Conv4 for images, Mlp for anything that can be flattened."""

from metaplug.models.conv4 import Conv4
from metaplug.models.mlp import Mlp

__all__ = ["Conv4", "Mlp"]
