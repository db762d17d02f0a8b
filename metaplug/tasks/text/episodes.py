"""The texts of the classes of one split as token ids, and the tasks that are drawn from them."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaplug.contract.task_sizes import IGNORED
from metaplug.tasks.choice_options import ChoiceOptions
from metaplug.tasks.choices import Choice, Chooser, Chosen, ClassTable
from metaplug.tasks.episodes import Episodes
from metaplug.tasks.identities import digest


@dataclass(frozen=True)
class ClassTexts:
    """The classes of one split, with the token ids of all their texts in one tensor.

    Attributes:
        names: the C classes, all different.
        counts: the number of texts of each class, in the order of names; their sum is N.
        texts: the N texts, class after class.
        ids: (tokens,) int32, text after text.
        lengths: (N,) int64, tokens of each text.
        pad: the id that fills a text up.
        superclasses: the super-class of each class, in the order of names; or None.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    texts: tuple[str, ...]
    ids: Tensor
    lengths: NDArray[np.int64]
    pad: int
    superclasses: tuple[str, ...] | None = None

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The `digest` of each class's texts, whatever their order and tokens."""
        texts = map(digest, self.texts)
        return tuple(digest(*sorted(islice(texts, count))) for count in self.counts)


class TaskTexts(NamedTuple):
    """The texts of one task, by class: its name, support and query texts."""

    names: list[str]
    support: list[list[str]]
    query: list[list[str]]


class TextEpisodes(Episodes):
    """N-way tasks over class texts. A TaskStream.

    Inputs are {"input_ids", "attention_mask"}, each (T, n, length) int64, where length is that of
    the longest text of the batch: a task's content depends on its place alone, but for padding.

    Args:
        classes: the classes to draw from.
        split: the name of the split, which is part of every task's seed.
        ways, shots, queries: as in EpisodeForm.
        seed: any integer.
        options: super-classes and bounds of sizes; all of them are applied here, whatever the
            split.
        outputs: of the model, at least the most ways; None: the most ways.

    Raises:
        RequestError: a size is out of bounds, or as Chooser raises.
    """

    def __init__(
        self,
        classes: ClassTexts,
        *,
        split: str,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
        options: ChoiceOptions | None = None,
        outputs: int | None = None,
    ) -> None:
        self.classes = classes
        self._starts = np.cumsum(classes.lengths) - classes.lengths
        super().__init__(
            Chooser(
                ClassTable(
                    classes.names, classes.counts, "texts", superclasses=classes.superclasses
                ),
                split=split,
                form={"ways": ways, "shots": shots, "queries": queries},
                seed=seed,
                options=options or ChoiceOptions(),
                outputs=outputs,
            )
        )

    @cached_property
    def identities(self) -> dict[str, str]:
        """By name of a class, the digest of its texts, whatever the split or tokenizer."""
        return dict(zip(self.classes.names, self.classes.digests, strict=True))

    def to(self, device: torch.device | str) -> TextEpisodes:
        """The same tasks, gathered on `device`: the ids move there once, batches never."""
        moved = copy(self)
        moved.classes = replace(self.classes, ids=self.classes.ids.to(device))
        return moved

    def texts(self, iteration: int, index: int) -> TaskTexts:
        """The texts of one task, for people."""
        choice = self.chooser.choose(iteration, [index])
        class_of_text = np.repeat(np.arange(len(self.classes.names)), self.classes.counts)
        support, query = (
            [
                [self.classes.texts[place] for place in part.places[0][part.labels[0] == label]]
                for label in range(int(part.labels[0].max()) + 1)
            ]
            for part in (choice.support, choice.query)
        )
        firsts = [
            choice.support.places[0][choice.support.labels[0] == label][0]
            for label in range(len(support))
        ]
        names = [self.classes.names[class_of_text[place]] for place in firsts]
        return TaskTexts(names, support, query)

    def _gather(self, choice: Choice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        lengths = [
            np.where(part.labels == IGNORED, 0, self.classes.lengths[part.places])
            for part in (choice.support, choice.query)
        ]
        longest = max(int(own.max()) for own in lengths)
        return (
            self._padded(choice.support, lengths[0], longest),
            self._padded(choice.query, lengths[1], longest),
        )

    def _padded(self, part: Chosen, lengths: NDArray[np.int64], longest: int) -> dict[str, Tensor]:
        ids, device = self.classes.ids, self.classes.ids.device
        starts = torch.from_numpy(self._starts[part.places]).to(device)[..., None]
        ends = torch.from_numpy(lengths).to(device)[..., None]
        position = torch.arange(longest, device=device)
        inside = position < ends
        found = ids[(starts + position).clamp_(max=len(ids) - 1)].long()
        # Texts end with the tokenizer's padding; whole texts that only fill a task up are 0.
        fill = torch.where(ends > 0, self.classes.pad, 0)
        return {
            "input_ids": torch.where(inside, found, fill),
            "attention_mask": inside.long(),
        }
