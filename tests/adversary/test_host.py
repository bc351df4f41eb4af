"""A host, alone or with a party, against a real enclave process: what it feeds, withholds, swaps and repeats.

The enclave is told everything by the host, so it must answer each of these with a refusal that consumes nothing, or lose
the session without a word of the data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parley_protocol import cose, hpke, table
from parley_protocol.agreement.model import Agreement, Function, Grouping, Output, Rules, Value
from parley_protocol.encoding import decode, encode
from parley_protocol.errors import AgreementError
from parley_protocol.output import OutputTable
from parley_protocol.transcript import (
    GENESIS,
    Countersignature,
    JoinKeys,
    Record,
    Refusal,
    Roster,
    RosterConsent,
    join_info,
    key_commitment,
)
from parley_protocol.v1 import enclave_pb2 as pb
from support.enclave import (
    Host,
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
)
from support.hostile import columns_of, frames_of, party_with, reseal, sealed_of

pytestmark = pytest.mark.timeout(120)

NAMES = ("amber", "birch", "cedar")
COUNTS = (700, 900, 17_000)
"""Cedar has two groups, so that frames of one column can change places."""
Make = Callable[..., Run]


@pytest.fixture
def simulation(tmp_path: Path) -> Iterator[Simulation]:
    with Simulation(tmp_path) as made:
        yield made


@pytest.fixture
def make(simulation: Simulation) -> Iterator[Make]:
    runs: list[Run] = []

    def run(
        counts: tuple[int, ...] = COUNTS,
        rows: dict[str, Any] | None = None,
        agreement: Agreement | None = None,
        **session: Any,
    ) -> Run:
        members = identities(NAMES)
        made = agreement_of(simulation, members, **session)
        given = rows or {
            name: {"visits": rows_of(seed, n)} for seed, (name, n) in enumerate(zip(NAMES, counts, strict=True))
        }
        runs.append(Run(simulation, agreement or made, members, given))
        runs[-1].load()
        return runs[-1]

    yield run
    for made in runs:
        made.close()


def cells(table: OutputTable, name: str) -> tuple[Any, ...]:
    return next(column.cells for column in table.columns if column.name == name)


def with_uploads(asked: pb.Join, *parties: Party) -> pb.Join:
    """A join with the uploads of these parties beside it."""
    uploads = [
        pb.SignedUpload(cose=sealed.cose, blob=number)
        for party in parties
        for sealed, number in zip(party.sealed, party.numbers, strict=True)
    ]
    return pb.Join(session=asked.session, cose=asked.cose, uploads=uploads)


# Frames


def frame_attacks(party: Party) -> dict[str, bytes]:
    """Blobs that the host may store in place of a party's."""
    blob, places = frames_of(party)
    columns = len(party.agreement.tables["visits"].columns) + 1

    def put(*moves: tuple[int, int]) -> bytes:
        changed = bytearray(blob)
        for target, origin in moves:
            (at, length), (start, size) = places[target], places[origin]
            assert length == size
            changed[at : at + length] = blob[start : start + size]
        return bytes(changed)

    at, length = places[3]
    first, second = 1, 1 + columns
    digests = table.HASH_BYTES
    reordered = bytearray(put((first, second), (second, first)))
    reordered[first * digests : (first + 1) * digests] = blob[second * digests : (second + 1) * digests]
    reordered[second * digests : (second + 1) * digests] = blob[first * digests : (first + 1) * digests]
    return {
        "dropped": b"",
        "truncated by a byte": blob[:-1],
        "truncated by a group": blob[: places[second][0]],
        "groups reordered": put((first, second), (second, first)),
        "groups reordered with their digests": bytes(reordered),
        "columns swapped": put((2, 3), (3, 2)),
        "a frame replayed in place of another": put((second, first)),
        "a frame of zeros": blob[:at] + bytes(length) + blob[at + length :],
        "a bit flipped in a frame": blob[: at + 5] + bytes([blob[at + 5] ^ 4]) + blob[at + 6 :],
        "a bit flipped in the manifest": blob[: places[0][0]]
        + bytes([blob[places[0][0]] ^ 1])
        + blob[places[0][0] + 1 :],
        "a bit flipped in the list of digests": bytes([blob[0] ^ 1]) + blob[1:],
    }


