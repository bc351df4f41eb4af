"""Whole sessions through a coordinator process and a real enclave, killed at each step."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from parley_coordinator import live
from parley_coordinator.models import JoinRow, SessionRow
from parley_coordinator.sessions import Sessions
from parley_coordinator.store import Store
from parley_deploy.nsm import LocalRoot, image_measurements
from parley_deploy.pki import system_now_ms
from parley_protocol.agreement.model import Consent, Measurement
from parley_protocol.agreement.signed import sign
from parley_protocol.bundle import VerifiedBundle, verify_bundle
from parley_protocol.chain import verify_chain
from parley_protocol.claims import verify_offer, verify_roster
from parley_protocol.errors import VerificationError
from parley_protocol.transcript import GENESIS, Refusal, Start
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1 import enclave_pb2
from support import image_tree
from support.coordinator import Coordinator, Play, error_info, now_ms, refused
from support.enclave import Party, Simulation, agreement_of, identities, rows_of, until

pytestmark = pytest.mark.e2e

NAMES = ("ann", "bob", "cyd")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image as it stands now: what is edited while the tests run changes neither measurement nor enclave."""
    folder = tmp_path_factory.mktemp("tree")
    for package in image_tree.PACKAGES:
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns(*image_tree.LEFT_OUT))
    shutil.copy(image_tree.LOCK, folder)
    return folder


@pytest.fixture(params=["sqlite", "postgresql"])
def coordinator(request: pytest.FixtureRequest, tmp_path: Path, tree: Path) -> Iterator[Coordinator]:
    folder = tmp_path / "c"
    root = folder / "root"
    root.mkdir(parents=True)
    LocalRoot.create(system_now_ms()).save(root)
    command = [sys.executable, "-m", "parley_deploy.enclave", "--root", str(root), "--workers", "1"]
    command += ["--tree", str(tree)]
    database = request.getfixturevalue("cluster").migrated() if request.param == "postgresql" else None
    with Coordinator(folder, command, database=database) as made:
        made.tree = tree
        yield made


def play(coordinator: Coordinator, rows: int = 2000, **session: Any) -> Play:
    """ann and bob bring tables, cyd is the analyst; signed, uploaded, and the coordinator running."""
    measured = image_measurements(coordinator.tree)
    simulation = SimpleNamespace(
        root=LocalRoot.load(coordinator.folder / "root"),
        measurement=Measurement(measured[0], measured[1], measured[2]),
    )
    members = identities(NAMES)
    agreement = agreement_of(cast("Simulation", simulation), members, analysts=["cyd"], **session)
    parties = {
        name: Party(agreement, name, members[name], {"visits": rows_of(number, rows)})
        for number, name in enumerate(agreement.parties)
    }
    coordinator.operators(members["ann"])
    coordinator.start()
    made = Play(coordinator, agreement, members, parties)
    made.sign()
    made.upload()
    return made


def bundle(made: Play, name: str = "cyd") -> VerifiedBundle:
    """The verified bundle of a released session; its plaintext opens for the recipient."""
    return verify_bundle(made.client(name).bundle(made.session), now_ms=now_ms())


def restart(coordinator: Coordinator) -> None:
    coordinator.kill()
    coordinator.start()


