"""The plugins of one run, in the order of the list: validated once, folded and asked many times."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

import pluggy
from torch import Tensor, nn

from metaplug.contract import hookspecs
from metaplug.contract.hookspecs import KINDS
from metaplug.contract.inner_step import LOGGED
from metaplug.contract.link import Link
from metaplug.contract.plugin import Plugin
from metaplug.contract.plugin_checks import check_plugin, check_registered
from metaplug.contract.return_checks import CHECKS
from metaplug.contract.schedule import iteration_text
from metaplug.contract.task_batch import TaskBatch
from metaplug.contract.values import Context
from metaplug.errors import RequestError, RunError, quoted
from metaplug.random_streams import mix, stream


class Observer(Protocol):
    """Looks at every value of one iteration in the order in which they are made."""

    offset: int
    """The tasks of the batch before those that are computed now."""

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
        plugins: in the order in which every fold applies them; two of one name, a wrong order, a
            conflict, or a class that breaks the contract is a RequestError.

    >>> from metaplug.contract.function_plugins import plugin_of
    >>> def scale_meta_learning_rate(factor, iteration): return factor / (1 + iteration)
    >>> chain = Chain([plugin_of(scale_meta_learning_rate)()])
    >>> chain.fold("scale_meta_learning_rate", 1.0, iteration=3, total=9)
    0.25
    """

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self.watch: Observer | None = None
        """Looks for NaN and Inf in what plugins return and keep; set only while one is sought."""
        self._warned: set[str] = set()
        self._logged: dict[str, Tensor] = {}
        for plugin in self.plugins:
            if not isinstance(plugin, Plugin):
                raise RequestError(
                    f"{plugin!r} is not a plugin: give an instance of a subclass of metaplug.Plugin"
                )
            check_plugin(type(plugin), plugin.name)
        _check_list(self.plugins)
        manager = _Manager("metaplug")
        manager.add_hookspecs(hookspecs)
        for plugin in reversed(self.plugins):  # pluggy calls the last registered first
            manager.register(plugin, name=plugin.name)
        self._links = {hook: _links(manager, hook) for hook in KINDS}

    def fold(self, hook: str, value: Any, **arguments: Any) -> Any:
        """Pass `value` through every plugin that implements `hook`, checking after each."""
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
        """Ask for the one answer to `hook`; `default` if no plugin answers, an error if two do."""
        answers: list[tuple[Link, Any]] = []
        for link in self._links[hook]:
            answer, failure = None, None
            try:
                answer = link.call(arguments)
            except RunError as error:  # perhaps as the first answer has used up a graph
                if not answers:
                    raise
                failure = error
            if answers and (failure or answer is not None):
                both = f"plugins '{answers[0][0].plugin.name}' and '{link.plugin.name}' both answer"
                raise RequestError(
                    f"{both} {hook}, which only one may: leave one of them out"
                ) from failure
            answers += [] if answer is None else [(link, answer)]
        for link, answer in answers:
            if fault := CHECKS[hook](default, answer, arguments):
                raise link.fault(fault, arguments)
            self._look(link, answer, arguments)
            return answer
        return default

    def setup(self, context: Context, seed: int = 0) -> dict[str, Tensor]:
        """Let every plugin create its meta-parameters and buffers, once in its life.

        Plugins with task parameters come first, so the others find these in their context.

        Args:
            context: what the plugins are told.
            seed: of torch's random numbers in a plugin's `setup` and `task_parameters`; its name
                counts too, so what it draws depends on no other plugin.

        Returns:
            The starts of the task parameters, by PLUGIN.NAME.
        """
        if used := [plugin.name for plugin in self.plugins if plugin.is_set_up]:
            raise RequestError(
                f"plugin {quoted(used)} already belongs to another learner: make a new instance "
                "for each learner"
            )
        starts: dict[str, Tensor] = {}
        asked = {link.plugin: link for link in self._links["task_parameters"]}
        setups = {link.plugin: link for link in self._links["setup"]}
        for plugin in sorted(self.plugins, key=lambda each: each not in asked):
            plugin.is_set_up = True
            link = asked.get(plugin)
            with stream(mix(seed, -2, *plugin.name.encode()), context.device):
                if plugin in setups:
                    setups[plugin].call({"context": context})
                answer = link.call({"context": context}) or {} if link is not None else {}
            check_registered(plugin)
            if link is None:
                continue
            fault = CHECKS["task_parameters"](plugin, answer, {"context": context})
            if fault is not None:
                raise link.fault(fault, {})
            own = {f"{plugin.name}.{name}": start for name, start in answer.items()}
            starts, context = starts | own, _with_task_parameters(context, own)
        return starts

    def begin(self, *, training: bool) -> None:
        """Set the mode of every plugin, and so of layers within it, such as dropout."""
        for plugin in self.plugins:
            if plugin.training is not training:
                plugin.train(training)

    def commit(
        self, kept: Mapping[str, Mapping[str, Tensor]], iteration: int | None = None
    ) -> None:
        """Give every plugin the statistics that it kept in this iteration."""
        self._logged = {
            f"{plugin}.{name.removeprefix(LOGGED)}": value
            for plugin, values in kept.items()
            for name, value in values.items()
            if name.startswith(LOGGED)
        }
        for link in self._links["commit"]:
            own = kept.get(link.plugin.name, {})
            own = {name: value for name, value in own.items() if not name.startswith(LOGGED)}
            if own:
                link.call({"kept": own, "iteration": iteration})

    def figures(self, iteration: int = 0, total: int = 0) -> dict[str, float]:
        """Collect what to log after an iteration (from 0) of a run of `total`, "PLUGIN.FIGURE"."""
        found = {name: float(value) for name, value in self._logged.items()}
        given = {"iteration": iteration, "total": total}
        for link in self._links["end_meta_step"]:
            answer = link.call(given)
            if answer is None:
                continue
            if fault := CHECKS["end_meta_step"](None, answer, given):
                raise link.fault(fault, given)
            found |= {f"{link.plugin.name}.{name}": float(each) for name, each in answer.items()}
        for name, value in found.items():
            if not math.isfinite(value) and name not in self._warned:
                self._warned.add(name)
                source = "log" if name in self._logged else "end_meta_step"
                what = f"the figure '{name}' of a plugin's {source} is NaN or Inf"
                warnings.warn(
                    f"{what} after {iteration_text(iteration)}: it is logged as null, and as "
                    "nothing is computed from it, training goes on; see what the plugin computes "
                    "there",
                    stacklevel=3,
                )
        return found

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every plugin's meta-parameters that learn (requires_grad), as "PLUGIN.NAME"."""
        return {
            f"{plugin.name}.{name}": parameter
            for plugin in self.plugins
            for name, parameter in plugin.named_parameters()
            if parameter.requires_grad
        }

    def order(self) -> dict[str, tuple[str, ...]]:
        """By hook that some plugin implements, its plugins' names in the order of application."""
        used = {hook: links for hook, links in self._links.items() if links}
        return {hook: tuple(link.plugin.name for link in used[hook]) for hook in used}

    def links(self, hook: str) -> tuple[Link, ...]:
        """The implementations of a hook, in the order of application."""
        return self._links[hook]

    def wrap(self, around: Callable[[Link], Link]) -> None:
        """Replace every link by `around(link)`, which sees what goes in and what comes out."""
        self._links = {hook: tuple(map(around, links)) for hook, links in self._links.items()}

    def _look(self, link: Link, result: Any, given: Mapping[str, Any]) -> None:
        """Show the observer, if there is one, what a link has kept and returned."""
        if self.watch is None:
            return
        giver, name = given.get("step") or given.get("outcome"), link.plugin.name
        kept = giver.statistics.get(name, {}) if giver is not None else {}
        kept = {key: each for key, each in kept.items() if not key.startswith(LOGGED)}

        def saying(verb: str) -> Callable[[str], str]:
            return lambda fault: str(link.fault(f"{verb} {fault}", given))

        advice = f"see what '{name}' computes there, or leave it out"
        self.watch.look(kept, saying("kept"), advice)
        self.watch.look(result, saying("returned"), advice, by_task=link.hook in _BY_TASK)

    def reading(self, field: str, *, but_in: Collection[str]) -> tuple[str, ...]:
        """The plugins of which a hook, other than these, reads a field of what it is given."""
        links = [
            link for hook, links in self._links.items() if hook not in but_in for link in links
        ]
        codes = [(link.plugin.name, getattr(link.function, "__code__", None)) for link in links]
        return tuple(name for name, code in codes if code and field in code.co_names)

    @property
    def transductive(self) -> tuple[str, ...]:
        """The plugins that let test tasks share."""
        return tuple(plugin.name for plugin in self.plugins if plugin.transductive)


