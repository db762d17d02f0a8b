"""The choice of a task's classes and examples, as places: the same for images and for texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaplug.contract.task_sizes import IGNORED, TaskSize
from metaplug.errors import RequestError
from metaplug.settings import validated
from metaplug.tasks.choice_options import ChoiceOptions, EpisodeForm
from metaplug.tasks.draws import distinct, draw


class ClassTable(NamedTuple):
    """The classes of one split, whose examples stand in one row, class after class.

    Attributes:
        names: the C classes.
        counts: the number of examples of each class.
        noun: what examples are called, in the plural.
        styles: (N,) int64, a group for each example that support and query should not share; or
            None.
        superclasses: the super-class of each class; or None.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    noun: str
    styles: NDArray[np.int64] | None = None
    superclasses: tuple[str, ...] | None = None


class Chosen(NamedTuple):
    """The support or query examples of T tasks, padded to the most that one of them has.

    Attributes:
        places: (T, n) int64, of each example in the row of all; 0 for padding.
        labels: (T, n) int64; IGNORED for padding.
        cells: (T, n) int64, of each example in its task's grid (ways, examples of a class).
    """

    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    cells: NDArray[np.int64]


class Choice(NamedTuple):
    """The classes and examples of T tasks.

    Attributes:
        support, query: the examples.
        sizes: of each task; None where all tasks are of one size and have all of the ways.
        words: by class, (T, ways, 2), and by cell, (T, ways * examples, 2), for augmentations;
            None where none were asked for.
    """

    support: Chosen
    query: Chosen
    sizes: tuple[TaskSize, ...] | None
    words: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None


class _Grid(NamedTuple):
    """The sizes of T tasks, and of the grid (ways, examples of a class) that holds each of them."""

    ways: NDArray[np.int64]
    shots: NDArray[np.int64]
    most_ways: int
    most_shots: int


