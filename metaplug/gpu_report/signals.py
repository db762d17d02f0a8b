"""The signals that end a report, with everything kept that it has."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class SignalError(Exception):
    """A signal that ends the report, with its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals_raised() -> Iterator[None]:
    """Raise a SignalError where the first signal arrives; one that was ignored stays so."""

    def handle(number: int, _: object) -> None:
        for each in SIGNALS:  # a second Ctrl-C must not break the last writing
            signal.signal(each, signal.SIG_IGN)
        raise SignalError(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])
