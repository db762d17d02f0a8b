"""The application: every command registered, and every failure shown as one line."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import metaplug
from metaplug.cli import bench, ranks
from metaplug.cli.compare import compare
from metaplug.cli.conformance import test_plugin
from metaplug.cli.evaluate import evaluate
from metaplug.cli.export import export
from metaplug.cli.gpu_report import gpu_report
from metaplug.cli.hooks import hooks
from metaplug.cli.listing import explain, plugins, tasks
from metaplug.cli.new_plugin import new_plugin
from metaplug.cli.report import report
from metaplug.cli.study import study
from metaplug.cli.train import train
from metaplug.cli.tune import tune
from metaplug.errors import MetaplugError, one_line, reason
from metaplug.report.console import line, lost_output, warn

INTERRUPTED = 130  # the exit status after Ctrl-C

app = typer.Typer(
    name="metaplug",
    help="Gradient-based meta-learning with plugins: train, evaluate and compare algorithms that "
    "are made of parts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_RUNS = (train, evaluate, compare, study, tune, report, export)
_PARTS = (explain, plugins, tasks, hooks, new_plugin, test_plugin)
for _command in (*_RUNS, *_PARTS):
    app.command(epilog=_command.epilog)(_command)
bench.register(app)
app.command(epilog=gpu_report.epilog)(gpu_report)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"metaplug {metaplug.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """`--debug` is here for `--help` only: `main` takes it out of the line."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    The status is 0 for success, 1 for a failed run, 2 for a wrong request, 128 + N after signal N.
    """
    words = sys.argv[1:] if arguments is None else arguments
    # Two source lines of higher make Python warn when it first compiles them.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module="higher")
    warnings.filterwarnings("ignore", r'"is" with|invalid escape', SyntaxWarning)
    warnings.filterwarnings("ignore", "invalid escape", DeprecationWarning)
    warnings.showwarning = _show_warning
    _show_turns()
    ranks.quiet_other_ranks()
    if "" not in sys.path:
        # A model's MODULE:FACTORY may lie in the current folder; last, where it shadows nothing.
        sys.path.append("")
    try:
        status = app(
            args=[word for word in words if word != "--debug"],
            prog_name="metaplug",
            standalone_mode=False,
        )
        if status == INTERRUPTED:  # some versions of typer return this after Ctrl-C, others raise
            raise KeyboardInterrupt
    except BrokenPipeError as error:  # of typer's own texts
        _close_output(error)
        status = 1
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in words:
            traceback.print_exc()
        text, status = _failure(error)
        if text:  # typer has none after showing the help for a line without a command
            line(f"metaplug: {text}", style="red")
    code = status if isinstance(status, int) else 0
    if (fault := lost_output()) is not None:
        _close_output(fault)
        code = code or 1
    sys.exit(code)


def _close_output(fault: OSError) -> None:
    """Write no more to a standard output that failed; say so, unless its reader has just left."""
    if sys.stdout is not None:  # or Python complains when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(fault, BrokenPipeError):
        text = f"standard output cannot be written ({reason(fault)}), and is not whole"
        line(
            f"metaplug: {text}: send it where there is room; a run that was trained is whole in "
            "its folder",
            style="red",
        )


def _failure(error: BaseException) -> tuple[str, int]:
    """Put an error into one line, with its exit status."""
    # A usage error, whose class is click's, or that of typer's own copy of click.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return error.format_message().replace("Value error, ", ""), error.exit_code
    if isinstance(error, MetaplugError):
        return str(error), error.exit_status
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "stopped", INTERRUPTED
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = max(Path(str(error.filename)).parts, key=len, default="")
        return f"the name {one_line(name, 40)} is too long for the file system: shorten it", 2
    said = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
    return f"unexpected {said}; `metaplug --debug ...` shows the traceback", 1


def _show_turns() -> None:
    """Show as lines what turns the course of a run takes, such as compiled steps."""
    log = logging.getLogger("metaplug.execution")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_Lines())


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        line(record.getMessage())


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Show a warning as one line."""
    # A deprecation concerns whoever wrote the line, such as the author of a plugin: name the line.
    deprecated = issubclass(category, DeprecationWarning | FutureWarning)
    warn(f"{message} ({filename}, line {lineno})" if deprecated else str(message))
