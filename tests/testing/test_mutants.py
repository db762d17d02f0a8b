"""The conformance suite catches each deliberately wrong plugin by the clause that it breaks."""

import re
import warnings

import pytest
import torch
from mutants import MUTANTS
from mutants.traces import FROZEN

from metaplug import Plugin, hookimpl
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


def scaled(tensor):
    """By .data, which autograd does not notice."""
    tensor.data.copy_(3 * tensor.data + 1)


@torch.no_grad()
def cleared(tensor):
    """Where torch counts it, and the value may be the same."""
    tensor.zero_()


OF_A_STEP = {
    "inputs": lambda step: step.inputs,
    "targets": lambda step: step.targets,
    "losses": lambda step: step.losses,
    "predictions": lambda step: step.predictions,
    "parameters['0.weight']": lambda step: step.parameters["0.weight"],
    "statistics['writing']['seen']": lambda step: step.statistics["writing"]["seen"],
}
OF_AN_OUTCOME = {
    "batch.support_x": lambda outcome: outcome.batch.support_x,
    "batch.support_y": lambda outcome: outcome.batch.support_y,
    "batch.query_x": lambda outcome: outcome.batch.query_x,
    "batch.query_y": lambda outcome: outcome.batch.query_y,
    "support_losses[0]": lambda outcome: outcome.support_losses[0],
    "query_losses['1']": lambda outcome: outcome.query_losses[1],
    "query_predictions": lambda outcome: outcome.query_predictions,
    "adapted_parameters['0.weight']": lambda outcome: outcome.adapted_parameters["0.weight"],
    "statistics['writing']['seen']": lambda outcome: outcome.statistics["writing"]["seen"],
}


def says_where_it_writes(kind, path):
    clause, subject = CLAUSES["no-mutation"], Subject(kind, models=("mlp",), examples=1)
    with pytest.raises(ConformanceError, match=f" wrote into {re.escape(path)}, which other"):
        clause.hold(subject)


@pytest.mark.parametrize("write", [scaled, cleared])
@pytest.mark.parametrize("path", OF_A_STEP)
def test_a_write_into_what_a_step_reaches_is_found(path, write):
    class Writing(Plugin):
        @hookimpl
        def transform_inner_losses(self, losses, step):
            step.keep("seen", losses.mean())

        @hookimpl
        def transform_gradients(self, gradients, step):
            write(OF_A_STEP[path](step))

    says_where_it_writes(Writing, f"step.{path}")


@pytest.mark.parametrize("write", [scaled, cleared])
@pytest.mark.parametrize("path", OF_AN_OUTCOME)
def test_a_write_into_what_an_outcome_reaches_is_found(path, write):
    class Writing(Plugin):
        @hookimpl
        def transform_inner_losses(self, losses, step):
            step.keep("seen", losses.mean())

        @hookimpl
        def transform_outer_losses(self, losses, outcome):
            write(OF_AN_OUTCOME[path](outcome))

    says_where_it_writes(Writing, f"outcome.{path}")


def test_every_clause_catches_something():
    assert {mutant.caught_by for mutant in MUTANTS} == set(CLAUSES)
