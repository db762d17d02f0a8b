"""Fill in, when the site is built, what the code knows best.

Replaces `<!-- hooks -->`, `<!-- presets -->`, `<!-- plugin NAME -->`, `<!-- meta-step -->` (the
pictures), `<!-- compositions -->` and `<!-- compositions why -->` (which plugins go together), and
`<!-- include PATH -->` (a file of this folder, as it is); with it a line below that begins with
"*On the site", which tells readers of the file where to find the same.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from meta_step import pictures
from torch import nn

from metaplug import MetaLearner, Preset
from metaplug.contract import hookspecs, registry
from metaplug.contract.example_settings import example_settings
from metaplug.experiments.compositions import Compositions, compositions
from metaplug.experiments.configuration import flatten
from metaplug.report.catalogue import entries, plain
from metaplug.report.compositions import MARKS, matrix, why
from metaplug.report.hooks import signature_text

DOCS = Path(__file__).parent


MARK = re.compile(
    r"<!-- (hooks|presets|plugin|meta-step|compositions|include)(?: (\S+))? -->"
    r"(?:\n\*On the site.*)?"
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in one page; MkDocs calls this for each."""
    return MARK.sub(lambda found: _filling(found[1], found[2]), markdown)


def _filling(kind: str, name: str | None) -> str:
    match kind, name:
        case "hooks", None:
            return hook_reference()
        case "presets", None:
            return preset_table()
        case "meta-step", None:
            return pictures()
        case "compositions", None:
            return composition_matrix()
        case "compositions", "why":
            return composition_reasons()
        case "plugin", str():
            return plugin_reference(name)
        case "include", str():
            return included(name)
    raise ValueError(f"nothing is known to fill in for {kind} {name}")


def hook_reference() -> str:
    """Describe every hook by signature, kind and text, in the order of a meta-step."""
    return "\n\n".join(_section(name, kind) for name, kind in hookspecs.KINDS.items())


def plugin_reference(name: str) -> str:
    """Describe a plugin: documentation, a table of settings, and a line of facts."""
    learned = _meta_parameters(name)
    entry = next(entry for entry in entries("plugin") if entry.name == name)
    settings = _table(
        ("setting", "default", "description", "type", "bounds"),
        (
            (
                _code(row.name),
                _code(row.default),
                row.description,
                _code(row.type),
                _whole(row.bounds),
            )
            for row in entry.fields
        ),
    )
    settings = f'<div class="settings" markdown>\n\n{settings}\n\n</div>'
    facts = {
        "hooks": "",
        "conflicts with": "nothing",
        **entry.facts,
        "meta-parameters": ", ".join(map(_code, learned)) or "none",
    }
    facts["hooks"] = re.sub(r"(\w+) \(", r"`\1` (", facts["hooks"])
    line = ". ".join(f"**{fact.capitalize()}**: {text}" for fact, text in facts.items())
    return "\n\n".join(
        [
            *map(_block, entry.documentation.split("\n\n")),
            settings if entry.fields else "No settings.",
            f"{line}.",
        ]
    )


def included(path: str) -> str:
    """Show a file of this folder as a block of code."""
    language = {".py": "python", ".toml": "toml"}[Path(path).suffix]
    return f'```{language} title="{path}"\n{(DOCS / path).read_text(encoding="utf-8")}```'


def preset_table() -> str:
    """List the presets of this distribution."""
    presets = [
        part.value for part in registry.parts("preset") if part.origin.startswith("metaplug ")
    ]
    return _table(
        ("preset", "summary", "plugins", "training defaults", "source"), map(_preset_row, presets)
    )


@cache
def _compositions() -> Compositions:
    return compositions()


def composition_matrix() -> str:
    """Mark every pair of plugins, rows and columns by number."""
    rows = list(matrix(_compositions()))
    table = _table(
        ("", "plugin", *(number for number, *_ in rows)),
        (
            (number, _linked(name), *("" if mark is None else MARKS[mark] for mark in marks))
            for number, name, marks in rows
        ),
    )
    return f'<div class="matrix" markdown>\n\n{table}\n\n</div>'


def composition_reasons() -> str:
    """Say of every pair that does not just compose, why."""
    return _table(
        ("plugin", "beside", "", "reason"),
        (
            (_linked(name), ", ".join(map(_linked, others)), verdict, reason.replace("\n", "<br>"))
            for name, others, verdict, reason in why(_compositions().pairs)
        ),
    )


def _linked(name: str) -> str:
    """Name a plugin, with a link to its page where it has one."""
    page = f"plugins/{name}.md"
    return f"[{name}]({page})" if (DOCS / page).exists() else name


def _preset_row(preset: Preset) -> tuple[str, ...]:
    plugins = [
        _code(use.plugin) + (f" ({_pairs(use.settings)})" if use.settings else "")
        for use in preset.plugins
    ]
    defaults = [_code(f"{path}={plain(value)}") for path, value in flatten(preset.defaults).items()]
    return (
        _code(preset.name),
        preset.summary,
        "<br>".join(plugins) or "none",
        "<br>".join(defaults) or "none",
        preset.source,
    )


def _meta_parameters(name: str) -> list[str]:
    """Set a plugin up, with a model that has batch norm too, and name what it meta-learns."""
    kind = registry.load("plugin", name)
    plugin = kind(**example_settings(kind.Config))
    chain = MetaLearner(
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)), plugins=[plugin]
    ).chain
    return list(dict.fromkeys(parameter.split(".")[1] for parameter in chain.named_parameters()))


def _section(name: str, kind: str) -> str:
    text = inspect.getdoc(getattr(hookspecs, name))
    when = f"*{kind}*, {hookspecs.WHEN[name]}"
    return f"## `{name}`\n\n{when}\n\n```text\n{signature_text(name)}\n```\n\n{text}"


def _block(text: str) -> str:
    """Keep a paragraph of a docstring; make an indented one, equations, a block of text."""
    return f"```text\n{textwrap.dedent(text)}\n```" if text.startswith(" ") else text


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (titles, ("---",) * len(titles), *rows)
    )


def _whole(text: str) -> str:
    """Keep a text on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _pairs(settings: dict[str, Any]) -> str:
    return ", ".join(_code(f"{name}={plain(value)}") for name, value in settings.items())


def _code(text: str) -> str:
    return f"`{text}`"
