"""The inbox: what waits for a member, derived from the store each time, so that it is never wrong after a crash."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from parley_coordinator import store as db
from parley_coordinator.agreements import parsed
from parley_coordinator.clock import Clock
from parley_coordinator.models import (
    AgreementRow,
    BundleRow,
    CountersignatureRow,
    FetchRow,
    JoinRow,
    KmsJoinRow,
    Membership,
    RosterRow,
    SessionRow,
    SignatureRow,
    UploadRow,
)
from parley_coordinator.store import Store
from parley_protocol.agreement.model import Agreement
from parley_protocol.claims import needs_countersignatures
from parley_protocol.cose import payload_unverified
from parley_protocol.transcript import Roster
from parley_protocol.v1.coordinator_pb2 import InboxItem


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that waits: InboxItem's fields. `due_ms` 0: no time is set; `since_ms`: since when it waits."""

    kind: InboxItem.Kind.ValueType
    agreement: bytes
    member: str
    since_ms: int
    session: bytes = b""
    table: str = ""
    due_ms: int = 0


class Inbox:
    """What waits for the members behind one key."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def items(self, key: bytes) -> list[Item]:
        """All items, what waits longest first (crd-16)."""
        now = self._clock()
        found: list[Item] = []
        with self._store.read() as session:
            rows = session.execute(
                select(AgreementRow, Membership.name)
                .join(Membership, Membership.agreement == AgreementRow.digest)
                .where(Membership.key == key)
            ).all()
            for row, name in rows:
                found += self._of(session, row, name, now)
        return sorted(found, key=lambda item: (item.since_ms, item.agreement, item.kind, item.table))

    def _of(self, session: Session, row: AgreementRow, name: str, now: int) -> list[Item]:
        agreement = parsed(row.canonical)
        found = _fetch(session, row, agreement, name)
        if row.expires_ms <= now:
            return found
        newest = db.newest(session, row.series, complete=True)
        if newest is not None and newest.version >= row.version and newest.digest != row.digest:
            return found
        if row.complete_ms is None:
            if session.get(SignatureRow, (row.digest, name)) is None:
                found.append(Item(InboxItem.KIND_SIGN, row.digest, name, row.put_ms))
            return found
        running = db.live_session(session, row.series)
        if running is not None and (running.agreement != row.digest or running.session is None):
            running = None
        uploads = _uploads(session, row, agreement, name, running)
        found += uploads
        if running is not None:
            if not uploads:
                found += _join(session, running, agreement, name)
            found += _start(session, running, agreement, name, now)
            found += _countersign(session, running, agreement, name)
        return found


def _fetch(session: Session, row: AgreementRow, agreement: Agreement, name: str) -> list[Item]:
    if name not in agreement.recipients:
        return []
    released = session.execute(
        select(SessionRow, BundleRow)
        .join(BundleRow, BundleRow.number == SessionRow.number)
        .where(SessionRow.agreement == row.digest)
    ).all()
    return [
        Item(InboxItem.KIND_FETCH, row.digest, name, bundle.at_ms, session=ended.session or b"")
        for ended, bundle in released
        if session.get(FetchRow, (ended.number, name)) is None
    ]


def _uploads(
    session: Session, row: AgreementRow, agreement: Agreement, name: str, running: SessionRow | None
) -> list[Item]:
    complete = set(
        session.scalars(
            select(UploadRow.table_name).where(
                UploadRow.agreement == row.digest, UploadRow.party == name, UploadRow.complete_ms.is_not(None)
            )
        )
    )
    due = running.deadline_ms if running is not None and running.phase == "open" else 0
    return [
        Item(
            InboxItem.KIND_UPLOAD,
            row.digest,
            name,
            row.complete_ms or 0,
            session=running.session or b"" if running is not None else b"",
            table=table,
            due_ms=due,
        )
        for table in agreement.tables_of(name)
        if table not in complete
    ]


def _admitted(session: Session, running: SessionRow) -> dict[str, int]:
    rows = session.scalars(select(JoinRow).where(JoinRow.number == running.number, JoinRow.receipt.is_not(None)))
    return {row.party: row.at_ms for row in rows}


def _join(session: Session, running: SessionRow, agreement: Agreement, name: str) -> list[Item]:
    if running.phase != "open" or name not in agreement.parties or name in _admitted(session, running):
        return []
    kms = session.get(KmsJoinRow, (agreement.digest, name))
    if kms is not None:
        tried = session.get(JoinRow, (running.number, kms.digest))
        if tried is None or not tried.code:
            return []  # it joins without the party
    return [
        Item(
            InboxItem.KIND_JOIN,
            running.agreement,
            name,
            running.opened_ms,
            session=running.session or b"",
            due_ms=running.deadline_ms,
        )
    ]


def _start(session: Session, running: SessionRow, agreement: Agreement, name: str, now: int) -> list[Item]:
    if running.phase != "open" or name not in agreement.session.start:
        return []
    admitted = _admitted(session, running)
    everyone = len(admitted) == len(agreement.parties)
    enough = now >= running.deadline_ms and len(admitted) >= agreement.quorum
    if not admitted or not (everyone or enough):
        return []
    since = max(admitted.values()) if everyone else running.deadline_ms
    return [Item(InboxItem.KIND_START, running.agreement, name, since, session=running.session or b"")]


def _countersign(session: Session, running: SessionRow, agreement: Agreement, name: str) -> list[Item]:
    if running.phase != "rostered" or running.roster is None or not needs_countersignatures(agreement):
        return []
    row = session.get_one(RosterRow, running.roster)
    roster = Roster.from_bytes(payload_unverified(row.cose))
    if roster.entry(name) is None or session.get(CountersignatureRow, (row.digest, name)) is not None:
        return []
    return [
        Item(
            InboxItem.KIND_COUNTERSIGN,
            running.agreement,
            name,
            row.issued_ms,
            session=running.session or b"",
            due_ms=row.expires_ms,
        )
    ]
