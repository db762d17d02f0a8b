"""torchmeta on today's torch: the fixes, its data sets as tasks, its own objects as streams.

The files of its data sets are made here.
"""

import hashlib
import io
import json
import pickle
import random
import sys
import tarfile
import zipfile
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from metaplug import MetaLearner, TaskBatch
from metaplug.contract import registry
from metaplug.errors import RequestError, RunError
from metaplug.experiments.build import build_tasks, task_form
from metaplug.experiments.configuration import ExperimentConfig, TaskSettings
from metaplug.tasks import adapters
from metaplug.tasks.adapters import training_stream
from metaplug.tasks.draws import draw, normal, uniform
from metaplug.tasks.episodes import TaskStream
from metaplug.tasks.torchmeta import compatibility
from metaplug.tasks.torchmeta import data as torchmeta_data
from metaplug.tasks.torchmeta.source import IMAGES, TOYS, Torchmeta

for package in ("torchvision", "h5py", "ordered_set", "requests", "tqdm"):
    pytest.importorskip(
        package,
        reason=f"{package} is not installed: make setup, or pip install 'metaplug[torchmeta]'",
    )
try:
    torchmeta = compatibility.apply()
except RequestError as error:
    pytest.skip(str(error), allow_module_level=True)

import h5py  # noqa: E402
from torchmeta.datasets import Omniglot  # noqa: E402
from torchmeta.toy import Harmonic, Sinusoid, SinusoidAndLine  # noqa: E402
from torchmeta.transforms import Categorical, ClassSplitter  # noqa: E402
from torchmeta.utils.data import BatchMetaDataLoader, CombinationMetaDataset  # noqa: E402
from torchvision.datasets import utils as torchvision_utils  # noqa: E402
from torchvision.transforms import Compose, Resize, ToTensor  # noqa: E402

SIZES = {"ways": 2, "shots": 1, "queries": 1}
SPLITS = ("train", "val", "test")
FIELDS = ("support_x", "support_y", "query_x", "query_y")


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def root(tmp_path: Path, generator: np.random.Generator) -> Path:
    """Omniglot as torchmeta lays it out: four characters a split, of two alphabets.

    Each has six drawings; the ink of class c is 20 c.
    """
    (tmp_path / "omniglot").mkdir()
    with h5py.File(tmp_path / "omniglot" / "data.hdf5", "w") as file:
        for number, split in enumerate(SPLITS):
            labels = [
                ["images_background", f"{alphabet}_{split}", name]
                for alphabet in ("A", "B")
                for name in ("one", "two")
            ]
            (tmp_path / "omniglot" / f"vinyals_{split}_labels.json").write_text(json.dumps(labels))
            for place, label in enumerate(labels):
                # In blocks, so that resizing leaves some of the ink as bright as it was.
                blocks = generator.integers(0, 2, (6, 15, 15), np.uint8).repeat(7, 1).repeat(7, 2)
                file["/".join(label)] = np.uint8(20 * (4 * number + place + 1)) * blocks
    return tmp_path


def combination(root: Path, split: str = "train", **given: Any) -> CombinationMetaDataset:
    settings = {
        "transform": Compose([Resize(28), ToTensor()]),
        "target_transform": Categorical(2),
        "meta_split": split,
    } | given
    return ClassSplitter(
        Omniglot(str(root), 2, **settings),
        shuffle=True,
        num_train_per_class=1,
        num_test_per_class=3,
    )


def message_of(kind: type[Exception], make: Callable[[], object]) -> str:
    with pytest.raises(kind) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    return message


def as_stream(tasks: Any, seed: int = 0) -> TaskStream:
    return training_stream(tasks, seed, 8)


def ink_of(x: torch.Tensor) -> torch.Tensor:
    """Which class every image of (T, n, 1, 28, 28) is of, from 1."""
    return (255 * x.flatten(2).amax(-1) / 20).round().long()


def same(one: TaskBatch, other: TaskBatch) -> bool:
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in FIELDS)


# The fixes


def test_the_fixes_are_there_and_stay_when_applied_again() -> None:
    drive, subset = (
        torchvision_utils.download_file_from_google_drive,
        torchmeta.utils.data.SubsetTask,
    )
    getitems = subset.__getitems__
    assert compatibility.apply() is torchmeta
    assert torchmeta.datasets.utils.check_integrity is torchvision_utils.check_integrity
    assert all(
        getattr(torchmeta.datasets, name).download_file_from_google_drive is drive
        for name in ("utils", "cub", "miniimagenet")
    )
    assert subset.__getitems__ is getitems


