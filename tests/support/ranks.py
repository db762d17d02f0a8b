"""Several ranks on this machine, for tests: forked from the test, and joined over the loopback."""

import itertools
import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch.distributed import TCPStore

from metaplug import TaskBatch
from metaplug.execution.ranks import joined

LIMIT = 240
"""Seconds after which ranks that have not ended are killed."""

FIELDS = ("support_x", "support_y", "query_x", "query_y")


def shard(batch, world):
    """Return the tasks of a batch that are this rank's."""
    return TaskBatch(*(getattr(batch, field)[world.rank :: world.size] for field in FIELDS))


def on_ranks(action, size=2, timeout=60.0, **environment):
    """Return what `action(world)` returned or raised on each rank; None of one that was killed."""

    def join():
        with joined(timeout) as world:
            return action(world)

    return forked(join, size, **environment)[0]


def forked(action, size=2, **environment):
    """Do the same for processes that have not joined; return also all that they wrote."""
    with tempfile.TemporaryDirectory() as folder:
        files, words = [Path(folder) / f"{rank}.pt" for rank in range(size)], Path(folder) / "words"
        words.touch()
        port = free_port()
        meeting = {"WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        children = [
            _fork(
                action,
                {**meeting, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", **environment},
                file,
                words,
            )
            for rank, file in enumerate(files)
        ]
        _wait(children)
        return [
            torch.load(file, weights_only=False) if file.exists() else None for file in files
        ], words.read_text()


def kept_store():
    """Return a store that outlives ranks, and the environment of ranks that use it."""
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    return store, {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": f"{store.port}"}


_ports = itertools.count()


def free_port():
    """A port that nobody else is given before the ranks listen on it.

    The kernel gives ports from 32768 upwards to whoever asks for any, so those below are free of
    it, and each worker of pytest-xdist tries a hundred of its own in turn.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(100):
        port = 20_000 + 100 * (worker % 100) + next(_ports) % 100
        with socket.socket() as asked:
            try:
                asked.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("each of a hundred ports is taken")


def _fork(action, environment, file, words):
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ |= environment
        sys.stdout = sys.stderr = words.open("a", buffering=1)
        try:
            answer = action()
        except (Exception, SystemExit) as error:
            answer = error.with_traceback(None)
            answer.__cause__ = answer.__context__ = None
        torch.save(answer, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _wait(children):
    deadline, left = time.monotonic() + LIMIT, set(children)
    while left:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, 9)
        time.sleep(0.01)
