"""Whoever reaches the coordinator over the network: strangers, replayed caller statements, false servers, huge messages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from parley.transport import Transport
from parley_coordinator import tls
from parley_deploy.nsm import LocalRoot, image_measurements
from parley_deploy.pki import moment, system_now_ms
from parley_protocol import limits
from parley_protocol.agreement.model import Measurement
from parley_protocol.agreement.signed import sign
from parley_protocol.errors import RefusedError
from parley_protocol.identity import PrivateIdentity
from parley_protocol.transcript import Start
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1.coordinator_pb2_grpc import CoordinatorStub
from support.coordinator import Client, Coordinator, Play, code_of
from support.enclave import Party, Simulation, agreement_of, identities, rows_of
from support.kms import PaperKms

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """A coordinator with an agreement of ann and bob, their uploads and a live session that both joined."""
    folder = tmp_path_factory.mktemp("network") / "c"
    root = folder / "root"
    root.mkdir(parents=True)
    LocalRoot.create(system_now_ms()).save(root)
    command = [sys.executable, "-m", "parley_deploy.enclave", "--root", str(root), "--workers", "1"]
    with Coordinator(folder, command) as coordinator:
        measured = image_measurements(None)
        simulation = SimpleNamespace(
            root=LocalRoot.load(root), measurement=Measurement(measured[0], measured[1], measured[2])
        )
        members = identities(("ann", "bob"))
        agreement = agreement_of(cast("Simulation", simulation), members)
        parties = {name: Party(agreement, name, members[name], {"visits": rows_of(7, 300)}) for name in members}
        coordinator.operators(members["ann"])
        coordinator.start()
        made = Play(coordinator, agreement, members, parties)
        made.sign()
        made.upload()
        made.open()
        made.join(made.offer())
        yield made


def calls(play: Play, by: PrivateIdentity) -> dict[str, Callable[[Client], Any]]:
    """Every call of the service that names something of ann and bob."""
    session, digest = play.session, play.agreement.digest
    upload = play.parties["bob"].sealed[0]
    signature = sign(play.agreement, "bob", play.members["bob"])
    start = by.sign(Start(bytes(48), "ann").to_bytes())

    def call(method: str, request: Any) -> Callable[[Client], Any]:
        return lambda client: client.call(method, request)

    def stream(method: str, request: Any) -> Callable[[Client], Any]:
        return lambda client: list(getattr(client.stub, method)(request, metadata=client.metadata(), timeout=30.0))

    return {
        "PutAgreement": call("PutAgreement", pb.PutAgreementRequest(canonical=play.agreement.canonical)),
        "PutSignature": call("PutSignature", pb.PutSignatureRequest(agreement=digest, member="bob", cose=signature)),
        "GetAgreement": call("GetAgreement", pb.GetAgreementRequest(digest=digest)),
        "GetAgreement of a series": call("GetAgreement", pb.GetAgreementRequest(series=play.agreement.series)),
        "Upload": lambda client: client.upload(upload),
        "GetUpload": call("GetUpload", pb.UploadRef(upload=upload.upload.digest)),
        "OpenSession": call("OpenSession", pb.OpenSessionRequest(request_id=bytes(16), agreement=digest)),
        "GetSession": call("GetSession", pb.SessionRef(session=session)),
        "Attest": call("Attest", pb.AttestRequest(session=session, nonce=bytes(32))),
        "PutJoin": call("PutJoin", pb.PutJoinRequest(session=session, cose=signature)),
        "PutKmsJoin": call("PutKmsJoin", pb.PutKmsJoinRequest(cose=play.parties["bob"].kms_join(PaperKms()).cose)),
        "Start": call("Start", pb.StartRequest(session=session, cose=start)),
        "GetRoster": call("GetRoster", pb.SessionRef(session=session)),
        "PutCountersignature": call("PutCountersignature", pb.PutCountersignatureRequest(session=session, cose=start)),
        "Refuse": call("Refuse", pb.RefuseRequest(session=session, cose=start)),
        "GetBundle": stream("GetBundle", pb.GetBundleRequest(session=session)),
        "GetChain": stream("GetChain", pb.GetChainRequest(series=play.agreement.series)),
    }


def test_a_stranger_gets_nothing(play: Play) -> None:
    eve = identities(["eve"])["eve"]
    client = play.coordinator.client(eve)
    for name, call in calls(play, eve).items():
        with pytest.raises(grpc.RpcError) as caught:
            call(client)
        # What is there and what is not are told alike: a stranger learns neither.
        told = code_of(caught.value)
        assert told in ("stranger", "unknown-agreement", "unknown-session", "unknown-upload"), (name, told)
    try:
        assert not client.inbox()
        assert not client.events(0.5)
    except grpc.RpcError as error:
        assert code_of(error) == "stranger"
    # The service has no call that the list above lacks.
    methods = {name.partition(" ")[0] for name in calls(play, eve)} | {"Inbox", "Watch"}
    service = pb.DESCRIPTOR.services_by_name["Coordinator"]
    assert methods == {method.name for method in service.methods}


def test_what_is_there_and_what_is_not_look_alike_to_a_stranger(play: Play) -> None:
    eve = identities(["eve"])["eve"]
    client = play.coordinator.client(eve)
    codes = []
    for session in (play.session, os.urandom(16)):
        with pytest.raises(grpc.RpcError) as caught:
            client.call("GetSession", pb.SessionRef(session=session))
        codes.append((code_of(caught.value), caught.value.details()))  # type: ignore[attr-defined]
    assert codes[0] == codes[1]


def test_a_members_key_opens_nothing_that_needs_an_operator(play: Play) -> None:
    bob = play.client("bob")
    for method, request in (
        ("PutAgreement", pb.PutAgreementRequest(canonical=play.agreement.canonical)),
        ("OpenSession", pb.OpenSessionRequest(request_id=bytes(16), agreement=play.agreement.digest)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            bob.call(method, request)
        assert code_of(caught.value) == "stranger"
    # A party cannot send another party's upload, whatever it got hold of.
    with pytest.raises(grpc.RpcError) as caught:
        bob.upload(play.parties["ann"].sealed[0])
    assert code_of(caught.value) == "not-a-member"


def test_statements_of_callers_are_bound_to_server_time_and_key(play: Play) -> None:
    ann = play.client("ann")
    now = system_now_ms()
    eve = identities(["eve"])["eve"]
    for wrong in (
        {"server": bytes(48)},
        {"expires_at": now - 1},
        {"expires_at": now + 86_400_000},
        {"member_key": eve.public.signing},
    ):
        with pytest.raises(grpc.RpcError) as caught:
            ann.stub.Inbox(pb.InboxRequest(), metadata=ann.metadata(**wrong), timeout=30.0)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, wrong  # type: ignore[attr-defined]
    for metadata in ((), (*ann.metadata(), *ann.metadata()), (("parley-caller-bin", os.urandom(200)),)):
        with pytest.raises(grpc.RpcError) as caught:
            ann.stub.Inbox(pb.InboxRequest(), metadata=metadata, timeout=30.0)
        assert code_of(caught.value) in ("signature", "malformed")


def test_a_false_server_is_not_spoken_to(play: Play, tmp_path: Path) -> None:
    """The network leads a client to a server with another key; no caller statement is sent to it."""
    seen: list[object] = []

    class Spy(grpc.GenericRpcHandler):
        def service(self, details: Any) -> None:
            seen.append(details.invocation_metadata)

    from concurrent.futures import ThreadPoolExecutor

    tls.make(tmp_path / "crt", tmp_path / "key", ["localhost"], moment(system_now_ms()))
    credentials = grpc.ssl_server_credentials([((tmp_path / "key").read_bytes(), (tmp_path / "crt").read_bytes())])
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[Spy()])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            for pin in (
                play.coordinator.certificate.decode(),
                "sha384:" + tls.server_digest(play.coordinator.certificate).hex(),
            ):
                with pytest.raises(RefusedError) as caught:
                    Transport(f"127.0.0.1:{port}", play.members["ann"], pin, patience_s=1.0).inbox()
                assert caught.value.code == "signature"
        finally:
            server.stop(None).wait()
    assert not seen


def test_a_message_beyond_the_limit_is_refused_by_the_coordinator(play: Play) -> None:
    bob = play.client("bob")
    for request in (
        pb.UploadRequest(chunk=pb.Chunk(offset=0, data=bytes(limits.RPC_BYTES + 1))),
        pb.UploadRequest(begin=pb.UploadBegin(cose=bytes(limits.RPC_BYTES + 1))),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            bob.stub.Upload(iter([request]), metadata=bob.metadata(), timeout=60.0)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    assert bob.inbox() is not None


def test_without_tls_nothing_answers(play: Play) -> None:
    channel = grpc.insecure_channel(play.coordinator.address)
    with pytest.raises(grpc.RpcError):
        CoordinatorStub(channel).Inbox(pb.InboxRequest(), metadata=play.client("ann").metadata(), timeout=5.0)
    channel.close()
