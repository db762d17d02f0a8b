"""Predictions of a batch, scored task by task; and what no score of a name can be computed of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from metaplug.contract.task_groups import grouped, in_order
from metaplug.contract.task_sizes import TaskSize
from metaplug.contract.values import Kind
from metaplug.core.losses import class_axis, of_ways
from metaplug.errors import MetaplugError, RequestError, said_by
from metaplug.evaluation.scores import SCORES, Form, NamedScore, Score, ScoreFunction

Groups = list[tuple[list[int], Tensor, Tensor]]
"""Of tasks of one size: their places, their predictions and their targets."""


class Scorer:
    """A score, for the tasks of one evaluation. The form of their targets is that of the first.

    Attributes:
        score, kind: of the tasks.
        outputs: the number of classes that the model tells apart, once it is known; 1 says that a
            single output is a class, and no logit.
        classes_last: whether classes are on the last axis where shapes do not tell.
    """

    def __init__(self, score: Score, kind: Kind, outputs: int | None = None) -> None:
        self.score, self.kind, self.outputs = score, kind, outputs
        self.classes_last = False
        self._form: Form | None = None

    @property
    def has_table(self) -> bool:
        """Whether `by_class` gives something."""
        return self._table is not None

    @property
    def _table(self) -> ScoreFunction | None:
        return self.score.by_class if isinstance(self.score, NamedScore) else None

    def __call__(
        self, predictions: Tensor, targets: Tensor, sizes: Sequence[TaskSize] | None = None
    ) -> Tensor:
        """Return (T,) float64, on the device of the predictions.

        Args:
            predictions: (T, n, *output). Classes are on the third axis, as torch's losses have
                them, or on the last.
            targets: (T, n, *target).
            sizes: of the tasks, where they differ; what lies beyond them does not count.

        Raises:
            RequestError: the score is not for such targets; or, of one's own, it fails or gives
                something else than a number for each task.
        """
        found = self._groups(predictions, targets, sizes)
        values = [self._asked(own, y).to(predictions.device, torch.float64) for _, own, y in found]
        return in_order([(rows, each) for (rows, *_), each in zip(found, values, strict=True)])

    def by_class(
        self, predictions: Tensor, targets: Tensor, sizes: Sequence[TaskSize] | None = None
    ) -> Tensor | None:
        """Return (T, classes) float64 where the score has such a table; NaN for no class."""
        if (table := self._table) is None:
            return None
        found = [(rows, table(*own)) for rows, *own in self._groups(predictions, targets, sizes)]
        classes = self.outputs or max(each.shape[1] for _, each in found)
        return in_order(
            [
                (rows, F.pad(each, (0, classes - each.shape[1]), value=torch.nan))
                for rows, each in found
            ]
        )

    def _groups(
        self, predictions: Tensor, targets: Tensor, sizes: Sequence[TaskSize] | None
    ) -> Groups:
        """The tasks of one size together, without padding and classes beyond their ways."""
        if sizes is not None:  # some of a batch's tasks may have no example in its last places
            most = max(size.query for size in sizes)
            predictions, targets = predictions[:, :most], targets[:, :most]
        last = self.classes_last
        axis = class_axis(predictions, targets, leading=2, last=last)
        if isinstance(self.score, NamedScore):
            if self._form is None:
                self._form = self._checked(predictions, targets, axis)
            if self._form != "class indices":
                predictions = predictions.reshape(targets.shape)
            elif axis is not None:
                predictions, last = predictions.movedim(axis, 2), False
        if sizes is None:
            return [([*range(len(targets))], predictions, targets)]
        return [
            (rows, *of_ways(own, y, ways, leading=2, last=last))
            for rows, ways, (own, y) in grouped(sizes, "query", predictions, targets)
        ]

    def _asked(self, predictions: Tensor, targets: Tensor) -> Tensor:
        if isinstance(self.score, NamedScore):
            return self.score.function(predictions, targets)
        name, tasks = self.score.name, len(targets)
        try:
            values = self.score.function(predictions, targets)
        except (MetaplugError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RequestError(
                f"score '{name}' fails on predictions of shape {tuple(predictions.shape)} and "
                f"targets of shape {tuple(targets.shape)} ({said_by(error)}): correct its function"
            ) from error
        if not isinstance(values, Tensor) or values.shape != (tasks,):
            given = f"a {type(values).__name__}"
            if isinstance(values, Tensor):
                given = f"a tensor of shape {tuple(values.shape)}"
            raise RequestError(
                f"score '{name}' gives {given} for {tasks} tasks: return one number for each, of "
                f"shape ({tasks},)"
            )
        return values.detach()

    def _checked(self, predictions: Tensor, targets: Tensor, axis: int | None) -> Form:
        """The form of the targets.

        Raises:
            RequestError: the score is not for them, or the predictions do not fit them.
        """
        form, score = self._form_of(predictions, targets, axis), self.score
        shapes = f"{str(targets.dtype)[6:]} of shape {tuple(targets.shape[2:])} an example"
        forms = score.forms if isinstance(score, NamedScore) else get_args(Form)
        if form not in forms:
            fit = [name for name, each in SCORES.items() if form in each.forms]
            raise RequestError(
                f"score '{score.name}' is for {' or '.join(forms)}, but the targets are {form}, "
                f"{shapes}: give {', '.join(fit)}, or a function of your own"
            )
        fits = predictions.numel() == targets.numel() if form != "class indices" else axis
        if not fits:
            raise RequestError(
                f"predictions of shape {tuple(predictions.shape[2:])} an example cannot be scored "
                f"with targets of {shapes}: answer in the targets' shape, beside class indices "
                "with an axis of classes first or last, or give a score of your own"
            )
        return form

    def _form_of(self, predictions: Tensor, targets: Tensor, axis: int | None) -> Form:
        if self.kind == "regression":
            return "real numbers"
        if targets.is_floating_point():
            known = targets[targets.isfinite()]
            return "labels of 0 and 1" if ((known == 0) | (known == 1)).all() else "real numbers"
        is_logit = predictions.numel() == targets.numel() and (axis is None or self.outputs != 1)
        return "labels of 0 and 1" if is_logit else "class indices"
