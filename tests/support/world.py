"""A session on paper: every statement of a release made in this process, under a simulated module, without an enclave.

Tests of claims, chains and bundles change one part of it at a time. `hypothetical` enclaves sign what they are told to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parley_deploy.nsm import LocalRoot, SimulatedNsm, image_measurements
from parley_protocol import cose, hpke
from parley_protocol.agreement.model import Agreement, Measurement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.bundle import Bundle, BundledAgreement, BundledOutput, OpenedOutput
from parley_protocol.encoding import decode, encode
from parley_protocol.identity import PrivateIdentity
from parley_protocol.output import OutputColumn, OutputTable, Reason
from parley_protocol.shapes import Statement
from parley_protocol.transcript import (
    GENESIS,
    Absentee,
    AgreementSignature,
    Committed,
    Countersignature,
    Included,
    Join,
    Offer,
    Receipt,
    Record,
    RecordBody,
    Roster,
    RosterConsent,
    SealedOutput,
    Upload,
    UploadHeader,
    offer_user_data,
    output_commitment,
    output_info,
    record_user_data,
)
from support.enclave import Simulation, agreement_of, identities

NOW = 1_800_000_000_000
NONCE = b"n" * 32
SALT = b"salt" * 8


class Paper:
    """An enclave on paper: a module with an image and an agreement in PCR16, and a session's keys."""

    def __init__(
        self,
        agreement: Agreement,
        root: LocalRoot,
        *,
        pcr16: bytes | None = None,
        head: bytes = GENESIS,
        image: Measurement | None = None,
        now_ms: int = NOW,
    ) -> None:
        """`pcr16`: what the module was told in place of the agreement's digest. `image`: by default the agreement's first."""
        self.agreement = agreement
        self.clock = now_ms
        image = image or agreement.measurements[0]
        registers = {**image_measurements(None), 0: image.pcr0, 1: image.pcr1, 2: image.pcr2}
        self._nsm = SimulatedNsm(root, registers, now_ms=lambda: self.clock, random=os.urandom)
        self._request({"ExtendPCR": {"index": 16, "data": pcr16 or agreement.digest}})
        self._request({"LockPCR": {"index": 16}})
        self.key = Ed25519PrivateKey.generate()
        self.offer = Offer(
            os.urandom(16),
            agreement.digest,
            hpke.generate_sealing_key(os.urandom).public,
            self.key.public_key().public_bytes_raw(),
            head,
            now_ms,
        )

    def sign(self, statement: Statement) -> bytes:
        """The statement, signed by the session's key."""
        return cose.sign(statement.to_bytes(), self.key)

    def document(self, user_data: bytes, nonce: bytes | None, public_key: bytes | None = None) -> bytes:
        """A document of the module."""
        key = public_key or self.offer.signing_key
        answer = self._request({"Attestation": {"user_data": user_data, "nonce": nonce, "public_key": key}})
        return cast("bytes", cast("Any", answer)["Attestation"]["document"])

    def attest(self, nonce: bytes = NONCE) -> bytes:
        """The document of the offer."""
        return self.document(offer_user_data(self.offer.to_bytes()), nonce)

    def _request(self, request: Any) -> object:
        return decode(self._nsm.request(encode(request)), foreign=True)


@dataclass
class World:
    """Members, an agreement and all statements of one release by two parties, `ada` and `bea`, with analyst `cyd`."""

    members: dict[str, PrivateIdentity]
    root: LocalRoot
    agreement: Agreement
    paper: Paper
    one_time: dict[str, Ed25519PrivateKey]
    uploads: dict[str, Upload]
    joins: dict[str, Join]
    roster: Roster
    record: Record
    record_document: bytes
    plaintext: bytes
    bundle: Bundle

    def consent(self, party: str, roster: Roster | None = None, former: tuple[bytes, ...] = ()) -> Countersignature:
        """A party's countersignature, not yet signed by the member."""
        digest = (roster or self.roster).digest
        signature = self.one_time[party].sign(RosterConsent(digest, party, former).to_bytes())
        return Countersignature(digest, party, former, signature)

    def by(self, member: str, statement: Statement) -> bytes:
        """A statement signed by a member."""
        return self.members[member].sign(statement.to_bytes())

    def receipt(self, party: str) -> Receipt:
        """What the enclave answers to a join."""
        join = self.joins[party]
        return Receipt(self.paper.offer.digest, party, join.uploads, join.digest, NOW)


