"""The plugins of one run, in the order of the list: validated once, folded and asked many times."""

from __future__ import annotations

import inspect
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import pluggy
from torch import Tensor, nn

from metaplug.contract import hookspecs
from metaplug.contract.answers import CHECKS
from metaplug.contract.hookspecs import KINDS
from metaplug.contract.plugin import Plugin
from metaplug.contract.plugin_rules import check_plugin
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Context
from metaplug.errors import MetaplugError, RequestError, RunError, quoted


@dataclass(frozen=True, slots=True)
class Link:
    """One plugin's place in one hook; `place` reads "link 2 of 3"."""

    plugin: Plugin
    hook: str
    place: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def call(self, given: Mapping[str, Any]) -> Any:
        """Call the implementation with the arguments that it names; what goes wrong in it names plugin, hook, link and step."""
        step = given.get("step")
        try:
            return self.function(
                *[
                    step.seen_by(self.plugin) if name == "step" else given[name]
                    for name in self.arguments
                ]
            )  # type: ignore[union-attr]
        except MetaplugError:
            raise
        except Exception as error:
            raise self.fault(
                f"failed{self._line_of(error)}: {type(error).__name__}: {error}", given
            ) from error

    def _line_of(self, error: Exception) -> str:
        """Where in the plugin's own file an error came up, " at FILE:LINE"; nothing where that is not known."""
        file = getattr(sys.modules.get(type(self.plugin).__module__), "__file__", None)
        lines = [
            line
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename == file
        ]
        return f" at {Path(file).name}:{lines[-1]}" if file and lines else ""

    def fault(self, what: str, given: Mapping[str, Any]) -> RunError:
        """The error for a fault of this link: `what` follows the plugin's name."""
        step = given.get("step")
        when = (
            f", iteration {step.meta_iteration}, inner step {step.index}"
            if step is not None
            else ""
        )
        when = when or (
            f", iteration {given['iteration']}" if given.get("iteration") is not None else ""
        )
        return RunError(f"plugin '{self.plugin.name}' in {self.hook} ({self.place}{when}) {what}")


