"""One plugin's implementation of one hook: how it is called, and how its faults read."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaplug.contract.plugin import Plugin
from metaplug.contract.schedule import iteration_text, step_text
from metaplug.errors import MetaplugError, RunError


@dataclass(frozen=True, slots=True)
class Link:
    """One plugin's place in one hook, "link 2 of 3", and its function there.

    >>> from metaplug_plugins.meta_sgd import MetaSgd
    >>> link = Link(MetaSgd(), "end_meta_step", "link 1 of 1", lambda: {}, ())
    >>> str(link.fault("failed", {"iteration": 0}))
    "plugin 'meta-sgd' in end_meta_step (link 1 of 1, iteration 1) failed"
    """

    plugin: Plugin
    hook: str
    place: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def call(self, given: Mapping[str, Any]) -> Any:
        """Call the implementation with the arguments that it names; errors say where."""
        values = [
            given[name].seen_by(self.plugin) if name in ("step", "outcome") else given[name]
            for name in self.arguments
        ]
        try:
            return self.function(*values)
        except MetaplugError:
            raise
        except Exception as error:
            what = f"failed{self._line_of(error)}: {type(error).__name__}: {error}"
            raise self.fault(what, given) from error

    def _line_of(self, error: Exception) -> str:
        """Find the line of the plugin's own file that raised, " at FILE:LINE"; "" if unknown."""
        file = getattr(sys.modules.get(type(self.plugin).__module__), "__file__", None)
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == file]
        return f" at {Path(file).name}:{lines[-1]}" if file and lines else ""

    def fault(self, what: str, given: Mapping[str, Any]) -> RunError:
        """Make the error for a fault of this link: `what` follows the plugin's name."""
        step, iteration, when = given.get("step"), given.get("iteration"), ""
        if step is not None:
            when = f", {step_text(step.meta_iteration, step.index, training=step.training)}"
        elif iteration is not None:
            when = f", {iteration_text(iteration)}"
        return RunError(f"plugin '{self.plugin.name}' in {self.hook} ({self.place}{when}) {what}")
