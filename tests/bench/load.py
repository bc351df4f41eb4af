"""A coordinator under load: 200 members in one session before 1,000 watchers, 64 uploads at a time, one table of 5 GB, 500
sessions in the store, and slow callers. Figures are absolute, beside what the same coordinator does without the load.

State is in SQLite and blobs in a folder; with PARLEY_LOAD_STORE=postgres in a PostgreSQL that syncs and in a server that speaks
S3, both started here. The large table is a file of random values, sealed by the client library, opened and computed on by an
enclave; PARLEY_LOAD_TABLE says how many bytes it has when it is sealed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from figures import Figure

from support import large, load, postgres, s3
from support.client import members
from support.load import Stage, Watchers

MEMBERS, WATCHERS = 200, 1000
UPLOADS, UPLOAD_BYTES = 64, 64 << 20
TABLE_BYTES = 5_000_000_000
S3_TABLE_BYTES = 250_000_000
"""The server for S3 reads a whole object for each range of it that is asked for."""
COLUMNS = 59
SESSIONS = (5, 500)
SLOW = 200
MIB = 2**20


@dataclass(frozen=True)
class Kept:
    """Where the coordinators of one run keep what they have."""

    database: Callable[[], str | None]
    """A new one, for each coordinator."""
    blobs: str
    toml: str
    table_bytes: int


def session(stage: Stage) -> list[Figure]:
    """A whole session of all members, while all watch."""
    transport = stage.transport()
    quiet = load.latencies(transport.inbox, 50)
    found = []
    with load.memory(stage.pid) as memory, stage.crowd() as crowd:
        crowd.all("connect")
        begun = time.monotonic()
        crowd.all("sign")
        crowd.all("upload")
        before = time.monotonic() - begun
        watchers = Watchers(stage, list(stage.members), WATCHERS, load.last_event(stage.coordinator.database) - 1)
        try:
            begun = time.monotonic()
            running = load.opened(stage)
            with load.asking(transport, running) as took:
                for deed in ("join", "countersign", "fetch"):
                    if deed == "countersign":
                        load.started(stage, running)
                    told = crowd.all(deed, running)
                    if deed == "countersign":
                        load.released(stage, running)
                    slowest = max(one.seconds for one in told)
                    found.append(Figure(f"{MEMBERS} members {deed} at once: the last", slowest, None, "s", "", "-"))
            watched = watchers.stop(load.last_event(stage.coordinator.database))
            whole = time.monotonic() - begun
        finally:
            watchers.kill()
    transport.close()
    assert (watched.errors, watched.disorder, watched.behind) == ([], 0, 0), watched.errors[:3]
    waits = watched.waits
    mine = [load.quantile(took, share) * 1000 for share in (0.5, 0.99)]
    return [
        Figure(f"{MEMBERS} members sign and upload", before, None, "s", "", "-"),
        *found,
        Figure(f"opened to fetched by {MEMBERS}, {WATCHERS} watchers", whole, None, "s", "", "no error"),
        Figure("events to watchers", watched.events, None, "events", "each once and in order", "all"),
        Figure("event to watcher, p50", load.quantile(waits, 0.5), None, "s", "", "-"),
        Figure("event to watcher, p99", load.quantile(waits, 0.99), None, "s", "", "-"),
        Figure("inbox and status meanwhile, p50", mine[0], load.median_ms(quiet), "ms", "without load", "-"),
        Figure(
            "inbox and status meanwhile, p99", mine[1], load.quantile(quiet, 0.99) * 1000, "ms", "without load", "-"
        ),
        Figure("coordinator's peak RSS", memory.most / MIB, memory.before / MIB, "MiB", "before", "-"),
    ]


def uploads(stage: Stage, folder: Path) -> list[Figure]:
    """Many uploads at once."""
    rows, size = load.rows_for(stage.agreement, UPLOAD_BYTES)
    blob = folder / "noise"
    load.noise(blob, size)
    transport = stage.transport()
    names = list(stage.members)
    with stage.crowd(names[:1]) as crowd:
        (alone,) = crowd.stream(blob, rows)
    with stage.crowd(names[:UPLOADS]) as crowd, load.memory(stage.pid) as memory, load.asking(transport) as took:
        told = crowd.stream(blob, rows)
        client = crowd.peak()
    transport.close()
    blob.unlink()
    wall = max(one.ended for one in told) - min(one.begun for one in told)
    what = f"{UPLOADS} uploads of {size / 1e6:.0f} MB"
    rate = UPLOADS * size / 1e6 / wall
    return [
        Figure(f"{what}, together", rate, size / 1e6 / alone.seconds, "MB/s", "one alone", "-"),
        Figure(f"{what}: slowest / fastest", load.spread(told), None, "x", "", "-"),
        Figure(f"{what}: least share sent when half are done", load.least_share(told, 0.5), None, "", "", ">= 0.1"),
        Figure(
            f"{what}: coordinator's peak RSS", memory.most / MIB, memory.before / MIB, "MiB", "before", "<= 16 MiB each"
        ),
        Figure(f"{what}: client's peak, {UPLOADS // load.PROCESSES} in a process", client / MIB, None, "MiB", "", "-"),
        Figure("inbox meanwhile, p50", load.quantile(took, 0.5) * 1000, None, "ms", "", "-"),
        Figure("inbox meanwhile, p99", load.quantile(took, 0.99) * 1000, None, "ms", "", "-"),
    ]


def table(folder: Path, kept: Kept) -> list[Figure]:
    """One large table: sealed, uploaded, opened, computed on."""
    with members(folder, ("ann", "bob"), toml=kept.toml, database=kept.database(), blobs=kept.blobs) as made:
        rows, size = load.rows_for(large.wide(made.agreement, COLUMNS), kept.table_bytes)
        way = large.travel(made, rows, COLUMNS)
        assert "rpc-failed" not in made.coordinator.log
    assert way.size == size
    what = f"table of {size / 1e9:.2f} GB ({rows:,} rows, {COLUMNS} columns)"
    mb = size / 1e6
    return [
        Figure(f"{what}: read and sealed by the client", mb / way.seal_s, None, "MB/s", "", "no error"),
        Figure(f"{what}: uploaded", mb / way.upload_s, None, "MB/s", "", "no error"),
        Figure(f"{what}: opened by the enclave", mb / way.join_s, None, "MB/s", "", "no error"),
        Figure(f"{what}: {large.SUMMED} columns summed, to the release", way.compute_s, None, "s", "", "as DuckDB's"),
        Figure(
            f"{what}: coordinator's peak RSS",
            way.coordinator.most / MIB,
            way.coordinator.before / MIB,
            "MiB",
            "before",
            "-",
        ),
        Figure(f"{what}: enclave's peak PSS, 1 worker", way.enclave / MIB, None, "MiB", "", "<= 250 MiB"),
        Figure(f"{what}: client's peak RSS", way.client / MIB, size / MIB, "MiB", "the sealed table", "-"),
    ]


def slow(stage: Stage) -> list[Figure]:
    """Connections and calls that are slow on purpose, and messages that are too large."""
    transport = stage.transport()
    quiet = load.latencies(transport.inbox, 50)
    with load.memory(stage.pid) as memory, load.asking(transport) as took:
        held = load.slowly(stage, SLOW, SLOW, SLOW, seconds=120)
        answers = load.oversized(stage, 4)
    transport.close()
    assert max(held.all) < 120, "a slow caller is still there"
    assert set(answers) == {"RESOURCE_EXHAUSTED"}, answers
    return [
        Figure(f"{SLOW} silent connections: the last one cut off", max(held.silent), None, "s", "", "all"),
        Figure(f"{SLOW} unfinished handshakes: the last one cut off", max(held.half), None, "s", "", "all"),
        Figure(f"{SLOW} calls of 1 byte/s: the last one ended", max(held.dribbling), None, "s", "", "all"),
        Figure("inbox meanwhile, p50", load.median_ms(took), load.median_ms(quiet), "ms", "before", "-"),
        Figure(
            "inbox meanwhile, p99",
            load.quantile(took, 0.99) * 1000,
            load.quantile(quiet, 0.99) * 1000,
            "ms",
            "before",
            "-",
        ),
        Figure("coordinator's peak RSS", memory.most / MIB, memory.before / MIB, "MiB", "before", "-"),
    ]


def stored(folder: Path, kept: Kept) -> list[Figure]:
    """What a member of few and of many sessions waits for."""
    took: list[dict[str, list[float]]] = []
    for count in SESSIONS:
        with Stage(folder / str(count), 3, toml=kept.toml, database=kept.database(), blobs=kept.blobs) as stage:
            ids = load.fill(stage, stage.members, count)
            stage.coordinator.start()
            last = load.last_event(stage.coordinator.database)
            transport = stage.transport()
            first = load.latencies(transport.inbox, 1)
            took.append(
                {
                    "inbox, the first": first,
                    "inbox": load.latencies(transport.inbox, 30),
                    "status": load.latencies(lambda: transport.get_session(ids[-1]), 100),
                    "all events": load.latencies(lambda: load.replayed(transport, last), 3),
                }
            )
            transport.close()
    few, many = took
    return [
        Figure(
            f"{kind}, {SESSIONS[1]} sessions, p{share * 100:.0f}",
            load.quantile(many[kind], share) * 1000,
            load.quantile(few[kind], share) * 1000,
            "ms",
            f"with {SESSIONS[0]} sessions",
            "-",
        )
        for kind in few
        for share in (0.5, 0.99)
    ]


def told(found: list[Figure]) -> list[Figure]:
    """The same, shown at once: all of it takes minutes."""
    for figure in found:
        print(f"  {figure.what}: {figure.ours:.4g} {figure.unit} ({figure.theirs} {figure.against})", file=sys.stderr)
    return found


@contextmanager
def keeping(folder: Path) -> Iterator[Kept]:
    """What PARLEY_LOAD_STORE says."""
    asked = int(float(os.environ.get("PARLEY_LOAD_TABLE", "0")))
    match os.environ.get("PARLEY_LOAD_STORE", ""):
        case "":
            yield Kept(lambda: None, "blobs", "", asked or TABLE_BYTES)
        case "postgres":
            with postgres.cluster(fsync=True) as cluster, s3.server_process(folder) as url:
                bucket = s3.bucket(url)
                blobs = f"s3://{bucket.bucket}/{bucket.prefix}"
                yield Kept(cluster.migrated, blobs, s3.toml(bucket), asked or S3_TABLE_BYTES)
        case other:
            raise SystemExit(f"PARLEY_LOAD_STORE: {other!r} is neither empty nor postgres")


def figures(_: Sequence[int]) -> list[Figure]:
    """All of it, one after another; the machine's load at the beginning and at the end."""
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="parley-load-") as name, keeping(Path(name)) as kept:
        folder = Path(name)
        found = told(stored(folder / "stored", kept))
        with Stage(folder / "c", MEMBERS, toml=kept.toml, database=kept.database(), blobs=kept.blobs) as stage:
            stage.start()
            found += told(session(stage))
            found += told(uploads(stage, folder))
            found += told(slow(stage))
            assert "rpc-failed" not in stage.coordinator.log
        shutil.rmtree(folder / "c")
        found += told(table(folder / "t", kept))
    return [*found, Figure("load average, after", os.getloadavg()[0], before, "", "before", "-")]
