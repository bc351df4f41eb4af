"""The canonical plaintext of an output: a table of cells in which hidden values say that they are hidden (SPEC, "Outputs").

out-1: one row stands for every combination of the declared values of the `by` columns, in the agreement's order; an empty cell
and a hidden one look the same. Reasons are totals for the whole output, since a reason per cell would narrow its value.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import ClassVar

from parley_protocol import limits
from parley_protocol.encoding import Encodable, Value, encode
from parley_protocol.errors import MalformedError
from parley_protocol.shapes import Bytes, Row, Seq, Shape, Statement, Text, Uint

Cell = str | int | float | None
"""A label, a count, a float, or a decimal as text; None where a value is hidden or a label is null."""

LABEL_TYPE = "label"
COUNT_TYPE = "count"
FLOAT_TYPE = "float"
DECIMAL_TYPE = "decimal"
_TYPES = (LABEL_TYPE, COUNT_TYPE, FLOAT_TYPE, DECIMAL_TYPE)
_FLOAT = struct.Struct("<d")
WIDEST = {COUNT_TYPE: 9, FLOAT_TYPE: 9, DECIMAL_TYPE: 44}
"""Bytes of the widest cell: a u64, eight bytes with their length, the sum of 2^40 values of 64 bits with sign and point."""
FRAME_BYTES = 256
"""More than the heads of the arrays in an output and its reasons take."""


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells of one column, each by the column's type; a float is 8 bytes, little-endian."""

    def dump(self, value: tuple[Cell, ...], where: str) -> Value:
        return [self._dump(cell, where) for cell in value]

    def load(self, value: Value, where: str) -> tuple[Cell, ...]:
        if type(value) is not list or len(value) > limits.CELLS:
            raise MalformedError(f"{where}: not an array of at most {limits.CELLS} cells")
        return tuple(self._load(cell, where) for cell in value)

    @staticmethod
    def _dump(cell: Cell, where: str) -> Value:
        if type(cell) is float:
            if not math.isfinite(cell):
                raise MalformedError(f"{where}: not a finite number")
            return _FLOAT.pack(cell)
        if cell is None or type(cell) is str or (type(cell) is int and cell >= 0):
            return cell
        raise MalformedError(f"{where}: not a cell")

    @staticmethod
    def _load(cell: Value, where: str) -> Cell:
        if type(cell) is bytes and len(cell) == _FLOAT.size:
            number: float = _FLOAT.unpack(cell)[0]
            if not math.isfinite(number):
                raise MalformedError(f"{where}: not a finite number")
            return number
        if cell is None or type(cell) is str or (type(cell) is int and cell >= 0):
            return cell
        raise MalformedError(f"{where}: not a cell")


@dataclass(frozen=True, slots=True)
class OutputColumn:
    """One column: `type` is label (a `by` column), count, float or decimal (text)."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (Text(), Text(), _Cells())
    name: str
    type: str
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def hidden(self) -> int:
        """How many values are hidden; labels never are."""
        return 0 if self.type == LABEL_TYPE else sum(cell is None for cell in self.cells)


@dataclass(frozen=True, slots=True)
class Reason:
    """How many values of an output a rule hides; each value counts once, for the first rule that it fails."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (Text(), Uint(1))
    rule: str
    values: int


@dataclass(frozen=True, slots=True)
class OutputTable(Statement):
    """An output as its recipients read it. `reasons` are sorted by rule."""

    LABEL: ClassVar[str] = "parley/1/output"
    SHAPES: ClassVar[tuple[Shape, ...]] = (
        Bytes(48),
        Text(),
        Text(),
        Seq(Row(OutputColumn), 1, limits.COLUMNS),
        Uint(0, limits.CELLS),
        Seq(Row(Reason), 0, 64),
    )
    LIMIT: ClassVar[int] = limits.OUTPUT_BYTES
    agreement: bytes
    name: str
    kind: str
    columns: tuple[OutputColumn, ...]
    rows: int
    reasons: tuple[Reason, ...]

    @property
    def widest(self) -> int:
        """Bytes that no output of these names, labels, types and rows exceeds, whatever its values: never the values' own."""
        names: list[Encodable] = [[column.name, column.type] for column in self.columns]
        labels: list[Encodable] = [
            [cell for cell in column.cells if type(cell) is str] for column in self.columns if column.type == LABEL_TYPE
        ]
        cells = self.rows * len(labels) + sum(
            self.rows * WIDEST[column.type] for column in self.columns if column.type != LABEL_TYPE
        )
        bound = len(encode([self.name, self.kind, names, labels])) + cells + 16 * len(self.columns) + FRAME_BYTES
        return min(bound, limits.OUTPUT_BYTES)

    def check(self) -> None:
        wanted: dict[str, tuple[type, ...]] = {
            LABEL_TYPE: (str, type(None)),
            COUNT_TYPE: (int, type(None)),
            FLOAT_TYPE: (float, type(None)),
            DECIMAL_TYPE: (str, type(None)),
        }
        for column in self.columns:
            if column.type not in _TYPES:
                raise MalformedError(f"OutputTable.{column.name}: unknown type")
            if len(column.cells) != self.rows:
                raise MalformedError(f"OutputTable.{column.name}: not {self.rows} cells")
            if any(type(cell) not in wanted[column.type] for cell in column.cells):
                raise MalformedError(f"OutputTable.{column.name}: a cell is no {column.type}")
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise MalformedError("OutputTable.columns: a name stands twice")
        rules = [reason.rule for reason in self.reasons]
        if rules != sorted(set(rules)):
            raise MalformedError("OutputTable.reasons: not sorted, or twice the same")
        # out-2
        if sum(reason.values for reason in self.reasons) != sum(column.hidden for column in self.columns):
            raise MalformedError("OutputTable.reasons: they do not add up to the hidden values")
