"""Sinusoid tasks: every point lies on one curve of its task, in the given ranges."""

import math

import pytest
import torch

from metaplug.errors import RequestError
from metaplug.tasks import Sinusoid


def test_the_form_of_the_tasks() -> None:
    source = Sinusoid(shots=10, queries=7)
    batch = source.train.batch(0, range(4))
    assert batch.support_x.shape == batch.support_y.shape == (4, 10, 1)
    assert batch.query_x.shape == batch.query_y.shape == (4, 7, 1)
    assert {batch.support_x.dtype, batch.query_y.dtype} == {torch.float32}
    assert (source.kind, source.input_shape, source.outputs) == ("regression", (1,), 1)
    assert source.describe()["splits"] == {
        split: {"tasks": "unbounded"} for split in ("train", "val", "test")
    }


def test_support_and_query_lie_on_one_curve() -> None:
    batch = Sinusoid().test.batch(3, range(50))
    # y = a sin x + b cos x with a = A cos φ, b = A sin φ: two unknowns, found from the support set.
    basis = torch.cat([batch.support_x.double().sin(), batch.support_x.double().cos()], -1)
    weights = torch.linalg.lstsq(basis, batch.support_y.double()).solution
    query = torch.cat([batch.query_x.double().sin(), batch.query_x.double().cos()], -1) @ weights
    # The points are float32: their rounding, times how ill the ten points may determine a and b.
    torch.testing.assert_close(query, batch.query_y.double(), atol=1e-4, rtol=0)
    amplitude = weights.squeeze(-1).norm(dim=1)
    phase = torch.atan2(weights[:, 1, 0], weights[:, 0, 0])
    assert amplitude.min() > 0.1 - 1e-4
    assert amplitude.max() < 5 + 1e-4
    assert phase.min() > -1e-3
    assert phase.max() < math.pi + 1e-3
    assert batch.support_x.abs().max() < 5


def test_one_curve_exactly() -> None:
    batch = Sinusoid(amplitude=(2, 2), phase=(1, 1), inputs=(0, 3)).train.batch(0, [0])
    torch.testing.assert_close(batch.query_y, 2 * torch.sin(batch.query_x + 1))
    assert batch.query_x.min() >= 0
    assert batch.query_x.max() <= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amplitude": (5, 1)}, "sinusoid: amplitude = (5, 1): the lowest comes first"),
        ({"ampltude": (1, 5)}, "sinusoid: unknown field 'ampltude': did you mean 'amplitude'?"),
        ({"shots": 0}, "tasks: shots = 0: input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        Sinusoid(**settings)
    assert str(error.value) == message
