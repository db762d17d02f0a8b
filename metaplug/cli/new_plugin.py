"""new-plugin."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from metaplug.report.console import line

Kind = Literal["gradient", "inner-loss", "outer-loss", "learning-rate", "tasks", "model", "preset"]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("new-plugin", epilog=_EXAMPLES)(new_plugin)


_EXAMPLES = """**Examples**

- metaplug new-plugin my-idea

- metaplug new-plugin my-lines --kind tasks --out ~/code/my-lines"""


def new_plugin(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="What it will be called, in kebab-case.", show_default=False
        ),
    ],
    kind: Annotated[Kind, typer.Option("--kind", help="What it is.")] = "gradient",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Where it is written; default: NAME, here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a package with a plugin of your own, its tests, README and CI: it installs, passes and can be published as it is.

    The small idea in it works; change it into yours.
    """
    from metaplug.templates import SCAFFOLDS, write_package

    folder = Path(name) if out is None else out
    written = write_package(name, kind, folder)
    line(f"{folder} has a {SCAFFOLDS[kind].words}, as a package:")
    for path in written:
        line(f"- {path}")
    line("next:")
    for command in (
        f"cd {shlex.quote(str(folder))} && pip install -e '.[test]'",
        "pytest",
        f"{SCAFFOLDS[kind].listed} {name}",
    ):
        line(f"- {command}")