def test_frames_dropped_reordered_or_truncated_are_refused(make: Make) -> None:
    run = make()
    offer = run.offer()
    cedar = run.parties["cedar"]
    number = cedar.numbers[0]
    attacks = frame_attacks(cedar)
    for name, blob in attacks.items():
        run.host.blobs[number] = blob
        assert run.host.refused(join=cedar.joining(offer)) == "frame", name
    run.host.blobs[number] = cedar.sealed[0].blob
    assert list(run.host.state().joined) == []
    # The same blobs after admission, when the frames are pulled again: the session ends, and the next one is a new one.
    for name in ("dropped", "columns swapped", "groups reordered"):
        run.join(offer)
        roster, _ = run.start(offer)
        run.host.blobs[number] = attacks[name]
        answer = run.countersign(offer, roster)
        assert answer.failed.code == "frame", name
        assert (run.host.state().phase, run.host.state().code) == ("lost", "frame")
        run.host.blobs[number] = cedar.sealed[0].blob
        offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    assert released(run.countersign(offer, roster)).outputs


def test_a_second_version_of_a_frame_ends_the_session(make: Make) -> None:
    # Cedar and the host agree on another table under the same frame keys: its frames open, and are not the admitted ones.
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    cedar = run.parties["cedar"]
    other = reseal(run.agreement, cedar, columns_of(run.agreement, "visits", rows_of(77, 17_000)), 17_000, fresh=False)
    assert other.upload.header_bytes == cedar.sealed[0].upload.header_bytes
    assert len(other.blob) == len(cedar.sealed[0].blob)

    def second(blob: int, ranges: Ranges, pieces: list[bytes]) -> list[bytes]:
        return [other.blob[at : at + n] for at, n in ranges] if blob == cedar.numbers[0] else pieces

    run.host.pull = second
    assert run.countersign(offer, roster).failed.code == "frame"
    assert (run.host.state().phase, run.host.state().code) == ("lost", "frame")
    assert run.host.refused(countersign=run.parties["amber"].consent(offer, roster)) == "phase"
    # Only the first pull decides: had the second version been signed and pulled from the start, it were just another table.
    run.host.pull = None
    run.parties["cedar"] = party_with(cedar, other)
    run.host.blobs |= run.parties["cedar"].blobs
    offer = run.offer()
    run.join(offer)


# Joins


