"""A run that is killed, without power or room, asked to stop, or begun twice goes on bit for bit.

Random moments are drawn from a seed, and a failure names its moment; one that is a count of
Python's calls comes at the same place again.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from support.power import LOSSES, Disk, Tree, lay_out
from support.tiny_runs import assert_same, assert_same_run, die, exit_status, in_child, tiny

from metaplug import MetaLearner, RequestError, RunError, checkpoint
from metaplug.cli.main import main
from metaplug.experiments.configuration import to_yaml
from metaplug.experiments.runs import train
from metaplug.experiments.runs.folder import RunFolder

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

CONFIG = tiny(plugins=["gradient-sharing", "gradient-noise"], training__validate_every=3)
"""With a plugin that keeps statistics, and one that draws random numbers."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(CONFIG, folder) is not None
    return folder


# Killed


@pytest.fixture(scope="module")
def life(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, int]:
    """The seconds and the Python calls of a whole run."""
    folder, calls = tmp_path_factory.mktemp("life"), count()
    begun = time.monotonic()
    assert exit_status(in_child(lambda: train(CONFIG, folder / "timed"))) == 0
    seconds = time.monotonic() - begun
    sys.setprofile(lambda *_: next(calls) and None)
    try:
        train(CONFIG, folder / "counted")
    finally:
        sys.setprofile(None)
    return seconds, next(calls)


def die_at_call(number: int, words: Path) -> None:
    """From now on, this process is killed at its `number`-th call or return, having said where."""
    calls = count()

    def called(frame: Any, event: str, _: object) -> None:
        if next(calls) == number:
            sys.setprofile(None)
            words.write_text(
                f"{event} in {frame.f_code.co_filename}:{frame.f_lineno} "
                f"({frame.f_code.co_qualname})"
            )
            die()

    sys.setprofile(called)


def state_of(folder: Path) -> str:
    """What a killed run has left, in words."""
    files = sorted(path.name for path in folder.iterdir()) if folder.exists() else "no folder"
    lines = (
        (folder / "metrics.jsonl").read_text().count("\n")
        if (folder / "metrics.jsonl").exists()
        else 0
    )
    return f"{files}, {lines} lines of metrics"


@pytest.mark.parametrize(
    "kills", [pytest.param(12, id="12"), pytest.param(100, id="100", marks=pytest.mark.slow)]
)
def test_killed_at_a_random_moment_a_run_goes_on_bit_for_bit(
    whole: Path, life: tuple[float, int], tmp_path: Path, kills: int
) -> None:
    chance, (seconds, calls), killed = random.Random(kills), life, 0
    for index in range(kills):
        folder, words = tmp_path / f"{index}", tmp_path / f"{index}.txt"
        if index % 2:
            number = chance.randrange(calls)

            def action(number: int = number, folder: Path = folder, words: Path = words) -> None:
                die_at_call(number, words)
                train(CONFIG, folder)

            status = exit_status(in_child(action))
            place = (
                f"call {number} of {calls}: "
                f"{words.read_text() if words.exists() else 'not reached'}"
            )
        else:
            delay = chance.uniform(0.0, 1.1 * seconds)
            pid = in_child(lambda folder=folder: train(CONFIG, folder))
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            status, place = exit_status(pid), f"after {delay:.4f} of {seconds:.4f} seconds"
        assert status in (0, -signal.SIGKILL), place
        killed += status != 0
        place = f"kill {index}, {place}; it left {state_of(folder)}"
        try:
            assert train(CONFIG, folder, resume=True) is not None
            assert_same_run(whole, folder)
        except Exception as error:
            raise AssertionError(place) from error
        shutil.rmtree(folder)
    assert killed >= kills // 2


@pytest.mark.parametrize(
    ("fetched", "expected"), [(1, [2, 3, 5, 6, 8, 9, 11, 12]), (3, [3, 6, 9, 12])]
)
def test_checkpoints_between_validations_change_no_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: int, expected: list[int]
) -> None:
    """A checkpoint holds the weights of the newest iteration: others wait for the end of theirs."""
    saved, save = list[int](), RunFolder.save

    def noted(self: RunFolder, name: str, state: dict[str, Any]) -> None:
        saved.extend([state["iteration"]] * (name == "last.safetensors"))
        save(self, name, state)

    monkeypatch.setattr(RunFolder, "save", noted)
    runtime = CONFIG.runtime.model_copy(update={"save_every": 2, "metrics_every": fetched})
    assert train(CONFIG.model_copy(update={"runtime": runtime}), tmp_path / "run") is not None
    assert saved == expected
    one, other = (checkpoint.read(each / "last.safetensors") for each in (whole, tmp_path / "run"))
    assert_same(one["model"], other["model"])


