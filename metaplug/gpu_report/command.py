"""The whole report, from what was asked for to an exit status."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import metaplug
from metaplug.commits import commit_of
from metaplug.errors import RequestError, reason
from metaplug.files import make_folder
from metaplug.gpu_report.checkout import find_checkout, write_metadata
from metaplug.gpu_report.plan import MACHINE, Part, parts_of
from metaplug.gpu_report.record import PAGE, Record
from metaplug.gpu_report.running import Runner, say
from metaplug.gpu_report.signals import SignalError, signals_raised

BUDGET = 600.0
"""Seconds that a report takes at most."""
LEAST, MOST = 10.0, 86_400.0
"""Seconds between which a budget is taken: below, no part would begin."""


def report(
    *,
    device: str = "cuda",
    budget: float = BUDGET,
    out: Path | None = None,
    only: Sequence[str] = (),
    small: bool = False,
) -> int:
    """Measure what the device does, and write report.md and report.json; return the exit status.

    Every part runs in processes of its own; what is there is written after each result, so that a
    report that is stopped at any moment is a page that says what it has and what it lacks. Nothing
    is installed, and no network is used.

    Args:
        device: "cuda" or "cpu". CUDA_VISIBLE_DEVICES chooses one of several.
        budget: seconds that all of it takes at most.
        out: a folder, made here; default: a new one in runs/.
        only: names of parts; empty for all.
        small: the smallest works with few repeats, in a minute: to try the report itself.

    Returns:
        0; 1 where something failed; 128 + N where signal N ended it.

    Raises:
        RequestError: no such device or part here, too small a budget, or no folder to write into.
        RunError: the files cannot be written.
    """
    begun = time.monotonic()
    if device not in ("cuda", "cpu"):
        raise RequestError(
            f"--device {device}: a report is of cuda or cpu; CUDA_VISIBLE_DEVICES chooses one of "
            "several devices"
        )
    if not LEAST <= budget <= MOST:
        raise RequestError(
            f"--budget {budget:g}: torch alone takes seconds to start, and a day is long enough; "
            f"give {LEAST:g} to {MOST:g} seconds"
        )
    root = find_checkout()
    tests = root / "tests" / "cuda" if root else None
    parts = parts_of(
        device,
        tests=str(tests) if tests and tests.is_dir() else None,
        small=small,
        only=only,
        processors=os.cpu_count() or 1,
    )
    options = [*(f"--part={name}" for name in only), *["--small"] * small]
    options += [f"--device={device}"] * (device != "cuda")
    options += [f"--budget={budget:g}"] * (budget != BUDGET)
    head = {
        "command": shlex.join(["metaplug", "gpu-report", *options]),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "asked": device,
        "budget": budget,
        "small": small,
        "metaplug": metaplug.__version__,
        "commit": commit_of(root) if root else None,
    }
    with tempfile.TemporaryDirectory(prefix="metaplug-", ignore_cleanup_errors=True) as name:
        temporary = Path(name)
        record = Record(head, [MACHINE, *parts], begun)
        runner = Runner(record, device, _environment(root, temporary), temporary)
        with signals_raised():
            status = _run(record, runner, parts, out)
    if record.folder:
        say(f"the report is {record.folder / PAGE}", sys.stdout)
    return status


def _run(record: Record, runner: Runner, parts: Sequence[Part], out: Path | None) -> int:
    """Run all parts, whatever ends them; the signals are heard until the last result."""
    try:
        runner.run(MACHINE, record.begun + record.values["budget"] * MACHINE.ends)
        (machine,) = record.units(MACHINE).values()
        if machine["state"] != "done":
            raise RequestError(_refusal(machine, record.values["budget"]))
        record.folder = _folder(out)
        record.save()
        for part in parts:
            runner.run(part, record.begun + record.values["budget"] * part.ends)
        record.values["state"], status = "finished", 0
    except SignalError as error:
        record.values["state"], status = f"stopped by {error}", 128 + error.number
        for unit in record.every_unit():
            if unit["state"] in ("running", "waiting"):
                unit["reason"] = unit["reason"] or f"the report was stopped by {error}"
            if unit["state"] == "running":
                spent = time.monotonic() - record.begun - unit["begun"]
                unit.update(state="stopped", seconds=round(spent, 1))
    record.save()
    failed = any(unit["state"] == "failed" for unit in record.every_unit())
    return status or int(failed)


def _refusal(machine: Mapping[str, Any], budget: float) -> str:
    """Say why not even the versions and the device could be found out."""
    if machine["state"] == "stopped":
        return (
            f"--budget {budget:g}: torch did not start in the {budget * MACHINE.ends:g} s that it "
            "has of it; give more"
        )
    reason = str(machine["reason"])
    if "is not installed" in reason:
        python = "give a Python that has it, as in make gpu-report PYTHON=python3"
        return f"{reason}, in {sys.executable}: {python}"
    return reason


def _folder(out: Path | None) -> Path:
    moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / f"gpu-report-{moment}" if out is None else out
    try:
        make_folder(folder)
    except OSError as error:
        raise RequestError(
            f"--out {folder}: it cannot be made ({reason(error)}); give a folder that can"
        ) from error
    return folder


def _environment(root: Path | None, temporary: Path) -> dict[str, Any]:
    """Return the environment of the processes: the checkout importable, caches in no one's way."""
    path = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    if root:
        site = temporary / "site"
        write_metadata(root, site)
        path = [str(site), str(root), *path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        # Compiled anew, so that no earlier run helps; in processes that end with their parent.
        "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
        "TRITON_CACHE_DIR": str(temporary / "triton"),
        # torch's profiler would talk of itself on standard error.
        "KINETO_LOG_LEVEL": "99",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
