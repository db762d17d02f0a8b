"""A search: ranges, determinism, pruning, and that a kill at any moment changes nothing."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import die, exit_status, in_child, stop_after, tiny

from metaplug import RequestError, RunError
from metaplug.contract import registry
from metaplug.experiments.configuration import from_yaml
from metaplug.experiments.runs import read_metrics, train
from metaplug.experiments.runs.training import EndedError
from metaplug.experiments.tuning import Asked, Outcome, proposals, search, tune
from metaplug.experiments.tuning.ranges import Choices, Numbers, read_range
from metaplug.experiments.tuning.space import changed
from metaplug.experiments.tuning.trials import Watch
from metaplug.tasks.toys.functions import FunctionStream

CONFIG = tiny(training__iterations=8)
TRIALS = 5


def asked(**ranges: Any) -> list[Asked]:
    """Fields to search, written as section__field."""
    return [Asked("--search", path.replace("__", "."), text) for path, text in ranges.items()]


SEARCH = [
    *asked(learner__inner_lr="log:0.001..0.1", learner__inner_steps="1..3"),
    Asked("--search", "plugins.gradient-sharing.gate", "0..1"),
    Asked("--search", "model.settings.hidden", [[4], [8, 4]]),
]


def run(folder: Path, trials: int = TRIALS, **options: Any) -> Outcome | None:
    return tune(CONFIG, SEARCH, folder, trials=trials, **options)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Fewer trials before one is pruned; and what is installed is looked up once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        patch.setattr(proposals, "COMPLETE_BEFORE_PRUNING", 2)
        yield


@pytest.fixture(scope="module")
def drawn() -> list[str]:
    """The splits of which tasks were drawn in the search `whole`."""
    return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, drawn: list[str]) -> Path:
    """The folder of a search that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "mine"
    batch = FunctionStream.batch

    def spy(self: Any, *arguments: Any) -> Any:
        drawn.append(self.split)
        return batch(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FunctionStream, "batch", spy)
        assert run(folder) is not None
    return folder


