"""metaplug new-plugin."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from metaplug.cli.options import examples
from metaplug.report.console import line

Kind = Literal[
    "gradient",
    "inner-loss",
    "outer-loss",
    "learning-rate",
    "initialisation",
    "task-variables",
    "update-rule",
    "tasks",
    "model",
    "preset",
]


@examples(
    "metaplug new-plugin my-idea",
    "metaplug new-plugin my-lines --kind tasks --out ~/code/my-lines",
)
def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name, in kebab-case.")],
    kind: Annotated[Kind, typer.Option(help="What it is.")] = "gradient",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to write it.", show_default="NAME, here"),
    ] = None,
) -> None:
    """Write a package with a plugin of your own, with tests, README and CI, ready to publish.

    It installs and passes its tests as it is. Change the small idea in it into yours.
    """
    from metaplug.templates import SCAFFOLDS, write_package

    folder, scaffold = Path(name) if out is None else out, SCAFFOLDS[kind]
    written = write_package(name, kind, folder)
    line(f"{folder} has a {scaffold.words}, as a package:")
    for path in written:
        line(f"- {path}")
    line("next:")
    line(f"- cd {shlex.quote(str(folder))} && pip install -e '.[test]'")
    line("- pytest")
    line(f"- {scaffold.listed} {name}")
