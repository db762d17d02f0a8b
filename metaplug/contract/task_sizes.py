"""The size of a task: how many of its examples, and of the model's outputs, count."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Part: TypeAlias = Literal["support", "query"]

IGNORED = -100
"""The class index that losses and scores leave out, as torch's cross-entropy does."""


class TaskSize(NamedTuple):
    """The size of one task.

    Attributes:
        support, query: the number of examples that count, the first of their axis.
        ways: the number of classes; the model's further outputs count in no loss and no score.
            None where all outputs count.

    >>> TaskSize(support=5, query=10).examples("query")
    10
    """

    support: int
    query: int
    ways: int | None = None

    def examples(self, part: Part) -> int:
        """The number of examples of a part."""
        return self.support if part == "support" else self.query
