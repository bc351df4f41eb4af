"""Whole sessions of an enclave over real sockets and processes, and its faults."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parley.images import AcceptedImage, seen_image
from parley_protocol.agreement.model import Agreement, Consent, Measurement
from parley_protocol.chain import ChainState, verify_chain
from parley_protocol.claims import VerifiedOffer, verify_receipt, verify_record, verify_roster
from parley_protocol.output import OutputTable
from parley_protocol.transcript import GENESIS, Record, Roster
from parley_protocol.v1 import enclave_pb2 as pb
from support.enclave import (
    Dropped,
    Party,
    Ranges,
    Rows,
    Run,
    Simulation,
    agreement_of,
    identities,
    payload,
    released,
    rows_of,
    signed,
    until,
)

pytestmark = pytest.mark.timeout(180)

Make = Callable[..., Run]
NAMES = ("amber", "birch", "cedar")


@pytest.fixture
def simulation(tmp_path: Path) -> Iterator[Simulation]:
    with Simulation(tmp_path) as made:
        yield made


@pytest.fixture
def make(simulation: Simulation) -> Iterator[Make]:
    runs: list[Run] = []

    def run(names: tuple[str, ...] = NAMES, counts: tuple[int, ...] = (900, 1500, 5000), **session: Any) -> Run:
        members = identities(names)
        agreement = agreement_of(simulation, members, **session)
        rows = {
            name: {"visits": rows_of(number, count)}
            for number, (name, count) in enumerate(zip(names, counts, strict=True))
        }
        made = Run(simulation, agreement, members, rows)
        runs.append(made)
        made.load()
        return made

    yield run
    for made in runs:
        made.close()


def columns(table: OutputTable) -> dict[str, tuple[Any, ...]]:
    return {column.name: column.cells for column in table.columns}


def check(run: Run, table: OutputTable, names: tuple[str, ...] = NAMES) -> None:
    """Compares an output with plain numpy over the plaintext."""
    parts = [run.rows[name]["visits"] for name in names]
    keys, amount, score, site = (
        np.concatenate([getattr(part, column) for part in parts]) for column in ("keys", "amount", "score", "site")
    )
    found = columns(table)
    assert found["site"] == ("north", "south", "west")
    for place in range(3):
        here = site == place + 1
        assert found["rows"][place] == int(here.sum())
        assert found["people"][place] == len(np.unique(keys[here]))
        cents = int(amount[here].sum())
        assert found["total"][place] == f"{cents // 100}.{cents % 100:02d}"
        assert found["mean_score"][place] == pytest.approx(float(score[here].mean()), rel=1e-9)


def computed(run: Run, offer: VerifiedOffer | None = None) -> tuple[VerifiedOffer, Roster, pb.Released]:
    """A session from its offer to its release."""
    offer = offer or run.offer(run_head(run))
    run.join(offer)
    roster, _ = run.start(offer)
    return offer, roster, released(run.countersign(offer, roster))


def run_head(run: Run) -> bytes:
    return Record.from_bytes(payload(run.chain[-1].cose)).head if run.chain else GENESIS


def body_of(answer: pb.Released) -> bytes:
    return Record.from_bytes(payload(answer.cose)).body_bytes


def test_a_session_from_load_to_stored(make: Make, simulation: Simulation) -> None:
    run = make()
    assert run.host.state().phase == "loaded"
    assert run.host.state().agreement == run.agreement.digest
    offer = run.offer()
    for name, party in run.parties.items():
        asked = party.joining(offer)
        receipt = run.host.want("joined", join=asked).receipt
        assert party.join is not None
        assert verify_receipt(receipt, offer.offer, party.join).party == name
    assert list(run.host.state().joined) == list(NAMES)
    roster, cose = run.start(offer)
    assert verify_roster(cose, offer.offer, run.agreement) == roster
    assert run.host.state().roster == cose
    answer = pb.Answer()
    for name, left in zip(NAMES, (["birch", "cedar"], ["cedar"], None), strict=True):
        answer = run.host.ask(countersign=run.parties[name].consent(offer, roster))
        if left is not None:
            assert list(answer.awaiting.members) == left
    release = released(answer)
    verified = verify_record(release.cose, release.document, run.agreement, now_ms=simulation.now_ms())
    assert verified.record.roster == roster.digest
    for name in NAMES:
        check(run, run.open(release, name)["by_site"])
    run.stored(offer, release)
    assert run.host.state().phase == "loaded"
    state = verify_chain(
        [(item.cose, item.document) for item in run.chain], [run.agreement], now_ms=simulation.now_ms()
    )
    assert state == ChainState(verified.record.head, 1, 1, 1)


def test_ses_3_a_second_session_follows_the_head_and_the_releases_are_counted(make: Make) -> None:
    run = make(max_releases=2)
    for number in (1, 2):
        offer, _, release = computed(run)
        body = Record.from_bytes(payload(release.cose)).body
        assert (body.sequence, body.charged, body.previous) == (number, number, offer.offer.head)
        run.stored(offer, release)
    assert run.host.refused(begin=pb.Begin(request=os.urandom(16), chain=run.chain)) == "exhausted"
    assert run.host.refused(begin=pb.Begin(request=os.urandom(16), chain=run.chain[1:])) == "head"
    assert run.host.refused(begin=pb.Begin(request=os.urandom(16), chain=run.chain[::-1])) == "head"
    assert run.host.refused(begin=pb.Begin(request=b"short")) == "malformed"
    # Without the records the host gets an offer, but one whose head no client of this series accepts.
    run.chain.clear()
    assert run.offer(GENESIS).offer.head == GENESIS


def test_ses_13_two_runs_have_the_same_record_body_and_plaintext(make: Make, simulation: Simulation) -> None:
    run = make()
    first = computed(run)[2]
    simulation.end()
    run.close()
    simulation.workers = 2
    simulation.boot()
    again = run.again()
    again.load()
    second = computed(again)[2]
    again.close()
    assert first.cose != second.cose
    assert body_of(first) == body_of(second)
    assert run.open(first, "amber") == run.open(second, "amber")


def test_repeated_operations_are_answered_alike(make: Make) -> None:
    run = make()
    run.load()
    request = os.urandom(16)
    offer = run.offer(request=request)
    assert run.offer(request=request).offer == offer.offer
    assert run.host.refused(begin=pb.Begin(request=os.urandom(16))) == "phase"
    asked = run.parties["amber"].joining(offer)
    receipt = run.host.want("joined", join=asked).receipt
    pulls = len(run.host.pulls)
    assert run.host.want("joined", join=asked).receipt == receipt
    run.join(offer, "birch", "cedar")
    roster, cose = run.start(offer)
    assert run.start(offer)[1] == cose
    assert (
        run.host.want("joined", join=pb.Join(session=asked.session, cose=asked.cose, uploads=asked.uploads)).receipt
        == receipt
    )
    assert pulls < len(run.host.pulls)
    amber = run.parties["amber"].consent(offer, roster)
    for _ in range(2):
        assert list(run.host.want("awaiting", countersign=amber).members) == ["birch", "cedar"]
    run.host.want("awaiting", countersign=run.parties["birch"].consent(offer, roster))
    last = run.parties["cedar"].consent(offer, roster)
    release = released(run.host.ask(countersign=last))
    assert released(run.host.ask(countersign=last)) == release
    assert released(run.host.ask(countersign=amber)) == release
    run.load()
    assert run.host.refused(join=asked) == "phase"
    assert run.host.refused(stored=pb.Stored(session=offer.offer.session, record=bytes(48))) == "conflict"
    for _ in range(2):
        run.stored(offer, release)
    assert run.host.refused(countersign=last) == "unknown-session"
    assert run.host.refused(begin=pb.Begin(request=request)) == "phase"


def test_ses_6_two_hosts_that_ask_at_once_get_the_same_release(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    consents = [run.parties[name].consent(offer, roster) for name in NAMES]
    answers: list[pb.Answer] = []
    threads = [
        threading.Thread(target=lambda consent=consent: answers.append(run.host.ask(countersign=consent)))
        for consent in consents * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = {answer.released.cose for answer in answers if answer.WhichOneof("op") == "released"}
    assert len(made) == 1
    assert run.host.state().phase == "released"


# Agreements


def test_ses_2_another_agreement_is_refused_for_ever(make: Make, simulation: Simulation) -> None:
    run = make()
    members = identities(NAMES)
    other = agreement_of(simulation, members)
    load = pb.Load(agreements=[signed(other, members)])
    assert run.host.refused(load=load) == "conflict"
    run.offer()
    assert run.host.refused(load=load) == "conflict"


@pytest.mark.parametrize("wrong", ["missing", "forged", "canonical", "none"])
def test_an_agreement_that_is_not_signed_by_all_is_refused(simulation: Simulation, wrong: str) -> None:
    members = identities(NAMES)
    agreement = agreement_of(simulation, members)
    run = Run(simulation, agreement, members, {name: {"visits": rows_of(1, 10)} for name in NAMES})
    good = signed(agreement, members)
    bad = signed(agreement, members)
    if wrong == "missing":
        del bad.signatures["birch"]
    elif wrong == "forged":
        bad.signatures["birch"] = signed(agreement, identities(NAMES)).signatures["birch"]
    elif wrong == "canonical":
        bad.canonical = agreement.canonical + b"\0"
    load = pb.Load(agreements=[] if wrong == "none" else [bad])
    assert run.host.refused(load=load) in {"missing": ("agreement", "signature"), "forged": ("signature",)}.get(
        wrong, ("malformed", "agreement")
    )
    assert run.host.state().phase == "empty"
    # Nothing was bound: the good one is taken.
    run.host.load(good)
    run.close()


def test_an_agreement_for_another_image_or_of_the_past_is_refused(simulation: Simulation) -> None:
    members = identities(NAMES)
    agreement = agreement_of(simulation, members)
    foreign = replace(agreement, measurements=(replace(simulation.measurement, pcr0=b"\1" * 48),))
    past = replace(agreement, expires=date(2020, 1, 1))
    run = Run(simulation, agreement, members, {name: {"visits": rows_of(1, 10)} for name in NAMES})
    assert run.host.refused(load=pb.Load(agreements=[signed(foreign, members)])) == "attestation"
    assert run.host.refused(load=pb.Load(agreements=[signed(past, members)])) == "expired"
    assert run.host.state().phase == "empty"
    # The register holds the expired one now.
    assert run.host.refused(load=pb.Load(agreements=[signed(agreement, members)])) == "conflict"


def amended(agreement: Agreement, **changes: Any) -> Agreement:
    """The next version of an agreement."""
    return replace(
        agreement, version=agreement.version + 1, series_digest=agreement.series, replaces=agreement.digest, **changes
    )


def test_an_amendment_goes_on_with_the_chain(make: Make, simulation: Simulation) -> None:
    run = make(max_releases=2)
    offer, _, release = computed(run)
    run.stored(offer, release)
    head = run_head(run)
    run.close()
    second = amended(run.agreement, purpose="Another test.")
    simulation.boot()
    later = Run(simulation, second, run.members, run.rows)
    later.chain = run.chain
    later.host.load(signed(run.agreement, run.members), signed(second, run.members, head))
    # Its signers have seen a record: the host cannot leave it out.
    assert later.host.refused(begin=pb.Begin(request=os.urandom(16))) == "head"
    offer = later.offer(head)
    later.join(offer)
    roster, _ = later.start(offer)
    release = released(later.countersign(offer, roster))
    body = Record.from_bytes(payload(release.cose)).body
    assert (body.agreement, body.sequence, body.charged, body.previous) == (second.digest, 2, 2, head)
    later.stored(offer, release)
    later.close()
    # Version 1 is still signed by all, and no longer good for this chain (F5).
    simulation.boot()
    old = Run(simulation, run.agreement, run.members, run.rows)
    old.load()
    assert old.host.refused(begin=pb.Begin(request=os.urandom(16), chain=later.chain)) == "agreement"
    old.close()


def test_an_amendment_rolls_out_another_image(make: Make, simulation: Simulation) -> None:
    run = make(max_releases=2)
    offer, _, release = computed(run)
    run.stored(offer, release)
    head = run_head(run)
    run.close()
    simulation.registers = {**simulation.registers, 0: b"\1" * 48, 2: b"\2" * 48}
    simulation.boot()
    # The next image is none of version 1.
    early = Run(simulation, run.agreement, run.members, run.rows)
    assert early.host.refused(load=pb.Load(agreements=[signed(run.agreement, run.members)])) == "attestation"
    early.close()
    old = simulation.measurement
    new = Measurement(simulation.registers[0], simulation.registers[1], simulation.registers[2])
    second = amended(run.agreement, measurements=(replace(old, until=run.agreement.expires), new))
    simulation.boot()
    later = Run(simulation, second, run.members, run.rows)
    later.chain = run.chain
    later.host.load(signed(run.agreement, run.members), signed(second, run.members, head))
    offer = later.offer(head)  # the record of the old image is on the chain, and the client verifies the new one
    assert seen_image(second, offer.enclave) == AcceptedImage(2, 2, new)
    later.join(offer)
    roster, _ = later.start(offer)
    release = released(later.countersign(offer, roster))
    body = Record.from_bytes(payload(release.cose)).body
    assert (body.agreement, body.sequence, body.previous) == (second.digest, 2, head)
    later.close()


def test_an_amendment_that_follows_no_version_one_is_refused(simulation: Simulation) -> None:
    members = identities(NAMES)
    first = agreement_of(simulation, members)
    second = amended(first, purpose="Another test.")
    run = Run(simulation, second, members, {name: {"visits": rows_of(1, 10)} for name in NAMES})
    foreign = agreement_of(simulation, members, max_releases=3)
    for lineage in ([second], [foreign, second], [second, first], [first, first]):
        load = pb.Load(agreements=[signed(version, members) for version in lineage])
        assert run.host.refused(load=load) == "agreement"
    run.close()


def test_a_party_may_bring_two_tables(simulation: Simulation) -> None:
    members = identities(NAMES)
    agreement = agreement_of(simulation, members, tables={"visits": NAMES, "calls": ("birch",)})
    rows = {name: {"visits": rows_of(number, 800)} for number, name in enumerate(NAMES)}
    rows["birch"]["calls"] = rows_of(9, 20_000)
    run = Run(simulation, agreement, members, rows)
    run.load()
    _, _, release = computed(run)
    opened = run.open(release, "cedar")
    check(run, opened["by_site"])
    calls = rows["birch"]["calls"]
    assert columns(opened["by_site_1"])["rows"] == tuple(int((calls.site == site).sum()) for site in (1, 2, 3))
    run.close()


def test_ses_1_operations_before_their_time_are_refused(simulation: Simulation) -> None:
    members = identities(NAMES)
    agreement = agreement_of(simulation, members)
    run = Run(simulation, agreement, members, {name: {"visits": rows_of(1, 10)} for name in NAMES})
    for op in (
        {"begin": pb.Begin(request=bytes(16))},
        {"attest": pb.Attest(session=bytes(16), nonce=bytes(32))},
        {"join": pb.Join(session=bytes(16), cose=b"x")},
        {"start": pb.Start(session=bytes(16), cose=b"x")},
        {"stored": pb.Stored(session=bytes(16), record=bytes(48))},
    ):
        assert run.host.refused(**op) == "phase"
    run.load()
    offer = run.offer()
    assert run.host.refused(attest=pb.Attest(session=bytes(16), nonce=bytes(32))) == "unknown-session"
    assert run.host.refused(attest=pb.Attest(session=offer.offer.session, nonce=bytes(31))) == "malformed"
    assert run.host.refused(frames=pb.Frames()) == "malformed"
    run.close()


# Joins


def test_adm_1_a_join_of_another_session_or_signer_is_refused(make: Make) -> None:
    run = make()
    offer = run.offer()
    birch = run.parties["birch"]
    assert run.host.refused(join=birch.joining(offer, offer=bytes(48))) == "agreement"
    assert run.host.refused(join=birch.joining(offer, party="nobody")) == "not-a-member"
    assert run.host.refused(join=birch.joining(offer, party="amber")) == "signature"
    assert run.host.refused(join=pb.Join(session=offer.offer.session, cose=b"junk")) == "malformed"
    assert list(run.host.state().joined) == []


def test_adm_2_uploads_that_the_join_does_not_name_are_refused(make: Make) -> None:
    run = make()
    offer = run.offer()
    amber, birch = run.parties["amber"], run.parties["birch"]
    asked = birch.joining(offer)
    theirs = amber.joining(offer)
    swapped = pb.Join(session=asked.session, cose=asked.cose, uploads=theirs.uploads)
    assert run.host.refused(join=swapped) == "conflict"
    assert run.host.refused(join=pb.Join(session=asked.session, cose=asked.cose)) == "conflict"
    # A join that names another party's upload, with that upload.
    borrowed = birch.joining(offer, uploads=tuple(sealed.upload.digest for sealed in amber.sealed))
    assert (
        run.host.refused(join=pb.Join(session=asked.session, cose=borrowed.cose, uploads=theirs.uploads)) == "conflict"
    )


def test_adm_3_keys_that_do_not_open_are_refused(make: Make) -> None:
    run = make()
    offer = run.offer()
    assert run.host.refused(join=run.parties["birch"].joining(offer, sealed_keys=os.urandom(1300))) == "key"
    other = run.parties["amber"].joining(offer)
    assert other.cose
    assert run.parties["amber"].join is not None
    stolen = run.parties["amber"].join.sealed_keys
    assert run.host.refused(join=run.parties["birch"].joining(offer, sealed_keys=stolen)) == "key"


def test_adm_4_keys_that_are_not_the_committed_ones_are_refused(make: Make) -> None:
    run = make()
    offer = run.offer()
    birch = run.parties["birch"]
    assert run.host.refused(join=birch.joining(offer, share_digest=bytes(48))) == "key"
    birch.sealed[0].content_key = os.urandom(32)
    assert run.host.refused(join=birch.joining(offer)) == "key"


def test_adm_5_a_table_is_admitted_once_in_a_session(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer, "cedar")
    pulls = len(run.host.pulls)
    assert pulls > 0
    run.join(offer, "cedar")
    assert len(run.host.pulls) == pulls


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        ("order", "order"),
        ("domain", "domain"),
        ("range", "range"),
        ("multiplicity", "multiplicity"),
        ("byte", "frame"),
        ("missing", "frame"),
    ],
)
def test_adm_9_a_refusal_consumes_nothing(make: Make, spoil: str, code: str) -> None:
    run = make()
    offer = run.offer()
    birch = run.parties["birch"]
    good = run.rows["birch"]["visits"]
    bad = Rows(good.keys.copy(), good.amount.copy(), good.score.copy(), good.site.copy())
    if spoil == "order":
        bad.keys[[0, -1]] = bad.keys[[-1, 0]]
    elif spoil == "domain":
        bad.site[7] = 9
    elif spoil == "range":
        bad.amount[7] = 10**12
    elif spoil == "multiplicity":
        bad.keys[:] = 4711
    spoiled = Party(run.agreement, "birch", run.members["birch"], {"visits": bad})
    run.host.blobs |= spoiled.blobs
    number = spoiled.numbers[0]
    if spoil == "byte":
        blob = bytearray(run.host.blobs[number])
        blob[-1] ^= 1
        run.host.blobs[number] = bytes(blob)
    elif spoil == "missing":
        run.host.blobs[number] = run.host.blobs[number][:-1]
    assert run.host.refused(join=spoiled.joining(offer)) == code
    assert list(run.host.state().joined) == []
    assert run.host.want("joined", join=birch.joining(offer)).receipt
    # A bad join after a good one leaves the good one.
    if spoil != "missing":
        assert run.host.refused(join=spoiled.joining(offer)) == code
        assert list(run.host.state().joined) == ["birch"]


def test_adm_7_a_party_may_replace_its_join_until_the_roster(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    corrected = rows_of(77, 700)
    run.rows["birch"]["visits"] = corrected
    run.parties["birch"] = Party(run.agreement, "birch", run.members["birch"], {"visits": corrected})
    run.host.blobs |= run.parties["birch"].blobs
    run.join(offer, "birch")
    roster, _ = run.start(offer)
    entry = roster.entry("birch")
    assert entry is not None and entry.uploads == (run.parties["birch"].sealed[0].upload.digest,)
    assert run.host.refused(join=run.parties["amber"].joining(offer)) == "phase"


def test_adm_7_a_host_cannot_bring_back_a_join_that_was_replaced(make: Make) -> None:
    run = make()
    offer = run.offer()
    first, second = run.parties["amber"].joining(offer), run.parties["amber"].joining(offer)
    for asked in (first, second):
        run.host.want("joined", join=asked)
    assert run.host.refused(join=first) == "conflict"
    run.host.want("joined", join=second)
    run.join(offer, *(name for name in run.agreement.parties if name != "amber"))
    roster, _ = run.start(offer)
    entry = roster.entry("amber")
    assert (
        entry is not None and run.parties["amber"].join is not None and entry.join == run.parties["amber"].join.digest
    )
    run.host.want("awaiting", refuse=run.parties["amber"].refusal(offer, roster))
    # The roster is gone and with it all joins; the one before the last is still one of before.
    assert run.host.refused(join=first) == "conflict"


def test_adm_8_the_same_join_gets_the_same_receipt(make: Make) -> None:
    run = make()
    offer = run.offer()
    asked = run.parties["amber"].joining(offer)
    receipts = {run.host.want("joined", join=asked).receipt for _ in range(3)}
    assert len(receipts) == 1
    assert run.host.want("joined", join=run.parties["amber"].joining(offer)).receipt not in receipts


# Rosters


def test_ses_5_the_quorum_counts_after_the_deadline_only(make: Make, simulation: Simulation) -> None:
    run = make(quorum=2, deadline_ms=3_600_000)
    offer = run.offer()
    run.join(offer, "amber")
    assert run.host.refused(start=run.starting(offer)) == "quorum"
    run.join(offer, "cedar")
    assert run.host.refused(start=run.starting(offer)) == "quorum"
    assert run.host.refused(start=run.starting(offer, "birch")) == "not-a-member"
    simulation.ahead_ms += 3_600_001
    run.attest(offer.offer.to_bytes())
    roster, _ = run.start(offer)
    assert [entry.party for entry in roster.included] == ["amber", "cedar"]
    assert [(item.party, item.reason) for item in roster.absentees] == [("birch", "deadline")]
    release = released(run.countersign(offer, roster))
    check(run, run.open(release, "birch")["by_site"], ("amber", "cedar"))


def test_a_start_below_the_quorum_is_refused_after_the_deadline_too(make: Make, simulation: Simulation) -> None:
    run = make(quorum=2, deadline_ms=3_600_000)
    offer = run.offer()
    run.join(offer, "amber")
    simulation.ahead_ms += 3_600_001
    run.attest(offer.offer.to_bytes())
    assert run.host.refused(start=run.starting(offer)) == "quorum"


def former_of(offer: VerifiedOffer, document: bytes, cose: bytes) -> pb.FormerRoster:
    return pb.FormerRoster(offer=offer.offer.to_bytes(), document=document, cose=cose)


def test_ses_9_a_lapsed_roster_then_a_corrected_table(make: Make, simulation: Simulation) -> None:
    run = make(countersign_within_ms=3_600_000)
    offer = run.offer()
    run.join(offer)
    roster, cose = run.start(offer)
    late = {name: run.parties[name].consent(offer, roster) for name in NAMES}
    run.host.want("awaiting", countersign=late["amber"])
    former = former_of(offer, run.document, cose)
    simulation.ahead_ms += 3_600_001
    run.attest(offer.offer.to_bytes())
    state = run.host.state()
    assert (state.phase, state.code, list(state.missing)) == ("open", "expired", ["birch", "cedar"])
    assert run.host.refused(countersign=late["birch"]) == "expired"
    assert list(state.joined) == []
    pulls = len(run.host.pulls)
    run.join(offer, "amber", "birch")
    assert len(run.host.pulls) == pulls, "admitted tables stay admitted"
    corrected = rows_of(99, 800)
    run.rows["cedar"]["visits"] = corrected
    run.parties["cedar"] = Party(run.agreement, "cedar", run.members["cedar"], {"visits": corrected})
    run.host.blobs |= run.parties["cedar"].blobs
    run.join(offer, "cedar")
    second, _ = run.start(offer)
    # Amber signed the first roster, which had another table: it is charged.
    release = released(run.countersign(offer, second, {"amber": [former]}))
    assert Record.from_bytes(payload(release.cose)).body.charged == 2
    check(run, run.open(release, "amber")["by_site"])


def test_a_former_roster_with_the_same_inputs_costs_nothing(make: Make, simulation: Simulation) -> None:
    run = make(countersign_within_ms=3_600_000)
    offer = run.offer()
    run.join(offer)
    roster, cose = run.start(offer)
    former = former_of(offer, run.document, cose)
    simulation.ahead_ms += 3_600_001
    run.attest(offer.offer.to_bytes())
    run.join(offer)
    second, _ = run.start(offer)
    assert second.digest != roster.digest and second.inputs_digest == roster.inputs_digest
    release = released(run.countersign(offer, second, {name: [former] for name in NAMES}))
    assert Record.from_bytes(payload(release.cose)).body.charged == 1


def test_adm_6_a_one_time_key_of_a_roster_is_used_up(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    first = run.parties["birch"].join
    assert first is not None
    roster, _ = run.start(offer)
    run.host.want("awaiting", refuse=run.parties["amber"].refusal(offer, roster))
    again = pb.Join(
        session=offer.offer.session,
        cose=run.members["birch"].sign(first.to_bytes()),
        uploads=run.parties["birch"].joining(offer).uploads,
    )
    assert run.host.refused(join=again) == "conflict"
    assert run.host.refused(join=run.parties["birch"].joining(offer, roster_key=first.roster_key)) == "conflict"
    run.join(offer, "birch")


def test_ses_7_a_refusal_ends_the_roster_and_names_who(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    late = run.parties["cedar"].consent(offer, roster)
    refusal = run.parties["birch"].refusal(offer, roster)
    for _ in range(2):
        assert list(run.host.want("awaiting", refuse=refusal).members) == list(NAMES)
    state = run.host.state()
    assert (state.phase, state.code, list(state.missing)) == ("open", "roster", ["birch"])
    assert run.host.refused(countersign=late) == "roster"
    run.join(offer)
    second, _ = run.start(offer)
    assert run.host.refused(refuse=refusal) == "roster"
    check(run, run.open(released(run.countersign(offer, second)), "cedar")["by_site"])


def test_cos_6_former_rosters_are_proven(make: Make, simulation: Simulation) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, cose = run.start(offer)
    former = former_of(offer, run.document, cose)
    run.host.want("awaiting", refuse=run.parties["amber"].refusal(offer, roster))
    run.join(offer)
    second, _ = run.start(offer)
    amber = run.parties["amber"]
    good = amber.consent(offer, second, [former])
    unproven = pb.Countersign(session=good.session, cose=good.cose)
    assert run.host.refused(countersign=unproven) == "roster"
    twice = pb.Countersign(session=good.session, cose=good.cose, former=[former, former])
    assert run.host.refused(countersign=twice) == "roster"
    document = bytearray(former.document)
    document[-1] ^= 1
    forged = pb.FormerRoster(offer=former.offer, document=bytes(document), cose=former.cose)
    assert (
        run.host.refused(countersign=pb.Countersign(session=good.session, cose=good.cose, former=[forged]))
        == "signature"
    )
    unsigned = pb.FormerRoster(
        offer=former.offer, document=former.document, cose=amber.identity.sign(payload(former.cose))
    )
    assert (
        run.host.refused(countersign=pb.Countersign(session=good.session, cose=good.cose, former=[unsigned]))
        == "signature"
    )
    assert list(run.host.want("awaiting", countersign=good).members) == ["birch", "cedar"]
    # A second countersignature that hides the former roster comes too late.
    assert run.host.refused(countersign=amber.consent(offer, second)) == "conflict"


def test_charges_beyond_the_agreement_lose_the_session_before_computing(make: Make, simulation: Simulation) -> None:
    run = make(max_releases=1)
    offer = run.offer()
    run.join(offer)
    roster, cose = run.start(offer)
    former = former_of(offer, run.document, cose)
    run.host.want("awaiting", refuse=run.parties["amber"].refusal(offer, roster))
    run.parties["cedar"] = Party(run.agreement, "cedar", run.members["cedar"], {"visits": rows_of(5, 100)})
    run.host.blobs |= run.parties["cedar"].blobs
    run.join(offer)
    second, _ = run.start(offer)
    pulls = len(run.host.pulls)
    answer = run.countersign(offer, second, {"birch": [former]})
    assert answer.failed.code == "exhausted"
    assert (run.host.state().phase, run.host.state().code) == ("lost", "exhausted")
    assert len(run.host.pulls) == pulls
    run.offer()


def test_a_countersignature_needs_both_keys(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    birch = run.parties["birch"]
    good = birch.consent(offer, roster)
    outsider = run.members["amber"].sign(payload(good.cose))
    assert run.host.refused(countersign=pb.Countersign(session=good.session, cose=outsider)) == "signature"
    birch.joining(offer)
    assert run.host.refused(countersign=birch.consent(offer, roster)) == "signature"
    assert list(run.host.want("awaiting", countersign=good).members) == ["amber", "cedar"]


def test_ses_10_standing_consent_computes_at_the_start(make: Make) -> None:
    run = make(consent=Consent.STANDING)
    offer = run.offer()
    run.join(offer)
    roster, cose = run.start(offer)
    assert verify_roster(cose, offer.offer, run.agreement) == roster
    release = released(run.host.ask(start=run.starting(offer)))
    check(run, run.open(release, "amber")["by_site"])
    assert run.host.refused(countersign=run.parties["amber"].consent(offer, roster)) == "phase"
    run.stored(offer, release)


# Faults


def test_ses_11_a_second_version_of_a_frame_loses_the_session(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    # Cedar and the host agree on another table under the same frame keys: its frames open, and are not the admitted ones.
    cedar = run.parties["cedar"]
    number = cedar.numbers[0]
    other = reseal(run.agreement, cedar, rows_of(77, 5000))
    assert len(other) == len(cedar.sealed[0].blob)

    def second_version(blob: int, ranges: Ranges, pieces: list[bytes]) -> list[bytes]:
        return [other[start : start + length] for start, length in ranges] if blob == number else pieces

    run.host.pull = second_version
    answer = run.countersign(offer, roster)
    assert answer.failed.code == "frame"
    assert (run.host.state().phase, run.host.state().code) == ("lost", "frame")
    # The same parties may join the next session.
    run.host.pull = None
    check(run, run.open(computed(run)[2], "amber")["by_site"])


def reseal(agreement: Agreement, party: Party, rows: Rows) -> bytes:
    """Other rows under the header and content key of a party's upload: what a party can make and an honest one never does."""
    import hashlib

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from parley_protocol import table
    from parley_protocol.transcript import frame_key

    sealed = party.sealed[0]
    header = sealed.upload.header
    spec = agreement.tables["visits"]
    aead = AESGCM(frame_key(sealed.content_key, sealed.upload.header_bytes))
    total = header.groups * header.group_rows
    columns = [np.full(total, table.KEY_PAD, "<u8"), *(np.full(total, c.null_value, c.dtype) for c in spec.columns)]
    for column, values in zip(columns, (rows.keys, rows.amount, rows.score, rows.site), strict=True):
        column[: len(values)] = values
    frames = [table.seal_manifest(aead, len(rows.keys))]
    for group in range(header.groups):
        part = slice(group * header.group_rows, (group + 1) * header.group_rows)
        frames += [table.seal_frame(aead, group, place, column[part].tobytes()) for place, column in enumerate(columns)]
    return b"".join(hashlib.sha256(frame).digest() for frame in frames) + b"".join(frames)


