"""The paired difference of two rows of a study's kept runs, which no table has beside each other.

python docs/studies/compare_rows.py STUDY "maml, inner_lr 0.2" "maml, inner_lr 0.1"

prints the first minus the second: mean and 95 % interval over test tasks, then each seed.
"""

import sys

from tables import known, result_of

from metaplug.report.comparing import difference_text


def main(study: str, one: str, other: str) -> None:
    """Compare two rows by their names in the tables."""
    result = result_of(known(study))
    assert result is not None, study
    rows = {row.label: row for row in result.rows}
    if unknown := [name for name in (one, other) if name not in rows]:
        sys.exit(f"{study} has no row {unknown}: give one of {sorted(rows)}")
    print(difference_text(result.difference(rows[one], rows[other])))
    for a, b in zip(rows[one].runs, rows[other].runs, strict=True):
        print(
            f"seed {a.seed}: {100 * (a.summary['test']['mean'] - b.summary['test']['mean']):+.2f}"
        )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
