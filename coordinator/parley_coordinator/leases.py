"""Leases: one coordinator at a time serves a session, and whoever was overtaken changes nothing any more.

A lease has a holder, a time by the database's clock, and a token that grows with every holder. A holder that was stopped for
longer than its time may wake up in the middle of anything; so each transaction that changes a session looks at the token
first, and holds the lock of all writers until its end (crd-22).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from parley_coordinator import log, telemetry
from parley_coordinator.models import LIVE, LeaseRow, SessionRow
from parley_coordinator.node import Identity
from parley_coordinator.store import Store
from parley_protocol.errors import UnavailableError

RETRY_MS: Final = 1000


class FencedError(UnavailableError):
    """Another coordinator has taken this session over."""


class ElsewhereError(UnavailableError):
    """Another coordinator serves this session; it takes calls at `address`."""

    def __init__(self, address: str) -> None:
        super().__init__("another coordinator serves this session; try again", retry_after_ms=RETRY_MS)
        self.address = address


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to serve a session, under a token. `overtaken`: its holder before was another coordinator, which may live."""

    number: int
    token: int
    overtaken: bool = False


class Leases:
    """The leases of one coordinator. `address` is where it takes calls that others pass on; it is told with each renewal."""

    def __init__(self, store: Store, identity: Identity, *, lease_s: float, abandon_s: float) -> None:
        self._store = store
        self._identity = identity
        self._lease_ms = int(lease_s * 1000)
        self._abandon_ms = int(abandon_s * 1000)
        self.renew_s = lease_s / 3
        self.address = ""

    @contextmanager
    def fenced(self, lease: Lease) -> Iterator[Session]:
        """A transaction that may change the session of a lease; FencedError where another coordinator has taken it over."""
        with self._store.write() as session:
            self.check(session, lease)
            yield session

    def check(self, session: Session, lease: Lease) -> None:
        """FencedError where a transaction that writes may not change the session of a lease."""
        row = session.get(LeaseRow, lease.number)
        if row is None or (row.token, row.holder) != (lease.token, self._identity.holder):
            raise FencedError("another coordinator serves this session now; try again", retry_after_ms=RETRY_MS)

    def add(self, session: Session, number: int) -> Lease:
        """The lease of a session that this transaction makes."""
        row = LeaseRow(
            number=number,
            node=self._identity.node,
            holder=self._identity.holder,
            address=self.address,
            token=1,
            expires_ms=self._store.now_ms(session) + self._lease_ms,
        )
        session.add(row)
        return Lease(number, 1)

    def free(self, *, first: bool) -> list[int]:
        """Sessions that need a coordinator, and that this one may take. `first`: it has just started, so that what its
        folder's name holds is free, too."""
        with self._store.read() as session:
            now = self._store.now_ms(session)
            rows = session.execute(
                select(SessionRow, LeaseRow)
                .outerjoin(LeaseRow, LeaseRow.number == SessionRow.number)
                .where(
                    or_(
                        SessionRow.phase.in_(LIVE),
                        (SessionRow.phase == "released") & ~SessionRow.stored_told,
                    )
                )
                .order_by(SessionRow.number)
            ).all()
            return [row.number for row, lease in rows if self._may_take(row, lease, now, first=first)]

    def take(self, number: int, *, first: bool) -> Lease | None:
        """The lease of a session, or None where another coordinator was faster."""
        with self._store.write() as session:
            now = self._store.now_ms(session)
            row = session.get_one(SessionRow, number)
            lease = session.get(LeaseRow, number)
            if not self._may_take(row, lease, now, first=first):
                return None
            if lease is None:
                return self.add(session, number)
            overtaken = lease.holder != self._identity.holder
            if row.phase == "launching" and not row.enclave:
                lease.node = self._identity.node
            if overtaken:
                telemetry.count("parley_leases_taken_total")
                log.warning("taken-over", number=number, token=lease.token + 1)
            lease.token += 1
            lease.holder = self._identity.holder
            lease.address = self.address
            lease.expires_ms = now + self._lease_ms
            return Lease(number, lease.token, overtaken)

    def _may_take(self, row: SessionRow, lease: LeaseRow | None, now: int, *, first: bool) -> bool:
        if lease is None:
            return True
        if lease.holder == self._identity.holder:
            # Held by this process, unless it has just started: then by one that has ended.
            return first or lease.expires_ms <= now
        if lease.expires_ms > now:
            return False
        if lease.node == self._identity.node or (row.phase == "launching" and not row.enclave):
            return True
        # Its enclave lives where no coordinator has come back: nobody can go on with it.
        return lease.expires_ms + self._abandon_ms <= now

    def renew(self, leases: Iterable[Lease]) -> list[Lease]:
        """Prolongs leases; those that others have taken over."""
        lost = []
        with self._store.write() as session:
            expires = self._store.now_ms(session) + self._lease_ms
            for lease in leases:
                try:
                    self.check(session, lease)
                except FencedError:
                    lost.append(lease)
                    continue
                row = session.get_one(LeaseRow, lease.number)
                row.expires_ms, row.address = expires, self.address
        return lost

    def give_up(self, leases: Iterable[Lease]) -> None:
        """Lets others have leases at once, at the end in order."""
        with self._store.write() as session:
            now = self._store.now_ms(session)
            for lease in leases:
                row = session.get(LeaseRow, lease.number)
                if row is not None and (row.token, row.holder) == (lease.token, self._identity.holder):
                    row.expires_ms = now

    def elsewhere(self, number: int) -> str | None:
        """Where another coordinator serves a session; None where none does."""
        with self._store.read() as session:
            row = session.get(LeaseRow, number)
            if row is None or row.holder == self._identity.holder or row.expires_ms <= self._store.now_ms(session):
                return None
            return row.address

    def of_node(self) -> tuple[set[str], set[bytes]]:
        """What runs on this node by the store: names of enclaves, and agreements for which one may be starting."""
        with self._store.read() as session:
            rows = session.execute(
                select(SessionRow)
                .outerjoin(LeaseRow, LeaseRow.number == SessionRow.number)
                .where(
                    or_(LeaseRow.number.is_(None), LeaseRow.node == self._identity.node),
                    or_(SessionRow.phase.in_(LIVE), (SessionRow.phase == "released") & ~SessionRow.stored_told),
                )
            ).scalars()
            enclaves, starting = set(), set()
            for row in rows:
                if row.enclave:
                    enclaves.add(row.enclave)
                else:
                    starting.add(row.agreement)
            return enclaves, starting