def test_killed_time_and_again_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = tiny(training__iterations=80, training__validate_every=5)
    train(config, tmp_path / "whole")
    chance, folder, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(40):
        pid = in_child(lambda: train(config, folder, resume=True))
        time.sleep(chance.uniform(0.0, 0.2))
        os.kill(pid, signal.SIGKILL)
        status = exit_status(pid)
        if status != -signal.SIGKILL:
            assert status == 0
            break
        kills += 1
    train(config, folder, resume=True)
    assert kills >= 3
    assert_same_run(tmp_path / "whole", folder)


def kill_at_replacement(number: int) -> None:
    """From now on, this process is killed just before its `number`-th file takes its place."""
    original, done = Path.replace, count(1)

    def replace(self: Path, target: Path) -> Path:
        if next(done) == number:
            die()
        return original(self, target)

    Path.replace = replace  # type: ignore[method-assign]


def test_killed_at_every_file_that_it_writes_a_run_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path
) -> None:
    for number in count(1):
        folder = tmp_path / f"{number}"

        def killed(number: int = number, folder: Path = folder) -> None:
            kill_at_replacement(number)
            train(CONFIG, folder)

        status = exit_status(in_child(killed))
        assert status in (0, -signal.SIGKILL)
        assert train(CONFIG, folder, resume=True) is not None
        assert_same_run(whole, folder)
        if status == 0:
            break
    assert (
        number > 7
    )  # configuration, metrics, the last checkpoint four times, the best at least once, summary


# Without power


def recorded(root: Path, *, deaf: tuple[str, ...] = ()) -> Disk:
    """A disk on which a run was made, or went on, to its end."""
    disk = Disk(root, deaf=deaf)
    with disk.watching():
        summary = train(
            CONFIG,
            root / "runs" / "tiny",
            resume=True,
            on_record=lambda record: (
                disk.promise(record.step.iteration) if record.validation is not None else None
            ),
        )
        assert summary is not None
        disk.promise(CONFIG.training.iterations + 1)
    return disk


def states(disk: Disk) -> list[tuple[str, Tree, int]]:
    """Every state that a power failure may leave, once, with what must not be lost in it."""
    found: dict[tuple[tuple[str, bytes | None], ...], tuple[str, Tree, int]] = {}
    for index, moment in enumerate(disk.moments):
        for seed, (names, data) in enumerate(LOSSES):
            tree = moment.tree(names, data, seed)
            place = f"after operation {index}, {moment.operation}: names {names}, data {data}"
            found[tuple(sorted(tree.items()))] = (place, tree, moment.done)
    return list(found.values())


def goes_on(whole: Path, tree: Tree, root: Path, promised: int) -> None:
    """Resume the run that a power failure has left, and hold it against one that was left alone."""
    lay_out(tree, root)
    folder, begun = root / "runs" / "tiny", list[int]()
    finished = (folder / "summary.json").exists()
    train(
        CONFIG,
        folder,
        resume=True,
        on_start=lambda experiment: begun.append(experiment.learner.iteration),
    )
    kept = CONFIG.training.iterations + 1 if finished else begun[0]
    assert kept >= promised, f"{promised} iterations were safe, but it went on after {kept}"
    assert_same_run(whole, folder)


def faults(whole: Path, chosen: list[tuple[str, Tree, int]], tmp_path: Path) -> list[str]:
    """The states from which a run does not go on as it should."""
    found = []
    for index, (place, tree, promised) in enumerate(chosen):
        try:
            goes_on(whole, tree, tmp_path / f"{index}", promised)
        except Exception as error:
            found.append(f"{place}: {error}")
        shutil.rmtree(tmp_path / f"{index}")
    return found


def test_without_power_at_a_random_moment_a_run_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    found = states(recorded(tmp_path / "disk"))
    assert len(found) > 100
    assert faults(whole, random.Random(0).sample(found, 20), tmp_path) == []


