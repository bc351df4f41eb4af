"""Claims: each numbered step refuses what it must, and nothing stands for a verified offer but a verified offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parley_protocol import claims, cose
from parley_protocol.claims import PastOffer, VerifiedOffer, VerifiedRecord
from parley_protocol.errors import MalformedError, VerificationError
from parley_protocol.identity import PrivateIdentity
from parley_protocol.shapes import Statement
from parley_protocol.transcript import (
    AgreementSignature,
    Caller,
    Included,
    Offer,
    Record,
    RecordBody,
    Refusal,
    Roster,
    Start,
    Upload,
    record_user_data,
)
from support.world import NONCE, NOW, Paper, World, world

OTHER = b"\7" * 48


@pytest.fixture(scope="module")
def w() -> World:
    return world()


def refused(step: str, claim: Callable[[], object]) -> VerificationError:
    """The error with which a claim is refused at `step`."""
    with pytest.raises(VerificationError) as caught:
        claim()
    assert caught.value.step == step, caught.value
    return caught.value


def offered(w: World, offer: Offer | None = None, **changes: Any) -> VerifiedOffer:
    arguments = {"nonce": NONCE, "head": w.paper.offer.head, "now_ms": NOW + 2000, **changes}
    document = arguments.pop("document", None) or w.paper.attest()
    return claims.verify_offer(w.agreement, (offer or w.paper.offer).to_bytes(), document, **arguments)


def test_agr_1_a_signature_of_another_agreement(w: World) -> None:
    signed = w.by("ada", AgreementSignature(OTHER, "ada", bytes(48)))
    refused("agr-1", lambda: claims.verify_agreement_signature(signed, w.agreement, "ada"))


def test_agr_2_a_signature_for_another_member(w: World) -> None:
    signed = w.by("ada", AgreementSignature(w.agreement.digest, "ada", bytes(48)))
    assert claims.verify_agreement_signature(signed, w.agreement, "ada").member == "ada"
    refused("agr-2", lambda: claims.verify_agreement_signature(signed, w.agreement, "bea"))


def test_agr_3_a_signature_by_another_key(w: World) -> None:
    signed = w.by("bea", AgreementSignature(w.agreement.digest, "ada", bytes(48)))
    refused("agr-3", lambda: claims.verify_agreement_signature(signed, w.agreement, "ada"))
    signed = w.by("ada", AgreementSignature(w.agreement.digest, "eve", bytes(48)))
    refused("agr-3", lambda: claims.verify_agreement_signature(signed, w.agreement, "eve"))


def test_off_1_bytes_that_are_no_offer(w: World) -> None:
    with pytest.raises(MalformedError):
        claims.verify_offer(w.agreement, b"", w.paper.attest(), nonce=NONCE, head=bytes(48), now_ms=NOW)


def test_off_2_an_offer_of_another_agreement(w: World) -> None:
    refused("off-2", lambda: offered(w, replace(w.paper.offer, agreement=OTHER)))


def test_off_3_an_expired_agreement(w: World) -> None:
    error = refused("off-3", lambda: offered(w, now_ms=w.agreement.expires_ms))
    assert error.code == "expired"


def test_off_4_the_document_carries_this_offer_and_this_nonce(w: World) -> None:
    verified = offered(w)
    assert verified.enclave.simulated and verified.offer == w.paper.offer
    for claim in (
        lambda: offered(w, replace(w.paper.offer, made_at=NOW - 1)),
        lambda: offered(w, replace(w.paper.offer, sealing_key=bytes(1216))),
        lambda: offered(w, nonce=b"m" * 32),
        lambda: offered(w, now_ms=NOW + 600_000),
        lambda: offered(w, document=w.paper.attest()[:-1] + b"\0"),
    ):
        with pytest.raises((VerificationError, MalformedError)) as caught:
            claim()
        assert not isinstance(caught.value, VerificationError) or caught.value.step.startswith("att-")


def test_off_5_an_offer_younger_than_its_document(w: World) -> None:
    paper = Paper(w.agreement, w.root, now_ms=NOW)
    paper.offer = replace(paper.offer, made_at=NOW + 1)
    for claim in (
        lambda: offered(w, paper.offer, document=paper.attest()),
        lambda: claims.verify_past_offer(w.agreement, paper.offer.to_bytes(), paper.attest(), now_ms=NOW + 9),
    ):
        refused("off-5", claim)


def test_off_6_another_head_than_the_clients(w: World) -> None:
    assert refused("off-6", lambda: offered(w, head=OTHER)).code == "head"


def test_a_past_offer_cannot_stand_for_a_live_one(w: World) -> None:
    past = claims.verify_past_offer(w.agreement, w.paper.offer.to_bytes(), w.paper.attest(), now_ms=NOW + 10**10)
    assert not isinstance(past, VerifiedOffer)
    for kind, fields in (
        (VerifiedOffer, (w.agreement, w.paper.offer, w.paper.offer.digest, past.document)),
        (PastOffer, (w.agreement, w.paper.offer, w.paper.offer.digest, past.document)),
        (VerifiedRecord, (w.record, past.document)),
    ):
        with pytest.raises(TypeError):
            kind(*fields, object())  # type: ignore[operator]


def upload(w: World, **changes: Any) -> bytes:
    made = Upload(replace(w.uploads["ada"].header, **changes).to_bytes(), bytes(48))
    return w.by("ada", made)


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ("upl-1", {"agreement": OTHER}),
        ("upl-2", {"table": "planes"}),
        ("upl-2", {"party": "cyd"}),
        ("upl-3", {"schema": OTHER}),
        ("upl-4", {"groups": 9, "group_rows": 16384}),
        ("upl-4", {"groups": 2}),
        ("upl-5", {"party": "bea"}),
    ],
)
def test_upl_1_to_upl_5(w: World, step: str, changes: dict[str, Any]) -> None:
    assert claims.verify_upload(upload(w), w.agreement).header.party == "ada"
    refused(step, lambda: claims.verify_upload(upload(w, **changes), w.agreement))


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ("join-1", {"offer": OTHER}),
        ("join-2", {"party": "cyd"}),
        ("join-2", {"party": "eve"}),
        ("join-3", {"uploads": (OTHER, bytes(48))}),
        ("join-4", {"party": "bea"}),
    ],
)
def test_join_1_to_join_4(w: World, step: str, changes: dict[str, Any]) -> None:
    assert claims.verify_join(w.by("ada", w.joins["ada"]), w.paper.offer, w.agreement) == w.joins["ada"]
    signed = w.by("ada", replace(w.joins["ada"], **changes))
    refused(step, lambda: claims.verify_join(signed, w.paper.offer, w.agreement))


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ("rcp-2", {"offer": OTHER}),
        ("rcp-3", {"join": OTHER}),
        ("rcp-3", {"uploads": (OTHER,)}),
        ("rcp-3", {"party": "bea"}),
    ],
)
def test_rcp_2_and_rcp_3(w: World, step: str, changes: dict[str, Any]) -> None:
    good = w.paper.sign(w.receipt("ada"))
    assert claims.verify_receipt(good, w.paper.offer, w.joins["ada"]).party == "ada"
    signed = w.paper.sign(replace(w.receipt("ada"), **changes))
    refused(step, lambda: claims.verify_receipt(signed, w.paper.offer, w.joins["ada"]))


def test_rcp_1_a_receipt_by_another_key(w: World) -> None:
    signed = cose.sign(w.receipt("ada").to_bytes(), Ed25519PrivateKey.generate())
    refused("rcp-1", lambda: claims.verify_receipt(signed, w.paper.offer, w.joins["ada"]))


def test_sta_1_to_sta_3_who_may_start(w: World) -> None:
    good = Start(w.paper.offer.digest, "ada")
    assert claims.verify_start(w.by("ada", good), w.paper.offer, w.agreement) == good
    refused("sta-1", lambda: claims.verify_start(w.by("ada", replace(good, offer=OTHER)), w.paper.offer, w.agreement))
    refused("sta-2", lambda: claims.verify_start(w.by("bea", replace(good, member="bea")), w.paper.offer, w.agreement))
    refused("sta-3", lambda: claims.verify_start(w.by("bea", good), w.paper.offer, w.agreement))


def verify_roster(w: World, roster: Roster, *, fix: bool = True) -> Roster:
    if fix:
        roster = replace(roster, inputs_digest=roster.inputs(w.agreement.digest, w.paper.offer.head).digest)
    return claims.verify_roster(w.paper.sign(roster), w.paper.offer, w.agreement)


def test_ros_1_a_roster_by_another_key(w: World) -> None:
    signed = cose.sign(w.roster.to_bytes(), Ed25519PrivateKey.generate())
    refused("ros-1", lambda: claims.verify_roster(signed, w.paper.offer, w.agreement))


def test_ros_2_a_roster_of_another_session(w: World) -> None:
    refused("ros-2", lambda: verify_roster(w, replace(w.roster, offer=OTHER)))


def test_ros_3_every_party_once_and_in_order(w: World) -> None:
    ada, bea = w.roster.included
    stranger = Included("eve", ada.uploads, ada.share_digest, ada.join, ada.roster_key)
    for included in ((bea, ada), (ada,), (ada, ada), (ada, bea, stranger), (ada, stranger)):
        refused("ros-3", lambda included=included: verify_roster(w, replace(w.roster, included=included)))  # type: ignore[misc]


def test_ros_4_fewer_parties_than_the_quorum(w: World) -> None:
    from parley_protocol.transcript import Absentee

    short = replace(w.roster, included=w.roster.included[:1], absentees=(Absentee("bea", "deadline"),))
    refused("ros-4", lambda: verify_roster(w, short))


def test_ros_5_a_wrong_digest_of_the_inputs(w: World) -> None:
    assert verify_roster(w, w.roster, fix=False) == w.roster
    refused("ros-5", lambda: verify_roster(w, replace(w.roster, inputs_digest=OTHER), fix=False))


def test_cos_1_to_cos_5_consent_to_a_roster(w: World) -> None:
    good = w.consent("ada")

    def check(by: str, statement: Statement) -> object:
        return claims.verify_countersignature(w.by(by, statement), w.roster, w.agreement)

    assert check("ada", good) == good
    refused("cos-1", lambda: check("ada", replace(good, roster=OTHER)))
    refused("cos-2", lambda: check("cyd", replace(good, party="cyd")))
    refused("cos-3", lambda: check("bea", good))
    refused("cos-4", lambda: check("ada", replace(good, one_time_signature=bytes(64))))
    refused("cos-4", lambda: check("ada", replace(good, former=(OTHER,))))
    refused("cos-5", lambda: check("ada", w.consent("ada", former=(OTHER, OTHER))))
    refused("cos-5", lambda: check("ada", w.consent("ada", former=(w.roster.digest,))))


def test_ref_1_to_ref_3_refusal_of_a_roster(w: World) -> None:
    good = Refusal(w.roster.digest, "ada")
    assert claims.verify_refusal(w.by("ada", good), w.roster, w.agreement) == good
    refused("ref-1", lambda: claims.verify_refusal(w.by("ada", replace(good, roster=OTHER)), w.roster, w.agreement))
    refused("ref-2", lambda: claims.verify_refusal(w.by("cyd", replace(good, party="cyd")), w.roster, w.agreement))
    refused("ref-3", lambda: claims.verify_refusal(w.by("bea", good), w.roster, w.agreement))


def record(w: World, by: Ed25519PrivateKey | None = None, **changes: Any) -> tuple[bytes, bytes]:
    body: RecordBody = replace(w.record.body, **changes)
    made = replace(w.record, body_bytes=body.to_bytes())
    document = w.paper.document(record_user_data(made.to_bytes()), None)
    return cose.sign(made.to_bytes(), by or w.paper.key), document


def test_rec_1_to_rec_5_a_record_and_its_document(w: World) -> None:
    def check(signed: bytes, document: bytes) -> VerifiedRecord:
        return claims.verify_record(signed, document, w.agreement, now_ms=NOW + 10**10)

    good, document = record(w)
    assert check(good, document).record.body.sequence == 1
    refused("rec-1", lambda: check(*record(w, agreement=OTHER)))
    refused("rec-3", lambda: check(*record(w, by=Ed25519PrivateKey.generate())))
    output = w.record.body.outputs[0]
    refused("rec-4", lambda: check(*record(w, outputs=(replace(output, recipients=("ada",)),))))
    refused("rec-4", lambda: check(*record(w, outputs=(replace(output, output="other"),))))
    refused("rec-5", lambda: check(*record(w, charged=5)))
    other = record(w, sequence=2)[1]
    with pytest.raises(VerificationError, match="att-"):
        check(good, other)


def test_rec_2_a_document_without_a_session_key(w: World) -> None:
    document = w.paper.document(record_user_data(w.record.to_bytes()), None, public_key=b"short")
    refused("rec-2", lambda: claims.verify_record(w.paper.sign(w.record), document, w.agreement, now_ms=NOW + 9))


def test_rec_6_and_rec_7_a_record_of_its_roster(w: World) -> None:
    claims.verify_record_of_roster(w.record, w.paper.offer, w.roster)
    for changes in ({"session": bytes(16)}, {"offer": OTHER}, {"roster": OTHER}):
        bad: Record = replace(w.record, **changes)  # type: ignore[arg-type]
        refused("rec-6", lambda bad=bad: claims.verify_record_of_roster(bad, w.paper.offer, w.roster))  # type: ignore[misc]
    for body in ({"inputs": w.record.body.inputs[:1]}, {"previous": OTHER}):
        bad = replace(w.record, body_bytes=replace(w.record.body, **body).to_bytes())  # type: ignore[arg-type]
        refused("rec-7", lambda bad=bad: claims.verify_record_of_roster(bad, w.paper.offer, w.roster))  # type: ignore[misc]


def test_cal_1_to_cal_3_who_calls(w: World) -> None:
    identity: PrivateIdentity = w.members["ada"]
    good = Caller(identity.public.signing, OTHER, NOW + 60_000)
    assert claims.verify_caller(w.by("ada", good), OTHER, now_ms=NOW) == good
    refused("cal-1", lambda: claims.verify_caller(w.by("bea", good), OTHER, now_ms=NOW))
    refused("cal-2", lambda: claims.verify_caller(w.by("ada", good), bytes(48), now_ms=NOW))
    refused("cal-3", lambda: claims.verify_caller(w.by("ada", good), OTHER, now_ms=NOW + 60_000))
    refused(
        "cal-3", lambda: claims.verify_caller(w.by("ada", replace(good, expires_at=NOW + 10**6)), OTHER, now_ms=NOW)
    )
