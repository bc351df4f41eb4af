"""A party's own table, read: CSV, Parquet, Arrow, pandas and polars to checked, hashed, sorted columns.

DuckDB reads, casts, checks, normalises and hashes in one pass; numpy sorts. No row is ever touched by a Python loop, and no
error holds a value of the data.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt

from parley.normalise import normalised, quoted, unit_key
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement, Unit
from parley_protocol.agreement.schema import Column, ColumnType, Table
from parley_protocol.errors import DataError
from parley_protocol.secret import Secret
from parley_protocol.transcript import unit_salt

Source = Any
"""What holds a table: the path of a file, or an object with `__arrow_c_stream__` (pyarrow, pandas, polars)."""
Progress = Callable[[str, int, int], None]
"""Called with a step's name, how much of it is done and how much there is."""
Array = npt.NDArray[Any]

_DELIMITERS: Final = (",", ";", "\t", "|")
_TEXT: Final = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz")
_PARQUET: Final = (".parquet", ".pq")
_ARROW: Final = (".arrow", ".feather", ".ipc")
_DROPPED: Final = 0xFFFF
_MISSING, _TYPE, _LOW, _HIGH = 1, 2, 3, 4
_INTEGERS: Final = re.compile(r"U?(TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT)")
_FLOATS: Final = ("DOUBLE", "FLOAT")
_NOT_OF_TYPE: Final = {
    ColumnType.INT: "not a whole number",
    ColumnType.FLOAT: "not a number",
    ColumnType.BOOL: "neither true nor false (nor 1 or 0)",
    ColumnType.CATEGORY: "not one of the values that the agreement lists",
    ColumnType.DATE: "not a date such as 2013-01-31",
    ColumnType.TIMESTAMP: "not a time in UTC such as 2013-01-31T12:30:00Z",
}


@dataclass(frozen=True, slots=True)
class PreparedTable(Secret):
    """A table ready to be sealed.

    `columns`: arrays of `rows` values in the physical dtype of the agreement, the unit key first, sorted by it. `dropped`:
    rows without an identifier, which enter no output. `units`: distinct unit keys. `ignored`: columns that were not asked
    for.
    """

    name: str
    rows: int
    dropped: int
    units: int
    ignored: tuple[str, ...]
    columns: tuple[Array, ...] = field(repr=False)


def prepare(
    source: Source, agreement: Agreement, table: str, *, threads: int | None = None, progress: Progress | None = None
) -> PreparedTable:
    """`source` as the table `table` of `agreement` wants it; DataError with file, row and column where it is not so."""
    return read_table(
        source, agreement.tables[table], agreement.unit, agreement.series, threads=threads, progress=progress
    )


