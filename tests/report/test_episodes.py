"""Pictures of tasks: what is drawn is what the model sees."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metaplug import TaskBatch
from metaplug.report.episodes import _grid, episode_figure
from metaplug.tasks import Glyphs, Sinusoid


def test_a_row_for_each_class_and_a_line_between() -> None:
    parts = [torch.full((2, 1, 3, 3), value) for value in (0.0, 1.0)]
    grid = _grid(parts)
    assert grid.shape == (9, 9, 1)
    assert (grid[1:4, 1:4] == 0).all()
    assert (grid[5:8, 5:8] == 1).all()
    assert np.allclose(grid[4], 0.6)
    assert _grid([torch.rand(1, 3, 2, 2)]).shape == (4, 4, 3)


@pytest.mark.parametrize(("ways", "queries"), [(2, 1), (5, 5), (25, 15)])
def test_a_task_of_images(tmp_path: Path, ways: int, queries: int) -> None:
    tasks = Glyphs(ways=ways, shots=1, queries=queries)
    episode_figure(tasks.test.batch(0, [0]), tmp_path / "task.png", "one task")
    with Image.open(tmp_path / "task.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1200)


def test_colour_and_other_channels(tmp_path: Path) -> None:
    labels = torch.arange(2).repeat(1, 1)
    for channels in (2, 3):
        images = torch.rand(1, 2, channels, 6, 8)
        episode_figure(
            TaskBatch(images, labels, images, labels), tmp_path / f"{channels}.png", "one task"
        )
        assert (tmp_path / f"{channels}.png").exists()


def test_a_task_of_points(tmp_path: Path) -> None:
    episode_figure(
        Sinusoid(shots=5, queries=20).train.batch(0, [0]), tmp_path / "points.png", "one task"
    )
    several: Any = [torch.rand(1, 4, width) for width in (3, 2, 3, 2)]
    episode_figure(TaskBatch(*several), tmp_path / "several.png", "three features, two targets")
    for name in ("points", "several"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == (1200, 640)
