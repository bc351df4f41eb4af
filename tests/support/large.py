"""A large table on its whole way: a member's file, sealed by the client in a process of its own, kept by the coordinator, opened by
an enclave, which computes on every row. What comes out is checked against DuckDB on the file."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import duckdb

from parley import Member, connect
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.model import Agreement, Function, Output, Value
from parley_protocol.agreement.schema import Column, ColumnType
from parley_protocol.table import Layout
from support import load
from support.client import Members
from support.load import Peak

MOST = 1000
"""Values are 0 to MOST - 1: their file is a sixth of what they take when they are sealed."""
ROWS_PER_UNIT = 8
OTHERS_ROWS = 4096
SUMMED = 16
"""Columns that are computed on: with more a window would not fit the enclave's memory, and be refused. It opens all."""
OOM_SCORE = 900
"""Where memory runs out the process that seals ends, and no other one."""


@dataclass(frozen=True)
class Way:
    """What one table took: seconds of each step, and the greatest memory of each process."""

    rows: int
    size: int
    """Bytes of the sealed table."""
    seal_s: float
    upload_s: float
    join_s: float
    """The enclave pulls, checks and opens every frame."""
    compute_s: float
    """And once more, to compute; from the last countersignature to the release."""
    client: int
    coordinator: Peak
    enclave: int
    """Sum of PSS over its processes."""


def wide(agreement: Agreement, columns: int) -> Agreement:
    """The agreement with a table of a key and whole numbers, some of which are summed."""
    table = replace(
        agreement.tables["visits"],
        rows_per_unit=ROWS_PER_UNIT,
        columns=tuple(Column(f"v{number:02}", ColumnType.INT, False, 0, MOST - 1) for number in range(columns)),
    )
    sums = []
    for column in table.columns[:SUMMED]:
        ref = table.ref(column.name)
        assert ref is not None
        sums.append(Value(column.name, Function.SUM, ref))
    output: Output = replace(
        agreement.outputs["by_site"],
        by=(),
        values=(Value("rows", Function.COUNT), Value("people", Function.UNITS), *sums),
    )
    return replace(agreement, tables={"visits": table}, outputs={"by_site": output})


def write(path: Path, seed: int, rows: int, columns: int) -> None:
    """A Parquet file for such a table, its rows in no order."""
    values = ", ".join(
        f"((hash(i + {seed * rows}) >> {number % 48}) % {MOST})::smallint as v{number:02}" for number in range(columns)
    )
    with _duckdb() as connection:
        # 104,729 is prime and no divisor of the rows: each number once, far from its neighbours.
        connection.execute(
            f"copy (select 'unit {seed}-' || ((i * 104729) % {rows} // {ROWS_PER_UNIT}) as id, {values}"
            f" from range({rows}) t(i)) to '{path}' (format parquet, row_group_size 65536)"
        )


def _duckdb() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"threads": 2, "memory_limit": "2GB"})
    connection.execute("set enable_progress_bar = false")
    return connection


def sums(paths: Sequence[Path], columns: int) -> list[int]:
    """Rows, units and the sums of columns, by DuckDB."""
    wanted = ", ".join(f"sum(v{number:02})::bigint" for number in range(min(columns, SUMMED)))
    with _duckdb() as connection:
        found = connection.execute(
            f"select count(*), count(distinct id), {wanted} from read_parquet({[str(path) for path in paths]})"
        ).fetchone()
    assert found is not None
    return [int(value) for value in found]


def travel(made: Members, rows: int, columns: int) -> Way:
    """The first member brings so many rows, the second a few; from the files to the release."""
    big, small = list(made.members)[:2]
    agreement = wide(made.agreement, columns)
    made.sign(agreement)
    session = made.connect(big).open(agreement)
    files = {name: made.folder / f"{name}.parquet" for name in (big, small)}
    write(files[big], 1, rows, columns)
    write(files[small], 2, OTHERS_ROWS, columns)
    made.connect(small).session(session.id).submit({"visits": files[small]})
    assert made.coordinator.process is not None
    with load.memory(made.coordinator.process.pid) as memory, _enclave(made.coordinator.enclave_pid()) as enclave:
        brought = _bring(made, big, agreement, files[big])
        session.start()
        made.connect(small).session(session.id).countersign()
        begun = time.monotonic()
        session.countersign()
        status = session.wait(timeout_s=3600)
        compute_s = time.monotonic() - begun
    assert status.phase == "released", status
    (row,) = session.release()["by_site"].rows
    assert [int(value) for value in row.values()] == sums(list(files.values()), columns)
    layout = Layout.of(load.header_of(agreement, big, rows), agreement.tables["visits"].widths)
    return Way(rows, layout.size, *brought[:3], compute_s, int(brought[3]), memory, enclave.most)


def _bring(made: Members, name: str, agreement: Agreement, file: Path) -> tuple[float, float, float, float]:
    """Seals, uploads and joins in a process of its own: seconds of each, and its greatest memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    where = made.coordinator.address, made.coordinator.folder / "tls.crt"
    process = context.Process(target=_member, args=(theirs, made.members[name].path, where, agreement.canonical, file))
    process.start()
    theirs.close()
    try:
        told: tuple[float, float, float, float] = ours.recv()
    except EOFError:
        raise AssertionError(f"the process that seals ended with {process.exitcode}") from None
    finally:
        process.join()
    return told


def _member(pipe: Connection, key: Path, where: tuple[str, Path], canonical: bytes, file: Path) -> None:
    Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    connection = connect(where[0], Member.load(key), where[1])
    session = connection.session(parse(canonical))
    moments = [time.monotonic()]
    sealed = session.seal({"visits": file})
    moments.append(time.monotonic())
    session.upload(sealed)
    moments.append(time.monotonic())
    session.join(sealed)
    moments.append(time.monotonic())
    connection.close()
    seconds = [end - begin for begin, end in pairwise(moments)]
    pipe.send((*seconds, float(load.resident(multiprocessing.current_process().pid or 0, "VmHWM"))))


@contextmanager
def _enclave(pid: int) -> Iterator[Peak]:
    """The greatest sum of PSS of a process and its descendants while a block runs."""
    with load.memory(pid, _pss_of_all) as found:
        yield found


def _pss_of_all(root: int) -> int:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    waiting, total = [root], 0
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total
