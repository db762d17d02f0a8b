"""A logger: shows a run's figures elsewhere while it trains, and changes nothing of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, model_validator

from metaplug.contract import registry
from metaplug.contract.naming import kebab
from metaplug.settings import Settings, validated

Ending: TypeAlias = Literal["finished", "stopped", "failed"]
"""How a run left its process: with its test done, to be resumed, or by an error."""


@dataclass(frozen=True)
class LoggedRun:
    """The run that a process begins, or goes on with.

    Attributes:
        id: 16 letters and digits, the same whenever this run goes on, and of no other run.
        name: of its folder, or a run of a study in words.
        folder: where it is kept; a logger writes into a folder or file of its own there.
        settings: the configuration by dotted path, as "training.iterations".
        iteration: how many iterations are done already.
    """

    id: str
    name: str
    folder: Path
    settings: Mapping[str, Any]
    iteration: int


@dataclass(frozen=True)
class LoggedStep:
    """One iteration, with what a line of metrics.jsonl has; None stands for NaN and Inf.

    Attributes:
        iteration: counted from 1.
        outer_loss, meta_gradient_norm: of the batch.
        meta_lr: the meta learning rate of the model's weights.
        figures: what plugins log, as PLUGIN.NAME.
        validation: that of after this iteration, if any: its metric, mean, interval (half of the
            95 % interval), and more.
        skipped: why the batch was skipped; None where it was not.
    """

    iteration: int
    outer_loss: float | None
    meta_gradient_norm: float | None
    meta_lr: float | None
    figures: Mapping[str, float | None]
    validation: Mapping[str, Any] | None = None
    skipped: str | None = None

    @property
    def values(self) -> dict[str, float]:
        """All finite figures by name, with a slash between a group and a name.

        >>> step = LoggedStep(1, 0.5, None, 0.001, {"gradient-sharing.gate": 0.3})
        >>> step.values
        {'outer_loss': 0.5, 'meta_lr': 0.001, 'gradient-sharing/gate': 0.3}
        """
        named = {
            "outer_loss": self.outer_loss,
            "meta_gradient_norm": self.meta_gradient_norm,
            "meta_lr": self.meta_lr,
            **{name.replace(".", "/", 1): value for name, value in self.figures.items()},
        }
        if self.validation is not None:
            named[f"validation/{self.validation['metric']}"] = self.validation["mean"]
            named["validation/interval"] = self.validation["interval"]
        return {
            name: float(value)
            for name, value in named.items()
            if value is not None and math.isfinite(value)
        }


class LoggerConfig(Settings):
    """A logger's settings: frozen, without unknown fields. Describe and bound every field.

    >>> class Config(LoggerConfig): every: int = Field(1, ge=1, description="Iterations.")
    >>> Config(every=10)
    Config(every=10)
    """


class Logger:
    """The base of every logger. Rank 0 asks it in the order of the methods here, and it alone.

    Whatever fails in a method, the run warns once, goes on, and asks this logger nothing more.

    Args:
        name: that it was asked for by; default: the class's name, in kebab-case.
        settings: the fields of `Config`; one that is unknown or out of bounds is a RequestError,
            and so may be whatever else the constructor refuses: it ends the run before it begins.

    >>> class Printed(Logger):
    ...     def log(self, step, *, durable):
    ...         print(step.iteration, step.values)
    >>> Printed().log(LoggedStep(1, 0.5, 2.0, 0.001, {}), durable=False)
    1 {'outer_loss': 0.5, 'meta_gradient_norm': 2.0, 'meta_lr': 0.001}
    """

    class Config(LoggerConfig):
        """No fields."""

    config: LoggerConfig

    def __init__(self, *, name: str | None = None, **settings: Any) -> None:
        self.name = kebab(type(self).__name__) if name is None else name
        self.config = validated(self.Config, settings, f"logger '{self.name}'")

    def start(self, run: LoggedRun) -> int | None:
        """Take up a run, just before its first figures.

        A process that was killed may have logged more iterations than the run goes on from.

        Returns:
            The last iteration that is logged already: the run logs those after it, also older ones
            from its own record. None for `run.iteration`: just those of this process.
        """

    def log(self, step: LoggedStep, *, durable: bool) -> None:
        """Log an iteration; every one comes once, in order.

        Args:
            step: its figures.
            durable: whether a checkpoint follows, from which a killed run goes on: what was logged
                must outlive this process when this returns.
        """

    def finish(self, summary: Mapping[str, Any], curves: Path | None) -> None:
        """Log the end of a run whose test is done.

        Args:
            summary: the content of summary.json.
            curves: the picture of the run, where there is one.
        """

    def close(self, ending: Ending) -> None:
        """Let go of files and connections; nothing is asked after this."""


class LoggerUse(Settings):
    """One entry of a list of loggers; a bare name stands for a logger with its default settings.

    >>> LoggerUse(logger="tensorboard", settings={"folder": "boards"}).make().config.folder
    'boards'
    """

    logger: str = Field(description="The logger's entry-point name, as in `metaplug plugins`.")
    settings: dict[str, Any] = Field(default={}, description="Fields of the logger's Config.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"logger": value} if isinstance(value, str) else value

    def make(self) -> Logger:
        """Make a new instance of an installed logger."""
        made = registry.load("logger", self.logger)(name=self.logger, **self.settings)
        assert isinstance(made, Logger)
        return made
