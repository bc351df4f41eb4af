"""Joins of one member do not take all the threads that judge joins."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from parley_coordinator.sessions import JUDGED, Sessions
from parley_protocol.errors import UnavailableError


class Slow:
    """A session whose enclave judges until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)

    def join(self, name: str, cose: bytes) -> tuple[bytes, str]:
        self.begun.release()
        assert self.go.wait(30)
        return name.encode() + cose, ""


def test_a_key_has_some_joins_judged_at_a_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, slow = Sessions(cast("Any", None)), Slow()
    monkeypatch.setattr(Sessions, "_attached", lambda self, key, identifier: (None, "ann", slow))
    with ThreadPoolExecutor(2 * JUDGED) as pool:
        try:
            running = [pool.submit(sessions.join, b"ann", b"s", b"%d" % number) for number in range(JUDGED)]
            for _ in running:
                assert slow.begun.acquire(timeout=30)
            with pytest.raises(UnavailableError) as caught:
                sessions.join(b"ann", b"s", b"one more")
            assert caught.value.code == "busy" and caught.value.retry_after_ms
            other = pool.submit(sessions.join, b"bob", b"s", b"x")
            assert slow.begun.acquire(timeout=30)
        finally:
            slow.go.set()
        assert [future.result(30)[0] for future in running] == [b"ann%d" % number for number in range(JUDGED)]
        assert other.result(30) == (b"annx", "")
    assert sessions.join(b"ann", b"s", b"again") == (b"annagain", "")
