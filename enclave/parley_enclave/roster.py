"""The roster: who is in, who signed, and what a party's former rosters cost.

A roster is the only way to a computation. A party that has signed other rosters under the same head says so; each that
would give another result is charged as a release, since its holder may have been given that result (REVIEW F3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from parley_protocol import claims
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import RefusedError, VerificationError
from parley_protocol.transcript import Absentee, AnyJoin, Countersignature, Included, Offer, Roster

ABSENT = "deadline"
"""Why a party is absent: it had not joined when the deadline had passed."""


@dataclass(frozen=True, slots=True)
class Former:
    """A roster that a party signed before: the offer of its session, that offer's document, the signed roster."""

    offer: bytes
    document: bytes
    cose: bytes


def make(agreement: Agreement, offer: Offer, joins: Mapping[str, AnyJoin], *, now_ms: int) -> Roster:
    """The roster of the joins at hand, in the agreement's order.

    RefusedError "quorum": before the deadline all parties must have joined, after it at least the quorum (ros-4, F8).
    """
    present = [party for party in agreement.parties if party in joins]
    absent = [party for party in agreement.parties if party not in joins]
    if absent and now_ms < offer.made_at + agreement.session.deadline_ms:
        raise RefusedError("quorum")
    if len(present) < agreement.quorum:
        raise RefusedError("quorum")
    included = tuple(
        Included(party, joins[party].uploads, joins[party].share_digest, joins[party].digest, joins[party].roster_key)
        for party in present
    )
    absentees = tuple(Absentee(party, ABSENT) for party in absent)
    expires_at = now_ms + agreement.session.countersign_within_ms
    roster = Roster(offer.digest, bytes(48), included, absentees, expires_at)
    inputs_digest = roster.inputs(agreement.digest, offer.head).digest
    return Roster(offer.digest, inputs_digest, included, absentees, expires_at)


def former_inputs(
    statement: Countersignature,
    former: Sequence[Former],
    lineage: Sequence[Agreement],
    head: bytes,
    *,
    now_ms: int,
) -> frozenset[bytes]:
    """The inputs digests of the rosters that a countersignature names, each proven by its own session's attested key.

    VerificationError: cos-6 they are the named ones in that order, of the lineage, of this head, and list the party.
    """
    if len(former) != len(statement.former):
        raise VerificationError("cos-6", "not the rosters that the statement names", code="roster")
    digests = set()
    for named, proof in zip(statement.former, former, strict=True):
        offered = Offer.from_bytes(proof.offer)
        agreement = next((version for version in lineage if version.digest == offered.agreement), None)
        if agreement is None:
            raise VerificationError("cos-6", "a former roster of another series", code="agreement")
        past = claims.verify_past_offer(agreement, proof.offer, proof.document, now_ms=now_ms)
        roster = claims.verify_roster(proof.cose, past.offer, agreement)
        if past.offer.head != head:
            raise VerificationError("cos-6", "a former roster of another head", code="head")
        if roster.digest != named or roster.entry(statement.party) is None:
            raise VerificationError("cos-6", "not the roster that the statement names", code="roster")
        digests.add(roster.inputs_digest)
    return frozenset(digests)


@dataclass(slots=True)
class Standing:
    """An issued roster and the consents to it so far. `former`: what the parties say they signed before, by digest."""

    roster: Roster
    cose: bytes
    consents: dict[str, bytes] = field(default_factory=dict)
    former: set[bytes] = field(default_factory=set)

    @property
    def missing(self) -> list[str]:
        """The included parties that have not countersigned, in the agreement's order."""
        return [entry.party for entry in self.roster.included if entry.party not in self.consents]

    @property
    def charge(self) -> int:
        """Releases that this roster costs: itself, and each distinct former one that would give another result."""
        return 1 + len(self.former - {self.roster.inputs_digest})

    def consent(self, statement: Countersignature, former: frozenset[bytes]) -> None:
        """Adds a party's consent; the same one again changes nothing, another one is RefusedError "conflict"."""
        known = self.consents.setdefault(statement.party, statement.digest)
        if known != statement.digest:
            raise RefusedError("conflict")
        self.former |= former
