"""KMS joins of an enclave over real sockets and processes: a party that is not there, answers that are none of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parley_protocol import limits
from parley_protocol.agreement.model import Consent
from parley_protocol.attestation.document import parse_unverified
from parley_protocol.claims import VerifiedOffer, verify_receipt
from parley_protocol.cose import payload_unverified
from parley_protocol.transcript import KmsJoin, Record, kms_user_data
from parley_protocol.v1 import enclave_pb2 as pb
from support.enclave import Run, Simulation, agreement_of, identities, released, rows_of
from support.kms import PaperKms, answer, arn

pytestmark = pytest.mark.timeout(180)

NAMES = ("amber", "birch")
Make = Callable[..., Run]


@pytest.fixture
def simulation(tmp_path: Path) -> Iterator[Simulation]:
    with Simulation(tmp_path) as made:
        yield made


@pytest.fixture
def make(simulation: Simulation) -> Iterator[Make]:
    runs: list[Run] = []

    def run(*, with_key: tuple[str, ...] = ("amber",), **session: Any) -> Run:
        members = identities(NAMES)
        keys = {name: arn(str(number)) for number, name in enumerate(NAMES) if name in with_key}
        agreement = agreement_of(simulation, members, kms=keys, **session)
        rows = {name: {"visits": rows_of(number, 1500)} for number, name in enumerate(NAMES)}
        made = Run(simulation, agreement, members, rows)
        runs.append(made)
        made.load()
        return made

    yield run
    for made in runs:
        made.close()


@pytest.fixture
def kms() -> PaperKms:
    return PaperKms()


def finish(run: Run, offer: VerifiedOffer) -> pb.Released:
    roster, _ = run.start(offer)
    return released(run.countersign(offer, roster))


def test_kms_11_a_join_by_kms_is_admitted_and_computed_on_like_any_other(make: Make, kms: PaperKms) -> None:
    run = make()
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms)
    receipt = run.host.want("joined", kms_join=run.kms(offer, kms, join)).receipt
    statement = KmsJoin.from_bytes(payload_unverified(join.cose))
    assert verify_receipt(receipt, offer.offer, statement).party == "amber"
    run.join(offer, "birch")
    made = finish(run, offer)
    body = Record.from_bytes(payload_unverified(made.cose)).body
    assert body.inputs[0].share_digest == statement.share_digest
    assert run.open(made, "birch")["by_site"].rows == 3


def test_kms_11_the_same_join_is_answered_by_its_receipt_without_kms(make: Make, kms: PaperKms) -> None:
    run = make()
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms)
    receipt = run.host.want("joined", kms_join=run.kms(offer, kms, join)).receipt
    asked = pb.Recipient(session=offer.offer.session, cose=join.cose, uploads=join.uploads)
    assert run.host.want("joined", recipient=asked).receipt == receipt
    assert run.host.want("joined", kms_join=run.answering(offer, join, b"")).receipt == receipt
    assert run.host.state().joined == ["amber"]


def test_kms_11_one_statement_serves_every_session_and_a_repetition_gives_the_same_body(
    make: Make, kms: PaperKms, simulation: Simulation
) -> None:
    run = make(consent=Consent.STANDING)
    joins = {name: run.parties[name].kms_join(kms) for name in ("amber",)}
    bodies = []
    ordinary = None
    for _ in range(2):
        offer = run.offer()
        run.host.want("joined", kms_join=run.kms(offer, kms, joins["amber"]))
        ordinary = run.parties["birch"].joining(offer)
        run.host.want("joined", join=ordinary)
        run.start(offer)
        made = released(run.host.ask(start=run.starting(offer)))
        bodies.append(Record.from_bytes(payload_unverified(made.cose)).body_bytes)
        # The enclave is gone before the host has stored anything: another one begins under the same head.
        simulation.boot()
        run = run.again()
        run.load()
    assert bodies[0] == bodies[1]


def test_kms_11_a_join_with_a_lower_number_does_not_come_back(make: Make, kms: PaperKms) -> None:
    run = make()
    offer = run.offer()
    party = run.parties["amber"]
    older, newer = party.kms_join(kms, 1), party.kms_join(kms, 2)
    run.host.want("joined", kms_join=run.kms(offer, kms, newer))
    asked = pb.Recipient(session=offer.offer.session, cose=older.cose, uploads=older.uploads)
    assert run.host.refused(recipient=asked) == "conflict"
    assert run.host.refused(kms_join=run.answering(offer, older, b"")) == "conflict"


def test_kms_11_a_roster_key_that_stood_in_a_roster_is_used_up(make: Make, kms: PaperKms) -> None:
    run = make()
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms)
    run.host.want("joined", kms_join=run.kms(offer, kms, join))
    run.join(offer, "birch")
    roster, _ = run.start(offer)
    run.host.want("awaiting", refuse=run.parties["birch"].refusal(offer, roster))
    asked = pb.Recipient(session=offer.offer.session, cose=join.cose, uploads=join.uploads)
    assert run.host.refused(recipient=asked) == "conflict"
    again = run.parties["amber"].kms_join(kms, 2)
    run.host.want("joined", kms_join=run.kms(offer, kms, again))


def test_kms_6_each_document_carries_a_fresh_key_and_what_it_is_for(make: Make, kms: PaperKms) -> None:
    run = make()
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms)
    documents = [parse_unverified(run.recipient(offer, join)) for _ in range(2)]
    assert documents[0].public_key != documents[1].public_key
    statement = KmsJoin.from_bytes(payload_unverified(join.cose))
    for document in documents:
        assert document.user_data == kms_user_data(offer.digest, statement.digest)
        assert document.nonce is None
        assert document.pcrs[16] != bytes(48)


@pytest.mark.parametrize("field", ["agreement", "party", "uploads", "roster_key"])
def test_kms_6_no_document_is_made_for_a_join_that_is_not_good(make: Make, kms: PaperKms, field: str) -> None:
    wrong: dict[str, tuple[Any, str]] = {
        "agreement": (bytes(48), "agreement"),
        "party": ("birch", "agreement"),
        "uploads": ((bytes(48),), "conflict"),
        "roster_key": (bytes(32), "agreement"),
    }
    value, code = wrong[field]
    run = make()
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms, **{field: value})
    asked = pb.Recipient(session=offer.offer.session, cose=join.cose, uploads=join.uploads)
    assert run.host.refused(recipient=asked) == code


def test_kms_6_documents_are_made_in_an_open_session_only(make: Make, kms: PaperKms) -> None:
    run = make()
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms)
    run.host.want("joined", kms_join=run.kms(offer, kms, join))
    run.join(offer, "birch")
    run.start(offer)
    asked = pb.Recipient(session=offer.offer.session, cose=join.cose, uploads=join.uploads)
    assert run.host.refused(recipient=asked) == "phase"
    asked.session = bytes(16)
    assert run.host.refused(recipient=asked) == "phase"


def _answers(run: Run, offer: VerifiedOffer, kms: PaperKms) -> dict[str, Callable[[pb.KmsJoin], bytes]]:
    """What a host could bring in place of the right answer, for the document that it was given last."""
    amber = run.parties["amber"]

    def public(join: pb.KmsJoin) -> bytes:
        key = parse_unverified(run.recipient(offer, join)).public_key
        assert key is not None
        return key

    def old(join: pb.KmsJoin) -> bytes:
        early = answer(public(join), amber.kms_keys)
        run.recipient(offer, join)
        return early

    def swapped(join: pb.KmsJoin) -> bytes:
        other = run.parties["birch"].kms_join(kms)
        right = kms.decrypt(
            KmsJoin.from_bytes(payload_unverified(other.cose)).ciphertext,
            run.parties["birch"].kms_context,
            run.recipient(offer, other),
        )
        run.recipient(offer, join)
        return right

    def flipped(join: pb.KmsJoin) -> bytes:
        data = bytearray(answer(public(join), amber.kms_keys))
        data[-30] ^= 1
        return bytes(data)

    return {
        "nothing": lambda join: run.recipient(offer, join)[:0],
        "a document": lambda join: run.recipient(offer, join),
        "other keys": lambda join: answer(public(join), bytes(len(amber.kms_keys))),
        "keys of another party": lambda join: answer(public(join), run.parties["birch"].sealed[0].content_key * 2),
        "too short": lambda join: answer(public(join), amber.kms_keys[:-1]),
        "too long": lambda join: answer(public(join), amber.kms_keys + b"\0"),
        "a flipped bit": flipped,
        "the answer to an earlier document": old,
        "the answer to another party's document": swapped,
    }


def test_kms_9_every_wrong_answer_has_one_code_and_one_time(make: Make, kms: PaperKms) -> None:
    run = make(with_key=NAMES)
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms)
    took: dict[str, float] = {}
    for name, wrong in _answers(run, offer, kms).items():
        data = wrong(join)
        begun = time.monotonic()
        assert run.host.refused(kms_join=run.answering(offer, join, data)) == "key", name
        took[name] = time.monotonic() - begun
    assert min(took.values()) >= limits.KMS_OPEN_MS / 1000, took
    assert not run.host.state().joined
    run.host.want("joined", kms_join=run.kms(offer, kms, join))


def test_kms_9_a_committed_key_in_another_order_is_refused(make: Make, kms: PaperKms) -> None:
    """Each commitment is that of its own place: the noise share is no content key."""
    run = make()
    offer = run.offer()
    party = run.parties["amber"]
    join = party.kms_join(kms)
    public = parse_unverified(run.recipient(offer, join)).public_key
    assert public is not None
    turned = party.kms_keys[32:] + party.kms_keys[:32]
    assert run.host.refused(kms_join=run.answering(offer, join, answer(public, turned))) == "key"


def test_kms_10_an_answer_is_taken_once(make: Make, kms: PaperKms) -> None:
    run = make()
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms)
    good = run.kms(offer, kms, join)
    wrong = pb.KmsJoin()
    wrong.CopyFrom(good)
    wrong.answer = good.answer[:-1] + b"\1"
    assert run.host.refused(kms_join=wrong) == "key"
    assert run.host.refused(kms_join=good) == "key"


def test_kms_10_after_too_many_wrong_answers_the_right_one_is_refused_too(make: Make, kms: PaperKms) -> None:
    run = make(with_key=NAMES)
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms)
    for _ in range(limits.KMS_ANSWERS):
        run.recipient(offer, join)
        assert run.host.refused(kms_join=run.answering(offer, join, b"")) == "key"
    assert run.host.refused(kms_join=run.kms(offer, kms, join)) == "key"
    other = run.parties["birch"].kms_join(kms)
    run.host.want("joined", kms_join=run.kms(offer, kms, other))


def test_a_join_of_the_ordinary_kind_goes_on_to_be_possible(make: Make, kms: PaperKms) -> None:
    run = make()
    offer = run.offer()
    run.host.want("joined", kms_join=run.kms(offer, kms, run.parties["amber"].kms_join(kms)))
    run.join(offer, "amber", "birch")
    finish(run, offer)


def test_an_agreement_without_the_key_takes_no_join_by_kms(make: Make, kms: PaperKms) -> None:
    run = make(with_key=())
    offer = run.offer()
    join = run.parties["amber"].kms_join(kms)
    asked = pb.Recipient(session=offer.offer.session, cose=join.cose, uploads=join.uploads)
    assert run.host.refused(recipient=asked) == "agreement"
    assert not replace(run.agreement, kms={}).kms
