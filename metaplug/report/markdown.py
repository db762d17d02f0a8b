"""Pieces of Markdown that read well as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table whose columns stand below each other in plain text, too.

    A column without a single value is left out, unless it is the first.

    >>> print(table(["step", "ms", "busy"], [["plain", "9.1", ""], ["captured", "2.0", ""]]))
    | step     | ms  |
    |----------|-----|
    | plain    | 9.1 |
    | captured | 2.0 |
    """
    body = [list(row) for row in rows]
    kept = [column for column in range(len(head)) if not column or any(row[column] for row in body)]
    lines = [[line[column] for column in kept] for line in (head, *body)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(kept))]
    texts = [
        f"| {' | '.join(map(str.ljust, line, widths))} |"  # as wide as its widest
        for line in lines
    ]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([texts[0], rule, *texts[1:]])


def bullets(lines: Iterable[str]) -> str:
    """Make a list; nothing of no lines."""
    return "\n".join(f"* {line}" for line in lines)


def plain(text: str) -> str:
    r"""Make a text of others harmless: one line, without tables, tags, links or code.

    >>> print(plain("a|b\n<c>"))
    a\|b \<c\>
    """
    return "".join(f"\\{one}" if one in "\\|<>*_`[]" else one for one in " ".join(text.split()))


def percent(share: float | None, digits: int = 3) -> str:
    """A share as a percentage of so many digits; nothing of None.

    >>> percent(0.25), percent(None)
    ('25 %', '')
    """
    return "" if share is None else f"{100 * share:.{digits}g} %"
