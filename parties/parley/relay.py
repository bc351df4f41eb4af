"""What a client asks of the coordinator, and the plain values that it gets: no message of the wire goes further in.

`Relay` is what the workflows use; `transport` is the one over gRPC. Nothing that comes from it is believed before it has
been verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, Self

Progress = Callable[[str, int, int], None]
"""Called with (step, done, total) now and then."""


@dataclass(frozen=True, slots=True)
class AgreementReply:
    """An agreement with the signatures so far, and who has not signed."""

    canonical: bytes = field(repr=False)
    signatures: Mapping[str, bytes] = field(repr=False)
    missing: tuple[str, ...]


class Kind(StrEnum):
    """What waits for a member."""

    SIGN = "sign"
    UPLOAD = "upload"
    JOIN = "join"
    START = "start"
    COUNTERSIGN = "countersign"
    FETCH = "fetch"


@dataclass(frozen=True, slots=True)
class InboxItem:
    """Something that waits for the caller, who is `member` in that agreement. Times in ms; 0 where there is none."""

    kind: Kind
    agreement: bytes
    session: bytes
    table: str
    member: str
    since_ms: int
    due_ms: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; `number` rises."""

    number: int
    agreement: bytes
    session: bytes
    kind: str
    member: str
    table: str
    code: str
    at_ms: int
    percent: int


@dataclass(frozen=True, slots=True)
class UploadReply:
    """How much of an upload the coordinator holds for good."""

    stored: int
    size: int
    complete: bool


@dataclass(frozen=True, slots=True)
class SessionReply:
    """A session as the coordinator tells it. `parties`: (party, absent | uploaded | joined | countersigned)."""

    session: bytes
    agreement: bytes
    phase: str
    parties: tuple[tuple[str, str], ...]
    code: str
    deadline_ms: int
    percent: int


@dataclass(frozen=True, slots=True)
class AttestReply:
    """An offer and a document that carries the caller's nonce; nothing of it is verified."""

    offer: bytes = field(repr=False)
    document: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class JoinReply:
    """A receipt, or the code of the refusal."""

    receipt: bytes = field(repr=False)
    code: str


@dataclass(frozen=True, slots=True)
class RosterReply:
    """A roster, and who has not countersigned it."""

    cose: bytes = field(repr=False)
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FormerRoster:
    """A roster signed before under the same head, with the evidence that it is one."""

    offer: bytes = field(repr=False)
    document: bytes = field(repr=False)
    cose: bytes = field(repr=False)


class Relay(Protocol):
    """The coordinator's service. Every call may be repeated; each raises RefusedError or UnavailableError."""

    def put_agreement(self, canonical: bytes) -> AgreementReply:
        """Publishes an agreement; by an operator's member only."""

    def put_signature(self, agreement: bytes, member: str, cose: bytes) -> AgreementReply:
        """Hands in a member's signature."""

    def get_agreement(self, *, digest: bytes = b"", series: bytes = b"") -> AgreementReply:
        """An agreement by its digest, or the newest of a series."""

    def inbox(self) -> tuple[InboxItem, ...]:
        """What waits for the caller."""

    def watch(self, *, after: int = 0, session: bytes = b"") -> Iterator[Event]:
        """Events after a number, as they happen, without end."""

    def upload(self, cose: bytes, digest: bytes, blob: Path, progress: Progress | None = None) -> UploadReply:
        """Sends what the coordinator lacks of a sealed table. `digest` is that of the upload statement."""

    def open_session(self, request_id: bytes, agreement: bytes) -> SessionReply:
        """Opens a session, or gives the one that this request opened."""

    def get_session(self, session: bytes) -> SessionReply:
        """Where a session stands."""

    def attest(self, session: bytes, nonce: bytes) -> AttestReply:
        """The offer, and a document made for `nonce`."""

    def put_join(self, session: bytes, cose: bytes) -> JoinReply:
        """Joins; answers when the enclave has admitted or refused."""

    def start(self, session: bytes, cose: bytes) -> RosterReply:
        """Closes the inputs."""

    def get_roster(self, session: bytes) -> RosterReply:
        """The live roster; RefusedError "phase" where there is none."""

    def put_countersignature(self, session: bytes, cose: bytes, former: Sequence[FormerRoster]) -> SessionReply:
        """Hands in a countersignature with the evidence of the rosters that it names."""

    def refuse(self, session: bytes, cose: bytes) -> SessionReply:
        """Hands in a refusal of the roster."""

    def bundle(self, session: bytes, progress: Progress | None = None) -> bytes:
        """The bundle of a session's release."""

    def chain(self, series: bytes, after: bytes) -> list[tuple[bytes, bytes]]:
        """(record, document) after a head, oldest first."""

    def close(self) -> None:
        """Ends the connection."""

    def __enter__(self) -> Self:
        """Itself."""

    def __exit__(self, *_: object) -> None:
        """Closes."""
