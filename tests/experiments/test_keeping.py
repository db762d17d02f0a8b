"""Studies whose runs are kept small in a file: written, read on another machine, and gone on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.studies import tiny_study
from support.written_runs import STUDY, write_study

from metaplug import RunError
from metaplug.cli.main import main
from metaplug.evaluation.curves import best_point
from metaplug.experiments.study import keeping
from metaplug.experiments.study.cells import cells_of
from metaplug.experiments.study.folder import to_yaml
from metaplug.experiments.study.keeping import KeptRun, keep, read_kept
from metaplug.experiments.study.matching import kept_of, to_keep
from metaplug.experiments.study.results import StudyResult, read_results
from metaplug.experiments.study.schema import Study, read_study
from metaplug.experiments.study.unpacking import kept_results, unpack
from metaplug.experiments.study.values import to_values

MARKED = "from metaplug import hookimpl\n@hookimpl\n"
INNER = {
    "support_losses": [1.5, 0.123456789, 0.1],
    "query_losses": [1.5, 1.0, 1.2],
    "cosines": [0.1, 0.2],
    "learning_rates": [0.1, 0.1],
}


def study(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["study", "study.yaml", *map(str, words)])
    return int(stopped.value.code or 0)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a whole study, whose runs are in runs/study; study.yaml lies beside it."""
    monkeypatch.chdir(tmp_path)
    folder = write_study(Path("runs/study"), inner=INNER, curve=(0.3, 1 / 3, 0.5))
    Path("study.yaml").write_text(STUDY)
    cells = cells_of(read_study(folder / "study.yaml"), "")
    keep(tmp_path / "kept.jsonl", to_keep(cells, folder, ()), folder)
    return tmp_path / "kept.jsonl"


def result_in(folder: str, file: Path) -> StudyResult:
    asked = read_study(Path("study.yaml"))
    cells = unpack(read_kept(file), cells_of(asked, ""), Path(folder))
    found = read_results(asked, cells, Path(folder))
    assert found is not None
    return found


