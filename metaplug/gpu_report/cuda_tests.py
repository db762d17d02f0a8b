"""The CUDA tests of a checkout, a file or a share of its tests at a time."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaplug.errors import one_line


def run(work: dict[str, Any], device: str, emit: Callable[[str, Any], None]) -> str | None:
    """Run every `shards`-th test of a file, and tell each as a row; return how many failed."""
    importlib.import_module("hypothesis")  # which all tests need: without it, say so
    file = Path(work["file"])
    root = next(above for above in file.parents if (above / "pyproject.toml").is_file())
    told = _Told(emit, work["shard"], work["shards"])
    # Plugins of pytest that happen to be installed bring warnings, which are errors in our tests.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "--run-slow", "-p", "no:cacheprovider"]
    status = pytest.main(
        [*options, "-c", str(root / "pyproject.toml"), "--rootdir", str(root), str(file)],
        plugins=[told],
    )
    if failed := told.outcomes["failed"]:
        return f"{failed} of {sum(told.outcomes.values())} failed"
    fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return None if status in fine else f"pytest ended with status {int(status)}"


class _Told:
    """A plugin of pytest that tells each test as it goes."""

    def __init__(self, emit: Callable[[str, Any], None], shard: int, shards: int) -> None:
        self.emit, self.shard, self.shards = emit, shard, shards
        self.outcomes = Counter[str]()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Take this process's share."""
        items[:] = items[self.shard :: self.shards]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that does not import counts as a test that failed."""
        if report.failed:
            self._tell(report.nodeid, "failed", 0.0, report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell which test begins, in case that it ends the process."""
        self.emit("at", _short(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell how it went: of its setup and teardown, only what did not pass."""
        if report.when == "call" or not report.passed:
            reason = ""
            if report.skipped and isinstance(report.longrepr, tuple):
                reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            elif report.failed:
                reason = report.longreprtext
            self._tell(report.nodeid, report.outcome, report.duration, reason)

    def _tell(self, test: str, outcome: str, seconds: float, text: str) -> None:
        self.outcomes[outcome] += 1
        raised = [line[1:] for line in text.splitlines() if line.startswith("E ")]
        row = {"test": _short(test), "outcome": outcome, "seconds": round(seconds, 3)}
        if outcome != "passed":
            row["reason"] = one_line(" ".join(raised) or text)
        if outcome == "failed":
            row["log"] = text[-4000:]
        self.emit("row", row)


def _short(nodeid: str) -> str:
    return nodeid.rpartition("/")[2]
