"""A malicious coordinator against the real client: its operations one by one, at random, and against mutants of the client.

Each operation is what the coordinator answers to one kind of call instead of the truth. The honest side gives the error that
stands beside it; whatever happens, no client accepts another release than that of an undisturbed session, and nothing is
sealed for anybody but an enclave that was verified.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message

from parley import backups
from parley.backups import backup, restore
from parley.contacts import Contacts
from parley.member import Member
from parley.session import Session
from parley.state import Series, State
from parley_deploy.nsm import LocalRoot
from parley_deploy.pki import system_now_ms
from parley_protocol import cose, hpke
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.bundle import Bundle
from parley_protocol.errors import ParleyError, StateError, UnavailableError
from parley_protocol.output import OutputColumn
from parley_protocol.transcript import (
    Absentee,
    Join,
    Offer,
    Receipt,
    Record,
    Roster,
    SealedOutput,
    Upload,
    UploadHeader,
    output_info,
)
from parley_protocol.v1 import coordinator_pb2 as pb
from support.adversary import Call, Cast, Hook, Outcome, Stage, joins_sent, rosters_signed, write_csv
from support.attacks import CHECKERS, refusal
from support.enclave import Simulation, rows_of
from support.mutants import without
from support.world import Paper
from support.world import release as paper_release

pytestmark = pytest.mark.timeout(180)

PARTIES = ("amber", "birch")
ATTACKER = Ed25519PrivateKey.generate()
SEALING = hpke.generate_sealing_key(os.urandom)
OTHER = b"\7" * 48


@pytest.fixture(scope="module")
def players(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cast]:
    folder = tmp_path_factory.mktemp("cast")
    (folder / "enclave").mkdir()
    with Simulation(folder / "enclave") as simulation:
        made = Cast(simulation, folder / "members", PARTIES, ("cyd",), max_releases=10_000, quorum=2)
        made.undisturbed(folder / "undisturbed")
        yield made
        made.host.close()


@pytest.fixture
def stage(players: Cast, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(players, tmp_path / "stage")
    yield made
    made.close()


# The operations


@dataclass(frozen=True)
class Operation:
    """What the coordinator does to the calls `op` of the members `victims`; `answer` gives its reply to one of them.

    `told` is what the honest side says, as (member, step of the session, error): the first of each member.
    """

    name: str
    op: str
    answer: Callable[[Stage, Call], Any]
    told: tuple[tuple[str, str, str], ...]
    victims: tuple[str, ...] = ("birch",)

    def hook(self, stage: Stage) -> Hook:
        """The hook for a stage."""

        def answer(call: Call) -> Any:
            return self.answer(stage, call) if call.member in self.victims else call.honest()

        return answer

    def __str__(self) -> str:
        return self.name


def paper(stage: Stage, root: LocalRoot | None = None, *, pcr16: bytes | None = None, head: bytes = bytes(48)) -> Paper:
    """A module with the right image, under the root of the agreement: what the attacker may have as an enclave."""
    made = Paper(stage.agreement, root or stage.cast.simulation.root, pcr16=pcr16, head=head, now_ms=system_now_ms())
    made.offer = replace(made.offer, session=stage.kept.session, sealing_key=SEALING.public)
    return made


def attested(made: Paper, call: Call) -> pb.AttestReply:
    """The answer of an enclave on paper to the client's nonce."""
    return pb.AttestReply(offer=made.offer.to_bytes(), document=made.attest(call.arguments[1]))


def replayed_document(stage: Stage, call: Call) -> Any:
    """The answer to another caller."""
    return stage.relay.attest(call.member, stage.kept.session, os.urandom(32))


def stale_document(stage: Stage, call: Call) -> Any:
    """A document of the right enclave and nonce from an hour ago, as if the nonce had been known."""
    made = paper(stage)
    made.clock -= 3_600_000
    made.offer = replace(made.offer, made_at=made.clock)
    return attested(made, call)


def other_root(stage: Stage, call: Call) -> Any:
    """An enclave under the attacker's root."""
    return attested(paper(stage, LocalRoot.create(system_now_ms())), call)


def foreign_enclave(stage: Stage, call: Call) -> Any:
    """The right image, loaded with another agreement, that offers what it is told."""
    return attested(paper(stage, pcr16=OTHER), call)


def foreign_offer(stage: Stage, call: Call) -> Any:
    """The offer of another agreement's enclave."""
    made = paper(stage)
    made.offer = replace(made.offer, agreement=OTHER)
    return attested(made, call)


