"""The conformance suite catches each deliberately wrong plugin by the clause that it breaks."""

import warnings

import pytest
from mutants import MUTANTS
from mutants.traces import FROZEN

from metaplug.execution.traced import CompiledDerivation
from metaplug.testing import CLAUSES, ConformanceError, check, found, problem
from metaplug.testing.clauses import Subject


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.kind())
def test_a_wrong_plugin_is_caught_by_the_clause_that_it_breaks_and_by_none_before(mutant):
    with pytest.raises(ConformanceError) as error:
        check(
            mutant,
            off=getattr(mutant, "off", None),
            exceptions=getattr(mutant, "exceptions", {}),
            models=("mlp",),
            examples=2,
        )
    text = str(error.value)
    assert text.startswith(f"plugin '{mutant.kind()}' breaks {mutant.caught_by}: ")
    assert mutant.says in text
    assert text.endswith(f"\nsee docs/conformance.md#{mutant.caught_by}")


@pytest.mark.parametrize("mutant", FROZEN, ids=lambda mutant: mutant.kind())
def test_what_a_trace_would_freeze_is_refused_by_name_or_caught(mutant):
    """Never other numbers in silence: where the trace itself does not refuse, the clause fails."""
    clause, subject = CLAUSES["traced-equals-eager"], Subject(mutant, models=("mlp",))
    case = problem("mlp")
    learner = case.learner(plugins=[mutant()])
    trace = learner.engine.derivation = CompiledDerivation(learner.engine, lambda graph, _: graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(2):
            found(learner, case.batch)
            learner.engine.meta_step(case.batch, 2)
        found(learner, case.batch)
    if trace.refusal is None:
        with pytest.raises(ConformanceError, match=r"in iteration 2 of a compiled step and of an"):
            clause.hold(subject)
    else:
        assert f"'{mutant.kind()}'" in trace.refusal
        clause.hold(subject)


def test_every_clause_catches_something():
    assert {mutant.caught_by for mutant in MUTANTS} == set(CLAUSES)
