"""The statements of the protocol, and the byte strings that keys and seals are bound to (SPEC, "Statements").

Each statement is a frozen dataclass with its label and the shape of each field; `to_bytes` and `from_bytes` are the only
way to and from bytes. Who signs what, and what must be true of it, is in `claims`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from parley_protocol import limits
from parley_protocol.encoding import Value, encode, sha384
from parley_protocol.errors import MalformedError
from parley_protocol.secret import Secret
from parley_protocol.shapes import Bytes, Row, Seq, Shape, Statement, Text, Uint

GENESIS = bytes(48)
"""The head of a chain that holds no record."""

_DIGEST = Bytes(48)
_SESSION = Bytes(16)
_NAME = Text()
_DIGESTS = Seq(_DIGEST, 1, limits.TABLES)
_SEALED_KEYS = Bytes(1, limits.SEALED_KEYS_BYTES)
NO_ROSTER_KEY = bytes(32)
"""The roster key of a KMS join under standing consent, where nobody countersigns."""


@dataclass(frozen=True, slots=True)
class AgreementSignature(Statement):
    """A member's consent to an agreement. `head`: genesis for version 1, else the head that the amendment follows."""

    LABEL: ClassVar[str] = "parley/1/agreement-signature"
    SHAPES: ClassVar[tuple[Shape, ...]] = (_DIGEST, _NAME, _DIGEST)
    agreement: bytes
    member: str
    head: bytes


@dataclass(frozen=True, slots=True)
class Offer(Statement):
    """A session's public keys and the head it continues, made by the enclave; `made_at` is NSM time."""

    LABEL: ClassVar[str] = "parley/1/offer"
    SHAPES: ClassVar[tuple[Shape, ...]] = (
        _SESSION,
        _DIGEST,
        Bytes(limits.SEALING_KEY_BYTES),
        Bytes(32),
        _DIGEST,
        Uint(),
    )
    session: bytes
    agreement: bytes
    sealing_key: bytes
    signing_key: bytes
    head: bytes
    made_at: int


@dataclass(frozen=True, slots=True)
class UploadHeader(Statement):
    """What one sealed table is, and the commitment to its content key. The frame key is derived from its digest."""

    LABEL: ClassVar[str] = "parley/1/upload-header"
    SHAPES: ClassVar[tuple[Shape, ...]] = (
        _DIGEST,
        _NAME,
        _NAME,
        _DIGEST,
        Uint(1, limits.GROUPS),
        Uint(limits.GROUP_ROWS[0], limits.GROUP_ROWS[-1]),
        Bytes(16),
        _DIGEST,
    )
    agreement: bytes
    party: str
    table: str
    schema: bytes
    groups: int
    group_rows: int
    upload_id: bytes
    key_commitment: bytes


@dataclass(frozen=True, slots=True)
class Upload(Statement):
    """One party's table for one agreement: its header and the SHA-384 of the list of SHA-256 of every sealed frame."""

    LABEL: ClassVar[str] = "parley/1/upload"
    SHAPES: ClassVar[tuple[Shape, ...]] = (Bytes(1, limits.STATEMENT_BYTES), _DIGEST)
    header_bytes: bytes
    frames_digest: bytes

    @property
    def header(self) -> UploadHeader:
        """The header inside; MalformedError where it is none."""
        return UploadHeader.from_bytes(self.header_bytes)

    def check(self) -> None:
        if self.header.to_bytes() != self.header_bytes:
            raise MalformedError("Upload.header_bytes: not canonical")


@dataclass(frozen=True, slots=True)
class JoinKeys(Secret, Statement):
    """What a join seals to the session: the content keys of its uploads in their order, and the party's noise share."""

    LABEL: ClassVar[str] = "parley/1/join-keys"
    SHAPES: ClassVar[tuple[Shape, ...]] = (Seq(Bytes(32), 1, limits.TABLES), Bytes(32))
    content_keys: tuple[bytes, ...] = field(repr=False)
    noise_share: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Join(Statement):
    """A party's consent that one session may open its uploads. `roster_key` is the public half of a one-time key."""

    LABEL: ClassVar[str] = "parley/1/join"
    SHAPES: ClassVar[tuple[Shape, ...]] = (_DIGEST, _NAME, _DIGESTS, _SEALED_KEYS, _DIGEST, Bytes(32))
    offer: bytes
    party: str
    uploads: tuple[bytes, ...]
    sealed_keys: bytes
    share_digest: bytes
    roster_key: bytes


