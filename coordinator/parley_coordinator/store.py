"""The store: what members were told is stored. Every change of state is one transaction that is on the disk when it ends.

SQLite in WAL mode with `synchronous=FULL`; other databases by their URL. Writers follow one another: a transaction that
writes takes the lock at its beginning, so it never fails in the middle because another one was faster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, create_engine, event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from parley_coordinator.config import ConfigError
from parley_coordinator.models import (
    LIVE,
    SCHEMA,
    AgreementRow,
    Base,
    BundleRow,
    EventRow,
    Membership,
    Operator,
    RecordRow,
    SchemaVersion,
    SessionRow,
    SignatureRow,
    UploadRow,
)
from parley_protocol.errors import RefusedError

CONNECTIONS: Final = 16
"""Connections that are kept; as many more under load."""
BUSY_S: Final = 30
"""How long a transaction waits for another one, such as that of `parley-coordinator operators`."""


class Store:
    """The database at an SQLAlchemy URL; tables are made where there are none."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        sqlite = parsed.get_backend_name() == "sqlite"
        if sqlite and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        self._listeners: list[Callable[[], None]] = []
        # In this process writers wait in turn; only between processes the database has to be asked again and again.
        self._turn = threading.Lock()
        self._engine = create_engine(
            parsed, connect_args={"timeout": BUSY_S} if sqlite else {}, pool_size=CONNECTIONS, max_overflow=CONNECTIONS
        )
        if sqlite:
            event.listen(self._engine, "connect", _pragmas)
            event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(parley_write=True)
        with self.write() as session:
            Base.metadata.create_all(session.connection())
            version = session.scalar(select(SchemaVersion.version))
            if version is None:
                session.add(SchemaVersion(version=SCHEMA))
            elif version != SCHEMA:
                raise ConfigError(f"store.database: has tables of version {version}, this program needs {SCHEMA}")

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def on_event(self, listener: Callable[[], None]) -> None:
        """Calls `listener`, in the thread that wrote, after each transaction that held an event."""
        self._listeners.append(listener)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that reads one state of the store."""
        with Session(self._engine, expire_on_commit=False, autoflush=False) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may write: all of it is durable when the block ends, or nothing is after an exception."""
        with Session(self._writer, expire_on_commit=False) as session:
            with self._turn, session.begin():
                yield session
            happened = session.info.get("events", False)
        if happened:
            for listener in self._listeners:
                listener()


def _pragmas(connection: Any, _record: object) -> None:
    # The driver's own BEGIN comes too late for `_begin`; autocommit mode leaves transactions to SQLAlchemy.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "wal_autocheckpoint=1000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("parley_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def happened(
    session: Session,
    kind: str,
    agreement: bytes,
    at_ms: int,
    *,
    of: bytes | None = None,
    member: str = "",
    table: str = "",
    code: str = "",
    percent: int = 0,
) -> None:
    """Adds an event to a transaction; `of` is the session's id."""
    session.info["events"] = True
    session.add(
        EventRow(
            agreement=agreement,
            session=of,
            kind=kind,
            member=member,
            table_name=table,
            code=code,
            percent=percent,
            at_ms=at_ms,
        )
    )


# Who may see what. Whoever is not a member learns no more than that there is nothing for them.


def is_operator(session: Session, key: bytes) -> bool:
    """Whether the operator lists this key."""
    return session.get(Operator, key) is not None


def is_known(session: Session, key: bytes) -> bool:
    """Whether this key is listed or a member of some agreement."""
    member = select(Membership.name).where(Membership.key == key).limit(1)
    return is_operator(session, key) or session.scalar(member) is not None


def member_name(session: Session, agreement: bytes, key: bytes) -> str | None:
    """The name that a key has in an agreement."""
    return session.scalar(select(Membership.name).where(Membership.agreement == agreement, Membership.key == key))


def agreement_for(session: Session, digest: bytes, key: bytes) -> tuple[AgreementRow, str]:
    """(agreement, the caller's name in it); RefusedError "unknown-agreement", also to those who are not in it."""
    row = session.get(AgreementRow, digest)
    name = None if row is None else member_name(session, digest, key)
    if row is None or name is None:
        raise RefusedError("unknown-agreement")
    return row, name


def session_for(session: Session, identifier: bytes, key: bytes) -> tuple[SessionRow, str]:
    """(session, the caller's name in its agreement); RefusedError "unknown-session", also to those who are not in it."""
    row = session.scalar(select(SessionRow).where(SessionRow.session == identifier))
    name = None if row is None else member_name(session, row.agreement, key)
    if row is None or name is None:
        raise RefusedError("unknown-session")
    return row, name


def upload_for(session: Session, digest: bytes, key: bytes) -> UploadRow:
    """The caller's own upload; RefusedError "unknown-upload"."""
    row = session.scalar(select(UploadRow).where(UploadRow.digest == digest))
    if row is None or row.owner != key:
        raise RefusedError("unknown-upload")
    return row


# What several parts ask for.


def signatures(session: Session, agreement: bytes) -> dict[str, bytes]:
    """The signatures of an agreement, by member."""
    rows = session.scalars(select(SignatureRow).where(SignatureRow.agreement == agreement))
    return {row.member: row.cose for row in rows}


def lineage(session: Session, agreement: AgreementRow) -> list[AgreementRow]:
    """The versions of a series up to this one, oldest first: version n + 1 was accepted only on top of version n."""
    found = [agreement]
    while (replaces := found[-1].replaces) is not None:
        before = session.get(AgreementRow, replaces)
        if before is None:
            raise RefusedError("unknown-agreement", "an earlier version of the agreement is not here")
        found.append(before)
    return found[::-1]


def newest(session: Session, series: bytes, *, complete: bool) -> AgreementRow | None:
    """The newest version of a series; with `complete`, the newest that all members have signed."""
    query = select(AgreementRow).where(AgreementRow.series == series)
    if complete:
        query = query.where(AgreementRow.complete_ms.is_not(None))
    return session.scalar(query.order_by(AgreementRow.version.desc(), AgreementRow.put_ms).limit(1))


def live_session(session: Session, series: bytes) -> SessionRow | None:
    """The live session of a series."""
    return session.scalar(select(SessionRow).where(SessionRow.series == series, SessionRow.phase.in_(LIVE)))


def records(session: Session, series: bytes) -> list[RecordRow]:
    """The chain of a series, oldest first."""
    return list(session.scalars(select(RecordRow).where(RecordRow.series == series).order_by(RecordRow.sequence)))


def stored_bytes(session: Session, owner: bytes) -> int:
    """What all uploads of a key will take when they are complete."""
    return session.scalar(select(func.coalesce(func.sum(UploadRow.size), 0)).where(UploadRow.owner == owner)) or 0


def bundle_of(session: Session, row: SessionRow) -> BundleRow:
    """The bundle of a released session; RefusedError "phase" before."""
    bundle = session.get(BundleRow, row.number)
    if bundle is None:
        raise RefusedError("lost" if row.phase == "lost" else "phase", "the session has released nothing")
    return bundle
