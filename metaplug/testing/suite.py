"""The contract as a suite: a class of tests to subclass, and the same in one call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from metaplug.errors import RequestError, unknown
from metaplug.testing import composing, derivations, forms, numbers, reading, separation, states
from metaplug.testing.clauses import DEFAULT_MODELS, Clause, Subject

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


class PluginConformance:
    """Holds one plugin to the contract: pytest runs one test of a subclass for each clause.

    Name the subclass Test…, in a test file.

    Attributes:
        plugin: the plugin's class, a function or module in the shortest form, or the name of an
            installed plugin.
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

    @pytest.mark.parametrize("clause", CLAUSES)
    def test_clause(self, clause: str) -> None:
        """One clause of the contract; its page in the docs is docs/conformance.md."""
        exceptions = _checked(self.exceptions)
        if clause in exceptions:
            pytest.skip(exceptions[clause])
        if clause == "off-is-baseline" and self.off is None:
            pytest.skip("no settings at which it does nothing are given: off = None")
        source = inspect.getattr_static(type(self), "plugin")  # a function would become a method
        source = source.__func__ if isinstance(source, staticmethod) else source
        if source is None:
            raise RequestError(
                f"{type(self).__name__} names no plugin: set plugin = MyPlugin in it"
            )
        subject = Subject(source, dict(self.settings), self.off, tuple(self.models), self.examples)
        CLAUSES[clause].hold(subject)


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
    excepted = _checked(exceptions or {})
    for name, clause in CLAUSES.items():
        if name not in excepted:
            clause.hold(subject)


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