@dataclass(frozen=True, slots=True)
class KmsJoin(Statement):
    """A party's consent that every session under one agreement may open its uploads, by a KMS key of its own.

    `ciphertext` is what KMS made of `kms_plaintext` under that key. `number` counts a party's KMS joins under an agreement;
    the greatest one stands. `roster_key` is the public half of a one-time key, or NO_ROSTER_KEY.
    """

    LABEL: ClassVar[str] = "parley/1/kms-join"
    SHAPES: ClassVar[tuple[Shape, ...]] = (
        _DIGEST,
        _NAME,
        _DIGESTS,
        Bytes(1, limits.KMS_BLOB_BYTES),
        _DIGEST,
        Bytes(32),
        Uint(1),
    )
    agreement: bytes
    party: str
    uploads: tuple[bytes, ...]
    ciphertext: bytes = field(repr=False)
    share_digest: bytes
    roster_key: bytes
    number: int


AnyJoin: TypeAlias = Join | KmsJoin
"""What lets a session open a party's uploads."""


def read_join(data: bytes) -> AnyJoin:
    """The join of either kind in `data`; MalformedError where it is neither."""
    label = encode(KmsJoin.LABEL)
    return KmsJoin.from_bytes(data) if data[1 : 1 + len(label)] == label else Join.from_bytes(data)


@dataclass(frozen=True, slots=True)
class Receipt(Statement):
    """The enclave's acknowledgement that it admitted a join. It holds no row count, since the host reads it (stm-2)."""

    LABEL: ClassVar[str] = "parley/1/receipt"
    SHAPES: ClassVar[tuple[Shape, ...]] = (_DIGEST, _NAME, _DIGESTS, _DIGEST, Uint())
    offer: bytes
    party: str
    uploads: tuple[bytes, ...]
    join: bytes
    admitted_at: int


@dataclass(frozen=True, slots=True)
class Start(Statement):
    """The request of a member named in `session.start` to close the inputs."""

    LABEL: ClassVar[str] = "parley/1/start"
    SHAPES: ClassVar[tuple[Shape, ...]] = (_DIGEST, _NAME)
    offer: bytes
    member: str


@dataclass(frozen=True, slots=True)
class Included:
    """A party in a roster: exactly what will be computed on, the join that allows it, and the key that countersigns."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (_NAME, _DIGESTS, _DIGEST, _DIGEST, Bytes(32))
    party: str
    uploads: tuple[bytes, ...]
    share_digest: bytes
    join: bytes
    roster_key: bytes

    @property
    def input(self) -> Input:
        """What of it decides the result."""
        return Input(self.party, self.uploads, self.share_digest)


@dataclass(frozen=True, slots=True)
class Input:
    """What of a party decides a result: its uploads and its noise share."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (_NAME, _DIGESTS, _DIGEST)
    party: str
    uploads: tuple[bytes, ...]
    share_digest: bytes


@dataclass(frozen=True, slots=True)
class Absentee:
    """A party that a roster leaves out, and why."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (_NAME, _NAME)
    party: str
    reason: str


@dataclass(frozen=True, slots=True)
class Inputs(Statement):
    """What decides a result under one agreement and head: equal for a repetition in another session."""

    LABEL: ClassVar[str] = "parley/1/inputs"
    SHAPES: ClassVar[tuple[Shape, ...]] = (_DIGEST, _DIGEST, Seq(Row(Input), 1), Seq(_NAME))
    agreement: bytes
    head: bytes
    inputs: tuple[Input, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Roster(Statement):
    """The enclave's list of what will be computed on. `inputs_digest` is the digest of its `Inputs`; expiry in NSM time."""

    LABEL: ClassVar[str] = "parley/1/roster"
    SHAPES: ClassVar[tuple[Shape, ...]] = (_DIGEST, _DIGEST, Seq(Row(Included), 1), Seq(Row(Absentee)), Uint())
    offer: bytes
    inputs_digest: bytes
    included: tuple[Included, ...]
    absentees: tuple[Absentee, ...]
    expires_at: int

    def inputs(self, agreement: bytes, head: bytes) -> Inputs:
        """The inputs that this roster fixes under an agreement and head."""
        return Inputs(agreement, head, tuple(i.input for i in self.included), tuple(a.party for a in self.absentees))

    def entry(self, party: str) -> Included | None:
        """The entry of one party, or None."""
        return next((entry for entry in self.included if entry.party == party), None)


