"""Tables and columns of an agreement, and how their values stand in memory and in a sealed table (tab-3).

Every value of a column is of a fixed width, so that the enclave's parser of hostile input is one call. Bounds and edges are
kept as *physical* values: what stands in the sealed table (decimals scaled, dates in days, timestamps in microseconds).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from typing import Final

from parley_protocol import limits
from parley_protocol.encoding import Encodable, encode, sha384

Physical = int | float
"""A value as it stands in the sealed table."""

INT_NULL: Final = -(2**63)
DATE_NULL: Final = -(2**31)
BOOL_NULL: Final = 255
CATEGORY_NULL: Final = 0
NULL_LABEL: Final = "(null)"
"""How the null of a `by` column is shown; no value of a category may be called so."""

_EPOCH: Final = date(1970, 1, 1)
_EPOCH_TIME: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DATE_LOW: Final = (date.min - _EPOCH).days
_DATE_HIGH: Final = (date.max - _EPOCH).days
_MICROSECONDS_A_DAY: Final = 86_400_000_000
_INTEGER: Final = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_DECIMAL: Final = re.compile(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,18})?")
_FLOAT: Final = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?")
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIMESTAMP: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?)?Z?")


class ColumnType(StrEnum):
    """What a column holds; free text is not among it."""

    INT = "int"
    DECIMAL = "decimal"
    FLOAT = "float"
    BOOL = "bool"
    CATEGORY = "category"
    DATE = "date"
    TIMESTAMP = "timestamp"


NUMERIC: Final = (ColumnType.INT, ColumnType.DECIMAL, ColumnType.FLOAT)
RANGED: Final = (*NUMERIC, ColumnType.DATE, ColumnType.TIMESTAMP)

_DTYPES: Final = {
    ColumnType.INT: "<i8",
    ColumnType.DECIMAL: "<i8",
    ColumnType.FLOAT: "<f8",
    ColumnType.BOOL: "u1",
    ColumnType.DATE: "<i4",
    ColumnType.TIMESTAMP: "<i8",
}
_NULLS: Final[dict[ColumnType, Physical]] = {
    ColumnType.INT: INT_NULL,
    ColumnType.DECIMAL: INT_NULL,
    ColumnType.FLOAT: math.nan,
    ColumnType.BOOL: BOOL_NULL,
    ColumnType.CATEGORY: CATEGORY_NULL,
    ColumnType.DATE: DATE_NULL,
    ColumnType.TIMESTAMP: INT_NULL,
}


def widest(kind: ColumnType) -> tuple[Physical, Physical]:
    """The (low, high) of a ranged column that states none; a float has no such range."""
    if kind is ColumnType.DATE:
        return _DATE_LOW, _DATE_HIGH
    if kind is ColumnType.TIMESTAMP:
        return _DATE_LOW * _MICROSECONDS_A_DAY, (_DATE_HIGH + 1) * _MICROSECONDS_A_DAY - 1
    return -limits.INT_BOUND, limits.INT_BOUND


def physical(kind: ColumnType, text: str, scale: int = 0) -> Physical:
    """The physical value that `text` writes; ValueError with a reason for people where it writes none of this type."""
    if kind is ColumnType.INT:
        if not _INTEGER.fullmatch(text):
            raise ValueError("is not a whole number")
        return _within(int(text))
    if kind is ColumnType.DECIMAL:
        if not _DECIMAL.fullmatch(text):
            raise ValueError("is not a decimal number")
        whole, _, fraction = text.partition(".")
        if len(fraction.rstrip("0")) > scale:
            raise ValueError(f"has more than {scale} digits after the point")
        return _within(int(whole + fraction[:scale].ljust(scale, "0")))
    if kind is ColumnType.FLOAT:
        if not _FLOAT.fullmatch(text):
            raise ValueError("is not a number")
        number = float(text)
        if not abs(number) <= limits.FLOAT_BOUND:
            raise ValueError(f"is beyond {limits.FLOAT_BOUND:g}")
        return number + 0.0  # no negative zero: one number has one text
    if kind is ColumnType.DATE:
        return (_date(text) - _EPOCH).days
    if kind is ColumnType.TIMESTAMP:
        return _timestamp(text)
    raise ValueError(f"a {kind} has no such values")


def text_of(kind: ColumnType, value: Physical, scale: int = 0) -> str:
    """The one text of a physical value; `physical` is its inverse."""
    if kind is ColumnType.DECIMAL:
        digits = str(abs(int(value))).zfill(scale + 1)
        sign = "-" if value < 0 else ""
        return f"{sign}{digits[:-scale]}.{digits[-scale:]}" if scale else f"{sign}{digits}"
    if kind is ColumnType.FLOAT:
        return repr(float(value)).removesuffix(".0")
    if kind is ColumnType.DATE:
        return (_EPOCH + timedelta(days=int(value))).isoformat()
    if kind is ColumnType.TIMESTAMP:
        return (_EPOCH_TIME + timedelta(microseconds=int(value))).replace(tzinfo=None).isoformat() + "Z"
    return str(int(value))


def _within(value: int) -> int:
    if abs(value) > limits.INT_BOUND:
        raise ValueError("does not fit 64 bits")
    return value


def _date(text: str) -> date:
    try:
        if not _DATE.fullmatch(text):
            raise ValueError
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError("is not a date such as 2013-01-31") from None


def _timestamp(text: str) -> int:
    try:
        if not _TIMESTAMP.fullmatch(text):
            raise ValueError
        moment = datetime.fromisoformat(text.removesuffix("Z")).replace(tzinfo=UTC)
    except ValueError:
        raise ValueError("is not a time in UTC such as 2013-01-31T12:30:00Z") from None
    return (moment - _EPOCH_TIME) // timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Column:
    """One column. `low` and `high` are inclusive and physical, None for bool and category; `scale` is the number of digits
    after the point of a decimal; `unit` is what its values are counted in, for people; `values` is a category's domain."""

    name: str
    type: ColumnType
    null: bool = False
    low: Physical | None = None
    high: Physical | None = None
    scale: int = 0
    unit: str | None = None
    values: tuple[str, ...] = field(default=(), repr=False, hash=False)

    @property
    def dtype(self) -> str:
        """The numpy dtype of the sealed column."""
        if self.type is ColumnType.CATEGORY:
            count = len(self.values)
            return "u1" if count <= 0xFF else "<u2" if count <= 0xFFFF else "<u4"
        return _DTYPES[self.type]

    @property
    def width(self) -> int:
        """Bytes of a value."""
        return int(self.dtype[-1])

    @property
    def null_value(self) -> Physical:
        """What stands for null: 0 for categories (codes are 1..n in the order of `values`), 255 for bool, NaN for float,
        the least integer of the width for the others."""
        return _NULLS[self.type]

    def physical(self, text: str) -> Physical:
        """The physical value that `text` writes, category and bool included; ValueError with a reason for people."""
        if self.type is ColumnType.CATEGORY:
            try:
                return self.values.index(text) + 1
            except ValueError:
                raise ValueError("is not in the domain") from None
        if self.type is ColumnType.BOOL:
            if text not in ("true", "false"):
                raise ValueError("is neither true nor false")
            return int(text == "true")
        return physical(self.type, text, self.scale)

    def text_of(self, value: Physical) -> str:
        """The text of a physical value that is not null."""
        if self.type is ColumnType.CATEGORY:
            return self.values[int(value) - 1]
        if self.type is ColumnType.BOOL:
            return "true" if value else "false"
        return text_of(self.type, value, self.scale)

    def to_value(self) -> Encodable:
        """The column's part of the canonical form: what is absent has no key, bounds are text."""
        form: dict[str, Encodable] = {"name": self.name, "type": str(self.type), "null": self.null}
        if self.type in RANGED:
            assert self.low is not None and self.high is not None
            form["min"], form["max"] = self.text_of(self.low), self.text_of(self.high)
        if self.type is ColumnType.DECIMAL:
            form["scale"] = self.scale
        if self.type is ColumnType.CATEGORY:
            form["values"] = list(self.values)
        if self.unit is not None:
            form["in"] = self.unit
        return form


