"""The pixels of an image: decoded within bounds, converted in one way for every source."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from metaplug.errors import RequestError, reason

Mode = Literal["grey", "colour"]

# Pillow goes by content, not by name: without the list it hands an EPS named .png to Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MOST_PIXELS = 50_000_000
_MOST_SCANS = 1000
"""Of a progressive JPEG: cameras write about ten, and each costs the time of the whole image."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By orientation in EXIF, what brings an image into the position in which it is shown."""


def converted(image: Image.Image, mode: Mode | None = None) -> Image.Image:
    """An image as viewers show it, as 8 bits a channel, on white paper where it is transparent.

    It is turned and mirrored as its EXIF orientation says; one without stays as it is.

    Args:
        image: of any of Pillow's modes.
        mode: "grey" for one channel (mode L), "colour" for three (mode RGB); None keeps what the
            image has: one channel for the modes 1, L and LA, three for all others.

    Raises:
        ValueError: a channel has more than 8 bits (modes I, I;16 and F). Pillow would clip it, and
            no range of values is known to scale it by.
    """
    if image.mode[0] in "IF":
        raise ValueError(f"its mode {image.mode} has more than 8 bits a channel")
    image = _upright(image)
    if image.mode == "LAB":  # which Pillow converts to RGB only
        image = image.convert("RGB")
    grey = image.mode in ("1", "L", "LA", "La") if mode is None else mode == "grey"
    if image.has_transparency_data:
        # Dropping alpha alone would leave ink on a transparent ground black on black.
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("L" if grey else "RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image in the position in which it is shown; EXIF that is broken says nothing of it."""
    image.load()  # by which Pillow turns a TIFF itself, and forgets its orientation
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        turn = _TURNS.get(orientation)
    except Exception:  # on broken EXIF Pillow raises SyntaxError, struct.error and more
        return image
    return image if turn is None else image.transpose(turn)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """A converted image as an array (channels, height, width)."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1).copy()


def read_image(
    name: object, read: Callable[[], bytes], mode: Mode, size: int | None
) -> NDArray[np.uint8]:
    """An image file as an array (channels, height, width).

    Args:
        name: of the file, for errors.
        read: returns the file's bytes.
        mode: as for `converted`.
        size: side after resizing, in pixels; None keeps the image's own.

    Raises:
        RequestError: the file cannot be read or decoded, or is too large to be; it is named.
    """
    try:
        data = read()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise Image.DecompressionBombError
                if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MOST_SCANS:
                    raise ValueError(f"it has more than the {_MOST_SCANS} scans that are read")
                found = converted(image, mode)
                if size is not None and found.size != (size, size):
                    found = found.resize((size, size), Image.Resampling.BOX)
                return to_array(found)
    except RequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(
            f"the image {name} has more than the {_MOST_PIXELS} pixels that are read: make it "
            "smaller, or remove it"
        ) from None
    except Exception as error:  # on broken bytes Pillow raises struct.error, KeyError and many more
        unknown_format = isinstance(error, UnidentifiedImageError)
        words = "no known image format" if unknown_format else reason(error)
        raise RequestError(
            f"the image {name} cannot be read ({words}): replace it, or remove it"
        ) from None
