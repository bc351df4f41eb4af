"""Sealing a file, from its bytes to a blob that is on the disk, against DuckDB's own read, SHA-256 and sort of the same file.

One string key and four numeric columns; the same number of threads; Parquet and CSV. DuckDB reads, hashes and sorts as it
does best, and writes nothing; ours also checks every value, encrypts, digests, signs and syncs.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import duckdb
from figures import Figure, paired

from parley.disk import Vault
from parley.reading import prepare
from parley.sealing import seal
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.schema import Column, ColumnType, Table
from parley_protocol.claims import verify_offer
from support.world import NONCE, NOW, Paper, World, world

COLUMNS = (
    Column("amount", ColumnType.DECIMAL, True, 0, 10_000_000, 2),
    Column("score", ColumnType.FLOAT, True, -100.0, 100.0),
    Column("visits", ColumnType.INT, False, 0, 1000),
    Column("weight", ColumnType.FLOAT, False, 0.0, 1.0),
)
MOST = 3_000_000
"""More rows change nothing in the ratio and fill the disk of a small machine."""
READ = """
    create or replace temp table sorted as
    select sha256(id) as key, amount, score, visits, weight from '{file}' order by key
"""


def agreement_of(made: World) -> Agreement:
    """The agreement of the world with a table of one key and four numbers."""
    table = Table("visits", ("ada", "bea"), "id", 100, COLUMNS)
    output = made.agreement.outputs["by_site"]
    values = tuple(replace(value, ref=None if value.ref is None else table.ref("amount")) for value in output.values)
    return replace(
        made.agreement, tables={"visits": table}, outputs={"by_site": replace(output, by=(), where=None, values=values)}
    )


def figures(rows: list[int]) -> list[Figure]:
    """Rows a second of a core would hide the file format, so each format and size has a row of seconds."""
    made = world()
    agreement = agreement_of(made)
    paper = Paper(agreement, made.root)
    offer = verify_offer(
        agreement, paper.offer.to_bytes(), paper.attest(), nonce=NONCE, head=paper.offer.head, now_ms=NOW + 1000
    )
    threads = len(os.sched_getaffinity(0))
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in sorted({min(size, MOST) for size in rows}):
            for kind, options in (("parquet", "format parquet"), ("csv", "format csv, header")):
                file = folder / f"{count}.{kind}"
                with duckdb.connect(config={"threads": threads}) as connection:
                    connection.execute(
                        f"""copy (select 'unit-' || (hash(i) % {count * 4 // 5}) as id,
                            ((random() * 1000000)::bigint / 100)::decimal(12, 2) as amount, random() * 200 - 100 as score,
                            (random() * 1000)::int as visits, random() as weight from range({count}) t(i))
                            to '{file}' ({options})"""
                    )

                def ours(file: Path = file) -> None:
                    prepared = prepare(file, agreement, "visits", threads=threads)
                    spool = Path(tempfile.mkdtemp(dir=folder))
                    identity = made.members["ada"]
                    seal(prepared, offer, "ada", identity, Vault(identity), spool, source=bytes(32), threads=threads)

                def theirs(file: Path = file) -> None:
                    with duckdb.connect(config={"threads": threads}) as connection:
                        connection.execute(READ.format(file=file))

                mine, duck = paired(ours, theirs, runs=3)
                what = f"seal {count:,} rows of a key and 4 numbers, {kind}"
                found.append(Figure(what, mine, duck, "s", "DuckDB read + sha256 + sort", "<= 1.3"))
                file.unlink()
    return found
