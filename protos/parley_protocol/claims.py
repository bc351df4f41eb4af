"""Claims: what a signed or attested statement says, and the numbered checks that make it believed (SPEC, "Claims").

Every function takes bytes and returns a statement, or raises: `MalformedError` for bytes that are no such statement,
`VerificationError` with the step of SPEC for a claim that does not hold. Time is an argument; nothing is read or sent.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Final, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from parley_protocol import cose, limits
from parley_protocol.agreement.model import Agreement, Consent
from parley_protocol.attestation.policy import Policy
from parley_protocol.attestation.verify import VerifiedEnclave, VerifiedStatement, verify_live, verify_statement
from parley_protocol.errors import VerificationError
from parley_protocol.shapes import Statement
from parley_protocol.table import is_bucket
from parley_protocol.transcript import (
    NO_ROSTER_KEY,
    AgreementSignature,
    AnyJoin,
    Caller,
    Countersignature,
    Join,
    KmsJoin,
    Offer,
    Receipt,
    Record,
    Refusal,
    Roster,
    Start,
    Upload,
    offer_user_data,
    record_user_data,
)

_S = TypeVar("_S", bound=Statement)
_TOKEN: Final = object()


def _require(holds: bool, step: str, message: str, *, code: str) -> None:
    if not holds:
        raise VerificationError(step, message, code=code)


def _unverified(kind: type[_S], signed: bytes) -> _S:
    """The statement inside an envelope whose signature nobody has checked yet: only to learn whose key to check."""
    return kind.from_bytes(cose.payload_unverified(signed))


def _signed_by(signed: bytes, key: bytes, step: str) -> None:
    cose.verify(signed, Ed25519PublicKey.from_public_bytes(key), step=step)


def _signed_by_member(signed: bytes, agreement: Agreement, name: str, step: str) -> None:
    member = agreement.members.get(name)
    _require(member is not None, step, "the signer is no member of the agreement", code="not-a-member")
    assert member is not None
    _signed_by(signed, member.signing, step)


# Agreements


def verify_agreement_signature(signed: bytes, agreement: Agreement, member: str) -> AgreementSignature:
    """A member's signature of an agreement: agr-1 names it, agr-2 the member, agr-3 is the member's."""
    statement = _unverified(AgreementSignature, signed)
    _require(statement.agreement == agreement.digest, "agr-1", "signs another agreement", code="agreement")
    _require(statement.member == member, "agr-2", "signs for another member", code="signature")
    _signed_by_member(signed, agreement, member, "agr-3")
    return statement


# Offers


@dataclass(frozen=True, slots=True)
class VerifiedOffer:
    """An offer whose enclave was verified now, with a fresh nonce. `seal` and `join` take nothing else."""

    agreement: Agreement
    offer: Offer
    digest: bytes
    enclave: VerifiedEnclave
    # Not a field: `dataclasses.replace` must not carry it over to a changed copy.
    token: InitVar[object]

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("a VerifiedOffer comes from verify_offer and from nowhere else")


@dataclass(frozen=True, slots=True)
class PastOffer:
    """An offer that was attested at its own time. It says what a session was, not that an enclave is there."""

    agreement: Agreement
    offer: Offer
    digest: bytes
    document: VerifiedStatement
    # Not a field: `dataclasses.replace` must not carry it over to a changed copy.
    token: InitVar[object]

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("a PastOffer comes from verify_past_offer and from nowhere else")


def verify_offer(
    agreement: Agreement, offer: bytes, document: bytes, *, nonce: bytes, head: bytes, now_ms: int
) -> VerifiedOffer:
    """The offer of a live enclave. `nonce`: 32 fresh bytes of the caller; `head`: what the caller last verified.

    off-1 the offer is one, off-2 its agreement is this one, off-3 the agreement has not expired, off-4 the document is
    live and carries this offer (att-*), off-5 the offer was made before the document, off-6 its head is the caller's.
    """
    statement = _offer_of(agreement, offer)
    _require(now_ms < agreement.expires_ms, "off-3", "the agreement has expired", code="expired")
    enclave = verify_live(
        document,
        policy=Policy.of(agreement),
        nonce=nonce,
        user_data=offer_user_data(offer),
        public_key=statement.signing_key,
        now_ms=now_ms,
    )
    _require(
        statement.made_at <= enclave.timestamp_ms, "off-5", "the offer is younger than its document", code="malformed"
    )
    if statement.head != head:
        raise VerificationError(
            "off-6", "the offer continues another head", code="head", expected=head, actual=statement.head
        )
    return VerifiedOffer(agreement, statement, statement.digest, enclave, _TOKEN)


def verify_past_offer(agreement: Agreement, offer: bytes, document: bytes, *, now_ms: int) -> PastOffer:
    """The offer of a session of the past, at its document's own time: off-1, off-2, off-4, off-5."""
    statement = _offer_of(agreement, offer)
    verified = verify_statement(
        document,
        policy=Policy.of(agreement),
        user_data=offer_user_data(offer),
        public_key=statement.signing_key,
        nonce_present=True,
        now_ms=now_ms,
    )
    _require(
        statement.made_at <= verified.timestamp_ms, "off-5", "the offer is younger than its document", code="malformed"
    )
    return PastOffer(agreement, statement, statement.digest, verified, _TOKEN)


