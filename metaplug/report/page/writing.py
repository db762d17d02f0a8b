"""The page itself: everything that was found, filled into the template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.resources import files
from itertools import count
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from metaplug.files import replacing
from metaplug.report.page.asked import asked, facts, title_of
from metaplug.report.page.curves import curves
from metaplug.report.page.drawing import draw, draw_key
from metaplug.report.page.early import early_table
from metaplug.report.page.findings import findings
from metaplug.report.page.gather import gather
from metaplug.report.page.inner_steps import by_inner_step
from metaplug.report.page.material import Material
from metaplug.report.page.notes import notes
from metaplug.report.page.over_training import over_training
from metaplug.report.page.panels import Panel
from metaplug.report.page.repeating import repeating
from metaplug.report.page.sensitivity import sensitivity
from metaplug.report.page.tables import tables
from metaplug.report.page.words import unbroken


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of a study or of runs: one file that needs nothing beside itself.

    The same folders give the same bytes.

    Args:
        folders: of one study, or of runs.
        path: the HTML file, which is replaced.

    Raises:
        RequestError, RunError: as `gather` raises; or the file cannot be written.
    """
    text = page(gather(folders))
    with replacing(path) as file:
        file.write(text.encode())


def page(material: Material) -> str:
    """The page as HTML."""
    sections = (
        curves(material),
        over_training(material),
        by_inner_step(material),
        sensitivity(material),
    )
    shown, names = tables(material), count(1)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["unbroken"] = unbroken
    return environment.from_string(_file("page.html.j2")).render(
        css=Markup(_file("page.css")),
        material=material,
        title=title_of(material),
        asked=asked(material),
        findings=findings(material),
        facts=facts(material),
        tables=[*shown, *filter(None, [early_table(material)])],
        notes=notes(material, shown),
        sections=[section for section in sections if section is not None],
        repeating=repeating(material),
        draw=partial(_draw, names),
        draw_key=draw_key,
    )


def _draw(names: Iterator[int], panel: Panel) -> Markup:
    return draw(panel, f"p{next(names)}")


def _file(name: str) -> str:
    return (files("metaplug.report.page") / name).read_text(encoding="utf-8")
