"""The conformance suite is held to what it promises: each deliberately wrong plugin fails at the clause that it breaks, and says so."""

import pytest
from mutants import MUTANTS

from metaplug.testing import CLAUSES, ConformanceError, check


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.kind())
def test_a_wrong_plugin_is_caught_by_the_clause_that_it_breaks_and_by_none_before(mutant):
    with pytest.raises(ConformanceError) as error:
        check(
            mutant,
            off=getattr(mutant, "off", None),
            exceptions=getattr(mutant, "exceptions", {}),
            models=("mlp",),
            examples=3,
        )
    text = str(error.value)
    assert text.startswith(f"plugin '{mutant.kind()}' breaks {mutant.caught_by}: ")
    assert mutant.says in text
    assert text.endswith(f"\nsee docs/conformance.md#{mutant.caught_by}")


def test_every_clause_catches_something():
    assert {mutant.caught_by for mutant in MUTANTS} == set(CLAUSES)