def _offer_of(agreement: Agreement, offer: bytes) -> Offer:
    statement = Offer.from_bytes(offer)  # off-1
    _require(statement.agreement == agreement.digest, "off-2", "the offer is for another agreement", code="agreement")
    return statement


# Inputs


def verify_upload(signed: bytes, agreement: Agreement) -> Upload:
    """A party's upload: upl-1 this agreement, upl-2 its table, upl-3 its schema, upl-4 a size of SPEC, upl-5 signed."""
    upload = _unverified(Upload, signed)
    header = upload.header
    _require(header.agreement == agreement.digest, "upl-1", "the upload is for another agreement", code="agreement")
    table = agreement.tables.get(header.table)
    _require(table is not None, "upl-2", "no such table in the agreement", code="schema")
    assert table is not None
    _require(header.party in table.parties, "upl-2", "the party does not bring this table", code="schema")
    _require(header.schema == table.schema_digest, "upl-3", "the upload has another schema", code="schema")
    _require(is_bucket(header.groups, header.group_rows), "upl-4", "no size that a table may have", code="schema")
    _signed_by_member(signed, agreement, header.party, "upl-5")
    return upload


def verify_join(signed: bytes, offer: Offer, agreement: Agreement) -> Join:
    """A party's join: join-1 this offer, join-2 a party, join-3 an upload for each of its tables, join-4 signed."""
    join = _unverified(Join, signed)
    _require(join.offer == offer.digest, "join-1", "the join is for another session", code="agreement")
    tables = agreement.tables_of(join.party)
    _require(bool(tables), "join-2", "the signer brings no table", code="not-a-member")
    _require(
        len(join.uploads) == len(tables) and len(set(join.uploads)) == len(tables),
        "join-3",
        "not one upload for each table of the party",
        code="schema",
    )
    _signed_by_member(signed, agreement, join.party, "join-4")
    return join


def verify_kms_join(signed: bytes, agreement: Agreement) -> KmsJoin:
    """A party's KMS join: kms-1 this agreement, kms-2 a party whose key the agreement names, kms-3 an upload for each of its
    tables, kms-4 a roster key where rosters are countersigned and none where not, kms-5 signed."""
    join = _unverified(KmsJoin, signed)
    _require(join.agreement == agreement.digest, "kms-1", "the join is for another agreement", code="agreement")
    tables = agreement.tables_of(join.party)
    _require(bool(tables), "kms-2", "the signer brings no table", code="not-a-member")
    _require(join.party in agreement.kms, "kms-2", "the agreement names no key of the party", code="agreement")
    _require(
        len(join.uploads) == len(tables) and len(set(join.uploads)) == len(tables),
        "kms-3",
        "not one upload for each table of the party",
        code="schema",
    )
    _require(
        (join.roster_key != NO_ROSTER_KEY) is needs_countersignatures(agreement),
        "kms-4",
        "a roster key belongs to a join where rosters are countersigned, and to no other",
        code="agreement",
    )
    _signed_by_member(signed, agreement, join.party, "kms-5")
    return join


