"""An opened output as text, JSON or CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parley_protocol.output import Cell, OutputColumn, OutputTable

HIDDEN = "hidden"
NULL = "(null)"


def cell_text(cell: Cell, column: OutputColumn) -> str:
    """One cell for people: counts with thousands, floats with two decimals or four digits, hidden values as such."""
    if cell is None:
        return NULL if column.type == "label" else HIDDEN
    if isinstance(cell, float):
        return f"{cell:,.2f}" if abs(cell) >= 1 or cell == 0 else f"{cell:.4g}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return cell


def shown_rows(table: OutputTable) -> list[int]:
    """The rows with at least one value that is not hidden."""
    values = [column for column in table.columns if column.type != "label"]
    return [row for row in range(table.rows) if any(column.cells[row] is not None for column in values)]


def render(table: OutputTable, mark: str, unit: str = "units", parties: str = "parties") -> list[str]:
    """The lines of an output: a heading with `mark` at its right, the combinations that are shown, and what is hidden."""
    rows = shown_rows(table)
    cells = [[column.name, *(cell_text(column.cells[row], column) for row in rows)] for column in table.columns]
    widths = [max(map(len, column)) for column in cells]
    lines = [
        "  ".join(
            f"{text:<{width}}" if column.type == "label" else f"{text:>{width}}"
            for text, width, column in zip(line, widths, table.columns, strict=True)
        ).rstrip()
        for line in zip(*cells, strict=True)
    ]
    width = max(sum(widths) + 2 * (len(widths) - 1), len(table.name) + 2 + len(mark))
    heading = f"{table.name}{mark:>{width - len(table.name)}}".rstrip()
    return [heading, *lines, *_hidden(table, len(rows), unit, parties)]


def _hidden(table: OutputTable, shown: int, unit: str, parties: str) -> list[str]:
    lines = []
    if shown < table.rows:
        rest = table.rows - shown
        lines.append(
            f"{rest} of {table.rows} combinations {'is' if rest == 1 else 'are'} hidden or empty: too few {unit} or {parties}"
        )
    partly = sum(column.hidden for column in table.columns) - (table.rows - shown) * sum(
        column.type != "label" for column in table.columns
    )
    if partly:
        lines.append(f"{partly} more {'value is' if partly == 1 else 'values are'} hidden in the rows above")
    return lines


def as_json(table: OutputTable) -> dict[str, Any]:
    """An output as JSON: hidden values are null, with their number by rule beside them."""
    return {
        "name": table.name,
        "kind": table.kind,
        "columns": [{"name": column.name, "type": column.type} for column in table.columns],
        "rows": [[column.cells[row] for column in table.columns] for row in range(table.rows)],
        "hidden": {reason.rule: reason.values for reason in table.reasons},
    }


def as_csv(table: OutputTable) -> str:
    """An output as CSV: every combination, hidden values empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    for row in range(table.rows):
        cells = (column.cells[row] for column in table.columns)
        writer.writerow(["" if cell is None else repr(cell) if isinstance(cell, float) else cell for cell in cells])
    return buffer.getvalue()