def test_what_has_no_symptom_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own = object()
    monkeypatch.setattr(torchvision_utils, "_get_confirm_token", own)
    monkeypatch.setattr(torchmeta.datasets.utils, "check_integrity", own)
    monkeypatch.setattr(torchmeta.utils.data.SubsetTask, "__getitems__", own)
    compatibility.apply()
    assert torchvision_utils._get_confirm_token is own
    assert torchmeta.datasets.utils.check_integrity is own
    assert torchmeta.utils.data.SubsetTask.__getitems__ is own


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_the_fixes_reach_workers_that_unpickle_first(root: Path, method: str) -> None:
    loader = BatchMetaDataLoader(combination(root), batch_size=3, num_workers=1)
    loader.multiprocessing_context = method
    batch = as_stream(loader).batch(0, range(3))
    assert batch.query_x.shape == (3, 6, 1, 28, 28)
    assert batch.query_y.sort(dim=1).values.tolist() == [[0, 0, 0, 1, 1, 1]] * 3


def test_pickled_and_copied_objects_are_whole(root: Path) -> None:
    source = combination(root)
    copy = pickle.loads(pickle.dumps(source))
    assert type(copy) is Omniglot
    assert vars(copy).keys() == vars(source).keys()
    assert copy.dataset.labels == source.dataset.labels


@pytest.mark.parametrize("missing", ["torchmeta", "h5py", "torchvision"])
def test_without_its_packages_one_line_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert registry.load("task source", "torchmeta") is Torchmeta
    assert message_of(RequestError, lambda: Torchmeta("sinusoid")) == (
        f"torchmeta's tasks need the package {missing}, which does not import (import of {missing} "
        "halted; None in sys.modules): "
        "run make setup, or by hand pip install 'metaplug[torchmeta]' and pip install --no-deps "
        "torchmeta==1.8.0"
    )


# Images


def test_omniglot_is_what_torchmeta_reads(root: Path) -> None:
    source = Torchmeta("omniglot", root=root, **SIZES)
    for stream in (source.train, source.val, source.test):
        own = combination(root, stream.split).dataset
        assert stream.classes.names == tuple("/".join(label) for label in own.labels)
        assert stream.classes.superclasses == tuple(
            f"images_background/{alphabet}_{stream.split}" for alphabet in "AABB"
        )
        assert stream.classes.counts == (6, 6, 6, 6)
        for index, images in enumerate(stream.classes.images.split(6)):
            # The order of the drawings of a class is our own, as the file system's has no meaning.
            read = {
                (255 * own[index][drawing][0]).round().byte().numpy().tobytes()
                for drawing in range(6)
            }
            assert {image.numpy().tobytes() for image in images} == read
    assert source.describe() == {
        "kind": "classification",
        "input_shape": [1, 28, 28],
        "outputs": 2,
        "origin": f"torchmeta's data set omniglot, in {root}",
        "licence": "its authors'; torchmeta states none",
        "splits": {split: {"classes": 4, "images": 24} for split in SPLITS},
    }


def test_ink_is_bright_and_the_size_may_be_another(root: Path) -> None:
    source = Torchmeta("omniglot", root=root, size=105, **SIZES)
    assert [int(images.max()) for images in source.train.classes.images.split(6)] == [
        20,
        40,
        60,
        80,
    ]
    assert int(source.train.classes.images.min()) == 0
    assert source.input_shape == (1, 105, 105)


def test_tasks_are_labelled_by_class_and_depend_on_the_seed_alone(root: Path) -> None:
    source, again, other = (
        Torchmeta("omniglot", root=root, seed=seed, **SIZES) for seed in (3, 3, 4)
    )
    batch = source.train.batch(5, range(8))
    assert batch.support_y.tolist() == batch.query_y.tolist() == [[0, 1]] * 8
    support, query = (ink_of(x) for x in (batch.support_x, batch.query_x))
    assert torch.equal(support, query)
    assert (support[:, 0] != support[:, 1]).all()
    assert same(again.train.batch(5, range(8)), batch)
    assert torch.equal(again.train.batch(5, [6]).query_x[0], batch.query_x[6])
    assert not same(other.train.batch(5, range(8)), batch)


def test_the_order_of_files_changes_nothing(root: Path) -> None:
    one = Torchmeta("omniglot", root=root, **SIZES)
    with h5py.File(root / "omniglot" / "data.hdf5", "r+") as file:
        for name in one.train.classes.names:
            file[name][:] = file[name][:][::-1]
    other = Torchmeta("omniglot", root=root, **SIZES)
    assert torch.equal(one.train.classes.images, other.train.classes.images)


def test_options_of_episodes_are_taken(root: Path) -> None:
    batch = Torchmeta("omniglot", root=root, within=True, train_shots=(1, 3), **SIZES).train.batch(
        0, range(4)
    )
    assert batch.support_x.shape[1] in (2, 4, 6)
    ink = ink_of(batch.query_x)
    assert ((ink[:, 0] <= 2) == (ink[:, 1] <= 2)).all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("omniglott", {}, "unknown data set of torchmeta 'omniglott': did you mean 'omniglot'?"),
        ("cifar_fs", {}, "unknown data set of torchmeta 'cifar_fs': did you mean 'cifar-fs'?"),
        (
            "omniglot",
            {"donwload": True},
            "torchmeta: unknown field 'donwload': did you mean 'download'?",
        ),
        (
            "omniglot",
            {"size": 0},
            "torchmeta: size = 0: input should be greater than or equal to 1",
        ),
        (
            "omniglot",
            {"noise_std": 1.0},
            "torchmeta:omniglot has no use for 'noise_std', since only toys have noise: leave it "
            "out",
        ),
        (
            "harmonic",
            {"size": 28, "flip": True},
            "torchmeta:harmonic has no use for 'flip', 'size', since a toy has no images: leave it "
            "out",
        ),
    ],
)
def test_wrong_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    assert message_of(RequestError, lambda: Torchmeta(name, **settings)) == message