def verify_receipt(signed: bytes, offer: Offer, join: AnyJoin) -> Receipt:
    """The receipt of a join: rcp-1 signed by the session, rcp-2 for this offer, rcp-3 for this join and its uploads."""
    _signed_by(signed, offer.signing_key, "rcp-1")
    receipt = _unverified(Receipt, signed)
    _require(receipt.offer == offer.digest, "rcp-2", "the receipt is of another session", code="agreement")
    _require(
        receipt.party == join.party and receipt.join == join.digest and receipt.uploads == join.uploads,
        "rcp-3",
        "the receipt is for another join",
        code="conflict",
    )
    return receipt


def verify_start(signed: bytes, offer: Offer, agreement: Agreement) -> Start:
    """The request to close the inputs: sta-1 this offer, sta-2 a member named in session.start, sta-3 signed."""
    start = _unverified(Start, signed)
    _require(start.offer == offer.digest, "sta-1", "the request is for another session", code="agreement")
    _require(start.member in agreement.session.start, "sta-2", "the member may not start", code="not-a-member")
    _signed_by_member(signed, agreement, start.member, "sta-3")
    return start


# The roster


def verify_roster(signed: bytes, offer: Offer, agreement: Agreement) -> Roster:
    """A roster: ros-1 signed by the session, ros-2 of this offer, ros-3 each party once, included or absent, in the
    agreement's order, ros-4 at least the quorum, ros-5 the digest of its inputs."""
    _signed_by(signed, offer.signing_key, "ros-1")
    roster = _unverified(Roster, signed)
    _require(roster.offer == offer.digest, "ros-2", "the roster is of another session", code="agreement")
    included = [entry.party for entry in roster.included]
    absent = [entry.party for entry in roster.absentees]
    order = list(agreement.parties)
    _require(
        included == [party for party in order if party in included]
        and absent == [party for party in order if party in absent]
        and sorted(included + absent) == sorted(order),
        "ros-3",
        "the roster does not list each party once, in the agreement's order",
        code="roster",
    )
    _require(len(included) >= agreement.quorum, "ros-4", "fewer parties than the quorum", code="quorum")
    inputs = roster.inputs(agreement.digest, offer.head)
    _require(roster.inputs_digest == inputs.digest, "ros-5", "the digest of the inputs is wrong", code="roster")
    return roster


def verify_countersignature(signed: bytes, roster: Roster, agreement: Agreement) -> Countersignature:
    """A party's consent to a roster: cos-1 this roster, cos-2 an included party, cos-3 signed by the member, cos-4
    signed by the one-time key of its join, cos-5 no former roster twice, nor this one."""
    statement = _unverified(Countersignature, signed)
    _require(statement.roster == roster.digest, "cos-1", "signs another roster", code="roster")
    entry = roster.entry(statement.party)
    _require(entry is not None, "cos-2", "the party is not in the roster", code="not-a-member")
    assert entry is not None
    _signed_by_member(signed, agreement, statement.party, "cos-3")
    try:
        key = Ed25519PublicKey.from_public_bytes(entry.roster_key)
        key.verify(statement.one_time_signature, statement.consent.to_bytes())
    except InvalidSignature:
        raise VerificationError("cos-4", "not signed by the one-time key of the join", code="signature") from None
    former = (*statement.former, statement.roster)
    _require(len(set(former)) == len(former), "cos-5", "names a former roster twice", code="roster")
    return statement