class Chooser:
    """The choice of N-way tasks.

    Every task has distinct classes in random order (the labels 0, 1, ...), and of each support and
    query examples, all distinct. Where examples have a style, queries come from other styles than
    the support examples' as far as there are enough. Ways and shots within bounds are drawn
    uniformly: once for each iteration, or for each task (Triantafillou et al. 2020, section 3.2,
    where a class's shots and a data set's ways depend on what there is; here they do not).

    Args:
        table: the classes to draw from.
        split: the name of the split, which is part of every task's seed.
        form: ways, shots and queries; bounds in `options` replace ways and shots.
        seed: any integer.
        options: super-classes, and bounds of sizes.
        outputs: of the model, at least the most ways; None: the most ways.
        augments: whether `Choice.words` are drawn.

    Raises:
        RequestError: there are fewer classes (of one super-class) than ways, or a class has fewer
            than shots + queries examples.
    """

    def __init__(
        self,
        table: ClassTable,
        *,
        split: str,
        form: dict[str, int],
        seed: int,
        options: ChoiceOptions,
        outputs: int | None = None,
        augments: bool = False,
    ) -> None:
        self.form = validated(EpisodeForm, form, "tasks")
        self.table, self.split, self.seed = table, split, seed
        self._ways = options.train_ways or (self.form.ways, self.form.ways)
        self._shots = options.train_shots or (self.form.shots, self.form.shots)
        self.most_ways = self._ways[1]
        self._by_task, self._augments = options.vary == "task", augments
        self._outputs = self.most_ways if outputs is None else outputs
        self._counts = np.array(table.counts, np.int64)
        self._offsets = np.cumsum(self._counts) - self._counts
        self._check()
        self._groups = self._super_classes() if options.within else None

    def _check(self) -> None:
        ways, shots, queries = self.most_ways, self._shots[1], self.form.queries
        if len(self._counts) < ways:
            raise RequestError(
                f"{ways}-way tasks need {ways} classes, but the {self.split} split has "
                f"{len(self._counts)}: lower ways, or give that split more classes"
            )
        fewest = int(self._counts.argmin())
        if self._counts[fewest] < shots + queries:
            raise RequestError(
                f"{shots} shots and {queries} queries need {shots + queries} {self.table.noun} of "
                f"every class, but the class '{self.table.names[fewest]}' of the {self.split} "
                f"split has {self._counts[fewest]}: lower shots or queries, or leave that class out"
            )

    def _super_classes(self) -> list[NDArray[np.int64]]:
        """The classes of every super-class that has enough of them."""
        if self.table.superclasses is None:
            raise RequestError(
                "within draws tasks from one super-class, but the classes of the "
                f"{self.split} split have none: leave it out, or give classes that stand in "
                f"{_SUPERCLASSES[self.table.noun]}"
            )
        names, ways = np.array(self.table.superclasses), self.most_ways
        groups = {name: np.flatnonzero(names == name) for name in np.unique(names)}
        large = [group for group in groups.values() if len(group) >= ways]
        if not large:
            largest = max(groups, key=lambda name: len(groups[name]))
            raise RequestError(
                f"{ways}-way tasks within one super-class need {ways} classes of one, but the "
                f"largest of the {self.split} split, '{largest}', has {len(groups[largest])}: "
                "lower ways, or leave within out"
            )
        return large

    def choose(self, iteration: int, indices: Sequence[int] | range) -> Choice:
        """The classes and examples of the tasks `indices` of one iteration.

        What a task is made of depends on the iteration and its index alone; only the padding
        depends on the other tasks.
        """
        sizes = self._sizes(iteration, indices)
        ways, examples = sizes.most_ways, sizes.most_shots + self.form.queries
        # A choice by style looks at every example of a class.
        drawn = examples if self.table.styles is None else int(self._counts.max())
        used = ways * (1 + drawn)
        # Augmentations draw after the choice of examples, so a task without has the same ones.
        more = 1 + 2 * ways + 2 * ways * examples if self._augments else 1
        words = draw(self.seed, self.split, iteration, indices, used + more)
        classes = self._choose_classes(words[:, :ways], words[:, used])
        chosen = self._choose_examples(classes, words[:, ways:used], sizes)
        by_class, by_cell = np.split(words[:, used + 1 :], [2 * ways], axis=-1)
        pairs = by_class.reshape(-1, 2, ways).swapaxes(1, 2), by_cell.reshape(len(words), -1, 2)
        support = _part(chosen, sizes, 0, sizes.shots)
        query = _part(chosen, sizes, sizes.most_shots, np.full_like(sizes.ways, self.form.queries))
        return Choice(support, query, self._task_sizes(sizes), pairs if self._augments else None)

    def _sizes(self, iteration: int, indices: Sequence[int] | range) -> _Grid:
        """The ways and shots of every task."""
        words = draw(
            self.seed,
            f"{self.split} sizes",
            iteration,
            indices if self._by_task else [0] * len(indices),
            2,
        )
        ways, shots = (
            low + (words[:, place] % np.uint64(high - low + 1)).astype(np.int64)
            for place, (low, high) in enumerate((self._ways, self._shots))
        )
        if self._by_task:
            # The grid of the largest task, so that no task's words depend on the others' sizes.
            return _Grid(ways, shots, self._ways[1], self._shots[1])
        return _Grid(ways, shots, int(ways[0]), int(shots[0]))

    def _task_sizes(self, sizes: _Grid) -> tuple[TaskSize, ...] | None:
        ways, shots = sizes.ways, sizes.shots
        if (ways == self._outputs).all() and (shots == shots[0]).all():
            return None
        queries = self.form.queries
        return tuple(
            TaskSize(own * count, own * queries, own)
            for own, count in zip(ways.tolist(), shots.tolist(), strict=True)
        )

    def _choose_classes(
        self, words: NDArray[np.uint64], word_of_group: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """(T, ways) distinct classes: of all, or of one super-class for each task."""
        if self._groups is None:
            return distinct(words, np.full(len(words), len(self._counts)))
        chosen = (word_of_group % np.uint64(len(self._groups))).astype(np.int64)
        groups = [self._groups[group] for group in chosen]
        places = distinct(words, np.array([len(group) for group in groups]))
        return np.stack([group[row] for group, row in zip(groups, places, strict=True)])

    def _choose_examples(
        self, classes: NDArray[np.int64], words: NDArray[np.uint64], sizes: _Grid
    ) -> NDArray[np.int64]:
        """The places (T, ways, most shots + queries) of examples, support first."""
        styles, shots = self.table.styles, sizes.most_shots
        counts, offsets = self._counts[classes][..., None], self._offsets[classes][..., None]
        chosen = distinct(words.reshape(*classes.shape, -1), counts[..., 0])
        if styles is not None:
            support, rest = np.split(chosen, [shots], axis=-1)
            style_of_rest = styles[offsets + np.minimum(rest, counts - 1)]
            alike = style_of_rest[..., None] == styles[offsets + support][..., None, :]
            seen = (alike & (np.arange(shots) < sizes.shots[:, None, None, None])).any(-1)
            # Unseen styles first, then seen ones; places beyond the class's count never.
            order = np.argsort(seen + 2 * (rest >= counts), axis=-1, kind="stable")
            query = np.take_along_axis(rest, order[..., : self.form.queries], axis=-1)
            chosen = np.concatenate([support, query], axis=-1)
        return offsets + chosen


_SUPERCLASSES = {
    "images": "folders of their super-class",
    "texts": "groups, by a column with the group of each label",
}


def _part(grid: NDArray[np.int64], sizes: _Grid, begin: int, counts: NDArray[np.int64]) -> Chosen:
    """Return the examples `begin` to `begin + counts` of every class, class after class.

    Args:
        grid: (T, ways, examples), places.
        sizes: of the tasks.
        begin: the first example of a class that belongs to the part.
        counts: (T,), the part's examples of a class.
    """
    examples = grid.shape[-1]
    way, place = np.divmod(np.arange(grid[0].size), examples)
    bounds = sizes.ways[:, None], begin + counts[:, None]
    inside = (way < bounds[0]) & (place >= begin) & (place < bounds[1])
    width = int(inside.sum(1).max())
    cells = np.argsort(~inside, axis=1, kind="stable")[:, :width]
    inside = np.take_along_axis(inside, cells, axis=1)
    places = np.take_along_axis(grid.reshape(len(grid), -1), cells, axis=1)
    return Chosen(np.where(inside, places, 0), np.where(inside, way[cells], IGNORED), cells)
