"""What callers may not do: hold connections, calls and uploads without saying anything, and say too much at once."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parley_coordinator import server
from parley_protocol import limits
from parley_protocol.agreement.signed import sign
from parley_protocol.v1 import coordinator_pb2 as pb
from support.coordinator import Client, Coordinator, code_of, error_info, refused
from support.desk import MEMBERS, STRANGER, make_agreement
from support.enclave import Party, Sealed, rows_of, until

AGREEMENT = make_agreement()
CALLS = 6
CONNECTIONS = 20
HANDSHAKE_S, REQUEST_S, IDLE_S = 2.0, 1.5, 2.0
TOML = f"connections = {CONNECTIONS}\n[quota]\ncalls_per_member = {CALLS}\n"
DEADLINES = f"handshake_s = {HANDSHAKE_S}\nrequest_s = {REQUEST_S}\nidle_s = {IDLE_S}\n"


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with Coordinator(tmp_path_factory.mktemp("c"), [sys.executable, "-c", "raise SystemExit(1)"], TOML) as made:
        path = made.folder / "coordinator.toml"
        path.write_text(path.read_text().replace("[deadline]\n", f"[deadline]\n{DEADLINES}"))
        made.operators(MEMBERS["ann"])
        made.start()
        ann = made.client(MEMBERS["ann"])
        ann.call("PutAgreement", pb.PutAgreementRequest(canonical=AGREEMENT.canonical))
        for name, member in MEMBERS.items():
            cose = sign(AGREEMENT, name, member)
            ann.call("PutSignature", pb.PutSignatureRequest(agreement=AGREEMENT.digest, member=name, cose=cose))
        ann.close()
        yield made


@pytest.fixture
def ann(coordinator: Coordinator) -> Iterator[Client]:
    made = Client(coordinator.address, coordinator.certificate, MEMBERS["ann"])
    yield made
    made.close()


def sealed() -> Sealed:
    return Party(AGREEMENT, "ann", MEMBERS["ann"], {"visits": rows_of(1, 1000)}).sealed[0]


class Never:
    """Requests of which none comes; `end` lets the client's thread go."""

    def __init__(self, *first: object) -> None:
        self._first = list(first)
        self._end = threading.Event()

    def __iter__(self) -> Iterator[object]:
        yield from self._first
        self._end.wait(60)

    def end(self) -> None:
        self._end.set()


def begin(client: Client, method: str, requests: Never, metadata: Any = None) -> Any:
    """A call that sends its head, and then what `requests` brings."""
    call: Any = client.channel.stream_unary(
        f"/{server.SERVICE}/{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=bytes,
    )
    return call.future(iter(requests), metadata=metadata or client.metadata(), timeout=60)


def ended(call: Any) -> tuple[str, float]:
    """The code with which a call ends, and how long that takes."""
    started = time.monotonic()
    error = call.exception(timeout=30)
    assert isinstance(error, grpc.RpcError)
    return code_of(error), time.monotonic() - started


@pytest.mark.parametrize("method", ["Inbox", "PutAgreement", "GetSession"])
def test_crd_23_a_request_that_does_not_arrive_ends_the_call(ann: Client, method: str) -> None:
    requests = Never()
    code, seconds = ended(begin(ann, method, requests))
    requests.end()
    assert code == "unavailable"
    assert REQUEST_S * 0.5 < seconds < REQUEST_S + 5


def test_crd_23_who_is_a_stranger_is_told_before_anything_is_received(coordinator: Coordinator) -> None:
    for identity, metadata, code in ((STRANGER, None, "stranger"), (MEMBERS["ann"], (("x", "y"),), "signature")):
        client = Client(coordinator.address, coordinator.certificate, identity)
        requests = Never()
        found, seconds = ended(begin(client, "Inbox", requests, metadata))
        requests.end()
        client.close()
        assert (found, seconds < REQUEST_S * 0.9) == (code, True)


def test_crd_23_an_upload_that_says_nothing_ends_and_what_came_is_stored(ann: Client) -> None:
    table = sealed()
    first = pb.UploadRequest(begin=pb.UploadBegin(cose=table.cose))
    requests = Never()
    code, _ = ended(begin(ann, "Upload", requests))
    requests.end()
    assert code == "unavailable"
    requests = Never(first, pb.UploadRequest(chunk=pb.Chunk(offset=0, data=table.blob[:1000])))
    code, seconds = ended(begin(ann, "Upload", requests))
    requests.end()
    assert code == "unavailable"
    assert IDLE_S * 0.5 < seconds < IDLE_S + 5
    assert ann.call("GetUpload", pb.UploadRef(upload=table.upload.digest)).stored == 1000
    assert ann.upload(table, 1000).complete