@pytest.mark.slow
def test_without_power_after_any_operation_a_run_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    assert faults(whole, states(recorded(tmp_path / "disk")), tmp_path) == []


def test_without_power_while_it_goes_on_after_a_failure_it_goes_on_again(
    whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    chance, first = random.Random(1), states(recorded(tmp_path / "disk"))
    second = []
    for index, (_, tree, promised) in enumerate(chance.sample(first, 5)):
        lay_out(tree, tmp_path / f"first-{index}")
        disk = Disk(tmp_path / f"first-{index}")
        disk.done = promised
        with disk.watching():
            train(CONFIG, tmp_path / f"first-{index}" / "runs" / "tiny", resume=True)
        second += chance.sample(states(disk), min(3, len(disk.moments)))
    assert faults(whole, second, tmp_path) == []


@pytest.mark.parametrize(
    ("deaf", "part"),
    [
        ("metrics.jsonl", "lacks lines"),
        (".last.safetensors.*.tmp", "is not a whole metaplug checkpoint"),
        (".config.yaml.*.tmp", ""),
        ("tiny", "iterations were safe, but it went on after"),
    ],
)
def test_a_missing_fsync_is_found(whole: Path, tmp_path: Path, deaf: str, part: str) -> None:
    (tmp_path / "disk").mkdir()
    found = [
        state
        for state in states(recorded(tmp_path / "disk", deaf=(deaf,)))
        if "names kept, data lost" in state[0] or "lost, data" in state[0]
    ]
    assert any(part in fault for state in found for fault in faults(whole, [state], tmp_path))


# Without room


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by the command, in this process, so forks import nothing; with tiny.yaml."""
    out = tmp_path_factory.mktemp("commanded")
    (out / "tiny.yaml").write_text(to_yaml(CONFIG))
    with pytest.raises(SystemExit) as status:
        main(["train", str(out / "tiny.yaml"), "--out", str(out)])
    assert status.value.code == 0
    return out / "tiny"


def command(
    config: Path, out: Path, *options: str, prepare: Callable[[], None] = lambda: None
) -> int:
    """`metaplug train` in a process of its own, in which `prepare` was called before; its id."""

    def action() -> None:
        prepare()
        main(["train", str(config), "--out", str(out), *options])

    return in_child(action, words_of(out))


def words_of(out: Path) -> Path:
    """Where a command says what it says: outside of the disk that it writes."""
    return out.with_suffix(".txt")


def ended(pid: int, words: Path) -> tuple[int, list[str]]:
    """The exit status of a command, and the lines that it said of an unusual end."""
    status = exit_status(pid)
    lines = [
        line
        for line in words.read_text().splitlines()
        if line.startswith(("metaplug:", "stopping", "Traceback"))
    ]
    words.unlink()
    return status, lines


def when_opened(pattern: str, number: int, action: Callable[[], None]) -> None:
    """Do something just before this process opens such a file for the `number`-th time."""
    times, busy = count(1), list[bool]()

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event == "open"
            and not busy
            and isinstance(arguments[0], str)
            and fnmatch(Path(arguments[0]).name, pattern)
        ):
            busy.append(True)
            if next(times) == number:
                action()
            busy.clear()

    sys.addaudithook(heard)


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A disk of 512 KiB, room for two pictures, as one is replaced; where one can be mounted."""
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only who may mount a small disk can fill it")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def fill(disk: Path, spared: int) -> None:
    """Write until the disk is full but for so many pages of 4 KiB."""
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 4096 * spared)


