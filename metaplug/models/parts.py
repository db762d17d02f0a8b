"""Layers and checks that the models for images share."""

from __future__ import annotations

from torch import nn

from metaplug.errors import RequestError


def check_images(name: str, input_shape: tuple[int, ...], outputs: int) -> None:
    """Refuse inputs that are no images (channels, height, width), and a head without an output.

    Raises:
        RequestError: names the model and what the tasks have.
    """
    if len(input_shape) != 3 or min(input_shape) < 1 or outputs < 1:
        raise RequestError(
            f"{name} takes images (channels, height, width) to at least one output, but the tasks "
            f"have inputs {input_shape} and {outputs} outputs: choose other tasks, or the model mlp"
        )


def convolution(channels: int, filters: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution before a batch norm, which makes a bias idle.

    It maps (n, channels, h, w) to (n, filters, ⌈h / stride⌉, ⌈w / stride⌉). Its first weights are
    normal, and keep the variance of gradients through ReLUs (He et al. 2015).
    """
    layer = nn.Conv2d(channels, filters, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm that always uses the statistics of the batch and stores none."""
    return nn.BatchNorm2d(channels, track_running_stats=False)
