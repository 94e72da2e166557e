"""Tables that are as readable on a terminal as they are as Markdown."""

from __future__ import annotations

import re


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table in columns of equal width; what cells hold is text, whatever is in it.

    The first and the last column are aligned to the left, those between, numbers, to the right.
    """
    header, rows = [escaped(cell) for cell in header], [[escaped(c) for c in row] for row in rows]
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    left = {0, len(header) - 1}

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(w) if c in left else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    dashes = ["-" * (w + 2) if c in left else "-" * (w + 1) + ":" for c, w in enumerate(widths)]
    rule = "|" + "|".join(dashes) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def escaped(text: str) -> str:
    """A text in which Markdown sees neither tags nor the end of a cell."""
    return re.sub(r"[\\<|]", r"\\\g<0>", text)


def in_code(text: str) -> str:
    """A text as Markdown shows code: in more backticks than it has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * (longest > 0)
    return f"{fence}{space}{text}{space}{fence}"