@pytest.mark.parametrize(
    ("where", "spared", "kept"),
    [
        ((".config.yaml.*", 1), 0, None),
        pytest.param((".run.json.*", 1), 0, None, marks=pytest.mark.slow),
        (("metrics.jsonl", 1), 0, None),
        pytest.param((".best.safetensors.*", 1), 1, None, marks=pytest.mark.slow),
        pytest.param((".last.safetensors.*", 1), 1, None, marks=pytest.mark.slow),
        ((".last.safetensors.*", 3), 1, 6),
        ((".summary.json.*", 1), 0, 12),
        ((".curves.png.*", 1), 1, 12),
    ],
)
def test_on_a_full_disk_a_run_stops_in_one_line_and_goes_on_with_room(
    commanded: Path, tmp_path: Path, where: tuple[str, int], spared: int, kept: int | None
) -> None:
    disk, config = tmp_path / "disk", commanded.parent / "tiny.yaml"
    folder, name = disk / "tiny", where[0].removesuffix(".*").removeprefix(".")
    with mounted(disk):
        status, lines = ended(
            command(config, disk, prepare=lambda: when_opened(*where, lambda: fill(disk, spared))),
            words_of(disk),
        )
        drawn = name == "curves.png"  # a picture is no reason to lose the test
        assert (status, len(lines)) == (0 if drawn else 1, 1), lines
        said = (
            f"metaplug: {'warning: ' if drawn else ''}cannot write {folder / name}: No "
            f"space left on device; "
        )
        assert lines[0].startswith(said), lines
        assert not list(folder.glob(".*.tmp"))
        assert (
            MetaLearner.load(folder / "last.safetensors").iteration
            if (folder / "last.safetensors").exists()
            else None
        ) == kept
        (disk / "ballast").unlink()
        assert ended(command(config, disk, "--resume"), words_of(disk)) == (0, [])
        assert_same_run(commanded, folder)


