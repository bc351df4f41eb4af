"""The store in PostgreSQL: writers in turn over all coordinators, a database that goes away, events of others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError

from parley_coordinator import store as db
from parley_coordinator.models import AgreementRow, EventRow, Operator
from parley_coordinator.store import ConflictError, Store
from parley_protocol.errors import UnavailableError
from support import postgres
from support.enclave import until
from support.postgres import Cluster

DIGEST = b"d" * 48


def add_agreement(store: Store) -> None:
    with store.write() as session:
        session.add(
            AgreementRow(
                digest=DIGEST,
                series=DIGEST,
                version=1,
                replaces=None,
                canonical=b"",
                put_by=b"",
                put_ms=1,
                expires_ms=10,
            )
        )


@pytest.fixture
def url(cluster: Cluster) -> str:
    return cluster.migrated()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    made = Store(url)
    add_agreement(made)
    yield made
    made.close()


def operators(store: Store) -> int:
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(Operator)) or 0


WRITE = """
import sys
from parley_coordinator import store as db
store = db.Store(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with store.write() as session:
        db.happened(session, "signed", b"d" * 48, 1)
store.close()
"""


def test_events_of_many_writers_are_seen_in_order_and_once(url: str, store: Store) -> None:
    """A watcher asks for what comes after the last number that it saw: a smaller one that came later would be missed."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, url, "100"]) for _ in range(3)]
    seen: list[int] = []
    while len(seen) < 300:
        last = seen[-1] if seen else 0
        with store.read() as session:
            seen += session.scalars(select(EventRow.number).where(EventRow.number > last).order_by(EventRow.number))
        assert seen or any(writer.poll() in (None, 0) for writer in writers)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert seen == sorted(set(seen))
    with store.read() as session:
        assert list(session.scalars(select(EventRow.number).order_by(EventRow.number))) == seen


def test_another_process_rings_the_bell(url: str, store: Store) -> None:
    rung = threading.Event()
    store.on_event(rung.set)
    until(rung.is_set)
    time.sleep(0.2)
    rung.clear()
    subprocess.run([sys.executable, "-c", WRITE, url, "1"], check=True)
    assert rung.wait(5)


def test_a_reader_sees_one_state(store: Store) -> None:
    with store.read() as session:
        before = session.scalar(select(func.count()).select_from(Operator))
        with store.write() as other:
            other.add(Operator(key=b"k", label="", added_ms=0))
        assert session.scalar(select(func.count()).select_from(Operator)) == before
    assert operators(store) == (before or 0) + 1


def test_a_reader_cannot_write(store: Store) -> None:
    with pytest.raises(Exception, match="read-only"), store.read() as session:
        session.execute(text("DELETE FROM operators"))


def test_writers_follow_one_another_over_processes(url: str, store: Store) -> None:
    """Counting up without a lock loses counts."""
    program = """
import sys
from parley_coordinator.models import Operator
from parley_coordinator.store import Store
store = Store(sys.argv[1])
for _ in range(50):
    with store.write() as session:
        session.get_one(Operator, b"count").added_ms += 1
"""
    with store.write() as session:
        session.add(Operator(key=b"count", label="", added_ms=0))
    others = [subprocess.Popen([sys.executable, "-c", program, url]) for _ in range(3)]
    assert [other.wait() for other in others] == [0, 0, 0]
    with store.read() as session:
        assert session.get_one(Operator, b"count").added_ms == 150


def test_a_stopped_writer_holds_up_the_others_for_seconds(url: str, store: Store) -> None:
    program = """
import sys
from parley_coordinator.models import Operator
from parley_coordinator.store import Store
store = Store(sys.argv[1])
with store.write() as session:
    session.add(Operator(key=b"half", label="", added_ms=0))
    session.flush()
    print("in", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with store.write() as session:
            session.add(Operator(key=b"whole", label="", added_ms=0))
        assert time.monotonic() - started < db.IDLE_S + 5
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate("")
        assert process.returncode != 0
        assert "UnavailableError" in said
    with store.read() as session:
        assert session.get(Operator, b"half") is None
        assert session.get(Operator, b"whole") is not None


def test_a_conflict_is_tried_again_and_not_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "PAUSE_S", 0.001)
    tried = []

    def work(until_attempt: int, state: str) -> int:
        tried.append(state)
        with store.write() as session:
            session.add(Operator(key=os.urandom(8), label="", added_ms=0))
            session.flush()
            if len(tried) < until_attempt:
                session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$"))
        return len(tried)

    for state in ("40001", "40P01"):
        tried.clear()
        assert db.retried(work, 3, state) == 3
        tried.clear()
        with pytest.raises(ConflictError):
            db.retried(work, 99, state)
        assert len(tried) == db.ATTEMPTS
    assert operators(store) == 2


def test_a_real_deadlock_is_a_conflict(store: Store, cluster: Cluster, url: str) -> None:
    """With the database's own locks, taken against each other."""
    with store.write() as session:
        session.add_all([Operator(key=key, label="", added_ms=0) for key in (b"1", b"2")])
    ready = threading.Barrier(2)
    found: list[BaseException] = []

    def other() -> None:
        engine = db.engine_of(db.parse(url))
        try:
            with engine.begin() as connection:
                connection.execute(text("UPDATE operators SET added_ms = 1 WHERE key = '2'"))
                ready.wait(30)
                connection.execute(text("UPDATE operators SET added_ms = 1 WHERE key = '1'"))
        except OperationalError as error:
            found.append(error)
        finally:
            engine.dispose()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        with store.write() as session:
            session.execute(text("UPDATE operators SET added_ms = 2 WHERE key = '1'"))
            ready.wait(30)
            session.execute(text("UPDATE operators SET added_ms = 2 WHERE key = '2'"))
    except ConflictError as error:
        found.append(error)
    thread.join()
    assert len(found) == 1
    assert isinstance(found[0], ConflictError | OperationalError)


def test_a_database_that_goes_away_is_unavailable_and_comes_back() -> None:
    with postgres.cluster() as own:
        url = own.migrated()
        store = Store(url)
        with store.write() as session:
            session.add(Operator(key=b"before", label="", added_ms=0))
        own.stop("immediate")
        for work in (store.read, store.write):
            with pytest.raises(UnavailableError) as caught, work() as session:
                session.get(Operator, b"before")
            assert (caught.value.code, caught.value.retry_after_ms) == ("unavailable", db.RETRY_MS)
        with pytest.raises(UnavailableError):
            Store(url)
        own.start()
        with store.write() as session:
            assert session.get(Operator, b"before") is not None
            session.add(Operator(key=b"after", label="", added_ms=0))
        assert operators(store) == 2
        store.close()


@pytest.mark.parametrize("moment", ["within", "at the end"])
def test_a_connection_that_is_cut_in_a_transaction(store: Store, cluster: Cluster, moment: str) -> None:
    name = "cut " + moment

    def work() -> None:
        with store.write() as session:
            session.add(Operator(key=name.encode(), label="", added_ms=0))
            session.flush()
            process = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
            cluster.execute(f"SELECT pg_terminate_backend({process})")
            if moment == "within":
                session.execute(text("SELECT 1"))

    with pytest.raises(UnavailableError):
        work()
    with store.read() as session:
        assert session.get(Operator, name.encode()) is None


ACKNOWLEDGED = """
import sys, time
from parley_coordinator.models import Operator
from parley_coordinator.store import Store
from parley_protocol.errors import UnavailableError
store = Store(sys.argv[1])
number = 0
while True:
    try:
        with store.write() as session:
            session.add(Operator(key=b"n%d" % number, label="", added_ms=number))
    except UnavailableError:
        time.sleep(0.05)
    except Exception as error:
        # What was not acknowledged may be there nevertheless.
        if "duplicate" not in str(error):
            raise
    else:
        print(number, flush=True)
    number += 1
"""


def test_a_crash_of_the_database_loses_nothing_that_was_acknowledged() -> None:
    with postgres.cluster() as own:
        url = own.migrated()
        with subprocess.Popen([sys.executable, "-c", ACKNOWLEDGED, url], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = [int(process.stdout.readline()) for _ in range(30)]
            own.stop("immediate")
            own.start()
            told += [int(process.stdout.readline()) for _ in range(30)]
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        told += [int(number) for number in rest]
        store = Store(url)
        with store.read() as session:
            there = set(session.scalars(select(Operator.added_ms)))
        assert set(told) <= there
        store.close()


def test_the_databases_clock(store: Store) -> None:
    with store.read() as session:
        assert abs(store.now_ms(session) - time.time() * 1000) < 60_000


def test_passwords_stand_in_no_error(cluster: Cluster, tmp_path: object) -> None:
    with pytest.raises(UnavailableError) as caught:
        Store("postgresql://me:secret@/none?host=/nowhere")
    assert "secret" not in str(caught.value)
    assert os.environ.get("PGPASSWORD") is None
