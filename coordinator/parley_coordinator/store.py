"""The store: what members were told is stored. Every change of state is one transaction that is on the disk when it ends.

SQLite in WAL mode with `synchronous=FULL`, or PostgreSQL. Writers follow one another: a transaction that writes takes the
lock at its beginning (in PostgreSQL an advisory one, which all coordinators share), so it sees all that was written before
it, never fails in the middle because another one was faster, and events become visible in the order of their numbers.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, func, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from parley_coordinator import log, telemetry
from parley_coordinator.config import ConfigError
from parley_coordinator.models import (
    LIVE,
    REVISION,
    AgreementRow,
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
from parley_protocol.errors import RefusedError, UnavailableError

_T = TypeVar("_T")

CONNECTIONS: Final = 16
"""Connections that are kept; as many more under load."""
BUSY_S: Final = 30
"""How long a transaction waits for another one, such as that of `parley-coordinator operators`."""
IDLE_S: Final = 5
"""How long PostgreSQL waits for the next statement of a transaction: one whose coordinator was stopped holds up all others."""
CONNECT_S: Final = 5
APPLICATION: Final = "parley-coordinator"
"""How PostgreSQL tells the connections of those that use the tables from others."""
VISITOR: Final = "parley-coordinator-visitor"
"""What `migrate` and `doctor` are called there: they hold up nobody who changes the tables."""
RETRY_MS: Final = 2000
"""When to ask again, where the database did not answer."""
ATTEMPTS: Final = 5
"""How often work is done that a conflict between transactions undid."""
PAUSE_S: Final = 0.02
NOTICE_S: Final = 1.0
"""How soon the thread that hears of other coordinators' events notices that the store was closed."""
FIRST: Final = "0001"
"""The revision of tables that were made before there were any."""
_LOCK: Final = 0x7061726C6579
"""The advisory lock of those who write."""
_CHANNEL: Final = "parley_events"
_CONFLICTS: Final = ("40001", "40P01")
"""SQLSTATEs: serialization_failure, deadlock_detected."""
_AWAY: Final = ("08", "53", "55", "57", "25P03", "XX000")
"""How SQLSTATEs begin that say nothing of the statement: connection, resources, locks, operators, an idle transaction."""
_SQLITE_AWAY: Final = (5, 6, 8, 10, 13, 14)
"""SQLITE_BUSY, LOCKED, READONLY, IOERR, FULL, CANTOPEN."""


class ConflictError(UnavailableError):
    """A transaction was undone because of another one; the work may be done again at once."""


