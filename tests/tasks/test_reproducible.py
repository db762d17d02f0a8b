"""One seed, one task: in any worker, on any rank, before and after a resume, on any device.

No class of one split stands in another.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from metaplug import TaskBatch
from metaplug.contract.task_batch import FIELDS
from metaplug.tasks import Folder, Glyphs, Harmonic, LabelledTasks, Sinusoid, TaskSource

SHARED = Path(__file__).parents[3] / "shared" / "data" / "omniglot"


def labelled(seed: int) -> LabelledTasks:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (90, 1, 6, 6), dtype=torch.uint8, generator=generator)
    return LabelledTasks(
        images,
        torch.arange(15).repeat(6),
        ways=2,
        shots=1,
        queries=2,
        seed=seed,
        rotate=True,
        shift=1,
    )


SOURCES: dict[str, Any] = {
    "glyphs": lambda seed: Glyphs(ways=5, shots=1, queries=3, seed=seed, rotate=True, within=True),
    "labelled": labelled,
    "sinusoid": lambda seed: Sinusoid(shots=3, queries=4, seed=seed),
    "harmonic": lambda seed: Harmonic(shots=3, queries=4, seed=seed),
}


def same(one: TaskBatch, other: TaskBatch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


class Iterations(Dataset[TaskBatch]):
    """The batches of a stream by iteration, for torch's DataLoader."""

    def __init__(self, source: TaskSource) -> None:
        self.stream = source.train

    def __len__(self) -> int:
        return 6

    def __getitem__(self, iteration: int) -> TaskBatch:
        return self.stream.batch(iteration, range(4))


def first(batches: list[TaskBatch]) -> TaskBatch:
    return batches[0]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create 4 worker processes:UserWarning"
)  # on a machine with fewer cores
def test_workers_draw_the_same_tasks(name: str, workers: int) -> None:
    source = SOURCES[name](3)
    loader = DataLoader(Iterations(source), batch_size=1, num_workers=workers, collate_fn=first)
    drawn = list(loader)
    assert all(
        same(batch, source.train.batch(iteration, range(4)))
        for iteration, batch in enumerate(drawn)
    )


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_made_anew_draws_the_same_tasks_and_another_seed_others(name: str) -> None:
    one, again, other = SOURCES[name](3), SOURCES[name](3), SOURCES[name](4)
    for split in ("train", "val", "test"):
        batches = [getattr(source, split).batch(7, range(6)) for source in (one, again, other)]
        assert same(batches[0], batches[1])
        assert not same(batches[0], batches[2])


@pytest.mark.parametrize("name", SOURCES)
def test_ranks_that_share_the_indices_draw_what_one_rank_draws(name: str) -> None:
    stream = SOURCES[name](0).train
    whole, shards = (
        stream.batch(2, range(6)),
        [stream.batch(2, range(rank, 6, 2)) for rank in range(2)],
    )
    for field in FIELDS:
        joined = torch.stack([getattr(shards[index % 2], field)[index // 2] for index in range(6)])
        assert torch.equal(joined, getattr(whole, field))


@pytest.mark.parametrize("name", SOURCES)
def test_what_was_drawn_before_does_not_matter(name: str) -> None:
    """A resumed run asks for iteration 40 first of all."""
    fresh, used = SOURCES[name](0).train, SOURCES[name](0).train
    for iteration in range(40):
        used.batch(iteration, range(2))
    assert same(fresh.batch(40, range(4)), used.batch(40, range(4)))


def test_classes_of_a_folder_stay_apart_whatever_the_options(tmp_path: Path) -> None:
    """Twelve classes of their own brightness, split by hash, with every augmentation on."""
    for index in range(12):
        folder = tmp_path / f"super{index % 2}" / f"class{index}"
        folder.mkdir(parents=True)
        for image in range(6):
            Image.fromarray(np.full((8, 8), 20 * index + 10, np.uint8)).save(
                folder / f"{image}.png"
            )
    seen = {}
    for options in (
        {},
        {"rotate": True, "flip": True, "shift": 2},
        {"train_ways": (2, 3), "fractions": (0.5, 0.25, 0.25)},
    ):
        tasks = Folder(tmp_path, ways=2, shots=1, queries=2, invert=False, size=None, **options)
        for split in ("train", "val", "test"):
            values = set()
            for iteration in range(20):
                batch = getattr(tasks, split).batch(iteration, range(4))
                values |= set(
                    (torch.cat([batch.support_x, batch.query_x], 1) * 255)
                    .round()
                    .long()
                    .unique()
                    .tolist()
                ) - {0}
            seen[split] = values
        assert not seen["train"] & seen["val"]
        assert not seen["train"] & seen["test"]
        assert not seen["val"] & seen["test"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_moves_its_images_and_stays_as_it_is_itself(name: str) -> None:
    source = SOURCES[name](0)
    moved = source.to("meta")
    assert source.train.batch(0, [0]).device.type == "cpu"
    has_images = name in ("glyphs", "labelled")
    assert moved.train.batch(0, [0]).device.type == ("meta" if has_images else "cpu")
    assert source.to("cpu").train.batch(0, [0]).device.type == "cpu"


def test_a_folder_that_is_mapped_into_memory_draws_the_same_tasks(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(12):
        (tmp_path / f"class{index}").mkdir()
        for image in range(5):
            Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(
                tmp_path / f"class{index}" / f"{image}.png"
            )
    one, mapped = (
        Folder(tmp_path, ways=2, shots=1, queries=2, size=None, invert=True, memory_mib=mib)
        for mib in (4096, 0)
    )
    assert all(
        same(one.train.batch(i, range(3)), mapped.train.batch(i, range(3))) for i in range(3)
    )


@pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"real characters are not at {SHARED.name} beside the project"
)
def test_tasks_within_an_alphabet_of_real_characters() -> None:
    tasks = Folder(SHARED, ways=5, shots=1, queries=3, within=True, cache_mib=0)
    superclasses = tasks.train.classes.superclasses
    assert superclasses is not None
    assert set(superclasses) == {"Korean", "Latin", "Greek", "Japanese_(katakana)", "Balinese"}
    places = tasks.train.chooser.choose(0, range(50)).query.places
    class_of_image = np.repeat(np.arange(len(superclasses)), tasks.train.classes.counts)
    alphabets = np.array(superclasses)[class_of_image[places]]
    assert all(len(set(task)) == 1 for task in alphabets)
    assert len(set(alphabets[:, 0])) == 5
