"""What a page is made of: the result of a study, and its runs that have not ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from metaplug.evaluation.curves import Curve
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs.result import RunResult, curve_of
from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.results import StudyResult


@dataclass(frozen=True)
class Begun:
    """A run that has begun and not ended, as far as it came.

    Attributes:
        folder: the run's.
        config: its configuration.
        metrics: the lines of metrics.jsonl, at least one.
    """

    folder: Path
    config: ExperimentConfig
    metrics: Sequence[Mapping[str, Any]]

    @property
    def seed(self) -> int:
        """The configuration's."""
        return self.config.seed

    @cached_property
    def curve(self) -> Curve:
        """Its validations, without seconds; may be empty."""
        return curve_of(self.metrics, ())


@dataclass(frozen=True)
class Unfinished:
    """An unfinished run and its place in a study."""

    variant: str
    setting: Mapping[str, Any]
    run: Begun

    @property
    def label(self) -> str:
        """The variant, the setting and the seed, in words."""
        seed = f"seed {self.run.seed}"
        return ", ".join(filter(None, (self.variant, setting_text(self.setting), seed)))


@dataclass(frozen=True)
class Material:
    """Everything that a page is made of.

    Attributes:
        name: of the study or the runs.
        result: of the finished runs; has no rows where only unfinished ones were given.
        unfinished: the runs that have begun and not ended.
        study_text: the file of the study; empty for runs.
    """

    name: str
    result: StudyResult
    unfinished: tuple[Unfinished, ...] = ()
    study_text: str = ""

    @property
    def is_study(self) -> bool:
        """Whether it was read from the folder of a study."""
        return bool(self.study_text)

    @property
    def runs(self) -> list[RunResult | Begun]:
        """All runs, the finished ones first."""
        finished = [run for row in self.result.rows for run in row.runs]
        return [*finished, *(each.run for each in self.unfinished)]

    def look_of(self, variant: str) -> int:
        """The place of a variant, by which it looks the same in all pictures."""
        return [each.label for each in self.result.study.variants].index(variant)