@pytest.mark.parametrize("damage", ["a class is missing", "cut short", "no JSON"])
def test_damaged_data_are_named(root: Path, damage: str) -> None:
    data, labels = root / "omniglot" / "data.hdf5", root / "omniglot" / "vinyals_val_labels.json"
    if damage == "a class is missing":
        labels.write_text(json.dumps([["images_background", "A_val", "three"]]))
    elif damage == "cut short":
        data.write_bytes(data.read_bytes()[:1000])
    else:
        labels.write_text("[")
    message = message_of(RunError, lambda: Torchmeta("omniglot", root=root, **SIZES))
    assert message.startswith(f"torchmeta:omniglot: its data in {root}/omniglot are damaged (")
    assert message.endswith("): remove the files .hdf5 and .json there, and they are built anew")


# Archives


def encoded(
    generator: np.random.Generator, form: str = "png", size: tuple[int, ...] = (8, 8, 3)
) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, size, np.uint8)).save(buffer, form)
    return buffer.getvalue()


def make_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def asset(*path: str) -> Any:
    return json.loads(Path(torchmeta.datasets.utils.get_asset_path(*path)).read_text())


NAMES = {split: [f"{split}{letter}" for letter in "abc"] for split in SPLITS}


def fill_omniglot(folder: Path, noise: np.random.Generator) -> dict[str, Any]:
    for part in ("background", "evaluation"):
        splits = [split for split in SPLITS if (split == "test") == (part == "evaluation")]
        names = [
            f"images_{part}/{split}/{name}/{drawing}.png"
            for split in splits
            for name in NAMES[split]
            for drawing in range(3)
        ]
        make_zip(
            folder / f"images_{part}.zip", {name: encoded(noise, size=(105, 105)) for name in names}
        )
    return {
        f"{split}.json": {"evaluation" if split == "test" else "background": {split: NAMES[split]}}
        for split in SPLITS
    }


def fill_miniimagenet(folder: Path, noise: np.random.Generator) -> None:
    splits = {
        split: {
            "image_data": noise.integers(0, 256, (9, 84, 84, 3), np.uint8),
            "class_dict": {
                name: list(range(3 * i, 3 * i + 3)) for i, name in enumerate(NAMES[split])
            },
        }
        for split in SPLITS
    }
    make_tar(
        folder / "mini-imagenet.tar.gz",
        {f"mini-imagenet-cache-{split}.pkl": pickle.dumps(splits[split]) for split in SPLITS},
    )


def fill_tieredimagenet(folder: Path, noise: np.random.Generator) -> None:
    members = {}
    for split in SPLITS:
        images = [np.frombuffer(encoded(noise, size=(84, 84, 3)), np.uint8) for _ in range(9)]
        labels = {
            "label_specific": np.repeat(np.arange(3), 3),
            "label_specific_str": NAMES[split],
            "label_general": np.zeros(9, int),
            "label_general_str": [f"all of {split}"],
        }
        members[f"tiered-imagenet/{split}_images_png.pkl"] = pickle.dumps(images)
        members[f"tiered-imagenet/{split}_labels.pkl"] = pickle.dumps(labels)
    make_tar(folder / "tiered-imagenet.tar", members)


def fill_cifar100(folder: Path, noise: np.random.Generator) -> None:
    pairs = sorted(
        tuple(pair) for split in SPLITS for pair in asset("cifar100", "cifar-fs", f"{split}.json")
    )
    fine, coarse = sorted(name for _, name in pairs), sorted({name for name, _ in pairs})
    of = {name: above for above, name in pairs}
    part = {
        b"fine_labels": list(range(100)),
        b"coarse_labels": [coarse.index(of[name]) for name in fine],
    }
    parts = {
        name: part | {b"data": noise.integers(0, 256, (100, 3072), np.uint8)}
        for name in ("train", "test")
    }
    parts["meta"] = {"fine_label_names": fine, "coarse_label_names": coarse}
    make_tar(
        folder / "cifar-100-python.tar.gz",
        {f"cifar-100-python/{name}": pickle.dumps(content) for name, content in parts.items()},
    )


