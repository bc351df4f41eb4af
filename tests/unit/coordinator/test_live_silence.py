"""An enclave that does not answer: under load it is waited for, and lost only where it has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from parley_coordinator import relay
from parley_coordinator.launcher import EnclaveHandle
from parley_coordinator.live import Live
from parley_coordinator.models import JoinRow, SessionRow
from parley_protocol.errors import UnavailableError
from support.desk import NOW, Desk, make_agreement

HANDLE = EnclaveHandle("e", b"", "vsock:16:5005")
LOCAL = EnclaveHandle("e", b"", "unix:e/enclave.sock")


class Launcher:
    """Knows whether the enclave has ended, and what was stopped."""

    def __init__(self, *, alive: bool) -> None:
        self._alive = alive
        self.stopped: list[EnclaveHandle] = []

    def alive(self, handle: EnclaveHandle) -> bool:
        assert handle in (HANDLE, LOCAL)
        return self._alive

    def stop(self, handle: EnclaveHandle) -> None:
        self.stopped.append(handle)


class Silent(Live):
    """A live session whose enclave's address is tried by `attempt`."""

    def __init__(self, desk: Desk, launcher: Launcher, handle: EnclaveHandle = HANDLE) -> None:
        agreement = make_agreement()
        desk.sign(agreement)
        self._number, self._lease = desk.open(agreement)
        with desk.store.write() as session:
            join = JoinRow(number=self._number, digest=b"j", party="ann", cose=b"", receipt=b"r", code="", at_ms=NOW)
            session.add(join)
        deadlines = SimpleNamespace(short_s=1.0)
        world = SimpleNamespace(
            store=desk.store, clock=desk.clock, launcher=launcher, deadlines=deadlines, leases=desk.leases
        )
        self._world = cast("Any", world)
        self._handle = handle
        self._channel = relay.Channel(handle.address)
        self._session = b"s" * 16
        self._lock = threading.RLock()
        self._epoch = 0
        self._over = threading.Event()
        self._frames = cast("Any", SimpleNamespace(close=lambda: None))
        self._ended = lambda number: None

    @property
    def phase(self) -> str:
        """What the store says."""
        with self._world.store.read() as session:
            return session.get_one(SessionRow, self._number).phase


@pytest.fixture
def desk(tmp_path: Path, database: str) -> Iterator[Desk]:
    made = Desk(tmp_path, database=database)
    yield made
    made.store.close()


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[UnavailableError]], None]:
    def make(kind: type[UnavailableError]) -> None:
        def connect(address: str, timeout_s: float = 1.0) -> Any:
            assert address in (HANDLE.address, LOCAL.address)
            raise kind("no answer")

        monkeypatch.setattr(relay, "connect", connect)

    return make


@pytest.mark.parametrize(
    ("kind", "handle"), [(UnavailableError, HANDLE), (UnavailableError, LOCAL), (relay.GoneError, HANDLE)]
)
def test_an_enclave_that_is_silent_and_alive_is_waited_for(
    desk: Desk,
    silence: Callable[[type[UnavailableError]], None],
    kind: type[UnavailableError],
    handle: EnclaveHandle,
) -> None:
    # Over vsock a full queue says the same as a port where nothing listens.
    silence(kind)
    launcher = Launcher(alive=True)
    live = Silent(desk, launcher, handle)
    live.tick()
    assert (live.phase, launcher.stopped) == ("open", [])


def test_a_local_enclave_whose_socket_is_gone_is_lost(
    desk: Desk, silence: Callable[[type[UnavailableError]], None]
) -> None:
    silence(relay.GoneError)
    launcher = Launcher(alive=True)
    live = Silent(desk, launcher, LOCAL)
    live.tick()
    assert (live.phase, launcher.stopped) == ("lost", [LOCAL])


@pytest.mark.parametrize("kind", [UnavailableError, relay.GoneError])
def test_an_enclave_that_has_ended_is_lost(
    desk: Desk, silence: Callable[[type[UnavailableError]], None], kind: type[UnavailableError]
) -> None:
    silence(kind)
    launcher = Launcher(alive=False)
    live = Silent(desk, launcher)
    live.tick()
    assert (live.phase, launcher.stopped) == ("lost", [HANDLE])
    with live._world.store.read() as session:
        assert session.query(JoinRow).count() == 0
