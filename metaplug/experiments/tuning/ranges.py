"""The values that a field may take in a search: a range of numbers, or a list of values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from metaplug.errors import RequestError, one_line
from metaplug.experiments.json_values import to_json

if TYPE_CHECKING:
    import optuna

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})", re.IGNORECASE)
_FORMS = "write LOW..HIGH, log:LOW..HIGH, or a list as [sgd, adam]"


@dataclass(frozen=True)
class Numbers:
    """All numbers from `low` to `high`, both included.

    Attributes:
        log: whether the logarithm is drawn evenly, not the number.
        whole: whether only whole numbers are meant.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that stand for all where bounds are checked."""
        return self.low, self.high

    def suggest(self, trial: optuna.Trial, path: str) -> Any:
        """Let the sampler of a trial choose a value."""
        if self.whole:
            return trial.suggest_int(path, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(path, self.low, self.high, log=self.log)

    def as_kept(self, value: Any) -> Any:
        """The value as Optuna keeps it."""
        return value

    def from_kept(self, value: Any) -> Any:
        """The value that Optuna keeps."""
        return value

    def __str__(self) -> str:
        return f"{'log:' * self.log}{self.low}..{self.high}"


@dataclass(frozen=True)
class Choices:
    """One of a list of values, of which none is between two others."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """Every value."""
        return self.values

    def suggest(self, trial: optuna.Trial, path: str) -> Any:
        """Let the sampler of a trial choose a value."""
        texts = [*map(self.as_kept, self.values)]
        return self.from_kept(trial.suggest_categorical(path, texts))

    def as_kept(self, value: Any) -> str:
        """The value as Optuna keeps it, which knows no lists and takes true for 1."""
        return choice_text(value)

    def from_kept(self, text: str) -> Any:
        """The value that Optuna keeps as a text."""
        return next(value for value in self.values if choice_text(value) == text)

    def __str__(self) -> str:
        return f"[{', '.join(map(choice_text, self.values))}]"


Range: TypeAlias = Numbers | Choices


def choice_text(value: Any) -> str:
    """A value of a list as people write it.

    >>> choice_text("sgd"), choice_text([4, 8])
    ('sgd', '[4, 8]')
    """
    return value if isinstance(value, str) else to_json(value)


def read_range(value: Any, kinds: frozenset[type] | None, what: str) -> Range:
    """Read "LOW..HIGH", "log:LOW..HIGH" or a list.

    Args:
        value: as YAML has it.
        kinds: the types that the field takes; None where that is not known, so a range is of whole
            numbers if both of its ends are written as such.
        what: the field and the range, for errors.

    Raises:
        RequestError: it is none of these, or no range of values that the field takes.

    >>> read_range("log:0.01..1", frozenset({float}), "inner_lr")
    Numbers(low=0.01, high=1.0, log=True, whole=False)
    >>> read_range("1..5", None, "depth").whole
    True
    """
    if isinstance(value, list):
        return _choices(value, what)
    found = _RANGE.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if found is None:
        raise RequestError(f"{what}: it is no range of values: {_FORMS}")
    log, *ends = found.groups()
    if kinds is not None and not kinds & {int, float}:
        raise RequestError(f"{what}: the field takes no number: list its values, as [a, b]")
    are_whole = [re.fullmatch(r"[-+]?\d+", end) is not None for end in ends]
    if kinds is not None and float not in kinds and not all(are_whole):
        end = ends[are_whole.index(False)]
        raise RequestError(f"{what}: the field takes whole numbers, and {end} is none: write 1..5")
    whole = all(are_whole) if kinds is None else float not in kinds
    low, high = (int(end) if whole else float(end) for end in ends)
    if not low < high:
        raise RequestError(f"{what}: {low} is not below {high}: write the lower end first")
    if high - low == float("inf"):
        raise RequestError(f"{what}: the range has no end: give two finite numbers")
    if log and low <= 0:
        raise RequestError(f"{what}: {low} has no logarithm: begin above 0, or leave out log:")
    return Numbers(low, high, log is not None, whole)


def _choices(values: list[Any], what: str) -> Choices:
    texts = [*map(choice_text, values)]
    if len(values) < 2:
        raise RequestError(f"{what}: there is nothing to choose: list two values or more")
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise RequestError(f"{what}: '{one_line(twice[0])}' stands twice: leave one out")
    return Choices(tuple(values))
