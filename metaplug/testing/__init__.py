"""For authors of plugins: a suite that holds any plugin to the contract, and its parts.

* `suite`: the clauses as a class of tests and as one call; `clauses`: what a clause is.
* `forms`, `states`, `reading`, `numbers`, `separation`, `derivations`, `composing`: the clauses.
* `comparing`, `watching`: what they look at; `first_party`: our plugins, with settings.
* `problems`, `strategies`: small models and tasks; `reference`: the algorithms as plain loops.

It needs pytest and hypothesis (pip install 'metaplug[testing]'); nothing else of metaplug does.
"""

from importlib.util import find_spec

if missing := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
    are = "is" if len(missing) == 1 else "are"
    raise ModuleNotFoundError(
        f"metaplug.testing needs {' and '.join(missing)}, which {are} not installed: "
        "pip install 'metaplug[testing]'",
        name=missing[0],
    )

from metaplug.testing import reference, strategies
from metaplug.testing.clauses import Clause, ConformanceError
from metaplug.testing.comparing import adapted, assert_close, found
from metaplug.testing.first_party import FIRST_PARTY
from metaplug.testing.problems import (
    CLASSIFIERS,
    MODELS,
    SMOOTH,
    Problem,
    Stream,
    problem,
    regression,
)
from metaplug.testing.suite import CLAUSES, PluginConformance, check

__all__ = [
    "CLASSIFIERS",
    "CLAUSES",
    "FIRST_PARTY",
    "MODELS",
    "SMOOTH",
    "Clause",
    "ConformanceError",
    "PluginConformance",
    "Problem",
    "Stream",
    "adapted",
    "assert_close",
    "check",
    "found",
    "problem",
    "reference",
    "regression",
    "strategies",
]
