"""Signals that end a command after the current step, with everything kept that it has done."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from metaplug.errors import MetaplugError
from metaplug.report.console import line

_GRACE = 20  # seconds that a rank has to stop after a SIGTERM: torchrun kills it after 30

_HANDLED = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class StoppedError(MetaplugError):
    """A signal ended a command after its current step.

    Args:
        text: where it stands.
        number: of the signal; 0 where another rank got it.
        again: how to go on.
    """

    def __init__(self, text: str, number: int, again: str = "with --resume ") -> None:
        super().__init__(f"{text}: the same command {again}goes on")
        self.exit_status = 128 + (number or signal.SIGINT)


class Stop:
    """True when called after a signal came; `signal` is its number, or 0."""

    def __init__(self, last: Callable[..., object] | None) -> None:
        self.signal = 0
        self._last = last

    def __call__(self) -> bool:
        return bool(self.signal)

    def handle(self, number: int, _: object) -> None:
        """Take the first signal as a wish to stop; a later Ctrl-C stops at once.

        Other later signals change nothing, since schedulers repeat theirs.
        """
        if number == getattr(signal, "SIGHUP", None):
            # The terminal is gone, and writing to it would fail.
            with Path(os.devnull).open("w") as nowhere:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(nowhere.fileno(), stream.fileno())
        if self.signal:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = number
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        line(f"stopping after this step{again}")
        if number == signal.SIGTERM and self._last is not None:
            signal.signal(signal.SIGALRM, self._last)
            signal.alarm(_GRACE)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn Ctrl-C, SIGTERM (a scheduler) and SIGHUP (a closed terminal) into a wish to stop.

    A signal that was ignored, as SIGHUP is by nohup, stays ignored. A SIGTERM may mean that another
    rank is gone, for which the step waits in vain: its former handler is called after a while.
    """
    before = {number: signal.getsignal(number) for number in _HANDLED}
    last = before.get(signal.SIGTERM)
    stop = Stop(last if callable(last) and hasattr(signal, "SIGALRM") else None)
    replaced = [number for number in _HANDLED if before[number] is not signal.SIG_IGN]
    for number in replaced:
        signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        if stop.signal == signal.SIGTERM and callable(last) and hasattr(signal, "SIGALRM"):
            signal.alarm(0)
        for number in replaced:
            signal.signal(number, before[number])
