"""The page about a device says what was measured, what was not, and why."""

from __future__ import annotations

import re
from typing import Any

from metaplug.report.gpu_page import page
from metaplug.report.markdown import table

LIMIT = {"flops": 10**9, "speed": {"flops_per_second": 5e13, "precision": "float32"}}
BENCH = {"workload": "sinusoid-25x5"}


def unit(name: str, *rows: Any, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "state": "done",
        "reason": None,
        "seconds": 12.0,
        "work": BENCH,
        "rows": [*rows],
        **more,
    }


def step(contestant: str, milliseconds: float | None, **more: Any) -> dict[str, Any]:
    row = {
        **BENCH,
        "contestant": contestant,
        "milliseconds": milliseconds,
        "spread": 0.5,
        "gradient_error": None,
        "busy": None,
        "share": None,
        "reason": None,
        "limit": LIMIT,
        "peak_mib": None,
    }
    return {**row, **more}


def part(name: str, *units: Any, **left_out: str) -> dict[str, Any]:
    return {"name": name, "units": [*units], "left_out": left_out}


def written(*parts: Any, **changes: Any) -> str:
    machine = {
        "device": "A device",
        "torch": "2.14.1",
        "cuda": "13.0",
        "memory_mib": 143_771,
        "missing": ["higher"],
    }
    values = {
        "state": "finished",
        "seconds": 420.0,
        "budget": 600.0,
        "command": "metaplug gpu-report",
        "began": "2026-11-29T02:00:00+00:00",
        "asked": "cuda",
        "metaplug": "0.1.0",
        "commit": "abc",
        "parts": [part("machine", unit("versions and device", machine)), *parts],
    }
    return page({**values, **changes})


def squeezed(text: str) -> str:
    """Leave out what only makes the columns of a table stand below each other."""
    return re.sub("-+", "-", re.sub(" +", " ", text))


LOOP = step("plain torch loop", 100.0, gradient_error=1e-15)
STACKED = step("metaplug, vectorized", 8.0, gradient_error=2e-14, busy=0.25, share=0.0125)


def test_the_head_says_on_what_it_was_measured() -> None:
    assert written().startswith(
        """# metaplug on A device

* **Measured:** 2026-11-29 02:00 UTC, by `metaplug gpu-report`
* **metaplug:** 0.1.0, commit abc
* **torch:** 2.14.1, CUDA 13.0
* **Device:** 143,771 MiB
* **Not installed here:** `higher`

**Finished** after 420 of 600 seconds: 0 of 0 pieces of work are whole.
"""
    )


def test_steps_are_a_table_of_contestants_by_workloads() -> None:
    refused = step("metaplug, compiled", None, reason="RuntimeError: no | compiler")
    text = written(
        part(
            "bench",
            unit("sinusoid-25x5", LOOP, STACKED),
            unit(
                "sinusoid-25x5, captured",
                {**STACKED, "milliseconds": 9.0},
                step("metaplug, captured", 3.0, busy=1.0),
                refused,
                work={**BENCH, "traced": True},
            ),
        )
    )
    assert """
| | sinusoid-25x5 |
|-|-|
| plain torch loop | 100 ± 0 |
| metaplug, vectorized | 8.00 ± 0.50 (12×) |

Of `metaplug, vectorized`, **busy** is the share""" in squeezed(text)
    assert """
| | busy | of limit | GFLOP a step | TFLOP/s here | error |
|-|-|-|-|-|-|
| sinusoid-25x5 | 25 % | 1.25 % | 1 | 50, float32 | 2e-14 |

### Captured and compiled, beside plain ones

| workload | step | ms | plain, in the same run | times as fast | busy |
|-|-|-|-|-|-|
| sinusoid-25x5 | metaplug, captured | 3.00 ± 0.50 | 9.00 ± 0.50 | 3.00× | 100 % |
| sinusoid-25x5 | metaplug, compiled | – | 9.00 ± 0.50 | | |

* metaplug, compiled, on sinusoid-25x5: RuntimeError: no \\| compiler
""" in squeezed(text)


def test_tests_are_counted_by_file_and_each_failure_is_named() -> None:
    def row(name: str, outcome: str, reason: str = "") -> dict[str, Any]:
        return {"test": f"test_a.py::{name}", "outcome": outcome, "reason": reason}

    text = written(
        part(
            "tests",
            unit(
                "test_a.py (1 of 2)", row("test_x", "passed"), row("test_y", "skipped", "one GPU")
            ),
            unit(
                "test_a.py (2 of 2)",
                row("test_z", "failed", "assert 1 == 2"),
                state="failed",
                reason="1 of 1 failed",
                seconds=14.0,
            ),
            unit("test_b.py", state="waiting", seconds=None, reason="no time was left"),
        )
    )
    assert (
        """
| file        | passed | failed | skipped | seconds |
|-------------|--------|--------|---------|---------|
| `test_a.py` | 1      | 1      | 1       | 14      |
| **all**     | 1      | 1      | 1       |         |

* `test_a.py::test_z` **failed**: assert 1 == 2
* 1 skipped: one GPU

* test_a.py (2 of 2): **failed**: 1 of 1 failed.
* test_b.py: **not begun**: no time was left.
"""
        in text
    )
    assert "1 of 3 pieces of work are whole, 1 failed, 1 not begun." in text


def test_memory_training_and_growth_have_their_tables() -> None:
    validation = {"iteration": 25, "validation": 0.5, "metric": "accuracy", "seconds": 3.0}
    test = {
        "test": {"metric": "accuracy", "mean": 0.5, "interval": 0.01},
        "best_validation": {"mean": 0.6, "interval": 0.01, "iteration": 50},
        "seconds": 9.0,
        "whole": 11.0,
    }
    work = {
        "model": {"name": "conv4"},
        "tasks": {"source": "glyphs"},
        "training": {"iterations": 50, "validate_every": 25},
    }
    point = {**BENCH, "tasks": 1024, "milliseconds": 4.0, "spread": 0.1, "peak_mib": 2000.0}
    text = written(
        part(
            "memory",
            unit("sinusoid-25x5", {**LOOP, "peak_mib": 100.0}, {**STACKED, "peak_mib": 80.0}),
        ),
        part(
            "training",
            unit("maml", validation, test, work=work),
            unit("maml, captured", validation, work=work, state="stopped", reason="r"),
            captured="no graphs",
        ),
        part("large", unit("more tasks", point, work={"grow": "sinusoid-25x5"})),
    )
    for lines in (
        "| plain torch loop | 100.0 |\n| metaplug, vectorized | 80.0 (0.80×) |\n",
        "| algorithm | test accuracy | best validation | seconds of training | with the test |\n",
        "| maml | 50.00 % ± 1.00 % | 60.00 % at 50 | 9.0 | 11.0 |\n",
        "| maml, captured | | 50.00 % at 25, the last one | 3.0 | |\n",
        "* maml, captured: **stopped midway**: r.\n* captured: left out: no graphs.\n",
        "| sinusoid-25x5 | 1,024 | 4.00 ± 0.10 | 0.004 | 2,000.0 |\n",
    ):
        assert lines in squeezed(text)


def test_a_report_that_was_killed_says_where() -> None:
    text = written(part("bench", unit("sinusoid-25x5", LOOP, state="running")), state="running")
    assert "**Not finished.** This was written 420 s after the start, at sinusoid-25x5." in text
    assert "* sinusoid-25x5: **not finished**." in text


def test_a_column_without_values_is_left_out() -> None:
    assert table(("", "a", "b"), [("x", "", "1")]) == "|   | b |\n|---|---|\n| x | 1 |"