def test_crd_23_a_key_has_some_calls_under_way_and_no_more(coordinator: Coordinator, ann: Client) -> None:
    held = [ann.stub.Watch(pb.WatchRequest(after=0), metadata=ann.metadata(), timeout=60) for _ in range(CALLS)]
    for stream in held:
        next(stream)
    with pytest.raises(grpc.RpcError) as caught:
        ann.call("Inbox", pb.InboxRequest())
    assert code_of(caught.value) == "busy"
    assert error_info(caught.value).metadata["retry"] == "true"
    bob = Client(coordinator.address, coordinator.certificate, MEMBERS["bob"])
    bob.inbox()
    bob.close()
    for stream in held:
        stream.cancel()

    def free() -> bool:
        try:
            ann.inbox()
        except grpc.RpcError as error:
            assert code_of(error) == "busy"
            return False
        return True

    until(free)


@pytest.mark.parametrize("method", ["PutAgreement", "PutJoin"])
def test_crd_23_a_message_that_is_too_large_is_refused(ann: Client, method: str) -> None:
    field = "canonical" if method == "PutAgreement" else "cose"
    request = getattr(pb, f"{method}Request")(**{field: bytes(limits.RPC_BYTES + 1)})
    with pytest.raises(grpc.RpcError) as caught:
        ann.call(method, request)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    ann.inbox()


def test_metadata_that_are_too_large_are_refused(ann: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ann.stub.Inbox(pb.InboxRequest(), metadata=(*ann.metadata(), ("x", "y" * (64 << 10))), timeout=30)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    ann.inbox()


def connect(coordinator: Coordinator) -> socket.socket:
    host, port = coordinator.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=30)


def closed_after(connection: socket.socket) -> float:
    started = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return time.monotonic() - started


def test_crd_23_who_connects_and_says_nothing_is_cut_off(coordinator: Coordinator) -> None:
    with connect(coordinator) as connection:
        assert closed_after(connection) < HANDSHAKE_S + 8


def test_who_shakes_hands_and_says_nothing_is_cut_off(coordinator: Coordinator) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with connect(coordinator) as plain, context.wrap_socket(plain) as connection:
        assert closed_after(connection) < 2 * HANDSHAKE_S + 8


def test_connections_are_bounded(coordinator: Coordinator) -> None:
    """Those beyond are closed; when the others go, there is room again."""
    held = [connect(coordinator) for _ in range(CONNECTIONS + 10)]
    try:
        time.sleep(0.5)
        gone = 0
        for connection in held:
            connection.settimeout(0.01)
            try:
                gone += connection.recv(1) == b""
            except ConnectionResetError:
                gone += 1
            except TimeoutError:
                continue
        assert gone >= 10
    finally:
        for connection in held:
            connection.close()

    def served() -> bool:
        client = Client(coordinator.address, coordinator.certificate, MEMBERS["ann"])
        try:
            client.inbox()
        except grpc.RpcError:
            return False
        else:
            return True
        finally:
            client.close()

    until(served)


def test_who_has_to_prove_no_key_takes_no_place_of_the_others(coordinator: Coordinator, ann: Client) -> None:
    with grpc.secure_channel(coordinator.address, grpc.ssl_channel_credentials(coordinator.certificate)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        streams = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(20)]
        for stream in streams:
            assert next(stream).status == health_pb2.HealthCheckResponse.SERVING
        ann.inbox()
        for stream in streams:
            stream.cancel()


def test_a_method_that_is_not_there(ann: Client) -> None:
    call = ann.channel.unary_unary(f"/{server.SERVICE}/Nothing", request_serializer=bytes, response_deserializer=bytes)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", metadata=ann.metadata(), timeout=10)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_call_without_a_request(ann: Client) -> None:
    requests = Never()
    requests.end()
    code, _ = ended(begin(ann, "Inbox", requests))
    assert code == "malformed"


def test_the_coordinator_lives(coordinator: Coordinator, ann: Client) -> None:
    """After all of this it works, and no fault stands in its log."""
    with refused("unknown-session"):
        ann.call("GetSession", pb.SessionRef(session=bytes(16)))
    assert "rpc-failed" not in coordinator.log