def fill_cub(folder: Path, noise: np.random.Generator) -> dict[str, Any]:
    names = [
        f"CUB_200_2011/images/{name}/{i}.jpg"
        for split in SPLITS
        for name in NAMES[split]
        for i in range(3)
    ]
    make_tar(
        folder / "CUB_200_2011.tgz", {name: encoded(noise, "jpeg", (140, 190, 3)) for name in names}
    )
    return {f"{split}.json": NAMES[split] for split in SPLITS}


def fill_numbers(folder: Path, noise: np.random.Generator) -> dict[str, Any]:
    top = {
        "doublemnist": "double_mnist_seed_123_image_size_64_64",
        "triplemnist": "triple_mnist_seed_123_image_size_84_84",
    }[folder.name]
    names = [
        f"{top}/{split}/{name}/{i}.png"
        for split in SPLITS
        for name in NAMES[split]
        for i in range(3)
    ]
    make_zip(folder / f"{top}.zip", {name: encoded(noise, size=(64, 64)) for name in names})
    return {f"{split}.json": NAMES[split] for split in SPLITS}


FILLS: dict[str, Callable[[Path, np.random.Generator], dict[str, Any] | None]] = {
    "omniglot": fill_omniglot,
    "miniimagenet": fill_miniimagenet,
    "tieredimagenet": fill_tieredimagenet,
    "cifar-fs": fill_cifar100,
    "fc100": fill_cifar100,
    "cub": fill_cub,
    "doublemnist": fill_numbers,
    "triplemnist": fill_numbers,
}


def trust(monkeypatch: pytest.MonkeyPatch, dataset: Any, folder: Path) -> None:
    """Let torchmeta take the archives of the folder for the published ones."""
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    if hasattr(dataset, "zips_md5"):
        monkeypatch.setattr(
            dataset, "zips_md5", {name: sums.get(f"{name}.zip", "") for name in dataset.zips_md5}
        )
    else:
        kind = next(kind for kind in ("gz", "tar", "tgz", "zip") if hasattr(dataset, f"{kind}_md5"))
        monkeypatch.setattr(dataset, f"{kind}_md5", next(iter(sums.values())))


def put_archives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, noise: np.random.Generator
) -> Path:
    """Small archives in the place, and under the names, of the published ones."""
    dataset = attrgetter(IMAGES[name].path)(torchmeta.datasets)
    folder = tmp_path / dataset.folder
    folder.mkdir()
    assets = FILLS[name](folder, noise)
    trust(monkeypatch, dataset, folder)
    if assets is not None:
        monkeypatch.setattr(
            sys.modules[dataset.__module__], "get_asset", lambda _, file, dtype=None: assets[file]
        )
    return folder


@pytest.mark.parametrize("name", IMAGES)
def test_archives_put_by_hand_become_tasks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: np.random.Generator
) -> None:
    folder = put_archives(monkeypatch, tmp_path, name, generator)
    given = {path.name for path in folder.iterdir()}
    source = Torchmeta(name, root=tmp_path, **SIZES)
    assert source.input_shape == (IMAGES[name].channels, IMAGES[name].size, IMAGES[name].size)
    counts = {"cifar-fs": [64, 16, 20], "fc100": [60, 20, 20]}.get(name, [3, 3, 3])
    assert [
        len(stream.classes.names) for stream in (source.train, source.val, source.test)
    ] == counts
    assert set(source.train.classes.counts) == {2 if name in ("cifar-fs", "fc100") else 3}
    above = {"omniglot": "images_background/train", "tieredimagenet": "all of train"}
    if name in above:
        assert source.train.classes.superclasses == (above[name],) * 3
    # The archives stay, torchmeta's own layout stands beside them, and nothing is left of the
    # building.
    assert given < {path.name for path in folder.iterdir()}
    assert {
        path.suffix for path in folder.rglob("*") if path.is_file() and path.name not in given
    } == {".hdf5", ".json"}
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}
    # It is built once.
    monkeypatch.setattr(torchmeta_data, "_build", None)
    assert torch.equal(
        Torchmeta(name, root=tmp_path, **SIZES).val.classes.images, source.val.classes.images
    )


def test_super_classes_of_cifar_100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: np.random.Generator
) -> None:
    put_archives(monkeypatch, tmp_path, "fc100", generator)
    source = Torchmeta("fc100", root=tmp_path, within=True, ways=5, shots=1, queries=1)
    above = [
        set(stream.classes.superclasses or ()) for stream in (source.train, source.val, source.test)
    ]
    assert [len(names) for names in above] == [12, 4, 4]
    assert not above[0] & above[1]
    assert not above[2] & (above[0] | above[1])


def test_omniglot_built_from_its_archives_has_bright_ink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: np.random.Generator
) -> None:
    folder = put_archives(monkeypatch, tmp_path, "omniglot", generator)
    source = Torchmeta("omniglot", root=tmp_path, size=105, **SIZES)
    with zipfile.ZipFile(folder / "images_background.zip") as archive:
        images = [
            Image.open(io.BytesIO(archive.read(f"images_background/train/traina/{i}.png")))
            for i in range(3)
        ]
        drawn = {ImageOps.invert(image).tobytes() for image in images}
    assert {image.numpy().tobytes() for image in source.train.classes.images[:3]} == drawn


