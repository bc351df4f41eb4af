"""The engine against DuckDB and Polars: sealed frames from memory to outputs, against the same columns from plaintext.

Ours pulls, checks and opens every frame, and counts what the rules need beside what is asked. Theirs read Arrow tables in
memory, rows in no order. Both use the same number of threads, ours as processes.

    python tests/bench/engine.py [--rows N] [--threads N] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

# Polars reads it once, when it is imported.
os.environ.setdefault("POLARS_MAX_THREADS", "1")

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
from figures import Figure, seconds

from parley_enclave import engine
from support.blobs import Run, Tables, agreement_of, prepare

UNION = 10_000_000
COLUMNS = {
    "score": {"type": "float", "min": -1000, "max": 1000, "null": True},
    "region": {"type": "category", "values": ["north", "south", "east", "west"]},
}
REGISTRY = {"engine": {"type": "category", "values": ["a", "b", "c", "d", "e", "f"]}}
QUERY = """
    select r.engine, e.region, count(*), avg(e.score), stddev_samp(e.score), count(distinct e.unit), count(distinct e.party)
    from events e join registry r using (unit) group by 1, 2
"""


@dataclass
class Case:
    """One computation: sealed and planned for ours, Arrow tables for theirs, rows shuffled."""

    run: Run
    events: pa.Table
    registry: pa.Table


def case(parties: int, rows: int, units: int) -> Case:
    """`rows` of random units and parties, joined with a registry of all `units`."""
    random = np.random.default_rng(7)
    names = [f"p{number:02}" for number in range(parties)]
    identifiers = np.unique(random.integers(1, 2**64 - 1, units, dtype="<u8"))
    # In the first case most units have one row, in the second all have about eight.
    drawn = random.permutation(len(identifiers))[:rows] if rows <= len(identifiers) else random.integers(0, units, rows)
    party = random.integers(0, parties, len(drawn))
    score = random.normal(10, 50, len(drawn)).clip(-1000, 1000)
    score[random.random(len(drawn)) < 0.02] = np.nan
    region = random.integers(1, 5, len(drawn)).astype("u1")
    kind = random.integers(1, 7, len(identifiers)).astype("u1")
    tables: dict[tuple[str, str], Any] = {}
    for number, name in enumerate(names):
        own = np.flatnonzero(party == number)
        own = own[np.argsort(identifiers[drawn[own]], kind="stable")]
        tables[name, "events"] = identifiers[drawn[own]], [score[own], region[own]]
    tables["registry", "units"] = identifiers, [kind]
    shuffled = random.permutation(len(identifiers))
    events = {
        "unit": identifiers[drawn],
        "party": pa.array(party.astype("u1")),
        "score": pa.array(score, mask=np.isnan(score)),
        "region": region,
    }
    registry = {"unit": identifiers[shuffled], "engine": kind[shuffled]}
    return Case(sealed(names, tables), pa.table(events), pa.table(registry))


def sealed(names: list[str], tables: Tables) -> Run:
    """The computation, admitted and planned."""
    agreed = agreement_of(
        [*names, "registry"],
        {
            "events": {"from": names, "key": "id", "rows_per_unit": 100, "columns": COLUMNS},
            "units": {"from": "registry", "key": "id", "rows_per_unit": 1, "columns": REGISTRY},
        },
        {
            "out": {
                "from": "events",
                "join": {"units": "inner"},
                "by": {"engine": "engine", "region": "region"},
                "values": {"rows": "count", "mean": "mean(score)", "sd": "std(score)", "people": "units"},
            }
        },
        {"everyone": {"min_units": 10, "min_parties": 3, "coalition": 1}},
    )
    return prepare(agreed, tables)


_CASE: Case | None = None


def _scan(number: int) -> bytes:
    assert _CASE is not None
    return _CASE.run.scan(number)


def ours(found: Case, pool: ProcessPoolExecutor | None) -> object:
    """All ranges, merged and finished; in this process, or in the workers of the pool."""
    ranges = range(found.run.plan.ranges)
    partials = [found.run.scan(number) for number in ranges] if pool is None else list(pool.map(_scan, ranges))
    return engine.finish(found.run.plan, partials)


def with_duckdb(found: Case, threads: int) -> Callable[[], object]:
    """The query over the Arrow tables."""
    connection = duckdb.connect()
    connection.execute(f"set threads = {threads}")
    connection.register("events", found.events)
    connection.register("registry", found.registry)
    return lambda: connection.execute(QUERY).fetchall()


def with_polars(found: Case) -> Callable[[], object]:
    """The same; Polars takes its number of threads from the environment at import."""
    events, registry = pl.DataFrame(found.events).lazy(), pl.DataFrame(found.registry).lazy()
    plan = (
        events.join(registry, on="unit", how="inner")
        .group_by("engine", "region")
        .agg(
            pl.len(),
            pl.col("score").mean().alias("mean"),
            pl.col("score").std().alias("sd"),
            pl.col("unit").n_unique().alias("people"),
            pl.col("party").n_unique().alias("parties"),
        )
    )
    return lambda: plan.collect()


def compare(found: Case, threads: int, runs: int = 5) -> tuple[float, float, float]:
    """Median seconds of ours, DuckDB and Polars, in turn, after one warm-up each."""
    global _CASE
    _CASE = found
    pool = ProcessPoolExecutor(threads, get_context("fork")) if threads > 1 else None
    works: list[Callable[[], object]] = [partial(ours, found, pool), with_duckdb(found, threads), with_polars(found)]
    for work in works:
        work()
    taken = [[seconds(work) for work in works] for _ in range(runs)]
    if pool is not None:
        pool.shutdown()
    mine, duck, polar = (statistics.median(column) for column in zip(*taken, strict=True))
    return mine, duck, polar


def figures(rows: list[int], threads: int = 1) -> list[Figure]:
    """A join of n with n rows of four parties for each size; 17 tables, 10 M rows."""
    found = []
    cases = [(f"{size / 1e6:g} M ⨝ {size / 1e6:g} M rows", 4, size, size, "≤ 1.0") for size in rows]
    cases.append(("17 tables, 10 M rows, 8 rows a unit ⨝ registry", 16, UNION, UNION // 8, "≤ 0.7 of DuckDB"))
    for what, parties, count, units, goal in cases:
        mine, duck, polar = compare(case(parties, count, units), threads)
        found.append(Figure(what, mine, duck, "s", f"DuckDB, {threads} thread(s)", goal))
        found.append(Figure(what, mine, polar, "s", f"Polars, {threads} thread(s)", goal))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--parties", type=int, default=4)
    parser.add_argument("--units", type=int, default=0, help="as many as rows where it is left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    found = case(options.parties, options.rows, options.units or options.rows)
    if options.profile:
        ours(found, None)
        cProfile.runctx("ours(found, None)", globals(), {"found": found}, sort="tottime")
        return
    mine, duck, polar = compare(found, options.threads, options.runs)
    print(f"ours {mine:.3f} s, DuckDB {duck:.3f} s ({mine / duck:.2f}), Polars {polar:.3f} s ({mine / polar:.2f})")


if __name__ == "__main__":
    main()