def read_table(
    source: Source,
    table: Table,
    unit: Unit,
    series: bytes,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreparedTable:
    """The rows of `source` checked against `table`, their identifiers hashed for `unit` and `series` (48 bytes), sorted."""
    tell = progress or (lambda _step, _done, _total: None)
    threads = threads or len(os.sched_getaffinity(0))
    tell("read", 0, 1)
    with (
        # No folder for what does not fit the memory: the engine would write rows there in the clear.
        duckdb.connect(
            config={"threads": threads, "autoinstall_known_extensions": False, "temp_directory": ""}
        ) as connection,
        _opened(connection, source, table) as opened,
    ):
        # In a notebook or a prompt the engine would write a bar of its own to standard output, beside ours.
        connection.execute("SET enable_progress_bar = false")
        rows = _read(connection, opened, table, unit, unit_salt(series, unit.name))
    tell("read", 1, 1)
    problem = rows.pop()
    dropped = problem == _DROPPED
    bad = np.flatnonzero((problem != 0) & ~dropped)
    if bad.size:
        raise _problem(opened.name, table, int(bad[0]), int(problem[bad[0]]))
    number = _without_dropped(rows, dropped)
    if not len(rows[0]):
        what = "no row has an identifier" if number.size or dropped.size else "the table has no rows"
        raise DataError(what, source=opened.name, column=table.key if dropped.size else None, code="rows")
    if len(rows[0]) > limits.GROUPS * limits.GROUP_ROWS[-1]:
        raise DataError("more rows than a table may have", source=opened.name, code="rows")
    tell("sort", 0, 1)
    columns, units = _sorted(rows, number, table, opened.name, threads)
    tell("sort", 1, 1)
    return PreparedTable(table.name, len(columns[0]), int(dropped.sum()), units, opened.ignored, columns)


# Where the rows come from


@dataclass(frozen=True, slots=True)
class _Opened:
    """A source that DuckDB can scan: `columns` maps the agreement's names to (SQL name, type)."""

    name: str
    scan: str
    text: bool
    columns: dict[str, tuple[str, str]]
    ignored: tuple[str, ...]


@contextmanager
def _opened(connection: duckdb.DuckDBPyConnection, source: Source, table: Table) -> Iterator[_Opened]:
    """`source` as something that the engine can scan; the columns that the agreement asks for are there."""
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "__arrow_c_stream__"):
            raise DataError(
                "neither the path of a file nor a table that Arrow can read (__arrow_c_stream__)", code="schema"
            )
        name = f"table {table.name}"
        with _no_data_told(name):
            connection.register("parley_source", source)
        yield _described(connection, name, "parley_source", table)
        return
    path = Path(source)
    lower = path.name.lower()
    if not path.is_file():
        raise DataError("no such file", source=str(path))
    if lower.endswith(_TEXT):
        yield _open_text(path, table)
    elif lower.endswith(_PARQUET):
        yield _described(connection, path.name, f"read_parquet({quoted(str(path))})", table)
    elif lower.endswith(_ARROW):
        import pyarrow as pa
        from pyarrow import ipc

        with pa.memory_map(str(path)) as memory:
            try:
                connection.register("parley_source", ipc.open_file(memory).read_all())
            except pa.ArrowInvalid:
                raise DataError("not an Arrow file", source=path.name) from None
            yield _described(connection, path.name, "parley_source", table)
    else:
        raise DataError("not a .csv, .tsv, .parquet or .arrow file", source=path.name)


def _open_text(path: Path, table: Table) -> _Opened:
    header, delimiter = _header(path, table)
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError("the header names it twice", source=path.name, column=twice, code="schema")
    places = {name: (f"c{number}", "VARCHAR") for number, name in enumerate(header)}
    columns = _wanted(path.name, table, places)
    struct = ", ".join(f"'{name}': 'VARCHAR'" for name, _ in places.values())
    scan = (
        f"read_csv({quoted(str(path))}, auto_detect=false, header=true, delim={quoted(delimiter)}, quote='\"', escape='\"',"
        f" columns={{{struct}}}, max_line_size={limits.TEXT_LINE_BYTES})"
    )
    return _Opened(path.name, scan, True, columns, tuple(name for name in header if name not in columns))


