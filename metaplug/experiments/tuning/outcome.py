"""What came of a search: its trials, the best of them, and which fields matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from metaplug.evaluation.results import Metric
from metaplug.evaluation.scores import better
from metaplug.experiments.configuration import ExperimentConfig

State = Literal["complete", "pruned", "failed"]
STATES: tuple[State, ...] = ("complete", "pruned", "failed")


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        number: from 0 on; its run is in the folder of this number.
        values: of the searched fields, by path.
        mean: its best validation; None where none was finite.
        interval: half the width of the 95 % interval of `mean`, over validation tasks.
        iteration: after which it validated so.
        iterations: how many it was trained for.
        error: why it failed; None for others.
    """

    number: int
    state: State
    values: Mapping[str, Any]
    mean: float | None
    interval: float | None
    iteration: int | None
    iterations: int
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A search so far.

    Attributes:
        metric: of every validation.
        search: the range of each field, by path.
        config: what all trials share.
        trials: in their order.
        asked: how many trials there shall be.
        importance: by path, the share of the spread between trials that a field explains; empty
            where too few are complete.
    """

    metric: Metric
    search: Mapping[str, str]
    config: ExperimentConfig
    trials: tuple[Trial, ...]
    asked: int
    importance: Mapping[str, float]

    @property
    def ranked(self) -> list[Trial]:
        """The complete trials, the best first; of equal ones the earlier."""
        # By insertion, as the order of values is known to the metric alone.
        ranked: list[Trial] = []
        for trial in self.trials:
            if trial.state == "complete" and trial.mean is not None:
                place = next(
                    (
                        place
                        for place, other in enumerate(ranked)
                        if other.mean is not None and better(self.metric, trial.mean, other.mean)
                    ),
                    len(ranked),
                )
                ranked.insert(place, trial)
        return ranked

    @property
    def best(self) -> Trial | None:
        """The best of the complete trials; None where there is none."""
        return next(iter(self.ranked), None)

    def count(self, state: State) -> int:
        """How many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)


def to_values(outcome: Outcome) -> dict[str, Any]:
    """The whole search as JSON values."""
    best = outcome.best
    return {
        "metric": outcome.metric,
        "validation_tasks": outcome.config.training.validation_tasks,
        "seed": outcome.config.seed,
        "search": dict(outcome.search),
        "asked": outcome.asked,
        "counts": {state: outcome.count(state) for state in STATES},
        "best": None if best is None else _trial_values(best),
        "importance": dict(outcome.importance),
        "trials": [_trial_values(trial) for trial in outcome.trials],
        "config": outcome.config.model_dump(mode="json"),
    }


def _trial_values(trial: Trial) -> dict[str, Any]:
    return {**vars(trial), "values": dict(trial.values)}
