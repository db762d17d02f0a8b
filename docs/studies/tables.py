"""The pages of results, drawn from the runs that are kept here.

    python docs/studies/tables.py              # rewrite them
    python docs/studies/tables.py STUDY ...    # those of these studies alone
    python docs/studies/tables.py --check      # say what differs

STUDY.yaml and STUDY.jsonl are a study and its kept runs (`metaplug study STUDY.yaml --keep
STUDY.jsonl`). docs/results/STUDY.md is written whole: the question, as the comment at the head of
STUDY.yaml has it, and every table and picture; that of a study that is a script is made by
STUDY_page.py. In docs/results.md what lies between `<!-- table STUDY KIND -->` and `<!-- end -->`
is rewritten, by the kinds in KINDS and PICTURES, or `runs`. docs/images/STUDY-KIND.png are the
pictures.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pictures import draw_curves, draw_gains, draw_rates, families
from PIL import Image
from study_tables import KINDS, runs

from metaplug.experiments.study import StudyResult, cells_of, read_study
from metaplug.experiments.study.keeping import read_kept
from metaplug.experiments.study.unpacking import kept_results

STUDIES = Path(__file__).parent
DOCS = STUDIES.parent
PAGE, PAGES, IMAGES = DOCS / "results.md", DOCS / "results", DOCS / "images"

MARKED = re.compile(r"(<!-- table (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

_APART, _SHARE = 24, 0.005
"""Of a picture, at most this share of pixels may differ by more than so many of 255 levels: letters
are smoothed in another way elsewhere."""


@cache
def result_of(study: str) -> StudyResult | None:
    """The kept runs of a study; None where none is kept."""
    file = STUDIES / f"{study}.yaml"
    question = read_study(file)
    cells = cells_of(question, str(file), to_compute=False)
    return kept_results(question, cells, read_kept(file.with_suffix(".jsonl")))


PICTURES: dict[str, tuple[Callable[[StudyResult, Path], None], str]] = {
    "gains": (draw_gains, "What each variant gains over its base, both at their best settings"),
    "rates": (draw_rates, "Test over the values that were tuned"),
    "curves": (draw_curves, "Validation curves, each variant at its best setting"),
}

_SECTIONS = (
    ("Each variant at its best setting", ("gains", "tuned", "curves")),
    ("All variants at equal settings", ("rates", "equal-rate")),
    ("The inner loop, early in training", ("over-fitting",)),
    ("What was learned", ("learned",)),
)


def kinds(result: StudyResult) -> list[str]:
    """The kinds of tables and pictures that say something of a study."""
    axis = result.tuned[0]
    tried: dict[str, set[str]] = {}
    for row in result.rows:
        tried.setdefault(row.variant, set()).add(repr(row.setting[axis]))
    is_line = len(result.study.axes[axis]) > 2 and min(map(len, tried.values())) > 1
    without = [] if is_line else ["rates"]
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
    if not is_grid(study):
        made: str = import_module(f"{study}_page").page()
        return made
    result = result_of(study)
    assert result is not None, study
    title, below = asked((STUDIES / f"{study}.yaml").read_text(encoding="utf-8"))
    parts = [f"# {title}", *below, block(study, "runs")]
    for section, of in _SECTIONS:
        shown = [block(study, kind, "../images") for kind in of if kind in kinds(result)]
        parts += [f"## {section}", *shown] if any(shown) else []
    return "\n\n".join(parts) + "\n"


def filled(page: str) -> str:
    """The page with every table, and the links to pictures, as they are now."""
    return MARKED.sub(lambda found: f"{found[1]}\n{block(found[2], found[3])}\n\n{found[4]}", page)


def kept_studies() -> list[str]:
    """The studies of which runs are kept."""
    return sorted(path.stem for path in STUDIES.glob("*.jsonl"))


def known(study: str) -> str:
    """The same name; ends the program where no run of the study is kept."""
    if study not in (names := kept_studies()):
        sys.exit(f"no run of '{study}' is kept: give one of {', '.join(names)}")
    return study


def is_grid(study: str) -> bool:
    """Whether a study is a grid of runs, and not a script that makes its page itself."""
    return (STUDIES / f"{study}.yaml").exists()


def drawn(study: str, folder: Path) -> list[Path]:
    """Draw the pictures of a study into a folder."""
    if not is_grid(study):
        import_module(f"{study}_page").draw(made := folder / f"{study}-gains.png")
        return [made]
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
    is_same = page.exists() and page.read_text(encoding="utf-8") == page_of(study)
    with TemporaryDirectory() as folder:
        pictures = drawn(study, Path(folder))
        others = [each.name for each in pictures if not look_alike(each, IMAGES / each.name)]
    return others if is_same else [page.name, *others]


def main() -> int:
    """Rewrite or check the pages and their pictures."""
    page = PAGE.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--check"]:
        said = differing(page) + [each for study in kept_studies() for each in differing_of(study)]
        print("\n".join(f"{each} differs" for each in said) or "nothing differs")
        return bool(said)
    for study in (studies := sys.argv[1:] or kept_studies()):
        known(study)
    PAGE.write_text(filled(page), encoding="utf-8")
    for study in studies:
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


if __name__ == "__main__":
    sys.exit(main())