@pytest.mark.parametrize("most", [400, 4000])
def test_a_file_that_may_not_grow_stops_a_run_in_one_line(
    commanded: Path, tmp_path: Path, most: int
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    status, lines = ended(
        command(commanded.parent / "tiny.yaml", tmp_path, prepare=limit), words_of(tmp_path)
    )
    assert (status, len(lines)) == (1, 1), lines
    assert (
        lines[0].startswith(f"metaplug: cannot write {tmp_path}/tiny/")
        and ": File too large; " in lines[0]
    ), lines
    assert not list((tmp_path / "tiny").glob(".*.tmp"))
    assert ended(
        command(commanded.parent / "tiny.yaml", tmp_path, "--resume"), words_of(tmp_path)
    ) == (0, [])
    assert_same_run(commanded, tmp_path / "tiny")


def write_protect(folder: Path) -> None:
    """Even for root."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def at_iteration(number: int, action: Callable[[], object]) -> Callable[[Any], None]:
    """To give as on_record."""
    return lambda record: action() and None if record.step.iteration == number else None


def test_a_folder_that_becomes_read_only_stops_a_run_in_one_line(
    whole: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk):
        folder = disk / "tiny"
        with pytest.raises(RunError) as error:
            train(CONFIG, folder, on_record=at_iteration(5, lambda: write_protect(disk)))
        try:
            said = "make room, or bring back what is gone, then go on with --resume"
            assert (
                str(error.value)
                == f"cannot write {folder}/metrics.jsonl: Read-only file system; {said}"
            )
            assert MetaLearner.load(folder / "last.safetensors").iteration == 3
            with pytest.raises(RunError) as error:
                train(CONFIG, folder, resume=True)
            assert (
                str(error.value)
                == f"cannot write into the run folder {folder}: Read-only file system; give "
                f"another --out"
            )
            with pytest.raises(RunError) as error:
                train(CONFIG, disk / "other")
            assert (
                str(error.value)
                == f"cannot make the run folder {disk}/other: Read-only file system; give "
                f"another --out"
            )
        finally:
            subprocess.run(["umount", disk], check=True)
        assert train(CONFIG, folder, resume=True) is not None
        assert_same_run(whole, folder)


@pytest.mark.parametrize("iteration", [1, 5, 12])
def test_a_folder_that_vanishes_stops_a_run_and_is_not_made_anew(
    whole: Path, tmp_path: Path, iteration: int
) -> None:
    folder, elsewhere = tmp_path / "out" / "tiny", tmp_path / "elsewhere"
    with pytest.raises(
        RunError, match=f"{folder}/.*[Nn]o such file or directory|there is no checkpoint {folder}"
    ) as error:
        train(CONFIG, folder, on_record=at_iteration(iteration, lambda: folder.rename(elsewhere)))
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []
    elsewhere.rename(folder)
    assert train(CONFIG, folder, resume=True) is not None
    assert_same_run(whole, folder)


def test_a_disk_that_vanishes_stops_a_run_and_nothing_is_written_below_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk), pytest.raises(RunError) as error:
        train(
            CONFIG,
            disk,
            on_record=at_iteration(
                5, lambda: subprocess.run(["umount", "--lazy", disk], check=True)
            ),
        )
    said = "make room, or bring back what is gone, then go on with --resume"
    assert (
        str(error.value) == f"cannot write {disk}/metrics.jsonl: No such file or directory; {said}"
    )
    assert list(disk.iterdir()) == []


# Asked to stop


def when_called(target: str, number: int, *signals: int) -> Callable[[], None]:
    """Send this process these signals before it calls something for the `number`-th time."""

    def prepare() -> None:
        module, _, name = target.rpartition(".")
        holder, original, times = resolve_name(module), resolve_name(target), count(1)

        def called(*arguments: Any, **named: Any) -> Any:
            if next(times) == number:
                for one in signals:
                    signal.raise_signal(one)
            return original(*arguments, **named)

        setattr(holder, name, called)

    return prepare


SETUP, STEP = (
    ("metaplug.experiments.runs.training.build", 1),
    ("metaplug.execution.engine.Engine.meta_step", 5),
)
VALIDATION, TEST = (
    ("metaplug.evaluation.evaluator.Evaluator.evaluate", 2),
    ("metaplug.evaluation.evaluator.Evaluator.evaluate", 5),
)
STOPPING, TWICE = "stopping after this step", "metaplug: stopped"
ASKED = f"{STOPPING}; Ctrl-C again stops at once"


@pytest.mark.parametrize(
    ("where", "one", "kept"),
    [
        (SETUP, signal.SIGINT, 1),
        (STEP, signal.SIGINT, 5),
        (STEP, signal.SIGTERM, 5),
        (STEP, signal.SIGHUP, 5),
        pytest.param(VALIDATION, signal.SIGINT, 6, marks=pytest.mark.slow),
        (VALIDATION, signal.SIGTERM, 6),
    ],
)
def test_asked_to_stop_a_run_saves_after_the_step(
    commanded: Path, tmp_path: Path, where: tuple[str, int], one: int, kept: int
) -> None:
    config, folder = commanded.parent / "tiny.yaml", tmp_path / "tiny"
    status, lines = ended(
        command(config, tmp_path, prepare=when_called(*where, one)), words_of(tmp_path)
    )
    assert status == 128 + one
    last = (
        f"metaplug: stopped, with a checkpoint in {folder}: the same command with --resume goes on"
    )
    assert lines == (
        [] if one == signal.SIGHUP else [ASKED if one == signal.SIGINT else STOPPING, last]
    )  # nobody sees what is said after a terminal was closed
    assert MetaLearner.load(folder / "last.safetensors").iteration == kept
    assert ended(command(config, tmp_path, "--resume"), words_of(tmp_path)) == (0, [])
    assert_same_run(commanded, folder)


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (SETUP, None),
        (STEP, 3),
        (VALIDATION, 3),
        (("os.fsync", 14), 3),
        (("safetensors.torch.save", 4), 3),
        (TEST, 12),
    ],
)
def test_asked_twice_a_run_stops_at_once_with_its_last_checkpoint(
    commanded: Path, tmp_path: Path, where: tuple[str, int], kept: int | None
) -> None:
    config, folder = commanded.parent / "tiny.yaml", tmp_path / "tiny"
    stop = when_called(*where, signal.SIGINT, signal.SIGINT)
    assert ended(command(config, tmp_path, prepare=stop), words_of(tmp_path)) == (
        130,
        [ASKED, TWICE],
    )
    assert (
        MetaLearner.load(folder / "last.safetensors").iteration if folder.exists() else None
    ) == kept
    assert not list(folder.glob(".*.tmp"))
    assert ended(command(config, tmp_path, "--resume"), words_of(tmp_path)) == (0, [])
    assert_same_run(commanded, folder)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["evaluate", "{run}"], ("metaplug.experiments.runs.loading.build", 1)),
        (["evaluate", "{run}"], ("metaplug.learner.MetaLearner.evaluate", 1)),
        (
            ["compare", "--variant", "maml", "--variant", "fomaml", "--out", "{new}"],
            ("metaplug.experiments.study.running.build", 2),
        ),
    ],
)
def test_ctrl_c_stops_evaluate_and_compare_at_once(
    commanded: Path, tmp_path: Path, arguments: list[str], where: tuple[str, int]
) -> None:
    before = {path.name: path.read_bytes() for path in commanded.iterdir()}
    words = [one.format(run=commanded, new=tmp_path / "new") for one in arguments]
    if words[0] == "compare":
        words += [
            "--tasks",
            "sinusoid",
            "--model",
            "mlp",
            "--inner-lr",
            "0.01",
            "--iterations",
            "12",
            "--seeds",
            "2",
        ]

    def action() -> None:
        when_called(*where, signal.SIGINT)()
        main(words)

    assert ended(in_child(action, words_of(tmp_path)), words_of(tmp_path)) == (130, [TWICE])
    assert {path.name: path.read_bytes() for path in commanded.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


# Begun twice


def holding(folder: Path, tmp_path: Path) -> int:
    """A process that trains in the folder and waits after iteration 5 for a file `go`."""

    def wait() -> None:
        (tmp_path / "waits").touch()
        while not (tmp_path / "go").exists():
            time.sleep(0.01)

    pid = in_child(lambda: train(CONFIG, folder, resume=True, on_record=at_iteration(5, wait)))
    while not (tmp_path / "waits").exists():
        time.sleep(0.01)
    (tmp_path / "waits").unlink()
    return pid


def test_a_second_process_is_refused_while_the_first_lives(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    pid = holding(folder, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RequestError) as error:
        train(CONFIG, folder, resume=True)
    assert str(error.value) == (
        f"the run folder {folder} is in the hands of another process ({pid} on "
        f"{socket.gethostname()}): wait for it, or give another --name"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "go").touch()
    assert exit_status(pid) == 0
    assert_same_run(whole, folder)


def test_a_killed_process_leaves_no_lock(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    for _ in range(3):
        pid = holding(folder, tmp_path)
        os.kill(pid, signal.SIGKILL)
        assert exit_status(pid) == -signal.SIGKILL
    assert train(CONFIG, folder, resume=True) is not None
    assert_same_run(whole, folder)


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_of_two_that_begin_at_the_same_moment_one_is_refused(
    commanded: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    config = commanded.parent / "tiny.yaml"
    for index in range(3):
        outs, go = tmp_path / f"{index}", time.monotonic() + 0.2
        outs.mkdir()

        def at_once(go: float = go) -> None:
            while time.monotonic() < go:
                pass

        pids = [command(config, outs, *options, prepare=at_once) for _ in range(2)]
        assert sorted(exit_status(pid) for pid in pids) in (
            [0, 2],
            [0, 0] if options else [0, 2],
        ), words_of(outs).read_text()
        said = [
            line
            for line in words_of(outs).read_text().splitlines()
            if line.startswith("metaplug: ")
        ]
        assert all(f"the run folder {outs}/tiny " in line for line in said), said
        words_of(outs).unlink()
        assert_same_run(commanded, outs / "tiny")


# Processes of their own


@pytest.mark.slow
def test_killed_and_stopped_from_outside_the_command_goes_on_bit_for_bit(
    commanded: Path, tmp_path: Path
) -> None:
    line = [
        sys.executable,
        "-m",
        "metaplug",
        "train",
        str(commanded.parent / "tiny.yaml"),
        "--out",
        str(tmp_path),
    ]
    begun = time.monotonic()
    subprocess.run([*line, "--name", "whole"], check=True, capture_output=True)
    seconds, chance = time.monotonic() - begun, random.Random(2)
    for index, one in enumerate(
        [signal.SIGKILL] * 5 + [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] * 3
    ):
        own = [*line, "--name", f"{index}", "--resume"]
        process = subprocess.Popen(own, stderr=subprocess.PIPE, text=True)
        delay = chance.uniform(0.3, 1.0) * seconds
        time.sleep(delay)
        process.send_signal(one)
        _, said = process.communicate()
        place = (
            f"signal {one} after {delay:.3f} of {seconds:.3f} seconds: exit status "
            f"{process.returncode}, {said}"
        )
        assert process.returncode in (0, -one, 128 + one), place
        assert "Traceback" not in said, place
        subprocess.run(own, check=True, capture_output=True)
        assert_same_run(tmp_path / "whole", tmp_path / f"{index}")
