"""The pages of results, drawn from the runs that are kept here.

    python docs/studies/tables.py            # rewrite them
    python docs/studies/tables.py --check    # say what differs

STUDY.yaml and STUDY.jsonl are a study and its kept runs (`metaplug study STUDY.yaml --keep
STUDY.jsonl`). docs/results/STUDY.md is written whole: the question, as the comment at the head of
STUDY.yaml has it, and every table and picture. In docs/results.md what lies between
`<!-- table STUDY KIND -->` and `<!-- end -->` is rewritten, by the kinds in KINDS and PICTURES, or
`runs`. docs/images/STUDY-KIND.png are the pictures.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pictures import apart, draw_curves, draw_gains, draw_rates, families, groups
from PIL import Image

from metaplug.experiments.study import Row, StudyResult, cells_of, read_study
from metaplug.experiments.study.cells import row_text, setting_text
from metaplug.experiments.study.keeping import KeptRun, read_kept
from metaplug.experiments.study.over_fitting import OverFitting, over_fitting
from metaplug.experiments.study.unpacking import kept_results
from metaplug.report.best import best_notes, best_sheets
from metaplug.report.comparing import difference_text, losses_text
from metaplug.report.markdown import bullets, table
from metaplug.report.terminal import value_text

STUDIES = Path(__file__).parent
DOCS = STUDIES.parent
PAGE, PAGES, IMAGES = DOCS / "results.md", DOCS / "results", DOCS / "images"

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
    groups = result.best_rows()
    sheets: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {}
    for rows in groups:
        for title, columns, lines in best_sheets(result, rows):
            sheets.setdefault(title, (columns, []))[1].extend(lines)
    tables = ((title, table(*sheet)) for title, sheet in sheets.items())
    return _signs("\n\n".join([*_titled(tables), bullets(best_notes(result, groups))]))


def equal_rate(result: StudyResult) -> str:
    """Every variant at every setting, and what it gains over its base at the same one."""

    def test(row: Row) -> str:
        whole = len(result.study.seeds)
        text = value_text(result.metric, row.test.mean, row.test.interval)
        return text if len(row.seeds) == whole else f"{text} ({len(row.seeds)} of {whole} seeds)"

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
    "gains": (draw_gains, "What each variant gains over its base, both at their best settings"),
    "rates": (draw_rates, "Test over the values that were tuned"),
    "curves": (draw_curves, "Validation curves, each variant at its best setting"),
}

_SECTIONS = (
    ("Each variant at its best setting", ("gains", "tuned", "curves")),
    ("All variants at equal settings", ("rates", "equal-rate")),
    ("The inner loop, early in training", ("over-fitting",)),
)


def kinds(result: StudyResult) -> list[str]:
    """The kinds of tables and pictures that say something of a study."""
    axis = result.tuned[0]
    without = [] if len(result.study.axes[axis]) > 2 else ["rates"]
    if max(len(members) for _, members in families(result)) > 5:
        without += ["rates", "curves"]  # more lines than an eye follows
    return [kind for kind in ("runs", *KINDS, *PICTURES) if kind not in without]


def block(study: str, kind: str, images: str = "images") -> str:
    """A table, or the link to a picture, as it is now."""
    result = result_of(study)
    if result is None:
        return "No run is kept yet."
    if kind in PICTURES:
        return f"![{PICTURES[kind][1]}]({images}/{study}-{kind}.png)"
    if kind == "runs":
        return runs(result, read_kept(STUDIES / f"{study}.jsonl"))
    return KINDS[kind](result)


def page_of(study: str) -> str:
    """The page of a study: its question, and all tables and pictures."""
    result = result_of(study)
    assert result is not None, study
    title, below = asked((STUDIES / f"{study}.yaml").read_text(encoding="utf-8"))
    parts = [f"# {title}", *below, block(study, "runs")]
    for section, of in _SECTIONS:
        shown = [block(study, kind, "../images") for kind in of if kind in kinds(result)]
        parts += [f"## {section}", *shown]
    return "\n\n".join(parts) + "\n"


def filled(page: str) -> str:
    """The page with every table, and the links to pictures, as they are now."""
    return MARKED.sub(lambda found: f"{found[1]}\n{block(found[2], found[3])}\n\n{found[4]}", page)


def kept_studies() -> list[str]:
    """The studies of which runs are kept."""
    return sorted(
        path.stem for path in STUDIES.glob("*.jsonl") if path.with_suffix(".yaml").exists()
    )


def drawn(study: str, folder: Path) -> list[Path]:
    """Draw the pictures of a study into a folder."""
    result = result_of(study)
    assert result is not None, study
    made = {kind: folder / f"{study}-{kind}.png" for kind in kinds(result) if kind in PICTURES}
    for kind, path in made.items():
        PICTURES[kind][0](result, path)
    return list(made.values())


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
    """The tables of a page that are not as the kept runs have them."""
    return [
        f"table {before[2]} {before[3]}"
        for before, after in zip(MARKED.finditer(page), MARKED.finditer(filled(page)), strict=True)
        if before[0] != after[0]
    ]


def differing_of(study: str) -> list[str]:
    """The files of a study, its page and its pictures, that are not as its kept runs have them."""
    page = PAGES / f"{study}.md"
    said = (
        [] if page.exists() and page.read_text(encoding="utf-8") == page_of(study) else [page.name]
    )
    with TemporaryDirectory() as folder:
        pictures = drawn(study, Path(folder))
        return said + [each.name for each in pictures if not look_alike(each, IMAGES / each.name)]


def main() -> int:
    """Rewrite or check the pages and their pictures."""
    page = PAGE.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--check"]:
        said = differing(page) + [each for study in kept_studies() for each in differing_of(study)]
        print("\n".join(f"{each} differs" for each in said) or "nothing differs")
        return bool(said)
    PAGE.write_text(filled(page), encoding="utf-8")
    for study in kept_studies():
        (PAGES / f"{study}.md").write_text(page_of(study), encoding="utf-8")
        for path in (PAGES / f"{study}.md", *drawn(study, IMAGES)):
            print(path.relative_to(DOCS.parent))
    return 0


def asked(text: str) -> tuple[str, list[str]]:
    """The question at the head of a study's file, and the paragraphs below it; commands as code."""
    comment = re.match(r"(?:#.*\n)+", text)
    assert comment is not None, text[:80]
    paragraphs = re.sub("^# ?", "", comment[0], flags=re.MULTILINE).strip().split("\n\n")
    title, _, rest = " ".join(paragraphs[0].split("\n")).partition("? ")
    title = title if title.endswith("?") else f"{title}?"
    below = [rest] if rest else []
    for paragraph in paragraphs[1:]:
        lines = [line.strip() for line in paragraph.split("\n")]
        is_code = paragraph.startswith("  ")
        below.append("\n".join(["```sh", *lines, "```"] if is_code else lines))
    return title, below


def _grid(result: StudyResult, cell: Callable[[Row], str]) -> str:
    """Lay out variants below each other and the values that are tuned beside each other."""
    axis = result.tuned[0]
    values = result.study.axes[axis]
    texts: dict[str, dict[str, str]] = {}
    for rows in groups(result):
        for row in rows:
            line = texts.setdefault(row_text(row.variant, apart(result, row)), {})
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


if __name__ == "__main__":
    sys.exit(main())