class Store:
    """The database at an SQLAlchemy URL. SQLite's tables are made and brought up to date here; those of PostgreSQL, which
    others may be using, by `parley-coordinator migrate`: ConfigError where that is to be done."""

    def __init__(self, url: str) -> None:
        self._listeners: list[Callable[[], None]] = []
        # In this process writers wait in turn; only between processes the database has to be asked again and again.
        self._turn = threading.Lock()
        self._closing = threading.Event()
        self._notices: threading.Thread | None = None
        parsed = parse(url)
        self.sqlite = parsed.get_backend_name() == "sqlite"
        self._engine = engine_of(parsed)
        self._writer = self._engine.execution_options(parley_write=True)
        self._reader = self._engine
        if not self.sqlite:
            self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        try:
            self._check()
        except BaseException:
            self._engine.dispose()
            raise
        if not self.sqlite:
            event.listen(self._engine, "connect", _known)

    def _check(self) -> None:
        with translated(), self._writer.begin() as connection:
            found = revision(connection)
            if found == REVISION:
                return
            from parley_coordinator import migrations

            migrations.check_known(found)
            if not self.sqlite:
                raise ConfigError(
                    f"store.database: has {_tables(found)}, this program needs {REVISION}: run `parley-coordinator migrate`"
                )
            migrations.upgrade(connection)

    def close(self) -> None:
        """Closes all connections."""
        self._closing.set()
        if self._notices is not None:
            self._notices.join()
        self._engine.dispose()

    def on_event(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after each transaction that held an event, in the thread that wrote; in PostgreSQL also, in a
        thread of its own, after those of other coordinators."""
        self._listeners.append(listener)
        if not self.sqlite and self._notices is None:
            self._notices = threading.Thread(target=self._hear, name="notices", daemon=True)
            self._notices.start()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that reads one state of the store. UnavailableError where the database is away."""
        with (
            translated(),
            Session(self._reader, expire_on_commit=False, autoflush=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may write: all of it is durable when the block ends, or nothing is after an exception.

        UnavailableError where the database is away; then it is not known whether the end of the block was reached there.
        """
        with (
            translated(),
            Session(self._writer, expire_on_commit=False) as session,
            self._turn,
            session.begin(),
        ):
            yield session
            happened = session.info.get("events", False)
            if happened and not self.sqlite:
                session.flush()
                session.execute(text(f"NOTIFY {_CHANNEL}"))
        if happened:
            self._tell()

    def now_ms(self, session: Session) -> int:
        """The database's clock, which all coordinators share."""
        moment = (
            "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
            if self.sqlite
            else "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)"
        )
        return int(session.execute(text(f"SELECT {moment}")).scalar_one())

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _hear(self) -> None:
        while not self._closing.is_set():
            try:
                with self._engine.connect() as connection:
                    connection = connection.execution_options(isolation_level="AUTOCOMMIT")  # noqa: PLW2901
                    connection.exec_driver_sql(f"LISTEN {_CHANNEL}")
                    driver: Any = connection.connection.driver_connection
                    # Something may have happened before.
                    self._tell()
                    while not self._closing.is_set():
                        if list(driver.notifies(timeout=NOTICE_S, stop_after=1)):
                            self._tell()
                    connection.invalidate()
            except Exception as error:  # noqa: BLE001  # the driver's own errors too; the streams look by themselves meanwhile
                log.warning("store-deaf", error=type(error).__name__)
                self._closing.wait(RETRY_MS / 1000)


def parse(url: str) -> URL:
    """An SQLAlchemy URL of SQLite or PostgreSQL; ConfigError for all else."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError("store.database: no URL of a database") from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigError(f"store.database: {backend} is neither sqlite nor postgresql")
    return parsed


def engine_of(url: URL, application: str = APPLICATION) -> Engine:
    """An engine whose transactions begin as the store needs it, and whose connections have a name that no URL changes."""
    if url.get_backend_name() == "sqlite":
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(
            url, connect_args={"timeout": BUSY_S}, pool_size=CONNECTIONS, max_overflow=CONNECTIONS, pool_timeout=BUSY_S
        )
        event.listen(engine, "connect", _pragmas)
        event.listen(engine, "begin", _begin)
        return engine
    arguments = {
        "connect_timeout": CONNECT_S,
        # A database that vanished without a word is noticed within seconds.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
    }
    engine = create_engine(
        url,
        connect_args={**arguments, **url.query, "application_name": application},
        pool_size=CONNECTIONS,
        max_overflow=CONNECTIONS,
        pool_timeout=BUSY_S,
        pool_pre_ping=True,
        isolation_level="READ COMMITTED",
    )
    event.listen(engine, "connect", _settings)
    event.listen(engine, "begin", _lock)
    return engine


def _pragmas(connection: Any, _record: object) -> None:
    # The driver's own BEGIN comes too late for `_begin`; autocommit mode leaves transactions to SQLAlchemy.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "wal_autocheckpoint=1000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("parley_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _settings(connection: Any, _record: object) -> None:
    connection.execute(f"SET lock_timeout = '{BUSY_S}s'")
    connection.execute(f"SET statement_timeout = '{2 * BUSY_S}s'")
    connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_S}s'")
    connection.execute("SET synchronous_commit = on")
    connection.commit()


def _known(connection: Any, _record: object) -> None:
    # While all its connections were lost, as in a failover, `migrate` may have seen nobody.
    found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    connection.commit()
    if found != (REVISION,):
        connection.close()
        log.warning("store-away", error="revision", state=found[0] if found else "")
        raise UnavailableError("the database has other tables than this program knows", retry_after_ms=RETRY_MS)


def _lock(connection: Connection) -> None:
    if connection.get_execution_options().get("parley_write", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def revision(connection: Connection) -> str | None:
    """The revision of the tables that are there; None where there are none."""
    names = set(inspect(connection).get_table_names())
    if "alembic_version" in names:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if found is not None:
            return str(found)
    if SchemaVersion.__tablename__ in names:
        version = connection.execute(select(SchemaVersion.version)).scalar()
        return FIRST if version == 1 else f"version {version}"
    return None


def _tables(found: str | None) -> str:
    return "no tables" if found is None else f"tables of revision {found}"


@contextmanager
def translated() -> Iterator[None]:
    """Errors that say nothing of the statement, but of the database, as UnavailableError."""
    try:
        yield
    except PoolTimeoutError as error:
        raise UnavailableError(
            "the coordinator has no connection to its database left", retry_after_ms=RETRY_MS
        ) from error
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None)
        if state in _CONFLICTS:
            telemetry.count("parley_store_failures_total", kind="conflict")
            raise ConflictError("another transaction was faster", retry_after_ms=RETRY_MS) from error
        if not _is_away(error, state):
            raise
        telemetry.count("parley_store_failures_total", kind="away")
        log.warning("store-away", error=type(error.orig).__name__, state=state or "")
        raise UnavailableError("the database of the coordinator does not answer", retry_after_ms=RETRY_MS) from error


def _is_away(error: DBAPIError, state: str | None) -> bool:
    number = getattr(error.orig, "sqlite_errorcode", None)
    if number is not None:
        return (number & 0xFF) in _SQLITE_AWAY
    if state is not None:
        return state.startswith(_AWAY)
    # The driver gives up a connection without a word of the database.
    return error.connection_invalidated or type(error.orig).__name__ in ("OperationalError", "InterfaceError")


def retried(work: Callable[..., _T], *arguments: object) -> _T:
    """Does work again that a conflict between transactions undid, after a pause with jitter; ConflictError in the end."""
    for left in reversed(range(ATTEMPTS)):
        try:
            return work(*arguments)
        except ConflictError:
            if not left:
                raise
            time.sleep(PAUSE_S * 2 ** (ATTEMPTS - left) * (0.5 + random.random()))  # noqa: S311  # jitter
    raise AssertionError("unreachable")


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
    if bundle is None and row.phase == "released":
        raise RefusedError("expired", "the bundle was deleted after the time for which the operator keeps it")
    if bundle is None:
        raise RefusedError("lost" if row.phase == "lost" else "phase", "the session has released nothing")
    return bundle


def phases(store: Store) -> dict[str, int]:
    """How many sessions there are in each phase."""
    with store.read() as session:
        found = session.execute(select(SessionRow.phase, func.count()).group_by(SessionRow.phase)).tuples()
        return dict(found.all())
