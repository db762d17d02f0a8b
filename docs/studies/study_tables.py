"""The tables of a study's kept runs, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from statistics import fmean

from pictures import apart, groups, stems

from metaplug.experiments.study import Row, StudyResult
from metaplug.experiments.study.cells import row_text, setting_text
from metaplug.experiments.study.keeping import KeptRun
from metaplug.experiments.study.over_fitting import OverFitting, over_fitting
from metaplug.report.best import best_notes, best_sheets
from metaplug.report.comparing import difference_text, losses_text, part_text
from metaplug.report.markdown import bullets, table
from metaplug.report.terminal import value_text

_PROCESSOR = re.compile("x86_64|AMD64|aarch64|arm64|$")


def runs(result: StudyResult, kept: Iterable[KeptRun]) -> str:
    """Say how many runs there are, what computed them, and for how long."""
    found = [run for row in result.rows for run in row.runs]
    digests = {run.folder.name for run in found}
    sessions = [
        session for run in kept if run.digest in digests for session in run.values["sessions"]
    ]
    days = sorted(session["began"][:10] for session in sessions)
    parts = (
        f"{len(found)} of {len(found) + len(result.missing)} runs",
        f"seeds {', '.join(map(str, sorted({run.seed for run in found})))}",
        f"{sum(run.seconds for run in found) / 3600:.1f} hours of meta-training and validation",
        _listed(f"torch {run.summary['versions']['torch']}" for run in found),
        _listed(run.summary["device"] for run in found),
        _listed(_PROCESSOR.search(each["platform"])[0] for each in sessions),  # type: ignore[index]
        "one thread a run, other work beside",
        f"begun {' to '.join(dict.fromkeys((days[0], days[-1])))}",
    )
    return f"{', '.join(parts)}."


def _listed(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))


def tuned(result: StudyResult) -> str:
    """Every variant at its best setting, and beside its base."""
    best = result.best_rows()
    sheets: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {}
    for rows in best:
        for title, columns, lines in best_sheets(result, rows):
            sheets.setdefault(title, (columns, []))[1].extend(
                tuple(map(stems, line)) for line in lines
            )
    tables = ((title, table(*sheet)) for title, sheet in sheets.items())
    return _signs("\n\n".join([*_titled(tables), bullets(best_notes(result, best))]))


def equal_rate(result: StudyResult) -> str:
    """Every variant at every setting, and what it gains over its base at the same one."""

    def test(row: Row) -> str:
        whole = len(result.study.seeds)
        text = value_text(result.metric, row.test.mean, row.test.interval)
        return f"{text}{part_text(len(row.seeds), whole)}"

    def gained(row: Row) -> str:
        if (base := result.base_of(row)) is None:
            return ""
        faster = result.acceleration(row, base)
        if not faster.reached:
            return ""
        percent = faster.mean_percent
        text = "not reached" if percent is None else f"{percent:+.0f} %"
        reached = f"({faster.seeds_reached} of {len(faster.reached)})"
        return _signs(f"{difference_text(result.difference(row, base))}, {text} {reached}")

    return "\n\n".join(
        _titled(
            (
                (f"Test {result.metric} at equal settings", _grid(result, test)),
                (
                    "Gained over its base at the same setting: test, acceleration, and the seeds "
                    "that reach the base's best validation",
                    _grid(result, gained),
                ),
            )
        )
    )


def over_fitted(result: StudyResult) -> str:
    """The inner loop early in training: the gap of losses, and the query loss by step."""
    found = {each.row.label: each for each in over_fitting(result)}
    if not found:
        return "No run has figures by inner step."
    iterations = next(iter(found.values())).iterations

    def of(text: Callable[[OverFitting], str]) -> str:
        return _grid(result, lambda row: text(found[row.label]) if row.label in found else "")

    def gap(each: OverFitting) -> str:
        seeds = f" ({losses_text(each.gap_by_seed, 2)})" if each.gap_by_seed[1:] else ""
        return f"{losses_text([each.gap], 2)}{seeds}"

    when = f"validations of iterations {iterations[0]} to {iterations[-1]}"
    titles = (
        f"Query loss − support loss after the last inner step, mean over the {when} (by seed)",
        f"Query loss before the first inner step and after each, mean over the {when}",
        f"Support loss before the first inner step and after each, mean over the {when}",
    )
    tables = (
        of(gap),
        of(lambda each: losses_text(each.query_by_step, 2)),
        of(lambda each: losses_text(each.support_by_step, 2)),
    )
    return "\n\n".join(_titled(zip(titles, tables, strict=True)))


def learned(result: StudyResult) -> str:
    """What plugins learned for each inner step, as it is at the last validation."""
    names = dict.fromkeys(name for row in result.rows for name in _by_step(row))

    def of(name: str) -> str:
        return _signs(_grid(result, lambda row: losses_text(_by_step(row).get(name, []), 2)))

    title = "{} of each inner step at the end of training, mean over seeds"
    return "\n\n".join(_titled((title.format(name), of(name)) for name in names))


def _by_step(row: Row) -> dict[str, list[float]]:
    """The figures that a row's runs have for each inner step, by name, means over the runs."""
    ends = [run.metrics[-1]["figures"] for run in row.runs]
    found: dict[str, list[float]] = {}
    for full in ends[0]:
        name, _, step = full.rpartition("/")
        if name and step.isdigit():
            found.setdefault(name, []).append(fmean(end[full] for end in ends))
    return found


def _grid(result: StudyResult, cell: Callable[[Row], str]) -> str:
    """Lay out variants below each other and the values that are tuned beside each other."""
    axis = result.tuned[0]
    values = result.study.axes[axis]
    texts: dict[str, dict[str, str]] = {}
    for rows in groups(result):
        for row in rows:
            line = texts.setdefault(stems(row_text(row.variant, apart(result, row))), {})
            line[repr(row.setting[axis])] = cell(row)
    lines = [
        (name, *(line.get(repr(value), "") for value in values)) for name, line in texts.items()
    ]
    head = ("variant", *(setting_text({axis: value}) for value in values))
    return table(head, [line for line in lines if any(line[1:])])


def _titled(tables: Iterable[tuple[str, str]]) -> list[str]:
    return [f"**{title}:**\n\n{text}" for title, text in tables if text.count("\n") > 1]


def _signs(text: str) -> str:
    """The text with the sign of negative numbers as typesetters have it."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


KINDS: dict[str, Callable[[StudyResult], str]] = {
    "tuned": tuned,
    "equal-rate": equal_rate,
    "over-fitting": over_fitted,
    "learned": learned,
}
