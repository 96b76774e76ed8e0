"""Markdown tables, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["did_you_mean", "markdown_table"]


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, aligned: bool = True
) -> str:
    """Format rows of text as a Markdown table, without a trailing newline.

    Args:
        header: names of the columns.
        rows: rows with one cell per column.
        aligned: whether to pad the cells, so that columns are aligned in the source.

    Example:
        >>> print(markdown_table(["call", "rule"], [["relu", "AbsLRPRule()"]]))
        | call | rule         |
        | ---- | ------------ |
        | relu | AbsLRPRule() |
    """
    # An unescaped bar would end the cell.
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * (width or 3) for width in widths])
    lines = (" | ".join(map(str.ljust, row, widths)) for row in cells)
    return "\n".join(f"| {line} |" for line in lines)


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Suggest known names that are similar to an unknown name, as a suffix for a message; "" if none is.

    Args:
        name: the unknown name.
        known: the known names.
        prefix: prefix of each suggestion.

    Example:
        >>> "got 'vitt'" + did_you_mean("vitt", ["generic", "vit"])
        "got 'vitt' (did you mean vit?)"
        >>> did_you_mean("abc", ["generic", "vit"])
        ''
    """
    near = [prefix + other for other in difflib.get_close_matches(name, list(known), n=3)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""