@dataclass(frozen=True, slots=True)
class RosterConsent(Statement):
    """What a one-time roster key signs. `former`: the digests of the rosters signed before under this head."""

    LABEL: ClassVar[str] = "parley/1/roster-consent"
    SHAPES: ClassVar[tuple[Shape, ...]] = (_DIGEST, _NAME, Seq(_DIGEST, 0, limits.FORMER_ROSTERS))
    roster: bytes
    party: str
    former: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Countersignature(Statement):
    """A party's consent to a roster: signed by its member key, and inside by the one-time roster key of its join.

    The one-time key holds off a second client or a restored backup (F7); the member's key lets an auditor, who has no
    join, tie the consent to the member.
    """

    LABEL: ClassVar[str] = "parley/1/countersignature"
    SHAPES: ClassVar[tuple[Shape, ...]] = (*RosterConsent.SHAPES, Bytes(64))
    roster: bytes
    party: str
    former: tuple[bytes, ...]
    one_time_signature: bytes

    @property
    def consent(self) -> RosterConsent:
        """What the one-time key signed."""
        return RosterConsent(self.roster, self.party, self.former)


@dataclass(frozen=True, slots=True)
class Refusal(Statement):
    """A party's refusal of a roster: the roster ends and this names who ended it."""

    LABEL: ClassVar[str] = "parley/1/refusal"
    SHAPES: ClassVar[tuple[Shape, ...]] = (_DIGEST, _NAME)
    roster: bytes
    party: str


@dataclass(frozen=True, slots=True)
class Committed:
    """An output of a record: who receives it, and the commitment to its salt and plaintext."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (_NAME, Seq(_NAME, 1), _DIGEST)
    output: str
    recipients: tuple[str, ...]
    commitment: bytes


@dataclass(frozen=True, slots=True)
class Spent:
    """Privacy budget of one output: its name, then what was spent and what is left, as decimal text."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (_NAME, _NAME, _NAME)
    output: str
    spent: str
    left: str


@dataclass(frozen=True, slots=True)
class RecordBody(Statement):
    """What was used and released. Nothing in it is random or a time: a repeated computation has the same body.

    Its digest is the new head of the series. `charged` counts all releases charged along the chain, this one included.
    """

    LABEL: ClassVar[str] = "parley/1/record-body"
    SHAPES: ClassVar[tuple[Shape, ...]] = (
        _DIGEST,
        _NAME,
        Seq(Row(Input), 1),
        Seq(Row(Absentee)),
        Seq(Row(Committed), 1, limits.OUTPUTS),
        Seq(Row(Spent), 0, limits.OUTPUTS),
        Uint(1),
        Uint(1),
        _DIGEST,
    )
    agreement: bytes
    engine: str
    inputs: tuple[Input, ...]
    absentees: tuple[Absentee, ...]
    outputs: tuple[Committed, ...]
    privacy: tuple[Spent, ...]
    sequence: int
    charged: int
    previous: bytes


@dataclass(frozen=True, slots=True)
class Record(Statement):
    """A record body and the session that made it."""

    LABEL: ClassVar[str] = "parley/1/record"
    SHAPES: ClassVar[tuple[Shape, ...]] = (Bytes(1, limits.STATEMENT_BYTES), _SESSION, _DIGEST, _DIGEST)
    body_bytes: bytes
    session: bytes
    offer: bytes
    roster: bytes

    @property
    def body(self) -> RecordBody:
        """The body inside; MalformedError where it is none."""
        return RecordBody.from_bytes(self.body_bytes)

    @property
    def head(self) -> bytes:
        """The head of the series after this record."""
        return sha384(self.body_bytes)

    def check(self) -> None:
        if self.body.to_bytes() != self.body_bytes:
            raise MalformedError("Record.body_bytes: not canonical")


@dataclass(frozen=True, slots=True)
class Caller(Statement):
    """Who calls the coordinator, for which server (SHA-384 of its TLS key's SubjectPublicKeyInfo), until when."""

    LABEL: ClassVar[str] = "parley/1/caller"
    SHAPES: ClassVar[tuple[Shape, ...]] = (Bytes(32), _DIGEST, Uint())
    member_key: bytes
    server: bytes
    expires_at: int


@dataclass(frozen=True, slots=True)
class SealedOutput(Secret, Statement):
    """What a recipient opens: the salt of the commitment and the canonical plaintext of the output, padded.

    The padding is one byte 0x80 and then zeros, to a size that the agreement fixes: else the size of what is sealed would
    tell the host how many values are hidden, and how large the others are (REVIEW T4).
    """

    LABEL: ClassVar[str] = "parley/1/sealed-output"
    SHAPES: ClassVar[tuple[Shape, ...]] = (Bytes(32), Bytes(2, limits.OUTPUT_BYTES + 1))
    LIMIT: ClassVar[int] = limits.OUTPUT_BYTES + 65
    salt: bytes = field(repr=False)
    padded: bytes = field(repr=False)

    @classmethod
    def of(cls, salt: bytes, plaintext: bytes, size: int = 0) -> SealedOutput:
        """A plaintext padded to `size` bytes, or by one byte where it is longer."""
        return cls(salt, (plaintext + b"\x80").ljust(size, b"\0"))

    def check(self) -> None:
        if len(self.padded.rstrip(b"\0")) < 2 or not self.padded.rstrip(b"\0").endswith(b"\x80"):
            raise MalformedError("SealedOutput.padded: no padding")

    @property
    def plaintext(self) -> bytes:
        """The canonical plaintext of the output."""
        return self.padded.rstrip(b"\0")[:-1]


