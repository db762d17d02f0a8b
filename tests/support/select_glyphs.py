"""How the table of letters was chosen: `python tests/support/select_glyphs.py` writes it.

Letters (Unicode categories Lu, Ll, Lo) of six scripts that at least eight of the sixteen faces
have, less look-alikes. Plain letters, those that are their own NFKD, come before accented ones and
ligatures; so the plain letters are the same with and without the others.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray

from metaplug.tasks.glyphs.rendering import (
    SIDE,
    UPRIGHT,
    Face,
    draw_letter,
    file_hash,
    font_folder,
    load_face,
    render_classes,
    warp,
)
from metaplug.tasks.glyphs.source import TABLE_PATH, letters_of

FACES = (
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
)
UNSTEADY = {
    "STIXGeneral.ttf": "Ññɠ",
    "STIXGeneralBol.ttf": "ÑñǾέﬀﬃ",
    "STIXGeneralItalic.ttf": "Ññ",
    "STIXGeneralBolIta.ttf": "Ññɧ",
}
"""Letters of a face that Pillow 10.0, 11.3 and 13.0 hint differently; it is not used for them."""
SPLIT_OF = {
    "LAO": "val",
    "GEORGIAN": "test",
    "ARMENIAN": "test",
    "CYRILLIC": "train",
    "GREEK": "val",
    "LATIN": "train",
}
"""The split of every script; the first script that has a letter keeps it from look-alikes."""
FEWEST_FACES = 8
MOST_ALIKE_FACE_BY_FACE = 0.90
"""Look-alikes: mean, over the faces that have both letters, of the cosine of their pixels."""
MOST_ALIKE_ON_AVERAGE = 0.95
"""Cosine of the letters' mean images; likewise. Neither alone finds all of o and O, A and Α."""


def select() -> dict[str, Any]:
    """The table, ready for JSON."""
    faces = [load_face(font_folder() / name) for name in FACES]
    owned = [
        set(FT2Font(str(font_folder() / name)).get_charmap())
        - set(map(ord, UNSTEADY.get(name, "")))
        for name in FACES
    ]
    found = {
        chr(code): [index for index, codes in enumerate(owned) if code in codes]
        for code in sorted(set().union(*owned))
    }
    candidates = {
        letter: own
        for letter, own in found.items()
        if len(own) >= FEWEST_FACES and _script(letter) is not None
    }
    kept = _without_look_alikes(candidates, faces)
    table: dict[str, Any] = {"fonts": {name: file_hash(font_folder() / name) for name in FACES}}
    for group, plain in (("plain", True), ("accented", False)):
        table[group] = {
            split: _by_faces(
                {k: candidates[k] for k in kept if _is_plain(k) is plain and _split(k) == split}
            )
            for split in ("train", "val", "test")
        }
    table["pixels"] = {group: _pixel_hash(table, group, faces) for group in ("plain", "accented")}
    return table


def _script(letter: str) -> str | None:
    word = unicodedata.name(letter, "").split(" ")[0]
    return word if word in SPLIT_OF and unicodedata.category(letter) in ("Lu", "Ll", "Lo") else None


def _split(letter: str) -> str:
    return SPLIT_OF[_script(letter) or ""]


def _is_plain(letter: str) -> bool:
    return unicodedata.normalize("NFKD", letter) == letter


def _without_look_alikes(candidates: Mapping[str, list[int]], faces: list[Face]) -> list[str]:
    """The letters like none that comes before them in right, in order of code points."""
    letters = list(candidates)
    pixels = np.zeros((len(letters), len(faces), SIDE * SIDE), np.float32)
    for row, letter in enumerate(letters):
        for index in candidates[letter]:
            pixels[row, index] = warp(draw_letter(letter, faces[index]), UPRIGHT).reshape(-1)
    owned = np.asarray(pixels.any(-1), np.float32)
    unit = _unit(pixels).reshape(len(letters), -1)
    face_by_face = (unit @ unit.T) / np.maximum(owned @ owned.T, 1)
    mean = _unit(pixels.sum(1))
    alike = (face_by_face >= MOST_ALIKE_FACE_BY_FACE) | (mean @ mean.T >= MOST_ALIKE_ON_AVERAGE)
    scripts = list(SPLIT_OF)
    kept: list[int] = []
    for row in sorted(
        range(len(letters)),
        key=lambda row: (
            not _is_plain(letters[row]),
            scripts.index(_script(letters[row]) or ""),
            row,
        ),
    ):
        if not alike[row, kept].any():
            kept.append(row)
    return [letters[row] for row in sorted(kept)]


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: NDArray[np.float32] = rows / np.maximum(lengths, np.float32(1e-9))
    return unit


def _by_faces(letters: Mapping[str, list[int]]) -> dict[str, str]:
    """Letters grouped by the faces that have them: {one hexadecimal bit mask: all its letters}."""
    grouped: dict[str, str] = {}
    for letter, own in letters.items():
        mask = f"{sum(1 << index for index in own):04x}"
        grouped[mask] = grouped.get(mask, "") + letter
    return dict(sorted(grouped.items()))


def _pixel_hash(table: Mapping[str, Any], group: str, faces: list[Face]) -> str:
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        letters = letters_of(table[group][split])
        digest.update(render_classes(list(letters), list(letters.values()), faces)[0].tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    Path(TABLE_PATH).write_text(
        json.dumps(select(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
