"""Images with labels, as tensors or as a map-style dataset: classes, splits and every refusal."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset, TensorDataset

from metaplug import MetaLearner, RequestError
from metaplug.models import Mlp
from metaplug.tasks import ArrayTasks, Folder, LabelledTasks
from metaplug.tasks.images.pixels import converted, read_image
from metaplug.tasks.sources import ImageSource

CLASSES, COUNT = 12, 6


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffled images of 2 x 3 pixels: the first pixel the label, the second the image's place."""
    labels = torch.arange(CLASSES).repeat(COUNT)
    images = torch.zeros(CLASSES * COUNT, 1, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = labels, torch.arange(len(labels))
    return images, labels


def made(**given: Any) -> LabelledTasks:
    return LabelledTasks(*tensors(), **{"ways": 2, "shots": 1, "queries": 3, **given})


def classes_in(tasks: LabelledTasks, split: str) -> set[int]:
    batch = getattr(tasks, split).batch(0, range(40))
    return set(
        (torch.cat([batch.support_x, batch.query_x], 1)[:, :, 0, 0, 0] * 255)
        .round()
        .long()
        .flatten()
        .tolist()
    )


def test_three_lines_make_a_source_that_a_learner_takes() -> None:
    tasks = made()
    learner = MetaLearner(Mlp(tasks.input_shape, tasks.outputs), inner_steps=1)
    assert (
        len(
            learner.fit(
                tasks.train,
                iterations=2,
                tasks_per_batch=2,
                validation=tasks.val,
                validation_tasks=2,
            ).records
        )
        == 2
    )


def test_every_class_has_its_own_images_and_stands_in_one_split() -> None:
    tasks = made()
    found = {split: classes_in(tasks, split) for split in ("train", "val", "test")}
    assert set.union(*found.values()) == set(range(CLASSES))
    assert sum(map(len, found.values())) == CLASSES
    assert [len(found[split]) for split in ("train", "val", "test")] == [8, 2, 2]
    for split, names in found.items():
        assert set(getattr(tasks, split).classes.names) == {str(name) for name in names}
        batch = getattr(tasks, split).batch(1, range(20))
        labels = (batch.support_x[:, :, 0, 0, 0] * 255).round().long()
        assert bool((labels[:, 0] != labels[:, 1]).all())


def test_names_and_splits_are_as_given() -> None:
    names = [f"class {index}" for index in range(CLASSES)]
    tasks = made(names=names, splits={"train": names[:6], "val": names[6:8], "test": names[9:12]})
    assert [getattr(tasks, split).classes.names for split in ("train", "val", "test")] == [
        tuple(names[:6]),
        tuple(names[6:8]),
        tuple(names[9:12]),
    ]
    assert classes_in(tasks, "test") == {9, 10, 11}


class Pictures(Dataset[Any]):
    """PIL images, as a torchvision dataset gives them."""

    def __init__(self, mode: str = "L") -> None:
        self.classes = [f"c{index}" for index in range(CLASSES)]
        self.mode = mode

    def __len__(self) -> int:
        return CLASSES * COUNT

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new(
            self.mode, (4, 5), index % CLASSES if self.mode == "L" else (index % CLASSES, 0, 9)
        ), index % CLASSES


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_dataset_of_pictures(mode: str, channels: int) -> None:
    tasks = LabelledTasks.from_dataset(Pictures(mode), ways=2, shots=1, queries=2)
    assert tasks.input_shape == (channels, 5, 4)
    assert tasks.train.classes.names[0].startswith("c")
    assert tasks.describe()["origin"] == "the dataset Pictures"
    assert sum(len(classes_in(tasks, split)) for split in ("train", "val", "test")) == CLASSES


RED, BLUE, WHITE = (200, 10, 20), (30, 40, 210), (255, 255, 255)
MODES: dict[str, tuple[Any, Any, tuple[int, ...], tuple[int, ...]]] = {
    "1": (0, 1, (0,), (255,)),
    "L": (40, 200, (40,), (200,)),
    "LA": ((40, 255), (0, 0), (40,), (255,)),
    "P": (0, 1, RED, BLUE),
    "P, transparent": (0, 1, RED, WHITE),
    "PA": ((0, 255), (1, 0), RED, WHITE),
    "RGB": (RED, BLUE, RED, BLUE),
    "RGBA": ((*RED, 255), (0, 0, 0, 0), RED, WHITE),
    "RGBA, half": ((*RED, 255), (0, 0, 0, 128), RED, (127, 127, 127)),
    "CMYK": ((0, 255, 255, 0), (0, 0, 0, 255), (255, 0, 0), (0, 0, 0)),
    "YCbCr": ((255, 128, 128), (0, 128, 128), WHITE, (0, 0, 0)),
}
"""By mode of Pillow, the values of ink and ground, and the pixels that they are."""


def drawing(mode: str, number: int) -> Image.Image:
    """Six pixels: the bits of a number in ink, then one of ink and one of ground."""
    ink, ground, *_ = MODES[mode]
    form = mode.partition(",")[0]
    image = Image.new(form, (6, 1))
    if form in ("P", "PA"):
        image.putpalette([*RED, *BLUE])
    image.putdata([ink if number >> bit & 1 else ground for bit in range(4)] + [ink, ground])
    if mode == "P, transparent":
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_what_it_shows_as_in_a_folder(mode: str, tmp_path: Path) -> None:
    _, _, ink, ground = MODES[mode]
    pictures = [(drawing(mode, number // 2), number // 2) for number in range(2 * CLASSES)]
    sizes = {"ways": 2, "shots": 1, "queries": 1}
    tasks = LabelledTasks.from_dataset(pictures, **sizes)
    for split in ("train", "val", "test"):
        classes = getattr(tasks, split).classes
        for name, image in zip(classes.names, classes.images[::2], strict=True):
            shown = [ink if int(name) >> bit & 1 else ground for bit in range(4)] + [ink, ground]
            assert image[:, 0].T.tolist() == [list(pixel) for pixel in shown]
    if mode not in ("PA", "CMYK", "YCbCr"):  # which a PNG cannot hold
        for number, (image, label) in enumerate(pictures):
            (tmp_path / str(label)).mkdir(exist_ok=True)
            image.save(tmp_path / str(label) / f"{number}.png")
        colours = "colour" if len(ink) == 3 else "grey"
        folder = Folder(tmp_path, **sizes, mode=colours, size=None, invert=False)
        assert torch.equal(folder.train.classes.images, tasks.train.classes.images)


def test_a_lab_picture_can_be_grey(tmp_path: Path) -> None:
    for label in range(CLASSES):
        (tmp_path / str(label)).mkdir()
        for number in range(2):
            # Lightness alone, with both colour axes at their middle, is a grey.
            image = Image.new("LAB", (2, 1), (255, 128, 128))
            image.putpixel((0, 0), (20 * label, 128, 128))
            image.save(tmp_path / str(label) / f"{number}.tif")
    tasks = Folder(tmp_path, ways=2, shots=1, queries=1, size=None, invert=False)
    assert tasks.input_shape == (1, 1, 2)
    assert tasks.train.classes.images[..., 1].min() >= 250


def pictures(data: bytes) -> Iterator[Image.Image]:
    """An image as a dataset may give it: opened, loaded, or converted already."""
    yield Image.open(BytesIO(data))
    (loaded := Image.open(BytesIO(data))).load()
    yield loaded
    yield Image.open(BytesIO(data)).convert("RGB")


def encoded(form: str, exif: Image.Exif | bytes) -> bytes:
    """Blocks of grey, 3 x 2 of 8 x 8 pixels, which even a JPEG keeps apart."""
    image = Image.fromarray(
        np.kron(40 * np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones((8, 8)))
    )
    buffer = BytesIO()
    image.convert("L").save(buffer, form, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))  # of which 1 to 8 are known
def test_a_photograph_is_read_as_it_is_shown(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(form, exif)
    with Image.open(BytesIO(data)) as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert shown.shape[:2] == ((24, 16) if orientation in (5, 6, 7, 8) else (16, 24))
    read = read_image("it", lambda: data, "colour", None)
    assert np.array_equal(read.transpose(1, 2, 0), shown)
    for turned in (converted(picture, "colour") for picture in pictures(data)):
        assert np.array_equal(np.asarray(turned), shown)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # from opening it
def test_a_photograph_with_broken_exif_is_read_as_it_is_stored() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0" + bytes([200] * 9), b"nonsense"):
        read = read_image("it", lambda exif=exif: encoded("JPEG", exif), "grey", None)
        assert np.array_equal(read, read_image("it", lambda: encoded("JPEG", b""), "grey", None))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "F"])
def test_a_picture_of_more_than_8_bits_is_refused_as_in_a_folder(mode: str) -> None:
    pictures = [(Image.new(mode, (2, 1), 300 + label), label) for label in range(CLASSES)]
    with pytest.raises(RequestError) as error:
        LabelledTasks.from_dataset(pictures, ways=2, shots=1, queries=1)
    assert str(error.value) == (
        f"item 0 of the dataset is an image that cannot be read (its mode {mode} has more than 8 "
        "bits a channel): "
        "let the dataset's transform scale it to 8 bits, or to a float tensor in [0, 1]"
    )


def test_datasets_of_tensors_and_arrays() -> None:
    images, labels = tensors()
    bytes_, floats = (
        LabelledTasks.from_dataset(TensorDataset(x, labels), ways=2, shots=1, queries=2)
        for x in (images, images.double() / 255)
    )
    assert torch.equal(bytes_.train.batch(0, [0]).support_x, floats.train.batch(0, [0]).support_x)
    pairs: Any = [(np.full((4, 4), label, np.uint8), np.int64(label)) for label in labels.tolist()]
    assert LabelledTasks.from_dataset(pairs, ways=2, shots=1, queries=2).input_shape == (1, 4, 4)


NAMES = [str(index) for index in range(CLASSES)]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"names": NAMES[:5]},
            "labelled tasks: the label 5 is no class, as there are 5 names: correct labels or "
            "names",
        ),
        (
            {"names": ["same"] * CLASSES},
            "labelled tasks: two labels are named 'same': give every class a name of its own",
        ),
        (
            {"splits": {"train": NAMES[:6], "vall": NAMES[6:]}},
            "unknown split 'vall': did you mean 'val'?",
        ),
        (
            {"splits": {"train": NAMES}},
            "labelled tasks: the splits do not name 'val', 'test': give train, val and test",
        ),
        (
            {"splits": {"train": NAMES[:6], "val": NAMES[5:8], "test": NAMES[8:]}},
            "the class '5' stands in the train and in the val split, so it would not be new to the "
            "model: keep it in one of them",
        ),
        (
            {"splits": {"train": ["0", "1"], "val": ["2", "3"], "test": ["4", "50"]}},
            "unknown class of the test split '50': did you mean '5'",
        ),
        (
            {"splits": {"train": NAMES[:8], "val": NAMES[8:], "test": []}},
            "2-way tasks need 2 classes, but the test split has 0",
        ),
        (
            {"fractions": (0.5, 0.5, 0.5)},
            "labelled tasks: fractions = (0.5, 0.5, 0.5): they must be at least 0 and sum to 1",
        ),
        (
            {"fraction": (0.5, 0.3, 0.2)},
            "labelled tasks: unknown field 'fraction': did you mean 'fractions'?",
        ),
        ({"queries": 9}, "1 shots and 9 queries need 10 images of every class, but the class '"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError) as error:
        made(**given)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (
            torch.zeros(4, 2, 3),
            torch.zeros(4).long(),
            "images of shape (4, 2, 3) and torch.int64 labels of shape (4,) do not fit",
        ),
        (
            torch.zeros(4, 1, 2, 3),
            torch.zeros(3).long(),
            "images of shape (4, 1, 2, 3) and torch.int64 labels of shape (3,) do not fit",
        ),
        (
            torch.zeros(4, 1, 2, 3),
            torch.zeros(4),
            "images of shape (4, 1, 2, 3) and torch.float32 labels of shape (4,) do not fit",
        ),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(
    images: torch.Tensor, labels: torch.Tensor, text: str
) -> None:
    with pytest.raises(RequestError) as error:
        LabelledTasks(images, labels)
    assert (
        str(error.value)
        == f"labelled tasks: {text}: give images (N, channels, height, width) and N integer labels"
    )