class Observer(Protocol):
    """Looks at every value of one iteration, in the order in which they are made."""

    offset: int

    def look(
        self, values: Any, say: Callable[[str], str], advice: str, *, by_task: bool = False
    ) -> None: ...
    def look_at_data(self, batch: TaskBatch) -> None: ...
    def begin(self, weights: Mapping[str, Tensor]) -> None: ...
    def step(self, losses: Tensor) -> None: ...
    def update(self, rates: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None: ...


class Chain:
    """The plugins of one run.

    Args:
        plugins: in the order in which every fold applies them.

    Raises:
        RequestError: two plugins of one name, a wrong order, a conflict, or a class that does not keep to the contract.
    """

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self._told: set[str] = set()
        self.watch: Observer | None = None
        """What looks at every value that a plugin returns or keeps, for NaN and Inf: costly, there only to find a culprit."""
        for plugin in self.plugins:
            if not isinstance(plugin, Plugin):
                raise RequestError(
                    f"{plugin!r} is not a plugin: give an instance of a subclass of metaplug.Plugin"
                )
            check_plugin(type(plugin), plugin.name)
        _check_list(self.plugins)
        manager = pluggy.PluginManager("metaplug")
        manager.add_hookspecs(hookspecs)
        for plugin in reversed(self.plugins):  # pluggy calls the last registered first
            manager.register(plugin, name=plugin.name)
        self._links = {hook: _links(manager, hook) for hook in KINDS}

    def fold(self, hook: str, value: Any, **arguments: Any) -> Any:
        """Pass `value` through every plugin that implements `hook`, in the order of the list, checking after each."""
        for link in self._links[hook]:
            value = MappingProxyType(value) if isinstance(value, dict) else value
            given = {_FOLDED[hook]: value, **arguments}
            result = link.call(given)
            if result is not None and (fault := CHECKS[hook](value, result, arguments)):
                raise link.fault(fault, given)
            self._look(link, result, given)
            value = value if result is None else result
        return value

    def choose(self, hook: str, default: Any, **arguments: Any) -> Any:
        """The one answer to `hook`, or `default` where no plugin answers.

        Raises:
            RequestError: two plugins answer.
        """
        answers = [
            (link, answer)
            for link in self._links[hook]
            if (answer := link.call(arguments)) is not None
        ]
        if len(answers) > 1:
            both = " and ".join(f"'{link.plugin.name}'" for link, _ in answers[:2])
            raise RequestError(
                f"plugins {both} both answer {hook}, which only one may: leave one of them out"
            )
        for link, answer in answers:
            if fault := hook in CHECKS and CHECKS[hook](default, answer, arguments):
                raise link.fault(fault, arguments)
            self._look(link, answer, arguments)
            return answer
        return default

    def setup(self, context: Context) -> None:
        """Let every plugin create its meta-parameters and buffers, once in its life."""
        used = [plugin.name for plugin in self.plugins if plugin.is_set_up]
        if used:
            raise RequestError(
                f"plugin {quoted(used)} already belongs to another learner: make a new instance for each learner"
            )
        for plugin in self.plugins:
            plugin.is_set_up = True
        for link in self._links["setup"]:
            link.call({"context": context})

    def commit(
        self, kept: Mapping[str, Mapping[str, Tensor]], iteration: int | None = None
    ) -> None:
        """Give every plugin the statistics that it kept in this iteration."""
        for link in self._links["commit"]:
            if link.plugin.name in kept:
                link.call({"kept": kept[link.plugin.name], "iteration": iteration})

    def figures(self, iteration: int = 0, total: int = 0) -> dict[str, float]:
        """What the plugins have to log after an iteration (counted from 0) of a run of `total`, as "PLUGIN.FIGURE"."""
        found: dict[str, float] = {}
        for link in self._links["end_meta_step"]:
            given = {"iteration": iteration, "total": total}
            answer = link.call(given)
            if answer is None:
                continue
            if fault := CHECKS["end_meta_step"](None, answer, given):
                raise link.fault(fault, given)
            found.update(
                {f"{link.plugin.name}.{name}": float(value) for name, value in answer.items()}
            )
        for name in (name for name, value in found.items() if not math.isfinite(value)):
            if name not in self._told:
                self._told.add(name)
                warnings.warn(
                    f"the figure '{name}' of a plugin's end_meta_step is NaN or Inf after iteration {int(iteration) + 1}: it is logged as "
                    "null, and as nothing is computed from it, training goes on; see what the plugin computes there",
                    stacklevel=3,
                )
        return found

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every plugin's meta-parameters, as "PLUGIN.NAME"; those that do not learn (requires_grad False) are constants, and left out."""
        return {
            f"{plugin.name}.{name}": parameter
            for plugin in self.plugins
            for name, parameter in plugin.named_parameters()
            if parameter.requires_grad
        }

    def order(self) -> dict[str, tuple[str, ...]]:
        """For every hook that some plugin implements, the names of its plugins in the order of application."""
        return {
            hook: tuple(link.plugin.name for link in links)
            for hook, links in self._links.items()
            if links
        }

    def links(self, hook: str) -> tuple[Link, ...]:
        """The implementations of a hook, in the order of application."""
        return self._links[hook]

    def wrap(self, around: Callable[[Link], Link]) -> None:
        """Put `around(link)` in the place of every link: to look at what goes in and what comes out."""
        self._links = {
            hook: tuple(around(link) for link in links) for hook, links in self._links.items()
        }

    def _look(self, link: Link, result: Any, given: Mapping[str, Any]) -> None:
        """In a replay that looks for a culprit: at what a link has kept, and has returned."""
        if self.watch is None:
            return
        advice = f"see what '{link.plugin.name}' computes there, or leave it out"
        step = given.get("step")
        kept = step.statistics.get(link.plugin.name, {}) if step is not None else {}
        self.watch.look(kept, lambda fault: str(link.fault(f"kept {fault}", given)), advice)
        self.watch.look(
            result,
            lambda fault: str(link.fault(f"returned {fault}", given)),
            advice,
            by_task=link.hook in _BY_TASK,
        )

    @property
    def scheduled(self) -> tuple[str, ...]:
        """The plugins that follow the length of the run."""
        links = [link for links in self._links.values() for link in links]
        follow = [
            link.plugin.name
            for link in links
            if "total" in link.arguments
            or "meta_iterations" in getattr(link.function, "__code__", _NO_CODE).co_names
        ]
        return tuple(dict.fromkeys(follow))

    @property
    def transductive(self) -> tuple[str, ...]:
        """The plugins that let test tasks share."""
        return tuple(plugin.name for plugin in self.plugins if plugin.transductive)


def _links(manager: pluggy.PluginManager, hook: str) -> tuple[Link, ...]:
    implementations = list(reversed(getattr(manager.hook, hook).get_hookimpls()))
    places = [
        f"link {index} of {len(implementations)}" for index in range(1, len(implementations) + 1)
    ]
    return tuple(
        Link(
            implementation.plugin,
            hook,
            place,
            implementation.function,
            tuple(implementation.argnames),
        )
        for implementation, place in zip(implementations, places, strict=True)
    )


def _check_list(plugins: Sequence[Plugin]) -> None:
    kinds = [plugin.kind() for plugin in plugins]
    for index, plugin in enumerate(plugins):
        if plugin.name in [other.name for other in plugins[:index]]:
            raise RequestError(
                f"plugin '{plugin.name}' stands twice in the list: give one of them a name of its own, or leave it out"
            )
        if conflicts := [kind for kind in kinds if kind in plugin.conflicts_with]:
            raise RequestError(
                f"plugin '{plugin.name}' conflicts with {quoted(conflicts)}: leave one of them out"
            )
        if late := [kind for kind in kinds[index + 1 :] if kind in plugin.runs_after]:
            raise RequestError(
                f"plugin '{plugin.name}' must run after {quoted(late)}: move it behind in the list of plugins"
            )


_NO_CODE = (lambda: None).__code__

_BY_TASK = (
    "transform_tasks",
    "transform_parameters",
    "transform_inner_losses",
    "transform_gradients",
    "transform_outer_losses",
)
"""The hooks whose values have the tasks along their first axis."""

_FOLDED = {
    hook: next(iter(inspect.signature(getattr(hookspecs, hook)).parameters))
    for hook, kind in KINDS.items()
    if kind == "fold"
}
