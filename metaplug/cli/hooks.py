"""metaplug hooks."""

from __future__ import annotations

from typing import Annotated

import typer

from metaplug.cli.options import Json, examples
from metaplug.errors import unknown
from metaplug.report.console import RESULTS, emit, line


@examples(
    "metaplug hooks",
    "metaplug hooks initialize_parameters transform_parameters",
    "metaplug hooks --json",
)
def hooks(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="HOOK", help="Hooks to show in full.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the hooks that a plugin may implement; or show some: their arguments, when they are
    called, and which installed plugins implement them."""
    from metaplug.experiments.json_values import to_json
    from metaplug.report.hooks import hook_entries, hook_page, hook_table

    found = hook_entries()
    by_name = {entry.name: entry for entry in found}
    for name in names or ():
        if name not in by_name:
            raise unknown("hook", name, by_name)
    chosen = [by_name[name] for name in dict.fromkeys(names)] if names else found
    if as_json:
        emit(to_json([entry.values() for entry in chosen], indent=2))
    elif not names:
        RESULTS.print(hook_table(chosen))
        line("metaplug hooks HOOK shows one with its arguments and the plugins that implement it")
    else:
        RESULTS.print(*map(hook_page, chosen), sep="\n")