LAST = [
    ((32, 32, 3), torch.uint8),
    ((32, 48, 3), torch.uint8),
    ((28, 28, 1), torch.uint8),
    ((32, 32, 3), torch.float32),
    ((28, 28, 1), torch.float32),
    ((8, 8, 4), torch.float32),
]
FIRST = [
    ((3, 32, 32), torch.uint8),
    ((3, 3, 3), torch.uint8),
    ((4, 4, 3), torch.uint8),
    ((13, 1, 1), torch.uint8),
    ((64, 8, 3), torch.float32),
    ((64, 8, 4), torch.float32),
    ((64, 4, 4), torch.float32),
    ((64, 1, 1), torch.float32),
    ((1, 28, 28), torch.float32),
    ((3, 5, 1), torch.uint8),
]


def sources_of(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Callable[[], ImageSource]]:
    """All that take images: tensors, arrays, the items of a dataset, arrays by class."""
    sizes: Any = {"ways": 2, "shots": 1, "queries": 1}
    labels = torch.arange(CLASSES).repeat_interleave(2)
    places = torch.arange(2 * CLASSES).reshape(-1, 1, 1, 1).expand(-1, *shape)
    x = (places / 32 if dtype.is_floating_point else places).to(dtype)
    yield lambda: LabelledTasks(x, labels, **sizes)
    yield lambda: LabelledTasks(x.numpy(), labels.numpy(), **sizes)
    yield lambda: LabelledTasks.from_dataset(TensorDataset(x, labels), **sizes)
    by_class = dict(zip(NAMES, x.split(2), strict=True))
    parts = {
        split: {name: by_class[name] for name in NAMES[place::3]}
        for place, split in enumerate(("train", "val", "test"))
    }
    yield lambda: ArrayTasks(**parts, **sizes)


