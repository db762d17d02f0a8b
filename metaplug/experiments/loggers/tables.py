"""What the loggers share: the final table, values as text, and the check for a library."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from metaplug.errors import RequestError, one_line


def check_installed(logger: str, package: str) -> None:
    """Refuse a logger whose library is missing; imports nothing.

    Raises:
        RequestError: names the extra that brings the library.
    """
    if find_spec(package) is None:
        raise RequestError(
            f"the logger '{logger}' needs {package}, which is not installed: "
            f"pip install 'metaplug[{logger}]'"
        )


def final_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The finite figures of a summary: test, best validation, iterations and seconds.

    >>> end = {"test": {"metric": "accuracy", "mean": 0.5, "interval": 0.1, "num_tasks": 600}}
    >>> final_figures(end)
    {'test/accuracy': 0.5, 'test/interval': 0.1, 'test/num_tasks': 600}
    """
    test, best = summary["test"], summary.get("best_validation") or {}
    named = {
        f"test/{test['metric']}": test["mean"],
        "test/interval": test["interval"],
        "test/num_tasks": test["num_tasks"],
        f"best_validation/{test['metric']}": best.get("mean"),
        "best_validation/interval": best.get("interval"),
        "best_validation/iteration": best.get("iteration"),
        "iterations": summary.get("iterations"),
        "skipped": summary.get("skipped"),
        "seconds": summary.get("seconds"),
    }
    return {name: value for name, value in named.items() if _is_finite(value)}


def markdown(values: Mapping[str, Any], *columns: str) -> str:
    """A table of names and values in Markdown.

    >>> markdown({"seed": 0, "tasks.source": "glyphs"}, "field", "value").splitlines()[2:]
    ['| seed | 0 |', '| tasks.source | glyphs |']
    """
    rows = [[name, one_line(plain(value), 1000)] for name, value in values.items()]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([*columns], ["---"] * 2, *rows))


def plain(value: Any) -> str:
    """A value as text: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
