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
    cases: tuple[tuple[Any, tuple[Any, ...]], ...] = (
        (VerifiedOffer, (w.agreement, w.paper.offer, w.paper.offer.digest, past.document)),
        (PastOffer, (w.agreement, w.paper.offer, w.paper.offer.digest, past.document)),
        (VerifiedRecord, (w.record, past.document)),
    )
    for kind, fields in cases:
        with pytest.raises(TypeError):
            kind(*fields, object())


def upload(w: World, **changes: Any) -> bytes:
    made = Upload(replace(w.uploads["ada"].header, **changes).to_bytes(), bytes(48))
    return w.by("ada", made)


def refused_upload(w: World, step: str, **changes: Any) -> None:
    assert claims.verify_upload(upload(w), w.agreement).header.party == "ada"
    refused(step, lambda: claims.verify_upload(upload(w, **changes), w.agreement))


def test_upl_1_an_upload_for_another_agreement(w: World) -> None:
    refused_upload(w, "upl-1", agreement=OTHER)


def test_upl_2_a_table_that_the_party_does_not_bring(w: World) -> None:
    refused_upload(w, "upl-2", table="planes")
    refused_upload(w, "upl-2", party="cyd")


def test_upl_3_another_schema(w: World) -> None:
    refused_upload(w, "upl-3", schema=OTHER)


def test_upl_4_no_size_that_a_table_may_have(w: World) -> None:
    refused_upload(w, "upl-4", groups=9, group_rows=16384)
    refused_upload(w, "upl-4", groups=2)


def test_upl_5_an_upload_by_another_key(w: World) -> None:
    refused_upload(w, "upl-5", party="bea")


def refused_join(w: World, step: str, **changes: Any) -> None:
    assert claims.verify_join(w.by("ada", w.joins["ada"]), w.paper.offer, w.agreement) == w.joins["ada"]
    signed = w.by("ada", replace(w.joins["ada"], **changes))
    refused(step, lambda: claims.verify_join(signed, w.paper.offer, w.agreement))


def test_join_1_a_join_of_another_session(w: World) -> None:
    refused_join(w, "join-1", offer=OTHER)


def test_join_2_a_join_by_nobody_who_brings_a_table(w: World) -> None:
    refused_join(w, "join-2", party="cyd")
    refused_join(w, "join-2", party="eve")


def test_join_3_not_one_upload_for_each_table(w: World) -> None:
    refused_join(w, "join-3", uploads=(OTHER, bytes(48)))


def test_join_4_a_join_by_another_key(w: World) -> None:
    refused_join(w, "join-4", party="bea")


def refused_receipt(w: World, step: str, **changes: Any) -> None:
    good = w.paper.sign(w.receipt("ada"))
    assert claims.verify_receipt(good, w.paper.offer, w.joins["ada"]).party == "ada"
    signed = w.paper.sign(replace(w.receipt("ada"), **changes))
    refused(step, lambda: claims.verify_receipt(signed, w.paper.offer, w.joins["ada"]))


def test_rcp_2_a_receipt_of_another_session(w: World) -> None:
    refused_receipt(w, "rcp-2", offer=OTHER)


def test_rcp_3_a_receipt_of_another_join(w: World) -> None:
    for changes in ({"join": OTHER}, {"uploads": (OTHER,)}, {"party": "bea"}):
        refused_receipt(w, "rcp-3", **changes)


def test_rcp_1_a_receipt_by_another_key(w: World) -> None:
    signed = cose.sign(w.receipt("ada").to_bytes(), Ed25519PrivateKey.generate())
    refused("rcp-1", lambda: claims.verify_receipt(signed, w.paper.offer, w.joins["ada"]))


def refused_start(w: World, step: str, by: str, **changes: Any) -> None:
    good = Start(w.paper.offer.digest, "ada")
    assert claims.verify_start(w.by("ada", good), w.paper.offer, w.agreement) == good
    signed = w.by(by, replace(good, **changes))
    refused(step, lambda: claims.verify_start(signed, w.paper.offer, w.agreement))


def test_sta_1_a_start_of_another_session(w: World) -> None:
    refused_start(w, "sta-1", "ada", offer=OTHER)


def test_sta_2_a_start_by_a_member_who_may_not(w: World) -> None:
    refused_start(w, "sta-2", "bea", member="bea")


def test_sta_3_a_start_by_another_key(w: World) -> None:
    refused_start(w, "sta-3", "bea")


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


def refused_consent(w: World, step: str, by: str, statement: Statement) -> None:
    good = w.consent("ada")
    assert claims.verify_countersignature(w.by("ada", good), w.roster, w.agreement) == good
    refused(step, lambda: claims.verify_countersignature(w.by(by, statement), w.roster, w.agreement))


def test_cos_1_consent_to_another_roster(w: World) -> None:
    refused_consent(w, "cos-1", "ada", replace(w.consent("ada"), roster=OTHER))


def test_cos_2_consent_of_a_member_that_is_not_in_the_roster(w: World) -> None:
    refused_consent(w, "cos-2", "cyd", replace(w.consent("ada"), party="cyd"))


def test_cos_3_consent_by_another_key(w: World) -> None:
    refused_consent(w, "cos-3", "bea", w.consent("ada"))


