"""The models: shapes, names, what their settings mean, and what they refuse."""

import pytest
import torch
from torch import nn

from metaplug.errors import RequestError
from metaplug.models import Conv4, Mlp

IMAGES = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pooling", ["max", "stride"])
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
def test_conv4_gives_one_row_an_image(pooling: str, norm: str) -> None:
    model = Conv4((1, 28, 28), 5, filters=8, pooling=pooling, norm=norm)
    assert model(IMAGES).shape == (6, 5)
    assert (model.config.filters, model.config.pooling, model.input_shape, model.outputs) == (
        8,
        pooling,
        (1, 28, 28),
        5,
    )


def test_conv4_has_readable_names() -> None:
    names = [name for name, _ in Conv4((3, 84, 84), 5).named_parameters()]
    block = ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]
    assert names == [f"body.{index}.{name}" for index in range(4) for name in block] + [
        "head.weight",
        "head.bias",
    ]


def test_conv4_sizes_are_the_standard_ones() -> None:
    assert Conv4((1, 28, 28), 5, filters=64, pooling="max").head.in_features == 64
    assert Conv4((3, 84, 84), 5, filters=64, pooling="max").head.in_features == 64 * 5 * 5
    assert Conv4((1, 28, 28), 5).head.in_features == 32 * 2 * 2
    assert Conv4((3, 84, 84), 5).head.in_features == 32 * 6 * 6
    assert (
        sum(
            parameter.numel()
            for parameter in Conv4((1, 28, 28), 5, filters=64, pooling="max").parameters()
        )
        == 112_261
    )


def test_conv4_is_the_network_it_says() -> None:
    model = Conv4((1, 28, 28), 5, filters=4, pooling="max", leaky_slope=0.1)
    x = IMAGES
    for block in model.body:
        x = nn.functional.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
        mean, variance = (
            x.mean((0, 2, 3), keepdim=True),
            x.var((0, 2, 3), keepdim=True, correction=0),
        )
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = nn.functional.max_pool2d(torch.where(x > 0, x, 0.1 * x), 2)
    torch.testing.assert_close(model(IMAGES), x.flatten(1) @ model.head.weight.T + model.head.bias)


def test_batch_norm_stores_nothing() -> None:
    model = Conv4((1, 28, 28), 5, filters=4)
    assert list(model.buffers()) == []
    assert torch.equal(model(IMAGES), model.eval()(IMAGES))


@pytest.mark.parametrize(
    "model", [Conv4((1, 28, 28), 5, filters=4), Mlp((1, 28, 28), 5)], ids=["conv4", "mlp"]
)
def test_a_model_runs_under_vmap(model: nn.Module) -> None:
    stacked = {name: torch.stack([value, 2 * value]) for name, value in model.named_parameters()}
    out = torch.func.vmap(lambda weights: torch.func.functional_call(model, weights, (IMAGES,)))(
        stacked
    )
    for task in range(2):
        alone = torch.func.functional_call(
            model, {name: value[task] for name, value in stacked.items()}, (IMAGES,)
        )
        # Grouped and plain convolutions add in another order, in float32.
        torch.testing.assert_close(out[task], alone, atol=1e-4, rtol=1e-4)


def test_mlp_flattens_its_input() -> None:
    model = Mlp((2, 3), 4, hidden=(5,), activation="tanh")
    x = torch.rand(7, 2, 3)
    hidden = torch.tanh(x.reshape(7, 6) @ model.body[0].weight.T + model.body[0].bias)
    torch.testing.assert_close(model(x), hidden @ model.head.weight.T + model.head.bias)


def test_mlp_names_and_default() -> None:
    names = [name for name, _ in Mlp((1,), 1).named_parameters()]
    assert names == [
        "body.0.weight",
        "body.0.bias",
        "body.2.weight",
        "body.2.bias",
        "head.weight",
        "head.bias",
    ]
    assert Mlp((1,), 1).config.hidden == (40, 40)
    assert [name for name, _ in Mlp((3,), 2, hidden=()).named_parameters()] == [
        "head.weight",
        "head.bias",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Conv4((1, 14, 28), 5, pooling="max"),
            "conv4 halves an image four times, but 14 x 28 pixels are fewer than 16 x 16: enlarge "
            "the images, or set pooling = 'stride'",
        ),
        (
            lambda: Conv4((1,), 1),
            "conv4 takes images (channels, height, width) to at least one output, but the tasks "
            "have inputs (1,) and 1 outputs: "
            "choose other tasks, or the model mlp",
        ),
        (
            lambda: Conv4((1, 28, 28), 5, norm="group", filters=12),
            "conv4: filters = 12: group norm needs a multiple of 8",
        ),
        (
            lambda: Conv4((1, 28, 28), 5, filter=12),
            "conv4: unknown field 'filter': did you mean 'filters'?",
        ),
        (
            lambda: Conv4((1, 28, 28), 5, filters=0),
            "conv4: filters = 0: input should be greater than or equal to 1",
        ),
        (
            lambda: Mlp((1,), 0),
            "mlp takes at least one input to at least one output, but the tasks have inputs (1,) "
            "and 0 outputs: choose other tasks",
        ),
        (
            lambda: Mlp((1,), 1, hidden=(40, 0)),
            "mlp: hidden.1 = 0: input should be greater than or equal to 1",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(make: object, message: str) -> None:
    with pytest.raises(RequestError) as error:
        make()
    assert str(error.value) == message