def verify_refusal(signed: bytes, roster: Roster, agreement: Agreement) -> Refusal:
    """A party's refusal of a roster: ref-1 this roster, ref-2 an included party, ref-3 signed by the member."""
    refusal = _unverified(Refusal, signed)
    _require(refusal.roster == roster.digest, "ref-1", "refuses another roster", code="roster")
    _require(roster.entry(refusal.party) is not None, "ref-2", "the party is not in the roster", code="not-a-member")
    _signed_by_member(signed, agreement, refusal.party, "ref-3")
    return refusal


def needs_countersignatures(agreement: Agreement) -> bool:
    """Whether a computation waits for every included party."""
    return agreement.session.consent is Consent.ROSTER


# Records


@dataclass(frozen=True, slots=True)
class VerifiedRecord:
    """A record and the document that attests it, at the document's own time."""

    record: Record
    document: VerifiedStatement
    # Not a field: `dataclasses.replace` must not carry it over to a changed copy.
    token: InitVar[object]

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("a VerifiedRecord comes from verify_record and from nowhere else")


def verify_record(signed: bytes, document: bytes, agreement: Agreement, *, now_ms: int) -> VerifiedRecord:
    """A record: rec-1 of this agreement, rec-2 its document is good at its own time and carries this record, rec-3
    signed by the key in the document, rec-4 its outputs and recipients are the agreement's, rec-5 within max_releases."""
    payload = cose.payload_unverified(signed)
    record = Record.from_bytes(payload)
    body = record.body
    _require(body.agreement == agreement.digest, "rec-1", "the record is of another agreement", code="agreement")
    signing_key = document_public_key(document)
    verified = verify_statement(
        document,
        policy=Policy.of(agreement),
        user_data=record_user_data(payload),
        public_key=signing_key,
        nonce_present=False,
        now_ms=now_ms,
    )
    _signed_by(signed, signing_key, "rec-3")
    outputs = [(output.output, output.recipients) for output in body.outputs]
    wanted = [(name, output.recipients) for name, output in agreement.outputs.items()]
    _require(outputs == wanted, "rec-4", "other outputs or recipients than agreed", code="agreement")
    _require(body.charged <= agreement.session.max_releases, "rec-5", "more releases than agreed", code="exhausted")
    return VerifiedRecord(record, verified, _TOKEN)


def document_public_key(document: bytes) -> bytes:
    """The public key that a record's document names. Not verified: `verify_statement` compares and checks it after."""
    from parley_protocol.attestation.document import parse_unverified

    key = parse_unverified(document).public_key
    if key is None or len(key) != 32:
        raise VerificationError("rec-2", "the document names no session key", code="malformed")
    return key


def verify_record_of_roster(record: Record, offer: Offer, roster: Roster) -> None:
    """That a record is what a roster allowed: rec-6 same session, offer and roster, rec-7 its inputs, absentees, head."""
    same = record.session == offer.session and record.offer == offer.digest and record.roster == roster.digest
    _require(same, "rec-6", "the record is of another session or roster", code="roster")
    body = record.body
    _require(
        body.inputs == tuple(entry.input for entry in roster.included)
        and body.absentees == roster.absentees
        and body.previous == offer.head,
        "rec-7",
        "the record used other inputs than the roster lists",
        code="roster",
    )


# Callers


def verify_caller(signed: bytes, server: bytes, *, now_ms: int) -> Caller:
    """Who calls: cal-1 signed by the key it names, cal-2 for this server, cal-3 not expired, nor valid for too long."""
    caller = _unverified(Caller, signed)
    _signed_by(signed, caller.member_key, "cal-1")
    _require(caller.server == server, "cal-2", "made for another server", code="signature")
    left = caller.expires_at - now_ms
    _require(
        0 < left <= limits.CALLER_AGE_MS + limits.CLOCK_SKEW_MS,
        "cal-3",
        "expired, or valid for too long: the caller's clock or the coordinator's is off",
        code="expired",
    )
    return caller
