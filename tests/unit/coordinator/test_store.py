"""The store: transactions, one live session of a series, who is known, and a schema of another version."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from parley_coordinator import store as db
from parley_coordinator.models import AgreementRow, EventRow, Membership, Operator, SessionRow
from parley_coordinator.store import Store
from parley_protocol.errors import RefusedError
from support.enclave import until

DIGEST = b"d" * 48


def agreement(
    digest: bytes = DIGEST, version: int = 1, replaces: bytes | None = None, complete: bool = True
) -> AgreementRow:
    return AgreementRow(
        digest=digest,
        series=DIGEST,
        version=version,
        replaces=replaces,
        canonical=b"",
        put_by=b"",
        put_ms=version,
        complete_ms=1 if complete else None,
        expires_ms=10,
    )


def session_row(phase: str, session: bytes | None = None, series: bytes = DIGEST) -> SessionRow:
    return SessionRow(session=session, agreement=DIGEST, series=series, begin=b"", phase=phase, opened_ms=0)


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    made = Store(database)
    with made.write() as session:
        session.add(agreement())
    yield made
    made.close()


def test_an_exception_undoes_all_of_a_transaction(store: Store) -> None:
    def fail() -> None:
        with store.write() as session:
            session.add(Operator(key=b"k", label="", added_ms=0))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with store.read() as session:
        assert session.get(Operator, b"k") is None


def test_listeners_hear_of_events_after_they_are_stored(store: Store) -> None:
    heard: list[int] = []

    def listen() -> None:
        with store.read() as session:
            heard.append(session.scalar(select(func.count()).select_from(EventRow)) or 0)

    store.on_event(listen)
    if not store.sqlite:
        # The thread that hears of other coordinators' events says once that it listens.
        until(lambda: heard == [0])
        heard.clear()
    with store.write() as session:
        db.happened(session, "signed", DIGEST, 1, member="ann")
    with store.write() as session:
        session.add(Operator(key=b"k", label="", added_ms=0))
    # PostgreSQL tells it once more.
    until(lambda: heard == [1] * (1 if store.sqlite else 2))


def test_numbers_of_events_are_never_used_twice(store: Store) -> None:
    def add() -> int:
        with store.write() as session:
            db.happened(session, "signed", DIGEST, 1)
        with store.read() as session:
            return session.scalars(select(func.max(EventRow.number))).one()

    first = add()
    with store.write() as session:
        session.delete(session.get_one(EventRow, first))
    assert add() == first + 1


@pytest.mark.parametrize("phase", ["launching", "open", "rostered", "computing"])
def test_a_series_has_one_live_session(store: Store, phase: str) -> None:
    with store.write() as session:
        session.add_all([session_row("lost"), session_row("released"), session_row(phase)])
    with pytest.raises(IntegrityError), store.write() as session:
        session.add(session_row("open"))
    with store.write() as session:
        session.add(session_row("open", series=b"other"))
        live = db.live_session(session, DIGEST)
        assert live is not None
        assert live.phase == phase


def test_the_lineage_is_oldest_first(store: Store) -> None:
    with store.write() as session:
        session.add(agreement(b"2" * 48, 2, DIGEST))
        session.add(agreement(b"3" * 48, 3, b"2" * 48, complete=False))
    with store.read() as session:
        third = session.get_one(AgreementRow, b"3" * 48)
        assert [row.version for row in db.lineage(session, third)] == [1, 2, 3]
        complete, newest = db.newest(session, DIGEST, complete=True), db.newest(session, DIGEST, complete=False)
        assert complete is not None
        assert newest is not None
        assert (complete.version, newest.version) == (2, 3)


def test_crd_3_known_are_operators_and_members_alone(store: Store) -> None:
    with store.write() as session:
        session.add(Membership(agreement=DIGEST, name="ann", key=b"ann"))
        session.add(Operator(key=b"op", label="", added_ms=0))
    with store.read() as session:
        assert [db.is_known(session, key) for key in (b"ann", b"op", b"eve")] == [True, True, False]
        assert db.agreement_for(session, DIGEST, b"ann")[1] == "ann"
        for key, digest in ((b"op", DIGEST), (b"eve", DIGEST), (b"ann", b"x" * 48)):
            with pytest.raises(RefusedError) as caught:
                db.agreement_for(session, digest, key)
            assert caught.value.code == "unknown-agreement"
        with pytest.raises(RefusedError) as caught:
            db.session_for(session, os.urandom(16), b"ann")
        assert caught.value.code == "unknown-session"


WRITE = """
import sys
from parley_coordinator.models import Operator
from parley_coordinator.store import Store
store = Store(sys.argv[1])
for number in range(1000):
    with store.write() as session:
        session.add(Operator(key=bytes([number >> 8, number & 255]), label="", added_ms=number))
        session.flush()
        session.add(Operator(key=b"pair" + bytes([number >> 8, number & 255]), label="", added_ms=number))
    print(number, flush=True)
"""


def test_a_kill_loses_nothing_that_was_committed_and_keeps_no_half(database: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITE, database], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = [int(process.stdout.readline()) for _ in range(20)][-1]
        process.send_signal(signal.SIGKILL)
        process.wait()
    store = Store(database)
    with store.read() as session:
        count = session.scalar(select(func.count()).select_from(Operator)) or 0
    store.close()
    assert count >= 2 * (last + 1)
    assert count % 2 == 0