def _header(path: Path, table: Table) -> tuple[list[str], str]:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        start = file.read(limits.TEXT_LINE_BYTES)
    if not start.strip():
        raise DataError("the file is empty", source=path.name, code="rows")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("UTF-16; save it as UTF-8", source=path.name)
    line = re.split(rb"\r\n|\n|\r", start.removeprefix(b"\xef\xbb\xbf"), maxsplit=1)[0]
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise DataError("the header is not UTF-8", source=path.name) from None
    candidates = []
    for delimiter in _DELIMITERS:
        try:
            names = next(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        candidates.append(([name.strip() for name in names], delimiter))
    if not candidates:
        raise DataError("the header has an open quote", source=path.name, code="schema")
    asked = {table.key, *(column.name for column in table.columns)}
    return max(candidates, key=lambda candidate: len(asked.intersection(candidate[0])))


def _described(connection: duckdb.DuckDBPyConnection, name: str, scan: str, table: Table) -> _Opened:
    with _no_data_told(name):
        described = connection.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()
    places = {row[0]: (f'"{row[0].replace(chr(34), chr(34) * 2)}"', row[1]) for row in described}
    columns = _wanted(name, table, places)
    return _Opened(name, scan, False, columns, tuple(column for column in places if column not in columns))


def _wanted(name: str, table: Table, places: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    columns: dict[str, tuple[str, str]] = {}
    for column in (table.key, *(column.name for column in table.columns)):
        if column not in places:
            near = next((place for place in places if place.strip().lower() == column.lower()), None)
            hint = f"; there is {near!r}" if near is not None else ""
            raise DataError(f"no such column{hint}", source=name, column=column, code="schema")
        columns[column] = places[column]
    return columns


# One pass of the engine


def _read(connection: duckdb.DuckDBPyConnection, opened: _Opened, table: Table, unit: Unit, salt: bytes) -> list[Array]:
    """The unit key, the columns and the problems (u2), in the file's order."""
    inner, outer, problems = [], [], []
    identifier = _identifier(opened.name, table.key, *opened.columns[table.key])
    # The engine's normalisation to NFC ends at a NUL, which no identifier has.
    inner.append(f"contains(id, chr(0)) AS nul, {normalised('id', unit.normalise)} AS id")
    first = [f"{identifier} AS id"]
    for number, column in enumerate(table.columns, 1):
        raw, value = f"r{number}", f"v{number}"
        place, kind = opened.columns[column.name]
        text = kind == "VARCHAR" or kind.startswith("ENUM")
        first.append(f"nullif({place}::VARCHAR, '') AS {raw}" if text else f"{_plain(place, kind)} AS {raw}")
        inner += [f"{raw} IS NULL AS n{number}", f"{_value(opened.name, column, raw, kind, text)} AS {value}"]
        problems.append(_checks(number, column))
        outer.append(f"coalesce({value}, {_null(column)})::{_SQL_TYPES[column.dtype]} AS c{number}")
    problem = f"CASE WHEN nul THEN {_TYPE} WHEN coalesce(id, '') = '' THEN {_DROPPED} {' '.join(problems)} ELSE 0 END::USMALLINT"
    query = (
        # Names come from `quoted`, or are made here.
        f"SELECT coalesce({unit_key('id', salt)}, 0::UBIGINT) AS k, {', '.join((*outer, problem + ' AS p'))}"
        f" FROM (SELECT {', '.join(inner)} FROM (SELECT {', '.join(first)} FROM {opened.scan}))"
    )
    with _no_data_told(opened.name):
        found = connection.execute(query).fetchnumpy()
    return [np.asarray(found[name]) for name in ("k", *(f"c{n}" for n in range(1, len(table.columns) + 1)), "p")]


_SQL_TYPES: Final = {
    "u1": "UTINYINT",
    "<u2": "USMALLINT",
    "<u4": "UINTEGER",
    "<i4": "INTEGER",
    "<i8": "BIGINT",
    "<f8": "DOUBLE",
}


def _plain(place: str, kind: str) -> str:
    return f"CASE WHEN NOT isnan({place}) THEN {place}::DOUBLE END" if kind in _FLOATS else place


def _identifier(source: str, name: str, place: str, kind: str) -> str:
    if kind in ("VARCHAR", "UUID") or kind.startswith("ENUM") or _INTEGERS.fullmatch(kind):
        return f"{place}::VARCHAR"
    if kind in _FLOATS:  # whole numbers beside nulls, as pandas keeps them
        return (
            f"CASE WHEN {place} = trunc({place}) AND abs({place}) < 9007199254740992 THEN {place}::BIGINT::VARCHAR END"
        )
    if kind == '"NULL"':
        return "NULL::VARCHAR"
    raise DataError(f"an identifier is text or whole numbers, not {kind}", source=source, column=name, code="schema")


def _value(source: str, column: Column, raw: str, kind: str, text: bool) -> str:
    """SQL for the physical value of `raw`, NULL where it is null or not of the type."""
    if kind == '"NULL"':
        return "NULL"
    expression = _of_text(column, raw) if text else _of_typed(column, raw, kind)
    if expression is None:
        raise DataError(f"a {column.type} cannot come from {kind}", source=source, column=column.name, code="schema")
    return expression


def _of_text(column: Column, raw: str) -> str:
    if column.type is ColumnType.INT:
        return _exact_integer(raw)
    if column.type is ColumnType.DECIMAL:
        return _exact_decimal(raw, column.scale)
    if column.type is ColumnType.FLOAT:
        number = f"try_cast({raw} AS DOUBLE)"
        return f"CASE WHEN NOT contains({raw}, '_') AND isfinite({number}) THEN {number} END"
    if column.type is ColumnType.BOOL:
        return f"CASE lower(trim({raw})) WHEN 'true' THEN 1 WHEN '1' THEN 1 WHEN 'false' THEN 0 WHEN '0' THEN 0 END"
    if column.type is ColumnType.CATEGORY:
        return _code(column, f"CASE WHEN NOT contains({raw}, chr(0)) THEN nfc_normalize({raw}) END")
    if column.type is ColumnType.DATE:
        day = f"try_cast({raw} AS DATE)"
        return (
            f"CASE WHEN regexp_full_match({raw}, '[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}') THEN {day} - DATE '1970-01-01' END"
        )
    pattern = r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6}0*)?)?Z?)?"
    return (
        f"CASE WHEN regexp_full_match({raw}, '{pattern}') THEN epoch_us(try_cast(rtrim({raw}, 'Z') AS TIMESTAMP)) END"
    )


