"""The division of classes, or of a table's tasks, into train, val and test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from metaplug.errors import RequestError, one_line, reason, unknown
from metaplug.settings import Settings
from metaplug.tasks.reading import keys_once, no_number, read_regular

SPLITS = ("train", "val", "test")
SPLITS_FORM = '{"train": [names], "val": [names], "test": [names]}'
MOST_BYTES = 64 * 2**20


class SplitFractions(Settings):
    """The split of classes, or tasks, where nothing else says it."""

    fractions: tuple[float, float, float] = Field(
        (0.64, 0.16, 0.20),
        description="Shares for train, val and test, where neither a file nor names split them.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions = {self.fractions}: they must be at least 0 and sum to 1")
        return self


def by_fractions(
    names: Sequence[str], fractions: tuple[float, float, float]
) -> dict[str, list[str]]:
    """Divide names by shares, in the order of a hash of each.

    No seed and no other name changes a name's rank.
    """
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    first = round(fractions[0] * len(ranked))
    second = round((fractions[0] + fractions[1]) * len(ranked))
    parts = (ranked[:first], ranked[first:second], ranked[second:])
    return {split: sorted(part) for split, part in zip(SPLITS, parts, strict=True)}


def in_two_splits(kind: str, name: str, one: str, other: str) -> RequestError:
    """The error for a class, or task, that two splits claim."""
    return RequestError(
        f"the {kind} '{name}' stands in the {one} and in the {other} split, so it would not be new "
        "to the model: keep it in one"
    )


def read_splits(path: Path, of: str) -> dict[str, list[Any]]:
    """The lists of a file {"train": [names], "val": [names], "test": [names]}; some may be missing.

    Args:
        path: of the JSON file.
        of: what is split, such as "class", for errors.

    Raises:
        RequestError: the file cannot be read, is not JSON, or has not that form; it is named.
    """
    try:
        text = read_regular(path, MOST_BYTES)
        given = json.loads(text, object_pairs_hook=keys_once, parse_constant=no_number)
    except OSError as error:
        raise RequestError(
            f"cannot read the splits {path}: {reason(error)}; give a JSON file {SPLITS_FORM}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the splits {path} are not JSON ({reason(error)}): write {SPLITS_FORM}"
        ) from None
    lists = list(given.values()) if isinstance(given, dict) else [None]
    if not all(
        isinstance(names, list) and all(isinstance(name, str | int | float) for name in names)
        for names in lists
    ):
        raise RequestError(
            f"the splits {path} are not lists of {of} names by split: write {SPLITS_FORM}"
        )
    if wrong := [split for split in given if split not in SPLITS]:
        raise RequestError(f"the splits {path}: {unknown('split', one_line(wrong[0], 80), SPLITS)}")
    return dict(given)
