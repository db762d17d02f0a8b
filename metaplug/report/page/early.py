"""The table of the inner loop early in training: how far it over-fits the support examples."""

from __future__ import annotations

from metaplug.experiments.study.over_fitting import EARLY, OverFitting, over_fitting
from metaplug.report.comparing import losses_text
from metaplug.report.page.material import Material
from metaplug.report.page.panels import Key
from metaplug.report.page.tables import SETTING, VARIANT, Cells, Column, Table, setting_words

GAP, SEEDS, QUERY = "gap", "gap-by-seed", "query-by-step"


def early_table(material: Material) -> Table | None:
    """Lay out all rows that have figures by inner step; None where none has."""
    found = over_fitting(material.result)
    if not found:
        return None
    titles = {
        VARIANT: "Variant",
        SETTING: "Setting",
        GAP: "Query loss − support loss after the last step",
        SEEDS: "The same by seed",
        QUERY: "Query loss before the first step and after each",
    }
    rows = tuple(_cells(material, each) for each in found)
    used = [name for name in titles if any(row.texts[name] for row in rows)]
    caption = f"Over-fitting of the inner loop: means over validations up to iteration {EARLY}"
    return Table(caption, tuple(Column(name, titles[name]) for name in used), rows)


def _cells(material: Material, found: OverFitting) -> Cells:
    row = found.row
    texts = {
        VARIANT: row.variant,
        SETTING: setting_words(row),
        GAP: losses_text([found.gap], 3),
        SEEDS: losses_text(found.gap_by_seed, 3, " · ") if found.gap_by_seed[1:] else "",
        QUERY: losses_text(found.query_by_step, 3, " → "),
    }
    return Cells(Key(row.variant, material.look_of(row.variant)), texts, False, False)
