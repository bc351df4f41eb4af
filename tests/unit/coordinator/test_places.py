"""Launches without a place: who has none offers the session to others, and the caller hears `no-capacity` in the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from parley_coordinator import sessions as module
from parley_coordinator.config import Deadlines
from parley_coordinator.images import Wanted
from parley_coordinator.launcher import EnclaveHandle, no_capacity
from parley_coordinator.leases import ElsewhereError, Leases
from parley_coordinator.live import World
from parley_coordinator.models import LeaseRow, OpenRequest, SessionRow
from parley_coordinator.node import Identity
from parley_coordinator.sessions import Sessions, SessionView
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import UnavailableError
from support.desk import NOW, Desk, key, make_agreement
from support.enclave import until
from support.postgres import Cluster

REQUEST = b"r" * 16


class Full:
    """Counts a place, and finds none when it launches: something else has the machine's memory."""

    def __init__(self) -> None:
        self.launches = 0

    def find(self) -> list[EnclaveHandle]:
        return []

    def room(self) -> bool:
        return True

    def launch(self, wanted: Wanted) -> EnclaveHandle:
        self.launches += 1
        raise no_capacity(2)


class Places:
    """Coordinators' sessions in this process, over one store."""

    def __init__(self, folder: Path, database: str | None) -> None:
        self.desk = Desk(folder, database=database)
        self.launchers: list[Full] = []
        self._running: list[Sessions] = []

    def sessions(self, holder: str) -> Sessions:
        desk = self.desk
        leases = Leases(desk.store, Identity(holder, f"node of {holder}"), lease_s=3, abandon_s=60)
        leases.address = holder
        self.launchers.append(Full())
        made = Sessions(World(desk.store, desk.blobs, cast("Any", self.launchers[-1]), Deadlines(), desk.clock, leases))
        self._running.append(made)
        return made

    def launching(self, agreement: Agreement) -> None:
        """A session that waits for its launch, whose coordinator has died."""
        with self.desk.store.write() as session:
            row = SessionRow(
                agreement=agreement.digest,
                series=agreement.series,
                begin=b"b" * 16,
                phase="launching",
                opened_ms=NOW,
            )
            session.add(row)
            session.flush()
            session.add(LeaseRow(number=row.number, node="n", holder="dead", address="", token=1, expires_ms=0))

    def launches(self) -> list[int]:
        return [launcher.launches for launcher in self.launchers]

    def ends(self) -> list[tuple[str, str]]:
        with self.desk.store.read() as session:
            return [(row.phase, row.code) for row in session.query(SessionRow).order_by(SessionRow.number)]

    def close(self) -> None:
        for sessions in self._running:
            sessions.close()
        for thread in threading.enumerate():
            if "_relaunch" in thread.name:
                thread.join(60)  # it has a connection of the store
        self.desk.store.close()


@pytest.fixture
def places(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    monkeypatch.setattr(module, "OFFERED_S", 1.0)
    made = Places(tmp_path, cluster.migrated())
    yield made
    made.close()


def asked(one: Sessions, agreement: Agreement, others: dict[str, Sessions]) -> SessionView:
    """Opens a session, passed on once as the service does."""
    try:
        return one.open(key("ann"), REQUEST, agreement.digest)
    except ElsewhereError as elsewhere:
        return others[elsewhere.address].open(key("ann"), REQUEST, agreement.digest)


def test_crd_22_no_capacity_is_answered_by_one_that_counted_a_place(places: Places) -> None:
    agreement = make_agreement()
    places.desk.sign(agreement)
    sessions = places.sessions("a")
    sessions.recover()
    for times in (1, 2):
        with pytest.raises(UnavailableError) as caught:
            sessions.open(key("ann"), REQUEST, agreement.digest)
        assert caught.value.code == "no-capacity"
        # Nothing launches it again by itself, and the request may be repeated.
        assert (places.ends(), places.launches()) == ([("lost", "no-capacity")] * times, [times])


def test_crd_22_no_capacity_is_answered_when_each_has_tried(places: Places) -> None:
    agreement = make_agreement()
    places.desk.sign(agreement)
    a, b = places.sessions("a"), places.sessions("b")
    a.recover()
    b.recover()
    with pytest.raises(UnavailableError) as caught:
        asked(a, agreement, {"b": b})
    assert caught.value.code == "no-capacity"
    assert (places.ends(), places.launches()) == ([("lost", "no-capacity")], [1, 1])


def test_crd_22_who_found_no_place_tries_for_others_when_a_session_here_has_ended(places: Places) -> None:
    agreement, other = make_agreement(), replace(make_agreement(), purpose="Another.")
    for one in (agreement, other):
        places.desk.sign(one)
    sessions = places.sessions("a")
    sessions._live[7] = cast("Any", None)  # one that runs here
    with pytest.raises(UnavailableError, match="all 2 enclaves"):
        sessions.open(key("ann"), REQUEST, agreement.digest)
    places.launching(other)
    sessions._look(first=False)
    assert sessions._held == {} and places.ends()[1:] == [("launching", "")]
    sessions._let_go(7)
    sessions._look(first=False)
    until(lambda: places.launches() == [2])
    until(lambda: places.ends()[1:] == [("lost", "no-capacity")])


def test_crd_10_a_launching_session_that_nobody_serves_gives_way_to_a_newer_version(tmp_path: Path) -> None:
    places = Places(tmp_path, None)
    agreement = make_agreement()
    newer = replace(agreement, version=2, series_digest=agreement.digest, replaces=agreement.digest, purpose="More.")
    for one in (agreement, newer):
        places.desk.sign(one)
    places.launching(agreement)
    with pytest.raises(UnavailableError, match="all 2 enclaves"):
        places.sessions("a").open(key("ann"), REQUEST, newer.digest)
    assert places.ends() == [("lost", "agreement"), ("lost", "no-capacity")]
    places.close()


def test_crd_10_a_request_of_a_coordinator_that_was_killed_while_it_gave_up_is_free_again(places: Places) -> None:
    agreement = make_agreement()
    places.desk.sign(agreement)
    sessions = places.sessions("a")
    places.launching(agreement)
    with places.desk.store.write() as session:
        row = session.query(SessionRow).one()
        row.phase, row.code, row.ended_ms = "lost", "no-capacity", NOW
        session.add(OpenRequest(key=key("ann"), request=REQUEST, number=row.number))
    for launches in (0, 1):
        # What was given up is told once; the repetition is tried.
        with pytest.raises(UnavailableError) as caught:
            sessions.open(key("ann"), REQUEST, agreement.digest)
        assert caught.value.code == "no-capacity" and places.launches() == [launches]