def test_missing_data_are_said_with_where_from_and_where_to(tmp_path: Path) -> None:
    assert message_of(RequestError, lambda: Torchmeta("omniglot", root=tmp_path)) == (
        f"torchmeta:omniglot: its data are not in {tmp_path}/omniglot: set 'download' to true, or "
        "put there by hand images_background.zip "
        "(from https://github.com/brendenlake/omniglot/raw/master/python/images_background.zip) "
        "and images_evaluation.zip "
        f"(from https://github.com/brendenlake/omniglot/raw/master/python/images_evaluation.zip)"
    )
    assert message_of(RequestError, lambda: Torchmeta("cub", root=tmp_path)) == (
        f"torchmeta:cub: its data are not in {tmp_path}/cub: set 'download' to true, or put there "
        "by hand CUB_200_2011.tgz "
        f"(from https://drive.google.com/uc?id=1hbzc_P1FuxMkcabkgn9ZKinBwW683j45)"
    )
    assert not list(tmp_path.iterdir())


def test_the_default_place_is_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAPLUG_CACHE", str(tmp_path))
    assert f"are not in {tmp_path}/torchmeta/cub:" in message_of(
        RequestError, lambda: Torchmeta("cub")
    )


@pytest.mark.parametrize(
    ("name", "function"), [("omniglot", "download_url"), ("cub", "download_file_from_google_drive")]
)
def test_a_failed_download_says_which_file_from_where_and_where_to_put_it(
    name: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str, folder: str, file: str, md5: str) -> None:
        Path(folder, file).write_bytes(b"a warning page")
        raise RuntimeError("File not found\nor corrupted.")

    monkeypatch.setattr(torchvision_utils, function, fail)
    file, url = {
        "omniglot": (
            "images_background.zip",
            "https://github.com/brendenlake/omniglot/raw/master/python/images_background.zip",
        ),
        "cub": (
            "CUB_200_2011.tgz",
            "https://drive.google.com/uc?id=1hbzc_P1FuxMkcabkgn9ZKinBwW683j45",
        ),
    }[name]
    assert message_of(RunError, lambda: Torchmeta(name, root=tmp_path, download=True)) == (
        f"cannot download {file} from {url} (RuntimeError: File not found or corrupted.): put it "
        f"in {tmp_path}/{name} by hand"
    )
    assert not list((tmp_path / name).iterdir())


def test_what_is_missing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: np.random.Generator
) -> None:
    folder = put_archives(monkeypatch, tmp_path, "omniglot", generator)
    published = (folder / "images_evaluation.zip").rename(tmp_path / "published.zip")
    asked = []

    def download(url: str, folder: str, file: str, md5: str) -> None:
        asked.append(url)
        Path(folder, file).write_bytes(published.read_bytes())

    monkeypatch.setattr(torchvision_utils, "download_url", download)
    Torchmeta("omniglot", root=tmp_path, download=True, **SIZES)
    assert asked == [
        "https://github.com/brendenlake/omniglot/raw/master/python/images_evaluation.zip"
    ]
    assert (folder / "images_evaluation.zip").read_bytes() == published.read_bytes()


def test_an_archive_that_is_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: np.random.Generator
) -> None:
    folder = put_archives(monkeypatch, tmp_path, "cub", generator)
    monkeypatch.setattr(
        torchmeta.datasets.cub.CUBClassDataset, "tgz_md5", "97eceeb196236b17998738112f37df78"
    )
    assert message_of(RunError, lambda: Torchmeta("cub", root=tmp_path)) == (
        f"torchmeta:cub: {folder}/CUB_200_2011.tgz is not the file that torchmeta knows (MD5 "
        "97eceeb196236b17998738112f37df78), or is cut "
        f"short: remove it and set 'download' to true, or get it again from "
        f"https://drive.google.com/uc?id=1hbzc_P1FuxMkcabkgn9ZKinBwW683j45"
    )


