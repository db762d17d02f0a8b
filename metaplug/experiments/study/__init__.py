"""Studies: a grid of runs, each computed once, in a folder of its own.

`schema` is the file of a study, `cells` its grid, `checks` what is refused, `identity` what names a
cell's folder, `folder` what lies in the study's; `running` computes cells, `watching` sees what
they write. `keeping` has runs small in a file, and `unpacking` takes them from there. `results`
reads runs back as rows to compare, those of the same data by `same_data`, by `acceleration` among
others, `tuned` compares those at their best settings, and `over_fitting` looks into the inner loop;
`values` writes these as JSON.
"""

from metaplug.experiments.study.cells import Cell, cells_of
from metaplug.experiments.study.results import Row, StudyResult, read_results
from metaplug.experiments.study.running import Workers, compute
from metaplug.experiments.study.schema import Study, read_study

__all__ = [
    "Cell",
    "Row",
    "Study",
    "StudyResult",
    "Workers",
    "cells_of",
    "compute",
    "read_results",
    "read_study",
]