def test_swapped_tables_and_parties_are_refused(simulation: Simulation) -> None:
    members = identities(NAMES)
    tables = {"first": ("amber", "birch"), "second": ("amber", "birch", "cedar")}
    agreement = agreement_of(simulation, members, tables=tables)
    rows = {
        name: {t: rows_of(hash((name, t)) % 1000, 700) for t, who in tables.items() if name in who} for name in NAMES
    }
    run = Run(simulation, agreement, members, rows)
    run.load()
    offer = run.offer()
    amber, birch, cedar = (run.parties[name] for name in NAMES)
    # The blobs of a party's two tables, and those of two parties, in each other's place: all have the same size.
    for one, other in ((amber.numbers[0], amber.numbers[1]), (amber.numbers[0], birch.numbers[0])):
        kept = dict(run.host.blobs)
        run.host.blobs[one], run.host.blobs[other] = kept[other], kept[one]
        assert len(kept[one]) == len(kept[other])
        assert run.host.refused(join=amber.joining(offer)) == "frame"
        run.host.blobs.update(kept)
    # The statements in another order, or of another party, than the join names.
    asked = amber.joining(offer)
    backwards = pb.Join(session=asked.session, cose=asked.cose, uploads=list(asked.uploads)[::-1])
    assert run.host.refused(join=backwards) == "conflict"
    assert run.host.refused(join=with_uploads(asked, birch)) == "conflict"
    # Birch joins with amber's tables: as they are, or as its own, which needs a content key that it does not know.
    theirs = tuple(sealed.upload.digest for sealed in amber.sealed)
    assert run.host.refused(join=with_uploads(birch.joining(offer, uploads=theirs), amber)) == "conflict"
    stolen = []
    for sealed in amber.sealed:
        header = replace(sealed.upload.header, party="birch")
        upload = replace(sealed.upload, header_bytes=header.to_bytes())
        stolen.append(replace(sealed, upload=upload, cose=birch.identity.sign(upload.to_bytes())))
    thief = party_with(birch, *stolen)
    run.host.blobs |= thief.blobs
    for sealed in thief.sealed:
        sealed.content_key = os.urandom(32)
    assert run.host.refused(join=thief.joining(offer)) == "key"
    # With a key and a commitment of its own the statement is good, and amber's frames do not open.
    made = []
    for sealed in amber.sealed:
        key = os.urandom(32)
        header = replace(sealed.upload.header, party="birch", key_commitment=key_commitment(key))
        upload = replace(sealed.upload, header_bytes=header.to_bytes())
        made.append(replace(sealed, upload=upload, cose=birch.identity.sign(upload.to_bytes()), content_key=key))
    thief = party_with(birch, *made)
    run.host.blobs |= thief.blobs
    assert run.host.refused(join=thief.joining(offer)) == "frame"
    # Cedar's own upload, but for a table that it does not bring, or for another agreement.
    for wrong in ({"table": "first"}, {"agreement": bytes(48)}):
        header = replace(cedar.sealed[0].upload.header, **wrong)
        upload = replace(cedar.sealed[0].upload, header_bytes=header.to_bytes())
        liar = party_with(cedar, replace(cedar.sealed[0], upload=upload, cose=cedar.identity.sign(upload.to_bytes())))
        run.host.blobs |= liar.blobs
        assert run.host.refused(join=liar.joining(offer)) in ("schema", "agreement")
    assert list(run.host.state().joined) == []
    run.join(offer)
    run.close()