def _exact_integer(raw: str) -> str:
    # The engine's own cast rounds 1.5 and reads 1_000, 1e3 and 0x1F. What it writes back unchanged is plain.
    number = f"try_cast({raw} AS BIGINT)"
    plain = rf"regexp_full_match({raw}, ' *[+-]?[0-9]+(\.0*)? *')"
    return f"CASE WHEN {number}::VARCHAR = {raw} THEN {number} WHEN {plain} THEN {number} END"


def _exact_decimal(raw: str, scale: int) -> str:
    if scale == 0:
        return _exact_integer(raw)
    # The cast never rounds what the pattern lets through; its text has all places, so the point can go.
    pattern = rf" *[+-]?[0-9]{{1,19}}(\.[0-9]{{0,{scale}}}0*)? *"
    scaled = f"try_cast(replace(try_cast({raw} AS DECIMAL(38, {scale}))::VARCHAR, '.', '') AS BIGINT)"
    if scale < 18:
        narrow = f"try_cast({raw} AS DECIMAL(18, {scale}))"
        return (
            f"CASE WHEN {narrow}::VARCHAR = {raw} THEN ({narrow} * {10**scale})::BIGINT"
            f" WHEN regexp_full_match({raw}, '{pattern}') THEN {scaled} END"
        )
    return f"CASE WHEN regexp_full_match({raw}, '{pattern}') THEN {scaled} END"


def _code(column: Column, text: str) -> str:
    domain = ", ".join(quoted(value) for value in column.values)
    return f"enum_code(try_cast({text} AS ENUM({domain})))::UINTEGER + 1"


def _of_typed(column: Column, raw: str, kind: str) -> str | None:
    integer, floating = _INTEGERS.fullmatch(kind) is not None, kind in _FLOATS
    whole = f"CASE WHEN {raw} = trunc({raw}) THEN try_cast({raw} AS BIGINT) END"
    if column.type is ColumnType.FLOAT and (integer or floating or kind.startswith("DECIMAL")):
        return f"CASE WHEN isfinite({raw}::DOUBLE) THEN {raw}::DOUBLE END"
    if column.type is ColumnType.INT:
        return f"try_cast({raw} AS BIGINT)" if integer else whole if floating or kind.startswith("DECIMAL") else None
    if column.type is ColumnType.DECIMAL:
        if integer or kind.startswith("DECIMAL"):
            # As text: the engine's multiplication of wide decimals can overflow where the value fits.
            return _exact_decimal(f"{raw}::VARCHAR", column.scale)
        # A float that is no whole number is no decimal: 1.15 has no such value.
        return _exact_decimal(f"({whole})::VARCHAR", column.scale) if floating else None
    if column.type is ColumnType.BOOL:
        if kind == "BOOLEAN":
            return f"{raw}::UTINYINT"
        return f"CASE {raw} WHEN 1 THEN 1 WHEN 0 THEN 0 END" if integer or floating else None
    if column.type is ColumnType.CATEGORY:
        if integer or kind in ("BOOLEAN", "DATE"):
            return _code(column, f"{raw}::VARCHAR")
        return _code(column, f"({whole})::VARCHAR") if floating else None
    if not (kind == "DATE" or kind.startswith("TIMESTAMP")):
        return None
    moment = f"CASE WHEN isfinite({raw}) THEN epoch_us({raw}) END"
    if column.type is ColumnType.TIMESTAMP:
        return moment
    return f"CASE WHEN ({moment}) % 86400000000 = 0 THEN ({moment}) // 86400000000 END"


def _checks(number: int, column: Column) -> str:
    raw_null, value, base = f"n{number}", f"v{number}", number << 3
    checks = []
    if not column.null:
        checks.append(f"WHEN {raw_null} THEN {base | _MISSING}")
    checks.append(f"WHEN NOT {raw_null} AND {value} IS NULL THEN {base | _TYPE}")
    if column.low is not None:
        checks.append(f"WHEN {value} < {_literal(column.low)} THEN {base | _LOW}")
    if column.high is not None:
        checks.append(f"WHEN {value} > {_literal(column.high)} THEN {base | _HIGH}")
    return " ".join(checks)


