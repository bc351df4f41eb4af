"""Events: numbered in the store, the newest of them in memory for all who watch, and a bell that wakes them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select

from parley_coordinator import store as db
from parley_coordinator.models import EventRow, Membership
from parley_coordinator.store import Store
from parley_protocol.v1.coordinator_pb2 import Event

PAGE = 500
"""Events that one look takes, and that one message holds."""
KEPT: Final = 4096
"""Events in memory: whoever is further behind asks the store."""


@dataclass(frozen=True, slots=True)
class Happened:
    """An event, as it is told and made once for all, and the keys of those who may see it: the members of its agreement,
    which never change."""

    row: EventRow
    event: Event
    keys: frozenset[bytes]


class Events:
    """What happened, to members of the agreement it happened in."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def check(self, key: bytes, session_id: bytes) -> None:
        """RefusedError "unknown-session" where the caller may not watch this session."""
        if session_id:
            with self._store.read() as session:
                db.session_for(session, session_id, key)

    def after(self, key: bytes, number: int, session_id: bytes) -> list[EventRow]:
        """The next events after a number, oldest first, at most PAGE; of one session or of all agreements of the key (crd-18)."""
        query = (
            select(EventRow)
            .where(
                EventRow.agreement.in_(select(Membership.agreement).where(Membership.key == key)),
                EventRow.number > min(number, 2**63 - 1),
            )
            .order_by(EventRow.number)
            .limit(PAGE)
        )
        if session_id:
            query = query.where(EventRow.session == session_id)
        with self._store.read() as session:
            return list(session.scalars(query))

    def newest(self) -> int:
        """The number of the last event, 0 where there is none."""
        with self._store.read() as session:
            return session.scalar(select(func.max(EventRow.number))) or 0

    def since(self, number: int) -> list[Happened]:
        """The next events of all agreements after a number, oldest first, at most PAGE."""
        with self._store.read() as session:
            rows = list(
                session.scalars(select(EventRow).where(EventRow.number > number).order_by(EventRow.number).limit(PAGE))
            )
            agreements = {row.agreement for row in rows}
            found: dict[bytes, set[bytes]] = {agreement: set() for agreement in agreements}
            query = select(Membership.agreement, Membership.key).where(Membership.agreement.in_(agreements))
            for agreement, key in session.execute(query):
                found[agreement].add(key)
        keys = {agreement: frozenset(members) for agreement, members in found.items()}
        return [Happened(row, event_of(row), keys[row.agreement]) for row in rows]


def event_of(row: EventRow) -> Event:
    """A row as it is told."""
    return Event(
        number=row.number,
        agreement=row.agreement,
        session=row.session or b"",
        kind=row.kind,
        member=row.member,
        table=row.table_name,
        code=row.code,
        at_ms=row.at_ms,
        percent=row.percent,
    )


def messages(events: Sequence[Event], *, several: bool) -> Iterator[Event]:
    """The messages that tell events, in their order: one for each or, with `several`, for up to PAGE of them (crd-18)."""
    if not several:
        yield from events
        return
    for start in range(0, len(events), PAGE):
        message = Event()
        message.CopyFrom(events[start])
        message.more.extend(events[start + 1 : start + PAGE])
        yield message


class Tail:
    """The newest events: read from the store once, however many watch. It holds all events from `first` to `last`."""

    def __init__(self, newest: int) -> None:
        self.first = newest + 1
        self.last = newest
        self._kept: deque[Happened] = deque()

    def add(self, happened: Sequence[Happened]) -> None:
        """Takes the next events; the oldest ones make place."""
        self._kept.extend(happened)
        while len(self._kept) > KEPT:
            self.first = self._kept.popleft().row.number + 1
        if happened:
            self.last = happened[-1].row.number

    def after(self, key: bytes, number: int, session_id: bytes) -> list[Event]:
        """The events after a number, from `first` - 1 on, that a key may see; of one session where its id is not empty."""
        newer = []
        for happened in reversed(self._kept):
            if happened.row.number <= number:
                break
            if key in happened.keys and (not session_id or happened.row.session == session_id):
                newer.append(happened.event)
        newer.reverse()
        return newer


class Bell:
    """Wakes coroutines when something has happened; `ring` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: set[asyncio.Event] = set()

    def ring(self) -> None:
        """Wakes all that wait."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.wake)

    def wake(self) -> None:
        """The same, in the loop."""
        for waiting in self._waiting:
            waiting.set()

    def subscribe(self) -> asyncio.Event:
        """An event that every ring sets; the waiter clears it."""
        waiting = asyncio.Event()
        self._waiting.add(waiting)
        return waiting

    def unsubscribe(self, waiting: asyncio.Event) -> None:
        """Ends a subscription."""
        self._waiting.discard(waiting)
