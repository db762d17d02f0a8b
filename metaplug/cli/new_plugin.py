"""metaplug new-plugin."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from metaplug.cli.options import examples
from metaplug.errors import RequestError
from metaplug.report.console import result

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
    "logger",
]


@examples(
    "metaplug new-plugin my-idea",
    "metaplug new-plugin my-idea --from ./my_idea.py",
    "metaplug new-plugin my-lines --kind tasks --out ~/code/my-lines",
)
def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name, in kebab-case.")],
    kind: Annotated[Kind | None, typer.Option(help="What it is.", show_default="gradient")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="FILE.py", help="The file of a plugin that becomes the package."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to write it.", show_default="NAME, here"),
    ] = None,
) -> None:
    """Write a package with a plugin of your own, with tests, README and CI, ready to publish.

    It installs and passes its tests as it is. Change the small idea in it into yours, or begin
    with the file of your own plugin, of which it gets a copy.
    """
    from metaplug.templates import SCAFFOLDS, write_package

    of_file = None
    if source is not None:
        from metaplug.report.package_texts import file_plugin

        if kind is not None:
            raise RequestError(
                f"--kind {kind} and --from {source}: the file is the plugin already, of whatever "
                "kind: leave one of them out"
            )
        of_file = file_plugin(source, name)
    kind = kind or "gradient"
    folder, scaffold = Path(name) if out is None else out, SCAFFOLDS[kind]
    written = write_package(name, kind, folder, of_file)
    result(
        f"{folder} has a {scaffold.words}, as a package:"
        if source is None
        else f"{folder} has the plugin of {source}, as a package:"
    )
    for path in written:
        result(f"- {path}")
    result("next:")
    result(f"- cd {shlex.quote(str(folder))} && pip install -e '.[test]'")
    result("- pytest")
    result(f"- {scaffold.listed} {name}")
