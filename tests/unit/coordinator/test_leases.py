"""Leases: one holder at a time, a token that grows, and who was overtaken changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from parley_coordinator import config as configuration
from parley_coordinator import live
from parley_coordinator import sessions as module
from parley_coordinator.config import ConfigError
from parley_coordinator.launcher import EnclaveHandle
from parley_coordinator.leases import FencedError, Lease, Leases
from parley_coordinator.models import LeaseRow, SessionRow
from parley_coordinator.node import Identity, exclusive
from parley_coordinator.sessions import Sessions
from parley_coordinator.store import Store
from parley_protocol.errors import UnavailableError
from support.desk import NOW, Desk, make_agreement
from support.enclave import until

LEASE_MS = 10_000
ABANDON_MS = 60_000


class Clock(Store):
    """A store whose database's clock is set."""

    now = NOW

    def now_ms(self, session: object) -> int:
        return self.now


@pytest.fixture
def store(tmp_path: Path, database: str) -> Iterator[Clock]:
    desk = Desk(tmp_path, database=database)
    agreement = make_agreement()
    desk.sign(agreement)
    desk.store.close()
    made = Clock(database)
    with made.write() as session:
        session.add(
            SessionRow(
                number=1,
                session=b"s" * 16,
                agreement=agreement.digest,
                series=agreement.series,
                begin=b"",
                phase="open",
                enclave="e",
                opened_ms=NOW,
            )
        )
    yield made
    made.close()


def leases(store: Store, holder: str, node: str = "node") -> Leases:
    made = Leases(store, Identity(holder, node), lease_s=LEASE_MS / 1000, abandon_s=ABANDON_MS / 1000)
    made.address = f"{holder}:1"
    return made


def phase(store: Store, **fields: object) -> None:
    with store.write() as session:
        row = session.get_one(SessionRow, 1)
        for name, value in fields.items():
            setattr(row, name, value)


def test_one_holder_at_a_time(store: Clock) -> None:
    a, b = leases(store, "a"), leases(store, "b")
    assert (a.free(first=False), b.free(first=False)) == ([1], [1])
    first = a.take(1, first=False)
    assert first == Lease(1, 1)
    assert (a.free(first=False), b.free(first=False)) == ([], [])
    assert (a.take(1, first=False), b.take(1, first=False)) == (None, None)
    assert (a.elsewhere(1), b.elsewhere(1)) == (None, "a:1")
    store.now += LEASE_MS - 1
    assert b.take(1, first=False) is None
    assert a.renew([first]) == []
    store.now += LEASE_MS - 1
    assert b.take(1, first=False) is None
    store.now += 1
    assert b.elsewhere(1) is None
    second = b.take(1, first=False)
    assert second == Lease(1, 2, overtaken=True)
    assert (a.elsewhere(1), a.take(1, first=False)) == ("b:1", None)


def test_crd_22_who_was_overtaken_changes_nothing(store: Clock) -> None:
    a, b = leases(store, "a"), leases(store, "b")
    old = a.take(1, first=False)
    assert old is not None
    with a.fenced(old) as session:
        session.get_one(SessionRow, 1).deadline_ms = 1
    store.now += LEASE_MS
    # Late, and nobody was faster: it goes on.
    with a.fenced(old) as session:
        session.get_one(SessionRow, 1).deadline_ms = 2
    new = b.take(1, first=False)
    assert new is not None
    for leases_, lease in ((a, old), (a, new), (b, old), (b, Lease(1, 3)), (b, Lease(9, 1))):
        with pytest.raises(FencedError) as caught, leases_.fenced(lease):
            pytest.fail("the block was reached")
        assert (caught.value.code, caught.value.retry_after_ms) == ("unavailable", 1000)
    assert (a.renew([old]), b.renew([new])) == ([old], [])
    nothing = cast("Any", None)
    world = live.World(store, nothing, nothing, nothing, lambda: NOW, a)
    with pytest.raises(FencedError):
        live.lose(world, old, "lost")
    with store.read() as session:
        row = session.get_one(SessionRow, 1)
        assert (row.phase, row.deadline_ms) == ("open", 2)