class _Manager(pluggy.PluginManager):
    """Looks for hooks in what a plugin's class adds: nn.Module has a hundred other attributes."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Read the marks of an attribute; None where it is no hook."""
        if name in _INHERITED and name not in vars(type(plugin)):
            return None
        return super().parse_hookimpl_opts(plugin, name)


_INHERITED = frozenset(dir(Plugin))


def _links(manager: pluggy.PluginManager, hook: str) -> tuple[Link, ...]:
    found = list(reversed(getattr(manager.hook, hook).get_hookimpls()))
    return tuple(
        Link(each.plugin, hook, f"link {k} of {len(found)}", each.function, tuple(each.argnames))
        for k, each in enumerate(found, 1)
    )


def _with_task_parameters(context: Context, starts: Mapping[str, Tensor]) -> Context:
    shapes = {name: start.shape for name, start in starts.items()}
    parameters = {name: start.detach() for name, start in starts.items()}
    return replace(
        context,
        shapes={**context.shapes, **shapes},
        parameters={**context.parameters, **parameters},
        adapted=(*context.adapted, *starts),
    )


def _check_list(plugins: Sequence[Plugin]) -> None:
    names, kinds = [each.name for each in plugins], [each.kind() for each in plugins]
    for index, plugin in enumerate(plugins):
        if plugin.name in names[:index]:
            fault = "stands twice in the list: give one of them a name of its own, or leave it out"
        elif conflicts := [kind for kind in kinds if kind in plugin.conflicts_with]:
            fault = f"conflicts with {quoted(conflicts)}: leave one of them out"
        elif late := [kind for kind in kinds[index + 1 :] if kind in plugin.runs_after]:
            fault = f"must run after {quoted(late)}: move it after that in the list of plugins"
        else:
            continue
        raise RequestError(f"plugin '{plugin.name}' {fault}")


_BY_TASK = frozenset(
    {
        "transform_tasks",
        "initialize_parameters",
        "transform_parameters",
        "transform_inner_losses",
        "transform_gradients",
        "update_parameters",
        "transform_outer_losses",
    }
)
"""The hooks whose values have the tasks along their first axis."""

_FOLDED = {
    hook: next(iter(inspect.signature(getattr(hookspecs, hook)).parameters))
    for hook, kind in KINDS.items()
    if kind == "fold"
}
"""By fold, the name of its first argument: the value that passes."""
