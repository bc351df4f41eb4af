"""A party's table, read: every way in, every way to be wrong, and nothing of the data in an error."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc

from parley.normalise import SPACES, normalised
from parley.reading import PreparedTable, read_table
from parley_protocol.agreement.model import Normalise, Unit
from parley_protocol.agreement.schema import Column, ColumnType, Table
from parley_protocol.errors import DataError
from parley_protocol.transcript import unit_salt

SERIES = bytes(range(48))
UNIT = Unit("person", Normalise.EXACT)
TABLE = Table(
    "staff",
    ("a",),
    "id",
    2,
    (
        Column("age", ColumnType.INT, null=True, low=0, high=150),
        Column("pay", ColumnType.DECIMAL, null=True, low=-100_000, high=10**12, scale=2),
        Column("score", ColumnType.FLOAT, null=True, low=-1e3, high=1e3),
        Column("member", ColumnType.BOOL, null=True),
        Column("rank", ColumnType.CATEGORY, null=True, values=("assistant", "full", "it's", "NA")),
        Column("born", ColumnType.DATE, null=True, low=-36525, high=36525),
        Column("seen", ColumnType.TIMESTAMP, null=True, low=0, high=4 * 10**15),
    ),
)
HEADER = "id,age,pay,score,member,rank,born,seen\n"
GOOD = 'x,17,12.50,1.5,true,full,1970-01-02,1970-01-01T00:00:01.5Z\n"y ""q""",,,,,,,\n'


def key_of(identifier: str, unit: Unit = UNIT) -> int:
    digest = hashlib.sha256(unit_salt(SERIES, unit.name) + identifier.encode()).digest()
    return min(max(int.from_bytes(digest[:8], "little"), 1), 2**64 - 2)


def read(path: object, table: Table = TABLE, unit: Unit = UNIT) -> PreparedTable:
    return read_table(path, table, unit, SERIES, threads=2)