# What documents carry in user_data.


def offer_user_data(offer: bytes) -> bytes:
    """user_data of the document of an offer; `offer` is the statement's bytes."""
    return encode(["parley/1/offer-document", sha384(offer)])


def record_user_data(record: bytes) -> bytes:
    """user_data of the document of a record; `record` is the statement's bytes."""
    return encode(["parley/1/record-document", sha384(record)])


def kms_user_data(offer: bytes, join: bytes) -> bytes:
    """user_data of the document with which KMS is asked for the keys of a KMS join; both are digests."""
    return encode(["parley/1/kms-document", offer, join])


# What KMS ciphertexts hold, and what they are bound to.


def kms_plaintext(content_keys: tuple[bytes, ...], noise_share: bytes) -> bytes:
    """What a party encrypts under its KMS key: 32 bytes each, so that the length says nothing and nothing is parsed."""
    return b"".join((*content_keys, noise_share))


def kms_context(agreement: bytes, party: str, uploads: tuple[bytes, ...]) -> dict[str, str]:
    """The encryption context of a KMS ciphertext. It stands in the account's logs: digests and names only."""
    return {
        "parley:label": "parley/1/kms-keys",
        "parley:agreement": agreement.hex(),
        "parley:party": party,
        "parley:uploads": sha384(encode(["parley/1/kms-uploads", list(uploads)])).hex(),
    }


def kms_share_context(agreement: bytes, uploads: tuple[bytes, ...]) -> bytes:
    """What the noise share of a KMS join is derived from, beside the party's private key."""
    return encode(["parley/1/kms-share-context", agreement, list(uploads)])


# What HPKE seals are bound to. HPKE is used without aad; all context goes into info (RFC 9180, section 8.1).


def join_info(offer: bytes, party: str, uploads: tuple[bytes, ...]) -> bytes:
    """HPKE info of a join's keys; `offer` is the offer's digest."""
    return encode(["parley/1/join-seal", offer, party, list(uploads)])


def output_info(head: bytes, output: str, recipient: str) -> bytes:
    """HPKE info of a sealed output; `head` is the digest of the record's body."""
    return encode(["parley/1/output-seal", head, output, recipient])


# Commitments and derived keys.


def key_commitment(content_key: bytes) -> bytes:
    """Commitment to a content key (48 bytes). AES-GCM commits to no key, so the upload does."""
    return sha384(encode(["parley/1/content-key", content_key]))


def share_digest(noise_share: bytes) -> bytes:
    """Commitment to a noise share (48 bytes)."""
    return sha384(encode(["parley/1/noise-share", noise_share]))


def output_commitment(salt: bytes, plaintext: bytes) -> bytes:
    """Commitment to an output (48 bytes), the same for all its recipients."""
    return sha384(encode(["parley/1/output-commitment", salt, plaintext]))


def unit_salt(series: bytes, unit: str) -> bytes:
    """The 16-byte salt of unit keys: stable along a chain. Known to all members, so it gives no secrecy."""
    return sha384(encode(["parley/1/unit-salt", series, unit]))[:16]


def frame_key(content_key: bytes, header: bytes) -> bytes:
    """The AES-256-GCM key of an upload's frames; `header` is the header's bytes."""
    return _hkdf(content_key, ["parley/1/frame-key", sha384(header)])


def noise_key(shares: tuple[bytes, ...], agreement: bytes, head: bytes, inputs: bytes) -> bytes:
    """The key of all randomness in a release, from the shares in the roster's order: one honest party keeps it secret."""
    return _hkdf(b"".join(shares), ["parley/1/noise-key", agreement, head, inputs])


def output_salt(key: bytes, output: str) -> bytes:
    """The salt of an output's commitment, from the noise key: the same inputs give the same commitment."""
    return _hkdf(key, ["parley/1/output-salt", output])


def noise_share_context(series: bytes, head: bytes) -> bytes:
    """What a party derives its noise share from, beside its private key."""
    return encode(["parley/1/noise-share-context", series, head])


def _hkdf(secret: bytes, info: list[Value]) -> bytes:
    return HKDF(algorithm=hashes.SHA384(), length=32, salt=None, info=encode(info)).derive(secret)