def test_crd_19_a_session_from_agreement_to_bundle(coordinator: Coordinator) -> None:
    made = play(coordinator)
    request = os.urandom(16)
    state = made.open(request)
    assert (state.phase, [party.phase for party in state.parties]) == ("open", ["uploaded", "uploaded"])
    assert made.open(request).session == made.open().session == state.session
    assert [made.client(name).waiting() for name in NAMES] == [["JOIN"], ["JOIN"], []]
    offer = made.offer("cyd")
    made.join(offer)
    assert [made.client(name).waiting() for name in NAMES] == [["START"], [], []]
    roster = made.start(offer)
    assert made.start(offer) == roster
    assert [made.client(name).waiting() for name in NAMES] == [["COUNTERSIGN"], ["COUNTERSIGN"], []]
    assert list(made.client("cyd").call("GetRoster", pb.SessionRef(session=made.session)).missing) == ["ann", "bob"]
    made.countersign(offer, roster, ["ann"])
    assert list(made.client("cyd").call("GetRoster", pb.SessionRef(session=made.session)).missing) == ["bob"]
    made.countersign(offer, roster, ["bob"])
    state = made.wait("released")
    assert (state.percent, [party.phase for party in state.parties]) == (100, ["countersigned", "countersigned"])
    assert [made.client(name).waiting() for name in NAMES] == [["FETCH"]] * 3
    whole = made.client("cyd").bundle(made.session)
    assert made.client("bob").bundle(made.session, len(whole) - 7) == whole[-7:]
    verified = bundle(made)
    assert verified.countersigned == ("ann", "bob")
    assert [made.client(name).waiting() for name in NAMES] == [["FETCH"], [], []]
    with refused("too-large"):
        made.client("ann").bundle(made.session, len(whole) + 1)
    kinds = [event.kind for event in made.client("bob").events(session=made.session)]
    assert [kind for kind in kinds if kind != "progress"] == [
        *("opened", "joined", "joined", "rostered", "countersigned", "countersigned", "computing", "released"),
        *("fetched", "fetched"),
    ]
    assert coordinator.enclaves() == []
    # The next session of the series goes on at the new head.
    chain = [
        (item.cose, item.document)
        for item in made.client("cyd").call("GetChain", pb.GetChainRequest(series=made.agreement.series))
    ]
    head = verify_chain(chain, [made.agreement], now_ms=now_ms()).head
    assert head == verified.record.record.head
    after = made.client("cyd").call("GetChain", pb.GetChainRequest(series=made.agreement.series, after=head))
    assert list(after) == []
    first = made.session
    assert made.open().session != first
    assert made.offer(head=head).offer.head == head
    assert coordinator.stop() == 0


def test_crd_11_every_caller_gets_a_document_for_its_own_nonce(coordinator: Coordinator) -> None:
    made = play(coordinator)
    made.open()
    nonces = [os.urandom(32), os.urandom(32)]
    replies = [
        made.client(name).call("Attest", pb.AttestRequest(session=made.session, nonce=nonce))
        for name, nonce in zip(("ann", "cyd"), nonces, strict=True)
    ]
    assert replies[0].offer == replies[1].offer
    for reply, nonce, other in zip(replies, nonces, nonces[::-1], strict=True):
        verify_offer(made.agreement, reply.offer, reply.document, nonce=nonce, head=GENESIS, now_ms=now_ms())
        with pytest.raises(VerificationError):
            verify_offer(made.agreement, reply.offer, reply.document, nonce=other, head=GENESIS, now_ms=now_ms())
    for nonce in (b"", bytes(31), bytes(33)):
        with refused("malformed"):
            made.client("ann").call("Attest", pb.AttestRequest(session=made.session, nonce=nonce))


def test_crd_14_the_same_countersignature_again_also_after_the_release(coordinator: Coordinator) -> None:
    made = play(coordinator)
    made.open()
    offer = made.offer()
    made.join(offer)
    roster = made.start(offer)
    cose = made.parties["ann"].consent(offer, roster).cose
    request = pb.PutCountersignatureRequest(session=made.session, cose=cose)
    for _ in range(2):
        assert made.client("ann").call("PutCountersignature", request).phase == "rostered"
    with refused("not-a-member"):
        made.client("bob").call("PutCountersignature", request)
    with refused("malformed"):
        made.client("ann").call(
            "PutCountersignature", pb.PutCountersignatureRequest(session=made.session, cose=b"garbage")
        )
    made.countersign(offer, roster, ["bob"])
    made.wait("released")
    assert made.client("ann").call("PutCountersignature", request).phase == "released"
    with refused("phase"):
        made.client("ann").call("PutJoin", pb.PutJoinRequest(session=made.session, cose=cose))


def test_crd_12_a_join_is_refused_with_a_code_and_may_come_again(coordinator: Coordinator) -> None:
    made = play(coordinator)
    made.open()
    offer = made.offer()
    bob = made.parties["bob"]
    wrong = bob.joining(offer, share_digest=b"x" * 48).cose
    for _ in range(2):
        reply = made.client("bob").call("PutJoin", pb.PutJoinRequest(session=made.session, cose=wrong))
        assert (reply.receipt, reply.code) == (b"", "key")
    with refused("not-a-member"):
        made.client("ann").call("PutJoin", pb.PutJoinRequest(session=made.session, cose=wrong))
    unknown = bob.joining(offer, uploads=(b"u" * 48,)).cose
    with refused("unknown-upload"):
        made.client("bob").call("PutJoin", pb.PutJoinRequest(session=made.session, cose=unknown))
    cose = bob.joining(offer).cose
    request = pb.PutJoinRequest(session=made.session, cose=cose)
    receipts = {made.client("bob").call("PutJoin", request).receipt for _ in range(2)}
    assert len(receipts) == 1
    with refused("quorum"):
        made.start(offer)
    incomplete = Party(made.agreement, "ann", made.members["ann"], {"visits": rows_of(9, 3000)})
    made.client("ann").upload(incomplete.sealed[0], 0, 1000)
    with refused("incomplete"):
        made.client("ann").call("PutJoin", pb.PutJoinRequest(session=made.session, cose=incomplete.joining(offer).cose))
    assert [party.phase for party in made.state().parties] == ["uploaded", "joined"]


