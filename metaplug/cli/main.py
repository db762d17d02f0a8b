"""The `metaplug` command: every command registered, and every failure shown as one line. Imports no torch: `--help` must be quick."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer

import metaplug
from metaplug.cli import bench, compare, evaluate, listing, new_plugin, ranks, stopping, train
from metaplug.errors import MetaplugError
from metaplug.report.console import line

# typer has come to carry a copy of click, so that the base of its usage errors is found through one that it exports.
_USAGE_ERROR: type[Any] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

INTERRUPTED = 130
"""The exit status after Ctrl-C."""

app = typer.Typer(
    name="metaplug",
    help="Gradient-based meta-learning with plugins: train, evaluate and compare algorithms that are made of parts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    """`--debug` is listed here for `--help`; `main` has taken it out of the line already."""


class _State:
    """Whether `--debug` was given, for errors that reach `main`."""

    debug = False


train.register(app)
evaluate.register(app)
compare.register(app)
listing.register(app)
new_plugin.register(app)
bench.register(app)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 for success, 1 for a failed run, 2 for a wrong request, 128 + N after signal N."""
    line_given = sys.argv[1:] if arguments is None else arguments
    _State.debug = "--debug" in line_given
    _quiet_warnings()
    ranks.silence_others()
    if "" not in sys.path:
        sys.path.append(
            ""
        )  # a model's MODULE:FACTORY may lie in the current folder; at the end, where it shadows nothing
    try:
        status = app(
            args=[word for word in line_given if word != "--debug"],
            prog_name="metaplug",
            standalone_mode=False,
        )
    except _USAGE_ERROR as error:
        _fail(error.format_message(), error.exit_code)
    except MetaplugError as error:
        _fail(str(error), error.exit_status)
    except stopping.StoppedError as stopped:
        _fail(str(stopped), stopped.status)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python complains again when it flushes at exit
        sys.exit(1)
    except Exception as error:
        text = " ".join(str(error).split())
        _fail(
            f"unexpected {type(error).__name__}{': ' if text else ''}{text}; `metaplug --debug ...` shows the traceback",
            1,
        )
    if (
        status == INTERRUPTED
    ):  # typer answers Ctrl-C with this status, or raises: it depends on its version
        _fail("stopped", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(text: str, status: int) -> NoReturn:
    if _State.debug:
        traceback.print_exc()
    if text:  # typer has none where it has shown the help for a command line without a command
        line(f"metaplug: {text}", style="red")
    sys.exit(status)


def _quiet_warnings() -> None:
    """Show a warning as one line, and hide what two source lines of higher make Python say when it first compiles them."""
    warnings.filterwarnings("ignore", category=SyntaxWarning, module="higher")
    warnings.filterwarnings("ignore", r'"is" with|invalid escape', SyntaxWarning)
    warnings.filterwarnings("ignore", "invalid escape", DeprecationWarning)
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """A deprecation concerns whoever wrote the line, such as the author of a plugin, and so names it."""
    where = (
        f" ({filename}, line {lineno})"
        if issubclass(category, DeprecationWarning | FutureWarning)
        else ""
    )
    line(f"metaplug: warning: {message}{where}", style="yellow")
