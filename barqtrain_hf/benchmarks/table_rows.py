"""Rows of committed JSON as lines of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Json = dict[str, Any]


def rows_of(
    reports: Sequence[Json], which: str, name: Callable[[Json], str]
) -> Iterator[tuple[Json, str]]:
    """Rows of one part, each with its group's name in the group's first row and with "" after it."""
    for report in reports:
        last = None
        for row in report["rows"]:
            if row.get("part") == which:
                yield row, name(row) if name(row) != last else ""
                last = name(row)


def bold(cells: Sequence[str], row: Json) -> list[str]:
    """Cells of our row stand out."""
    return [
        f"**{c}**" if c and row["implementation"] in ("ours", "BarqTrainer") else c for c in cells
    ]


def unavailable(row: Json) -> str:
    """What stands in place of numbers."""
    return f"unavailable ({row.get('unavailable')})".replace("|", "\\|")