def assert_same_search(one: Path, other: Path) -> None:
    for name in ("tuning.json", "best.yaml", "tuning.yaml"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for trial in sorted((one / "trials").iterdir()):
        metrics = (other / "trials" / trial.name / "metrics.jsonl").read_bytes()
        assert (trial / "metrics.jsonl").read_bytes() == metrics, trial.name


# Ranges


FLOAT, INT, TEXT = frozenset({float}), frozenset({int}), frozenset({str})


@pytest.mark.parametrize(
    ("text", "kinds", "found"),
    [
        ("0..1", FLOAT, Numbers(0.0, 1.0)),
        ("0..1", None, Numbers(0, 1, whole=True)),
        ("0.0..1", None, Numbers(0.0, 1.0)),
        ("log:1e-4 .. .5", FLOAT, Numbers(1e-4, 0.5, log=True)),
        ("1..5", INT, Numbers(1, 5, whole=True)),
        ("-2..-1", FLOAT, Numbers(-2.0, -1.0)),
        (["sgd", "adam"], TEXT, Choices(("sgd", "adam"))),
        ([1, True, 1.5, None], None, Choices((1, True, 1.5, None))),
    ],
)
def test_a_range_is_read(text: Any, kinds: frozenset[type] | None, found: Any) -> None:
    made = read_range(text, kinds, "f")
    assert made == found
    assert [type(end) for end in made.ends] == [type(end) for end in found.ends]


@pytest.mark.parametrize(
    ("text", "kinds", "message"),
    [
        (
            "0.1",
            FLOAT,
            "it is no range of values: write LOW..HIGH, log:LOW..HIGH, or a list as [sgd, adam]",
        ),
        (
            0.1,
            FLOAT,
            "it is no range of values: write LOW..HIGH, log:LOW..HIGH, or a list as [sgd, adam]",
        ),
        ("1..0", FLOAT, "1.0 is not below 0.0: write the lower end first"),
        ("1..1", INT, "1 is not below 1: write the lower end first"),
        ("log:0..1", FLOAT, "0.0 has no logarithm: begin above 0, or leave out log:"),
        ("1..2.5", INT, "the field takes whole numbers, and 2.5 is none: write 1..5"),
        ("0..1", TEXT, "the field takes no number: list its values, as [a, b]"),
        ("-1e308..1e308", FLOAT, "the range has no end: give two finite numbers"),
        ("0..1e999", FLOAT, "the range has no end: give two finite numbers"),
        (["sgd"], TEXT, "there is nothing to choose: list two values or more"),
        (["1", 1], None, "'1' stands twice: leave one out"),
    ],
)
def test_what_is_no_range_is_refused(text: Any, kinds: frozenset[type], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_range(text, kinds, "f")
    assert str(refused.value) == f"f: {message}"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "learner.inner_lr",
            "1..2000",
            "learner.inner_lr = 2000.0: input should be less than or equal to 1000",
        ),
        (
            "learner.meta_lr",
            "0..1",
            "learner.meta_lr = 0.0: input should be greater than 0",
        ),
        (
            "learner.inner_lrr",
            "0..1",
            "unknown field 'learner.inner_lrr': did you mean 'inner_lr'?",
        ),
        (
            "training",
            "0..1",
            "training is a section, not a field: search one of training.iterations, "
            "training.tasks_per_batch, training.validate_every, …",
        ),
        (
            "learner.inner_optimizer",
            ["sgd", "adamm"],
            "with adamm, unknown inner optimizer 'adamm': did you mean 'adam'?",
        ),
        (
            "plugins.gradient-sharing.gate",
            "0..2",
            "with 2.0, plugin 'gradient-sharing': gate = 2.0: input should be less than or equal "
            "to 1",
        ),
        (
            "plugins.gradient-sharing.gat",
            "0..2",
            "unknown field 'plugins.gradient-sharing.gat': did you mean 'gate'?",
        ),
        (
            "plugins.gradient-noise.scale",
            "0..1",
            "'plugins.gradient-noise.scale' is no setting of a listed plugin (did you mean "
            "'gradient-sharing'?): write plugins.NAME.field, or add it by --with",
        ),
        (
            "seed",
            "0..9",
            "the best of several seeds is luck: search a field of the learner instead",
        ),
        (
            "tasks.shots",
            "1..5",
            "values on other tasks cannot be compared: search a field of the learner instead",
        ),
        (
            "training.iterations",
            "1..5",
            "trials of other lengths cannot be compared: leave it out",
        ),
        (
            "preset.derivative-order.order",
            "0..2",
            "preset.derivative-order: the preset maml has no plugin 'derivative-order' (known: "
            "none): name one that it has, or add another by --with",
        ),
        ("learner.inner_steps", "1..9", "learner.inner_steps is searched already: leave one out"),
    ],
)
def test_a_field_that_cannot_be_searched_is_refused(
    path: str, value: Any, message: str, tmp_path: Path
) -> None:
    first = asked(learner__inner_steps="1..3")
    one = Asked("--search", path, value)
    with pytest.raises(RequestError) as refused:
        tune(CONFIG, [*first, one], tmp_path / "mine", trials=2)
    assert str(refused.value) == f"{one}: {message}"
    assert not (tmp_path / "mine").exists()


def test_nothing_to_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^there is no field to search: give one, as --search "):
        tune(CONFIG, [], tmp_path, trials=2)


def analytic(value: Callable[[Any], float], iterations: int = 4) -> Any:
    """In the place of training: the value approaches that of the configuration."""

    def run_trial(watch: Watch, config: Any, *_: Any, **__: Any) -> tuple[str, None]:
        try:
            for iteration in range(1, iterations + 1):
                mean = value(config) + (iterations - iteration)
                watch.see(iteration, {"mean": mean, "interval": 0.1})
        except EndedError:
            return "pruned", None
        return "complete", None

    return run_trial