def test_a_transaction_that_was_overtaken_in_the_middle_cannot_be(store: Clock) -> None:
    """Whoever takes over waits for it: both hold the writers' lock."""
    import threading

    a, b = leases(store, "a"), leases(store, "b")
    lease = a.take(1, first=False)
    assert lease is not None
    store.now += LEASE_MS
    other = Clock(store._engine.url.render_as_string(hide_password=False))
    other.now = store.now
    taken: list[Lease | None] = []
    thread = threading.Thread(target=lambda: taken.append(leases(other, "b").take(1, first=False)))
    with a.fenced(lease) as session:
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and taken == []
        session.get_one(SessionRow, 1).deadline_ms = 7
    thread.join(30)
    assert taken == [Lease(1, 2, overtaken=True)]
    other.close()
    assert b.elsewhere(1) is None


def test_a_restart_in_the_same_folder_waits_for_nothing(store: Clock) -> None:
    before, after = leases(store, "a"), leases(store, "a")
    old = before.take(1, first=False)
    assert old is not None
    assert after.free(first=False) == []
    assert after.free(first=True) == [1]
    assert after.take(1, first=True) == Lease(1, 2)
    with pytest.raises(FencedError), before.fenced(old):
        pytest.fail("the block was reached")


def test_another_machine_waits_for_those_that_reach_the_enclave(store: Clock) -> None:
    a, far = leases(store, "a"), leases(store, "f", "far")
    assert a.take(1, first=False) is not None
    store.now += LEASE_MS + ABANDON_MS - 1
    assert (far.free(first=True), far.take(1, first=True)) == ([], None)
    store.now += 1
    assert far.take(1, first=False) == Lease(1, 2, overtaken=True)
    with store.read() as session:
        assert session.get_one(LeaseRow, 1).node == "node"


def test_what_has_no_enclave_yet_goes_anywhere(store: Clock) -> None:
    a, far = leases(store, "a"), leases(store, "f", "far")
    phase(store, phase="launching", enclave="")
    assert a.take(1, first=False) is not None
    assert a.of_node()[0] == set()
    assert len(a.of_node()[1]) == 1
    store.now += LEASE_MS
    assert far.take(1, first=False) is not None
    with store.read() as session:
        assert session.get_one(LeaseRow, 1).node == "far"
    assert a.of_node() == (set(), set())


class Enclaves:
    """A launcher with enclaves that run."""

    def __init__(self, *handles: EnclaveHandle) -> None:
        self.running = list(handles)

    def find(self) -> list[EnclaveHandle]:
        return list(self.running)

    def stop(self, handle: EnclaveHandle, unless: Callable[[], bool] = lambda: False) -> None:
        self.before_stop()
        if not unless():
            self.running.remove(handle)

    def before_stop(self) -> None:
        """What others do meanwhile."""


def test_an_enclave_whose_session_was_given_up_elsewhere_is_ended(store: Clock) -> None:
    a, far = leases(store, "a"), leases(store, "f", "far")
    assert a.take(1, first=False) is not None
    with store.read() as session:
        agreement = session.get_one(SessionRow, 1).agreement
    used = EnclaveHandle("e", agreement, "unix:e")
    launcher = Enclaves(used)
    nothing = cast("Any", None)
    sessions = Sessions(live.World(store, nothing, cast("Any", launcher), nothing, lambda: NOW, a))
    for _ in range(3):
        sessions._sweep()
    assert launcher.running == [used]
    # This coordinator was stopped, and wakes up after another machine has given the session up.
    store.now += LEASE_MS + ABANDON_MS
    lease = far.take(1, first=False)
    assert lease is not None
    live.lose(live.World(store, nothing, nothing, nothing, lambda: NOW, far), lease, "lost")
    sessions._sweep()
    assert launcher.running == [used], "it may just be about to be used"
    sessions._sweep()
    assert launcher.running == []


