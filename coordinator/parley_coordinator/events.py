"""Events: numbered in the store, and a bell that wakes those who watch."""

from __future__ import annotations

import asyncio

from sqlalchemy import select

from parley_coordinator import store as db
from parley_coordinator.models import EventRow, Membership
from parley_coordinator.store import Store

PAGE = 500
"""Events that one look takes."""


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


class Bell:
    """Wakes coroutines when something has happened; `ring` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: set[asyncio.Event] = set()

    def ring(self) -> None:
        """Wakes all that wait."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
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