def test_a_join_of_another_session_is_refused(make: Make, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = make()
    first = run.offer()
    run.join(first)
    old = run.parties["birch"].joining(first)
    # Another enclave of the same image under the same root and agreement, which the host runs beside the first.
    with Simulation(tmp_path_factory.mktemp("twin")) as twin:
        twin.root = run.simulation.root
        twin.boot()
        again = Run(twin, run.agreement, run.members, run.rows)
        again.parties, again.host.blobs = run.parties, run.host.blobs
        again.load()
        second = again.offer()
        moved = pb.Join(session=second.offer.session, cose=old.cose, uploads=old.uploads)
        assert again.host.refused(join=moved) == "agreement"
        assert again.host.refused(join=old) == "unknown-session"
        # Birch colludes and signs a join of the second session with the keys that amber sealed to the first, or to this one.
        amber = again.parties["amber"]
        for offer in (first, second):
            amber.joining(offer)
            assert amber.join is not None
            sealed_keys = amber.join.sealed_keys
            assert again.host.refused(join=again.parties["birch"].joining(second, sealed_keys=sealed_keys)) == "key"
        # Nor does a roster, a consent or a request to start of the one serve the other.
        roster, _ = run.start(first)
        consent = run.parties["amber"].consent(first, roster)
        again.join(second)
        start = run.starting(first)
        assert again.host.refused(start=pb.Start(session=second.offer.session, cose=start.cose)) == "agreement"
        theirs, _ = again.start(second)
        moved_consent = pb.Countersign(session=second.offer.session, cose=consent.cose)
        assert again.host.refused(countersign=moved_consent) == "roster"
        assert theirs.digest != roster.digest and theirs.inputs_digest == roster.inputs_digest
        again.close()


def test_a_replaced_join_does_not_come_back(make: Make) -> None:
    """The host keeps a party's first join and hands it in again after the corrected one."""
    run = make()
    offer = run.offer()
    birch = run.parties["birch"]
    first = birch.joining(offer)
    run.host.want("joined", join=first)
    corrected = Party(run.agreement, "birch", run.members["birch"], {"visits": rows_of(99, 500)})
    run.host.blobs |= corrected.blobs
    second = corrected.joining(offer)
    receipt = run.host.want("joined", join=second).receipt
    for _ in range(2):
        assert run.host.refused(join=first) == "conflict"
    assert run.host.want("joined", join=second).receipt == receipt
    run.join(offer, "amber", "cedar")
    roster, _ = run.start(offer)
    entry = roster.entry("birch")
    assert entry is not None and entry.uploads == (corrected.sealed[0].upload.digest,)


def test_an_enclave_of_another_agreement_never_takes_this_one(make: Make, simulation: Simulation) -> None:
    """Confused deputy: attackers sign an agreement of their own and feed the same image with a victim's upload (E2)."""
    run = make()
    offer = run.offer()
    members = identities(("eve", "fay", "gus"))
    foreign = agreement_of(simulation, members)
    assert run.host.refused(load=pb.Load(agreements=[signed(foreign, members)])) == "conflict"
    eve = Party(run.agreement, "amber", members["eve"], {"visits": rows_of(1, 100)})
    run.host.blobs |= eve.blobs
    assert run.host.refused(join=eve.joining(offer)) == "signature"


# Starting and consenting


def test_a_start_before_the_deadline_needs_every_party(make: Make, simulation: Simulation) -> None:
    run = make(quorum=2, deadline_ms=3_600_000)
    offer = run.offer()
    run.join(offer, "amber", "birch")
    # A colluder may start, two of three are the quorum, and still: not before the deadline, by the module's clock.
    for _ in range(2):
        assert run.host.refused(start=run.starting(offer)) == "quorum"
    assert run.host.refused(start=run.starting(offer, "cedar")) == "not-a-member"
    forged = run.members["birch"].sign(payload(run.starting(offer).cose))
    assert run.host.refused(start=pb.Start(session=offer.offer.session, cose=forged)) == "signature"
    simulation.ahead_ms += 3_500_000
    run.attest(offer.offer.to_bytes())
    assert run.host.refused(start=run.starting(offer)) == "quorum"
    simulation.ahead_ms += 200_000
    run.attest(offer.offer.to_bytes())
    roster, _ = run.start(offer)
    assert [item.party for item in roster.absentees] == ["cedar"]
    # Cedar comes too late, and its absence stands in what the others sign.
    assert run.host.refused(join=run.parties["cedar"].joining(offer)) == "phase"


def test_nothing_is_computed_without_every_countersignature(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, roster_cose = run.start(offer)
    birch, cedar = run.parties["birch"], run.parties["cedar"]
    good = {name: run.parties[name].consent(offer, roster) for name in NAMES}
    pulled = len(run.host.pulls)
    session = offer.offer.session

    def refused(data: bytes) -> str:
        return run.host.refused(countersign=pb.Countersign(session=session, cose=data))

    # Amber and birch consent; whatever they and the host do, cedar's consent is missing.
    run.host.want("awaiting", countersign=good["amber"])
    run.host.want("awaiting", countersign=good["birch"])
    for _ in range(2):
        assert list(run.host.want("awaiting", countersign=good["amber"]).members) == ["cedar"]
    statement = Countersignature.from_bytes(payload(good["cedar"].cose))
    assert refused(birch.identity.sign(statement.to_bytes())) == "signature"
    assert refused(birch.identity.sign(replace(statement, party="birch").to_bytes())) == "signature"
    forged = Ed25519PrivateKey.generate()
    assert refused(cose.sign(statement.to_bytes(), forged)) == "signature"
    assert refused(payload(good["cedar"].cose)) == "malformed"
    # Cedar's member key without the one-time key: a restored backup, or a second client.
    consent = RosterConsent(roster.digest, "cedar", ())
    cloned = Countersignature(roster.digest, "cedar", (), forged.sign(consent.to_bytes()))
    assert refused(cedar.identity.sign(cloned.to_bytes())) == "signature"
    # Cedar's consent to another roster, and the roster itself in its place.
    other = replace(roster, expires_at=roster.expires_at + 1)
    assert refused(cedar.consent(offer, other).cose) == "roster"
    assert refused(roster_cose) == "malformed"
    # There is no other way: not by starting again, not by telling that it was stored.
    assert run.start(offer)[0] == roster
    assert run.host.refused(stored=pb.Stored(session=session, record=bytes(48))) == "phase"
    assert run.host.refused(begin=pb.Begin(request=os.urandom(16))) == "phase"
    assert run.host.state().phase == "rostered"
    assert len(run.host.pulls) == pulled
    # Cedar refuses: its late consent, which the host may still hold, is worth nothing any more.
    forgery = cose.sign(Refusal(roster.digest, "cedar").to_bytes(), forged)
    assert run.host.refused(refuse=pb.Refuse(session=session, cose=forgery)) == "signature"
    run.host.want("awaiting", refuse=cedar.refusal(offer, roster))
    assert refused(good["cedar"].cose) == "roster"
    assert run.host.state().phase == "open"
    assert len(run.host.pulls) == pulled


def test_a_made_up_former_roster_is_refused(make: Make) -> None:
    run = make(max_releases=2)
    offer = run.offer()
    run.join(offer)
    roster, roster_cose = run.start(offer)
    document = run.document
    run.host.want("awaiting", refuse=run.parties["cedar"].refusal(offer, roster))
    run.join(offer)
    second, _ = run.start(offer)
    amber = run.parties["amber"]

    def refused(made: Roster, cose_of: bytes, offered: bytes | None = None, attested: bytes | None = None) -> str:
        former = pb.FormerRoster(offer=offered or offer.offer.to_bytes(), document=attested or document, cose=cose_of)
        assert Roster.from_bytes(payload(cose_of)) == made
        return run.host.refused(countersign=amber.consent(offer, second, [former]))

    def charged(**changes: Any) -> Roster:
        made = replace(roster, **changes)
        return replace(made, inputs_digest=made.inputs(run.agreement.digest, GENESIS).digest)

    # Rosters that never were: signed by the party, by a key of its own, and under an offer that no module attested.
    other = replace(roster.included[1], uploads=(b"\7" * 48,))
    invented = charged(included=(roster.included[0], other, roster.included[2]))
    assert refused(invented, amber.identity.sign(invented.to_bytes())) == "signature"
    key = Ed25519PrivateKey.generate()
    own = replace(offer.offer, signing_key=key.public_key().public_bytes_raw(), made_at=offer.offer.made_at)
    under = replace(invented, offer=own.digest)
    under = replace(under, inputs_digest=under.inputs(run.agreement.digest, GENESIS).digest)
    assert refused(under, cose.sign(under.to_bytes(), key), own.to_bytes()) == "attestation"
    # A true roster under the offer of another head, or of another series.
    moved = replace(offer.offer, head=b"\7" * 48)
    assert refused(roster, roster_cose, moved.to_bytes()) == "attestation"
    foreign = replace(offer.offer, agreement=b"\7" * 48)
    assert refused(roster, roster_cose, foreign.to_bytes()) == "agreement"
    # The same roster twice, to be charged twice; and the one that is being signed.
    former = pb.FormerRoster(offer=offer.offer.to_bytes(), document=document, cose=roster_cose)
    assert run.host.refused(countersign=amber.consent(offer, second, [former, former])) == "roster"
    # None of it was charged: the true one is of the same inputs and costs nothing, and the release is the first of two.
    answer = run.countersign(offer, second, {"amber": [former]})
    assert Record.from_bytes(payload(released(answer).cose)).body.charged == 1


# What comes out


def test_two_runs_give_the_same_record_body(make: Make) -> None:
    run = make()
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    first = released(run.countersign(offer, roster))
    # The host throws the release away and lets all of it be done again, in the hope of another result.
    run.stored(offer, first)
    run.chain.clear()
    offer = run.offer()
    run.join(offer, "cedar", "birch", "amber")
    roster, _ = run.start(offer)
    second = released(run.countersign(offer, roster))
    one, two = (Record.from_bytes(payload(item.cose)) for item in (first, second))
    assert one.body_bytes == two.body_bytes and one.head == two.head
    assert one.session != two.session and one.roster != two.roster
    assert run.open(first, "amber") == run.open(second, "amber")
    assert not {item.sealed for item in first.outputs} & {item.sealed for item in second.outputs}


# Tables of a party that lies


def hostile_tables(agreement: Agreement, rows: Rows) -> dict[str, tuple[str, Callable[[list[Any]], int | None]]]:
    """How a party may spoil its columns (key, amount, score, site), and the code of the refusal. The change may give the
    number of rows for the manifest."""
    count = len(rows.keys)
    low = np.iinfo("<i8").min

    def at(column: int, place: int | slice, value: Any) -> Callable[[list[Any]], None]:
        def change(columns: list[Any]) -> None:
            columns[column][place] = value

        return change

    def swapped(columns: list[Any]) -> None:
        columns[0][[0, count - 1]] = columns[0][[count - 1, 0]]

    return {
        "keys not sorted": ("order", swapped),
        "a key of padding among the rows": ("order", at(0, 5, table.KEY_PAD)),
        "a null key": ("domain", at(0, 0, table.KEY_NULL)),
        "one unit in all rows": ("multiplicity", at(0, slice(0, count), 4711)),
        "a category out of the domain": ("domain", at(3, 7, 9)),
        "a null in a column without nulls": ("domain", at(3, 7, 0)),
        "an amount above its range": ("range", at(1, 7, 10**12)),
        "the greatest amount": ("range", at(1, 7, np.iinfo("<i8").max)),
        "the least amount": ("range", at(1, 7, low + 1)),
        "an infinity": ("range", at(2, 7, np.inf)),
        "minus infinity": ("range", at(2, 7, -np.inf)),
        "a score beyond its range": ("range", at(2, 7, 10.000001)),
        "a row in the padding": ("rows", at(0, count, 10**15)),
        "a value in the padding": ("rows", at(1, count, 1)),
        "more rows than there are": ("rows", lambda _columns: count + 1),
        "fewer rows than there are": ("rows", lambda _columns: count - 1),
        "more rows than the table holds": ("rows", lambda _columns: 2**63),
        "rows of a smaller bucket": ("rows", lambda _columns: 17),
    }


def test_hostile_columns_are_refused_at_admission(make: Make) -> None:
    run = make(counts=(700, 1500, 700))
    offer = run.offer()
    birch = run.parties["birch"]
    rows = run.rows["birch"]["visits"]
    for name, (code, change) in hostile_tables(run.agreement, rows).items():
        columns = columns_of(run.agreement, "visits", rows)
        count = change(columns)
        spoiled = party_with(birch, reseal(run.agreement, birch, columns, len(rows.keys) if count is None else count))
        run.host.blobs |= spoiled.blobs
        found = run.host.refused(join=spoiled.joining(offer))
        assert found == code, (name, found)
    assert list(run.host.state().joined) == []
    # Sizes that are no bucket, and a header that says another size than the frames have.
    columns = columns_of(run.agreement, "visits", rows)
    for wrong in ({"groups": 9}, {"groups": 1 << 15, "group_rows": 16384}, {"group_rows": 16384}):
        made = reseal(run.agreement, birch, columns, len(rows.keys), header=wrong)
        spoiled = party_with(birch, made)
        run.host.blobs |= spoiled.blobs
        assert run.host.refused(join=spoiled.joining(offer)) in ("schema", "rows", "frame"), wrong
    # Keys that are no keys: too few, too many, of another length.
    share = os.urandom(32)
    digests = tuple(sealed.upload.digest for sealed in birch.sealed)
    info = join_info(offer.digest, "birch", digests)
    for keys in ([], [os.urandom(32)] * 2, [os.urandom(31)], [os.urandom(32)] * 33):
        plain = encode([JoinKeys.LABEL, keys, share])
        sealed_keys = hpke.seal(offer.offer.sealing_key, plain, info)
        assert run.host.refused(join=birch.joining(offer, sealed_keys=sealed_keys)) in ("key", "malformed")
    # It consumed nothing.
    run.join(offer)


def test_fewer_digests_than_frames_are_refused(make: Make) -> None:
    run = make()
    offer = run.offer()
    birch = run.parties["birch"]
    blob, places = frames_of(birch)
    frames = [blob[at : at + length] for at, length in places]
    for some in (frames[:-1], [*frames, frames[-1]], frames[1:]):
        made = party_with(birch, sealed_of(birch, birch.sealed[0].upload.header, some, birch.sealed[0].content_key))
        run.host.blobs |= made.blobs
        assert run.host.refused(join=made.joining(offer)) == "frame"


def crowded(rows: int, site: int, keys: tuple[int, int], amount: int = 100) -> Rows:
    """Rows of one site, one unit each."""
    return Rows(
        keys=np.arange(keys[0], keys[0] + rows, dtype="<u8"),
        amount=np.full(rows, amount, "<i8"),
        score=np.zeros(rows, "<f8"),
        site=np.full(rows, site, "u1"),
    )


@pytest.mark.parametrize("coalition", [1, 0, None])
def test_fake_units_of_one_party_do_not_unhide_a_cell(
    make: Make, simulation: Simulation, coalition: int | None
) -> None:
    """Amber and birch have few people in the north; cedar invents a thousand there, and subtracts them afterwards."""
    members = identities(NAMES)
    agreement = replace(agreement_of(simulation, members), rules=(Rules(None, 10, 1, coalition),))
    tables = {
        "amber": {"visits": crowded(3, 1, (1, 0), amount=41_548)},
        "birch": {"visits": crowded(3, 1, (1, 0))},
        "cedar": {"visits": crowded(1000, 1, (10_000, 0))},
    }
    run = Run(simulation, agreement, members, tables)
    run.load()
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    release = released(run.countersign(offer, roster))
    shown = cells(run.open(release, "cedar")["by_site"], "total")[0]
    if coalition == 0:
        # Without the rule the attack succeeds: the others' total is what is left.
        assert float(shown) - 1000 * 1.00 == pytest.approx(3 * 415.48 + 3 * 1.00)
    else:
        assert shown is None
    run.close()


def nested(agreement: Agreement) -> dict[str, Output]:
    """The output by site, and the total over all sites."""
    by_site = agreement.outputs["by_site"]
    return {"by_site": by_site, "total": replace(by_site, name="total", by=())}


def test_nested_outputs_are_refused(simulation: Simulation) -> None:
    members = identities(NAMES)
    agreement = agreement_of(simulation, members)
    with pytest.raises(AgreementError, match="would show what is hidden"):
        replace(agreement, outputs=nested(agreement))
    # A column twice, and coarser bins of the same number, nest as well.
    column = agreement.tables["visits"].ref("amount")
    assert column is not None
    site = agreement.outputs["by_site"].by[0]
    bins = {
        "fine": Grouping("amount", column, (1000, 2000, 3000), ("a", "b", "c", "d")),
        "coarse": Grouping("amount", column, (2000,), ("a", "b")),
    }
    made = {
        name: replace(agreement.outputs["by_site"], name=name, by=(grouping,), values=(Value("n", Function.COUNT),))
        for name, grouping in bins.items()
    }
    with pytest.raises(AgreementError, match="would show what is hidden"):
        replace(agreement, outputs=made)
    both = {
        "by_site": agreement.outputs["by_site"],
        "finer": replace(made["fine"], name="finer", by=(site, bins["fine"])),
    }
    with pytest.raises(AgreementError, match="would show what is hidden"):
        replace(agreement, outputs=both)
    # Nor do two groupings by different columns stand beside each other: they have the same totals.
    beside = {"by_site": agreement.outputs["by_site"], "fine": made["fine"]}
    with pytest.raises(AgreementError, match="would show what is hidden"):
        replace(agreement, outputs=beside)
    # The enclave refuses it by the same code: an agreement on the wire that nests is no agreement.
    canonical = agreement.canonical
    assert b"by_site" in canonical
    host = Host(simulation.path)
    signatures = dict(signed(agreement, members).signatures)
    decoded: Any = decode(canonical, limit=1 << 23)
    label, form = decoded
    form["outputs"].append({**form["outputs"][0], "name": "total", "by": []})
    bad = pb.SignedAgreement(canonical=encode([label, form]), signatures=signatures)
    assert host.refused(load=pb.Load(agreements=[bad])) in ("agreement", "malformed")


# What the host sees


def exchange(run: Run, rows: dict[str, Rows]) -> list[Any]:
    """Everything with a size or an order that a host sees of one session, without the bytes themselves; first of all how
    many values are hidden, which it does not see."""
    run.parties = {name: Party(run.agreement, name, run.members[name], {"visits": rows[name]}) for name in NAMES}
    run.host.blobs = {number: blob for party in run.parties.values() for number, blob in party.blobs.items()}
    run.host.pulls.clear()
    names = {number: name for name, party in run.parties.items() for number in party.numbers}
    seen: list[Any] = [{name: len(party.sealed[0].blob) for name, party in run.parties.items()}]
    offer = run.offer()
    for name in NAMES:
        seen.append(("joined", len(run.host.want("joined", join=run.parties[name].joining(offer)).receipt)))
    roster, roster_cose = run.start(offer)
    seen.append(("rostered", len(roster_cose)))
    release = released(run.countersign(offer, roster))
    # The document's length varies with the signatures in its certificates.
    seen += [("record", len(release.cose))]
    seen += [(item.output, item.recipient, len(item.sealed)) for item in release.outputs]
    seen += [(names[blob], ranges) for blob, ranges in run.host.pulls]
    run.stored(offer, release)
    # Each is the first session of its series, as far as the enclave is told.
    run.chain.clear()
    hidden = sum(column.hidden for column in run.open(release, "amber")["by_site"].columns)
    return [hidden, *seen]


def test_what_the_host_sees_does_not_depend_on_the_values(make: Make) -> None:
    """Three sessions with tables of the same buckets: people everywhere; nobody but three in one place; other numbers of
    rows and people."""
    run = make(counts=(10, 10, 10))
    everywhere = {name: rows_of(seed, 900) for seed, name in enumerate(NAMES)}
    alone = {name: crowded(900, 2, (seed * 10_000 + 1, 0)) for seed, name in enumerate(NAMES)}
    few = {name: rows_of(seed, count) for seed, (name, count) in enumerate(zip(NAMES, (1, 300, 1024), strict=True), 9)}
    first, second, third = (exchange(run, rows) for rows in (everywhere, alone, few))
    assert first[0] == 0 < second[0], "values are hidden in one and shown in the other, or this shows nothing"
    assert first[1:] == second[1:]
    assert first[1:] == third[1:]