def test_crd_15_a_refusal_opens_the_session_again(coordinator: Coordinator) -> None:
    made = play(coordinator)
    made.open()
    offer = made.offer()
    made.join(offer)
    roster = made.start(offer)
    made.countersign(offer, roster, ["ann"])
    cose = made.members["bob"].sign(Refusal(roster.digest, "bob").to_bytes())
    request = pb.RefuseRequest(session=made.session, cose=cose)
    for _ in range(2):
        assert made.client("bob").call("Refuse", request).phase == "open"
    assert [made.client(name).waiting() for name in NAMES] == [["JOIN"], ["JOIN"], []]
    events = made.client("cyd").events(session=made.session)
    assert [event.member for event in events if event.kind == "declined"] == ["bob"]
    assert [event.kind for event in events if event.kind in ("lapsed", "uploaded")] == []
    made.join(offer)
    second = made.start(offer)
    consent = made.parties["ann"].consent(offer, second)
    # What comes with a statement must be what it names; what the enclave refuses is not kept.
    unnamed = pb.PutCountersignatureRequest(
        session=made.session, cose=consent.cose, former=[pb.FormerRosterStatement(offer=offer.offer.to_bytes())]
    )
    with refused("roster"):
        made.client("ann").call("PutCountersignature", unnamed)
    assert [party.phase for party in made.state().parties] == ["joined", "joined"]
    made.countersign(offer, second)
    made.wait("released")
    assert bundle(made).roster == second


def test_crd_17_a_lapsed_roster_is_noticed_without_a_caller(coordinator: Coordinator) -> None:
    made = play(coordinator, countersign_within_ms=1500)
    made.open()
    offer = made.offer()
    made.join(offer)
    roster = made.start(offer)
    made.countersign(offer, roster, ["ann"])
    watcher = made.client("cyd")
    kinds = [event.kind for event in watcher.events(4.0, session=made.session)]
    assert kinds[-1] == "lapsed"
    with refused("phase"):
        made.countersign(offer, roster, ["bob"])
    assert made.client("bob").waiting() == ["JOIN"]
    made.join(offer)
    made.countersign(offer, made.start(offer))
    assert made.wait("released").phase == "released"


def test_crd_17_kill_between_a_join_stored_and_its_answer(coordinator: Coordinator) -> None:
    made = play(coordinator)
    made.open()
    offer = made.offer()
    enclave = coordinator.enclave_pid()
    os.kill(enclave, signal.SIGSTOP)
    cose = made.parties["bob"].joining(offer).cose
    request = pb.PutJoinRequest(session=made.session, cose=cose)
    client = made.client("bob")
    call = client.stub.PutJoin.future(request, metadata=client.metadata(), timeout=60)
    store = Store(coordinator.database)

    def stored() -> int:
        with store.read() as session:
            return session.query(JoinRow).count()

    until(lambda: stored() == 1)
    coordinator.kill()
    assert call.exception(timeout=10) is not None
    os.kill(enclave, signal.SIGCONT)
    coordinator.start()
    until(lambda: [party.phase for party in made.state().parties] == ["uploaded", "joined"])
    reply = made.client("bob").call("PutJoin", request)
    assert reply.receipt
    store.close()
    made.join(offer, "ann")
    made.countersign(offer, made.start(offer))
    made.wait("released")
    assert bundle(made).countersigned == ("ann", "bob")


def test_crd_17_kill_between_roster_and_countersignatures(coordinator: Coordinator) -> None:
    made = play(coordinator)
    request = os.urandom(16)
    made.open(request)
    restart(coordinator)
    assert made.open(request).session == made.session
    offer = made.offer()
    made.join(offer)
    roster = made.start(offer)
    restart(coordinator)
    assert list(made.client("cyd").call("GetRoster", pb.SessionRef(session=made.session)).missing) == ["ann", "bob"]
    made.countersign(offer, roster, ["ann"])
    restart(coordinator)
    made.countersign(offer, roster, ["bob"])
    made.wait("released")
    restart(coordinator)
    assert bundle(made).roster == roster