def write(folder: Path, text: str | bytes, name: str = "staff.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows_of(prepared: PreparedTable) -> dict[int, tuple[object, ...]]:
    return {int(row[0]): tuple(row[1:]) for row in zip(*(column.tolist() for column in prepared.columns), strict=True)}


def test_every_type_of_column(tmp_path: Path) -> None:
    prepared = read(write(tmp_path, HEADER + GOOD))
    assert (prepared.rows, prepared.dropped, prepared.units, prepared.ignored) == (2, 0, 2, ())
    assert [column.dtype.str.lstrip("|") for column in prepared.columns[1:]] == [
        column.dtype for column in TABLE.columns
    ]
    rows = rows_of(prepared)
    assert rows[key_of("x")] == (17, 1250, 1.5, 1, 2, 1, 1_500_000)
    nulls = rows[key_of('y "q"')]
    assert np.isnan(nulls[2])  # type: ignore[call-overload]
    assert nulls[:2] + nulls[3:] == tuple(c.null_value for c in TABLE.columns if c.name != "score")


IN_A_PROMPT = """
import sys
import duckdb
from parley import reading
from parley_protocol.agreement.model import Normalise, Unit
from parley_protocol.agreement.schema import Table

ASKED = "SELECT current_setting('enable_progress_bar')"
real = reading._read

def spied(connection, *rest):
    print(connection.execute(ASKED).fetchone()[0])
    return real(connection, *rest)

reading._read = spied
print(duckdb.connect().execute(ASKED).fetchone()[0])
reading.read_table(sys.argv[1], Table("staff", ("a",), "id", 2, ()), Unit("person", Normalise.EXACT), bytes(48))
"""


def test_the_engine_shows_no_bar_of_its_own(tmp_path: Path) -> None:
    """It would in a notebook or a prompt, where the main module has no file, on the standard output of whoever uses the library."""
    command = [sys.executable, "-c", IN_A_PROMPT, str(write(tmp_path, "id\nx\n"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"], "the engine's own default; what it is told here"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_bom_line_ends_delimiters_and_quotes(tmp_path: Path, start: str, ending: str, delimiter: str) -> None:
    text = start + (HEADER + GOOD).replace(",", delimiter).replace("\n", ending)
    assert rows_of(read(write(tmp_path, text)))[key_of("x")][:2] == (17, 1250)


def test_columns_in_any_order_and_others_are_left_out(tmp_path: Path) -> None:
    table = Table("t", ("a",), "id", 1, TABLE.columns[:1])
    prepared = read(write(tmp_path, 'secret,age,"id"\nhush,1,x\nhush,2,y\n'), table)
    assert prepared.ignored == ("secret",)
    assert rows_of(prepared) == {key_of("x"): (1,), key_of("y"): (2,)}


def test_quoted_line_breaks_and_gzip(tmp_path: Path) -> None:
    import gzip

    table = Table("t", ("a",), "id", 1, TABLE.columns[:1])
    path = write(tmp_path, gzip.compress(b'id,age\n"x\ny",3\n'), "t.csv.gz")
    assert rows_of(read(path, table)) == {key_of("x\ny"): (3,)}


def test_rows_without_identifier_are_dropped_and_counted(tmp_path: Path) -> None:
    text = HEADER + GOOD + ',"not even a number",,,,,,\n"",,,,,,,\n'
    prepared = read(write(tmp_path, text))
    assert (prepared.rows, prepared.dropped) == (2, 2)


def test_rows_are_sorted_by_key_and_stay_together(tmp_path: Path) -> None:
    number = 5000
    text = "id,age\n" + "".join(f"p{i % 2500},{i % 2500 % 150}\n" for i in range(number))
    prepared = read(write(tmp_path, text), Table("t", ("a",), "id", 2, TABLE.columns[:1]))
    keys, ages = prepared.columns
    assert (keys[1:] >= keys[:-1]).all()
    assert (prepared.rows, prepared.units) == (number, 2500)
    wanted = {key_of(f"p{i}"): i % 150 for i in range(2500)}
    assert all(wanted[int(key)] == age for key, age in zip(keys, ages, strict=True))


SECRET = "hushhush"

BAD = {
    "wrong type": ("age", SECRET, "not a whole number", "data"),
    "rounded": ("age", "1.5", "not a whole number", "data"),
    "underscore": ("age", "1_0", "not a whole number", "data"),
    "hexadecimal": ("age", "0x1F", "not a whole number", "data"),
    "exponent": ("age", "1e1", "not a whole number", "data"),
    "too large for 64 bits": ("age", "99999999999999999999", "not a whole number", "data"),
    "below": ("age", "-7", "below the agreed min (0)", "range"),
    "above": ("age", "151", "above the agreed max (150)", "range"),
    "too many places": ("pay", "1.239", "at most 2 digits", "data"),
    "decimal exponent": ("pay", "1e2", "at most 2 digits", "data"),
    "decimal above": ("pay", "10000000000.01", "above the agreed max (10000000000.00)", "range"),
    "float": ("score", "1,5", "not a number", "data"),
    "nan": ("score", "NaN", "not a number", "data"),
    "inf": ("score", "-inf", "not a number", "data"),
    "float underscore": ("score", "1_0.5", "not a number", "data"),
    "float above": ("score", "1000.0001", "above the agreed max (1000)", "range"),
    "bool": ("member", "yes", "neither true nor false", "data"),
    "category": ("rank", SECRET, "not one of the values", "domain"),
    "category case": ("rank", "Full", "not one of the values", "domain"),
    "date": ("born", "2.1.1970", "not a date", "data"),
    "no such day": ("born", "1970-02-30", "not a date", "data"),
    "date above": ("born", "2970-01-01", "above the agreed max (2070-01-01)", "range"),
    "time": ("seen", "1970-01-01 25:00:00", "not a time in UTC", "data"),
    "time with offset": ("seen", "1970-01-01T00:00:00+02:00", "not a time in UTC", "data"),
    "10 MB cell": ("rank", SECRET * 1_250_000, "a line longer than 2,000,000 bytes", "data"),
    "1 MB cell": ("rank", SECRET * 125_000, "not one of the values", "domain"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_named_by_file_row_and_column_and_not_shown(tmp_path: Path, case: str) -> None:
    column, value, message, code = BAD[case]
    cells = ["p", *("" for _ in TABLE.columns)]
    cells[1 + [c.name for c in TABLE.columns].index(column)] = f'"{value}"'
    path = write(tmp_path, HEADER + GOOD + ",".join(cells) + "\n" + f"{SECRET},,,,,,,\n")
    with pytest.raises(DataError) as caught:
        read(path)
    error = caught.value
    assert message in str(error)
    assert str(error).startswith("staff.csv, row 3, " if "line" not in message else "staff.csv, row 3: ")
    assert (error.row, error.code) == (3, code)
    assert error.column == (column if "line" not in message else None)
    assert error.__suppress_context__ or error.__context__ is None
    assert SECRET not in str(error)
    assert value not in str(error) or value in ("1.5", "-7")


BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "blank": (b"\n\n", "the file is empty"),
    "no rows": (HEADER.encode(), "the table has no rows"),
    "no header": (GOOD.encode(), "no such column"),
    "missing column": (b"id,age\nx,1\n", "column 'pay': no such column"),
    "other case": (HEADER.replace("id", "ID").encode() + GOOD.encode(), "column 'id': no such column; there is 'ID'"),
    "header twice": (
        HEADER.replace("age", "age,age").encode() + GOOD.encode(),
        "column 'age': the header names it twice",
    ),
    "few cells": ((HEADER + GOOD + SECRET + "\n").encode(), "row 3: another number of columns than the header"),
    "many cells": ((HEADER + GOOD + SECRET + ",,,,,,,,1\n").encode(), "row 3: another number of columns"),
    "open quote": ((HEADER + GOOD + '"' + SECRET + ",,,,,,,\n" + GOOD).encode(), "a quote that is not closed"),
    "quote within": ((HEADER + GOOD + '"' + SECRET + '"x,,,,,,,\n').encode(), "row 3: a quote that is not closed"),
    "latin-1": (HEADER.encode() + b"hushhush\xe9,,,,,,,\n", "row 1: not UTF-8"),
    "utf-16": ("\ufeff".encode("utf-16-le") + HEADER.encode("utf-16-le"), "UTF-16; save it as UTF-8"),
    "only dropped rows": (HEADER.encode() + b",1,,,,,,\n", "no row has an identifier"),
    "open quote in the header": (b'"id,age\n', "the header has an open quote"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_without_its_data(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, content))
    assert message in str(caught.value)
    assert str(caught.value).startswith("staff.csv")
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_null_where_none_is_allowed(tmp_path: Path) -> None:
    table = Table("t", ("a",), "id", 1, (Column("age", ColumnType.INT, low=0, high=9),))
    with pytest.raises(
        DataError, match=r"staff.csv, row 2, column 'age': empty, and the agreement allows no nulls there"
    ):
        read(write(tmp_path, "id,age\nx,1\ny,\n"), table)


def test_more_rows_of_a_unit_than_agreed(tmp_path: Path) -> None:
    table = Table("t", ("a",), "id", 2, (Column("age", ColumnType.INT, low=0, high=9),))
    text = "id,age\nx,1\n,1\ny,1\nx,2\nz,1\nx,1\nx,1\n"
    with pytest.raises(
        DataError, match=r"row 6, column 'id': one more row than the 2 that the agreement allows"
    ) as caught:
        read(write(tmp_path, text), table)
    assert caught.value.code == "multiplicity"


@pytest.mark.parametrize("name", ["missing.csv", "staff.xlsx", "staff.parquet", "staff.arrow"])
def test_files_that_are_no_tables(tmp_path: Path, name: str) -> None:
    if not name.startswith("missing"):
        write(tmp_path, b"hushhush", name)
    with pytest.raises(DataError, match=r"no such file|not a"):
        read(tmp_path / name)


def test_an_identifier_with_a_nul(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"staff.csv, row 3, column 'id': a NUL character"):
        read(write(tmp_path, HEADER + GOOD + "hush\0hush,,,,,,,\n"))


def test_not_a_table_at_all() -> None:
    with pytest.raises(DataError, match="__arrow_c_stream__"):
        read([1, 2])


FRAME = pd.DataFrame(
    {
        "id": ["x", "y", None],
        "age": [17.0, None, 1.0],  # how pandas keeps whole numbers beside nulls
        "pay": [12.0, None, 1.0],
        "score": [1.5, None, 2.0],
        "member": pd.array([True, None, False], dtype="boolean"),
        "rank": pd.Categorical(["full", None, "NA"]),
        "born": pd.to_datetime(pd.Series(["1970-01-02", None, "1970-01-01"])),
        "seen": pd.to_datetime(pd.Series(["1970-01-01T00:00:01.5", None, "1970-01-01"]), format="ISO8601"),
        "more": [1, 2, 3],
    }
)


def _sources(folder: Path) -> dict[str, object]:
    arrow = pa.Table.from_pandas(FRAME)
    FRAME.to_parquet(folder / "staff.parquet")
    with ipc.new_file(str(folder / "staff.arrow"), arrow.schema) as file:
        file.write_table(arrow)

    class Stream:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return arrow.__arrow_c_stream__(requested_schema)

    exact = pl.from_arrow(arrow)
    assert isinstance(exact, pl.DataFrame)
    typed = exact.with_columns(
        pl.col("age").cast(pl.Int16), pl.col("pay").cast(pl.Decimal(10, 3)), pl.col("born").cast(pl.Date)
    )
    return {
        "pandas": FRAME,
        "arrow": arrow,
        "polars": typed,
        "reader": arrow.to_reader(),
        "capsule": Stream(),
        "parquet": folder / "staff.parquet",
        "arrow file": str(folder / "staff.arrow"),
    }


@pytest.mark.parametrize("kind", ["pandas", "arrow", "polars", "reader", "capsule", "parquet", "arrow file"])
def test_frames_and_typed_files(tmp_path: Path, kind: str) -> None:
    prepared = read(_sources(tmp_path)[kind])
    rows = rows_of(prepared)
    assert (prepared.rows, prepared.dropped, prepared.ignored) == (2, 1, ("more",))
    assert rows[key_of("x")] == (17, 1200, 1.5, 1, 2, 1, 1_500_000)
    assert rows[key_of("y")][0] == TABLE.columns[0].null_value


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("age", [1.5], "row 1, column 'age': not a whole number"),
        ("age", [1e300], "not a whole number"),
        ("pay", [1.15], "not a decimal number"),
        ("score", [float("inf")], "not a number"),
        ("rank", [1.5], "not one of the values"),
        ("member", [2], "neither true nor false"),
        ("born", pd.to_datetime(["1970-01-02T01:00:00"]), "not a date"),
        ("born", ["hushhush"], "not a date"),
        ("seen", [1], "a timestamp cannot come from BIGINT"),
        ("age", [b"hushhush"], "an? int cannot come from BLOB"),
        ("age", [[1, 2]], "an? int cannot come from"),
    ],
)
def test_frames_that_are_not_as_agreed(column: str, values: list[Any], message: str) -> None:
    frame = pd.DataFrame({"id": ["x"], **{c.name: pd.array([None], dtype="string") for c in TABLE.columns}})
    frame[column] = values
    with pytest.raises(DataError, match=message) as caught:
        read(frame)
    assert SECRET not in str(caught.value)


def test_identifiers_that_are_numbers() -> None:
    table = Table("t", ("a",), "id", 1, (Column("age", ColumnType.INT, low=0, high=9),))
    for ids in ([12, 7], [12.0, 7.0], pd.array([12, 7], dtype="UInt8")):
        assert set(rows_of(read(pd.DataFrame({"id": ids, "age": [1, 2]}), table))) == {key_of("12"), key_of("7")}
    with pytest.raises(DataError, match="an identifier is text or whole numbers, not DATE"):
        read(pl.DataFrame({"id": pl.Series([1, 2]).cast(pl.Date), "age": [1, 2]}), table)


def test_decimals_never_pass_through_a_float(tmp_path: Path) -> None:
    table = Table("t", ("a",), "id", 1, (Column("x", ColumnType.DECIMAL, low=-(2**62), high=2**62, scale=4),))
    text = "id,x\na,0.0001\nb,-0.05\nc,461168601842738.7903\nd,+3.\ne,00.10000000\nf,-7\n"
    rows = rows_of(read(write(tmp_path, text), table))
    wanted = {"a": 1, "b": -500, "c": 4611686018427387903, "d": 30000, "e": 1000, "f": -70000}
    assert rows == {key_of(name): (value,) for name, value in wanted.items()}


def test_a_large_domain(tmp_path: Path) -> None:
    values = tuple(f"code {number:05}" for number in range(70_000))
    table = Table("t", ("a",), "id", 1, (Column("x", ColumnType.CATEGORY, values=values),))
    prepared = read(write(tmp_path, "id,x\na,code 69999\nb,code 00000\n"), table)
    assert prepared.columns[1].dtype == np.uint32
    assert rows_of(prepared) == {key_of("a"): (70_000,), key_of("b"): (1,)}


# Identifiers


def reference(text: str, rule: Normalise) -> str:
    """The normalisation of SPEC in plain Python."""
    if rule is Normalise.EXACT:
        return unicodedata.normalize("NFC", text)
    if rule in (Normalise.CASEFOLD, Normalise.EMAIL):
        folded = "".join(fold_one(c) for c in unicodedata.normalize("NFC", text).strip())
        return unicodedata.normalize("NFC", folded)
    digits = "".join(c for c in text if c in "0123456789")
    return digits.removeprefix("00") if rule is Normalise.PHONE else digits


def fold_one(character: str) -> str:
    return character.casefold()


def engine(texts: list[str], rule: Normalise) -> list[str]:
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("texts", pa.table({"t": pa.array(texts, pa.string())}))
        return [row[0] for row in connection.execute(f"SELECT {normalised('t', rule)} FROM texts").fetchall()]


TEXTS = st.text(
    st.one_of(
        st.sampled_from("abcXYZ019+-() .@" + SPACES + "ßẞſıİŉΐᾳςΣΑµÅÅéＡꭰᎠﬁΌ\u0301\u0308\u0345\u0130"),
        st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\0"),
    ),
    max_size=12,
)


@pytest.mark.parametrize("rule", list(Normalise))
@settings(max_examples=60)
@given(texts=st.lists(TEXTS, min_size=1, max_size=20))
def test_normalisation_is_that_of_the_reference(rule: Normalise, texts: list[str]) -> None:
    assert engine(texts, rule) == [reference(text, rule) for text in texts]


def test_every_character_folds_as_in_the_reference() -> None:
    characters = [c for c in map(chr, range(1, 0x110000)) if unicodedata.category(c) not in ("Cs", "Cn")]
    for start in range(0, len(characters), 65536):
        part = [f"<{c}>" for c in characters[start : start + 65536]]
        found = engine(part, Normalise.CASEFOLD)
        assert found == [reference(text, Normalise.CASEFOLD) for text in part]


@pytest.mark.parametrize(
    ("rule", "same"),
    [
        (Normalise.EMAIL, ["Ann.Lee@Example.com", " ann.lee@example.COM ", "ANN.LEE@EXAMPLE.COM\t"]),
        (Normalise.CASEFOLD, ["Straße", "STRASSE", " strasse"]),
        (Normalise.PHONE, ["+49 (170) 12-34", "0049170 1234", "49170/1234"]),
        (Normalise.DIGITS, ["007-12", "00712", " 0 0 7 1 2"]),
    ],
)
def test_spellings_of_one_unit_are_one_unit(tmp_path: Path, rule: Normalise, same: list[str]) -> None:
    unit = Unit("person", rule)
    table = Table("t", ("a",), "id", 9, (Column("age", ColumnType.INT, low=0, high=9),))
    prepared = read(write(tmp_path, "id,age\n" + "".join(f'"{text}",1\n' for text in same)), table, unit)
    assert prepared.units == 1
    assert int(prepared.columns[0][0]) == key_of(reference(same[0], rule), unit)


def test_nothing_of_the_data_in_repr(tmp_path: Path) -> None:
    prepared = read(write(tmp_path, HEADER + GOOD))
    assert "1250" not in repr(prepared)
    assert str(key_of("x")) not in repr(prepared)


def test_the_engine_has_no_folder_for_rows_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    connect = duckdb.connect

    def connecting(*arguments: Any, **options: Any) -> duckdb.DuckDBPyConnection:
        made = connect(*arguments, **options)
        folders.append(made.execute("SELECT current_setting('temp_directory')").fetchall())
        return made

    monkeypatch.setattr(duckdb, "connect", connecting)
    read(write(tmp_path, HEADER + GOOD))
    assert folders == [[("",)]]
