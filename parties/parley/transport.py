"""The coordinator over gRPC with TLS: the only module that knows the wire.

Each call carries a caller statement, signed for this server's TLS key and for a few minutes. What may be repeated is
repeated with jitter while the other side is away; uploads and bundles go on where they stopped.
"""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from parley.relay import (
    AgreementReply,
    AttestReply,
    Event,
    FormerRoster,
    InboxItem,
    JoinReply,
    Kind,
    Progress,
    RosterReply,
    SessionReply,
    UploadReply,
)
from parley_protocol import limits
from parley_protocol.errors import RefusedError, StateError, UnavailableError
from parley_protocol.identity import PrivateIdentity
from parley_protocol.transcript import Caller
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1.coordinator_pb2_grpc import CoordinatorStub

_T = TypeVar("_T")

CALLER_KEY: Final = "parley-caller-bin"
QUICK_S: Final = 30.0
"""Deadline of a call that the coordinator answers by itself."""
OPEN_S: Final = 180.0
"""Deadline of opening a session, in which an enclave is launched."""
JOIN_S: Final = 3600.0
"""Deadline of a join, in which the enclave reads the party's tables."""
STREAM_S: Final = 24 * 3600.0
"""Deadline of an upload or a bundle; what was sent stays sent."""
WATCH_S: Final = 600.0
"""How long one stream of events lasts before it is opened anew."""
BACKOFF_S: Final = (0.1, 5.0)
"""First and longest pause before a call is repeated."""
CALLER_LIFE_MS: Final = limits.CALLER_AGE_MS - 60_000
"""Life of a caller statement: clocks may differ by a minute."""