def test_an_archive_bomb_is_refused_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "doublemnist"
    folder.mkdir()
    path = folder / "double_mnist_seed_123_image_size_64_64.zip"
    make_zip(path, {"zeros": bytes(2**20)})
    trust(monkeypatch, torchmeta.datasets.doublemnist.DoubleMNISTClassDataset, folder)
    assert message_of(RunError, lambda: Torchmeta("doublemnist", root=tmp_path)) == (
        f"{path} is refused, since it unpacks to more than 20 times its own size: get it again "
        "from its authors"
    )
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("name", ["../outside", "/outside", "C:\\outside", "a/../../outside"])
@pytest.mark.parametrize("data_set", ["omniglot", "cub"])
def test_a_member_that_points_outside_is_refused(
    name: str, data_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / data_set
    folder.mkdir()
    if data_set == "omniglot":
        path = folder / "images_background.zip"
        make_zip(path, {name: b"x"})
        make_zip(folder / "images_evaluation.zip", {"a": b"x"})
    else:
        path = folder / "CUB_200_2011.tgz"
        make_tar(path, {name: b"x"})
    trust(monkeypatch, attrgetter(IMAGES[data_set].path)(torchmeta.datasets), folder)
    assert message_of(RunError, lambda: Torchmeta(data_set, root=tmp_path)) == (
        f"{path} is refused, since its member '{name}' points outside it, or is no file: get it "
        "again from its authors"
    )
    assert [path.name for path in tmp_path.iterdir()] == [data_set]


def test_a_link_in_a_tar_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cub").mkdir()
    path = tmp_path / "cub" / "CUB_200_2011.tgz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    trust(monkeypatch, torchmeta.datasets.cub.CUBClassDataset, path.parent)
    assert "since its member 'link' points outside it, or is no file" in message_of(
        RunError, lambda: Torchmeta("cub", root=tmp_path)
    )


def test_a_building_that_fails_leaves_the_archives_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "miniimagenet").mkdir()
    path = tmp_path / "miniimagenet" / "mini-imagenet.tar.gz"
    make_tar(path, {"mini-imagenet-cache-train.pkl": b"no pickle"})
    trust(monkeypatch, torchmeta.datasets.miniimagenet.MiniImagenetClassDataset, path.parent)
    assert message_of(RunError, lambda: Torchmeta("miniimagenet", root=tmp_path)) == (
        f"torchmeta:miniimagenet: building its data in {tmp_path}/miniimagenet fails "
        "(UnpicklingError: invalid load key, 'n'.): "
        f"give it room and leave to write there, or get its archives again"
    )
    assert list(path.parent.iterdir()) == [path]


# Toys


def test_the_ranges_are_those_of_torchmeta() -> None:
    # As the streams have them, by torchmeta's names.
    ranges = {"_input_range": (-5, 5), "_amplitude_range": (0.1, 5), "_phase_range": (0, np.pi)}
    lines = ranges | {"_slope_range": (-3, 3), "_intercept_range": (-3, 3)}
    harmonic = {
        "_domain_range": (-4, 4),
        "_frequency_range": (5, 7),
        "_phase_range": (0, 2 * np.pi),
    }
    for toy, own in ((Sinusoid, ranges), (SinusoidAndLine, lines), (Harmonic, harmonic)):
        assert {
            name: tuple(value) for name, value in vars(toy(1)).items() if name.endswith("_range")
        } == own


