"""A release whose transaction was stored and whose answer was lost is stored once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from parley_coordinator import live
from parley_coordinator.live import Live
from parley_coordinator.models import BundleRow, EventRow, RecordRow, SessionRow
from parley_protocol.errors import UnavailableError
from parley_protocol.v1 import enclave_pb2
from support.desk import Desk, make_agreement


class Releasing(Live):
    """A live session that is released; of its first transaction the answer is lost."""

    def __init__(self, desk: Desk) -> None:
        agreement = make_agreement()
        desk.sign(agreement)
        self._number, self._lease = desk.open(agreement)
        self._world = cast(
            "Any", SimpleNamespace(store=desk.store, clock=desk.clock, leases=desk.leases, blobs=desk.blobs)
        )
        self._agreement = agreement
        self._session = b"s" * 16
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._handle = cast("Any", None)
        self._frames = cast("Any", SimpleNamespace(close=lambda: None))
        self._ended = lambda number: None
        self.cuts = 1

    def _bundle(self, released: enclave_pb2.Released) -> bytes:
        return b"bundle"

    @contextmanager
    def _write(self) -> Iterator[Any]:
        with super()._write() as session:
            yield session
        if self.cuts:
            self.cuts -= 1
            raise UnavailableError("cut after the commit")


def test_a_release_whose_commit_was_not_acknowledged_is_stored_once_and_told(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = SimpleNamespace(head=b"h" * 48, body=SimpleNamespace(sequence=1, previous=b"p" * 48))
    monkeypatch.setattr(live, "payload_unverified", lambda cose: cose)
    monkeypatch.setattr(live, "Record", SimpleNamespace(from_bytes=lambda data: record))
    desk = Desk(tmp_path, database=database)
    releasing = Releasing(desk)
    released = enclave_pb2.Released(cose=b"record", document=b"document")
    with pytest.raises(UnavailableError):
        releasing._release(released)
    assert not releasing._over.is_set()
    releasing._release(released)
    assert releasing._over.is_set()
    with desk.store.read() as session:
        row = session.get_one(SessionRow, releasing._number)
        assert (row.phase, row.stored_told) == ("released", True)
        counts = [session.query(kind).count() for kind in (RecordRow, BundleRow)]
        assert [*counts, session.query(EventRow).filter_by(kind="released").count()] == [1, 1, 1]
    desk.store.close()