class GrpcRelay:
    """A connection to a coordinator. `certificate`: PEM that its TLS certificate is, or is issued by; None: the system's.

    `patience_s` is how long a call is repeated while the coordinator is away.
    """

    def __init__(
        self,
        address: str,
        identity: PrivateIdentity,
        *,
        certificate: bytes | None = None,
        patience_s: float = 30.0,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._identity = identity
        self._now_ms = now_ms
        self._patience_s = patience_s
        self._server, name = _server_key(address, certificate)
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", limits.RPC_BYTES),
            ("grpc.max_send_message_length", limits.RPC_BYTES),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if name is not None:
            # A pinned certificate vouches for the server by itself: under which name it is reached does not matter.
            options.append(("grpc.ssl_target_name_override", name))
        credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
        self._channel = grpc.secure_channel(address, credentials, options=options)
        self._stub = CoordinatorStub(self._channel)
        self._caller: tuple[bytes, int] = (b"", 0)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "GrpcRelay()"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    # Agreements

    def put_agreement(self, canonical: bytes) -> AgreementReply:
        return _agreement(self._ask(self._stub.PutAgreement, pb.PutAgreementRequest(canonical=canonical)))

    def put_signature(self, agreement: bytes, member: str, cose: bytes) -> AgreementReply:
        request = pb.PutSignatureRequest(agreement=agreement, member=member, cose=cose)
        return _agreement(self._ask(self._stub.PutSignature, request))

    def get_agreement(self, *, digest: bytes = b"", series: bytes = b"") -> AgreementReply:
        request = pb.GetAgreementRequest(digest=digest) if digest else pb.GetAgreementRequest(series=series)
        return _agreement(self._ask(self._stub.GetAgreement, request))

    # What waits and what happens

    def inbox(self) -> tuple[InboxItem, ...]:
        reply = self._ask(self._stub.Inbox, pb.InboxRequest())
        return tuple(
            InboxItem(_KINDS[i.kind], i.agreement, i.session, i.table, i.member, i.since_ms, i.due_ms)
            for i in reply.items
            if i.kind in _KINDS
        )

    def watch(self, *, after: int = 0, session: bytes = b"") -> Iterator[Event]:
        away = _Away(self._patience_s)
        while True:
            try:
                stream = self._stub.Watch(
                    pb.WatchRequest(after=after, session=session), timeout=WATCH_S, metadata=self._metadata()
                )
                for e in stream:
                    away.over()
                    after = e.number
                    yield Event(e.number, e.agreement, e.session, e.kind, e.member, e.table, e.code, e.at_ms, e.percent)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    away.wait(self._error(error))
            else:
                away.wait(UnavailableError("the coordinator ended the stream of events"))

    # Uploads

    def upload(self, cose: bytes, digest: bytes, blob: Path, progress: Progress | None = None) -> UploadReply:
        away = _Away(self._patience_s)
        stored = -1
        while True:
            state = self._stored(digest, blob.stat().st_size)
            if state.complete:
                return state
            if state.stored > stored:
                away.over()
            stored = state.stored
            requests = _Requests(cose, blob, stored, progress)
            try:
                reply = self._stub.Upload(iter(requests), timeout=STREAM_S, metadata=self._metadata())
                if reply.complete:
                    return UploadReply(reply.stored, reply.size, complete=True)
                away.wait(UnavailableError("the coordinator took only a part of the upload"))
            except grpc.RpcError as error:
                if requests.failure is not None:
                    raise requests.failure from None
                away.wait(self._error(error))

    def _stored(self, digest: bytes, size: int) -> UploadReply:
        try:
            reply = self._ask(self._stub.GetUpload, pb.UploadRef(upload=digest))
        except RefusedError as error:
            if error.code != "unknown-upload":
                raise
            return UploadReply(0, size, complete=False)
        return UploadReply(reply.stored, reply.size, reply.complete)

    # Sessions

    def open_session(self, request_id: bytes, agreement: bytes) -> SessionReply:
        request = pb.OpenSessionRequest(request_id=request_id, agreement=agreement)
        return _session(self._ask(self._stub.OpenSession, request, OPEN_S))

    def get_session(self, session: bytes) -> SessionReply:
        return _session(self._ask(self._stub.GetSession, pb.SessionRef(session=session)))

    def attest(self, session: bytes, nonce: bytes) -> AttestReply:
        reply = self._ask(self._stub.Attest, pb.AttestRequest(session=session, nonce=nonce))
        return AttestReply(reply.offer, reply.document)

    def put_join(self, session: bytes, cose: bytes) -> JoinReply:
        reply = self._ask(self._stub.PutJoin, pb.PutJoinRequest(session=session, cose=cose), JOIN_S)
        return JoinReply(reply.receipt, reply.code)

    def start(self, session: bytes, cose: bytes) -> RosterReply:
        return _roster(self._ask(self._stub.Start, pb.StartRequest(session=session, cose=cose), OPEN_S))

    def get_roster(self, session: bytes) -> RosterReply:
        return _roster(self._ask(self._stub.GetRoster, pb.SessionRef(session=session)))

    def put_countersignature(self, session: bytes, cose: bytes, former: Sequence[FormerRoster]) -> SessionReply:
        evidence = [pb.FormerRosterStatement(offer=f.offer, document=f.document, cose=f.cose) for f in former]
        request = pb.PutCountersignatureRequest(session=session, cose=cose, former=evidence)
        return _session(self._ask(self._stub.PutCountersignature, request))

    def refuse(self, session: bytes, cose: bytes) -> SessionReply:
        return _session(self._ask(self._stub.Refuse, pb.RefuseRequest(session=session, cose=cose)))

    # Results

    def bundle(self, session: bytes, progress: Progress | None = None) -> bytes:
        away = _Away(self._patience_s)
        data = bytearray()
        while True:
            try:
                request = pb.GetBundleRequest(session=session, offset=len(data))
                for chunk in self._stub.GetBundle(request, timeout=STREAM_S, metadata=self._metadata()):
                    if chunk.offset != len(data) or len(data) + len(chunk.data) > limits.BUNDLE_BYTES:
                        raise RefusedError("malformed", "the coordinator's chunks are no bundle")
                    data += chunk.data
                    away.over()
                    if progress is not None:
                        progress("fetch", len(data), len(data))
                return bytes(data)
            except grpc.RpcError as error:
                away.wait(self._error(error))

    def chain(self, series: bytes, after: bytes) -> list[tuple[bytes, bytes]]:
        def whole(request: pb.GetChainRequest, *, timeout: float, metadata: Any) -> list[tuple[bytes, bytes]]:
            return [(s.cose, s.document) for s in self._stub.GetChain(request, timeout=timeout, metadata=metadata)]

        return self._ask(whole, pb.GetChainRequest(series=series, after=after))

    # How a call is made

    def _ask(self, method: Callable[..., _T], request: object, timeout: float = QUICK_S) -> _T:
        away = _Away(self._patience_s)
        while True:
            try:
                return method(request, timeout=timeout, metadata=self._metadata())
            except grpc.RpcError as error:
                away.wait(self._error(error))

    def _metadata(self) -> tuple[tuple[str, bytes], ...]:
        with self._lock:
            signed, until = self._caller
            now = self._now_ms()
            if now >= until:
                expires = now + CALLER_LIFE_MS
                statement = Caller(self._identity.public.signing, self._server, expires)
                signed = self._identity.sign(statement.to_bytes())
                self._caller = signed, now + CALLER_LIFE_MS // 2
            return ((CALLER_KEY, signed),)

    def _error(self, error: grpc.RpcError) -> RefusedError | UnavailableError:
        """The error as the caller meets it: UnavailableError where the same call may be repeated."""
        code, message = error.code(), error.details() or ""
        info, delay_ms = _details(error)
        if info is None:
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return UnavailableError(f"the coordinator does not answer ({code.name.lower()})")
            return RefusedError("internal", f"the coordinator failed ({code.name.lower()}): {message}")
        if code is grpc.StatusCode.UNAUTHENTICATED:
            with self._lock:
                self._caller = (b"", 0)
        if info.metadata.get("retry") == "true":
            refusal = RefusedError.from_wire(info.reason, message)
            return UnavailableError(refusal.message, code=refusal.code, retry_after_ms=delay_ms)
        return RefusedError.from_wire(info.reason, message)


class _Away:
    """How long the other side has been away, and how long to wait before the next try."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.over()

    def over(self) -> None:
        """It is there: patience starts anew."""
        self._end = time.monotonic() + self._patience_s
        self._pause = BACKOFF_S[0]

    def wait(self, error: RefusedError | UnavailableError) -> None:
        """Waits before the next try; raises `error` where there is none."""
        if isinstance(error, RefusedError):
            raise error from None
        # Full jitter, so that clients that lost the coordinator together do not come back together.
        pause = max(random.uniform(0, self._pause), (error.retry_after_ms or 0) / 1000)  # noqa: S311 - no secret
        if time.monotonic() + pause > self._end:
            raise error from None
        time.sleep(pause)
        self._pause = min(self._pause * 2, BACKOFF_S[1])


class _Requests:
    """The messages of an upload from a position on. A failure to read the file ends the stream and is kept."""

    def __init__(self, cose: bytes, blob: Path, position: int, progress: Progress | None) -> None:
        self._cose = cose
        self._blob = blob
        self._position = position
        self._progress = progress
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[pb.UploadRequest]:
        try:
            yield pb.UploadRequest(begin=pb.UploadBegin(cose=self._cose))
            with self._blob.open("rb") as file:
                size = self._blob.stat().st_size
                file.seek(self._position)
                while data := file.read(limits.CHUNK_BYTES):
                    yield pb.UploadRequest(chunk=pb.Chunk(offset=self._position, data=data))
                    self._position += len(data)
                    if self._progress is not None:
                        self._progress("upload", self._position, size)
        except OSError as error:
            # Inside gRPC's thread an exception would only cancel the call, and say nothing of the reason.
            self.failure = StateError(f"{self._blob.name}: {error.strerror}")
            raise


_KINDS: Final = {
    pb.InboxItem.KIND_SIGN: Kind.SIGN,
    pb.InboxItem.KIND_UPLOAD: Kind.UPLOAD,
    pb.InboxItem.KIND_JOIN: Kind.JOIN,
    pb.InboxItem.KIND_START: Kind.START,
    pb.InboxItem.KIND_COUNTERSIGN: Kind.COUNTERSIGN,
    pb.InboxItem.KIND_FETCH: Kind.FETCH,
}


def _agreement(reply: pb.AgreementState) -> AgreementReply:
    return AgreementReply(reply.canonical, dict(reply.signatures), tuple(reply.missing))


def _session(reply: pb.SessionState) -> SessionReply:
    parties = tuple((party.party, party.phase) for party in reply.parties)
    return SessionReply(
        reply.session, reply.agreement, reply.phase, parties, reply.code, reply.deadline_ms, reply.percent
    )


def _roster(reply: pb.RosterReply) -> RosterReply:
    return RosterReply(reply.cose, tuple(reply.missing))


def _details(error: grpc.RpcError) -> tuple[ErrorInfo | None, int | None]:
    """The ErrorInfo of an error and how long to wait, where the coordinator gave them."""
    info: ErrorInfo | None = None
    delay_ms: int | None = None
    for entry in error.trailing_metadata() or ():
        if entry.key == "grpc-status-details-bin":
            for detail in Status.FromString(entry.value).details:
                if detail.Is(ErrorInfo.DESCRIPTOR):
                    info = ErrorInfo()
                    detail.Unpack(info)
                elif detail.Is(RetryInfo.DESCRIPTOR):
                    retry = RetryInfo()
                    detail.Unpack(retry)
                    delay_ms = retry.retry_delay.ToMilliseconds()
    return (info if info is not None and info.domain == "parley" else None), delay_ms


def _server_key(address: str, certificate: bytes | None) -> tuple[bytes, str | None]:
    """(SHA-384 of the server's SubjectPublicKeyInfo, the name in a pinned certificate of the server itself)."""
    if certificate is not None:
        try:
            pinned = x509.load_pem_x509_certificate(certificate)
        except ValueError:
            raise StateError("the coordinator's certificate is no PEM certificate") from None
        if pinned.issuer == pinned.subject:
            names = pinned.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            named = names.get_values_for_type(x509.DNSName)
            return _spki_digest(pinned), named[0] if named else None
    context = ssl.create_default_context(cadata=None if certificate is None else certificate.decode())
    host, _, port = address.rpartition(":")
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=QUICK_S) as plain,
            context.wrap_socket(plain, server_hostname=host.strip("[]")) as secure,
        ):
            found = secure.getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise RefusedError("signature", f"{address}: its TLS certificate does not verify: {error.reason}") from None
    except (OSError, ValueError) as error:
        raise UnavailableError(f"{address}: {error}") from None
    if found is None:
        raise RefusedError("signature", f"{address}: no TLS certificate")
    return _spki_digest(x509.load_der_x509_certificate(found)), None


def _spki_digest(certificate: x509.Certificate) -> bytes:
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha384(spki).digest()
