"""Scores: the named ones, and functions of one's own.

A score says how well the query targets of each task are predicted: a number for each, whose mean
over tasks has its interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from metaplug.contract.values import Kind
from metaplug.errors import RequestError, unknown
from metaplug.evaluation import score_functions as functions
from metaplug.evaluation.score_names import ScoreName

Form: TypeAlias = Literal["class indices", "labels of 0 and 1", "real numbers"]
"""Of targets."""

ScoreFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """A score of one's own.

    Attributes:
        name: as results and tables show it.
        function: (predictions (T, n, *output), targets (T, n, *target)) → (T,), of the query
            examples of T >= 1 tasks of one size, without padding or classes beyond their ways. It
            is called once for each size in a batch, so it may not depend on the other tasks.
        more_is_better: whether a larger value is the better one.
    """

    name: str
    function: ScoreFunction
    more_is_better: bool = True


@dataclass(frozen=True)
class NamedScore(Score):
    """A score that metaplug knows; its function is one of `score_functions`.

    Attributes:
        forms: of the targets that it is for.
        by_class: gives (T, classes) values of a table beside it.
        is_share: whether it lies between 0 and 1, and is shown in percent.
    """

    forms: tuple[Form, ...] = ("class indices",)
    by_class: ScoreFunction | None = None
    is_share: bool = True


SCORES: dict[ScoreName, NamedScore] = {
    "accuracy": NamedScore(
        "accuracy", functions.accuracy, forms=("class indices", "labels of 0 and 1")
    ),
    "balanced-accuracy": NamedScore("balanced accuracy", functions.balanced_accuracy),
    "per-class-accuracy": NamedScore(
        "per-class accuracy", functions.balanced_accuracy, by_class=functions.recalls
    ),
    "micro-f1": NamedScore("micro F1", functions.micro_f1, forms=("labels of 0 and 1",)),
    "macro-f1": NamedScore("macro F1", functions.macro_f1, forms=("labels of 0 and 1",)),
    "mean-iou": NamedScore("mean IoU", functions.mean_iou),
    "perplexity": NamedScore("perplexity", functions.perplexity, False, is_share=False),
    "mean-squared-error": NamedScore(
        "mean squared error",
        functions.mean_squared_error,
        False,
        forms=("real numbers",),
        is_share=False,
    ),
}

ScoreLike: TypeAlias = ScoreName | Score | ScoreFunction
"""A score by its name, as a Score, or as its function, whose name it gets."""


def as_score(given: ScoreLike | None, kind: Kind) -> Score:
    """Return the score that was meant.

    Args:
        given: a function may have an attribute `more_is_better`, default True. None: accuracy, or
            the mean squared error for regression.

    Raises:
        RequestError: no such name, none of these, or a score of one's own under a name above.
    """
    if given is None:
        given = "mean-squared-error" if kind == "regression" else "accuracy"
    if isinstance(given, str):
        if given not in SCORES:
            raise unknown("score", given, get_args(ScoreName))
        return SCORES[given]
    if isinstance(given, NamedScore):
        return given
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        given = Score(name, given, bool(getattr(given, "more_is_better", True)))
    if not isinstance(given, Score):
        raise RequestError(
            f"score is a {type(given).__name__}: give one of {', '.join(SCORES)}, a function "
            "(predictions, targets) → (tasks,), or a Score"
        )
    if named(given.name) is not None:
        raise RequestError(
            f"the score '{given.name}' of your own has the name of one of metaplug's: call it "
            f"otherwise, or give score='{_key(given.name)}'"
        )
    return given


def named(name: str) -> NamedScore | None:
    """Return metaplug's score of a name, as an option or a result has it; None for others.

    >>> named("mean IoU") is named("mean-iou")
    True
    """
    return {str(key): each for key, each in SCORES.items()}.get(_key(name))


def option_of(score: Score) -> ScoreName | None:
    """Return the name that options and files have for a score; None for one of one's own."""
    return next((name for name, each in SCORES.items() if each is score), None)


def better(name: str, candidate: float, than: float) -> bool:
    """Return whether `candidate` is the better value of a score, by its name.

    >>> better("perplexity", 3.2, 4.1)
    True
    """
    score = named(name)
    return candidate > than if score is None or score.more_is_better else candidate < than


def _key(name: str) -> str:
    return name.lower().replace(" ", "-")
