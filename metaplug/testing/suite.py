"""The contract as a suite: a class of tests to subclass, and the same in one call."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from metaplug.errors import RequestError, unknown
from metaplug.testing import composing, derivations, forms, numbers, reading, separation, states
from metaplug.testing.clauses import DEFAULT_MODELS, Clause, ConformanceError, Subject

CLAUSES: dict[str, Clause] = {
    clause.name: clause
    for clause in (
        forms.strict_config,
        forms.config_round_trip,
        forms.future_arguments,
        states.no_mutation,
        states.no_state_in_loop,
        reading.query_unseen,
        derivations.complete_meta_gradients,
        forms.another_name,
        forms.names_and_shapes,
        numbers.finite,
        numbers.finite_at_zero,
        states.deterministic,
        separation.task_permutation,
        separation.tasks_apart,
        separation.apart_at_evaluation,
        states.evaluation_leaves_no_trace,
        separation.vectorized_equals_sequential,
        reading.unequal_sizes,
        derivations.task_parameters_adapt,
        derivations.first_order,
        derivations.recomputed,
        derivations.traced_equals_eager,
        derivations.meta_parameters_learn,
        derivations.meta_gradients,
        states.checkpoint,
        composing.more_steps,
        composing.no_inner_steps,
        composing.off_is_baseline,
        composing.does_something,
        composing.composes,
    )
}
"""Every clause of the contract, by name, in the order in which they are tried: what later ones
build on comes first."""


_NO_OFF = "no settings at which it does nothing are given: off = None"


@dataclass(frozen=True)
class Verdict:
    """What became of one clause.

    Attributes:
        clause: its name.
        outcome: "left out" is one that does not hold of the plugin, or cannot be tried; "not
            tried" one that comes after a broken one.
        text: why it is broken, left out or not tried; empty where it passed.
        error: of a broken one.
    """

    clause: str
    outcome: Literal["passed", "broken", "left out", "not tried"]
    text: str = ""
    error: ConformanceError | None = None


class PluginConformance:
    """Holds one plugin to the contract: pytest runs one test of a subclass for each clause.

    Name the subclass Test…, in a test file. One fault is reported once: after a broken clause the
    later ones, which build on it, are skipped.

    Attributes:
        plugin: the plugin's class, a function or module in the shortest form, the name of an
            installed plugin, or the path of a plugin's file.
        settings: fields of its Config under which it does something.
        off: fields at which it does nothing; None where it has none.
        models: names of metaplug.testing.MODELS that it fits.
        exceptions: by the name of a clause that does not hold of it, the reason, with which its
            test is skipped.
        examples: how many examples each clause is tried on.
    """

    plugin: Any = None
    settings: ClassVar[Mapping[str, Any]] = {}
    off: ClassVar[Mapping[str, Any] | None] = None
    models: ClassVar[tuple[str, ...]] = DEFAULT_MODELS
    exceptions: ClassVar[Mapping[str, str]] = {}
    examples: ClassVar[int] = 5
    _broken: ClassVar[set[str]] = set()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Of the class, as pytest makes an instance for each test; of each process under xdist.
        cls._broken = set()

    @pytest.mark.parametrize("clause", CLAUSES)
    def test_clause(self, clause: str) -> None:
        """One clause of the contract; its page in the docs is docs/conformance.md."""
        if reason := _left_out(clause, _checked(self.exceptions), self.off):
            pytest.skip(reason)
        # Not those after it: whoever runs tests in another order sees this one fail as well.
        for earlier in itertools.takewhile(lambda name: name != clause, CLAUSES):
            if earlier in self._broken:
                pytest.skip(_not_tried(earlier))
        source = inspect.getattr_static(type(self), "plugin")  # a function would become a method
        source = source.__func__ if isinstance(source, staticmethod) else source
        if source is None:
            raise RequestError(
                f"{type(self).__name__} names no plugin: set plugin = MyPlugin in it"
            )
        subject = Subject(source, dict(self.settings), self.off, tuple(self.models), self.examples)
        self._broken.discard(clause)  # it may be tried again, corrected
        try:
            CLAUSES[clause].hold(subject)
        except ConformanceError:
            self._broken.add(clause)
            raise


def check(
    plugin: Any,
    *,
    settings: Mapping[str, Any] | None = None,
    off: Mapping[str, Any] | None = None,
    models: tuple[str, ...] = DEFAULT_MODELS,
    exceptions: Mapping[str, str] | None = None,
    examples: int = 5,
) -> None:
    """Hold a plugin to every clause of the contract; for the arguments see PluginConformance.

    Raises:
        ConformanceError: of the first clause that it breaks.
        RequestError: a clause or model is unknown, or a setting is wrong.
    """
    subject = Subject(plugin, dict(settings or {}), off, tuple(models), examples)
    for verdict in verdicts(subject, exceptions or {}):
        if verdict.error is not None:
            raise verdict.error


def verdicts(
    subject: Subject, exceptions: Mapping[str, str], only: Collection[str] = ()
) -> Iterator[Verdict]:
    """Try one clause at each step of the iterator, none after a broken one.

    Args:
        subject: the plugin.
        exceptions: as for PluginConformance.
        only: the clauses to try, by default all.

    Raises:
        RequestError: at the first step, a clause is unknown, or left out without a reason.
    """
    for name in only:
        if name not in CLAUSES:
            raise unknown("clause", name, CLAUSES)
    exceptions = _checked(exceptions)
    broken: str | None = None
    for name, clause in CLAUSES.items():
        if only and name not in only:
            continue
        if reason := _left_out(name, exceptions, subject.off):
            yield Verdict(name, "left out", reason)
        elif broken is not None:
            yield Verdict(name, "not tried", _not_tried(broken))
        else:
            try:
                clause.hold(subject)
            except ConformanceError as error:
                broken = name
                yield Verdict(name, "broken", str(error), error)
            else:
                yield Verdict(name, "passed")


def _not_tried(broken: str) -> str:
    return f"not tried: {broken} is broken"


def _left_out(
    clause: str, exceptions: Mapping[str, str], off: Mapping[str, Any] | None
) -> str | None:
    """The reason for which a clause is not asked of a plugin, if there is one."""
    if clause in exceptions:
        return exceptions[clause]
    return _NO_OFF if clause == "off-is-baseline" and off is None else None


def _checked(exceptions: Mapping[str, str]) -> Mapping[str, str]:
    for name, reason in exceptions.items():
        if name not in CLAUSES:
            raise unknown("clause", name, CLAUSES)
        if not isinstance(reason, str) or not reason.strip():
            raise RequestError(
                f"exceptions: the clause '{name}' is left out without a reason: "
                "say why it does not hold"
            )
    return exceptions
