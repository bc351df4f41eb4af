"""The wire to a coordinator: the only module that speaks gRPC.

The coordinator is pinned: to a certificate or CA in a file, to the digest of its key, or to the system's CAs. Caller
statements are bound to its TLS key, so that none can be used elsewhere. Every call may be repeated as it is, and is, with
jitter, while the other side is away. What comes back is believed by nobody here.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from parley_protocol import limits
from parley_protocol.encoding import sha384
from parley_protocol.errors import (
    CODES,
    MalformedError,
    ParleyError,
    RefusedError,
    StateError,
    UnavailableError,
)
from parley_protocol.identity import PrivateIdentity
from parley_protocol.transcript import Caller
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1.coordinator_pb2_grpc import CoordinatorStub

_T = TypeVar("_T")
Progress = Callable[[str, int, int], None]

METADATA_KEY: Final = "parley-caller-bin"
QUICK_S: Final = 30.0
LONG_S: Final = 900.0
"""A join answers when the enclave has read the whole table once; an opening when the enclave has started."""
WHOLE_S: Final = 6 * 3600.0
"""How long such a call is made again, where it was held for its whole time: what it asked for goes on meanwhile."""
UPLOAD_S: Final = 24 * 3600.0
"""One stream of an upload; the next one goes on after it."""
_HANDSHAKE_S: Final = 15.0
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
_CROWDED: Final = "Concurrent RPC limit"
"""How gRPC's server says that it has as many calls as it may; it gives no other sign."""
_AWAY: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
)
"""Without a code of this house: nobody has answered. UNKNOWN is what a stream may end with whose server was killed."""