def points(batch: TaskBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([batch.support_x, batch.query_x], 1).squeeze(-1), torch.cat(
        [batch.support_y, batch.query_y], 1
    ).squeeze(-1)


def test_sinusoids_equal_their_formula() -> None:
    x, y = points(Torchmeta("sinusoid", shots=4, queries=6, seed=3).val.batch(7, range(5)))
    words = draw(3, "val", 7, range(5), 12)
    amplitude, phase, inputs = (
        uniform(words[:, :1], 0.1, 5),
        uniform(words[:, 1:2], 0, np.pi),
        uniform(words[:, 2:], -5, 5),
    )
    assert torch.equal(x, torch.from_numpy(inputs).float())
    assert torch.equal(y, torch.from_numpy(amplitude * np.sin(inputs - phase)).float())


def test_harmonics_equal_their_formula() -> None:
    x, y = points(Torchmeta("harmonic", shots=4, queries=6, seed=3).val.batch(7, range(5)))
    words = draw(3, "val", 7, range(5), 28)
    domain, frequency = uniform(words[:, :1], -4, 4), uniform(words[:, 1:2], 5, 7)
    phase = uniform(words[:, 2:4], 0, 2 * np.pi)
    numbers = normal(words[:, 4:].reshape(5, 12, 2))[..., 0]
    inputs = domain + numbers[:, 2:]
    wave = numbers[:, :1] * np.sin(frequency * inputs + phase[:, :1]) + numbers[:, 1:2] * np.sin(
        2 * frequency * inputs + phase[:, 1:]
    )
    assert torch.equal(x, torch.from_numpy(inputs).float())
    assert torch.equal(y, torch.from_numpy(wave).float())


def test_sinusoids_and_lines_are_both_there() -> None:
    x, y = points(Torchmeta("sinusoid-and-line", shots=4, queries=6).train.batch(0, range(200)))
    x, y = x.double(), y.double()
    lines = torch.stack([torch.ones_like(x), x], -1)
    waves = torch.stack([x.sin(), x.cos()], -1)
    off = [
        (basis @ torch.linalg.lstsq(basis, y[..., None]).solution).squeeze(-1).sub(y).abs().amax(1)
        for basis in (lines, waves)
    ]
    # Ten points lie on one of the two, to the rounding of float32.
    assert torch.minimum(*off).max() < 1e-4
    assert 70 < int((off[0] < 1e-4).sum()) < 130
    assert int((off[0] < 1e-4).sum() + (off[1] < 1e-4).sum()) == 200


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_depends_on_seed_split_iteration_and_index_alone(name: str) -> None:
    source = Torchmeta(name, shots=3, queries=4)
    whole = source.train.batch(2, range(6))
    assert (whole.support_x.shape, whole.query_y.shape, whole.query_y.dtype) == (
        (6, 3, 1),
        (6, 4, 1),
        torch.float32,
    )
    assert (source.kind, source.input_shape, source.outputs) == ("regression", (1,), 1)
    random.seed(1)
    np.random.seed(1)
    assert torch.equal(
        Torchmeta(name, shots=3, queries=4).train.batch(2, [4]).query_y[0], whole.query_y[4]
    )
    others = [Torchmeta(name, shots=3, queries=4, seed=1).train, source.val, source.test]
    assert not any(torch.equal(other.batch(2, range(6)).query_y, whole.query_y) for other in others)
    assert not torch.equal(source.train.batch(3, range(6)).query_y, whole.query_y)
    assert source.describe()["splits"] == {split: {"tasks": "unbounded"} for split in SPLITS}


def test_noise_has_its_deviation() -> None:
    clean, noisy = (
        points(
            Torchmeta("sinusoid", shots=50, queries=50, noise_std=std).train.batch(0, range(100))
        )
        for std in (0, 0.5)
    )
    assert torch.equal(clean[0], noisy[0])
    # The deviation of a sample of 10,000 is off by 0.7 %; five times that.
    assert float((noisy[1] - clean[1]).std()) == pytest.approx(0.5, rel=0.035)


def test_from_the_configuration() -> None:
    settings = TaskSettings(
        source="torchmeta:sinusoid", shots=3, queries=4, settings={"noise_std": 0.1}
    )
    source = build_tasks(ExperimentConfig(tasks=settings, seed=5))
    assert same(
        source.train.batch(0, range(2)),
        Torchmeta("sinusoid", shots=3, queries=4, seed=5, noise_std=0.1).train.batch(0, range(2)),
    )


# torchmeta's own batches, data sets and loaders


def test_a_batch_of_torchmeta_there_and_back() -> None:
    parts = [
        torch.rand(3, 4, 2),
        torch.randint(5, (3, 4)),
        torch.rand(3, 6, 2),
        torch.randint(5, (3, 6)),
    ]
    for train, test in (("train", "test"), ("support", "query")):
        batch = TaskBatch.from_torchmeta({train: parts[:2], test: parts[2:]})
        assert all(getattr(batch, field) is part for field, part in zip(FIELDS, parts, strict=True))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"train": None, "query": None},
            "TaskBatch.from_torchmeta: the batch has the parts 'train', 'query', not 'train' and "
            "'test': "
            "give its data set a ClassSplitter with num_train_per_class and num_test_per_class",
        ),
        (
            [torch.zeros(1, 1), torch.zeros(1, 1)],
            "TaskBatch.from_torchmeta: the batch has the parts none, not 'train' and 'test': "
            "give its data set a ClassSplitter with num_train_per_class and num_test_per_class",
        ),
        (
            {
                "train": (torch.zeros(1, 1, 2), [("a",), torch.zeros(1)]),
                "test": (torch.zeros(1, 1, 2), [("a",), torch.zeros(1)]),
            },
            "TaskBatch.from_torchmeta: the targets are names of classes, not integers: "
            "give its data set target_transform=Categorical(num_classes=...)",
        ),
    ],
)
def test_what_is_no_batch_of_torchmeta_is_refused(batch: Any, message: str) -> None:
    assert message_of(RequestError, lambda: TaskBatch.from_torchmeta(batch)) == message


def test_streams_are_taken_as_they_are_and_nothing_is_imported_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapters, "apply", None)
    stream = Torchmeta("sinusoid").train
    assert as_stream(stream) is stream
    assert message_of(RequestError, lambda: as_stream(1)) == (
        "tasks of type int are no tasks: give a stream, such as the train, val or test of a task "
        "source; a list, a DataLoader or another iterable of tasks; or a function (seed, "
        "iteration, index) that returns one"
    )


