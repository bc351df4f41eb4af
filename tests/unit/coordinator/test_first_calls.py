"""What an enclave is asked first: a connection that is refused, broken or silent once ends no session."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy.orm import Session

from parley_coordinator import live
from parley_coordinator import sessions as module
from parley_coordinator.config import Deadlines
from parley_coordinator.images import Wanted
from parley_coordinator.launcher import EnclaveHandle
from parley_coordinator.leases import Lease
from parley_coordinator.live import Live, World
from parley_coordinator.models import SessionRow
from parley_coordinator.sessions import Sessions
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import ParleyError, UnavailableError
from support.desk import MEMBERS, Desk, key
from support.enclave import Simulation, agreement_of, until

pytestmark = pytest.mark.timeout(240)
SHORT_S = 6.0
"""What is silent costs so much; what answers on a busy machine does so within it."""


class Link:
    """The host's end of the enclave's socket. Each connection takes the next fault: "break" it, let it be "silent"; then all
    reach the enclave. `open` begins to listen; before it connections are refused."""

    def __init__(self, path: Path, enclave: Path) -> None:
        self.path = path
        self.faults: list[str] = []
        self.struck: list[str] = []
        self._enclave = enclave
        self._listener: socket.socket | None = None
        self._held: list[socket.socket] = []

    def open(self) -> None:
        """Listens."""
        if self._listener is None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self.path))
            self._listener.listen(64)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        """Ends what listens, and what was held."""
        for one in (self._listener, *self._held):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                host, _ = listener.accept()
            except OSError:
                return
            fault = self.faults.pop(0) if self.faults else ""
            if fault:
                self.struck.append(fault)
            if fault == "break":
                host.close()
                continue
            self._held.append(host)
            if fault == "silent":
                continue
            enclave = socket.socket(socket.AF_UNIX)
            enclave.connect(str(self._enclave))
            self._held.append(enclave)
            for one, other in ((host, enclave), (enclave, host)):
                threading.Thread(target=_pass, args=(one, other), daemon=True).start()


def _pass(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)


class Launcher:
    """Has one enclave, which it launches, finds, and stops."""

    def __init__(self, link: Link, simulation: Simulation) -> None:
        self.link = link
        self.simulation = simulation
        self.running: list[EnclaveHandle] = []
        self.launched = 0
        self.opens = True

    def launch(self, wanted: Wanted) -> EnclaveHandle:
        self.launched += 1
        if self.opens:
            self.link.open()
        self.running = [EnclaveHandle("e", wanted.digest, f"unix:{self.link.path}")]
        return self.running[0]

    def find(self) -> list[EnclaveHandle]:
        return list(self.running)

    def alive(self, handle: EnclaveHandle) -> bool:
        assert handle.id == "e"
        return self.simulation.process is not None and self.simulation.process.poll() is None

    def stop(self, handle: EnclaveHandle) -> None:
        self.running.remove(handle)


class Place:
    """A coordinator's sessions in this process, before a real enclave."""

    def __init__(self, folder: Path, simulation: Simulation) -> None:
        self.desk = Desk(folder)
        self.desk.now = time.time_ns() // 1_000_000
        self.agreement: Agreement = agreement_of(simulation, MEMBERS, analysts=["cyd"])
        self.desk.sign(self.agreement)
        self.launcher = Launcher(Link(folder / "e.sock", simulation.path), simulation)
        self.running: list[Sessions] = []

    def sessions(self) -> Sessions:
        """As another start of the coordinator has them."""
        desk = self.desk
        deadlines = Deadlines(short_s=SHORT_S, status_s=0.2)
        world = World(desk.store, desk.blobs, cast("Any", self.launcher), deadlines, desk.clock, desk.leases)
        made = Sessions(world)
        self.running.append(made)
        return made

    def open(self, sessions: Sessions) -> bytes:
        """ann opens a session; its id."""
        return sessions.open(key("ann"), b"r" * 16, self.agreement.digest).session

    def phases(self) -> list[str]:
        with self.desk.store.read() as session:
            return [row.phase for row in session.query(SessionRow).order_by(SessionRow.number)]

    def close(self) -> None:
        for sessions in self.running:
            sessions.close()
        self.launcher.link.close()
        self.desk.store.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.2)
    with Simulation(tmp_path) as simulation:
        made = Place(tmp_path, simulation)
        yield made
        made.close()


