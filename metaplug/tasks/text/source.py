"""Tasks from anyone's texts: a table with a column of texts and one of labels."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from metaplug.errors import RequestError, one_line, quoted, unknown
from metaplug.settings import validated
from metaplug.tasks.sources import TaskSource, check_contents_apart
from metaplug.tasks.splits import SPLITS, SPLITS_FORM, by_fractions, in_two_splits, read_splits
from metaplug.tasks.text.episodes import ClassTexts, TextEpisodes
from metaplug.tasks.text.table import TextConfig, TextTable, read_texts
from metaplug.tasks.text.tokens import Tokens, tokenize


@final
class Text(TaskSource):
    """Texts with labels from a table: `text:PATH`, its columns in `tasks.settings`.

    A table is a CSV file (UTF-8, with a header), JSON lines (named .jsonl or .json, one object a
    line) or a Parquet file (named .parquet), with a column of texts and one of labels, which are
    the classes; a column of groups may give each class a super-class. Classes are split by a file
    {"train": [names], "val": [names], "test": [names]}, where a name is a label, or a group, which
    takes all of its labels; else by a column; else by `fractions`, in the order of a hash of the
    labels. No seed changes a split.

    Texts are tokenised once, by a tokenizer of transformers, cut at `max_length` tokens, and kept
    in `cache_folder()`. Batches are {"input_ids", "attention_mask"}, padded to their longest text.

    Args:
        path: the file.
        ways, shots, queries, seed: as for TextEpisodes.
        settings: fields of TextConfig.

    Raises:
        RequestError: a setting, the file, a column, a row, a split or the tokenizer is wrong; it is
            named. Or as TextEpisodes raises.
    """

    Config = TextConfig
    argument = "path"
    inputs = ("input_ids", "attention_mask")

    config: TextConfig
    train: TextEpisodes
    val: TextEpisodes
    test: TextEpisodes

    def __init__(
        self,
        path: str | Path,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.config = config = validated(TextConfig, settings, "text")
        self._path = Path(path).expanduser()
        table = read_texts(self._path, config)
        names = _split(table, self._path, config)
        if config.tokenizer is None:
            raise RequestError(
                "text has no tokenizer: set tokenizer to a folder that has a tokenizer.json, or to "
                "a name on the hub of Hugging Face; a model transformers:NAME brings its own"
            )
        tokens = tokenize(
            table.texts, config.tokenizer, config.max_length, download=config.download
        )
        self._tokens, self._columns = tokens, table.columns
        self.kind = "classification"
        self.input_shape = (config.max_length,)
        self.outputs = config.most_ways(ways)
        sizes = {"ways": ways, "shots": shots, "queries": queries, "seed": seed}
        self.train, self.val, self.test = (
            TextEpisodes(
                _class_texts(table, names[split], tokens),
                split=split,
                options=config if split == "train" else config.of_evaluation,
                outputs=self.outputs,
                **sizes,
            )
            for split in SPLITS
        )
        for one, other in combinations((self.train, self.val, self.test), 2):
            given = [
                {text: name for name, text in each.identities.items()} for each in (one, other)
            ]
            check_contents_apart(one.split, given[0], other.split, given[1], "texts")

    def describe(self) -> dict[str, Any]:
        """The data in words and numbers, ready for JSON."""
        sizes = {
            stream.split: {
                "classes": len(stream.classes.names),
                "texts": len(stream.classes.texts),
            }
            for stream in (self.train, self.val, self.test)
        }
        tokens = self._tokens
        return self._described(str(self._path), "not stated", sizes) | {
            "columns": self._columns,
            "tokenizer": self.config.tokenizer,
            "vocabulary": tokens.vocabulary,
            "tokens": {
                "mean": round(float(tokens.lengths.mean()), 2),
                "max": int(tokens.lengths.max()),
                "cut_texts": int(tokens.cut.sum()),
            },
        }

    def resolved(self) -> dict[str, Any]:
        """The tokenizer, also where it is the model's own, and the most tokens of a text."""
        return self.config.model_dump(mode="json", include={"tokenizer", "max_length"})


def _class_texts(table: TextTable, names: list[str], tokens: Tokens) -> ClassTexts:
    places = np.concatenate([table.classes[name] for name in names])
    begins = np.cumsum(tokens.lengths) - tokens.lengths
    rows = [tokens.ids[begins[place] : begins[place] + tokens.lengths[place]] for place in places]
    groups = table.groups
    return ClassTexts(
        tuple(names),
        tuple(len(table.classes[name]) for name in names),
        tuple(table.texts[place] for place in places),
        torch.from_numpy(np.concatenate(rows)),
        tokens.lengths[places],
        tokens.pad,
        None if groups is None else tuple(groups[name] for name in names),
    )


def _split(table: TextTable, path: Path, config: TextConfig) -> dict[str, list[str]]:
    """The labels of every split, sorted."""
    beside = path.parent / "splits.json"
    if config.split_column is not None:
        owner: Mapping[str, str] = table.splits
    elif config.splits is not None or beside.is_file():
        owner = _by_file(config.splits or beside, table)
    else:
        parts = by_fractions(list(table.classes), config.fractions)
        owner = {name: split for split, own in parts.items() for name in own}
    names = {split: sorted(name for name in owner if owner[name] == split) for split in SPLITS}
    for split in SPLITS:
        if not names[split]:
            raise RequestError(
                f"the {split} split has none of the {len(table.classes)} classes of the table "
                f"{path}: give it some, by splits, by split_column or by a larger share in "
                "fractions"
            )
    return names


def _by_file(path: Path, table: TextTable) -> dict[str, str]:
    """By label that the file names, itself or by its group, the split."""
    given = {split: list(map(str, own)) for split, own in read_splits(path, "class").items()}
    if missing := [split for split in SPLITS if split not in given]:
        raise RequestError(f"the splits {path} do not name {quoted(missing)}: write {SPLITS_FORM}")
    labels: dict[str, list[str]] = {name: [name] for name in table.classes}
    groups: dict[str, list[str]] = {}
    for name, group in (table.groups or {}).items():
        groups.setdefault(group, []).append(name)
    named = {name for own in given.values() for name in own}
    # A name may be both: a file that names groups alone means them.
    by_group = named <= groups.keys() and not named <= labels.keys()
    members = labels | groups if by_group else groups | labels
    owner: dict[str, str] = {}
    for split in SPLITS:
        for name in given[split]:
            if name not in members:
                fault = unknown("class", one_line(name, 80), members)
                raise RequestError(f"the splits {path}, {split}: {fault}")
            for label in members[name]:
                if owner.setdefault(label, split) != split:
                    raise RequestError(
                        f"the splits {path}: {in_two_splits('class', label, owner[label], split)}"
                    )
    return owner
