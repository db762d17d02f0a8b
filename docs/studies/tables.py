"""The tables and pictures of docs/results.md, drawn from the runs that are kept here.

    python docs/studies/tables.py            # rewrite them
    python docs/studies/tables.py --check    # say what differs

STUDY.yaml and STUDY.jsonl are a study and its kept runs (`metaplug study STUDY.yaml --keep
STUDY.jsonl`). In docs/results.md what lies between `<!-- table STUDY KIND -->` and `<!-- end -->`
is rewritten, by the kinds in KINDS and PICTURES, or `runs`; docs/images/STUDY-KIND.png are the
pictures.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pictures import draw_curves, draw_rates
from PIL import Image

from metaplug.experiments.study import Row, StudyResult, cells_of, read_study
from metaplug.experiments.study.cells import setting_text
from metaplug.experiments.study.keeping import KeptRun, read_kept
from metaplug.experiments.study.over_fitting import OverFitting, over_fitting
from metaplug.experiments.study.tuned import Comparison, comparisons
from metaplug.experiments.study.unpacking import kept_results
from metaplug.report.best import best_notes
from metaplug.report.comparing import by_seed_text, difference_text, losses_text, p_text
from metaplug.report.markdown import table
from metaplug.report.terminal import value_text

STUDIES = Path(__file__).parent
PAGE, IMAGES = STUDIES.parent / "results.md", STUDIES.parent / "images"

MARKED = re.compile(r"(<!-- table (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

_PROCESSOR = re.compile("x86_64|AMD64|aarch64|arm64|$")

_APART, _SHARE = 24, 0.005
"""Of a picture, at most this share of pixels may differ by more than so many of 255 levels: letters
are smoothed in another way elsewhere."""


@cache
def result_of(study: str) -> StudyResult | None:
    """The kept runs of a study; None where none is kept."""
    file = STUDIES / f"{study}.yaml"
    asked = read_study(file)
    cells = cells_of(asked, str(file), to_compute=False)
    return kept_results(asked, cells, read_kept(file.with_suffix(".jsonl")))


def runs(result: StudyResult, kept: Iterable[KeptRun]) -> str:
    """Say how many runs there are, what computed them, and for how long."""
    found = [run for row in result.rows for run in row.runs]
    digests = {run.folder.name for run in found}
    sessions = [
        session for run in kept if run.digest in digests for session in run.values["sessions"]
    ]
    versions = [f"torch {run.summary['versions']['torch']}" for run in found]
    hours = sum(run.seconds for run in found) / 3600
    commands = dict.fromkeys(f"`{session['command']}`" for session in sessions)
    processors = dict.fromkeys(_PROCESSOR.search(each["platform"])[0] for each in sessions)  # type: ignore[index]
    return (
        f"{len(found)} of {len(found) + len(result.missing)} runs, "
        f"{hours:.1f} hours of meta-training and validation in all; "
        f"{' or '.join(dict.fromkeys(versions))}, "
        f"{' or '.join(dict.fromkeys(run.summary['device'] for run in found))}, "
        f"{' or '.join(processors)}, one thread a run, other work beside; begun "
        f"{min(session['began'] for session in sessions)[:10]} by {' or '.join(commands)}."
    )


def tuned(result: StudyResult) -> str:
    """Every variant at its best setting, and beside its base."""
    [rows] = result.best_rows()
    found = comparisons(result, rows)
    metric, columns = result.metric, ("by seed", "p (Holm)", "acceleration")
    first = table(
        (
            "variant",
            "setting",
            "validation",
            f"test {metric}",
            f"minus {result.baseline}",
            *columns,
        ),
        (
            (
                row.variant,
                setting_text(row.setting),
                value_text(metric, row.best_validation),
                value_text(metric, row.test.mean, row.test.interval) + _seeds(result, row),
                *_compared(metric, found.with_baseline.get(row.label)),
            )
            for row in rows
        ),
    )
    second = table(
        ("variant", "its base", "minus its base", *columns),
        (
            (one.row.label, one.over.label, *_compared(metric, one))
            for one in found.with_base.values()
        ),
    )
    if found.with_base.items() <= found.with_baseline.items():
        second = ""  # it would repeat the first
    titles = (
        "Each variant at the setting that validated best",
        "Each variant beside the one that it extends, both at their best settings",
    )
    notes = [f"* {note}" for note in best_notes(result, [rows])]
    return "\n\n".join([*_titled(zip(titles, (first, second), strict=True)), "\n".join(notes)])


def equal_rate(result: StudyResult) -> str:
    """Every variant at every setting, and what it gains over its base at the same one."""

    def test(row: Row) -> str:
        return value_text(result.metric, row.test.mean, row.test.interval) + _seeds(result, row)

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
    )
    return "\n\n".join(
        _titled(
            zip(titles, (of(gap), of(lambda each: losses_text(each.query_by_step, 2))), strict=True)
        )
    )


KINDS: dict[str, Callable[[StudyResult], str]] = {
    "tuned": tuned,
    "equal-rate": equal_rate,
    "over-fitting": over_fitted,
}
PICTURES: dict[str, tuple[Callable[[StudyResult, Path], None], str]] = {
    "rates": (draw_rates, "Test accuracy over the inner learning rate"),
    "curves": (draw_curves, "Validation curves, each variant at its best inner learning rate"),
}


def filled(page: str) -> str:
    """The page with every table, and the links to pictures, as they are now."""

    def block(found: re.Match[str]) -> str:
        before, study, kind, end = found.groups()
        result = result_of(study)
        if result is None:
            text = "No run is kept yet."
        elif kind in PICTURES:
            text = f"![{PICTURES[kind][1]}](images/{study}-{kind}.png)"
        elif kind == "runs":
            text = runs(result, read_kept(STUDIES / f"{study}.jsonl"))
        else:
            text = KINDS[kind](result)
        return f"{before}\n{text}\n\n{end}"

    return MARKED.sub(block, page)


def drawn(page: str, folder: Path) -> list[Path]:
    """Draw the pictures of a page into a folder."""
    made = []
    for _, study, kind, _ in MARKED.findall(page):
        result = result_of(study)
        if kind in PICTURES and result is not None:
            made.append(folder / f"{study}-{kind}.png")
            PICTURES[kind][0](result, made[-1])
    return made


def look_alike(one: Path, other: Path) -> bool:
    """Whether two pictures differ in nothing but how lines and letters are smoothed."""
    if not (one.exists() and other.exists()):
        return False
    pixels = [np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in (one, other)]
    if pixels[0].shape != pixels[1].shape:
        return False
    apart = np.abs(pixels[0] - pixels[1]).max(-1) > _APART
    return bool(apart.mean() <= _SHARE)


def differing(page: str) -> list[str]:
    """What is not as the kept runs have it."""
    said = [
        f"table {study} {kind}"
        for (_, study, kind, _), before, after in zip(
            MARKED.findall(page), MARKED.finditer(page), MARKED.finditer(filled(page)), strict=True
        )
        if before[0] != after[0]
    ]
    with TemporaryDirectory() as folder:
        pictures = drawn(page, Path(folder))
        return said + [
            f"{each.name}" for each in pictures if not look_alike(each, IMAGES / each.name)
        ]


def main() -> int:
    """Rewrite or check the page and its pictures."""
    page = PAGE.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--check"]:
        said = differing(page)
        print("\n".join(f"{each} differs" for each in said) or "nothing differs")
        return bool(said)
    PAGE.write_text(filled(page), encoding="utf-8")
    for path in drawn(page, IMAGES):
        print(path.relative_to(STUDIES.parent.parent))
    return 0


def _grid(result: StudyResult, cell: Callable[[Row], str]) -> str:
    """Lay out variants below each other and settings beside each other; without empty lines."""
    [axis] = result.study.axes
    values = result.study.axes[axis]
    texts = {(row.variant, row.setting[axis]): cell(row) for row in result.rows}
    variants = [each.label for each in result.study.variants]
    lines = [(name, *(texts.get((name, value), "") for value in values)) for name in variants]
    head = ("variant", *(setting_text({axis: value}) for value in values))
    return table(head, [line for line in lines if any(line[1:])])


def _titled(tables: Iterable[tuple[str, str]]) -> list[str]:
    return [f"**{title}:**\n\n{text}" for title, text in tables if text.count("\n") > 1]


def _compared(metric: str, one: Comparison | None) -> tuple[str, ...]:
    if one is None:
        return ("", "", "", "")
    faster = one.acceleration
    percents = ["not reached" if each is None else f"{each:+.0f} %" for each in faster.percent]
    mean = faster.mean_percent
    acceleration = "" if mean is None else f"{mean:+.0f} % ({', '.join(percents)})"
    return (
        _signs(difference_text(one.difference)),
        _signs(by_seed_text(metric, one.by_seed)),
        p_text(one.p_holm),
        _signs(acceleration or "not reached"),
    )


def _seeds(result: StudyResult, row: Row) -> str:
    whole = len(result.study.seeds)
    return "" if len(row.seeds) == whole else f" ({len(row.seeds)} of {whole} seeds)"


def _signs(text: str) -> str:
    """The text with the sign of negative numbers as typesetters have it."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


if __name__ == "__main__":
    sys.exit(main())
