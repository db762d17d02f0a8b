"""A table of texts: the roles of its columns, and the check of every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from metaplug.errors import RequestError, one_line, quoted, reason, unknown
from metaplug.tasks.choice_options import ChoiceOptions
from metaplug.tasks.reading import UNPRINTABLE, Names, open_regular
from metaplug.tasks.splits import SPLITS, SplitFractions, in_two_splits
from metaplug.tasks.tables.rows import read_rows
from metaplug.tasks.text.json_lines import read_json_lines

LABELS, GROUPS = ("label", "intent", "class", "category"), ("group", "domain")
"""Names of the columns of labels and groups that need no setting."""
ROLES = ("text", "label", "group", "split_column")
"""What a column may be; the settings that name columns have these names."""
_SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
_JSON = (".jsonl", ".json", ".ndjson")
_MOST_LETTERS = 2**20


class TextConfig(ChoiceOptions, SplitFractions):
    """The columns of a table of texts, the split of its classes, and its tokens."""

    text: str = Field("text", description="Column with the texts.")
    label: str | None = Field(
        None, description="Column with the class; null: label, intent, class or category."
    )
    group: str | None = Field(
        None,
        description="Column with the super-class of a class; null: group or domain, if there.",
    )
    splits: Path | None = Field(
        None,
        description="JSON file of classes, or groups, by split; null: splits.json beside the data.",
    )
    split_column: str | None = Field(
        None, description="Column with the split of a class: train, val or test."
    )
    separator: Literal["comma", "semicolon", "tab", "bar"] = Field(
        "comma", description="What stands between the columns of a CSV file."
    )
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="Folder or hub name of a tokenizer; null: that of a model transformers:NAME.",
    )
    max_length: int = Field(
        64, ge=4, le=8192, description="Most tokens of a text; longer ones are cut there."
    )
    download: bool = Field(
        False, description="Whether a tokenizer that is not here may be fetched from the hub."
    )

    @model_validator(mode="after")
    def _one_role(self) -> Self:
        if self.splits is not None and self.split_column is not None:
            raise ValueError("splits and split_column both split the classes: give one of them")
        named = [self.text, self.label, self.group, self.split_column]
        column, times = Counter(name for name in named if name is not None).most_common(1)[0]
        if times > 1:
            raise ValueError(f"the column '{column}' is named twice: name it once")
        return self


@dataclass(frozen=True)
class TextTable:
    """The rows of a table of texts.

    Attributes:
        texts: of every row, none of them empty.
        classes: by label, the places of its texts.
        groups: by label, its group; None where there is no such column.
        splits: by label, the split in the split column; empty where there is none.
        columns: by role, the name of its column.
    """

    texts: Sequence[str]
    classes: dict[str, list[int]]
    groups: dict[str, str] | None
    splits: dict[str, str]
    columns: dict[str, str]


def read_texts(path: Path, config: TextConfig, roles: Collection[str] = ROLES) -> TextTable:
    """Read a CSV, JSON lines or Parquet file of texts.

    Args:
        roles: the columns that are read, of ROLES; others need not be there.

    Raises:
        RequestError: the file, a column or a row is wrong; it is named.
    """
    rows = _rows(path, config)
    _, header = next(rows)
    columns = _columns(path, header, config, roles)
    places = {role: header.index(column) for role, column in columns.items()}
    texts: list[str] = []
    classes: dict[str, list[int]] = {}
    groups: dict[str, str] = {}
    splits: dict[str, str] = {}
    several: str | None = None
    known = Names("class")
    for place, (number, cells) in enumerate(rows):
        where = f"the table {path}, row {number}"
        texts.append(_text(cells[places["text"]], f"{where}, column '{columns['text']}'"))
        label = _name(cells[places["label"]], f"{where}, column '{columns['label']}'", "label")
        known.add(label, where)
        classes.setdefault(label, []).append(place)
        if "split_column" in places:
            split = str(cells[places["split_column"]])
            if split not in SPLITS:
                fault = unknown("split", one_line(split, 80), SPLITS)
                raise RequestError(f"{where}, column '{columns['split_column']}': {fault}")
            if splits.setdefault(label, split) != split:
                raise RequestError(
                    f"{where}: {in_two_splits('class', label, splits[label], split)}"
                )
        if "group" in places:
            group = _name(cells[places["group"]], f"{where}, column '{columns['group']}'", "group")
            if groups.setdefault(label, group) != group:
                several = several or (
                    f"{where}: the class '{label}' stands in the groups '{groups[label]}' and "
                    f"'{group}': give it one, or set group to another column"
                )
    if not texts:
        raise RequestError(f"the table {path} has a header but no rows: give it some")
    if several and config.group is not None:
        raise RequestError(several)
    if several or "group" not in columns:
        # A column that nobody named, and in which a class has no one group, groups nothing.
        columns.pop("group", None)
        return TextTable(texts, classes, None, splits, columns)
    return TextTable(texts, classes, groups, splits, columns)


def _rows(path: Path, config: TextConfig) -> Iterator[tuple[int, Sequence[Any]]]:
    try:
        open_regular(path).close()  # a pipe or a device is refused here
    except FileNotFoundError:
        raise RequestError(
            f"the table {path}: there is no such file; give the path of a CSV, JSON lines or "
            "Parquet file"
        ) from None
    except (OSError, ValueError) as error:
        raise RequestError(
            f"cannot read the table {path}: {reason(error)}; give a CSV, JSON lines or Parquet "
            "file that you may read"
        ) from None
    if path.suffix.lower() in _JSON:
        return read_json_lines(path)
    return read_rows(path, _SEPARATORS[config.separator])


def _columns(
    path: Path, header: Sequence[str], config: TextConfig, roles: Collection[str]
) -> dict[str, str]:
    """By role, the column that has it."""
    shown = quoted(one_line(column, 80) for column in header[:50])
    taken = {config.text, config.label, config.group, config.split_column}
    free = [column for column in header if column not in taken]
    group = config.group
    if group is None and "group" in roles:
        group = _found(path, free, "group", GROUPS)
    named: dict[str, str | None] = {
        "text": config.text,
        "label": config.label or _found(path, free, "label", LABELS),
        "group": group,
        "split_column": config.split_column,
    }
    if named["label"] is None:
        raise RequestError(
            f"the table {path} has no column {quoted(LABELS)} for the labels: set label to one of "
            f"its columns, which are {shown}"
        )
    columns = {
        role: column for role, column in named.items() if role in roles and column is not None
    }
    for role, column in columns.items():
        if column not in header:
            raise RequestError(
                f"the table {path} has no column '{one_line(column, 80)}', which the setting "
                f"{role} names: set {role} to one of its columns, which are {shown}"
            )
        if header.count(column) > 1:
            raise RequestError(
                f"the table {path} has {header.count(column)} columns '{one_line(column, 80)}': "
                "give each a name of its own"
            )
    if column := next((name for name, times in Counter(columns.values()).items() if times > 1), ""):
        raise RequestError(
            f"the table {path}: the column '{column}' would have two roles: set text, label and "
            f"group to columns of their own, of {shown}"
        )
    return columns


def _found(path: Path, columns: Sequence[str], role: str, usual: Sequence[str]) -> str | None:
    """The column that has a role by its name alone."""
    found = [name for name in usual if name in columns]
    if len(found) > 1:
        raise RequestError(
            f"the table {path} has the columns {quoted(found)}, any of which may be that of the "
            f"{role}s: set {role} to one of them"
        )
    return found[0] if found else None


def _text(cell: object, where: str) -> str:
    if not isinstance(cell, str) or not cell.strip():
        fault = "is no text" if cell is not None and not isinstance(cell, str) else "has no text"
        raise RequestError(f"{where} {fault}: write one, or leave the row out")
    if len(cell) > _MOST_LETTERS:
        raise RequestError(
            f"{where} has a text of {len(cell)} letters, more than {_MOST_LETTERS}: cut it"
        )
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise RequestError(
            f"{where} has half of a letter, which UTF-8 cannot write: '{one_line(cell, 80)}'; "
            "correct it"
        ) from None
    return cell


def _name(cell: object, where: str, role: str) -> str:
    text = "" if cell is None else str(cell)
    if not text.strip():
        raise RequestError(f"{where} names no {role}: name one, or leave the row out")
    if not isinstance(cell, str | int) or len(text) > 200 or UNPRINTABLE.search(text):
        raise RequestError(
            f"{where}: '{one_line(text, 80)}' is no name of a {role}, as it is neither text nor a "
            "whole number, has more than 200 characters, a line break or the like: rename it"
        )
    return text
