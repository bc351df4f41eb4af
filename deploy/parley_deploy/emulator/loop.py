"""One thread's events: file descriptors and timers. A callback may register and drop whatever it likes."""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable
from typing import Final, Protocol

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
HANGUP: Final = select.EPOLLHUP | select.EPOLLERR
"""Reported whatever is asked for: the other side has gone."""

Ready = Callable[[int], None]


class HasFileno(Protocol):
    """A socket or a file."""

    def fileno(self) -> int:
        """Its descriptor."""


class Loop:
    """Calls back for events until it is told to stop."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        # An event may be of a descriptor that was dropped since, and its number used again: the count tells.
        self._ready: dict[int, tuple[int, Ready]] = {}
        self._count = itertools.count()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._stopped = False

    def add(self, file: HasFileno | int, events: int, ready: Ready) -> None:
        """Calls `ready` with what has happened, as long as it is the case. With no events, only for a hangup."""
        number = file if isinstance(file, int) else file.fileno()
        self._poll.register(number, events)
        self._ready[number] = (next(self._count), ready)

    def change(self, file: HasFileno | int, events: int) -> None:
        """Other events of a file that was added."""
        self._poll.modify(file if isinstance(file, int) else file.fileno(), events)

    def drop(self, file: HasFileno | int) -> None:
        """No more events; to be called before the file is closed."""
        number = file if isinstance(file, int) else file.fileno()
        self._poll.unregister(number)
        del self._ready[number]

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls `call` once, after this time."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), call))

    def stop(self) -> None:
        """Makes `run` return after the callback that is running."""
        self._stopped = True

    def run(self) -> None:
        """Until `stop`. What a callback raises ends it."""
        self._stopped = False
        while not self._stopped:
            wait = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1
            events = self._poll.poll(wait)
            current = [(number, what, self._ready[number][0]) for number, what in events if number in self._ready]
            for number, what, count in current:
                known = self._ready.get(number)
                if known is not None and known[0] == count and not self._stopped:
                    known[1](what)
            while self._timers and self._timers[0][0] <= time.monotonic() and not self._stopped:
                heapq.heappop(self._timers)[2]()

    def close(self) -> None:
        """Frees the loop; its files stay open."""
        self._poll.close()