def test_crd_17_kill_while_the_last_countersignature_is_relayed(coordinator: Coordinator) -> None:
    made = play(coordinator)
    made.open()
    offer = made.offer()
    made.join(offer)
    roster = made.start(offer)
    made.countersign(offer, roster, ["ann"])
    enclave = coordinator.enclave_pid()
    os.kill(enclave, signal.SIGSTOP)
    # It is stored, and answered at once although the enclave says nothing.
    assert made.countersign(offer, roster, ["bob"]).phase == "rostered"
    coordinator.kill()
    os.kill(enclave, signal.SIGCONT)
    coordinator.start()
    made.wait("released")
    assert bundle(made).countersigned == ("ann", "bob")


@pytest.mark.parametrize("seed", range(4))
def test_crd_17_kill_at_any_moment_of_computing_and_storing(coordinator: Coordinator, seed: int) -> None:
    made = play(coordinator, rows=60_000)
    made.open()
    offer = made.offer()
    made.join(offer)
    roster = made.start(offer)
    made.countersign(offer, roster, ["ann"])
    caller = threading.Thread(target=_try, args=(made, offer, roster))
    caller.start()
    time.sleep(random.Random(seed).uniform(0.02, 0.5))
    coordinator.kill()
    caller.join()
    coordinator.start()
    if made.state().phase == "rostered":
        made.countersign(offer, roster, ["bob"])
    made.wait("released")
    assert bundle(made).countersigned == ("ann", "bob")
    until(lambda: coordinator.enclaves() == [])


def _try(made: Play, offer: Any, roster: Any) -> None:
    try:
        made.countersign(offer, roster, ["bob"])
    except (grpc.RpcError, ValueError):
        return