class Transport:
    """A channel to one coordinator for one member. `patience_s`: how long a call is repeated while nobody answers."""

    def __init__(self, address: str, identity: PrivateIdentity, pin: str | None, *, patience_s: float = 60.0) -> None:
        """`address`: host:port; `pin`: PEM text, "sha384:HEX" of the SubjectPublicKeyInfo, or None for the system's CAs."""
        self.address = address
        self.pin = pin
        self._identity = identity
        self._patience_s = patience_s
        self._caller: tuple[bytes, int] | None = None
        self._channel, self._server = self._again(lambda: _connect(address, pin), patience_s)
        self._stub = CoordinatorStub(self._channel)

    def close(self) -> None:
        """Ends the channel."""
        self._channel.close()

    # Agreements

    def put_agreement(self, canonical: bytes) -> pb.AgreementState:
        return self._call(self._stub.PutAgreement, pb.PutAgreementRequest(canonical=canonical))

    def put_signature(self, agreement: bytes, member: str, cose: bytes) -> pb.AgreementState:
        return self._call(
            self._stub.PutSignature, pb.PutSignatureRequest(agreement=agreement, member=member, cose=cose)
        )

    def get_agreement(self, *, digest: bytes | None = None, series: bytes | None = None) -> pb.AgreementState:
        request = pb.GetAgreementRequest(digest=digest) if digest else pb.GetAgreementRequest(series=series or b"")
        return self._call(self._stub.GetAgreement, request)

    def inbox(self) -> pb.InboxReply:
        return self._call(self._stub.Inbox, pb.InboxRequest())

    # Sessions

    def open_session(self, request: bytes, agreement: bytes) -> pb.SessionState:
        return self._call(
            self._stub.OpenSession, pb.OpenSessionRequest(request_id=request, agreement=agreement), LONG_S
        )

    def get_session(self, session: bytes) -> pb.SessionState:
        return self._call(self._stub.GetSession, pb.SessionRef(session=session))

    def attest(self, session: bytes, nonce: bytes) -> pb.AttestReply:
        return self._call(self._stub.Attest, pb.AttestRequest(session=session, nonce=nonce))

    def put_join(self, session: bytes, cose: bytes) -> pb.JoinReply:
        return self._call(self._stub.PutJoin, pb.PutJoinRequest(session=session, cose=cose), LONG_S)

    def put_kms_join(self, cose: bytes) -> pb.KmsJoinState:
        return self._call(self._stub.PutKmsJoin, pb.PutKmsJoinRequest(cose=cose))

    def start(self, session: bytes, cose: bytes) -> pb.RosterReply:
        return self._call(self._stub.Start, pb.StartRequest(session=session, cose=cose), LONG_S)

    def get_roster(self, session: bytes) -> pb.RosterReply:
        return self._call(self._stub.GetRoster, pb.SessionRef(session=session))

    def put_countersignature(
        self, session: bytes, cose: bytes, former: list[tuple[bytes, bytes, bytes]]
    ) -> pb.SessionState:
        """`former`: (offer, document, signed roster) of each roster that the statement names, in its order."""
        statements = [pb.FormerRosterStatement(offer=o, document=d, cose=c) for o, d, c in former]
        request = pb.PutCountersignatureRequest(session=session, cose=cose, former=statements)
        return self._call(self._stub.PutCountersignature, request, LONG_S)

    def refuse(self, session: bytes, cose: bytes) -> pb.SessionState:
        return self._call(self._stub.Refuse, pb.RefuseRequest(session=session, cose=cose))

    def events(self, after: int, session: bytes, seconds: float) -> Events:
        """Events after a number, for at most `seconds`; then it ends, as it does when the other side goes away."""
        request = pb.WatchRequest(after=after, session=session, several=True)
        return Events(self._stub.Watch(request, timeout=seconds, metadata=self._metadata()))

    # Uploads

    def upload(self, digest: bytes, cose: bytes, blob: Path, progress: Progress | None = None) -> None:
        """Sends a sealed table, from the first byte that the other side has not stored, until it has all of them."""
        pauses = _Pauses(self._patience_s)
        sent = -1
        while True:
            state = self._uploaded(digest)
            if state is not None and state.complete:
                return
            if not blob.is_file():
                raise StateError("the sealed table is not in your state any more; submit it again")
            stored = 0 if state is None else int(state.stored)
            if stored > sent:
                pauses = _Pauses(self._patience_s)  # it goes on
            sent = stored
            try:
                reply = self._stub.Upload(
                    self._chunks(cose, blob, stored, progress), timeout=UPLOAD_S, metadata=self._metadata()
                )
                if reply.complete:
                    return
                raise UnavailableError("the coordinator has not stored the whole table")
            except grpc.RpcError as error:
                found = _translated(error)
                if not isinstance(found, UnavailableError):
                    raise found from None
                pauses.wait(found)
            except UnavailableError as error:
                pauses.wait(error)

    def _uploaded(self, digest: bytes) -> pb.UploadState | None:
        try:
            return self._call(self._stub.GetUpload, pb.UploadRef(upload=digest))
        except RefusedError as error:
            if error.code != "unknown-upload":
                raise
            return None

    @staticmethod
    def _chunks(cose: bytes, blob: Path, stored: int, progress: Progress | None) -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(begin=pb.UploadBegin(cose=cose))
        with blob.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(stored)
            while data := file.read(limits.CHUNK_BYTES):
                yield pb.UploadRequest(chunk=pb.Chunk(offset=stored, data=data))
                stored += len(data)
                if progress is not None:
                    progress("upload", stored, size)

    # Results

    def bundle(self, session: bytes, progress: Progress | None = None) -> bytes:
        """The bundle of a release."""
        data = bytearray()
        pauses = _Pauses(self._patience_s)
        while True:
            call = self._stub.GetBundle(
                pb.GetBundleRequest(session=session, offset=len(data)), timeout=LONG_S, metadata=self._metadata()
            )
            had = len(data)
            try:
                for chunk in call:
                    if chunk.offset != len(data) or len(data) + len(chunk.data) > limits.BUNDLE_BYTES:
                        raise MalformedError("the chunks of the bundle do not follow each other")
                    data += chunk.data
                    if progress is not None:
                        progress("fetch", len(data), len(data))
                return bytes(data)
            except grpc.RpcError as error:
                found = _translated(error)
                if not isinstance(found, UnavailableError):
                    raise found from None
                if len(data) > had:
                    pauses = _Pauses(self._patience_s)  # it goes on
                pauses.wait(found)
            finally:
                call.cancel()

    def chain(self, series: bytes, after: bytes) -> list[tuple[bytes, bytes]]:
        """(record, document) of the records after a head, oldest first."""

        def all_of() -> list[tuple[bytes, bytes]]:
            request = pb.GetChainRequest(series=series, after=after)
            call = self._stub.GetChain(request, timeout=QUICK_S, metadata=self._metadata())
            try:
                found: list[tuple[bytes, bytes]] = []
                for item in call:
                    if len(found) >= limits.CHAIN_RECORDS:
                        raise MalformedError("the chain has more records than a series may have")
                    found.append((item.cose, item.document))
                return found
            except grpc.RpcError as error:
                raise _translated(error) from None
            finally:
                call.cancel()

        return self._again(all_of, self._patience_s)

    # How a call runs

    def _call(self, method: Callable[..., _T], request: object, seconds: float = QUICK_S) -> _T:
        def once() -> _T:
            try:
                return method(request, timeout=seconds, metadata=self._metadata())
            except grpc.RpcError as error:
                found = _translated(error)
                if found.code == "expired":
                    self._caller = None  # a clock was set meanwhile: the next attempt says anew who calls
                raise found from None

        return self._again(once, self._patience_s)

    @staticmethod
    def _again(work: Callable[[], _T], patience_s: float) -> _T:
        pauses = _Pauses(patience_s)
        end = time.monotonic() + WHOLE_S
        while True:
            started = time.monotonic()
            try:
                return work()
            except UnavailableError as error:
                now = time.monotonic()
                if now - started > patience_s and now < end:
                    # Somebody held the call for so long: the other side is at work, not away.
                    pauses = _Pauses(patience_s)
                pauses.wait(error)

    def _metadata(self) -> tuple[tuple[str, bytes]]:
        now = time.time_ns() // 1_000_000
        if self._caller is None or self._caller[1] - now < limits.CALLER_AGE_MS // 2:
            expires = now + limits.CALLER_AGE_MS
            statement = Caller(self._identity.public.signing, self._server, expires)
            self._caller = (self._identity.sign(statement.to_bytes()), expires)
        return ((METADATA_KEY, self._caller[0]),)


