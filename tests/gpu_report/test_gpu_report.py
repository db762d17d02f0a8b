"""The report on a device: whole at any moment, and no part takes another along."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest

from metaplug.bench import WORKLOADS, contestants, measuring
from metaplug.bench.limits import Speed
from metaplug.errors import RequestError
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.gpu_report import plan, running, steps, works
from metaplug.gpu_report.checkout import find_checkout, write_metadata
from metaplug.gpu_report.command import report
from metaplug.gpu_report.plan import Part, Unit, parts_of
from metaplug.gpu_report.record import PAGE, VALUES, Record
from metaplug.gpu_report.running import Runner
from metaplug.report.gpu_page import page

ROOT = Path(__file__).parents[2]
HEAD = {
    "command": "metaplug gpu-report",
    "began": "2026-11-29T02:00:00+00:00",
    "asked": "cuda",
    "budget": 60.0,
    "metaplug": "0.1.0",
}
WORK = """
import os, signal, sys, time

def run(work, device, emit):
    print("chatter on standard output")
    for row in work.get("rows", ()):
        emit("row", row)
    exec(work.get("then", ""))
    return work.get("fails")
"""


@pytest.fixture
def ran(tmp_path: Path) -> Any:
    """Run units whose work is a line of Python, in one part; return its record."""
    (tmp_path / "own_work.py").write_text(WORK)

    def run(
        *jobs: list[dict[str, Any]], seconds: float = 30.0, at_once: int = 1
    ) -> list[dict[str, Any]]:
        units = [
            tuple(Unit(f"{place}.{index}", work) for index, work in enumerate(job))
            for place, job in enumerate(jobs)
        ]
        part = Part("bench", "own_work", 1.0, tuple(units), at_once)
        record = Record(HEAD, [plan.MACHINE, part], time.monotonic())
        record.folder = tmp_path
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
        Runner(record, "cpu", environment, tmp_path).run(part, time.monotonic() + seconds)
        record.save()
        written = json.loads((tmp_path / VALUES).read_text())
        found: list[dict[str, Any]] = written["parts"][1]["units"]
        assert (tmp_path / PAGE).read_text() == page(written)
        return found

    return run


def state(units: list[dict[str, Any]]) -> list[str]:
    return [unit["state"] for unit in units]


ROW = {
    "workload": "sinusoid-25x5",
    "contestant": "plain torch loop",
    "milliseconds": 20.0,
    "spread": 1.0,
    "gradient_error": 1e-15,
    "busy": None,
    "share": 0.01,
    "reason": None,
    "limit": {"flops": 10**9, "speed": {"flops_per_second": 1e12, "precision": "float32"}},
}
STACKED = {**ROW, "contestant": "metaplug, vectorized", "milliseconds": 4.0, "busy": 0.25}


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its process was ended by SIGSEGV"),
        ("emit('at', 'test_it'); os._exit(7)", "its process ended with status 7 in test_it"),
        ("raise RuntimeError('CUDA error: an illegal access')", "RuntimeError: CUDA error: an"),
        ("sys.exit('no')", "SystemExit: no"),
    ],
)
def test_a_part_that_crashes_keeps_its_results_and_takes_no_other_along(
    ran: Any, then: str, reason: str
) -> None:
    first, second, third = ran(
        [{"rows": [ROW]}, {"rows": [STACKED], "then": then}, {"rows": [ROW]}]
    )
    assert state([first, second, third]) == ["done", "failed", "done"]
    assert second["reason"].startswith(reason)
    assert second["rows"] == [STACKED]
    assert "chatter on standard output" in second["log"]
    assert first["reason"] is first.get("log") is None


def test_a_package_that_is_missing_is_said_once_for_all_of_a_part(ran: Any) -> None:
    units = ran([{"then": "import no_such_package.at_all"}, {}], [{}])
    assert state(units) == ["failed"] * 3
    assert {unit["reason"] for unit in units} == {
        "the package no_such_package is not installed here"
    }
    assert units[1]["rows"] == []


def test_a_unit_that_hangs_leaves_time_for_those_behind_it(
    ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "MOST", 0.05)
    units = ran([{"rows": [ROW], "then": "time.sleep(60)"}, {"rows": [ROW]}], seconds=20.0)
    assert state(units) == ["stopped", "done"]
    assert units[0]["reason"] == "its time was over"
    assert units[0]["rows"] == [ROW]
    assert units[0]["seconds"] < 10


def test_what_has_no_time_is_not_begun_and_the_page_says_so(ran: Any, tmp_path: Path) -> None:
    units = ran([{}], [{}], seconds=-1.0)
    assert state(units) == ["waiting", "waiting"]
    assert "* all of it: **not begun**: no time was left." in (tmp_path / PAGE).read_text()


def test_jobs_run_at_the_same_time_where_they_may(ran: Any, tmp_path: Path) -> None:
    """Each waits until the other is there."""
    then = (
        "import pathlib\npathlib.Path(work['own']).touch()\n"
        "while not pathlib.Path(work['other']).exists(): time.sleep(0.01)"
    )
    works = [{"own": own, "other": other, "then": then} for own, other in ("ab", "ba")]
    assert state(ran(*([work] for work in works), at_once=2)) == ["done", "done"]


def test_a_failure_that_is_told_is_a_failure(ran: Any) -> None:
    (unit,) = ran([{"fails": "2 of 9 failed", "rows": [{**ROW, "milliseconds": float("nan")}]}])
    assert (unit["state"], unit["reason"]) == ("failed", "2 of 9 failed")
    assert unit["rows"][0]["milliseconds"] is None


def without_metaplug(folder: Path) -> Path:
    """Make a Python that has the packages that are installed here, but for metaplug itself."""
    links = folder / "links"
    links.mkdir()
    for place in (Path(place) for place in sys.path if place.endswith("site-packages")):
        for each in place.iterdir():
            if not re.search(r"metaplug|\.pth$", each.name) and not (links / each.name).exists():
                (links / each.name).symlink_to(each)
    venv.create(folder / "venv", symlinks=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "links.pth").write_text(str(links))
    return folder / "venv" / "bin" / "python"


def start(python: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TMPDIR"] = str(out.parent)  # what is killed leaves its folder there
    return subprocess.Popen(
        [python, "-m", "metaplug.gpu_report", "--device=cpu", "--small", f"--out={out}", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_checkout_that_was_never_installed_is_measured(tmp_path: Path) -> None:
    python, folder = without_metaplug(tmp_path), tmp_path / "out"
    process = start(python, folder, "--part=tests", "--part=bench", "--part=training")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out == f"the report is {folder / PAGE}\n"
    values = json.loads((folder / VALUES).read_text())
    units = {unit["name"]: unit for part in values["parts"] for unit in part["units"]}
    assert {unit["state"] for unit in units.values()} == {"done"}
    assert values["state"] == "finished"
    assert units["maml + gradient-sharing"]["rows"][-1]["versions"]["metaplug"] == "0.1.0"
    text = (folder / PAGE).read_text()
    assert text == page(values)
    for said in (
        "* tests/cuda: left out: they need a CUDA device.",
        "* captured steps: left out: a CPU has no CUDA graphs.",
        "| metaplug + gradient-sharing |",
        "## A short training",
    ):
        assert said in text


def test_memory_and_more_tasks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure_speed", lambda meter: Speed(1e9, 1e-6))
    told: list[Any] = []
    work = {"workload": "sinusoid-25x1", "only": [works.LOOP, works.STACKED], "memory": True}
    assert steps.run({**work, "repeats": 1}, "cpu", lambda *event: told.append(event)) is None
    assert [row["contestant"] for _, row in told] == [works.LOOP, works.STACKED]
    assert all(row["peak_mib"] > 0 for _, row in told)
    told.clear()
    grow = {"grow": "sinusoid-25x5", "tasks": [2, 4], "repeats": 1}
    steps.run(grow, "cpu", lambda *event: told.append(event))
    assert [row["tasks"] for _, row in told] == [2, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_report_that_is_stopped_midway_is_a_page_that_says_so(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(Path(sys.executable), tmp_path, "--part=training")
    assert process.stderr is not None
    assert "training: maml" in process.stderr.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    values, text = json.loads((tmp_path / VALUES).read_text()), (tmp_path / PAGE).read_text()
    assert text == page(values)
    assert text.startswith("# metaplug on ")
    assert "Traceback" not in err
    if number is signal.SIGKILL:
        assert "**Not finished.** This was written" in text
        assert "maml: **not finished**." in text
    else:
        assert process.returncode == 128 + number
        assert f"**Stopped by {number.name}** after" in text
        assert f"maml: **stopped midway**: the report was stopped by {number.name}." in text
        assert out == f"the report is {tmp_path / PAGE}\n"
        assert "maml + gradient-sharing: **not begun**: the report was stopped by" in text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"device": "cuda:1"},
            "--device cuda:1: a report is of cuda or cpu; CUDA_VISIBLE_DEVICES chooses one of "
            "several devices",
        ),
        ({"only": ["test"]}, "unknown part 'test': did you mean 'tests'?"),
        (
            {"budget": float("nan")},
            "--budget nan: torch alone takes seconds to start, and a day is long enough; give 10 "
            "to 86400 seconds",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_a_line(asked: Any, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        report(**asked)


def parts(device: str, **asked: Any) -> dict[str, Part]:
    settings = {"tests": "tests/cuda", "small": False, "only": (), "processors": 16, **asked}
    return {part.name: part for part in parts_of(device, **settings)}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("small", [False, True])
def test_the_plan_names_what_exists(device: str, small: bool) -> None:
    made = parts(device, small=small)
    assert list(made) == ["tests", "bench", "memory", "training", "large"]
    assert [part.ends for part in made.values()] == sorted(part.ends for part in made.values())
    known = contestants(["gradient-sharing"], compiled=True, captured=device == "cuda")
    for part in made.values():
        assert part.jobs or part.left_out
        works = [unit.work for job in part.jobs for unit in job]
        assert len({unit.name for job in part.jobs for unit in job}) == len(works)
        for work in works:
            assert {work.get("workload"), work.get("grow")} - {None} <= WORKLOADS.keys()
            assert set(work.get("only", ())) <= known.keys()
            if part.name == "training":
                ExperimentConfig.model_validate(work)
    documented = (ROOT / "docs" / "gpu-report.md").read_text(encoding="utf-8")
    shares = re.findall(r"^\| `(\w+)` \|.*\| (\d+) %", documented, re.MULTILINE)
    assert shares == [(name, f"{100 * part.ends:.0f}") for name, part in made.items()]
    only = parts(device, only=["memory"])
    assert [part.ends for part in only.values()] == [made["large"].ends]


def test_the_plan_has_every_file_of_the_cuda_tests() -> None:
    files = {path.name for path in (ROOT / "tests" / "cuda").glob("test_*.py")}
    units = [unit for job in parts("cuda")["tests"].jobs for unit in job]
    assert {unit.work["file"].rpartition("/")[2] for unit in units} == files
    shares = [unit for unit in units if unit.name.startswith("test_family.py")]
    assert [unit.work["shard"] for unit in shares] == list(range(shares[0].work["shards"]))
    assert "run it from the repository" in parts("cuda", tests=None)["tests"].left_out["tests/cuda"]


def test_the_metadata_of_a_checkout_is_that_of_an_installation(tmp_path: Path) -> None:
    import tomllib
    from importlib.metadata import distributions

    root = find_checkout()
    assert root == ROOT
    write_metadata(root, tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["entry-points"]
    assert {(entry.group, entry.name, entry.value) for entry in found.entry_points} == {
        (group, name, value) for group in groups for name, value in groups[group].items()
    }
    assert found.requires == project["dependencies"]
    assert found.version == project["version"]


def test_cuda_tests_are_told_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--run-slow', action='store_true')\n"
    )
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no | device')\ndef test_skipped(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError('x')\ndef test_late(broken): pass\n"
    )
    code = (
        "import json, sys; from metaplug.gpu_report.cuda_tests import run\n"
        "tell = lambda event, value: print(json.dumps([event, value]), file=sys.stderr)\n"
        f"work = {{'file': {str(file)!r}, 'shard': int(sys.argv[1]), 'shards': 2}}\n"
        "tell('end', run(work, 'cuda', tell))"
    )
    told: list[Any] = []
    for shard in "01":
        command = [sys.executable, "-c", code, shard]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        told += [json.loads(line) for line in done.stderr.splitlines()]
    rows = {value["test"]: value for event, value in told if event == "row"}
    assert {name.partition("::")[2]: row["outcome"] for name, row in rows.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_late": "failed",
    }
    assert rows["test_it.py::test_bad"]["reason"] == "assert 1 == 2"
    assert rows["test_it.py::test_late"]["reason"] == "ValueError: x"
    assert [value for event, value in told if event == "end"] == [None, "2 of 2 failed"]
    assert ["at", "test_it.py::test_bad"] in told
