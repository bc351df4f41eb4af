"""The service over the wire: who gets in, what strangers get, what does not fit, and an end in order."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from parley_coordinator import tls
from parley_protocol import limits
from parley_protocol.agreement.signed import sign
from parley_protocol.identity import PrivateIdentity
from parley_protocol.transcript import Caller
from parley_protocol.v1 import coordinator_pb2 as pb
from support.coordinator import CHUNK, Client, Coordinator, code_of, error_info, now_ms, refused
from support.desk import MEMBERS, STRANGER, make_agreement
from support.enclave import Party, rows_of, until

AGREEMENT = make_agreement()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    # No test here opens a session: the launcher's command is never right.
    with Coordinator(tmp_path_factory.mktemp("c"), [sys.executable, "-c", "raise SystemExit(1)"]) as made:
        made.operators(MEMBERS["ann"])
        made.start()
        ann = made.client(MEMBERS["ann"])
        ann.call("PutAgreement", pb.PutAgreementRequest(canonical=AGREEMENT.canonical))
        for name, member in MEMBERS.items():
            cose = sign(AGREEMENT, name, member)
            ann.call("PutSignature", pb.PutSignatureRequest(agreement=AGREEMENT.digest, member=name, cose=cose))
        yield made


@pytest.fixture
def ann(coordinator: Coordinator) -> Client:
    return coordinator.client(MEMBERS["ann"])


def table(rows: int = 100_000) -> Party:
    return Party(AGREEMENT, "ann", MEMBERS["ann"], {"visits": rows_of(1, rows)})


def status_of(client: Client, metadata: tuple[tuple[str, bytes], ...]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Inbox(pb.InboxRequest(), metadata=metadata, timeout=10)
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), code_of(caught.value)


def test_crd_2_who_does_not_prove_a_key_is_unauthenticated(ann: Client) -> None:
    good = Caller(ann.identity.public.signing, ann.server, now_ms() + 60_000).to_bytes()
    wrong: list[tuple[tuple[tuple[str, bytes], ...], str]] = [
        ((), "signature"),
        (ann.metadata() * 2, "signature"),
        ((("parley-caller-bin", b"garbage"),), "malformed"),
        ((("parley-caller-bin", STRANGER.sign(good)),), "signature"),
        (ann.metadata(server=b"x" * 48), "signature"),
        (ann.metadata(expires_at=now_ms() - 1), "expired"),
        (ann.metadata(expires_at=now_ms() + 3_600_000), "expired"),
    ]
    for metadata, code in wrong:
        assert status_of(ann, metadata) == (grpc.StatusCode.UNAUTHENTICATED, code)


def test_crd_2_a_statement_for_another_server_is_refused(coordinator: Coordinator, ann: Client, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    tls.make(tmp_path / "c", tmp_path / "k", [], datetime.now(UTC))
    other = tls.server_digest((tmp_path / "c").read_bytes())
    assert other != ann.server
    assert status_of(ann, ann.metadata(server=other)) == (grpc.StatusCode.UNAUTHENTICATED, "signature")


def test_crd_3_a_stranger_gets_nothing_from_any_method(coordinator: Coordinator) -> None:
    stranger = coordinator.client(STRANGER)
    with pytest.raises(grpc.RpcError) as caught:
        stranger.upload(table(100).sealed[0])
    assert code_of(caught.value) == "stranger"
    service = pb.DESCRIPTOR.services_by_name["Coordinator"]
    assert len(service.methods) == 18
    for method in service.methods:
        if method.client_streaming:
            continue
        request = getattr(pb, method.input_type.name)()
        # A stream refuses when it is read; a single answer is refused before there is one to read.
        with pytest.raises(grpc.RpcError) as caught:
            next(stranger.call(method.name, request, timeout=10))
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error_info(caught.value).metadata["who"] == "operator"


def test_crd_3_a_member_of_one_agreement_learns_nothing_of_another(coordinator: Coordinator, ann: Client) -> None:
    other = make_agreement(max_releases=9)
    for request in (pb.GetAgreementRequest(digest=other.digest), pb.GetAgreementRequest(series=other.digest)):
        with refused("unknown-agreement"):
            ann.call("GetAgreement", request)
    for method, message in (
        ("GetSession", pb.SessionRef(session=bytes(16))),
        ("GetRoster", pb.SessionRef(session=bytes(16))),
        ("Attest", pb.AttestRequest(session=bytes(16), nonce=bytes(32))),
        ("PutJoin", pb.PutJoinRequest(session=bytes(16))),
        ("PutCountersignature", pb.PutCountersignatureRequest(session=bytes(16))),
    ):
        with refused("unknown-session"):
            ann.call(method, message)


def test_crd_10_only_listed_keys_open_sessions(coordinator: Coordinator, ann: Client) -> None:
    request = pb.OpenSessionRequest(request_id=os.urandom(16), agreement=AGREEMENT.digest)
    with refused("stranger"):
        coordinator.client(MEMBERS["bob"]).call("OpenSession", request)
    with refused("malformed"):
        ann.call("OpenSession", pb.OpenSessionRequest(request_id=b"short", agreement=AGREEMENT.digest))
    with refused("unavailable"):
        ann.call("OpenSession", request)


def test_requests_without_content_are_malformed(ann: Client) -> None:
    for method, request in (
        ("GetAgreement", pb.GetAgreementRequest()),
        ("PutAgreement", pb.PutAgreementRequest()),
    ):
        with refused("malformed"):
            ann.call(method, request)
    with refused("malformed"):
        ann.send()
    with refused("malformed"):
        ann.send(pb.UploadRequest(chunk=pb.Chunk(data=b"x")))
    begin = pb.UploadRequest(begin=pb.UploadBegin(cose=table(100).sealed[0].cose))
    with refused("malformed"):
        ann.send(begin, begin)


def test_messages_that_are_too_large_are_refused(ann: Client) -> None:
    with refused("too-large"):
        ann.call("PutAgreement", pb.PutAgreementRequest(canonical=bytes(limits.AGREEMENT_BYTES + 1)))
    begin = pb.UploadRequest(begin=pb.UploadBegin(cose=table(100).sealed[0].cose))
    with refused("too-large"):
        ann.send(begin, pb.UploadRequest(chunk=pb.Chunk(data=bytes(limits.CHUNK_BYTES + 1))))
    with pytest.raises(grpc.RpcError) as caught:
        ann.call("PutAgreement", pb.PutAgreementRequest(canonical=bytes(limits.RPC_BYTES + 1)))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_crd_9_an_upload_goes_on_where_its_stream_broke(coordinator: Coordinator, ann: Client) -> None:
    sealed = table().sealed[0]
    sent = threading.Event()

    def requests() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(begin=pb.UploadBegin(cose=sealed.cose))
        yield pb.UploadRequest(chunk=pb.Chunk(offset=0, data=sealed.blob[:CHUNK]))
        sent.set()
        threading.Event().wait(20)

    stream = ann.stub.Upload.future(requests(), metadata=ann.metadata(), timeout=30)
    assert sent.wait(10)
    # Nothing tells a client that a chunk has arrived before the stream ends; a second is plenty on one machine.
    assert not threading.Event().wait(1)
    stream.cancel()
    reference = pb.UploadRef(upload=sealed.upload.digest)
    second = coordinator.client(MEMBERS["ann"])
    until(lambda: second.call("GetUpload", reference).stored == CHUNK, 20)
    state = second.upload(sealed, CHUNK)
    assert (state.complete, state.stored, state.size) == (True, len(sealed.blob), len(sealed.blob))
    assert second.upload(sealed) == state


def test_crd_9_a_second_stream_takes_over_from_one_that_hangs(coordinator: Coordinator, ann: Client) -> None:
    sealed = table().sealed[0]
    sent, leave = threading.Event(), threading.Event()

    def requests() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(begin=pb.UploadBegin(cose=sealed.cose))
        yield pb.UploadRequest(chunk=pb.Chunk(offset=0, data=sealed.blob[:1000]))
        sent.set()
        leave.wait(20)

    stream = ann.stub.Upload.future(requests(), metadata=ann.metadata(), timeout=30)
    assert sent.wait(10)
    assert coordinator.client(MEMBERS["ann"]).upload(sealed).complete
    error = stream.exception(timeout=10)
    leave.set()
    assert isinstance(error, grpc.RpcError)
    assert code_of(error) == "busy"


def test_crd_9_what_was_acknowledged_outlives_kill_9(coordinator: Coordinator) -> None:
    sealed = table(300_000).sealed[0]
    client = coordinator.client(MEMBERS["ann"])
    state = client.upload(sealed, 0, 3 * CHUNK + 17)
    assert state.stored == 3 * CHUNK + 17
    sent = threading.Event()

    def requests() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(begin=pb.UploadBegin(cose=sealed.cose))
        yield pb.UploadRequest(chunk=pb.Chunk(offset=state.stored, data=sealed.blob[state.stored :][:CHUNK]))
        sent.set()
        threading.Event().wait(20)

    stream = client.stub.Upload.future(requests(), metadata=client.metadata(), timeout=30)
    assert sent.wait(10)
    coordinator.kill()
    assert stream.exception(timeout=10) is not None
    coordinator.start()
    client = coordinator.client(MEMBERS["ann"])
    found = client.call("GetUpload", pb.UploadRef(upload=sealed.upload.digest))
    assert found.stored >= state.stored
    assert client.upload(sealed, found.stored).complete


def test_crd_18_watching_sees_what_happens_and_goes_on_after_a_number(coordinator: Coordinator, ann: Client) -> None:
    before = ann.events()
    assert [event.kind for event in before[:4]] == ["signed", "signed", "signed", "complete"]
    assert [event.number for event in before] == sorted(event.number for event in before)
    last = before[-1].number
    seen: list[pb.Event] = []
    watching = threading.Thread(target=lambda: seen.extend(ann.events(5.0, after=last)))
    watching.start()
    sealed = table(100).sealed[0]
    coordinator.client(MEMBERS["ann"]).upload(sealed)
    watching.join()
    assert [(event.kind, event.member, event.table) for event in seen] == [("uploaded", "ann", "visits")]
    assert coordinator.client(MEMBERS["bob"]).events(after=last) == seen
    with refused("unknown-session"):
        list(ann.call("Watch", pb.WatchRequest(session=bytes(16))))


def test_crd_18_who_asks_for_several_events_in_a_message_sees_the_same(coordinator: Coordinator, ann: Client) -> None:
    single = ann.events()
    assert len(single) > 1 and not any(event.more for event in single)
    first = next(ann.call("Watch", pb.WatchRequest(several=True)))
    assert [first.number, *(event.number for event in first.more)] == [event.number for event in single]
    assert list(first.more) == single[1:]


def test_crd_18_many_watch_and_others_still_get_answers(coordinator: Coordinator, ann: Client) -> None:
    streams = [ann.call("Watch", pb.WatchRequest()) for _ in range(30)]
    for stream in streams:
        next(stream)
    assert coordinator.client(MEMBERS["bob"]).call("Inbox", pb.InboxRequest(), timeout=10)
    more = [ann.call("Watch", pb.WatchRequest()) for _ in range(3)]
    codes = []
    for stream in more:
        try:
            next(stream)
        except grpc.RpcError as error:
            codes.append(code_of(error))
    assert codes == ["quota"]
    for stream in (*streams, *more):
        stream.cancel()


def test_an_upload_that_cannot_be_stored_when_its_client_is_gone_is_no_fault(tmp_path: Path) -> None:
    with Coordinator(tmp_path, [sys.executable, "-c", "raise SystemExit(1)"]) as made:
        made.operators(MEMBERS["ann"])
        made.start()
        client = made.client(MEMBERS["ann"])
        client.call("PutAgreement", pb.PutAgreementRequest(canonical=AGREEMENT.canonical))
        for name, member in MEMBERS.items():
            cose = sign(AGREEMENT, name, member)
            client.call("PutSignature", pb.PutSignatureRequest(agreement=AGREEMENT.digest, member=name, cose=cose))
        sealed = table().sealed[0]
        arrived = threading.Event()

        def half() -> Iterator[pb.UploadRequest]:
            yield pb.UploadRequest(begin=pb.UploadBegin(cose=sealed.cose))
            yield pb.UploadRequest(chunk=pb.Chunk(offset=0, data=sealed.blob[:CHUNK]))
            assert arrived.wait(30)

        call = client.stub.Upload.future(half(), metadata=client.metadata(), timeout=60)
        until(lambda: [path.stat().st_size for path in (tmp_path / "blobs").rglob("upload-1")] == [CHUNK])
        # As one of no use any more is deleted.
        with closing(sqlite3.connect(tmp_path / "coordinator.db", timeout=30)) as database, database:
            database.execute("DELETE FROM uploads")
        call.cancel()
        until(lambda: "upload-not-stored" in made.log)
        arrived.set()
        levels = {json.loads(line)["level"] for line in made.log.splitlines()}
        assert levels <= {"info", "warning"}


def test_health_and_reflection_answer_everybody(ann: Client) -> None:
    health: Any = health_pb2_grpc.HealthStub(ann.channel)
    for service in ("", "parley.v1.Coordinator"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(ann.channel)
    messages: Any = reflection_pb2
    asked = messages.ServerReflectionRequest(list_services="")
    (listed,) = reflection.ServerReflectionInfo(iter([asked]), timeout=10)
    assert "parley.v1.Coordinator" in {service.name for service in listed.list_services_response.service}


def test_another_certificate_is_not_talked_to(coordinator: Coordinator, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    tls.make(tmp_path / "c", tmp_path / "k", [], datetime.now(UTC))
    client = Client(coordinator.address, (tmp_path / "c").read_bytes(), MEMBERS["ann"])
    with pytest.raises(grpc.RpcError) as caught:
        client.call("Inbox", pb.InboxRequest(), timeout=10)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    client.close()


def test_sigterm_ends_streams_and_exits_with_0(tmp_path: Path) -> None:
    with Coordinator(tmp_path, [sys.executable, "-c", "raise SystemExit(1)"]) as made:
        other = PrivateIdentity.generate(os.urandom)
        made.operators(other)
        made.start()
        client = made.client(other)
        stream = client.call("Watch", pb.WatchRequest(), timeout=60)
        assert client.inbox() == []
        assert made.process is not None
        made.process.terminate()
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert code_of(caught.value) == "unavailable"
        assert made.process.wait(30) == 0
        assert not (tmp_path / "address").exists()
        assert '"event":"stopped"' in made.log


def test_logs_hold_no_key_no_name_and_no_exact_size(coordinator: Coordinator, ann: Client) -> None:
    ann.inbox()
    log = coordinator.log
    assert '"method":"Upload"' in log
    for member in MEMBERS.values():
        assert member.public.signing.hex() not in log
    sealed = table(100).sealed[0]
    ann.upload(sealed)
    assert str(len(sealed.blob)) not in coordinator.log
    assert '"bob"' not in coordinator.log


def test_the_command_line_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from parley_coordinator.__main__ import main

    assert main(["run", "--dir", str(tmp_path)]) == 2
    assert "coordinator.toml: no such file" in capsys.readouterr().err
    assert main(["init", "--dir", str(tmp_path), "--name", "relay.example"]) == 0
    assert main(["init", "--dir", str(tmp_path)]) == 2
    capsys.readouterr()
    assert main(["digest", "--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == tls.server_digest((tmp_path / "tls.crt").read_bytes()).hex()
    from parley_protocol.identity import dump_public

    (tmp_path / "ann.pub").write_bytes(dump_public(MEMBERS["ann"].public))
    assert main(["operators", "add", str(tmp_path / "ann.pub"), "--dir", str(tmp_path)]) == 0
    assert main(["operators", "list", "--dir", str(tmp_path)]) == 0
    assert f"{MEMBERS['ann'].public.signing.hex()}  ann" in capsys.readouterr().out
    assert main(["operators", "remove", str(tmp_path / "ann.pub"), "--dir", str(tmp_path)]) == 0
    assert main(["operators", "add", str(tmp_path / "tls.key"), "--dir", str(tmp_path)]) == 2


def test_crd_21_a_store_that_fails_before_the_caller_is_known_has_a_code_too(tmp_path: Path) -> None:
    with Coordinator(tmp_path / "c", [sys.executable, "-c", "raise SystemExit(1)"]) as made:
        made.operators(MEMBERS["ann"])
        made.start()
        ann = made.client(MEMBERS["ann"])
        assert ann.inbox() == []
        with closing(sqlite3.connect(made.folder / "coordinator.db")) as connection:
            connection.execute("DROP TABLE operators")
            connection.commit()
        for call in (
            ann.inbox,
            lambda: ann.bundle(b"s" * 16),
            lambda: list(ann.stub.Watch(pb.WatchRequest(), metadata=ann.metadata())),
        ):
            with refused("internal"):
                call()
