"""Letters as small images, drawn by Pillow from matplotlib's own fonts.

They are warped in integers, so every machine has the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from metaplug.errors import RunError

SIDE = 28
"""Pixels of an image's side."""
VARIANTS = 20
"""Images of a class."""
_FONT_SIZE = 56
_INK = 21
"""Pixels that the longer side of a letter takes before it is warped."""
_SAMPLES = 6
"""Samples of a pixel's side, over which it is averaged."""
_ONE = 4096
"""1.0 in the fixed-point numbers of a warp."""
_SHEAR = 400
"""Bound of a warp's departure from the identity, each matrix entry; in 1 / _ONE."""
_SHIFT = 3 * _SAMPLES // 2
"""Bound of a warp's shift, in samples."""
_GRID = 2 * np.arange(SIDE * _SAMPLES, dtype=np.int32) + 1 - SIDE * _SAMPLES
"""Distance of every sample from the middle, in half samples."""

Warp = tuple[int, int, int, int, int, int]
UPRIGHT: Warp = (0, 0, 0, 0, 0, 0)
Face = ImageFont.FreeTypeFont


def font_folder() -> Path:
    """The folder of matplotlib's fonts."""
    # matplotlib is slow to import, and a cached data set needs none of it.
    from matplotlib import get_data_path  # noqa: PLC0415

    return Path(get_data_path(), "fonts", "ttf")


def load_faces(hashes: Mapping[str, str]) -> list[Face]:
    """The faces of the font files `hashes`, by file name with its SHA-256.

    Raises:
        RunError: a file is missing or is another one than was tested.
    """
    faces = []
    for name, expected in hashes.items():
        path = font_folder() / name
        if not path.is_file():
            raise RunError(
                f"glyphs are drawn with matplotlib's fonts, but {path} is missing: install "
                "matplotlib from its own wheel"
            )
        if file_hash(path) != expected:
            raise RunError(
                f"glyphs are drawn with matplotlib's fonts, but {path} is not the file that the "
                "data set was made with: install matplotlib 3.8 to 3.11 from its own wheel"
            )
        faces.append(load_face(path))
    return faces


def load_face(path: Path) -> Face:
    """One face, with the basic layout engine: the other one differs between machines."""
    return ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def render_classes(
    letters: Sequence[str], faces_of: Sequence[Sequence[int]], faces: Sequence[Face]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw VARIANTS images of every letter, each in another small warp, its faces taking turns.

    Args:
        letters: single characters.
        faces_of: for every letter, the indices into `faces` of those that have it.
        faces: as loaded.

    Returns:
        Images (len(letters) * VARIANTS, 1, SIDE, SIDE), ink 255 on 0, letter after letter; and each
        image's index into `faces`.
    """
    images = np.empty((len(letters), VARIANTS, SIDE, SIDE), np.uint8)
    styles = np.empty((len(letters), VARIANTS), np.int64)
    for row, (letter, own) in enumerate(zip(letters, faces_of, strict=True)):
        drawn = {index: draw_letter(letter, faces[index]) for index in own}
        first, *warps = _numbers(letter)
        for variant in range(VARIANTS):
            index = own[(first + variant) % len(own)]
            change = _small_warp(warps[6 * variant : 6 * variant + 6])
            images[row, variant] = warp(drawn[index], change)
            styles[row, variant] = index
    return images.reshape(-1, 1, SIDE, SIDE), styles.reshape(-1)


def draw_letter(letter: str, face: Face) -> NDArray[np.uint8]:
    """Cut out a letter: (height, width), ink 255 on 0. One without ink gives one empty pixel."""
    canvas = Image.new("L", (4 * _FONT_SIZE, 4 * _FONT_SIZE))
    ImageDraw.Draw(canvas).text((_FONT_SIZE, _FONT_SIZE), letter, font=face, fill=255)
    return np.asarray(canvas.crop(canvas.getbbox() or (0, 0, 1, 1)))


def warp(ink: NDArray[np.uint8], change: Warp) -> NDArray[np.uint8]:
    """Scale the ink to the usual size, put it in the middle of an image, and change it.

    The map is affine and in integers only. With c the ink's middle, s its scale and (xx, xy, yx,
    yy, dx, dy) = change, the image's sample at (x, y) from its middle shows

        c + s * [[1 + xx, xy], [yx, 1 + yy]] @ (x - dx, y - dy)

    Args:
        ink: (height, width).
        change: the matrix entries in 1 / 4096, the shifts in samples.

    Returns:
        (SIDE, SIDE), every pixel the mean of its samples.
    """
    xx, xy, yx, yy, dx, dy = change
    height, width = ink.shape
    longest, unit = max(height, width), 2 * _INK * _SAMPLES * _ONE
    x, y = (_GRID - 2 * dx) * longest, (_GRID - 2 * dy) * longest
    column = (width * unit // 2 + (_ONE + xx) * x[None, :] + xy * y[:, None]) // unit
    row = (height * unit // 2 + yx * x[None, :] + (_ONE + yy) * y[:, None]) // unit
    # One pixel of empty border is what every sample beside the ink shows.
    bordered = np.pad(ink, 1)
    places = np.clip(row + 1, 0, height + 1) * (width + 2) + np.clip(column + 1, 0, width + 1)
    samples = bordered.reshape(-1).take(places).reshape(SIDE, _SAMPLES, SIDE, _SAMPLES)
    sums = samples.sum(1, dtype=np.uint32).sum(2)
    means: NDArray[np.uint8] = ((sums + _SAMPLES**2 // 2) // _SAMPLES**2).astype(np.uint8)
    return means


def _numbers(letter: str) -> list[int]:
    """1 + 6 * VARIANTS numbers of 16 bits that depend on the letter alone."""
    digest = hashlib.shake_256(letter.encode()).digest(2 * (1 + 6 * VARIANTS))
    numbers: list[int] = np.frombuffer(digest, "<u2").tolist()
    return numbers


def _small_warp(numbers: Sequence[int]) -> Warp:
    bounds = (_SHEAR, _SHEAR, _SHEAR, _SHEAR, _SHIFT, _SHIFT)
    xx, xy, yx, yy, dx, dy = (
        number % (2 * bound + 1) - bound for number, bound in zip(numbers, bounds, strict=True)
    )
    return xx, xy, yx, yy, dx, dy
