"""The task source of letters, with the cache of what is rendered once."""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from metaplug.settings import validated
from metaplug.tasks.cache import read_cached, write_cached
from metaplug.tasks.episodes import EpisodeOptions
from metaplug.tasks.glyphs.rendering import SIDE, VARIANTS, load_faces, render_classes
from metaplug.tasks.images.class_images import ClassImages
from metaplug.tasks.reading import cache_folder
from metaplug.tasks.sources import ImageSource
from metaplug.tasks.splits import SPLITS

TABLE_PATH = Path(__file__).with_name("table.json")
GROUPS = ("plain", "accented")
_MORE_BYTES = 4096
"""The bound of a packed file beyond its unpacked size: what zlib adds at worst."""

Rendered = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images, and the face of each."""

_log = logging.getLogger(__name__)


class GlyphsConfig(EpisodeOptions):
    """Which letters."""

    accents: bool = Field(
        False, description="Whether accented letters and ligatures are classes too."
    )


@final
class Glyphs(ImageSource):
    """Letters rendered from the fonts that matplotlib ships: 28 x 28, ink 1.0 on paper 0.0.

    A class has 20 images in up to 16 faces. Training has Latin and Cyrillic, validation Greek and
    Lao, test Georgian and Armenian letters; look-alikes are left out, across scripts too. Support
    and query images of a class come from different faces as far as there are enough. The letters
    are a committed table; the images are rendered once, in a few seconds, and then kept in
    `cache_folder()`.

    Args:
        ways, shots, queries, seed: as for ImageEpisodes.
        settings: fields of GlyphsConfig.

    Raises:
        RequestError: a setting is wrong, or as ImageEpisodes raises.
        RunError: the fonts are missing, or are not those of the table.

    Warns:
        UserWarning: the images differ from the table's, as an untried FreeType may draw them.
    """

    Config = GlyphsConfig

    def __init__(
        self, *, ways: int = 5, shots: int = 1, queries: int = 15, seed: int = 0, **settings: Any
    ) -> None:
        config = validated(GlyphsConfig, settings, "glyphs")
        groups = GROUPS if config.accents else GROUPS[:1]
        table = json.loads(TABLE_PATH.read_text(encoding="utf-8"))
        loaded = [_load(table, group) for group in groups]
        classes = {}
        for place, split in enumerate(SPLITS):
            letters = [letter for group in groups for letter in letters_of(table[group][split])]
            classes[split] = _class_images(letters, [parts[place] for parts in loaded])
        super().__init__(
            classes,
            config,
            origin="letters from matplotlib's DejaVu and STIX fonts",
            licence="fonts: Bitstream Vera licence (DejaVu), SIL Open Font License 1.1 (STIX)",
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
        )


def letters_of(grouped: Mapping[str, str]) -> dict[str, list[int]]:
    """The letters of one split of the table, by code point, with the indices of their faces."""
    faces = {
        letter: [bit for bit in range(int(mask, 16).bit_length()) if int(mask, 16) >> bit & 1]
        for mask, letters in grouped.items()
        for letter in letters
    }
    return dict(sorted(faces.items()))


def _class_images(letters: list[str], rendered: list[Rendered]) -> ClassImages:
    images, styles = (np.concatenate(parts) for parts in zip(*rendered, strict=True))
    names = tuple(map(unicodedata.name, letters))
    scripts = tuple(name.split()[0] for name in names)
    return ClassImages(names, torch.from_numpy(images), (VARIANTS,) * len(letters), styles, scripts)


def _load(table: Mapping[str, Any], group: str) -> list[Rendered]:
    """A group's images of each split, from the cache if whole, else rendered and put there."""
    letters = [letters_of(table[group][split]) for split in SPLITS]
    key = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"letters-{group}-{key}.bin"
    sizes = [VARIANTS * len(own) for own in letters]
    rendered = _read(path, sum(sizes))
    if rendered is None:
        faces = load_faces(table["fonts"])
        parts = [render_classes(list(own), list(own.values()), faces) for own in letters]
        images, styles = (np.concatenate(both) for both in zip(*parts, strict=True))
        _write(path, images, styles)
    else:
        images, styles = rendered
    if hashlib.sha256(images.tobytes()).hexdigest() != table["pixels"][group]:
        warnings.warn(
            f"the {group} letters differ in some pixels from the tested ones, as this version of "
            "Pillow's FreeType draws them: results are sound, but do not repeat those of other "
            "machines to the last digit; pillow 10 to 13 is tested",
            stacklevel=4,
        )
    bounds = np.cumsum(sizes)[:-1]
    return list(zip(np.split(images, bounds), np.split(styles, bounds), strict=True))


def _read(path: Path, count: int) -> Rendered | None:
    """Read the cache; never more than `_write` can have written is read, nor unpacked."""
    pixels, size = count * SIDE**2, count * (SIDE**2 + 1)
    packed = read_cached(path, size + _MORE_BYTES, "letters")
    if packed is None:
        return None
    try:
        unpacked = zlib.decompressobj().decompress(packed, size + 1)
    except zlib.error as error:
        _log.info("the cached letters in %s cannot be read (%s): making them anew", path, error)
        return None
    if len(unpacked) != size:
        _log.info("the cached letters in %s have another size: making them anew", path)
        return None
    # A bytearray, since the array is to be writable.
    found = np.frombuffer(bytearray(unpacked), np.uint8)
    return found[:pixels].reshape(count, 1, SIDE, SIDE), found[pixels:].astype(np.int64)


def _write(path: Path, images: NDArray[np.uint8], styles: NDArray[np.int64]) -> None:
    """Put the letters in the cache: packed by zlib, the pixels, then a byte for each one's face."""
    content = images.tobytes() + styles.astype(np.uint8).tobytes()
    write_cached(path, zlib.compress(content), noun="letters")