@dataclass(frozen=True, slots=True)
class Table:
    """One table. `parties` each bring one upload of it, in the members' order; `key` is the column of their files with the
    unit's identifier; `rows_per_unit` bounds the rows of a unit in one upload."""

    name: str
    parties: tuple[str, ...]
    key: str
    rows_per_unit: int
    columns: tuple[Column, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a value of each column, without the unit key."""
        return tuple(column.width for column in self.columns)

    @property
    def schema_digest(self) -> bytes:
        """SHA-384 of what a sealed table of this kind is: name, key, multiplicity, columns; not who brings it."""
        columns: Encodable = [column.to_value() for column in self.columns]
        return sha384(encode(["parley/1/schema", self.name, self.key, self.rows_per_unit, columns]))

    def column(self, name: str) -> Column | None:
        """The column of this name."""
        return next((column for column in self.columns if column.name == name), None)

    def ref(self, name: str, *, left: bool = False) -> ColumnRef | None:
        """The column of this name as an output reads it; `left`: this table is joined by a left join."""
        for number, column in enumerate(self.columns, 1):
            if column.name == name:
                return ColumnRef(self.name, column, number, column.null or left)
        return None

    def to_value(self) -> Encodable:
        """The table's part of the canonical form."""
        form: dict[str, Encodable] = {
            "name": self.name,
            "from": list(self.parties),
            "key": self.key,
            "rows_per_unit": self.rows_per_unit,
            "columns": [column.to_value() for column in self.columns],
        }
        return form


@dataclass(frozen=True, slots=True)
class ColumnRef:
    """A column as an output reads it. `number` is its place in the sealed table (1.., the unit key is 0); `nullable` says
    whether it may be null there: declared so, or of a table that is joined by a left join."""

    table: str
    column: Column
    number: int
    nullable: bool

    @property
    def text(self) -> str:
        """The reference as the canonical form writes it."""
        return f"{self.table}.{self.column.name}"
