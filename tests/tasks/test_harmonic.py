"""Harmonic tasks: every point by its equation, and the distributions that the paper gives."""

import math

import numpy as np
import pytest
import torch

from metaplug.contract.task_batch import FIELDS
from metaplug.errors import RequestError
from metaplug.tasks import Harmonic, TaskBatch
from metaplug.tasks.draws import draw, normal


def together(batch: TaskBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """All points of every task, (T, examples), in float64."""
    x, y = (
        torch.cat([batch.support_x, batch.query_x], 1),
        torch.cat([batch.support_y, batch.query_y], 1),
    )
    return x.squeeze(-1).double(), y.squeeze(-1).double()


def test_the_form_of_the_tasks() -> None:
    source = Harmonic(shots=10, queries=7)
    batch = source.train.batch(0, range(4))
    assert batch.support_x.shape == batch.support_y.shape == (4, 10, 1)
    assert batch.query_x.shape == batch.query_y.shape == (4, 7, 1)
    assert {getattr(batch, field).dtype for field in FIELDS} == {torch.float32}
    assert (source.kind, source.input_shape, source.outputs) == ("regression", (1,), 1)
    assert source.describe() == {
        "kind": "regression",
        "input_shape": [1],
        "outputs": 1,
        "origin": "computed: y = a₁ sin(ω x + b₁) + a₂ sin(2 ω x + b₂) + ε",
        "licence": "none needed",
        "splits": {split: {"tasks": "unbounded"} for split in ("train", "val", "test")},
    }


def test_every_point_is_what_its_words_say() -> None:
    def unit(word: int) -> float:
        return (word >> 11) / 2**53

    def pair(one: int, other: int) -> tuple[float, float]:
        radius, angle = math.sqrt(-2 * math.log(1 - unit(one))), 2 * math.pi * unit(other)
        return radius * math.cos(angle), radius * math.sin(angle)

    settings = {"frequency": (1, 3), "phase": (-1, 2), "centre": (10, 11), "noise": 0.5}
    x, y = together(Harmonic(shots=3, queries=2, seed=7, **settings).val.batch(5, [8, 2]))
    for task, words in enumerate(draw(7, "val", 5, [8, 2], 6 + 2 * 5).tolist()):
        centre, frequency = 10 + unit(words[0]), 1 + 2 * unit(words[1])
        b1, b2 = (-1 + 3 * unit(word) for word in words[2:4])
        a1, a2 = pair(*words[4:6])
        for example in range(5):
            offset, noise = pair(*words[6 + 2 * example : 8 + 2 * example])
            at = centre + offset
            value = (
                a1 * math.sin(frequency * at + b1)
                + a2 * math.sin(2 * frequency * at + b2)
                + 0.5 * noise
            )
            # Half a unit in the last place of float32, to which the points are rounded.
            assert float(x[task, example]) == pytest.approx(at, rel=2**-24)
            assert float(y[task, example]) == pytest.approx(value, rel=2**-24, abs=1e-12)


def test_support_and_query_lie_on_one_curve() -> None:
    batch = Harmonic(shots=40, queries=20, frequency=(6, 6), noise=0).test.batch(3, range(50))

    def basis(x: torch.Tensor) -> torch.Tensor:
        # a₁ and b₁ as the weights of a sine and a cosine, and a₂ and b₂ of another two.
        x = 6 * x.double()
        return torch.cat([x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()], -1)

    weights = torch.linalg.lstsq(basis(batch.support_x), batch.support_y.double()).solution
    # Inputs near 8 are float32 to 2.4e-7, which the slope of at most 12 |a₂| + 6 |a₁| carries over.
    torch.testing.assert_close(
        basis(batch.query_x) @ weights, batch.query_y.double(), atol=3e-5, rtol=0
    )


def test_the_distributions_of_the_paper() -> None:
    count = 20_000
    x, y = together(Harmonic(shots=10, queries=10).train.batch(0, range(count)))
    centre = x.mean(1)
    # Tolerances are four standard errors. The mean of 20 inputs adds 1 / 20 to the variance of
    # U(-4, 4).
    assert float(centre.mean()) == pytest.approx(0, abs=4 * 2.32 / count**0.5)
    assert float(centre.var()) == pytest.approx(8**2 / 12 + 1 / 20, rel=0.03)
    assert float(x.var(1).mean()) == pytest.approx(1, abs=4 * (2 / 19) ** 0.5 / count**0.5)
    # E y² = E a₁² / 2 + E a₂² / 2 + 0.1², whatever the frequency, as the phases are uniform over a
    # period.
    assert float(y.mean()) == pytest.approx(0, abs=4 / count**0.5)
    assert float(y.square().mean()) == pytest.approx(1.01, abs=0.05)


def test_noise_and_amplitudes_are_normal() -> None:
    still = {"frequency": (0, 0), "shots": 10, "queries": 10}
    _, noise = together(Harmonic(**still, phase=(0, 0)).train.batch(0, range(5000)))
    assert float(noise.mean()) == pytest.approx(0, abs=4e-1 / 1e5**0.5)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.01)
    assert float((noise / noise.std()).pow(4).mean()) == pytest.approx(3, abs=0.15)
    _, sums = together(
        Harmonic(**still, phase=(math.pi / 2, math.pi / 2), noise=0).train.batch(0, range(20_000))
    )
    assert torch.equal(sums, sums[:, :1].expand_as(sums))
    assert float(sums[:, 0].var()) == pytest.approx(2, rel=0.04)
    assert float(sums[:, 0].mean()) == pytest.approx(0, abs=4 * 2**0.5 / 20_000**0.5)


def test_normal_numbers_are_independent_and_always_finite() -> None:
    pairs = normal(draw(0, "train", 0, range(1), 200_000).reshape(-1, 2))
    assert np.abs(pairs.mean(0)).max() < 4 / 1e5**0.5
    np.testing.assert_allclose(np.cov(pairs.T), np.eye(2), atol=0.02)
    ends = np.array([[0, 0], [2**64 - 1, 0], [0, 2**64 - 1], [2**64 - 1, 2**64 - 1]], np.uint64)
    assert 8 < normal(ends).max() < 9
    assert np.isfinite(normal(ends)).all()


def test_a_task_depends_on_seed_split_iteration_and_index_alone() -> None:
    whole = Harmonic().train.batch(2, range(6))
    assert torch.equal(Harmonic().train.batch(2, [4]).query_y[0], whole.query_y[4])
    assert torch.equal(Harmonic(queries=20).train.batch(2, range(6)).support_y, whole.support_y)
    others = [Harmonic(seed=1).train, Harmonic().val, Harmonic().test]
    assert not any(torch.equal(other.batch(2, range(6)).query_y, whole.query_y) for other in others)
    assert not torch.equal(Harmonic().train.batch(3, range(6)).query_y, whole.query_y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frequency": (7, 5)}, "harmonic: frequency = (7, 5): the lowest comes first"),
        (
            {"centre": (0, 2000)},
            "harmonic: centre.1 = 2000: input should be less than or equal to 1000",
        ),
        ({"noise": -0.1}, "harmonic: noise = -0.1: input should be greater than or equal to 0"),
        ({"noize": 0.1}, "harmonic: unknown field 'noize': did you mean 'noise'?"),
        ({"queries": 0}, "tasks: queries = 0: input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        Harmonic(**settings)
    assert str(error.value) == message
