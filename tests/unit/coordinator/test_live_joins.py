"""The joins of one party in a live session: the newest counts, and there are not too many."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import select

from parley_coordinator import live
from parley_coordinator.live import Live
from parley_coordinator.models import JoinRow
from parley_protocol.errors import RefusedError
from support.desk import NOW, Desk, make_agreement


class Waiting(Live):
    """A live session whose enclave answers no join."""

    def __init__(self, desk: Desk) -> None:
        agreement = make_agreement()
        desk.sign(agreement)
        self._number, self._lease = desk.open(agreement)
        self._world = cast("Any", SimpleNamespace(store=desk.store, clock=desk.clock, leases=desk.leases))
        self._lock = threading.RLock()
        self._epoch = 0
        self._joining = {}
        self._offer = self._agreement = cast("Any", None)

    def _settle(self, *phases: str) -> None:
        """The enclave has nothing to say."""

    def _uploads(self, session: Any, join: Any) -> list[Any]:
        return []

    def _relay_join(self, join: Any, cose: bytes, outcome: Any) -> None:
        self._joining.pop(join.digest)
        outcome.set_result((b"", ""))

    def digests(self) -> set[bytes]:
        """The joins that are stored."""
        with self._world.store.read() as session:
            return set(session.scalars(select(JoinRow.digest)))


@pytest.fixture
def waiting(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    def verify(cose: bytes, *_: object) -> Any:
        return SimpleNamespace(party=cose[:3].decode(), digest=cose.ljust(48, b"."))

    monkeypatch.setattr(live, "verify_join", verify)
    desk = Desk(tmp_path, database=database)
    yield Waiting(desk)
    desk.store.close()


def test_a_join_that_waits_is_not_relayed_behind_a_newer_one(waiting: Waiting) -> None:
    for name in ("ann 1", "bob 1", "ann 2"):
        waiting.join(name[:3], name.encode())
    assert waiting.digests() == {b"bob 1".ljust(48, b"."), b"ann 2".ljust(48, b".")}


def test_a_party_makes_some_joins_before_a_roster_and_no_more(waiting: Waiting) -> None:
    with waiting._world.store.write() as session:
        for number in range(live.JOINS_PER_PARTY):
            digest = b"%d" % number + os.urandom(16)
            row = JoinRow(
                number=waiting._number, digest=digest, party="ann", cose=b"", receipt=b"r", code="", at_ms=NOW
            )
            session.add(row)
    with pytest.raises(RefusedError) as caught:
        waiting.join("ann", b"ann more")
    assert caught.value.code == "quota"
    waiting.join("bob", b"bob 1")
