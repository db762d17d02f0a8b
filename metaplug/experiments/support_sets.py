"""The support set of one new task, read from files as the tasks of a run were."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaplug.contract.inputs import Inputs
from metaplug.errors import RequestError
from metaplug.tasks.episodes import ImageEpisodes
from metaplug.tasks.images.class_files import find_classes
from metaplug.tasks.images.folder import Folder, FolderConfig
from metaplug.tasks.images.pixels import Mode, read_image
from metaplug.tasks.sources import TaskSource
from metaplug.tasks.text.source import Text
from metaplug.tasks.text.table import read_texts
from metaplug.tasks.text.tokens import tokenize


@dataclass(frozen=True)
class SupportSet:
    """The support examples of one task.

    Attributes:
        x: (n, *input), or several by name.
        y: (n,) int64, places in `labels`.
        labels: the names of the classes, sorted.
        preprocessing: what made numbers of the files, ready for JSON; query examples need it too.
    """

    x: Inputs
    y: Tensor
    labels: tuple[str, ...]
    preprocessing: dict[str, Any]


def read_support(tasks: TaskSource, path: Path, *, most: int | None = None) -> SupportSet:
    """Read a support set from files, by the preprocessing of a run's tasks.

    Args:
        tasks: the source of the run's tasks.
        path: for images a folder of class folders, or a zip, as `folder:` reads them; for texts a
            table with the columns of the run's own.
        most: tokens that the model takes, for texts that have no more; None: any number.

    Raises:
        RequestError: the run's tasks are neither; or the files are not what they should be.
    """
    if isinstance(tasks, Text):
        return _read_texts(tasks, path, most)
    if isinstance(tasks.train, ImageEpisodes):
        return _read_images(tasks, path)
    raise RequestError(
        f"--support {path}: the run's tasks are from '{type(tasks).__name__.lower()}', and only "
        "images and texts are read from files here: in Python, give learner.adapt the support "
        "tensors, and what it returns to metaplug.experiments.export.export_adapted"
    )


def _read_images(tasks: TaskSource, path: Path) -> SupportSet:
    channels, height, width = tasks.input_shape
    if channels not in (1, 3):
        raise RequestError(
            f"--support {path}: the run's images have {channels} channels, and files are read with "
            "1 or 3: in Python, give learner.adapt the support tensors"
        )
    mode: Mode = "grey" if channels == 1 else "colour"
    size = tasks.config.size if isinstance(tasks.config, FolderConfig) else height
    if height != width:
        size = None
    images, targets = [], []
    with ExitStack() as stack:
        classes = find_classes(path.expanduser(), stack)
        for target, files in enumerate(classes.values()):
            for file in files:
                image = read_image(file, file.read, mode, size)
                if image.shape[1:] != (height, width):
                    raise RequestError(
                        f"the image {file} has {image.shape[2]} x {image.shape[1]} pixels, but "
                        f"the run's have {width} x {height}: resize it"
                    )
                images.append(torch.from_numpy(image))
                targets.append(target)
    pixels = torch.stack(images)
    inverted = _inverted(tasks, pixels)
    if inverted:
        pixels.bitwise_not_()
    preprocessing = {
        "kind": "images",
        "mode": mode,
        "height": height,
        "width": width,
        "inverted": inverted,
        "values": "(255 - pixel) / 255 where inverted, else pixel / 255",
    }
    x = pixels.float().div_(255)
    return SupportSet(x, torch.tensor(targets), tuple(classes), preprocessing)


def _inverted(tasks: TaskSource, pixels: Tensor) -> bool:
    """Whether dark and bright are exchanged, so that ink and paper are as in training."""
    if isinstance(tasks, Folder):
        return tasks.inverted
    assert isinstance(tasks.train, ImageEpisodes)
    trained = tasks.train.classes.images
    if len(pixels[0]) > 1:
        return False
    half = 0.5 if trained.is_floating_point() else 127.5
    return (float(trained.double().mean()) > half) != (float(pixels.double().mean()) > 127.5)


def _read_texts(tasks: Text, path: Path, most: int | None) -> SupportSet:
    config = tasks.config
    assert config.tokenizer is not None  # or there would be no source
    own = config.model_copy(update={"label": tasks.describe()["columns"]["label"]})
    table = read_texts(path.expanduser(), own, ("text", "label"))
    tokens = tokenize(table.texts, config.tokenizer, config.max_length, download=False)
    # Of full length, as a program has the length that it was made with.
    length = config.max_length
    if most is not None and tokens.lengths.max() <= most:
        length = min(length, most)
    ids = np.full((len(table.texts), length), tokens.pad, np.int64)
    mask = np.arange(length) < tokens.lengths[:, None]
    ids[mask] = tokens.ids
    labels = tuple(sorted(table.classes))
    y = torch.empty(len(table.texts), dtype=torch.int64)
    for target, name in enumerate(labels):
        y[table.classes[name]] = target
    preprocessing = {
        "kind": "texts",
        "tokenizer": config.tokenizer,
        "max_length": length,
        "padding": f"to max_length, at the end, with the id {tokens.pad}",
    }
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }
    return SupportSet(inputs, y, labels, preprocessing)
