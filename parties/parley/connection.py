"""A connection to a coordinator: agreements, inbox, sessions. What the coordinator says is checked before it is believed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from parley.member import Member
from parley.session import Session
from parley.standing import Standing
from parley.transport import Transport
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.chain import verify_lineage
from parley_protocol.claims import verify_agreement_signature
from parley_protocol.errors import MalformedError, RefusedError, StateError, VerificationError
from parley_protocol.v1 import coordinator_pb2 as pb

_KINDS: Final = {
    pb.InboxItem.KIND_SIGN: "sign",
    pb.InboxItem.KIND_UPLOAD: "upload",
    pb.InboxItem.KIND_JOIN: "join",
    pb.InboxItem.KIND_START: "start",
    pb.InboxItem.KIND_COUNTERSIGN: "countersign",
    pb.InboxItem.KIND_FETCH: "fetch",
}


@dataclass(frozen=True, slots=True)
class AgreementStatus:
    """An agreement at the coordinator: who signed it (verified) and whose signature is missing."""

    agreement: Agreement
    signed: SignedAgreement = field(repr=False)

    @property
    def missing(self) -> tuple[str, ...]:
        """Members whose signature is missing, in the agreement's order."""
        return tuple(name for name in self.agreement.members if name not in self.signed.signatures)

    @property
    def complete(self) -> bool:
        """Whether all members signed."""
        return not self.missing


