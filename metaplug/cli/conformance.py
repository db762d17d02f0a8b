"""metaplug test-plugin."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaplug.cli.options import Json, examples
from metaplug.cli.resolving import parse_setting
from metaplug.errors import RequestError, RunError
from metaplug.report.console import CONSOLE, RESULTS, emit, line

if TYPE_CHECKING:
    from rich.console import Console

    from metaplug.testing.clauses import Subject
    from metaplug.testing.suite import Verdict

_STYLES = {"passed": "green", "broken": "red", "left out": None, "not tried": "dim"}


@examples(
    "metaplug test-plugin ./my_idea.py",
    "metaplug test-plugin ./my_idea.py --settings strength=0.3 --off strength=0 --models mlp",
    'metaplug test-plugin my-idea --except "task-permutation=its noise follows a task\'s place"',
)
def test_plugin(
    plugin: Annotated[
        str,
        typer.Argument(metavar="FILE.py|NAME", help="The file of a plugin, or an installed one."),
    ],
    *,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE", help="A setting at which it does something. Repeatable."
        ),
    ] = None,
    off: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="A setting at which it does nothing. Repeatable."),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="A small model of metaplug.testing that it fits. Repeatable.",
            show_default="mlp, batch-norm, conv4",
        ),
    ] = None,
    left_out: Annotated[
        list[str] | None,
        typer.Option(
            "--except",
            metavar="CLAUSE=REASON",
            help="A clause that does not hold of it, and why. Repeatable.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLAUSE",
            help="A clause to try, and no other. Repeatable.",
            show_default="every clause",
        ),
    ] = None,
    examples_each: Annotated[
        int,
        typer.Option("--examples", min=1, max=1000, help="Examples that a clause is tried on."),
    ] = 5,
    as_json: Json = False,
) -> None:
    """Hold a plugin to the contract, clause by clause, as the conformance suite does.

    It stops at the first broken clause, from which others may follow, with exit status 1.
    """
    try:
        from metaplug.testing.clauses import DEFAULT_MODELS, Subject
        from metaplug.testing.suite import CLAUSES, verdicts
    except ModuleNotFoundError as error:
        if error.name not in ("pytest", "hypothesis"):
            raise
        raise RequestError(str(error)) from None
    from metaplug.experiments.json_values import to_json

    subject = Subject(
        plugin,
        _settings("--settings", settings),
        None if off is None else _settings("--off", off),
        tuple(models or DEFAULT_MODELS),
        examples_each,
    )
    _check_settings(subject)
    exceptions = dict(_exception(text) for text in left_out or ())
    console = CONSOLE if as_json else RESULTS
    begun, found = time.monotonic(), list[Any]()
    for verdict in verdicts(subject, exceptions, only or ()):
        found.append(verdict)
        _show(verdict, console)
    seconds = time.monotonic() - begun
    broken = next((verdict for verdict in found if verdict.outcome == "broken"), None)
    if as_json:
        values = {
            "plugin": subject.name,
            # Of a plugin that was asked for some clauses alone, nobody knows.
            "conforms": None if only and broken is None else broken is None,
            "seconds": round(seconds, 3),
            "clauses": [
                {
                    "clause": each.clause,
                    "outcome": each.outcome,
                    "text": each.text,
                    "statement": CLAUSES[each.clause].statement,
                    "page": CLAUSES[each.clause].link,
                }
                for each in found
            ],
        }
        emit(to_json(values, indent=2))
    passed = sum(verdict.outcome == "passed" for verdict in found)
    if broken is not None:
        raise RunError(
            f"plugin '{subject.name}' breaks {broken.clause}, so the clauses after it were not "
            f"tried: correct that first ({CLAUSES[broken.clause].link})"
        )
    apart = len(found) - passed
    also = f", {apart} left out" if apart else ""
    counts = f"{passed} clause{'s' * (passed != 1)} passed{also}, {seconds:.0f} seconds"
    if only:
        counts = f"{len(found)} of {len(CLAUSES)} clauses were asked: {counts}"
        line(f"plugin '{subject.name}' breaks none of these; {counts}", console=console)
    else:
        line(f"plugin '{subject.name}' keeps the contract: {counts}", console=console)


def _show(verdict: Verdict, console: Console) -> None:
    text = verdict.text.removeprefix("not tried: ")
    if verdict.outcome == "broken":  # the plugin and the clause stand in the line already
        text = text.partition(f" breaks {verdict.clause}: ")[2].replace("\n", "; ")
    said = ": ".join(filter(None, (verdict.clause, text)))
    line(f"{verdict.outcome:9}  {said}", style=_STYLES[verdict.outcome], console=console)


def _settings(option: str, texts: Sequence[str] | None) -> dict[str, Any]:
    return dict(parse_setting(text, option) for text in texts or ())


def _exception(text: str) -> tuple[str, str]:
    clause, equals, why = text.partition("=")
    if not equals:
        raise RequestError(
            f"--except {text}: a clause is left out for a reason: write --except CLAUSE=REASON"
        )
    return clause, why


def _check_settings(subject: Subject) -> None:
    """Refuse a wrong name or setting now; what else fails in it is for a clause to say.

    Raises:
        RequestError: there is no such plugin, or a setting is unknown or out of bounds.
    """
    for given in (subject.settings, *(() if subject.off is None else (subject.off,))):
        try:
            subject.make(given)
        except (RequestError, RunError):
            raise
        except Exception:
            continue
