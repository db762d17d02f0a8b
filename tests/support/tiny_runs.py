"""A run of a tenth of a second, what two equal runs share, and a forked process to end one in."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from metaplug import checkpoint
from metaplug.experiments.configuration import ExperimentConfig

TINY: dict[str, Any] = {
    "plugins": ["gradient-sharing"],
    "model": {"name": "mlp", "settings": {"hidden": [4]}},
    "tasks": {"source": "sinusoid", "shots": 3, "queries": 3},
    "learner": {"inner_lr": 0.01, "inner_steps": 1},
    "training": {
        "iterations": 12,
        "tasks_per_batch": 2,
        "validate_every": 4,
        "validation_tasks": 4,
        "test_tasks": 6,
    },
    "runtime": {"threads": 1, "device": "cpu"},
}


def tiny(**changes: Any) -> ExperimentConfig:
    """The tiny experiment with fields changed, written as section__field."""
    values = json.loads(json.dumps(TINY))
    for path, value in changes.items():
        section, _, field = path.partition("__")
        if field:
            values.setdefault(section, {})[field] = value
        else:
            values[section] = value
    return ExperimentConfig.model_validate(values)


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, tensors too; the seconds that were spent apart."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "clock"}:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path) -> None:
    """All of a finished run: weights, optimizer, plugins, best validation, metrics and summary."""
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for name in ("last.safetensors", "best.safetensors"):
        assert_same(checkpoint.read(one / name), checkpoint.read(other / name))
    assert_same(
        json.loads((one / "summary.json").read_text()),
        json.loads((other / "summary.json").read_text()),
    )
    assert sorted(path.name for path in one.iterdir()) == sorted(
        path.name for path in other.iterdir()
    )


def stop_after(iterations: int) -> Callable[[], bool]:
    """Asked after every iteration, True at that one."""
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= iterations


def in_child(action: Callable[[], object], words: Path | None = None) -> int:
    """Run in a forked process, whose id this returns and whose words go to the file `words`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if words is not None:
            os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        action()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # whatever happens, this process must not go on as the test's


def exit_status(pid: int) -> int:
    """Of a child that is waited for; minus the signal's number where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> NoReturn:
    """As the out-of-memory killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")
