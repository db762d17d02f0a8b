"""ResNet-12 and the wide ResNet: their papers' architectures and sizes, exact meta-gradients."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaplug import MetaLearner, TaskBatch
from metaplug.contract import registry
from metaplug.errors import RequestError
from metaplug.models import ResNet12, WideResNet
from metaplug.testing import Problem, assert_close, reference

TINY: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "resnet12": (ResNet12, {"filters": (4, 4, 4, 4)}),
    "wrn28_10": (WideResNet, {"depth": 10, "widen_factor": 1}),
}


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (2, 17, 40), (3, 84, 84)])
@pytest.mark.parametrize("name", TINY)
def test_any_channels_and_sizes_give_one_row_an_image(name: str, shape: tuple[int, ...]) -> None:
    make, settings = TINY[name]
    model: Any = make(shape, 5, **settings)
    assert model(images(3, *shape)).shape == (3, 5)
    assert (model.input_shape, model.outputs) == (shape, 5)
    assert list(model.buffers()) == []
    assert torch.equal(model(images(3, *shape)), model.eval()(images(3, *shape)))


def test_a_wide_resnet_takes_the_smallest_images() -> None:
    assert WideResNet((1, 1, 1), 2, depth=10, widen_factor=1)(images(3, 1, 1, 1)).shape == (3, 2)


def test_parameters_have_readable_names() -> None:
    block = [
        f"{layer}{index}.{name}"
        for index in (1, 2, 3)
        for layer in ("conv", "norm")
        for name in ("weight", "bias")
    ]
    block = [name for name in block if not name.startswith("conv") or name.endswith("weight")]
    block += ["shortcut.weight", "shortcut_norm.weight", "shortcut_norm.bias"]
    model = ResNet12((3, 32, 32), 5, filters=(4, 4, 4, 4))
    assert [name for name, _ in model.named_parameters()] == [
        f"body.{index}.{name}" for index in range(4) for name in block
    ] + [
        "head.weight",
        "head.bias",
    ]
    wide = [
        name for name, _ in WideResNet((3, 32, 32), 5, depth=10, widen_factor=1).named_parameters()
    ]
    block = [
        "norm1.weight",
        "norm1.bias",
        "conv1.weight",
        "norm2.weight",
        "norm2.bias",
        "conv2.weight",
    ]
    assert wide == [
        "stem.weight",
        *(f"body.0.{name}" for name in block),  # keeps its form, so that its shortcut has no weight
        *(f"body.{index}.{name}" for index in (1, 2) for name in [*block, "shortcut.weight"]),
        *("norm.weight", "norm.bias", "head.weight", "head.bias"),
    ]


def test_resnet12_has_the_size_of_its_paper() -> None:
    """12.4 million.

    A block from a to b channels has 9ab + 9b² + 9b² in its convolutions, ab in its shortcut, 2b in
    each of 4 norms.
    """
    widths = (3, 64, 160, 320, 640)
    blocks = sum(10 * a * b + 18 * b * b + 8 * b for a, b in pairwise(widths))
    model = ResNet12((3, 84, 84), 5)
    assert size(model) == blocks + 640 * 5 + 5 == 12_427_525
    assert model.body(images(1, 3, 84, 84)).shape == (1, 640, 5, 5)


def test_wrn28_10_has_the_size_of_its_paper() -> None:
    """36.5 million on CIFAR-10.

    Two norms and convolutions a block, a shortcut where a group begins, one norm at the end.
    """
    total, before = 9 * 3 * 16, 16
    for width in (160, 320, 640):
        for block in range(4):
            a = before if block == 0 else width
            total += (
                2 * a
                + 9 * a * width
                + 2 * width
                + 9 * width * width
                + (a * width if block == 0 else 0)
            )
        before = width
    assert size(WideResNet((3, 32, 32), 10)) == total + 2 * 640 + 640 * 10 + 10 == 36_479_194


def test_convolutions_begin_as_he_says() -> None:
    for model in (ResNet12((3, 16, 16), 2), WideResNet((3, 16, 16), 2, depth=10, widen_factor=4)):
        layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000
        ]
        assert layers
        for layer in layers:
            assert layer.bias is None
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert float(layer.weight.detach().std()) == pytest.approx(
                (2 / fan_out) ** 0.5, rel=0.05
            )


def normal(x: Tensor) -> Tensor:
    """Batch norm as it begins, by its formula."""
    return (x - x.mean((0, 2, 3), keepdim=True)) / (
        x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()


def test_resnet12_is_the_network_it_says() -> None:
    model = ResNet12((2, 19, 16), 3, filters=(2, 3, 4, 5)).double()
    x = given = images(4, 2, 19, 16).double()
    for block in model.body:
        y = x
        for index, conv in enumerate((block.conv1, block.conv2, block.conv3)):
            y = normal(F.conv2d(y, conv.weight, padding=1))
            y = torch.where(y > 0, y, 0.1 * y) if index < 2 else y
        y = y + normal(F.conv2d(x, block.shortcut.weight))
        x = F.max_pool2d(torch.where(y > 0, y, 0.1 * y), 2)
    torch.testing.assert_close(model(given), x.mean((2, 3)) @ model.head.weight.T + model.head.bias)


def test_a_wide_resnet_is_the_network_it_says() -> None:
    model = WideResNet((2, 9, 8), 3, depth=16, widen_factor=2).double()
    given = images(4, 2, 9, 8).double()
    x = F.conv2d(given, model.stem.weight, padding=1)
    for index, block in enumerate(model.body):
        stride = 2 if index in (2, 4) else 1
        active = normal(x).relu()
        y = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
        y = F.conv2d(normal(y).relu(), block.conv2.weight, padding=1)
        x = y + (
            F.conv2d(active, block.shortcut.weight, stride=stride) if index in (0, 2, 4) else x
        )
    assert len(model.body) == 6
    torch.testing.assert_close(
        model(given), normal(x).relu().mean((2, 3)) @ model.head.weight.T + model.head.bias
    )


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("name", TINY)
def test_meta_gradients_equal_a_plain_loop(name: str, batching: str) -> None:
    torch.manual_seed(0)
    make, settings = TINY[name]
    x = torch.randn(2, 2, 5, 2, 16, 16, dtype=torch.float64)
    y = torch.randint(3, (2, 2, 5))
    case = Problem(
        make((2, 16, 16), 3, **settings).double(),
        TaskBatch(x[0], y[0], x[1], y[1]),
        lr=0.1,
        steps=2,
    )
    expected = reference.maml(case.model, case.batch, steps=2, lr=0.1)
    assert_close(
        case.learner(task_batching=batching).meta_gradients(case.batch), expected.gradients
    )


@pytest.mark.parametrize("name", TINY)
def test_an_installed_model_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    make, settings = TINY[name]
    assert registry.load("model", name) is make
    learner = MetaLearner(make((1, 16, 16), 3, **settings))
    learner.save(tmp_path / "learner.pt")
    loaded = MetaLearner.load(tmp_path / "learner.pt")
    assert type(loaded.model) is make
    x = images(2, 1, 16, 16)
    assert torch.equal(loaded.model(x), learner.model(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ResNet12((3, 15, 84), 5),
            "resnet12 halves an image four times, but 15 x 84 pixels are fewer than 16 x 16: "
            "enlarge the images, or choose the model conv4 or wrn28_10",
        ),
        (
            lambda: ResNet12((1,), 1),
            "resnet12 takes images (channels, height, width) to at least one output, but the tasks "
            "have inputs (1,) and 1 outputs: "
            "choose other tasks, or the model mlp",
        ),
        (
            lambda: WideResNet((3, 32, 32), 0),
            "wrn28_10 takes images (channels, height, width) to at least one output, but the tasks "
            "have inputs (3, 32, 32) and 0 outputs: "
            "choose other tasks, or the model mlp",
        ),
        (
            lambda: ResNet12((3, 84, 84), 5, filters=(4, 4, 4)),
            "resnet12: filters = (4, 4, 4): give 4 numbers, one for each block",
        ),
        (
            lambda: ResNet12((3, 84, 84), 5, filters=(4, 4, 4, 0)),
            "resnet12: filters.3 = 0: input should be greater than or equal to 1",
        ),
        (
            lambda: ResNet12((3, 84, 84), 5, filter=4),
            "resnet12: unknown field 'filter': did you mean 'filters'?",
        ),
        (
            lambda: WideResNet((3, 84, 84), 5, depth=27),
            "wrn28_10: depth = 27: it must be 6n + 4, such as 10, 16, 22 or 28",
        ),
        (
            lambda: WideResNet((3, 84, 84), 5, depth=4),
            "wrn28_10: depth = 4: input should be greater than or equal to 10",
        ),
        (
            lambda: WideResNet((3, 84, 84), 5, widen_faktor=2),
            "wrn28_10: unknown field 'widen_faktor': did you mean 'widen_factor'?",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(make: Any, message: str) -> None:
    with pytest.raises(RequestError) as error:
        make()
    assert str(error.value) == message