@pytest.mark.parametrize(("shape", "dtype"), LAST)
def test_channels_last_are_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for make in sources_of(shape, dtype):
        with pytest.raises(RequestError) as error:
            make()
        assert str(error.value) == (
            f"class images: images of shape {shape} have their channels last: give (channels, "
            "height, width), as torch.as_tensor(images).permute(0, 3, 1, 2) has them"
        )


@pytest.mark.parametrize(("shape", "dtype"), FIRST)
def test_images_that_only_look_like_channels_last_are_taken(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for make in sources_of(shape, dtype):
        assert make().input_shape == shape


def stream_of_pairs() -> Any:
    yield torch.zeros(1, 2, 2), 0


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ([], "the dataset list is empty: give one with images"),
        (
            stream_of_pairs(),
            "generator is no map-style dataset: give one with a length, whose items are found by "
            "index",
        ),
        (
            [torch.zeros(3)],
            "item 0 of the dataset is no pair of an image and an integer label: give (image, "
            "label)",
        ),
        (
            [(torch.zeros(1, 2, 2), "cat")],
            "item 0 of the dataset is no pair of an image and an integer label: give (image, "
            "label)",
        ),
        (
            [(torch.zeros(1, 2, 2), 0.5)],
            "item 0 of the dataset has the label 0.5: give images (channels, height, width) and "
            "integer labels",
        ),
        (
            [(torch.zeros(2), 0)],
            "item 0 of the dataset has an image of shape (2,): give images (channels, height, "
            "width) and integer labels",
        ),
        (
            [(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 3), 1)],
            "item 1 of the dataset is torch.float32 of shape (1, 2, 3), item 0 torch.float32 of "
            "(1, 2, 2), but one model takes one form: "
            "resize or convert them in the dataset's transform",
        ),
    ],
)
def test_datasets_that_are_none_are_refused(dataset: Any, text: str) -> None:
    with pytest.raises(RequestError) as error:
        LabelledTasks.from_dataset(dataset)
    assert str(error.value) == text
