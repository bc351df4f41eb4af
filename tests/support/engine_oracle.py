"""What an aggregate must give, computed with DuckDB (joins, conditions) and row by row in Python (cells, rules, numbers).

It shares no code with the engine: rules are applied by taking away the rows of each coalition and counting again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import combinations, product
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from parley_protocol.agreement.model import Agreement, Function, Output, Rules
from parley_protocol.agreement.schema import Column, ColumnType
from parley_protocol.output import OutputTable
from support.blobs import Array, Tables

Row = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """By cell and value name: the value, or None where it is hidden; and the reasons."""

    cells: dict[tuple[str | None, ...], dict[str, Any]]
    reasons: dict[str, int]


def expected(agreement: Agreement, output: Output, tables: Tables, where: str | None) -> Expected:
    """The output over physical tables; `where` is its condition in SQL."""
    rows = _rows(agreement, output, tables, where)
    cells: dict[tuple[str | None, ...], list[Row]] = {
        key: [] for key in product(*(grouping.labels for grouping in output.by))
    }
    for row in rows:
        cells[tuple(_label(grouping, row[grouping.ref.text]) for grouping in output.by)].append(row)
    result = {}
    reasons = {"min_units": 0, "min_parties": 0}
    for key, inside in cells.items():
        values: dict[str, Any] = {}
        for value in output.values:
            used = inside if value.ref is None else [row for row in inside if row[value.ref.text] is not None]
            failed = _failed(used, agreement.rules)
            if failed:
                reasons[failed] += 1
                values[value.name] = None
            else:
                values[value.name] = _number(value.function, value.ref, used)
        result[key] = values
    return Expected(result, {rule: count for rule, count in reasons.items() if count})


def _rows(agreement: Agreement, output: Output, tables: Tables, where: str | None) -> list[Row]:
    connection = duckdb.connect()
    connection.execute("set threads = 1")
    for name in output.tables:
        spec = agreement.tables[name]
        parts = [
            _frame(party, keys, spec.columns, columns)
            for (party, table), (keys, columns) in tables.items()
            if table == name
        ]
        frame = pd.concat(parts, ignore_index=True)
        connection.register(f"{name}_frame", frame)
        connection.execute(f"create table {name} as select * from {name}_frame")
    columns = ", ".join(
        f'{name}."{column.name}" as "{name}.{column.name}"'
        for name in output.tables
        for column in agreement.tables[name].columns
    )
    joins = " ".join(
        f"{join.kind} join {join.table} on {join.table}.unit_key = {output.table}.unit_key" for join in output.joins
    )
    query = (
        f"select {output.table}.unit_key as unit, {output.table}.party as party, {columns} from {output.table} {joins}"
        + (f" where {where}" if where else "")
    )
    found = connection.execute(query)
    names = [column[0] for column in found.description or []]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def _frame(party: str, keys: Array, specs: Sequence[Column], columns: Sequence[Array]) -> pd.DataFrame:
    frame = pd.DataFrame({"unit_key": np.asarray(keys, "uint64")})
    frame["party"] = party
    for column, values in zip(specs, columns, strict=True):
        frame[column.name] = _natural(column, values)
    return frame


def _natural(column: Column, values: Array) -> Any:
    """Physical values with nulls as None; categories as text, decimals times 10^scale, dates as days."""
    if column.type is ColumnType.FLOAT:
        return pd.array([None if math.isnan(value) else value for value in values.tolist()], dtype="Float64")
    items = [None if value == column.null_value else value for value in values.tolist()]
    if column.type is ColumnType.CATEGORY:
        return pd.array([None if item is None else column.values[item - 1] for item in items], dtype="string")
    if column.type is ColumnType.BOOL:
        return pd.array([None if item is None else bool(item) for item in items], dtype="boolean")
    return pd.array(items, dtype="Int64")


def _label(grouping: Any, value: Any) -> str | None:
    if value is None:
        return None
    if grouping.edges:
        label: str = grouping.labels[sum(1 for edge in grouping.edges if edge <= value)]
        return label
    return str(value).lower() if isinstance(value, bool) else str(value)


def _failed(rows: Sequence[Row], rules: Sequence[Rules]) -> str | None:
    """The first rule that these rows fail."""
    parties = sorted({row["party"] for row in rows})
    units = {row["unit"] for row in rows}
    few_units = few_parties = False
    for rule in rules:
        few_units |= len(units) < rule.min_units
        if rule.coalition is None:
            own = [len({row["unit"] for row in rows if row["party"] == party}) for party in parties]
            few_units |= any(count < rule.min_units for count in own)
            few_parties |= len(parties) < rule.min_parties
            continue
        few_parties |= len(parties) - rule.coalition < rule.min_parties
        if rule.coalition > 1:
            charges = dict.fromkeys(parties, Fraction())
            for unit in units:
                having = {row["party"] for row in rows if row["unit"] == unit}
                for party in having if len(having) <= rule.coalition else ():
                    charges[party] += Fraction(1, len(having))
            taken = sum(sorted(charges.values())[-rule.coalition :], Fraction())
            few_units |= len(units) - taken < rule.min_units
            continue
        for gone in combinations(parties, min(rule.coalition, len(parties))):
            few_units |= len({row["unit"] for row in rows if row["party"] not in gone}) < rule.min_units
    return "min_units" if few_units else "min_parties" if few_parties else None


def _number(function: Function, ref: Any, rows: Sequence[Row]) -> Any:
    if function is Function.COUNT:
        return len(rows)
    if function is Function.UNITS:
        return len({row["unit"] for row in rows})
    scale = 10**ref.column.scale
    numbers = [Fraction(row[ref.text]) / scale for row in rows]
    total, n = sum(numbers, Fraction()), len(numbers)
    if function is Function.SUM:
        if ref.column.type is ColumnType.FLOAT:
            return float(total)
        return format(Decimal(int(total * scale)).scaleb(-ref.column.scale), "f")
    if function is Function.MEAN:
        return float(total / n)
    variance = sum(((number - total / n) ** 2 for number in numbers), Fraction()) / (n - 1)
    return float(variance) if function is Function.VARIANCE else math.sqrt(variance)


def cells_of(output: OutputTable) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The engine's output in the same form."""
    labels = [column.cells for column in output.columns if column.type == "label"]
    values = [column for column in output.columns if column.type != "label"]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in range(output.rows):
        key = tuple(column[row] for column in labels)
        found[key] = {column.name: column.cells[row] for column in values}
    return found


def same(actual: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two rows agree: floats to 1e-9 relative, all else exactly."""
    return actual.keys() == wanted.keys() and all(
        math.isclose(actual[name], value, rel_tol=1e-9, abs_tol=1e-9)
        if type(value) is float and type(actual[name]) is float
        else actual[name] == value
        for name, value in wanted.items()
    )