def test_another_machine_shows_the_same(kept: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert study("--keep", kept, "--no-train") == 0
    assert len(read_kept(kept)) == 8  # it has all that the folder has
    shown = capfd.readouterr().out
    assert study("--keep", kept, "--out", "fresh") == 0
    again = capfd.readouterr()
    assert again.out == shown
    assert "8 runs in fresh/study, 8 of them finished already" in again.err
    assert len(read_kept(kept)) == 8
    with pytest.raises(SystemExit):
        main(["report", "fresh/study"])
    page = Path("fresh/study/report.html").read_text()
    assert "Support and query loss" in page
    assert "What plugins learn and log" in page


def test_a_line_has_validations_with_exact_means_and_no_weights(kept: Path) -> None:
    run = read_kept(kept)[0].values
    assert set(run) == {"label", "digest", "config", "sessions", "summary", "metrics"}
    assert [line["iteration"] for line in run["metrics"]] == [10, 20, 30]
    validation = run["metrics"][1]["validation"]
    assert validation["inner"]["support_losses"] == [1.5, 0.123457, 0.1]
    # A target is the mean of another run: rounded, it might never be reached.
    [whole, fresh] = (result_in(folder, kept) for folder in ("runs/study", "fresh/study"))
    asked = read_study(Path("study.yaml"))
    alone = kept_results(asked, cells_of(asked, "", to_compute=False), read_kept(kept))
    assert to_values(alone) == to_values(fresh)
    for one, other in zip(whole.rows, fresh.rows, strict=True):
        assert other.mean_curve == one.mean_curve
        assert [best_point("accuracy", run.curve) for run in other.runs] == [
            best_point("accuracy", run.curve) for run in one.runs
        ]
        assert other.test.per_task.tolist() == pytest.approx(one.test.per_task.tolist(), rel=1e-6)
    assert len(kept.read_bytes()) < 8 * 2500


def test_a_run_counts_whatever_code_computed_it(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def other(config: Any) -> str:
        return f"{hash(config.model_dump_json()) % 2**64:016x}"

    before = [run.digest for run in read_kept(kept)]
    monkeypatch.setattr("metaplug.experiments.study.cells.digest_of", other)
    assert study("--keep", kept, "--out", "fresh", "--set", "runtime.threads=2") == 0
    assert "8 of them finished already" in capfd.readouterr().err
    assert sorted(path.name for path in Path("fresh/study/cells").iterdir()) == sorted(before)
    # Those of a folder, too, and they are added to a file that lacks them.
    assert study("--keep", "new.jsonl") == 0
    assert sorted(run.digest for run in read_kept(Path("new.jsonl"))) == sorted(before)
    capfd.readouterr()
    assert study("--dry-run") == study("--dry-run", "--keep", kept) == 0
    listed = capfd.readouterr().out
    assert (listed.count("to compute"), listed.count("kept")) == (8, 8)


def test_the_file_of_a_plugin_is_code_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def transform_gradients(gradients): return gradients\n")
    mine = {"label": "mine", "plugins": [{"plugin": str(file)}]}
    asked = Study.model_validate({"variants": ["maml", mine]})
    later = cells_of(asked, "", to_compute=False)
    kept = [KeptRun("0" * 16, cell.config, {}) for cell in cells_of(asked, "")]
    assert list(kept_of(later, kept).values()) == [[run] for run in kept]
    session = {"folder": "here", "plugin_files": {"mine": {"path": str(file), "sha256": "0"}}}
    assert keeping._portable(session) == {"plugin_files": {"mine": {"sha256": "0"}}}


def test_files_of_one_name_are_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, factor in (("v1", 0), ("v2", 1)):
        Path(name).mkdir()
        text = f"return {{name: {factor} * each for name, each in gradients.items()}}"
        Path(name, "mine.py").write_text(f"{MARKED}def transform_gradients(gradients): {text}\n")
    mine = [{"label": v, "plugins": [{"plugin": f"./{v}/mine.py"}]} for v in ("v1", "v2")]
    Path("study.yaml").write_text(to_yaml(tiny_study("maml", *mine)))
    assert study("--keep", "kept.jsonl") == 0
    assert study("--keep", "kept.jsonl", "--out", "fresh") == 0
    assert "3 runs in fresh/study, 3 of them finished already" in capfd.readouterr().err
    [whole, fresh] = (result_in(folder, Path("kept.jsonl")) for folder in ("runs/study", "fresh"))
    assert [row.test.mean for row in fresh.rows] == pytest.approx(
        [row.test.mean for row in whole.rows], rel=1e-5
    )
    assert fresh.rows[1].test.mean != fresh.rows[2].test.mean
    Path("study.yaml").write_text(to_yaml(tiny_study("maml", mine[0])))
    assert result_in("alone", Path("kept.jsonl")).rows[1].test.mean == fresh.rows[1].test.mean


def test_a_run_of_todays_code_counts_before_one_of_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, kept = Path("mine.py"), Path("kept.jsonl")
    text = "def transform_gradients(gradients): return {n: 0 * g for n, g in gradients.items()}"
    Path("study.yaml").write_text(
        to_yaml(tiny_study("maml", {"label": "mine", "plugins": [{"plugin": "./mine.py"}]}))
    )
    file.write_text(MARKED + text)
    assert study("--out", "old") == 0
    file.write_text(MARKED + text.replace("0 *", "1 *"))
    assert study("--out", "new", "--keep", kept) == 0
    [digest] = [run.digest for run in read_kept(kept) if run.config.plugins]
    assert study("--out", "old", "--keep", kept) == 0
    assert [run.digest for run in read_kept(kept) if run.config.plugins] == [digest]
    # An older line may come last, by hand; it is shown where today's is none.
    lines = kept.read_text().splitlines()
    older = next(line for line in lines if digest in line).replace(digest, "0" * 16)
    kept.write_text("\n".join([*lines, older, ""]))
    asked = cells_of(read_study(Path("study.yaml")), "")
    assert unpack(read_kept(kept), asked, Path("fresh"))[1].digest == digest


def test_what_is_missing_is_computed_and_added_as_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("deep/kept.jsonl")
    Path("study.yaml").write_text(to_yaml(tiny_study("maml")))
    assert study("--keep", file) == 0
    first = file.read_bytes()
    file.write_bytes(first.rstrip())  # as an editor may leave it
    Path("study.yaml").write_text(to_yaml(tiny_study("maml", "fomaml")))
    seen = list[int]()

    def noting(path: Path, cells: Any, folder: Path) -> None:
        keep(path, cells, folder)
        seen.append(len(read_kept(path)))

    monkeypatch.setattr(keeping, "keep", noting)
    assert study("--keep", file, "--out", "fresh") == 0
    assert seen == [1, 2]
    assert file.read_bytes().startswith(first)
    assert study("--keep", file, "--out", "fresh") == 0
    assert seen == [1, 2, 2]
    assert not list(Path("fresh/study/cells").glob(f"{read_kept(file)[0].digest}/*.safetensors"))


def test_later_lines_win_and_a_run_that_has_begun_goes_on(kept: Path) -> None:
    first, *others = kept.read_text().splitlines()
    line = json.loads(first)
    older = json.dumps(line | {"digest": "1" * 16})  # neither is of today's code
    line["digest"] = "0" * 16
    line["summary"]["seconds"] = 99.0
    kept.write_text("\n".join([older, *others, json.dumps(line), ""]))
    assert result_in("fresh", kept).rows[0].runs[0].seconds == 99.0
    Path("begun/cells").joinpath("0" * 16).mkdir(parents=True)
    asked = cells_of(read_study(Path("study.yaml")), "")
    [cell, *others] = unpack(read_kept(kept), asked, Path("begun"))
    assert cell.computed_as is None
    assert all(other.computed_as for other in others)


def test_what_is_kept_is_shown_where_the_tasks_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = STUDY.replace("{source: sinusoid,", "{source: 'folder:../gone',").replace("0.1]", "1]")
    left = "maml+gradient-sharing, inner_lr 1, seed 1"
    write_study(Path("runs/study"), text, [left])
    Path("study.yaml").write_text(text)
    assert study("--keep", "kept.jsonl", "--no-train") == 0
    assert study("--keep", "kept.jsonl", "--no-train", "--out", "fresh", "--json") == 0
    assert json.loads(capfd.readouterr().out.partition("\n{")[2].join(["{", ""]))["missing"] == [
        left
    ]
    assert study("--keep", "kept.jsonl", "--out", "fresh") == 2
    assert "there is no such folder" in capfd.readouterr().err
    assert study("--keep", "none.jsonl", "--no-train", "--out", "new", "--json") == 2
    assert "no run is finished, so there is nothing to show" in capfd.readouterr().err
    assert not Path("none.jsonl").exists()


MEND = "take it from a backup, or remove the line, and the run is computed anew"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda line: line[:-9], "Expecting"),
        (lambda line: "", "Expecting value: line 1 column 1 (char 0)"),
        (lambda line: line.replace('"label"', '"lable"'), "label: field required"),
        (lambda line: line.replace('"digest":"', '"digest":"../'), "digest: string should match"),
        (lambda line: line.replace('"maml"', "7"), "config.preset."),
        (lambda line: line.replace('"seconds":6.0', '"seconds":"6"'), "summary.seconds: input "),
        (lambda line: line.replace('"per_task"', '"by_task"'), "summary.per_task: field required"),
        (lambda line: line.replace('"iteration":20,', ""), "metrics.1.iteration: field required"),
    ],
)
def test_a_damaged_line_is_named(kept: Path, damage: Callable[[str], str], said: str) -> None:
    lines = kept.read_text().splitlines()
    lines[2] = damage(lines[2])
    kept.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError) as error:
        read_kept(kept)
    text = str(error.value)
    assert text.startswith(f"{kept}, line 3, is not what a run writes ({said}")
    assert text.endswith(f"): {MEND}")
