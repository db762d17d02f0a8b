"""The third-party example, as a stranger meets it: installed into an environment of its own.

The environment is new and needs no network: it sees the packages of this one, and the example is
built and installed into it alone.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from metaplug.templates import write_package

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "conflict-projection"
MODULE = EXAMPLE / "conflict_projection.py"
TRAIN = shlex.split(
    "train --preset maml++ --with gradient-sharing --with conflict-projection:strength=0.5 "
    "--tasks glyphs --ways 2 --queries 1 --tasks-per-batch 3 --iterations 2 --inner-steps 2 "
    "--set model.settings.filters=2 --set training.validation_tasks=2 "
    "--set training.test_tasks=2 --set runtime.threads=1 --device cpu --name mine"
)

COMMANDS = """
import json, sys
from metaplug.cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stopped:
        assert stopped.code == 0, arguments
"""
"""Several commands in one process, which imports torch once."""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Install a copy of the example into a new environment, whose Python is returned."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    Path(own.stdout.strip(), "parent.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    )
    shutil.copytree(EXAMPLE, folder / "example")
    install = (
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--disable-pip-version-check",
        ".",
    )

    def run(*arguments):
        # Leave out what this process was started with: coverage, sources, a hypothesis profile.
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "COV", "HYPOTHESIS", "PYTEST"))
        }
        done = subprocess.run(
            [python, *arguments],
            cwd=folder / "example",
            env=kept,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    built = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, *install],
        cwd=folder / "example",
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (
        folder / "example" / MODULE.name
    ).unlink()  # what is imported from here on is what was installed
    shutil.rmtree(folder / "example" / "build", ignore_errors=True)
    run.folder = folder / "example"
    return run


def test_it_has_the_files_that_the_command_writes(tmp_path):
    written = write_package("conflict-projection", "gradient", tmp_path / "new")
    assert sorted(path.relative_to(EXAMPLE) for path in _files(EXAMPLE)) == written


def test_its_class_has_under_forty_lines_with_its_config():
    _, _, source = MODULE.read_text(encoding="utf-8").partition("\nclass ")
    assert len([line for line in f"class {source}".splitlines() if line.strip()]) < 40


def test_its_own_tests_pass_where_it_is_installed(stranger):
    report = stranger("-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert "passed" in report
    assert "failed" not in report


def test_it_is_listed_and_trains_behind_mamlpp_and_gradient_sharing_with_its_figures_in_the_log(
    stranger,
):
    report = stranger("-c", COMMANDS, json.dumps([["plugins", "conflict-projection"], TRAIN]))
    assert "conflict-projection: a plugin of metaplug-conflict-projection 0.1.0" in report
    assert "Share of the conflict to remove." in report
    made = stranger.folder / "runs" / "mine"
    assert '"metaplug-conflict-projection": "0.1.0"' in (made / "summary.json").read_text()
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        figures = {
            name: value
            for name, value in line["figures"].items()
            if name.startswith("conflict-projection.")
        }
        assert list(figures) == ["conflict-projection.conflict/0", "conflict-projection.conflict/1"]
        assert all(round(3 * share, 5) in (0, 1, 2, 3) for share in figures.values()), (
            "shares of three tasks"
        )


def _files(folder):
    passed_over = {".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__", "build"}
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and not passed_over & set(path.parts) and "egg-info" not in str(path)
    ]