def test_a_combination_data_set_gives_the_tasks_of_a_seed(root: Path) -> None:
    stream = as_stream(combination(root), 3)
    assert stream.split == "train"
    random.seed(0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batch = stream.batch(5, range(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert (batch.support_x.shape, batch.query_x.shape) == ((8, 2, 1, 28, 28), (8, 6, 1, 28, 28))
    assert {tuple(labels) for labels in batch.support_y.tolist()} == {(0, 1), (1, 0)}
    # The class of an image shows in its ink: support and query agree on who has which label.
    support, query = (ink_of(x) for x in (batch.support_x, batch.query_x))
    for task in range(8):
        for label in (0, 1):
            assert (
                query[task][batch.query_y[task] == label].tolist()
                == 3 * support[task][batch.support_y[task] == label].tolist()
            )
    random.seed(9)
    torch.manual_seed(9)
    again = as_stream(combination(root), 3)
    again.batch(0, range(3))
    assert torch.equal(again.batch(5, [6]).query_x[0], batch.query_x[6])
    assert torch.equal(again.batch(5, [6]).query_y[0], batch.query_y[6])
    assert same(again.batch(5, range(8)), batch)
    assert not same(as_stream(combination(root), 4).batch(5, range(8)), batch)
    assert not same(as_stream(combination(root, "val"), 3).batch(5, range(8)), batch)


@pytest.mark.parametrize(
    ("given", "start", "end"),
    [
        (
            {"transform": None},
            "the tasks of this Omniglot cannot be stacked (",
            "): give it a transform to tensors, such as torchvision's ToTensor()",
        ),
        (
            {"target_transform": None},
            "TaskBatch.from_torchmeta: the targets are names of classes, not integers: ",
            "Categorical(num_classes=...)",
        ),
    ],
)
def test_a_data_set_that_gives_no_tensors_is_refused(
    root: Path, given: dict[str, Any], start: str, end: str
) -> None:
    message = message_of(
        RequestError, lambda: as_stream(combination(root, **given)).batch(0, range(2))
    )
    assert message.startswith(start)
    assert message.endswith(end)


def test_a_data_set_with_too_few_classes_is_refused(root: Path) -> None:
    assert message_of(
        RequestError, lambda: as_stream(Omniglot(str(root), 5, meta_split="val"))
    ) == (
        "5-way tasks need 5 classes, but the Omniglot of the val split has 4: lower "
        "num_classes_per_task"
    )


def test_a_loader_is_taken_as_it_comes_epoch_after_epoch() -> None:
    tasks = ClassSplitter(
        Sinusoid(5, num_tasks=4), shuffle=False, num_train_per_class=2, num_test_per_class=3
    )
    tasks.seed(0)
    stream = as_stream(BatchMetaDataLoader(tasks, batch_size=2, shuffle=False))
    batch = stream.batch(0, range(3))
    assert (batch.support_x.shape, batch.query_y.shape, batch.query_y.dtype) == (
        (3, 2, 1),
        (3, 3, 1),
        torch.float64,
    )
    rest = stream.batch(0, range(5))
    x, y = (torch.cat(parts) for parts in zip(points(batch), points(rest), strict=True))
    # Tasks 0 to 3, and these once more, whose inputs torchmeta draws anew.
    amplitudes, phases = (
        torch.from_numpy(values)[[0, 1, 2, 3, 0, 1, 2, 3], None]
        for values in (tasks.amplitudes, tasks.phases)
    )
    torch.testing.assert_close(y, amplitudes * torch.sin(x - phases))


def test_an_empty_loader_is_refused() -> None:
    tasks = ClassSplitter(Sinusoid(5, num_tasks=4), num_train_per_class=2, num_test_per_class=3)
    loader = BatchMetaDataLoader(tasks, batch_size=5, drop_last=True)
    assert message_of(RequestError, lambda: as_stream(loader).batch(0, range(2))) == (
        "the BatchMetaDataLoader gives no task: give it a smaller batch_size, or no drop_last, or "
        "more tasks"
    )


def fitted(tasks: Any, model: nn.Module, **given: Any) -> tuple[list[float], list[float]]:
    learner = MetaLearner(model, seed=1, inner_steps=1, **given)
    history = learner.fit(
        tasks,
        iterations=2,
        tasks_per_batch=3,
        validation=tasks,
        validate_every=2,
        validation_tasks=4,
    )
    assert learner.iteration == 2
    result = history.records[-1].validation
    assert result is not None
    return [record.step.outer_loss for record in history.records], result.per_task.tolist()


def weights(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def test_fit_takes_a_combination_data_set_and_repeats_itself(root: Path) -> None:
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        random.seed(noise)
        runs.append(
            fitted(combination(root), weights(nn.Sequential(nn.Flatten(), nn.Linear(784, 2))))
        )
    assert runs[0] == runs[1]


def test_fit_takes_a_loader(root: Path) -> None:
    losses, _ = fitted(
        BatchMetaDataLoader(combination(root), batch_size=2),
        weights(nn.Sequential(nn.Flatten(), nn.Linear(784, 2))),
    )
    assert all(np.isfinite(losses))
    toys = ClassSplitter(Sinusoid(5, num_tasks=9), num_train_per_class=2, num_test_per_class=3)
    losses, _ = fitted(
        BatchMetaDataLoader(toys, batch_size=4),
        weights(nn.Linear(1, 1).double()),
        kind="regression",
        inner_lr=0.01,
    )
    assert all(np.isfinite(losses))


def test_a_toy_has_no_ways_in_its_title() -> None:
    for name, form in (("sinusoid", ["10-shot"]), ("omniglot", ["5-way", "10-shot"])):
        settings = TaskSettings(source=f"torchmeta:{name}", shots=10)
        assert task_form(ExperimentConfig(tasks=settings)) == form