def test_a_search_comes_near_the_optimum_of_a_known_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from math import log10

    def value(config: Any) -> float:
        learner = config.learner
        far = abs(log10(learner.inner_lr) + 2) + abs(learner.inner_steps - 7)
        return far + (learner.inner_optimizer != "adam")

    monkeypatch.setattr(search, "run_trial", analytic(value))
    fields = asked(
        learner__inner_lr="log:0.00001..10",
        learner__inner_steps="1..20",
        learner__inner_optimizer=["sgd", "adam", "rmsprop"],
    )
    outcome = tune(CONFIG, fields, tmp_path / "mine", trials=40)
    assert outcome is not None and outcome.best is not None
    assert outcome.best.mean is not None and outcome.best.mean < 0.7  # of 5 by hand, at random 1.5
    assert outcome.best.values["learner.inner_optimizer"] == "adam"
    assert outcome.count("pruned") > 5 and outcome.count("failed") == 0
    drawn = [trial.values["learner.inner_lr"] for trial in outcome.trials]
    assert all(1e-5 <= value <= 10 for value in drawn)
    assert sum(value < 1e-2 for value in drawn[:10]) in range(3, 8)  # even in the logarithm
    assert {type(trial.values["learner.inner_steps"]) for trial in outcome.trials} == {int}
    assert set(outcome.importance) == set(outcome.search)
    assert sum(outcome.importance.values()) == pytest.approx(1)


# Trials


@pytest.mark.filterwarnings("ignore:adaptation raises the support loss")  # as 8 iterations may
def test_trials_are_runs_without_a_test_whose_best_is_a_configuration(
    whole: Path, drawn: list[str]
) -> None:
    values = json.loads((whole / "tuning.json").read_text())
    assert set(drawn) == {"train", "val"}
    assert [trial["number"] for trial in values["trials"]] == [*range(TRIALS)]
    best = values["best"]
    assert best["mean"] == min(
        trial["mean"] for trial in values["trials"] if trial["state"] == "complete"
    )
    config = from_yaml((whole / "best.yaml").read_text(), "best.yaml")
    assert config == changed(CONFIG, best["values"])
    summary = train(config, whole.parent / "best")
    assert summary is not None and summary["best_validation"]["mean"] == best["mean"]
    assert summary["best_validation"]["iteration"] == best["iteration"]
    assert not list(whole.rglob("summary.json"))


def test_a_pruned_trial_ends_early(whole: Path) -> None:
    values = json.loads((whole / "tuning.json").read_text())
    pruned = [trial for trial in values["trials"] if trial["state"] == "pruned"]
    assert pruned and pruned[0]["number"] >= 2
    for trial in pruned:
        assert trial["iterations"] < CONFIG.training.iterations
        lines = read_metrics(whole / "trials" / f"{trial['number']:04d}")
        assert len(lines) == trial["iterations"]


