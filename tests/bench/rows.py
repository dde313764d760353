"""The row of a benchmark's table, and the table for people and for the README."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

COLUMNS = ("what", "ours", "theirs", "ratio", "bar", "met")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured on both sides, in one run."""

    what: str
    ours: str
    theirs: str
    ratio: float
    bar: str
    met: bool


def cells(row: Row) -> tuple[str, ...]:
    """The row as text; a ratio that is no number is left empty."""
    return (row.what, row.ours, row.theirs, f"{row.ratio:.2f}" if row.ratio == row.ratio else "", row.bar, "yes" if row.met else "NO")


def markdown(rows: Iterable[Row]) -> str:
    """The table as Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows)]
    return "".join(f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in line)} |\n" for line in lines)


def show(rows: Iterable[Row]) -> None:
    """Print the table for people."""
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells(row), style="" if row.met else "red")
    Console().print(table)
