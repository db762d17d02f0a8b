"""The sizes of tasks, and the options of choosing their classes and examples."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from metaplug.settings import Settings


class ExampleCounts(Settings):
    """The sizes of a task."""

    shots: int = Field(
        1, ge=1, le=1000, description="Support examples of each class, or of a regression task."
    )
    queries: int = Field(
        15, ge=1, le=1000, description="Query examples of each class, or of a regression task."
    )


class EpisodeForm(ExampleCounts):
    """The sizes of a classification task."""

    ways: int = Field(5, ge=2, le=1000, description="Classes in a task.")


class ChoiceOptions(Settings):
    """Options of choosing a task's classes and examples, whatever these are."""

    within: bool = Field(
        False,
        description="Whether a task's classes come from one super-class, such as an alphabet.",
    )
    train_ways: tuple[int, int] | None = Field(
        None,
        description="Training: fewest and most ways, of which `vary` draws; null: as given.",
    )
    train_shots: tuple[int, int] | None = Field(
        None,
        description="Training: fewest and most shots, of which `vary` draws; null: as given.",
    )
    vary: Literal["batch", "task"] = Field(
        "batch",
        description="Whether ways and shots are drawn once for a meta-batch, or for each task.",
    )
    varied_evaluation: bool = Field(
        False,
        description="Validation and test: draw ways and shots for each task too, in those bounds.",
    )

    @model_validator(mode="after")
    def _ranges_in_order(self) -> Self:
        for name, least in (("train_ways", 2), ("train_shots", 1)):
            low, high = getattr(self, name) or (least, least)
            if not least <= low <= high:
                raise ValueError(
                    f"{name} = [{low}, {high}]: give the fewest first, at least {least}"
                )
        varies = "vary = task" if self.vary == "task" else "varied_evaluation"
        asked = self.vary == "task" or self.varied_evaluation
        if asked and self.train_ways is None and self.train_shots is None:
            raise ValueError(
                f"{varies} draws ways and shots for each task, but has no bounds to draw in: give "
                "train_ways or train_shots"
            )
        return self

    def most_ways(self, ways: int) -> int:
        """The outputs that a model needs for training and evaluation tasks of `ways` classes."""
        return max(ways, *(self.train_ways or (ways,)))

    @property
    def of_evaluation(self) -> Self:
        """The part that holds for validation and test tasks."""
        change: dict[str, object] = {"train_ways": None, "train_shots": None, "vary": "batch"}
        if self.varied_evaluation:
            change = {"vary": "task"}
        return self.model_copy(update=change)