def test_a_stopped_search_goes_on_as_if_it_were_left_alone(whole: Path, tmp_path: Path) -> None:
    folder, sessions = tmp_path / "mine", 0
    assert run(folder, trials=1) is not None
    while run(folder, stop=stop_after(11)) is None:
        sessions += 1
    assert sessions > 1
    assert_same_search(whole, folder)
    assert run(folder, on_record=lambda *_: pytest.fail("a trial too many")) is not None
    assert_same_search(whole, folder)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_search_goes_on_as_if_it_were_left_alone(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    values = json.loads((whole / "tuning.json").read_text())["trials"]
    pruned = next(trial["number"] for trial in values if trial["state"] == "pruned")
    assert pruned > 2

    def at(number: int, iteration: int) -> Callable[..., None]:
        def on_record(found: int, record: Any) -> None:
            if (found, record.step.iteration) == (number, iteration):
                die()

        return on_record

    def after(number: int) -> Callable[[Outcome], None]:
        return lambda outcome: die() if len(outcome.trials) == number + 1 else None

    moments: list[dict[str, Any]] = [
        {"on_record": at(0, 2)},  # before the first checkpoint
        {"on_record": at(1, 4)},  # a validation is on the disk, and not reported
        {"on_record": at(2, 8)},  # the run has ended, and the trial has not
        {"on_record": at(pruned, 4)},  # at the validation that prunes it
        {"on_trial": after(pruned)},
    ]
    for moment in moments:
        assert exit_status(in_child(lambda moment=moment: run(folder, **moment))) == -9
    with (folder / "trials.log").open("a") as log:
        log.write('{"op_code": 4, "wor')  # as without power
    (folder / "trials.log.lock").touch()  # as Optuna leaves it
    assert run(folder) is not None
    assert_same_search(whole, folder)


def test_a_trial_that_was_begun_elsewhere_keeps_its_values(tmp_path: Path) -> None:
    # As on another machine, where the sampler's digits may differ.
    config, folder = tiny(preset="fomaml"), tmp_path / "mine"
    values = {"learner.inner_lr": 0.05, "preset.derivative-order.switch": 5}
    fields = [
        *asked(learner__inner_lr="log:0.001..0.1"),
        Asked("--search", "preset.derivative-order.switch", "1..9"),
    ]
    assert tune(config, fields, folder, trials=1, stop=stop_after(4)) is None
    begun = folder / "trials" / "0000"
    for file in begun.iterdir():
        file.unlink()
    assert train(changed(config, values), begun, stop=stop_after(5)) is None
    outcome = tune(config, fields, folder, trials=1)
    assert outcome is not None and outcome.trials[0].values == values
    wrong = Asked("--search", "plugins.derivative-order.switch", "1..9")
    with pytest.raises(RequestError) as refused:
        tune(config, [wrong], tmp_path / "other", trials=1)
    assert str(refused.value) == (
        f"{wrong}: 'derivative-order' is a plugin of the preset fomaml, and none after it: search "
        "preset.derivative-order.switch"
    )


@pytest.mark.parametrize(
    ("path", "given", "kept"),
    [
        ("learner.inner_lr", ["1e-3", "1.5e-2"], (0.001, 0.015)),
        ("learner.inner_lr", ["0.01", 0, 1e-3], (0.01, 0.0, 0.001)),
        ("learner.inner_steps", [1.0, "2"], (1, 2)),
        ("plugins.gradient-sharing.gate", ["1e-1", 1], (0.1, 1)),
    ],
)
def test_a_stopped_search_over_a_list_goes_on(
    path: str, given: list[Any], kept: tuple[Any, ...], tmp_path: Path
) -> None:
    """Whatever the text of a value, by that which the configuration stores."""
    fields, folder = [Asked("--search", path, given)], tmp_path / "mine"
    assert tune(CONFIG, fields, folder, trials=2, stop=stop_after(11)) is None
    outcome = tune(CONFIG, fields, folder, trials=2)
    assert outcome is not None
    assert {repr(trial.values[path]) for trial in outcome.trials} <= {*map(repr, kept)}
    assert list(outcome.search.values()) == [str(Choices(kept))]


def test_two_texts_of_one_value_are_refused(tmp_path: Path) -> None:
    one = Asked("--search", "learner.inner_lr", ["1e-2", 0.01])
    with pytest.raises(RequestError) as refused:
        tune(CONFIG, [one], tmp_path / "mine", trials=2)
    assert str(refused.value) == f"{one}: '0.01' stands twice: leave one out"


# What fails


def test_a_trial_that_diverges_counts_as_failed(tmp_path: Path) -> None:
    wild = tiny(learner__inner_steps=8)
    outcome = tune(wild, asked(learner__inner_lr=[0.01, 1000]), tmp_path / "mine", trials=3)
    assert outcome is not None and outcome.best is not None
    assert outcome.best.values["learner.inner_lr"] == 0.01
    failed = [trial for trial in outcome.trials if trial.state == "failed"]
    assert [trial.values["learner.inner_lr"] for trial in failed] == [1000] * len(failed) != []
    assert all("NaN or Inf" in str(trial.error) for trial in failed)


def test_values_that_do_not_go_together_fail_a_trial_and_not_the_search(tmp_path: Path) -> None:
    fields = asked(
        learner__inner_optimizer=["sgd", "adam"],
        learner__inner_optimizer_settings=[{}, {"momentum": 0.5}],
    )
    outcome = tune(CONFIG, fields, tmp_path / "mine", trials=5)
    assert outcome is not None
    for trial in outcome.trials:
        optimizer, settings = trial.values.values()
        assert (trial.state == "failed") == (optimizer == "adam" and bool(settings))
        assert (trial.error is None) == (trial.state != "failed")
    assert outcome.count("failed") in (1, 2, 3)


def test_when_every_trial_fails_the_first_fault_is_said(tmp_path: Path) -> None:
    wild = tiny(learner__inner_steps=8)
    fields = asked(learner__inner_lr="900..1000")
    with pytest.raises(RunError) as failed:
        tune(wild, fields, tmp_path / "mine", trials=2)
    text = str(failed.value)
    assert text.startswith(
        f"no trial of 2 in {tmp_path / 'mine'} was completed; trial 0 failed: iteration 1 stopped"
    )
    assert text.endswith("; search other ranges, under another --name")
    assert not (tmp_path / "mine" / "best.yaml").exists()


def test_a_full_disk_ends_the_search_and_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fsync, rooms = tmp_path / "mine", os.fsync, [True]

    def write(descriptor: int) -> None:
        if not rooms[-1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", write)
    with pytest.raises(RunError, match="No space left on device; "):
        run(folder, on_trial=lambda outcome: rooms.append(False))
    rooms.append(True)
    outcome = run(folder, trials=2)
    assert outcome is not None and len(outcome.trials) == outcome.count("complete") == 2


def test_a_folder_of_another_search_is_refused(whole: Path, tmp_path: Path) -> None:
    def refused(config: Any, fields: list[Asked], folder: Path = whole) -> str:
        with pytest.raises(RequestError) as error:
            tune(config, fields, folder, trials=2)
        return str(error.value)

    instead = f"go on with it as it was begun ({whole / 'tuning.yaml'}), or give another --name"
    assert refused(CONFIG, [*SEARCH[:1], *asked(learner__inner_steps="1..4"), *SEARCH[2:]]) == (
        f"{whole} was begun with search.learner.inner_steps = '1..3', which cannot become '1..4': "
        f"{instead}"
    )
    assert refused(CONFIG, SEARCH[:-1]) == (
        f"{whole} was begun with search.model.settings.hidden = '[[4], [8, 4]]', which cannot "
        f"become not set: {instead}"
    )
    assert refused(CONFIG.model_copy(update={"seed": 1}), SEARCH) == (
        f"{whole} was begun with seed = 0, which cannot become 1: {instead}"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert refused(CONFIG, SEARCH, tmp_path / "run") == (
        f"{tmp_path / 'run'} holds no search to go on with: give another --name"
    )
    assert refused(CONFIG, SEARCH, tmp_path / "run" / "config.yaml") == (
        f"{tmp_path / 'run' / 'config.yaml'} is a file, not a folder for a search: give another "
        "--name"
    )


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"

    def second(*_: Any) -> None:
        with pytest.raises(RequestError) as refused:
            run(folder)
        assert str(refused.value) == (
            f"another process searches in {folder}: wait for it, or give another --name"
        )

    assert run(folder, trials=1, on_trial=second) is not None


def test_a_damaged_journal_is_one_line(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "tuning.yaml").write_bytes((whole / "tuning.yaml").read_bytes())
    (folder / "trials.log").write_text("never a journal\nnor this\n")
    with pytest.raises(RunError) as damaged:
        run(folder)
    assert str(damaged.value).startswith(f"{folder / 'trials.log'} is not what a search writes (")
    assert str(damaged.value).endswith("): bring it back, or give another --name")


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RequestError) as refused:
        run(tmp_path / "mine")
    assert str(refused.value) == "a search needs optuna: pip install 'metaplug[tune]'"