def test_cos_4_consent_without_the_one_time_key(w: World) -> None:
    refused_consent(w, "cos-4", "ada", replace(w.consent("ada"), one_time_signature=bytes(64)))
    refused_consent(w, "cos-4", "ada", replace(w.consent("ada"), former=(OTHER,)))


def test_cos_5_a_former_roster_twice_or_this_one(w: World) -> None:
    refused_consent(w, "cos-5", "ada", w.consent("ada", former=(OTHER, OTHER)))
    refused_consent(w, "cos-5", "ada", w.consent("ada", former=(w.roster.digest,)))


def refused_refusal(w: World, step: str, by: str, **changes: Any) -> None:
    good = Refusal(w.roster.digest, "ada")
    assert claims.verify_refusal(w.by("ada", good), w.roster, w.agreement) == good
    signed = w.by(by, replace(good, **changes))
    refused(step, lambda: claims.verify_refusal(signed, w.roster, w.agreement))


def test_ref_1_a_refusal_of_another_roster(w: World) -> None:
    refused_refusal(w, "ref-1", "ada", roster=OTHER)


def test_ref_2_a_refusal_by_a_member_that_is_not_in_the_roster(w: World) -> None:
    refused_refusal(w, "ref-2", "cyd", party="cyd")


def test_ref_3_a_refusal_by_another_key(w: World) -> None:
    refused_refusal(w, "ref-3", "bea")


def record(w: World, by: Ed25519PrivateKey | None = None, **changes: Any) -> tuple[bytes, bytes]:
    body: RecordBody = replace(w.record.body, **changes)
    made = replace(w.record, body_bytes=body.to_bytes())
    document = w.paper.document(record_user_data(made.to_bytes()), None)
    return cose.sign(made.to_bytes(), by or w.paper.key), document


def verify_record(w: World, signed: bytes, document: bytes) -> VerifiedRecord:
    return claims.verify_record(signed, document, w.agreement, now_ms=NOW + 10**10)


def refused_record(w: World, step: str, by: Ed25519PrivateKey | None = None, **changes: Any) -> None:
    assert verify_record(w, *record(w)).record.body.sequence == 1
    refused(step, lambda: verify_record(w, *record(w, by, **changes)))


def test_rec_1_a_record_of_another_agreement(w: World) -> None:
    refused_record(w, "rec-1", agreement=OTHER)


def test_rec_2_a_document_of_another_record(w: World) -> None:
    with pytest.raises(VerificationError, match="att-"):
        verify_record(w, record(w)[0], record(w, sequence=2)[1])


def test_rec_3_a_record_by_another_key(w: World) -> None:
    refused_record(w, "rec-3", Ed25519PrivateKey.generate())


def test_rec_4_other_outputs_or_recipients(w: World) -> None:
    output = w.record.body.outputs[0]
    refused_record(w, "rec-4", outputs=(replace(output, recipients=("ada",)),))
    refused_record(w, "rec-4", outputs=(replace(output, output="other"),))


def test_rec_5_more_releases_than_agreed(w: World) -> None:
    refused_record(w, "rec-5", charged=5)


def test_rec_2_a_document_without_a_session_key(w: World) -> None:
    document = w.paper.document(record_user_data(w.record.to_bytes()), None, public_key=b"short")
    refused("rec-2", lambda: claims.verify_record(w.paper.sign(w.record), document, w.agreement, now_ms=NOW + 9))


def test_rec_6_a_record_of_another_session_or_roster(w: World) -> None:
    claims.verify_record_of_roster(w.record, w.paper.offer, w.roster)
    for changes in ({"session": bytes(16)}, {"offer": OTHER}, {"roster": OTHER}):
        bad: Record = replace(w.record, **changes)  # type: ignore[arg-type]
        refused("rec-6", lambda bad=bad: claims.verify_record_of_roster(bad, w.paper.offer, w.roster))  # type: ignore[misc]


def test_rec_7_a_record_of_other_inputs_or_another_head(w: World) -> None:
    for changes in ({"inputs": w.record.body.inputs[:1]}, {"previous": OTHER}):
        bad = replace(w.record, body_bytes=replace(w.record.body, **changes).to_bytes())  # type: ignore[arg-type]
        refused("rec-7", lambda bad=bad: claims.verify_record_of_roster(bad, w.paper.offer, w.roster))  # type: ignore[misc]


def refused_caller(
    w: World, step: str, by: str = "ada", server: bytes = OTHER, now_ms: int = NOW, **changes: Any
) -> None:
    good = Caller(w.members["ada"].public.signing, OTHER, NOW + 60_000)
    assert claims.verify_caller(w.by("ada", good), OTHER, now_ms=NOW) == good
    signed = w.by(by, replace(good, **changes))
    refused(step, lambda: claims.verify_caller(signed, server, now_ms=now_ms))


def test_cal_1_a_caller_with_another_key(w: World) -> None:
    refused_caller(w, "cal-1", "bea")


def test_cal_2_a_caller_of_another_server(w: World) -> None:
    refused_caller(w, "cal-2", server=bytes(48))


def test_cal_3_an_expired_statement_or_one_that_lives_too_long(w: World) -> None:
    refused_caller(w, "cal-3", now_ms=NOW + 60_000)
    refused_caller(w, "cal-3", expires_at=NOW + 10**6)
