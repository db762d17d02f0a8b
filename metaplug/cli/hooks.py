"""metaplug hooks."""

from __future__ import annotations

from typing import Annotated

import typer

from metaplug.cli.options import Json, examples
from metaplug.errors import unknown
from metaplug.report.console import CONSOLE, emit, line


@examples("metaplug hooks", "metaplug hooks transform_gradients", "metaplug hooks --json")
def hooks(
    name: Annotated[str | None, typer.Argument(metavar="HOOK", help="One hook, in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the hooks that a plugin may implement; or show one: its arguments, when it is called,
    and which installed plugins implement it."""
    from metaplug.experiments.json_values import to_json
    from metaplug.report.hooks import hook_entries, hook_page, hook_table

    found = hook_entries()
    chosen = [entry for entry in found if name in (None, entry.name)]
    if not chosen:
        raise unknown("hook", str(name), [entry.name for entry in found])
    if as_json:
        emit(to_json([entry.values() for entry in chosen], indent=2))
    elif name is None:
        CONSOLE.print(hook_table(chosen))
        line("metaplug hooks HOOK shows one with its arguments and the plugins that implement it")
    else:
        CONSOLE.print(*map(hook_page, chosen), sep="\n")
