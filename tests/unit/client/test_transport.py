"""The client's wire: a real coordinator at the other end, killed, wrong or strange."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from parley import transport
from parley.transport import Transport
from parley_coordinator import tls
from parley_protocol.agreement.signed import sign
from parley_protocol.errors import MalformedError, RefusedError, StateError, UnavailableError, VerificationError
from parley_protocol.identity import PrivateIdentity
from parley_protocol.v1 import coordinator_pb2 as pb
from support.coordinator import Coordinator
from support.enclave import Sealed, rows_of, seal
from support.world import World, world


@pytest.fixture(scope="module")
def w() -> World:
    return world()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, w: World) -> Iterator[Coordinator]:
    with Coordinator(tmp_path_factory.mktemp("coordinator"), ["false"]) as running:
        running.operators(w.members["ada"])
        running.start()
        yield running


def relay(coordinator: Coordinator, identity: PrivateIdentity, patience_s: float = 20.0) -> Transport:
    return Transport(coordinator.address, identity, coordinator.certificate.decode(), patience_s=patience_s)


@pytest.fixture
def ada(coordinator: Coordinator, w: World) -> Iterator[Transport]:
    with closing(relay(coordinator, w.members["ada"])) as connection:
        connection.put_agreement(w.agreement.canonical)
        yield connection


def sealed_table(w: World, folder: Path) -> tuple[Sealed, Path]:
    sealed = seal(w.agreement, "ada", w.members["ada"], "visits", rows_of(1, 200_000))
    blob = folder / "blob"
    blob.write_bytes(sealed.blob)
    return sealed, blob


def test_agreements_signatures_and_the_inbox(ada: Transport, coordinator: Coordinator, w: World) -> None:
    reply = ada.get_agreement(digest=w.agreement.digest)
    assert reply.canonical == w.agreement.canonical and "bea" in reply.missing
    reply = ada.put_signature(w.agreement.digest, "ada", sign(w.agreement, "ada", w.members["ada"]))
    assert "ada" not in reply.missing and set(reply.signatures) >= {"ada"}
    assert ada.get_agreement(series=w.agreement.digest).canonical == w.agreement.canonical
    with closing(relay(coordinator, w.members["bea"])) as bea:
        waiting = [item for item in bea.inbox().items if item.kind == pb.InboxItem.KIND_SIGN]
    assert [(item.member, item.agreement) for item in waiting] == [("bea", w.agreement.digest)]


def test_a_stranger_gets_a_typed_refusal(ada: Transport, coordinator: Coordinator, w: World) -> None:
    with (
        closing(relay(coordinator, PrivateIdentity.generate(os.urandom))) as stranger,
        pytest.raises(RefusedError) as caught,
    ):
        stranger.get_agreement(digest=w.agreement.digest)
    assert caught.value.code == "stranger"
    with pytest.raises(RefusedError) as caught:
        ada.get_agreement(digest=bytes(48))
    assert caught.value.code == "unknown-agreement"


def test_an_upload_goes_on_where_a_killed_coordinator_stopped(w: World, tmp_path: Path) -> None:
    sealed, blob = sealed_table(w, tmp_path)
    with Coordinator(tmp_path / "c", ["false"]) as running:
        running.operators(w.members["ada"])
        running.start()
        # The same port again, as a restarted service has.
        config = running.folder / "coordinator.toml"
        config.write_text(config.read_text().replace("127.0.0.1:0", running.address))
        with closing(relay(running, w.members["ada"])) as connection:
            connection.put_agreement(w.agreement.canonical)
            for name in w.members:
                with closing(relay(running, w.members[name])) as member:
                    member.put_signature(w.agreement.digest, name, sign(w.agreement, name, w.members[name]))
            seen: list[int] = []

            def progress(step: str, done: int, total: int) -> None:
                assert step == "upload" and total == len(sealed.blob)
                seen.append(done)
                if len(seen) == 2:
                    running.kill()
                    threading.Timer(0.3, running.start).start()

            connection.upload(sealed.upload.digest, sealed.cose, blob, progress)
            assert len(seen) > 2 and seen[-1] == len(sealed.blob)
            seen.clear()
            connection.upload(sealed.upload.digest, sealed.cose, blob, seen.append)  # type: ignore[arg-type]
            assert not seen, "what is stored was sent again"


def test_a_blob_that_is_gone_is_a_clear_error(ada: Transport, w: World, tmp_path: Path) -> None:
    sealed, blob = sealed_table(w, tmp_path)
    for member in w.members:
        ada.put_signature(w.agreement.digest, member, sign(w.agreement, member, w.members[member]))
    blob.unlink()
    with pytest.raises((StateError, OSError)):
        ada.upload(sealed.upload.digest, sealed.cose, blob)


def test_a_coordinator_that_is_away_is_waited_for_and_then_reported(coordinator: Coordinator, w: World) -> None:
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        Transport("127.0.0.1:9", w.members["ada"], coordinator.certificate.decode(), patience_s=0.5)
    assert time.monotonic() - began < 20


def test_another_server_is_not_spoken_to(coordinator: Coordinator, w: World, tmp_path: Path) -> None:
    tls.make(tmp_path / "other.crt", tmp_path / "other.key", ["localhost"], datetime.now(UTC))
    for pin in ((tmp_path / "other.crt").read_text(), "sha384:" + "00" * 48, None):
        with pytest.raises((VerificationError, RefusedError)):
            Transport(coordinator.address, w.members["ada"], pin, patience_s=0.5)
    with pytest.raises(MalformedError):
        Transport(coordinator.address, w.members["ada"], "no certificate")
    with pytest.raises(MalformedError):
        Transport("nowhere", w.members["ada"], None)


def test_events_go_on_after_a_number(ada: Transport) -> None:
    first = next(ada.events(0, b"", 5.0))
    assert next(ada.events(first.number - 1, b"", 5.0)) == first


class Slept:
    """What the pauses were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pauses: list[float] = []
        self.now = 0.0
        monkeypatch.setattr(transport.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(transport.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def failing(times: int, error: Callable[[], Exception], before: Callable[[], None] = lambda: None) -> Callable[[], str]:
    """Work that fails some times and then does not."""
    left = [times]

    def work() -> str:
        before()
        if left[0]:
            left[0] -= 1
            raise error()
        return "done"

    return work


def test_pauses_grow_with_jitter_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = Slept(monkeypatch)
    with pytest.raises(UnavailableError):
        Transport._again(failing(999, lambda: UnavailableError("away")), 60.0)
    assert 55 < slept.now <= 60
    assert len(slept.pauses) < 40
    assert all(0.5 * 0.2 <= pause <= 1.5 * 5.0 for pause in slept.pauses)
    assert slept.pauses[0] < 0.31 and max(slept.pauses) > 2.5
    assert len(set(slept.pauses)) == len(slept.pauses)


def test_the_time_that_is_asked_for_is_kept_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = Slept(monkeypatch)
    for _ in range(50):
        Transport._again(failing(1, lambda: UnavailableError("busy", code="busy", retry_after_ms=4000)), 60.0)
    assert all(4.0 <= pause <= 5.0 for pause in slept.pauses)
    assert max(slept.pauses) - min(slept.pauses) > 0.3
    with pytest.raises(UnavailableError):
        Transport._again(failing(1, lambda: UnavailableError("full", retry_after_ms=90_000)), 60.0)


@pytest.mark.parametrize("code", ["conflict", "lost", "internal", "quota"])
def test_what_would_be_refused_again_is_not_asked_again(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    slept = Slept(monkeypatch)
    with pytest.raises(RefusedError):
        Transport._again(failing(1, lambda: RefusedError(code)), 60.0)
    assert slept.pauses == []


def test_a_call_that_was_held_is_made_again_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A join of a large table: each attempt lasts as long as it may, and the enclave reads on meanwhile."""
    slept = Slept(monkeypatch)

    def held() -> None:
        slept.now += transport.LONG_S

    assert Transport._again(failing(20, lambda: UnavailableError("deadline"), held), 60.0) == "done"
    with pytest.raises(UnavailableError):
        Transport._again(failing(999, lambda: UnavailableError("deadline"), held), 60.0)
    assert slept.now < 2 * (transport.WHOLE_S + 2 * transport.LONG_S)