@dataclass(frozen=True, slots=True)
class InboxItem:
    """One thing that waits for this member: `kind` is sign, upload, join, start, countersign or fetch; `session` and
    `table` are empty where there is none; times in milliseconds, 0 where there is none."""

    kind: str
    agreement: bytes
    session: bytes
    table: str
    member: str
    due_ms: int
    since_ms: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; `number` counts up, `kind` as in coordinator.proto."""

    number: int
    agreement: bytes
    session: bytes
    kind: str
    member: str
    table: str
    code: str
    at_ms: int
    percent: int


def connect(
    address: str | None, member: Member, cert: str | Path | None = None, *, patience_s: float = 60.0
) -> Connection:
    """A connection to the coordinator at host:port (None: the one that was used last).

    `cert`: a PEM file with its certificate or CA, or "sha384:HEX" of its key; None: what was used last with this address,
    else the system's CAs. UnavailableError where nobody answers for `patience_s` seconds.
    """
    known = member.state.coordinator()
    if address is None:
        if known is None:
            raise StateError("no coordinator was used before: say which, host:port")
        address = known[0]
    pin: str | None
    if cert is None:
        pin = known[1] if known is not None and known[0] == address else None
    elif isinstance(cert, str) and cert.startswith("sha384:"):
        pin = cert
    else:
        pin = Path(cert).read_text("ascii", "replace")
    transport = Transport(address, member.identity, pin, patience_s=patience_s)
    if known != (address, pin):
        member.state.remember_coordinator(address, pin)
    return Connection(member, transport)


class Connection:
    """What a member does at a coordinator. A context manager."""

    def __init__(self, member: Member, transport: Transport) -> None:
        self.member = member
        self.transport = transport

    def __repr__(self) -> str:
        return f"Connection({self.transport.address}, {self.member!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self.transport.close()

    # Agreements

    def put(self, agreement: Agreement | SignedAgreement) -> AgreementStatus:
        """Hands an agreement to the coordinator, with the signatures that are there."""
        status = self._status(self.transport.put_agreement(agreement.canonical), agreement.digest)
        if isinstance(agreement, SignedAgreement):
            for name, cose in agreement.signatures.items():
                if name not in status.signed.signatures:
                    status = self._status(self.transport.put_signature(agreement.digest, name, cose), agreement.digest)
        return status

    def agreement(self, digest: bytes | None = None, *, series: bytes | None = None) -> AgreementStatus:
        """An agreement by its digest, or the newest version of a series that the coordinator tells of."""
        if (digest is None) == (series is None):
            raise ValueError("either the digest or the series")
        return self._status(self.transport.get_agreement(digest=digest, series=series), digest, series)

    def sign(self, agreement: Agreement, *, trust_head: bytes | None = None) -> AgreementStatus:
        """Signs an agreement (see `Member.sign`) and hands the signature in."""
        try:
            status = self.agreement(agreement.digest)
        except RefusedError as error:
            if error.code != "unknown-agreement":
                raise
            status = self.put(agreement)
        cose = self.member.sign(agreement, status.signed, trust_head=trust_head)
        name = self.member.name_in(agreement)
        return self._status(self.transport.put_signature(agreement.digest, name, cose), agreement.digest)

    def _status(self, reply: pb.AgreementState, digest: bytes | None, series: bytes | None = None) -> AgreementStatus:
        signed = SignedAgreement(reply.canonical, dict(reply.signatures))
        agreement = signed.agreement()
        if (digest is not None and agreement.digest != digest) or (series is not None and agreement.series != series):
            raise MalformedError("the coordinator gave another agreement than the one that was asked for")
        good = {}
        for name, cose in signed.signatures.items():
            if name in agreement.members:
                try:
                    verify_agreement_signature(cose, agreement, name)
                except (MalformedError, VerificationError):
                    continue  # a signature that does not hold is one that is missing
                good[name] = cose
        verified = SignedAgreement(reply.canonical, good)
        self.member.state.keep_agreement(verified)
        return AgreementStatus(agreement, verified)

    def lineage(self, agreement: Agreement) -> tuple[Agreement, ...]:
        """All versions up to this one, oldest first, each signed by all its members; VerificationError where not."""
        found: list[SignedAgreement] = []
        digest: bytes | None = agreement.digest
        while digest is not None:
            signed = self.member.state.signed_agreement(digest)
            if signed is None or signed.missing():
                signed = self.agreement(digest).signed
            found.append(signed)
            if len(found) > limits.VERSIONS:
                raise MalformedError("the agreement has more versions before it than a series may have")
            digest = signed.agreement().replaces
        return verify_lineage(found[::-1])

    # What waits, and what happens

    def inbox(self) -> list[InboxItem]:
        """What waits for this member, what waits longest first."""
        return [
            InboxItem(
                _KINDS[item.kind], item.agreement, item.session, item.table, item.member, item.due_ms, item.since_ms
            )
            for item in self.transport.inbox().items
            if item.kind in _KINDS
        ]

    def watch(self, session: bytes | None = None, after: int = 0) -> Iterator[Event]:
        """Events after a number, of one session or of all, for ever; it connects again when the connection is lost."""
        while True:
            for event in self.transport.events(after, session or b"", 3600.0):
                after = event.number
                yield Event(
                    event.number,
                    event.agreement,
                    event.session,
                    event.kind,
                    event.member,
                    event.table,
                    event.code,
                    event.at_ms,
                    event.percent,
                )

    # Sessions

    def open(self, agreement: Agreement) -> Session:
        """Opens a session of an agreement, or finds the live one; the same request is repeated until it is answered."""
        self.lineage(agreement)
        state = self.transport.open_session(secrets.token_bytes(16), agreement.digest)
        if state.agreement != agreement.digest:
            raise MalformedError("the coordinator opened a session of another agreement")
        return Session(self, agreement, state.session)

    def session(self, reference: Agreement | bytes) -> Session:
        """A session by its id (16 bytes), or the live session of an agreement.

        RefusedError "unknown-session" where the agreement has no live session.
        """
        if isinstance(reference, Agreement):
            live = self._live(reference)
            if live is None:
                raise RefusedError(
                    "unknown-session", f"no session of {reference.title} is open; somebody must open one"
                )
            return Session(self, reference, live)
        state = self.transport.get_session(reference)
        return Session(self, self.agreement(state.agreement).agreement, reference)

    def standing(self, agreement: Agreement) -> Standing:
        """What this member does for all sessions of an agreement, while none is open too: it needs a KMS key of its own."""
        return Standing(self, agreement)

    def _live(self, agreement: Agreement) -> bytes | None:
        """The session of an agreement that is neither lost nor released: one that waits for this member or that it joined, else
        the one that the coordinator names."""
        waiting = {item.session for item in self.inbox() if item.agreement == agreement.digest and item.session}
        joined = {joined.session for joined in self.member.state.sessions() if joined.agreement == agreement.digest}
        for session in waiting | joined:
            if self._lives(session):
                return session
        # Who neither brings nor joins, as an analyst.
        named = self.live(agreement.digest)
        return named if named is not None and self._lives(named) else None

    def live(self, agreement: bytes) -> bytes | None:
        """The id of the session that lives under an agreement, as the coordinator says; None where none does, or where it does
        not know the agreement."""
        try:
            return self.transport.get_agreement(digest=agreement).session or None
        except RefusedError as error:
            if error.code != "unknown-agreement":
                raise
            return None

    def _lives(self, session: bytes) -> bool:
        try:
            return self.transport.get_session(session).phase not in ("lost", "released")
        except RefusedError:
            return False

    def sessions(self) -> list[bytes]:
        """Ids of the sessions that this member knows of: joined, fetched, or waiting in the inbox."""
        known = {joined.session for joined in self.member.state.sessions()} | set(self.member.state.releases())
        return sorted(known | {item.session for item in self.inbox() if item.session})
