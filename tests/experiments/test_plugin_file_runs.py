"""A run with a plugin's file records it, keeps a copy, and runs it again only where it is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.tiny_runs import tiny

from metaplug import MetaLearner, RequestError, checkpoint
from metaplug.cli.main import main
from metaplug.contract import plugin_files
from metaplug.experiments.runs import load, train

SOURCE = """
from pathlib import Path

from metaplug import hookimpl

Path("ran").touch()


@hookimpl
def transform_gradients(gradients):
    return {name: each * 0.5 for name, each in gradients.items()}
"""
CHANGED = SOURCE.replace("0.5", "0.25")


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit status of a command, and what it printed: standard error, then standard output."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capfd.readouterr()
    return int(stopped.value.code or 0), err + out


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin-file")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("my_idea.py").write_text(SOURCE)
        config = tiny(plugins=["./my_idea.py"], training__iterations=4)
        train(config, Path("runs/mine"))
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder with the run, where nothing ran yet."""
    shutil.copytree(begun, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    Path("ran").unlink()
    return tmp_path / "copy"


def digests(folder: Path) -> tuple[str, str]:
    """Of the file then, in words, and now."""
    then = plugin_files.source_of(str(folder / "runs/mine/my_idea.py"))[1]
    return then[:12], plugin_files.source_of(str(folder / "my_idea.py"))[1][:12]


def test_the_record_has_path_and_digest_and_a_copy(begun: Path) -> None:
    mine = begun / "runs/mine"
    digest = plugin_files.source_of(str(begun / "my_idea.py"))[1]
    use = {"plugin": "./my_idea.py", "name": None, "settings": {}, "sha256": digest}
    assert yaml.safe_load((mine / "config.yaml").read_text())["plugins"] == [use]
    state = checkpoint.read(mine / "best.safetensors")
    assert yaml.safe_load(state["config"])["plugins"] == [use]
    (session,) = json.loads((mine / "run.json").read_text())["sessions"]
    origin = {"path": str((begun / "my_idea.py").resolve()), "sha256": digest}
    assert session["plugin_files"] == {"my-idea": origin}
    assert (mine / "my_idea.py").read_text() == SOURCE


def test_evaluation_runs_it_only_where_it_is_named(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(capfd, "evaluate", "runs/mine") == (
        2,
        "metaplug: runs/mine/best.safetensors names code for its plugin, './my_idea.py', which "
        "nobody lets run because a file says so: if it is your own, give --with ./my_idea.py\n",
    )
    assert not Path("ran").exists()
    status, said = run(capfd, "evaluate", "runs/mine", "--with", "./my_idea.py")
    then, _ = digests(folder)
    assert (status, said.splitlines()[0]) == (
        0,
        f"the plugin 'my-idea' is the file {folder / 'my_idea.py'} (sha256 {then}…)",
    )
    assert Path("ran").exists()
    assert run(capfd, "evaluate", "runs/mine", "--with", "runs/mine/my_idea.py")[0] == 0
    assert load(Path("runs/mine"), plugins=["my_idea.py"]).learner.iteration == 4


def test_a_changed_file_is_said_and_the_copy_goes_on(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("my_idea.py").write_text(CHANGED)
    then, now = digests(folder)
    assert run(capfd, "evaluate", "runs/mine", "--with", "my_idea.py") == (
        2,
        "metaplug: the plugin file my_idea.py has changed since runs/mine/best.safetensors was "
        f"trained with it (sha256 {then}… then, {now}… now): bring it back as it was, give --with "
        "runs/mine/my_idea.py, the copy of it then, or take it as it is for a new run\n",
    )
    config = tiny(plugins=["./my_idea.py"], training__iterations=4)
    with pytest.raises(RequestError) as error:
        train(config, Path("runs/mine"), resume=True)
    assert str(error.value) == (
        "runs/mine was begun with the plugin file of 'my-idea' as it was then, and it has changed "
        f"(sha256 {then}… then, {now}… now): bring it back (from runs/mine, which keeps a copy), "
        "or give another --name"
    )
    assert not Path("ran").exists()
    copy = tiny(plugins=["runs/mine/my_idea.py"], training__iterations=4)
    assert train(copy, Path("runs/mine"), resume=True) is not None


def test_repeating_asks_for_it_too(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "train", "--from", "runs/mine") == (
        2,
        "metaplug: runs/mine/config.yaml names code for its plugin, './my_idea.py', which nobody "
        "lets run because a file says so: if it is your own, give --with ./my_idea.py\n",
    )
    assert run(capfd, "train", "--from", "runs/mine", "--with", "my_idea.py:gate=1") == (
        2,
        "metaplug: --from runs/mine: the run has the settings of my_idea.py: leave them out, and "
        "give --with my_idea.py alone to let it run\n",
    )
    assert not Path("ran").exists()
    Path("elsewhere").mkdir()
    Path("my_idea.py").rename("elsewhere/my_idea.py")
    status, said = run(capfd, "train", "--from", "runs/mine", "--with", "elsewhere/my_idea.py")
    assert (status, said.splitlines()[-1]) == (
        0,
        "matches runs/mine bit for bit: 4 iterations and the test",
    )


@pytest.fixture
def installed_since(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's plugin, as a package that was installed after the run."""
    metadata = folder / "site/my_idea-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-idea\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[metaplug.plugins]\nmy-idea = my_idea\n")
    monkeypatch.syspath_prepend(folder / "site")
    monkeypatch.setattr(plugin_files, "_LOADED", {})
    monkeypatch.setattr(plugin_files, "_RECORDED", set())


@pytest.mark.usefixtures("installed_since")
def test_a_run_outlives_the_packaging_of_its_file(capfd: pytest.CaptureFixture[str]) -> None:
    taken = (
        "the plugin file ./my_idea.py has the name of the installed plugin 'my-idea' (my-idea "
        "1.0), and no record could tell the two apart: rename the file, or give the name without "
        "a path"
    )
    config = tiny(plugins=["./my_idea.py"], training__iterations=4)
    with pytest.raises(RequestError) as error:
        train(config, Path("runs/new"))
    assert str(error.value) == taken
    assert not Path("ran").exists()
    assert run(capfd, "evaluate", "runs/mine", "--with", "my-idea") == (
        2,
        "metaplug: --with my-idea: it is no path of a plugin file, and only files of "
        "runs/mine/best.safetensors need to be named: give its file, --with ./my_idea.py, or the "
        "copy in the run's folder\n",
    )
    for file in ("./my_idea.py", "runs/mine/my_idea.py"):
        assert run(capfd, "evaluate", "runs/mine", "--with", file)[0] == 0
    status, said = run(capfd, "train", "--from", "runs/mine", "--with", "runs/mine/my_idea.py")
    assert (status, said.splitlines()[-1]) == (
        0,
        "matches runs/mine bit for bit: 4 iterations and the test",
    )


@pytest.mark.usefixtures("installed_since")
def test_a_run_goes_on_after_the_packaging_of_its_file() -> None:
    for left in ("summary.json", "last.safetensors"):
        Path("runs/mine", left).unlink(missing_ok=True)
    config = tiny(plugins=["./my_idea.py"], training__iterations=4)
    assert train(config, Path("runs/mine"), resume=True) is not None


def test_what_is_no_file_of_the_run_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("other.py").write_text(CHANGED)
    given = ["--with", "my_idea.py", "--with", "other.py"]
    assert run(capfd, "evaluate", "runs/mine", *given) == (
        2,
        "metaplug: runs/mine/best.safetensors has no plugin that is the file other.py: leave out "
        "--with other.py\n",
    )
    assert not Path("ran").exists()


@pytest.mark.parametrize("place", ["plugins", "preset", "part"])
def test_no_file_runs_because_a_checkpoint_names_it(folder: Path, place: str) -> None:
    """In the list of plugins, in a preset of one's own, and as the part of a learner's plugin."""
    state = checkpoint.read(Path("runs/mine/best.safetensors"))
    if place == "part":
        state["plugins"][0]["part"] = "./my_idea.py"
        spec = {"name": "mlp", "input_shape": [1], "outputs": 1, "settings": {"hidden": [4]}}
        state["model_spec"] = spec
    elif place == "preset":
        config = yaml.safe_load(state["config"])
        use = {"plugin": "./my_idea.py"}
        config |= {"plugins": [], "preset": {"name": "own", "plugins": [use]}}
        state["config"] = yaml.safe_dump(config)
    forged = Path("forged.safetensors")
    checkpoint.write(forged, state)
    with pytest.raises(RequestError) as error:
        MetaLearner.load(forged) if place == "part" else load(forged)
    how = {
        "part": "forged.safetensors names the plugin file ./my_idea.py, which nobody lets run "
        "because a file says so: give MetaLearner.load(..., plugins=...)"
    }
    assert str(error.value) == how.get(
        place,
        "forged.safetensors names code for its plugin, './my_idea.py', which nobody lets run "
        "because a file says so: if it is your own, give --with ./my_idea.py",
    )
    assert not Path("ran").exists()


def test_variants_of_a_comparison_take_files(folder: Path) -> None:
    from metaplug.cli.compare import _study
    from metaplug.experiments.study.cells import cells_of

    sets = ["model.settings={hidden: [4]}"]
    study = _study(["maml", "maml + ./my_idea.py"], 1, {"model.name": "mlp"}, sets)
    one, other = cells_of(study, "")
    assert (one.variant, other.variant) == ("maml", "maml+./my_idea.py")
    (use,) = other.config.plugins
    assert (use.plugin, use.sha256) == ("./my_idea.py", plugin_files.source_of("my_idea.py")[1])
