"""The loggers of a run, asked one after the other, of which none can end it.

start → log, …  →  finish  →  close        without finish where a run was stopped or failed
"""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from metaplug.contract.logger import Ending, LoggedRun, LoggedStep, Logger, LoggerUse
from metaplug.errors import RankError, RequestError, RunError, said_by
from metaplug.experiments.loggers.jsonl import Jsonl

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def make_loggers(uses: Sequence[LoggerUse]) -> list[Logger]:
    """Make the loggers of a configuration, but for the one that is always on.

    One that fails as it is imported or made is left out, with a warning.

    Raises:
        RequestError: there is no such logger, a setting is wrong, or its library is not installed.
        RunError: what is installed is no logger, or needs a module that is missing.
    """
    found = list[Logger]()
    for use in uses:
        try:
            made = use.make()
        except RequestError:
            raise
        except RunError as error:
            if error.__cause__ is None or isinstance(error.__cause__, ImportError):
                raise
            warnings.warn(f"{error}; training goes on without it", stacklevel=2)
        except Exception as error:
            warnings.warn(_given_up(use.logger, "could not be made", error), stacklevel=2)
        else:
            found += [] if isinstance(made, Jsonl) else [made]
    return found


class RunLoggers:
    """The loggers of one run; a context that closes them.

    They start with the first figures, so a run that is refused before leaves nothing of them.

    Args:
        loggers: to ask.
        run: that they log.
        past: gives the iterations that the run has done before this process.
    """

    def __init__(
        self, loggers: Sequence[Logger], run: LoggedRun, past: Callable[[], Sequence[LoggedStep]]
    ) -> None:
        self._asked, self._run, self._past = [*loggers], run, past
        self._has: dict[Logger, int] = {}
        self._begun = self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not self._begun or not isinstance(error, Exception | None):
            return  # whoever presses Ctrl-C twice waits for no library
        left: Ending = "finished" if self._finished else "stopped" if error is None else "failed"
        self._each("could not be closed", lambda logger: logger.close(left))

    def log(self, step: LoggedStep, *, durable: bool) -> None:
        """Log an iteration wherever it is not logged yet."""
        self._begin()

        def log(logger: Logger) -> None:
            if step.iteration > self._has[logger]:
                logger.log(step, durable=durable)

        self._each(f"could not log iteration {step.iteration}", log)

    def finish(self, summary: Mapping[str, Any], curves: Path) -> None:
        """Log the end; `curves` may be missing."""
        self._begin()
        self._finished, picture = True, curves if curves.is_file() else None
        self._each("could not log the end", lambda logger: logger.finish(summary, picture))

    def _begin(self) -> None:
        """Start every logger once, and fill it up to where the run is."""

        def start(logger: Logger) -> None:
            has = logger.start(self._run)
            self._has[logger] = done = self._run.iteration if has is None else has
            if done < self._run.iteration:
                for step in self._past()[done : self._run.iteration]:
                    logger.log(step, durable=False)

        if not self._begun:
            self._begun = True
            self._each("could not start", start)

    def _each(self, what: str, ask: Callable[[Logger], None]) -> None:
        """Ask every logger, and none again that fails."""
        for logger in [*self._asked]:
            try:
                with _process_as_it_was():
                    ask(logger)
            except RankError:  # a signal's handler raised it here, and it is meant for the run
                raise
            except Exception as error:
                self._asked.remove(logger)
                warnings.warn(_given_up(logger.name, what, error), stacklevel=2)


def _given_up(name: str, what: str, error: Exception) -> str:
    return f"the logger '{name}' {what} ({said_by(error)}): training goes on without it"


@contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Undo what a library does to how the process ends: handlers of signals, and hooks of exit."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS if is_main}
    hooks = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = hooks
        for number, handler in before.items():
            if signal.getsignal(number) is not handler and handler is not None:
                signal.signal(number, handler)
