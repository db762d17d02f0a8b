"""Decoded images of all splits, kept in the cache folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaplug.tasks.cache import make_room, read_cached, write_cached
from metaplug.tasks.images.class_images import ClassImages

_FEWEST = 1000
"""Images of a set that is kept: fewer are decoded in a moment."""
_LENGTH_BYTES = 8
"""The length of the head, at the start of a file."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodedImages:
    """The images of all splits, as tasks are drawn from them.

    Attributes:
        splits: by split, its uint8 images, without styles.
        inverted: whether dark and bright are exchanged in them.
    """

    splits: Mapping[str, ClassImages]
    inverted: bool


def read_decoded(path: Path, most_bytes: int) -> DecodedImages | None:
    """What `write_decoded` put at `path`; None where it is missing, damaged or larger."""
    content = read_cached(path, most_bytes, "images")
    if content is None:
        return None
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    head = json.loads(content[_LENGTH_BYTES:start])
    splits = {}
    for split, own in head["splits"].items():
        size = prod(own["shape"])
        # A view, not a copy: a bytearray may be written on.
        pixels = np.frombuffer(content, np.uint8, size, start).reshape(own["shape"])
        above = own["superclasses"]
        splits[split] = ClassImages(
            tuple(own["names"]),
            torch.from_numpy(pixels),
            tuple(own["counts"]),
            superclasses=None if above is None else tuple(above),
        ).known_by(own["digests"])
        start += size
    return DecodedImages(splits, head["inverted"])


def write_decoded(
    path: Path, decoded: DecodedImages, *, most_bytes: int, folder_bytes: int
) -> None:
    """Put images in the cache, with the digests of their classes, which take long to compute.

    The file is the length of the head, the head in JSON, and the pixels of each split. A set of
    under 1000 images, or beyond `most_bytes`, is not kept; sets of the same folder that were not
    used for longest make room for it.

    Args:
        path: of the file, in a folder for such files alone.
        decoded: the images.
        most_bytes: bound on the file.
        folder_bytes: bound on all files of the folder together.
    """
    heads: dict[str, Mapping[str, Any]] = {}
    pixels = []
    for split, classes in decoded.splits.items():
        heads[split] = {
            "names": classes.names,
            "counts": classes.counts,
            "shape": list(classes.images.shape),
            "superclasses": classes.superclasses,
            "digests": classes.digests,
        }
        pixels.append(classes.images.numpy().reshape(-1).data)
    text = json.dumps({"inverted": decoded.inverted, "splits": heads}).encode()
    size = _LENGTH_BYTES + len(text) + sum(map(len, pixels))
    if sum(len(classes.images) for classes in decoded.splits.values()) < _FEWEST:
        return
    if size > most_bytes:
        _log.info(
            "the images are not cached (they have %d bytes, more than the %d that are kept): they "
            "are decoded at every start",
            size,
            most_bytes,
        )
        return
    make_room(path.parent, size, folder_bytes)
    length = len(text).to_bytes(_LENGTH_BYTES, "little")
    write_cached(path, length, text, *pixels, noun="images")