def altered_offer(**changes: Any) -> Callable[[Stage, Call], Any]:
    def answer(_stage: Stage, call: Call) -> Any:
        """The offer of the enclave with other fields, beside the document of the right one."""

        reply = call.honest()
        offer = replace(Offer.from_bytes(reply.offer), **changes)
        return pb.AttestReply(offer=offer.to_bytes(), document=reply.document)

    return answer


def older_head(stage: Stage, call: Call) -> Any:
    """An enclave that was told of other records than the client verified."""
    return attested(paper(stage, head=OTHER), call)


def other_session(stage: Stage, call: Call) -> Any:
    """A good enclave, but not this session's."""
    made = paper(stage)
    made.offer = replace(made.offer, session=os.urandom(16))
    return attested(made, call)


def dropped(_stage: Stage, _call: Call) -> Any:
    """Takes it, and keeps it from everybody."""
    return None


def dropped_join(_stage: Stage, _call: Call) -> Any:
    """Takes the join and answers with nothing."""
    return pb.JoinReply()


def upload_of_another(stage: Stage, call: Call) -> Any:
    """Keeps another party's bytes in place of this party's."""
    digest, signed, blob = call.arguments
    others = [theirs for _, _, theirs in stage.relay.blobs.values() if theirs != blob and len(theirs) == len(blob)]
    return call.honest(digest, signed, others[0]) if others else call.honest()


def truncated_upload(_stage: Stage, call: Call) -> Any:
    """Keeps less than it was given."""
    digest, signed, blob = call.arguments
    return call.honest(digest, signed, blob[:-100])


def reordered_upload(_stage: Stage, call: Call) -> Any:
    """Keeps the bytes in another order."""
    digest, signed, blob = call.arguments
    middle = len(blob) // 2
    return call.honest(digest, signed, blob[:1000] + blob[middle:] + blob[1000:middle])


def join_of_another(stage: Stage, call: Call) -> Any:
    """Hands in another party's join, and gives its receipt."""
    others = [found for found, _ in stage.relay.history if found.op == "put_join" and found.member != call.member]
    return call.honest(call.arguments[0], others[0].arguments[1]) if others else call.honest()


def invented_receipt(stage: Stage, call: Call) -> Any:
    """Invents the receipt; the join goes nowhere."""
    join = Join.from_bytes(cose.payload_unverified(call.arguments[1]))
    receipt = Receipt(join.offer, join.party, join.uploads, join.digest, system_now_ms())
    return pb.JoinReply(receipt=cose.sign(receipt.to_bytes(), ATTACKER))


def invented_roster(_stage: Stage, call: Call) -> Any:
    """Signs the roster itself."""
    reply = call.honest()
    return pb.RosterReply(cose=cose.sign(cose.payload_unverified(reply.cose), ATTACKER))


def altered_roster(_stage: Stage, call: Call) -> Any:
    """Other inputs, under the enclave's signature of the true ones."""
    reply = call.honest()
    roster = Roster.from_bytes(cose.payload_unverified(reply.cose))
    entry = replace(roster.included[0], uploads=(OTHER,))
    data = replace(roster, included=(entry, *roster.included[1:])).to_bytes()
    return pb.RosterReply(cose=reply.cose.replace(cose.payload_unverified(reply.cose), data))


def consent_of_another(stage: Stage, call: Call) -> Any:
    """Hands in another party's countersignature."""
    others = [f for f, _ in stage.relay.history if f.op == "put_countersignature" and f.member != call.member]
    return stage.relay.put_countersignature(others[0].member, *others[0].arguments) if others else call.honest()


def spoiled_bundle(change: Callable[[Stage, Bundle], Bundle]) -> Callable[[Stage, Call], Any]:
    def answer(stage: Stage, call: Call) -> Any:
        """A bundle with one part changed."""
        return change(stage, Bundle.from_bytes(call.honest())).to_bytes()

    return answer


def outputs_of_another(_stage: Stage, bundle: Bundle) -> Bundle:
    recipients = [item.recipient for item in bundle.sealed]
    moved = [
        replace(item, recipient=name) for item, name in zip(bundle.sealed, recipients[1:] + recipients[:1], strict=True)
    ]
    return replace(bundle, sealed=tuple(moved))


