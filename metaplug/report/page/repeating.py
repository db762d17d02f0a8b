"""What it takes to get the same figures again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from metaplug.experiments.configuration import to_yaml
from metaplug.experiments.runs.result import RunResult
from metaplug.experiments.runs.sessions import read_sessions
from metaplug.report.page.chosen import compared, flat
from metaplug.report.page.material import Material

_MOST_COMMANDS, _MOST_CONFIGS = 12, 24


@dataclass(frozen=True)
class Repeating:
    """How to repeat it.

    Attributes:
        commands: that trained the runs, each once, the oldest first.
        more_commands: how many were left out.
        facts: (what, values): versions, devices and so on; several values where runs differ.
        files: (label, YAML): the study, and the configurations of the rows that are compared.
    """

    commands: tuple[str, ...]
    more_commands: int
    facts: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]


def repeating(material: Material) -> Repeating:
    """Collect it from the records of all runs.

    Raises:
        RunError: a record is damaged.
    """
    sessions = [session for run in material.runs for session in read_sessions(run.folder)]
    sessions.sort(key=lambda session: str(session.get("began", "")))
    commands = list(dict.fromkeys(str(each["command"]) for each in sessions if "command" in each))
    finished = [run for run in material.runs if isinstance(run, RunResult)]
    described: Sequence[Any] = [run.summary for run in finished] or sessions
    return Repeating(
        tuple(commands[:_MOST_COMMANDS]),
        max(0, len(commands) - _MOST_COMMANDS),
        tuple((what, text) for what, text in _facts(described, sessions) if text),
        tuple(_files(material)),
    )


def _facts(described: Sequence[Any], sessions: Sequence[Any]) -> list[tuple[str, str]]:
    versions: dict[str, list[str]] = {}
    for each in described:
        for name, version in (each.get("versions") or {}).items():
            versions.setdefault(str(name), []).append(str(version))
    commits = ((each.get("commits") or {}).get("metaplug") or "" for each in sessions)
    batching = [(each.get("batching") or {}).get("choice") for each in described]
    return [
        ("versions", ", ".join(f"{name} {_several(found)}" for name, found in versions.items())),
        ("commit of metaplug", _several(_short(str(each)) for each in commits if each)),
        ("device", _several(each.get("device") for each in described)),
        ("threads", _several(each.get("threads") for each in described)),
        ("precision", _several(each.get("precision") for each in described)),
        ("task batching", _several(batching)),
        ("platform", _several(each.get("platform") for each in sessions)),
    ]


def _short(commit: str) -> str:
    """Twelve digits, and whether files differed from it."""
    return f"{commit[:12]}{'-dirty' * commit.endswith('-dirty')}"


def _several(values: Iterable[Any]) -> str:
    """One value, or all that differ."""
    return " or ".join(dict.fromkeys(str(each) for each in values if each is not None))


def _files(material: Material) -> list[tuple[str, str]]:
    rows = flat(compared(material.result))
    found = [(f"{row.label}, seed {row.seeds[0]}", to_yaml(row.runs[0].config)) for row in rows]
    if not rows:
        found = [(each.label, to_yaml(each.run.config)) for each in material.unfinished]
    study = [("study.yaml", material.study_text)] if material.study_text else []
    return study + found[:_MOST_CONFIGS]