def test_a_frame_that_the_host_has_lost_loses_the_session(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    run.host.blobs[run.parties["amber"].numbers[0]] = b""
    assert run.countersign(offer, roster).failed.code == "frame"


def test_a_worker_that_dies_and_connections_that_drop_cost_nothing(make: Make, simulation: Simulation) -> None:
    run = make(counts=(900, 1500, 40_000))
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    faults = iter(["worker", "drop", "serves", "worker"])

    def misbehave(_blob: int, _ranges: Ranges, pieces: list[bytes]) -> list[bytes]:
        match next(faults, None):
            case "worker":
                for pid in simulation.worker_pids():
                    os.kill(pid, signal.SIGKILL)
            case "drop":
                raise Dropped
            case "serves":
                run.host.drop_serves()
        return pieces

    run.host.pull = misbehave
    release = released(run.countersign(offer, roster))
    assert next(faults, None) is None
    check(run, run.open(release, "amber")["by_site"])


def test_a_host_that_restarts_while_computing_attaches_again(make: Make, simulation: Simulation) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    consents = [run.parties[name].consent(offer, roster) for name in NAMES]
    hold = threading.Event()

    def held(_blob: int, _ranges: Ranges, pieces: list[bytes]) -> list[bytes]:
        hold.wait(30)
        return pieces

    run.host.pull = held
    for consent in consents[:2]:
        run.host.ask(countersign=consent)
    with run.host.connect() as connection:
        from parley_protocol import framing

        connection.sendall(framing.pack(pb.Ask(countersign=consents[2]).SerializeToString()))
        until(lambda: run.host.state().phase == "computing")
    run.host.close()
    hold.set()
    again = run.again()
    again.load()
    state = again.host.state()
    assert (state.phase, state.offer) == ("computing", offer.offer.to_bytes())
    release = released(again.host.ask(countersign=consents[0]))
    check(run, run.open(release, "amber")["by_site"])
    again.close()


def test_ses_12_workers_are_new_after_a_release(make: Make, simulation: Simulation) -> None:
    run = make()
    before = set(simulation.worker_pids())
    assert len(before) == 1
    offer, _, release = computed(run)
    after = set(simulation.worker_pids())
    assert len(after) == 1 and not before & after
    run.stored(offer, release)
    run.host.want("offered", begin=pb.Begin(request=os.urandom(16), chain=run.chain))


def test_workers_end_with_the_enclave(make: Make, simulation: Simulation) -> None:
    make()
    pids = simulation.worker_pids()
    simulation.end()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_ses_8_until_stored_the_release_is_kept(make: Make) -> None:
    run = make()
    offer, roster, release = computed(run)
    assert run.host.refused(begin=pb.Begin(request=os.urandom(16))) == "phase"
    last = run.parties["cedar"].consent(offer, roster)
    assert released(run.host.ask(countersign=last)) == release
    run.stored(offer, release)


def test_ses_4_a_document_answers_the_callers_nonce(make: Make) -> None:
    run = make()
    offer = run.offer()
    first = run.document
    assert run.attest(offer.offer.to_bytes()).offer == offer.offer
    assert run.document != first


def test_the_log_has_phases_and_nothing_else(make: Make, simulation: Simulation) -> None:
    run = make()
    computed(run)
    lines = simulation.log.splitlines()
    assert lines == [
        "parley-enclave: listening, workers: 1",
        "parley-enclave: empty -> loaded",
        "parley-enclave: loaded -> open",
        "parley-enclave: open -> rostered",
        "parley-enclave: rostered -> computing",
        "parley-enclave: computing -> released",
    ]


def test_a_bare_tree_runs_without_the_other_roles(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, parley_enclave.__main__, parley_enclave.service, parley_enclave.enclave, parley_enclave.pool;"
        "print([name for name in sys.modules if name.split('.')[0] in"
        " ('grpc', 'numpy', 'parley', 'parley_coordinator', 'parley_deploy', 'duckdb', 'pyarrow', 'pandas')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