def altered_record(_stage: Stage, bundle: Bundle) -> Bundle:
    changed = bytearray(bundle.record)
    changed[len(changed) // 2] ^= 1
    return replace(bundle, record=bytes(changed))


def resealed_output(stage: Stage, bundle: Bundle) -> Bundle:
    """Another table, which the host sealed to the recipient itself: anybody can."""
    head = Record.from_bytes(cose.payload_unverified(bundle.record)).head
    made = []
    for item in bundle.sealed:
        table = stage.cast.tables[item.output]
        changed = replace(table, columns=tuple(_raised(column) for column in table.columns)).to_bytes()
        assert changed != table.to_bytes()
        plain = SealedOutput.of(bytes(32), changed, table.widest).to_bytes()
        public = stage.agreement.members[item.recipient].sealing
        made.append(replace(item, sealed=hpke.seal(public, plain, output_info(head, item.output, item.recipient))))
    return replace(bundle, sealed=tuple(made))


def _raised(column: OutputColumn) -> OutputColumn:
    return replace(column, cells=tuple(cell + 1 if type(cell) is int else cell for cell in column.cells))


def truncated_bundle(_stage: Stage, call: Call) -> Any:
    """Half of the bundle."""
    data = call.honest()
    return data[: len(data) // 2]


def release_of_another_session(stage: Stage, call: Call) -> Any:
    """A release on paper, made and countersigned for these members, as whoever stole all their keys could."""
    identities = {name: member.identity for name, member in stage.members.items()}
    made = paper_release(stage.agreement, stage.cast.simulation.root, identities, now_ms=system_now_ms() - 60_000)
    record = replace(made.record, session=stage.kept.session)
    assert record.session == stage.kept.session
    return made.bundle.to_bytes()


OPERATIONS = (
    Operation("replayed document", "attest", replayed_document, (("birch", "submit", "att-16"),)),
    Operation("stale document", "attest", stale_document, (("birch", "submit", "att-12"),)),
    Operation("another root", "attest", other_root, (("birch", "submit", "att-4"),)),
    Operation("another agreement's enclave", "attest", foreign_enclave, (("birch", "submit", "att-15"),)),
    Operation("another agreement's offer", "attest", foreign_offer, (("birch", "submit", "off-2"),)),
    Operation(
        "altered sealing key", "attest", altered_offer(sealing_key=SEALING.public), (("birch", "submit", "att-17"),)
    ),
    Operation(
        "altered signing key",
        "attest",
        altered_offer(signing_key=ATTACKER.public_key().public_bytes_raw()),
        (("birch", "submit", "att-17"),),
    ),
    Operation("older head", "attest", older_head, (("birch", "submit", "off-6"),)),
    Operation("another session's offer", "attest", other_session, (("birch", "submit", "malformed"),)),
    Operation("upload dropped", "upload", dropped, (("birch", "submit", "unknown-upload"),)),
    Operation("upload of another party", "upload", upload_of_another, (("birch", "submit", "frame"),)),
    Operation("upload truncated", "upload", truncated_upload, (("birch", "submit", "frame"),)),
    Operation("upload reordered", "upload", reordered_upload, (("birch", "submit", "frame"),)),
    Operation("join dropped", "put_join", dropped_join, (("birch", "submit", "malformed"),)),
    Operation("join of another party", "put_join", join_of_another, (("birch", "submit", "rcp-3"),)),
    Operation(
        "invented receipt", "put_join", invented_receipt, (("amber", "start", "quorum"), ("birch", "submit", "rcp-1"))
    ),
    Operation("invented roster", "get_roster", invented_roster, (("birch", "countersign", "ros-1"),)),
    Operation("altered roster", "get_roster", altered_roster, (("birch", "countersign", "ros-1"),)),
    Operation("consent dropped", "put_countersignature", dropped, (("amber", "release", "phase"),)),
    Operation("consent of another party", "put_countersignature", consent_of_another, (("amber", "release", "phase"),)),
    Operation("outputs of another", "bundle", spoiled_bundle(outputs_of_another), (("birch", "release", "idn-4"),)),
    Operation("resealed output", "bundle", spoiled_bundle(resealed_output), (("birch", "release", "bun-9"),)),
    Operation("altered record", "bundle", spoiled_bundle(altered_record), (("birch", "release", "att-17"),)),
    Operation("truncated bundle", "bundle", truncated_bundle, (("birch", "release", "malformed"),)),
    Operation(
        "countersignatures left out",
        "bundle",
        spoiled_bundle(lambda _stage, bundle: replace(bundle, countersignatures=bundle.countersignatures[:1])),
        (("birch", "release", "bun-5"),),
    ),
    Operation("release of another session", "bundle", release_of_another_session, (("birch", "release", "conflict"),)),
)


def first_errors(outcome: Outcome) -> set[tuple[str, str, str]]:
    """The first error of each member."""
    found: dict[str, tuple[str, str, str]] = {}
    for error in outcome.errors:
        found.setdefault(error[0], error)
    return set(found.values())


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_every_operation_of_the_coordinator_is_refused(stage: Stage, operation: Operation) -> None:
    stage.relay.hooks[operation.op] = operation.hook(stage)
    outcome = stage.play()
    assert set(operation.told) <= first_errors(outcome)
    stage.check(outcome, [SEALING])


# What only a client that remembers can refuse


def play_on(stage: Stage, *names: str) -> None:
    """These parties submit."""
    for name in names or PARTIES:
        stage.session(name).submit(stage.table(name))


def countersigned(stage: Stage, name: str) -> list[Roster]:
    """The rosters that a party signed."""
    return [roster for party, roster in rosters_signed(stage.relay) if party == name]


def refuse_as(stage: Stage, name: str) -> None:
    """A party refuses the roster that stands: all join again."""
    stage.session(name).refuse()


def test_an_older_head_is_refused(stage: Stage) -> None:
    first = stage.play()
    assert set(first.releases) == {*PARTIES, "cyd"}
    series = stage.agreement.series
    records = stage.relay.records[series]
    # The host rolls the series back: the enclave hears of no record, and its offer is genuine.
    rolled = stage.relay.begin(stage.agreement.digest, records=[])
    for name in PARTIES:
        assert refusal(lambda name=name: stage.session(name, rolled.session).submit(stage.table(name))) == "off-6"
    assert refusal(lambda: stage.session("cyd", rolled.session).verify()) == "off-6"
    # It tells the client that the chain is empty as well, or shows it again from the start.
    for shown in (lambda _call: [], lambda _call: list(records), lambda call: call.relay.records[series] * 2):
        stage.relay.hooks["chain"] = shown
        assert refusal(lambda: stage.session("birch", rolled.session).submit(stage.table("birch"))) in (
            "off-6",
            "chn-2",
        )
    # A head that no record leads to, and records of the host's making that lead to it.
    made = paper(stage, head=OTHER)
    stage.relay.hooks["attest"] = lambda call: attested(made, call)
    made.offer = replace(made.offer, session=rolled.session)
    assert refusal(lambda: stage.session("birch", rolled.session).verify()) in ("off-6", "chn-2")
    assert not [join for join in joins_sent(stage.relay) if join.offer != first.releases["amber"].verified.offer.digest]


def test_a_release_that_does_not_follow_the_head_is_refused(stage: Stage) -> None:
    outcome = stage.play()
    assert not outcome.errors
    # Another client of birch, from before, is shown a record whose predecessor it does not know: the chain is withheld.
    old = Stage(stage.cast, stage.folder.parent / "old")
    old.relay.sessions = stage.relay.sessions
    old.kept = stage.relay.kept(stage.kept.session)
    old.relay.records = {stage.agreement.series: []}
    identities = {name: member.identity for name, member in stage.members.items()}
    forged = paper_release(
        stage.agreement, stage.cast.simulation.root, identities, OTHER, 2, 2, now_ms=system_now_ms() - 60_000
    )
    session = forged.paper.offer.session
    old.relay.sessions[session] = replace(old.kept, session=session, bundle=forged.bundle.to_bytes())
    assert refusal(lambda: old.session("cyd", session).release()) == "head"
    assert old.session("cyd").release().sequence == 1
    old.close()


def test_an_older_or_foreign_version_is_refused(stage: Stage) -> None:
    member = stage.members["birch"]
    first = stage.agreement
    # A series of the same title and members that birch never signed: nothing is known of it, whoever signed it.
    foreign = replace(first, purpose="Another.")
    assert foreign.title == first.title and foreign.series != first.series
    signed = SignedAgreement(foreign.canonical)
    for name, other in stage.members.items():
        if name != "birch":
            signed = signed.with_signature(name, other.sign(foreign))
    stage.relay.agreements[foreign.digest] = signed
    with pytest.raises(StateError, match="nothing is known"):
        Session(stage.connection("birch"), foreign, stage.kept.session).submit(stage.table("birch"))
    # Birch signs version 2; from then on it joins no session of version 1, however genuine.
    second = replace(first, version=2, replaces=first.digest, series_digest=first.digest, purpose="Amended.")
    member.sign(second)
    with pytest.raises(StateError, match="you signed version 2"):
        stage.session("birch").submit(stage.table("birch"))
    # There is one successor of a version: another one, or an older one again under this number, is not signed.
    for rival in (replace(second, purpose="A rival."), replace(second, title="rival")):
        with pytest.raises(StateError, match="signed already"):
            member.sign(rival)
    assert not joins_sent(stage.relay)


def test_an_agreement_that_is_not_what_was_asked_for_is_refused(stage: Stage) -> None:
    digest = stage.agreement.digest
    analyst = stage.members["cyd"]
    for file in (analyst.state.folder / "agreements").iterdir():
        file.unlink()
    connection = stage.connection("cyd")
    stage.relay.hooks["get_agreement"] = lambda _call: pb.AgreementState(
        canonical=replace(stage.agreement, purpose="Another.").canonical
    )
    assert refusal(lambda: connection.agreement(digest)) == "malformed"

    def unsigned(call: Call) -> Any:
        reply = call.honest()
        reply.signatures["birch"] = reply.signatures["amber"]
        return reply

    stage.relay.hooks["get_agreement"] = unsigned
    assert connection.agreement(digest).missing == ("birch",)
    assert refusal(lambda: stage.session("cyd").verify()) == "agr-7"
    stage.relay.hooks["get_session"] = lambda call: pb.SessionState(session=bytes(16), agreement=digest, phase="open")
    assert refusal(lambda: stage.session("birch").status()) == "malformed"


def test_two_enclaves_are_not_both_fed(stage: Stage, tmp_path: Path) -> None:
    play_on(stage)
    with Simulation(tmp_path) as twin:
        twin.root = stage.cast.simulation.root
        twin.boot()
        host = stage.relay.load(stage.agreement.digest, twin)
        second = stage.relay.begin(stage.agreement.digest, host=host)
        with pytest.raises(StateError, match="two enclaves may not both be fed"):
            stage.session("birch", second.session).submit(stage.table("birch"))
        with pytest.raises(StateError, match="two enclaves may not both be fed"):
            stage.session("birch", second.session).join()
        assert {join.offer for join in joins_sent(stage.relay)} == {
            Join.from_bytes(cose.payload_unverified(j)).offer for j in stage.kept.joins.values()
        }

        # The host lies: the first session is lost. Then birch goes over, and its consent to the first is gone for good.
        def lost(call: Call) -> Any:
            reply = call.honest()
            if call.arguments[0] == stage.kept.session:
                reply.phase, reply.code = "lost", "internal"
            return reply

        stage.relay.hooks["get_session"] = lost
        for name in PARTIES:
            stage.session(name, second.session).submit(stage.table(name))
        stage.relay.hooks.clear()
        stage.session("amber").start()
        stage.session("amber", second.session).start()
        with pytest.raises(StateError, match="used up"):
            stage.session("birch").countersign()
        # Back again it does not go, while the second may still release.
        with pytest.raises(StateError, match="two enclaves may not both be fed"):
            stage.session("birch").submit(stage.table("birch"))
        for name in PARTIES:
            stage.session(name, second.session).countersign()
        assert stage.session("cyd", second.session).release().sequence == 1
        assert {roster.offer for roster in countersigned(stage, "birch")} == {Offer.from_bytes(second.offer).digest}
        host.close()


def test_a_receipt_of_another_join_is_refused(stage: Stage) -> None:
    session = stage.session("birch")
    session.submit(stage.table("birch"))
    stale = stage.relay.answers("put_join")[-1]
    write_csv(stage.folder / "birch.csv", rows_of(55, 600))
    # The host keeps the corrected table to itself and gives the receipt of the first join again.
    stage.relay.hooks["put_join"] = lambda _call: stale
    assert refusal(lambda: session.submit(stage.table("birch"))) == "rcp-3"
    stage.relay.hooks["put_join"] = lambda _call: pb.JoinReply(
        receipt=cose.sign(cose.payload_unverified(stale.receipt), ATTACKER)
    )
    assert refusal(lambda: session.submit(stage.table("birch"))) == "rcp-1"
    receipts = stage.members["birch"].state.receipts()
    assert [kept.cose for kept in receipts] == [stale.receipt]


def withheld_join(stage: Stage) -> None:
    """Birch corrects its table; the host keeps the second join to itself and lets the enclave start with the first."""
    play_on(stage)
    write_csv(stage.folder / "birch.csv", rows_of(55, 600))

    def unanswered(_call: Call) -> Any:
        raise UnavailableError("away")

    stage.relay.hooks["put_join"] = unanswered
    assert refusal(lambda: stage.session("birch").submit(stage.table("birch"))) == "unavailable"
    stage.relay.hooks.clear()
    stage.session("amber").start()


def test_a_roster_with_other_inputs_is_not_signed(stage: Stage) -> None:
    withheld_join(stage)
    with pytest.raises(StateError, match="another join of yours") as caught:
        stage.session("birch").countersign()
    assert caught.value.code == "roster"
    # Not by hand either.
    with pytest.raises(StateError, match="another join of yours"):
        stage.session("birch").countersign(by_hand=True)
    assert not countersigned(stage, "birch")


def test_a_roster_that_leaves_somebody_out_is_not_signed_by_itself(stage: Stage, players: Cast) -> None:
    play_on(stage)
    stage.session("amber").start()

    def without_amber(call: Call) -> Any:

        reply = call.honest()
        roster = Roster.from_bytes(cose.payload_unverified(reply.cose))
        return replace(roster, included=roster.included[1:], absentees=(Absentee("amber", "deadline"),))

    roster = without_amber(Call(stage.relay, "birch", "get_roster", (stage.kept.session,)))
    assert stage.session("birch").check_roster(roster) == ("amber is absent (deadline)",)
    with pytest.raises(StateError, match="leaves you out"):
        stage.session("amber").check_roster(roster)


def second_roster(stage: Stage) -> None:
    """After birch has signed a roster, amber, who colludes, has it end and brings another table."""
    play_on(stage)
    stage.session("amber").start()
    stage.session("birch").countersign()
    refuse_as(stage, "amber")
    write_csv(stage.folder / "amber.csv", rows_of(56, 500))
    play_on(stage)
    stage.session("amber").start()


def test_a_second_roster_over_other_data_is_not_signed(stage: Stage) -> None:
    second_roster(stage)
    before = countersigned(stage, "birch")
    with pytest.raises(StateError, match="other inputs of amber") as caught:
        stage.session("birch").countersign()
    assert caught.value.code == "roster"
    assert countersigned(stage, "birch") == before
    # Told to by hand it signs, names what it signed before, and the release is charged twice.
    for name in ("amber", "birch"):
        stage.session(name).countersign(by_hand=True)
    release = stage.session("birch").release()
    assert release.verified.record.record.body.charged == 2


def test_a_second_roster_over_the_same_data_costs_nothing(stage: Stage) -> None:
    play_on(stage)
    stage.session("amber").start()
    stage.session("birch").countersign()
    refuse_as(stage, "amber")
    play_on(stage)
    stage.session("amber").start()
    for name in PARTIES:
        stage.session(name).countersign()
    release = stage.session("birch").release()
    assert release.verified.record.record.body.charged == 1
    assert release.verified.record.record.head == stage.cast.head
    assert len(countersigned(stage, "birch")) == 2


def test_a_refusal_holds_when_the_host_drops_it(stage: Stage) -> None:
    play_on(stage)
    stage.session("amber").start()
    stage.relay.hooks["refuse"] = lambda call: call.relay.get_session(call.member, call.arguments[0])
    stage.session("birch").refuse()
    assert stage.kept.host.state().phase == "rostered"
    # Whoever signs for birch without asking, such as the client that waits, cannot.
    for by_hand in (False, True):
        with pytest.raises(StateError, match="used up"):
            stage.session("birch").countersign(by_hand=by_hand)
    stage.relay.hooks.clear()
    stage.session("birch").refuse()
    outcome = stage.play()
    assert not outcome.errors
    stage.check(outcome)
    stage.relay.hooks["get_roster"] = lambda _call: pb.RosterReply(cose=stage.kept.roster)
    with pytest.raises(StateError, match="not taken back"):
        stage.session("birch").refuse()


def test_a_restored_backup_cannot_sign_twice(stage: Stage, tmp_path: Path) -> None:
    play_on(stage)
    saved = tmp_path / "birch.backup"
    backup(stage.members["birch"], saved, "correct horse")
    stage.session("amber").start()
    stage.session("birch").countersign()
    clone = Member.load(restore(saved, tmp_path / "restored", "correct horse"))
    assert not clone.state.signed_rosters(bytes(48))
    # The clone does not know that it signed; the one-time key is not in the backup.
    with pytest.raises(StateError, match="used up"):
        stage.session("birch", member=clone).countersign()
    # Nor does a copy of the whole folder sign after the original has: the second consent is another one or none at all.
    refuse_as(stage, "amber")
    with pytest.raises(StateError, match="used up"):
        _countersign(stage, clone)
    assert len(countersigned(stage, "birch")) == 1


def _countersign(stage: Stage, member: Member) -> None:
    """As `countersign`, with the roster that birch signed, which the host shows for ever."""
    stage.relay.hooks["get_roster"] = lambda call: pb.RosterReply(cose=call.relay.rosters()[-1])
    stage.session("birch", member=member).countersign()


def test_a_key_without_its_state_joins_nothing(stage: Stage, tmp_path: Path) -> None:
    key = tmp_path / "birch.key"
    key.write_bytes((stage.folder / "birch.key").read_bytes())
    bare = Member.load(key)
    session = stage.session("birch", member=bare)
    with pytest.raises(StateError, match="nothing is known"):
        session.submit(stage.table("birch"))
    assert not joins_sent(stage.relay)


def test_an_unknown_member_key_is_not_signed(stage: Stage, tmp_path: Path) -> None:
    """The operator drafts the agreement and writes a key of its own beside another member's name (F9)."""
    member = stage.members["amber"]
    sybil = Member.generate("birch", tmp_path)
    drafted = replace(
        stage.agreement, members={**stage.agreement.members, "birch": sybil.public}, purpose="With a Sybil."
    )
    with pytest.raises(StateError, match=f"birch {sybil.fingerprint}"):
        member.sign(drafted)
    with pytest.raises(StateError, match="another key"):
        member.contacts.put("birch", sybil.public)
    # Nor does it help that the key is known under another name, or known and not confirmed.
    member.contacts.put("bella", sybil.public)
    assert [contact.fingerprint for contact in member.contacts.unconfirmed(drafted)] == [sybil.fingerprint]
    with pytest.raises(StateError, match="not signed"):
        member.sign(drafted)
    assert member.state.series(drafted.series) is None


def test_a_changed_file_is_a_new_upload(stage: Stage) -> None:
    session = stage.session("birch")
    path = stage.folder / "birch.csv"
    first = session.seal(stage.table("birch"))[0]
    sent = first.blob.read_bytes()

    def away(_call: Call) -> Any:
        raise UnavailableError("away")

    stage.relay.hooks["upload"] = away
    assert refusal(lambda: session.submit(stage.table("birch"))) == "unavailable"
    # The same file is the same upload, byte for byte: it was sealed once.
    assert session.seal(stage.table("birch"))[0].upload == first.upload
    assert first.blob.read_bytes() == sent
    # One value changes, and everything does: the key, the id, every frame. Two frames under one key and nonce there are not.
    text = path.read_text()
    path.write_text(f"{text}p1,1.00,0.5,north\n")
    second = session.seal(stage.table("birch"))[0]
    assert second.upload != first.upload
    headers = [header_of(sealed.cose) for sealed in (first, second)]
    assert headers[0].upload_id != headers[1].upload_id
    assert headers[0].key_commitment != headers[1].key_commitment
    stage.relay.hooks.clear()
    session.submit(stage.table("birch"))
    (join,) = joins_sent(stage.relay)
    assert join.uploads == (second.upload,)
    # Changed back it is the first upload again, which was never sealed anew.
    path.write_text(text)
    assert session.seal(stage.table("birch"))[0].upload == first.upload
    assert first.blob.read_bytes() == sent


def header_of(signed: bytes) -> UploadHeader:
    """The header of a signed upload."""
    return Upload.from_bytes(cose.payload_unverified(signed)).header


# At random


def spoiled(reply: Any, chance: random.Random) -> Any:
    """The reply with a bit of one of its byte strings flipped; as it is where it has none."""
    if isinstance(reply, bytes):
        place = chance.randrange(len(reply))
        return reply[:place] + bytes([reply[place] ^ 1 << chance.randrange(8)]) + reply[place + 1 :]
    if isinstance(reply, list) and reply:
        place = chance.randrange(len(reply))
        first, second = reply[place]
        return [*reply[:place], (spoiled(first, chance), second), *reply[place + 1 :]]
    if isinstance(reply, Message):
        found = [field.name for field, value in reply.ListFields() if isinstance(value, bytes) and value]
        if found:
            name = chance.choice(found)
            setattr(reply, name, spoiled(getattr(reply, name), chance))
    return reply


def meddling(stage: Stage, chance: random.Random) -> Hook:
    """A hook that does something else at each call, or nothing."""

    def answer(call: Call) -> Any:
        before = [(found, reply) for found, reply in stage.relay.history if found.op == call.op and reply is not None]
        match chance.choice(("honest", "honest", "drop", "replay", "flip", "twice", "swap", "forget")):
            case "drop":
                raise UnavailableError("away")
            case "replay" if before:
                return chance.choice(before)[1]
            case "flip":
                return spoiled(call.honest(), chance)
            case "twice":
                call.honest()
            case "swap" if before and before[-1][0].member != call.member:
                return call.honest(*before[-1][0].arguments)
            case "forget":
                call.honest()
                raise UnavailableError("away")
        return call.honest()

    return answer


OPS = ("attest", "upload", "put_join", "start", "get_roster", "put_countersignature", "bundle", "chain", "get_session")
SEEDS = int(os.environ.get("PARLEY_ADVERSARY_SEEDS", "10"))
LENGTH = 6


def now_and_then(hooks: list[Hook], chance: random.Random) -> Hook:
    """Does what one of the hooks does, once each and at a call of its choice, and is honest else."""
    left = list(hooks)

    def answer(call: Call) -> Any:
        if not left or chance.random() < 0.4:
            return call.honest()
        return left.pop()(call)

    return answer


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_sequences_of_operations(stage: Stage, seed: int) -> None:
    chance = random.Random(seed)
    planned: dict[str, list[Hook]] = {}
    for _ in range(LENGTH):
        operation = chance.choice(OPERATIONS)
        if chance.random() < 0.5:
            planned.setdefault(operation.op, []).append(operation.hook(stage))
        else:
            planned.setdefault(chance.choice(OPS), []).append(meddling(stage, chance))
    stage.relay.hooks = {op: now_and_then(hooks, chance) for op, hooks in planned.items()}
    first = stage.play(tries=3)
    stage.check(first, [SEALING])
    # The same members go on once the host is honest again: their state lets them, and nothing wrong is accepted.
    stage.relay.hooks.clear()
    if len(first.releases) < len(stage.members):
        second = stage.play(tries=2)
        stage.check(second, [SEALING])
        assert set(second.releases) == set(stage.members), second.errors


# Mutants of the client: each of these tests must be able to fail

GETS_FURTHER = {
    "replayed document": ("att-16",),
    "join of another party": ("rcp-3",),
    "invented receipt": ("rcp-1",),
    "invented roster": ("ros-1",),
    "countersignatures left out": ("bun-5",),
}
"""Operations that get past the client without these checks."""
DOES_HARM = {
    "stale document": ("att-12",),
    "another root": ("att-4",),
    "another agreement's enclave": ("att-15",),
    "another agreement's offer": ("off-2",),
    "altered sealing key": ("att-17",),
    "older head": ("off-6",),
    "altered roster": ("ros-1", "ros-5"),
    "resealed output": ("bun-9",),
}
"""Operations after which the invariant does not hold without these checks."""


def mutated(stack: ExitStack, steps: tuple[str, ...]) -> None:
    for step in steps:
        stack.enter_context(without(step, *CHECKERS))


@pytest.mark.parametrize("name", [*GETS_FURTHER, *DOES_HARM])
def test_an_operation_succeeds_against_a_client_without_its_check(stage: Stage, name: str) -> None:
    (operation,) = (found for found in OPERATIONS if found.name == name)
    stage.relay.hooks[operation.op] = operation.hook(stage)
    with ExitStack() as stack:
        mutated(stack, GETS_FURTHER.get(name) or DOES_HARM[name])
        outcome = stage.play()
    assert not [error for error in operation.told if error in first_errors(outcome) and error[0] in operation.victims]
    if name in DOES_HARM:
        with pytest.raises(AssertionError):
            stage.check(outcome, [SEALING])


def test_a_client_that_does_not_compare_the_release_with_its_session(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "_accept", lambda _self, _release: None)
    (operation,) = (found for found in OPERATIONS if found.name == "release of another session")
    stage.relay.hooks[operation.op] = operation.hook(stage)
    outcome = stage.play()
    assert not outcome.errors
    with pytest.raises(AssertionError, match="accepted another"):
        stage.check(outcome)


Test = Callable[..., None]
MUTANTS: dict[str, tuple[Test, Any, str, Any]] = {
    "signs whatever key stands in an agreement": (
        test_an_unknown_member_key_is_not_signed, Contacts, "unconfirmed", lambda *_: ()
    ),
    "joins any number of sessions": (test_two_enclaves_are_not_both_fed, State, "others", lambda *_: []),
    "does not look at the roster": (
        test_a_roster_with_other_inputs_is_not_signed, Session, "check_roster", lambda *_: ()
    ),
    "does not look at former rosters": (
        test_a_second_roster_over_other_data_is_not_signed, Session, "check_roster", lambda *_: ()
    ),
    "takes one-time keys into backups": (
        test_a_restored_backup_cannot_sign_twice, backups, "_LEFT_OUT", ("lock",)
    ),
    "seals a table once for ever": (
        test_a_changed_file_is_a_new_upload,
        Session,
        "_spooled",
        lambda self, table, _source: next((s for _, s in self._state.uploads(self.agreement.digest, table)), None),
    ),
    "forgets what it signed": (
        test_an_older_or_foreign_version_is_refused, Series, "newest", property(lambda self: self.signed[0])
    ),
    "begins a series when it knows nothing of it": (
        test_a_key_without_its_state_joins_nothing,
        Session,
        "_verify",
        lambda self, _trust=None, _real=Session._verify: _real(self, bytes(48) if self._state.series(self.agreement.series) is None else None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_client_is_noticed(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    test, owner, attribute, mutant = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, mutant)
    arguments = {"stage": stage, "tmp_path": tmp_path}
    wanted = {key: value for key, value in arguments.items() if key in inspect.signature(test).parameters}
    with pytest.raises((AssertionError, pytest.fail.Exception, ParleyError)):
        test(**wanted)
