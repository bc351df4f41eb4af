"""The bundle: one file with all that is needed to verify a release offline (SPEC, "Bundle").

What makes a forgery with an old leaf key useless is the chain that it walks: members' keys, agreement, roster with all
countersignatures, offer, record. A document alone shows only that AWS certified a key around a time (T10).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from parley_protocol import limits
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.chain import verify_lineage
from parley_protocol.claims import (
    PastOffer,
    VerifiedRecord,
    needs_countersignatures,
    verify_countersignature,
    verify_past_offer,
    verify_record,
    verify_record_of_roster,
    verify_roster,
)
from parley_protocol.errors import VerificationError
from parley_protocol.output import OutputTable
from parley_protocol.shapes import Bytes, Row, Seq, Shape, Statement, Text
from parley_protocol.transcript import Roster, output_commitment

_STATEMENT = Bytes(1, limits.STATEMENT_BYTES)


@dataclass(frozen=True, slots=True)
class MemberSignature:
    """A member's signature of an agreement."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (Text(), _STATEMENT)
    member: str
    cose: bytes


@dataclass(frozen=True, slots=True)
class BundledAgreement:
    """One version of the agreement with its signatures, in the members' order."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (Bytes(1, limits.AGREEMENT_BYTES), Seq(Row(MemberSignature)))
    canonical: bytes
    signatures: tuple[MemberSignature, ...]

    @classmethod
    def of(cls, signed: SignedAgreement) -> BundledAgreement:
        """The form in which a signed agreement stands in a bundle."""
        return cls(signed.canonical, tuple(MemberSignature(*item) for item in sorted(signed.signatures.items())))

    @property
    def signed(self) -> SignedAgreement:
        """The signed agreement; nothing in it is verified yet."""
        return SignedAgreement(self.canonical, {item.member: item.cose for item in self.signatures})


@dataclass(frozen=True, slots=True)
class BundledOutput:
    """One output as sealed to one recipient."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (Text(), Text(), Bytes(1, limits.SEALED_OUTPUT_BYTES))
    output: str
    recipient: str
    sealed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class OpenedOutput:
    """An output with its salt, for readers who hold no recipient's key."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (Text(), Bytes(32), Bytes(1, limits.OUTPUT_BYTES))
    output: str
    salt: bytes = field(repr=False)
    plaintext: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bundle(Statement):
    """All statements of one release. `lineage`: the versions of the agreement, oldest first."""

    LABEL: ClassVar[str] = "parley/1/bundle"
    SHAPES: ClassVar[tuple[Shape, ...]] = (
        Seq(Row(BundledAgreement), 1, limits.VERSIONS),
        _STATEMENT,
        _STATEMENT,
        _STATEMENT,
        Seq(_STATEMENT),
        _STATEMENT,
        _STATEMENT,
        Seq(Row(BundledOutput), 1, limits.OUTPUTS * limits.MEMBERS),
        Seq(Row(OpenedOutput), 0, limits.OUTPUTS),
    )
    LIMIT: ClassVar[int] = limits.BUNDLE_BYTES
    lineage: tuple[BundledAgreement, ...]
    offer: bytes
    offer_document: bytes
    roster: bytes
    countersignatures: tuple[bytes, ...]
    record: bytes
    record_document: bytes
    sealed: tuple[BundledOutput, ...] = field(repr=False)
    opened: tuple[OpenedOutput, ...] = field(repr=False)

    def sealed_to(self, recipient: str) -> tuple[BundledOutput, ...]:
        """The outputs that one member can open."""
        return tuple(item for item in self.sealed if item.recipient == recipient)


@dataclass(frozen=True, slots=True)
class VerifiedBundle:
    """What a bundle proves. `tables`: the outputs that stand open in it, each checked against its commitment."""

    bundle: Bundle
    lineage: tuple[Agreement, ...]
    offer: PastOffer
    roster: Roster
    countersigned: tuple[str, ...]
    record: VerifiedRecord
    tables: dict[str, OutputTable] = field(repr=False)

    @property
    def agreement(self) -> Agreement:
        """The version under which the release was made."""
        return self.lineage[-1]

    @property
    def simulated(self) -> bool:
        """Whether a local root signed the documents: then no hardware protected anything."""
        return self.record.document.simulated


def verify_bundle(data: bytes, *, now_ms: int) -> VerifiedBundle:
    """Verifies a whole bundle offline, each document at its own time.

    bun-1 the bytes are a bundle, bun-2 its agreements (lin-*), bun-3 offer (off-*), bun-4 roster (ros-*), bun-5 a
    countersignature of each included party (cos-*) unless consent is standing, bun-6 record (rec-*), made by the offered
    key, bun-7 for this roster, bun-8 each output sealed once to each recipient and to no other, bun-9 what stands open
    fits its commitment.
    """
    bundle = Bundle.from_bytes(data)  # bun-1
    lineage = verify_lineage([item.signed for item in bundle.lineage])  # bun-2
    agreement = lineage[-1]
    past = verify_past_offer(agreement, bundle.offer, bundle.offer_document, now_ms=now_ms)  # bun-3
    roster = verify_roster(bundle.roster, past.offer, agreement)  # bun-4
    countersigned = tuple(
        verify_countersignature(signed, roster, agreement).party for signed in bundle.countersignatures
    )
    included = tuple(entry.party for entry in roster.included)
    if len(set(countersigned)) != len(countersigned) or (
        needs_countersignatures(agreement) and set(countersigned) != set(included)
    ):
        raise VerificationError("bun-5", "not one countersignature of each included party", code="roster")
    verified = verify_record(bundle.record, bundle.record_document, agreement, now_ms=now_ms)
    if verified.document.public_key != past.offer.signing_key:
        raise VerificationError("bun-6", "the record is signed by another session", code="signature")
    if verified.document.module_id != past.document.module_id or verified.document.timestamp_ms < past.offer.made_at:
        raise VerificationError(
            "bun-6", "the record comes from another enclave, or from before its offer", code="signature"
        )
    verify_record_of_roster(verified.record, past.offer, roster)  # bun-7
    _check_recipients(bundle, agreement)
    tables = {item.output: open_output(verified, item.output, item.salt, item.plaintext) for item in bundle.opened}
    if len(tables) != len(bundle.opened):
        raise VerificationError("bun-9", "an output stands open twice", code="malformed")
    return VerifiedBundle(bundle, lineage, past, roster, countersigned, verified, tables)


def _check_recipients(bundle: Bundle, agreement: Agreement) -> None:
    wanted = [(name, recipient) for name, output in agreement.outputs.items() for recipient in output.recipients]
    if sorted((item.output, item.recipient) for item in bundle.sealed) != sorted(wanted):
        raise VerificationError("bun-8", "the outputs are not sealed to exactly their recipients", code="agreement")


def open_output(verified: VerifiedRecord, name: str, salt: bytes, plaintext: bytes) -> OutputTable:
    """The output in `plaintext`, once it fits the record: bun-9 commitment, bun-10 it is this output of this agreement."""
    body = verified.record.body
    committed = next((output for output in body.outputs if output.output == name), None)
    if committed is None or output_commitment(salt, plaintext) != committed.commitment:
        raise VerificationError("bun-9", "the output does not fit the commitment in the record", code="signature")
    table = OutputTable.from_bytes(plaintext)
    if table.name != name or table.agreement != body.agreement:
        raise VerificationError("bun-10", "the output is of another agreement or name", code="agreement")
    return table
