"""For authors of plugins: a suite that holds any plugin to the contract, with small models, tasks and plain loops to compare with.

It needs pytest and hypothesis: pip install 'metaplug[testing]'. Nothing else of metaplug imports it.
"""

from importlib.util import find_spec

if missing := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"metaplug.testing needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
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
