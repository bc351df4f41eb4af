"""The plaintext of outputs: exact floats, hidden values, and totals that add up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from parley_protocol.errors import MalformedError
from parley_protocol.output import OutputColumn, OutputTable, Reason

TABLE = OutputTable(
    bytes(48),
    "delay",
    "aggregate",
    (
        OutputColumn("engine", "label", ("Turbo-fan", "Turbo-jet", None)),
        OutputColumn("flights", "count", (12, None, None)),
        OutputColumn("mean", "float", (0.1 + 0.2, -0.0, None)),
        OutputColumn("total", "decimal", ("-12.30", None, None)),
    ),
    3,
    (Reason("min_parties", 1), Reason("min_units", 4)),
)


def test_out_1_what_is_written_is_read_to_the_last_bit() -> None:
    again = OutputTable.from_bytes(TABLE.to_bytes())
    assert again == TABLE
    assert math.copysign(1, again.columns[2].cells[1]) == -1  # type: ignore[arg-type]
    assert [column.hidden for column in again.columns] == [0, 2, 1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        dataclasses.replace(TABLE, rows=2),
        dataclasses.replace(TABLE, reasons=()),
        dataclasses.replace(TABLE, reasons=(Reason("min_units", 5), Reason("a", 0))),
        dataclasses.replace(TABLE, reasons=(Reason("min_units", 4), Reason("min_parties", 1))),
        dataclasses.replace(TABLE, columns=(*TABLE.columns[:3], dataclasses.replace(TABLE.columns[3], name="mean"))),
        dataclasses.replace(TABLE, columns=(*TABLE.columns[:3], dataclasses.replace(TABLE.columns[3], type="blob"))),
        dataclasses.replace(TABLE, columns=(*TABLE.columns[:3], dataclasses.replace(TABLE.columns[3], type="count"))),
    ],
)
def test_out_2_a_table_that_contradicts_itself_is_refused(bad: OutputTable) -> None:
    with pytest.raises(MalformedError):
        OutputTable.from_bytes(bad.to_bytes())


@pytest.mark.parametrize("cell", [math.nan, math.inf, -1, b"12345678", True])
def test_out_1_a_cell_that_is_none_is_refused(cell: Any) -> None:
    column = dataclasses.replace(TABLE.columns[1], cells=(cell, None, None))
    with pytest.raises(MalformedError):
        dataclasses.replace(TABLE, columns=(TABLE.columns[0], column, *TABLE.columns[2:])).to_bytes()


def test_figures_do_not_print() -> None:
    assert "12" not in repr(TABLE.columns[1]).replace("count", "")