def signed(agreement: Agreement, members: Mapping[str, PrivateIdentity], head: bytes = GENESIS) -> SignedAgreement:
    """The agreement with all signatures."""
    statements = {name: AgreementSignature(agreement.digest, name, head) for name in agreement.members}
    return SignedAgreement(
        agreement.canonical, {name: members[name].sign(statement.to_bytes()) for name, statement in statements.items()}
    )


def table_of(agreement: Agreement) -> OutputTable:
    """An output as an enclave would give it."""
    output = agreement.outputs["by_site"]
    labels = OutputColumn("site", "label", output.by[0].labels)
    values = tuple(
        OutputColumn(
            value.name,
            value.type,
            {"count": (7, 8, None), "float": (0.5, None, 1.5)}.get(value.type, ("1.00", None, "2.00")),
        )
        for value in output.values
    )
    hidden = sum(column.hidden for column in values)
    return OutputTable(agreement.digest, "by_site", "aggregate", (labels, *values), 3, (Reason("min_units", hidden),))


def world(head: bytes = GENESIS, sequence: int = 1, charged: int = 1, **session: Any) -> World:
    """Makes it all. `session` replaces fields of the agreement's session."""
    root = LocalRoot.create(NOW)
    measured = image_measurements(None)
    image = Measurement(measured[0], measured[1], measured[2])
    members = identities(["ada", "bea", "cyd"])
    simulation = cast("Simulation", SimpleNamespace(root=root, measurement=image))
    agreement = agreement_of(simulation, members, analysts=["cyd"], **session)
    return release(agreement, root, members, head, sequence, charged)


def release(
    agreement: Agreement,
    root: LocalRoot,
    members: dict[str, PrivateIdentity],
    head: bytes = GENESIS,
    sequence: int = 1,
    charged: int = 1,
    *,
    absent: tuple[str, ...] = (),
    now_ms: int = NOW,
) -> World:
    """One release under `agreement` after `head`."""
    paper = Paper(agreement, root, head=head, now_ms=now_ms)
    parties = [party for party in agreement.parties if party not in absent]
    one_time = {party: Ed25519PrivateKey.generate() for party in agreement.parties}
    uploads: dict[str, Upload] = {}
    joins: dict[str, Join] = {}
    for party in agreement.parties:
        schema = agreement.tables["visits"].schema_digest
        header = UploadHeader(agreement.digest, party, "visits", schema, 1, 1024, bytes(16), bytes(48))
        uploads[party] = Upload(header.to_bytes(), bytes(48))
        key = one_time[party].public_key().public_bytes_raw()
        joins[party] = Join(paper.offer.digest, party, (uploads[party].digest,), b"sealed", bytes(48), key)
    included = tuple(
        Included(p, joins[p].uploads, joins[p].share_digest, joins[p].digest, joins[p].roster_key) for p in parties
    )
    absentees = tuple(Absentee(party, "deadline") for party in absent)
    roster = Roster(paper.offer.digest, bytes(48), included, absentees, now_ms + 1000)
    roster = replace(roster, inputs_digest=roster.inputs(agreement.digest, head).digest)
    plaintext = table_of(agreement).to_bytes()
    recipients = agreement.outputs["by_site"].recipients
    body = RecordBody(
        agreement.digest,
        "engine",
        tuple(entry.input for entry in included),
        absentees,
        (Committed("by_site", recipients, output_commitment(SALT, plaintext)),),
        (),
        sequence,
        charged,
        head,
    )
    record = Record(body.to_bytes(), paper.offer.session, paper.offer.digest, roster.digest)
    document = paper.document(record_user_data(record.to_bytes()), None)
    made = World(
        members,
        root,
        agreement,
        paper,
        one_time,
        uploads,
        joins,
        roster,
        record,
        document,
        plaintext,
        cast("Bundle", None),
    )
    sealed = SealedOutput.of(SALT, plaintext, 1000).to_bytes()
    made.bundle = Bundle(
        (BundledAgreement.of(signed(agreement, members)),) if agreement.version == 1 else (),
        paper.offer.to_bytes(),
        paper.attest(),
        paper.sign(roster),
        tuple(made.by(party, made.consent(party)) for party in parties),
        paper.sign(record),
        document,
        tuple(
            BundledOutput(
                "by_site",
                name,
                hpke.seal(agreement.members[name].sealing, sealed, output_info(record.head, "by_site", name)),
            )
            for name in recipients
        ),
        (OpenedOutput("by_site", SALT, plaintext),),
    )
    return made
