"""metaplug report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaplug.cli.options import examples
from metaplug.errors import RequestError
from metaplug.report.console import result


@examples(
    "metaplug report runs/study",
    "metaplug report runs/maml-0 runs/maml-1 runs/shared-0 runs/shared-1 --out compared.html",
)
def report(
    *,
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_STUDY...",
            help="The folder of a study, or of one or more runs; the first is the baseline.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Where to.", show_default="report.html in the first"
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page about a study or runs: curves, tables, how to repeat it.

    It needs no network and no script, fits wide and narrow screens, dark and light, and prints.
    """
    file = folders[0] / "report.html" if out is None else out
    if file.is_dir() or (out is not None and not file.parent.is_dir()):
        fault = f"lies in a folder {file.parent} that does not exist"
        raise RequestError(
            f"--out {file}: it {'is a folder' if file.is_dir() else fault}; give a file in a "
            "folder that exists"
        )
    from metaplug.report.page.writing import write_page

    write_page(folders, file)
    result(f"the report is {file}")