def _literal(value: float) -> str:
    return f"CAST('{value!r}' AS {'DOUBLE' if isinstance(value, float) else 'BIGINT'})"


def _null(column: Column) -> str:
    return "CAST('nan' AS DOUBLE)" if column.type is ColumnType.FLOAT else _literal(int(column.null_value))


# What is wrong


_LINE: Final = re.compile(r"CSV Error on Line: (\d+)")


@contextmanager
def _no_data_told(name: str) -> Iterator[None]:
    """Turns the engine's errors, which quote the data, into DataError that name a row and a reason."""
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise DataError("the table does not fit the memory of this machine", source=name, code="memory") from None
    except duckdb.Error as error:
        text = str(error)
    else:
        return
    found = _LINE.search(text)
    tail = text.rsplit("Possible", 1)[0][-4000:]
    reasons = {
        "Expected Number of Columns": "another number of columns than the header",
        "unterminated quote": "a quote that is not closed, or stands within a value",
        "unicode": "not UTF-8",
        "Maximum line size": f"a line longer than {limits.TEXT_LINE_BYTES:,} bytes",
    }
    reason = next((reason for phrase, reason in reasons.items() if phrase in tail or phrase in text[:400]), None)
    row = int(found.group(1)) - 1 if found is not None else None
    fallback = "not a readable Parquet file" if name.lower().endswith(_PARQUET) else "cannot be read as a table"
    raise DataError(reason or fallback, source=name, row=row) from None


def _problem(source: str, table: Table, row: int, problem: int) -> DataError:
    if not problem >> 3:
        return DataError("a NUL character", source=source, row=row + 1, column=table.key)
    column, reason = table.columns[(problem >> 3) - 1], problem & 7
    code = "data"
    if reason == _MISSING:
        message = "empty, and the agreement allows no nulls there"
    elif reason == _TYPE:
        if column.type is ColumnType.DECIMAL:
            message = "not a decimal number" + (
                f" of at most {column.scale} digits after the point" if column.scale else ""
            )
        else:
            message = _NOT_OF_TYPE[column.type]
        code = "domain" if column.type is ColumnType.CATEGORY else "data"
    else:
        bound = column.low if reason == _LOW else column.high
        assert bound is not None
        message = f"{'below' if reason == _LOW else 'above'} the agreed {'min' if reason == _LOW else 'max'} ({column.text_of(bound)})"
        code = "range"
    return DataError(message, source=source, row=row + 1, column=column.name, code=code)


# Order


def _without_dropped(rows: list[Array], dropped: Array) -> Array:
    """Removes the dropped rows in place; the row numbers (0..) of those that stay, empty when all stay."""
    if not dropped.any():
        return np.empty(0, dtype=np.int64)
    kept = np.flatnonzero(~dropped)
    for place, values in enumerate(rows):
        rows[place] = values[kept]
    return kept


def _sorted(rows: list[Array], number: Array, table: Table, source: str, threads: int) -> tuple[tuple[Array, ...], int]:
    keys = rows[0].byteswap()
    # 0 and 2^64-1 mean null and padding.
    keys[keys == 0] = 1
    keys[keys == np.uint64(2**64 - 1)] = np.uint64(2**64 - 2)
    order = np.argsort(keys)
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    lengths = np.diff(np.append(starts, len(keys)))
    over = np.flatnonzero(lengths > table.rows_per_unit)
    if over.size:
        # Among the first thousand such units, the first row in the file that is too many.
        segments = (np.sort(order[starts[unit] : starts[unit] + lengths[unit]]) for unit in over[:1000])
        row = min(int(segment[table.rows_per_unit]) for segment in segments)
        row = int(number[row]) if number.size else row
        message = f"one more row than the {table.rows_per_unit} that the agreement allows for one unit"
        raise DataError(message, source=source, row=row + 1, column=table.key, code="multiplicity")
    columns: list[Array] = [keys]
    with ThreadPoolExecutor(threads) as pool:
        for place, taken in enumerate(pool.map(lambda values: values[order], rows[1:])):
            columns.append(taken.astype(table.columns[place].dtype, copy=False))
    return tuple(columns), len(starts)
