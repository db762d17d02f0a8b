"""Signals that end a command in good order, with everything that it has done kept. Imports no torch: `--help` must be quick."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from metaplug.report.console import line

_GRACE = 20
"""Seconds that ranks have to stop in order after a SIGTERM; torchrun kills them after 30."""


class StoppedError(Exception):
    """A signal ended a command in good order; the text says how to go on."""

    status: int
    """The exit status: 128 and the signal's number, as shells have it."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.status = 128 + (number or signal.SIGINT)  # 0: another rank was told


class Stop:
    """Asked whether to stop; True once a signal came, which `signal` then is."""

    def __init__(self, last: Callable[..., object] | None) -> None:
        self.signal = 0
        self._last = last

    def __call__(self) -> bool:
        return bool(self.signal)

    def ask(self, number: int, _: object) -> None:
        """Take the first signal as a wish to stop in order; Ctrl-C behind it stops at once, while schedulers may repeat themselves."""
        if number == getattr(signal, "SIGHUP", None):
            nowhere = os.open(
                os.devnull, os.O_WRONLY
            )  # the terminal is gone, and writing to it would fail
            os.dup2(nowhere, sys.stdout.fileno())
            os.dup2(nowhere, sys.stderr.fileno())
            os.close(nowhere)
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal = number
            line(
                "stopping after this step; Ctrl-C again stops at once"
                if number == signal.SIGINT
                else "stopping after this step"
            )
            if number == signal.SIGTERM and self._last is not None and hasattr(signal, "SIGALRM"):
                signal.signal(signal.SIGALRM, self._last)
                signal.alarm(_GRACE)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, Ctrl-C, SIGTERM (a scheduler's word) and SIGHUP (a closed terminal) ask to stop after the current step.

    A signal that was ignored, as SIGHUP is by nohup, stays so. Of several ranks, what had SIGTERM before, as it may mean that another rank
    is gone, has it again where there is no stopping in order.
    """
    numbers = [
        signal.SIGINT,
        *(
            number
            for name in ("SIGTERM", "SIGHUP")
            if (number := getattr(signal, name, None)) is not None
        ),
    ]
    before = {number: signal.getsignal(number) for number in numbers}
    last = before.get(signal.SIGTERM)
    stop = Stop(last if callable(last) else None)
    previous = {
        number: signal.signal(number, stop.ask)
        for number in numbers
        if before[number] is not signal.SIG_IGN
    }
    try:
        yield stop
    finally:
        if stop.signal == signal.SIGTERM and callable(last) and hasattr(signal, "SIGALRM"):
            signal.alarm(0)
        for number, handler in previous.items():
            signal.signal(number, handler)