class Events(Iterator[pb.Event]):
    """A stream of events. Another thread may end it."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._ended = threading.Event()
        self._more: deque[pb.Event] = deque()

    def __next__(self) -> pb.Event:
        if self._more:
            return self._more.popleft()
        try:
            found: pb.Event = next(self._call)
        except grpc.RpcError as error:
            told = _translated(error)
            if not isinstance(told, UnavailableError):
                raise told from None
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                self._ended.wait(_FIRST_PAUSE_S * (1 + random.random()))  # noqa: S311  # jitter
            raise StopIteration from None
        self._more.extend(found.more)
        return found

    def close(self) -> None:
        """Ends it, also while `next` waits in another thread, which then raises StopIteration at once."""
        self._ended.set()
        self._call.cancel()


class _Pauses:
    """The pauses between attempts: they grow, with jitter, until the patience is at its end."""

    def __init__(self, patience_s: float) -> None:
        self._end = time.monotonic() + patience_s
        self._pause_s = _FIRST_PAUSE_S

    def wait(self, error: UnavailableError) -> None:
        """Waits before the next attempt; raises `error` when it would be too late."""
        asked = 0.0 if error.retry_after_ms is None else error.retry_after_ms / 1000
        # Many clients are told the same time: they do not come back at once.
        pause = max(asked * (1 + random.random() / 4), self._pause_s * (0.5 + random.random()))  # noqa: S311  # jitter
        if time.monotonic() + pause > self._end:
            raise error
        time.sleep(pause)
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)


def _translated(error: grpc.RpcError) -> ParleyError:
    """The error of this house that a gRPC error carries."""
    status = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    message = (error.details() if isinstance(error, grpc.Call) else None) or ""
    info, retry = _details(error)
    if info is not None and info.domain == "parley":
        code = info.reason if info.reason in CODES else "internal"
        if info.metadata.get("retry") == "true":
            return UnavailableError(message or CODES[code], code=code, retry_after_ms=retry)
        return RefusedError.from_wire(info.reason, message)
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and _CROWDED in message:
        return UnavailableError("the coordinator has too many calls under way", code="busy", retry_after_ms=retry)
    if status in _AWAY:
        return UnavailableError(f"the coordinator does not answer ({status.name.lower()})", retry_after_ms=retry)
    return RefusedError("internal", f"the coordinator answered {status.name.lower()}")


def _details(error: grpc.RpcError) -> tuple[ErrorInfo | None, int | None]:
    info, retry = None, None
    try:
        status = rpc_status.from_call(error) if isinstance(error, grpc.Call) else None
    except ValueError:  # code and details contradict each other: whoever sent it, it is no error of this protocol
        status = None
    details: Iterable[AnyMessage] = () if status is None else status.details
    for detail in details:
        if detail.Is(ErrorInfo.DESCRIPTOR):
            info = ErrorInfo()
            detail.Unpack(info)
        elif detail.Is(RetryInfo.DESCRIPTOR):
            found = RetryInfo()
            detail.Unpack(found)
            retry = found.retry_delay.ToMilliseconds()
    return info, retry


def _connect(address: str, pin: str | None) -> tuple[grpc.Channel, bytes]:
    """A channel that talks to the pinned server alone, and the SHA-384 of its SubjectPublicKeyInfo."""
    host, port = _split(address)
    digest_pin = pin.removeprefix("sha384:").lower() if pin is not None and pin.startswith("sha384:") else None
    if digest_pin is not None:
        certificate = _presented(address, host, port, _context(None, verify=False))
    elif pin is not None:
        certificate = _presented(address, host, port, _context(pin))
    else:
        certificate = _presented(address, host, port, _context(None))
    server = sha384(certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    if digest_pin is not None and server.hex() != digest_pin:
        raise RefusedError("signature", "the coordinator has another key than the pinned one")
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", limits.MESSAGE_BYTES + (1 << 20)),
        ("grpc.max_send_message_length", limits.MESSAGE_BYTES + (1 << 20)),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    roots = None if pin is None else pin.encode()
    if digest_pin is not None or (pin is not None and certificate in _pinned(pin)):
        # A pinned key is that server whatever it is called.
        roots = certificate.public_bytes(Encoding.PEM)
        options.append(("grpc.ssl_target_name_override", _name_of(certificate) or host))
    elif pin is not None:
        # The pin is a CA: then the name counts.
        _presented(address, host, port, _context(pin, names=True))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options), server


def _context(pin: str | None, *, verify: bool = True, names: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    context.check_hostname = verify and (names or pin is None)
    if not verify:
        context.verify_mode = ssl.CERT_NONE  # the caller compares the key itself
    elif pin is None:
        context.load_default_certs()
    else:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        try:
            context.load_verify_locations(cadata=pin)
        except ssl.SSLError:
            raise MalformedError("not a certificate in PEM") from None
    return context


def _presented(address: str, host: str, port: int, context: ssl.SSLContext) -> x509.Certificate:
    try:
        with (
            socket.create_connection((host, port), timeout=_HANDSHAKE_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            der = wrapped.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError:
        raise RefusedError(
            "signature", "the certificate of the coordinator is not the pinned one, or has another name"
        ) from None
    except OSError as error:
        raise UnavailableError(f"no coordinator answers at {address} ({type(error).__name__})") from None
    assert der is not None
    return x509.load_der_x509_certificate(der)


def _pinned(pin: str) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(pin.encode())


def _name_of(certificate: x509.Certificate) -> str | None:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    found = names.get_values_for_type(x509.DNSName)
    return found[0] if found else None


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536 or not host:
        raise MalformedError("the address of a coordinator is host:port")
    return host.strip("[]"), int(port)
