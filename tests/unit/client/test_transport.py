"""The client's wire: a real coordinator at the other end, killed, wrong or strange."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from parley.relay import Kind
from parley.transport import GrpcRelay
from parley_coordinator import tls
from parley_protocol.agreement.signed import sign
from parley_protocol.errors import RefusedError, StateError, UnavailableError
from parley_protocol.identity import PrivateIdentity
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


def relay(coordinator: Coordinator, identity: PrivateIdentity, patience_s: float = 20.0) -> GrpcRelay:
    return GrpcRelay(coordinator.address, identity, certificate=coordinator.certificate, patience_s=patience_s)


@pytest.fixture
def ada(coordinator: Coordinator, w: World) -> Iterator[GrpcRelay]:
    with relay(coordinator, w.members["ada"]) as connection:
        connection.put_agreement(w.agreement.canonical)
        yield connection


def sealed_table(w: World, folder: Path) -> tuple[Sealed, Path]:
    sealed = seal(w.agreement, "ada", w.members["ada"], "visits", rows_of(1, 200_000))
    blob = folder / "blob"
    blob.write_bytes(sealed.blob)
    return sealed, blob


def test_agreements_signatures_and_the_inbox(ada: GrpcRelay, coordinator: Coordinator, w: World) -> None:
    reply = ada.get_agreement(digest=w.agreement.digest)
    assert reply.canonical == w.agreement.canonical and "bea" in reply.missing
    reply = ada.put_signature(w.agreement.digest, "ada", sign(w.agreement, "ada", w.members["ada"]))
    assert "ada" not in reply.missing and set(reply.signatures) >= {"ada"}
    assert ada.get_agreement(series=w.agreement.digest).canonical == w.agreement.canonical
    with relay(coordinator, w.members["bea"]) as bea:
        waiting = [item for item in bea.inbox() if item.kind is Kind.SIGN]
    assert [(item.member, item.agreement) for item in waiting] == [("bea", w.agreement.digest)]


def test_a_stranger_gets_a_typed_refusal(ada: GrpcRelay, coordinator: Coordinator, w: World) -> None:
    with relay(coordinator, PrivateIdentity.generate(os.urandom)) as stranger, pytest.raises(RefusedError) as caught:
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
        with relay(running, w.members["ada"]) as connection:
            connection.put_agreement(w.agreement.canonical)
            for name in w.members:
                with relay(running, w.members[name]) as member:
                    member.put_signature(w.agreement.digest, name, sign(w.agreement, name, w.members[name]))
            seen: list[int] = []

            def progress(step: str, done: int, total: int) -> None:
                assert step == "upload" and total == len(sealed.blob)
                seen.append(done)
                if len(seen) == 2:
                    running.kill()
                    threading.Timer(0.3, running.start).start()

            reply = connection.upload(sealed.cose, sealed.upload.digest, blob, progress)
            assert reply.complete and reply.stored == len(sealed.blob)
            assert connection.upload(sealed.cose, sealed.upload.digest, blob).complete


def test_a_blob_that_is_gone_is_a_clear_error(ada: GrpcRelay, w: World, tmp_path: Path) -> None:
    sealed, blob = sealed_table(w, tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    for member in w.members:
        ada.put_signature(w.agreement.digest, member, sign(w.agreement, member, w.members[member]))
    with pytest.raises((StateError, OSError)):
        ada.upload(sealed.cose, sealed.upload.digest, folder)
    assert blob.exists()


def test_a_coordinator_that_is_away_is_waited_for_and_then_reported(coordinator: Coordinator, w: World) -> None:
    with GrpcRelay("127.0.0.1:9", w.members["ada"], certificate=coordinator.certificate, patience_s=0.5) as connection:
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            connection.inbox()
        assert time.monotonic() - began < 20


def test_another_server_is_not_spoken_to(coordinator: Coordinator, w: World, tmp_path: Path) -> None:
    tls.make(tmp_path / "other.crt", tmp_path / "other.key", ["localhost"], datetime.now(UTC))
    other = (tmp_path / "other.crt").read_bytes()
    with (
        GrpcRelay(coordinator.address, w.members["ada"], certificate=other, patience_s=0.5) as connection,
        pytest.raises(UnavailableError),
    ):
        connection.inbox()
    with pytest.raises(StateError):
        GrpcRelay(coordinator.address, w.members["ada"], certificate=b"no certificate")
    with pytest.raises((RefusedError, UnavailableError)):
        GrpcRelay(coordinator.address, w.members["ada"], certificate=None)


def test_events_go_on_after_a_number(ada: GrpcRelay) -> None:
    events = ada.watch()
    first = next(events)
    again = next(ada.watch(after=first.number - 1))
    assert again == first


def test_it_prints_no_key(ada: GrpcRelay) -> None:
    assert repr(ada) == "GrpcRelay()"