def test_crd_17_after_the_release_and_before_stored(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    from parley_coordinator import config
    from parley_coordinator.blobs import Directory
    from parley_coordinator.clock import now_ms as clock
    from parley_coordinator.launcher import LocalLauncher
    from parley_coordinator.leases import Leases
    from parley_coordinator.node import Identity

    made = play(coordinator)
    made.open()
    offer = made.offer()
    made.join(offer)
    roster = made.start(offer)
    coordinator.kill()
    settings = config.load(coordinator.folder / "coordinator.toml")
    store = Store(settings.database)
    launcher = LocalLauncher(settings.local, 4)
    identity = Identity.claim(settings)
    leases = Leases(store, identity, lease_s=10, abandon_s=60)
    world = live.World(store, Directory(settings.blobs), launcher, settings.deadlines, clock, leases)
    with monkeypatch.context() as patched:
        # As if the process had died after the transaction and before it told the enclave.
        patched.setattr(live, "tell_stored", lambda *arguments: None)
        sessions = Sessions(world)
        sessions.recover()
        for name in made.parties:
            cose = made.parties[name].consent(offer, roster).cose
            key = made.members[name].public.signing
            sessions.countersign(key, made.session, cose, pb.PutCountersignatureRequest())
        until(lambda: sessions.get(key, made.session).phase == "released")
        sessions.close()
    assert len(launcher.find()) == 1
    sessions = Sessions(world)
    sessions.recover()
    assert launcher.find() == []
    with store.read() as session:
        assert session.query(SessionRow.stored_told).scalar() is True
    sessions.close()
    store.close()
    identity.close()
    coordinator.start()
    assert bundle(made).roster == roster


def test_crd_17_a_lost_enclave_asks_for_joins_and_for_no_table(coordinator: Coordinator) -> None:
    made = play(coordinator)
    request = os.urandom(16)
    made.open(request)
    offer = made.offer()
    made.join(offer)
    roster = made.start(offer)
    reply = made.client("bob").call("GetRoster", pb.SessionRef(session=made.session))
    document = made.client("bob").call("Attest", pb.AttestRequest(session=made.session, nonce=bytes(32))).document
    made.countersign(offer, roster, ["bob"])
    lost = made.session
    os.kill(coordinator.enclave_pid(), signal.SIGKILL)
    state = made.wait("lost")
    assert (state.code, [party.phase for party in state.parties]) == ("lost", ["uploaded", "uploaded"])
    with refused("lost"):
        made.offer()
    assert made.open(request).phase == "lost"
    assert made.open().session not in (lost, b"")
    assert [made.client(name).waiting() for name in NAMES] == [["JOIN"], ["JOIN"], []]
    again = made.offer()
    made.join(again)
    second = made.start(again)
    assert second.inputs_digest == roster.inputs_digest
    former = enclave_pb2.FormerRoster(offer=offer.offer.to_bytes(), document=document, cose=reply.cose)
    made.countersign(again, second, ["ann"])
    consent = made.parties["bob"].consent(again, second, [former])
    statement = pb.FormerRosterStatement(offer=former.offer, document=former.document, cose=former.cose)
    made.client("bob").call(
        "PutCountersignature",
        pb.PutCountersignatureRequest(session=made.session, cose=consent.cose, former=[statement]),
    )
    made.wait("released")
    body = bundle(made).record.record.body
    assert (body.previous, body.sequence, body.charged) == (GENESIS, 1, 1)
    events = made.client("cyd").events()
    assert [event.member for event in events if event.kind == "uploaded"] == ["ann", "bob"]
    assert [event.session for event in events if event.kind == "lost"] == [lost]


def test_crd_17_both_killed_at_once(coordinator: Coordinator) -> None:
    made = play(coordinator)
    made.open()
    made.join(made.offer())
    os.kill(coordinator.enclave_pid(), signal.SIGKILL)
    restart(coordinator)
    assert made.state().phase == "lost"
    made.open()
    offer = made.offer()
    made.join(offer)
    made.countersign(offer, made.start(offer))
    made.wait("released")


def test_crd_17_sigterm_keeps_the_session(coordinator: Coordinator) -> None:
    made = play(coordinator)
    made.open()
    offer = made.offer()
    made.join(offer, "ann")
    assert coordinator.stop() == 0
    assert len(coordinator.enclaves()) == 1
    coordinator.start()
    made.join(offer, "bob")
    made.countersign(offer, made.start(offer))
    made.wait("released")


def test_crd_13_standing_consent_needs_no_countersignatures(coordinator: Coordinator) -> None:
    made = play(coordinator, consent=Consent.STANDING)
    made.open()
    offer = made.offer()
    made.join(offer)
    made.start(offer)
    made.wait("released")
    assert bundle(made).countersigned == ()


def test_crd_10_an_agreement_that_the_enclave_refuses_opens_nothing(coordinator: Coordinator) -> None:
    measured = image_measurements(coordinator.tree)
    simulation = SimpleNamespace(
        root=LocalRoot.load(coordinator.folder / "root"), measurement=Measurement(b"\1" * 48, measured[1], measured[2])
    )
    members = identities(NAMES)
    agreement = agreement_of(cast("Simulation", simulation), members, analysts=["cyd"])
    coordinator.operators(members["ann"])
    coordinator.start()
    made = Play(coordinator, agreement, members, {})
    made.sign()
    with refused("attestation"):
        made.open()
    assert coordinator.enclaves() == []
    assert made.client("cyd").waiting() == []


def test_crd_10_a_newer_version_takes_the_place_of_an_open_session(coordinator: Coordinator) -> None:
    made = play(coordinator)
    made.open()
    old = made.session
    second = replace(
        made.agreement, version=2, series_digest=made.agreement.digest, replaces=made.agreement.digest, purpose="More."
    )
    amended = Play(coordinator, second, made.members, {})
    amended.sign()
    with refused("agreement"):
        made.open()
    assert amended.open().agreement == second.digest
    assert amended.offer().agreement.version == 2
    state = made.client("bob").call("GetSession", pb.SessionRef(session=old))
    assert (state.phase, state.code) == ("lost", "agreement")
    assert len(coordinator.enclaves()) == 1


def test_crd_10_no_capacity_says_when_and_keeps_the_request(coordinator: Coordinator) -> None:
    file = coordinator.folder / "coordinator.toml"
    file.write_text(file.read_text().replace("[launcher.local]", "[launcher]\nenclaves = 1\n[launcher.local]"))
    made = play(coordinator)
    made.open()
    other = Play(coordinator, replace(made.agreement, purpose="Another."), made.members, {})
    other.sign()
    request = os.urandom(16)
    with pytest.raises(grpc.RpcError) as caught:
        other.open(request)
    info = error_info(caught.value)
    assert (info.reason, info.metadata["retry"], info.metadata["who"]) == ("no-capacity", "true", "operator")
    os.kill(coordinator.enclave_pid(), signal.SIGKILL)
    made.wait("lost")
    assert other.open(request).phase == "open"


def test_every_call_may_be_made_again(coordinator: Coordinator) -> None:
    """Each method twice with the same request, as a client does that got no answer."""
    made = play(coordinator)
    called: set[str] = set()
    answers: dict[bytes, Any] = {}
    joined: list[tuple[str, str, Any]] = []

    def twice(name: str, method: str, request: Any) -> Any:
        first = made.client(name).call(method, request)
        again = made.client(name).call(method, request)
        assert first == again, method
        called.add(method)
        return first

    agreement = made.agreement
    twice("ann", "PutAgreement", pb.PutAgreementRequest(canonical=agreement.canonical))
    cose = sign(agreement, "bob", made.members["bob"])
    twice("bob", "PutSignature", pb.PutSignatureRequest(agreement=agreement.digest, member="bob", cose=cose))
    twice("cyd", "GetAgreement", pb.GetAgreementRequest(series=agreement.digest))
    (sealed,) = made.parties["ann"].sealed
    assert made.client("ann").upload(sealed) == made.client("ann").upload(sealed, len(sealed.blob))
    called.add("Upload")
    twice("ann", "GetUpload", pb.UploadRef(upload=sealed.upload.digest))
    opening = pb.OpenSessionRequest(request_id=os.urandom(16), agreement=agreement.digest)
    made.session = twice("ann", "OpenSession", opening).session
    reference = pb.SessionRef(session=made.session)
    twice("bob", "Inbox", pb.InboxRequest())
    request = pb.AttestRequest(session=made.session, nonce=os.urandom(32))
    assert made.client("bob").call("Attest", request).offer == made.client("bob").call("Attest", request).offer
    called.add("Attest")

    def round_to_the_roster(offer: Any) -> Any:
        for name in made.parties:
            join = pb.PutJoinRequest(session=made.session, cose=made.parties[name].joining(offer).cose)
            answers[join.cose] = twice(name, "PutJoin", join)
            assert answers[join.cose].receipt
            joined.append((name, "PutJoin", join))
        start = pb.StartRequest(
            session=made.session, cose=made.members["ann"].sign(Start(offer.digest, "ann").to_bytes())
        )
        reply = twice("ann", "Start", start)
        # After the countersignatures nobody is missing.
        answers[start.cose] = pb.RosterReply(cose=reply.cose)
        joined.append(("ann", "Start", start))
        twice("cyd", "GetRoster", reference)
        return verify_roster(reply.cose, offer.offer, agreement)

    offer = made.offer()
    roster = round_to_the_roster(offer)
    refusal = made.parties["bob"].refusal(offer, roster).cose
    assert twice("bob", "Refuse", pb.RefuseRequest(session=made.session, cose=refusal)).phase == "open"
    roster = round_to_the_roster(offer)
    statements: list[tuple[str, str, Any]] = []
    for name in made.parties:
        cose = made.parties[name].consent(offer, roster).cose
        statements.append((name, "PutCountersignature", pb.PutCountersignatureRequest(session=made.session, cose=cose)))
    for name, method, request in statements:
        for _ in range(2):
            made.client(name).call(method, request)
        called.add(method)
    made.wait("released")
    # Whoever did not hear the answer before the release hears it after.
    for name, method, request in statements:
        assert made.client(name).call(method, request).phase == "released"
    for name, method, request in joined[-3:]:
        assert answers[request.cose] == made.client(name).call(method, request)
    twice("bob", "GetSession", reference)
    assert made.client("cyd").bundle(made.session) == made.client("cyd").bundle(made.session)
    called.add("GetBundle")
    chain = pb.GetChainRequest(series=agreement.series)
    assert len(list(made.client("bob").call("GetChain", chain))) == len(
        list(made.client("bob").call("GetChain", chain))
    )
    called.add("GetChain")
    events = made.client("bob").events(1.0)
    assert events == made.client("bob").events(1.0)
    called.add("Watch")
    kinds = [event.kind for event in events]
    assert (kinds.count("opened"), kinds.count("joined"), kinds.count("declined")) == (1, 4, 1)
    assert (kinds.count("countersigned"), kinds.count("released"), kinds.count("fetched")) == (2, 1, 1)
    # This agreement names no KMS key: test_kms_12_the_greatest_number_stands_and_the_same_again_changes_nothing.
    assert called | {"PutKmsJoin"} == set(pb.DESCRIPTOR.services_by_name["Coordinator"].methods_by_name)