@pytest.mark.parametrize("faults", [["break"], ["break", "silent"], ["", "break"], ["", "", "silent"]])
def test_a_launch_asks_again_what_broke_or_was_silent(place: Place, faults: list[str]) -> None:
    # Load, Begin and Attest: each may be the one that is struck.
    place.launcher.link.faults = list(faults)
    sessions = place.sessions()
    identifier = place.open(sessions)
    assert place.phases() == ["open"] and place.launcher.launched == 1
    assert place.launcher.link.struck == [fault for fault in faults if fault]
    # It is one session: the enclave answered the repetition with the same offer.
    offer, document = sessions.attest(key("bob"), identifier, b"n" * 32)
    assert offer and document


def test_a_launch_whose_enclave_does_not_listen_yet_asks_again(place: Place) -> None:
    place.launcher.opens = False
    threading.Timer(0.15, place.launcher.link.open).start()
    module.FIRST_PAUSE_S, before = 5.0, module.FIRST_PAUSE_S
    try:
        place.open(place.sessions())
    finally:
        module.FIRST_PAUSE_S = before
    assert place.phases() == ["open"]


def test_a_launch_gives_up_in_the_end(place: Place) -> None:
    place.launcher.link.faults = ["break"] * module.FIRST_ATTEMPTS
    with pytest.raises(UnavailableError):
        place.open(place.sessions())
    assert place.phases() == ["lost"] and place.launcher.running == []
    # The request may be repeated as it is.
    place.open(place.sessions())
    assert place.phases() == ["lost", "open"]


def test_an_opening_whose_commit_got_no_answer_is_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fenced = place.desk.leases.fenced
    lost: list[Lease] = []

    @contextlib.contextmanager
    def unanswered(lease: Lease) -> Iterator[Session]:
        with fenced(lease) as session:
            yield session
        if not lost:
            lost.append(lease)
            raise UnavailableError("the database does not answer")

    monkeypatch.setattr(place.desk.leases, "fenced", unanswered)
    sessions = place.sessions()
    identifier = place.open(sessions)
    assert lost and place.phases() == ["open"] and place.launcher.launched == 1
    assert sessions.attest(key("bob"), identifier, b"n" * 32)


def test_a_session_is_followed_also_where_its_first_look_met_no_database(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    tick = Live.tick

    def away(self: Live) -> None:
        looks.append(1)
        if len(looks) == 1:
            raise UnavailableError("the database does not answer")
        tick(self)

    monkeypatch.setattr(Live, "tick", away)
    sessions = place.sessions()
    place.open(sessions)
    assert looks and place.phases() == ["open"]
    place.launcher.link.close()
    place.launcher.simulation.end()
    until(lambda: place.phases() == ["lost"])


def test_an_enclave_that_has_ended_is_not_asked_again(place: Place) -> None:
    place.launcher.link.faults = ["break", "break"]
    place.launcher.simulation.end()
    with pytest.raises(UnavailableError):
        place.open(place.sessions())
    assert place.launcher.link.struck == ["break"] and place.phases() == ["lost"]


def test_what_an_enclave_refuses_is_not_asked_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    begin = live.begin

    def counted(*arguments: Any) -> int:
        asked.append(arguments)
        return begin(*arguments)

    monkeypatch.setattr(live, "begin", counted)
    place.launcher.simulation.ahead_ms = 200 * 365 * 86_400_000  # its clock says that the agreement has expired
    with pytest.raises(ParleyError) as caught:
        place.open(place.sessions())
    assert not isinstance(caught.value, UnavailableError) and len(asked) == 1
    assert place.phases() == ["lost"]


@pytest.mark.parametrize("faults", [["break"], ["silent"], ["break", "break"]])
def test_a_restart_asks_again_what_broke_or_was_silent(place: Place, faults: list[str]) -> None:
    first = place.sessions()
    identifier = place.open(first)
    first.close()
    place.launcher.link.faults = list(faults)
    second = place.sessions()
    second.recover()

    def attested() -> bool:
        try:
            return bool(second.attest(key("bob"), identifier, b"n" * 32))
        except UnavailableError:
            return False

    until(attested)
    assert place.phases() == ["open"] and place.launcher.link.struck == faults


def test_a_restart_gives_up_in_the_end(place: Place) -> None:
    first = place.sessions()
    place.open(first)
    first.close()
    place.launcher.link.faults = ["break"] * module.FIRST_ATTEMPTS
    place.sessions().recover()
    until(lambda: place.phases() == ["lost"])
    until(lambda: place.launcher.running == [])


def test_what_is_left_of_a_session_that_was_lost_begins_no_other(place: Place) -> None:
    sessions = place.sessions()
    place.open(sessions)
    sessions.close()
    with place.desk.store.write() as session:
        session.query(SessionRow).one().phase = "lost"
    again = place.sessions()
    # The one enclave of this place is in the middle of a session: it would refuse.
    place.launcher.simulation.boot()
    assert again.open(key("ann"), b"s" * 16, place.agreement.digest).session
    assert place.launcher.launched == 2