def test_a_stray_that_another_coordinator_is_about_to_use_is_not_ended(store: Clock) -> None:
    """It has noted its session after the sweep looked, and found the enclave before the sweep ended it."""
    a, b = leases(store, "a"), leases(store, "b")
    with store.read() as session:
        agreement = session.get_one(SessionRow, 1).agreement
    with store.write() as session:
        session.get_one(SessionRow, 1).phase = "lost"
    stray = EnclaveHandle("e", agreement, "unix:e")
    launcher = Enclaves(stray)
    nothing = cast("Any", None)
    sessions = Sessions(live.World(store, nothing, cast("Any", launcher), nothing, lambda: NOW, a))
    sessions._sweep()

    def opened() -> None:
        with store.write() as session:
            row = session.get_one(SessionRow, 1)
            row.phase, row.enclave = "launching", ""
        b.take(1, first=False)

    launcher.before_stop = opened  # type: ignore[method-assign]
    sessions._sweep()
    assert launcher.running == [stray]


def test_an_enclave_that_is_being_started_is_not_ended(store: Clock) -> None:
    a = leases(store, "a")
    phase(store, phase="launching", enclave="")
    assert a.take(1, first=False) is not None
    with store.read() as session:
        agreement = session.get_one(SessionRow, 1).agreement
    starting, stray = EnclaveHandle("n", agreement, "unix:n"), EnclaveHandle("s", b"other", "unix:s")
    launcher = Enclaves(starting, stray)
    nothing = cast("Any", None)
    sessions = Sessions(live.World(store, nothing, cast("Any", launcher), nothing, lambda: NOW, a))
    sessions._sweep()
    sessions._sweep()
    assert launcher.running == [starting]


def test_strays_are_looked_for_again_and_again(store: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.01)
    a = leases(store, "a")
    a.renew_s = 0.01
    launcher = Enclaves()
    nothing = cast("Any", None)
    sessions = Sessions(live.World(store, nothing, cast("Any", launcher), nothing, lambda: NOW, a))
    phase(store, phase="lost")
    sessions.recover()
    launcher.running.append(EnclaveHandle("s", b"other", "unix:s"))
    until(lambda: launcher.running == [])
    sessions.close()


@pytest.mark.parametrize(
    ("found", "told", "free"), [("lost", False, []), ("released", True, []), ("released", False, [1])]
)
def test_sessions_that_have_ended_need_nobody(store: Clock, found: str, told: bool, free: list[int]) -> None:
    phase(store, phase=found, stored_told=told)
    assert leases(store, "a").free(first=True) == free


def test_an_end_in_order_lets_others_go_on_at_once(store: Clock) -> None:
    a, b = leases(store, "a"), leases(store, "b")
    lease = a.take(1, first=False)
    assert lease is not None
    a.give_up([lease, Lease(1, 99)])
    assert b.take(1, first=False) is not None
    a.give_up([lease])
    assert b.elsewhere(1) is None
    assert a.elsewhere(1) == "b:1"


def test_names_are_kept_and_one_process_has_them(tmp_path: Path) -> None:
    from dataclasses import replace

    config = configuration.defaults(tmp_path)
    first = Identity.claim(config)
    with pytest.raises(ConfigError, match="another coordinator runs in this folder"):
        Identity.claim(config)
    first.close()
    with Identity.claim(config) as again:
        assert (again.holder, again.node) == (first.holder, first.node)
    (tmp_path / "b").mkdir()
    beside = configuration.from_tree({"launcher": {"local": {"folder": str(config.local.folder)}}}, tmp_path / "b")
    with Identity.claim(beside) as other:
        assert (other.holder != first.holder, other.node) == (True, first.node)
    with Identity.claim(replace(config, node="here")) as named:
        assert named.node == "here"


def test_one_process_at_a_time_is_at_the_enclaves(tmp_path: Path) -> None:
    with exclusive(tmp_path, 1), pytest.raises(UnavailableError, match="another coordinator"), exclusive(tmp_path, 0.1):
        pytest.fail("the block was reached")
    with exclusive(tmp_path, 0.1):
        pass
