"""What a client refuses to do, whatever the coordinator says: each rule with its typed error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parley import Member
from parley_protocol import cose, hpke
from parley_protocol.agreement.model import Consent
from parley_protocol.bundle import BundledOutput
from parley_protocol.chain import ChainState
from parley_protocol.claims import needs_countersignatures
from parley_protocol.errors import RefusedError, StateError, UnavailableError, VerificationError
from parley_protocol.transcript import (
    GENESIS,
    NO_ROSTER_KEY,
    Countersignature,
    Join,
    KmsJoin,
    Receipt,
    Record,
    Roster,
    SealedOutput,
    output_info,
    record_user_data,
    share_digest,
)
from parley_protocol.v1 import coordinator_pb2 as pb
from support.client import frame_of
from support.kms import arn
from support.paperwire import Desk, PaperSession, both_join, now_ms, payload, session_of
from support.world import SALT, release


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    made = Desk(tmp_path)
    made.sign()
    return made


# Signing an agreement


def test_a_member_whose_fingerprint_is_not_confirmed_stops_the_signature(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    ada = desk.members["ada"]
    ada.contacts.remove("bea")
    with pytest.raises(StateError, match=f"bea {desk.members['bea'].fingerprint}"):
        desk.connect("ada").sign(desk.agreement)
    # Known is not confirmed, and confirmed under another name is another member.
    ada.contacts.put("bea", desk.members["bea"].public)
    with pytest.raises(StateError, match="compare these fingerprints"):
        desk.connect("ada").sign(desk.agreement)
    ada.contacts.remove("bea")
    ada.contacts.put("a friend", desk.members["bea"].public)
    ada.contacts.confirm("a friend", desk.members["bea"].fingerprint)
    with pytest.raises(StateError, match="compare these fingerprints"):
        desk.connect("ada").sign(desk.agreement)
    assert ada.state.series(desk.agreement.series) is None
    ada.contacts.put("bea", desk.members["bea"].public)
    ada.contacts.confirm("bea", desk.members["bea"].fingerprint)
    status = desk.connect("ada").sign(desk.agreement)
    assert status.missing == ("bea", "cyd")


def test_one_successor_of_a_version_is_signed_and_no_older_version(desk: Desk) -> None:
    second, other = desk.amended(), desk.amended(purpose="A third purpose.")
    ada = desk.connect("ada")
    ada.sign(second)
    ada.sign(second)
    with pytest.raises(StateError, match="is signed already"):
        ada.sign(other)
    series = ada.member.state.series(desk.agreement.series)
    assert series is not None and [entry.version for entry in series.signed] == [1, 2]
    third = replace(desk.amended(), version=3, replaces=other.digest)
    with pytest.raises(StateError, match="does not replace the version 2"):
        ada.sign(third)


def test_an_amendment_of_an_unknown_series_needs_a_trusted_head(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with pytest.raises(StateError, match="trust a head"):
        desk.connect("ada").sign(desk.amended())
    desk.connect("ada").sign(desk.amended(), trust_head=b"\1" * 48)
    series = desk.members["ada"].state.series(desk.agreement.digest)
    assert series is not None and (series.head, series.anchored) == (b"\1" * 48, 0)


def test_a_lost_state_does_not_sign_the_series_into_being_again(desk: Desk) -> None:
    state = desk.members["ada"].state.folder
    (state / "series" / desk.agreement.series.hex()).unlink()
    with pytest.raises(StateError, match="your state of it is lost"):
        desk.connect("ada").sign(desk.agreement)


def test_a_signature_that_does_not_hold_is_one_that_is_missing(desk: Desk) -> None:
    signed = desk.wire.agreements[desk.agreement.digest]
    forged = desk.members["cyd"].identity.sign(cose.payload_unverified(signed.signatures["bea"]))
    desk.wire.agreements[desk.agreement.digest] = signed.with_signature("bea", forged)
    status = desk.connect("cyd").agreement(desk.agreement.digest)
    assert status.missing == ("bea",)
    opened = desk.wire.open()
    (desk.members["cyd"].state.folder / "agreements" / f"{desk.agreement.digest.hex()}.parley").unlink()
    with pytest.raises(VerificationError, match="agr-7"):
        session_of(desk, "cyd", opened).verify()


# Verifying and joining


def test_without_state_nothing_is_joined(desk: Desk, tmp_path: Path) -> None:
    opened = desk.wire.open()
    (desk.members["ada"].state.folder / "series" / desk.agreement.series.hex()).unlink()
    session = session_of(desk, "ada", opened)
    with pytest.raises(StateError, match="restore your state, or trust a head"):
        session.submit({"visits": frame_of(1)})
    assert not desk.wire.sent and not desk.wire.uploaded
    session.submit({"visits": frame_of(1)}, trust_head=GENESIS)


def test_a_trusted_head_must_lie_on_the_chain(desk: Desk) -> None:
    done = _released(desk)
    opened = desk.wire.open(head=done)
    for head, fits in ((b"\7" * 48, False), (done, True)):
        (desk.members["ada"].state.folder / "series" / desk.agreement.series.hex()).unlink()
        session = session_of(desk, "ada", opened)
        if fits:
            assert session.verify(trust_head=head).offer.head == done
        else:
            with pytest.raises(VerificationError, match="off-6"):
                session.verify(trust_head=head)


def _released(desk: Desk) -> bytes:
    """A release of a session in which our clients took no part; the new head."""
    identities = {name: member.identity for name, member in desk.members.items()}
    made = release(desk.agreement, desk.root, identities, now_ms=now_ms())
    desk.wire.records.append((made.bundle.record, made.record_document))
    desk.wire.heads.append(made.record.head)
    return made.record.head


def test_a_head_is_accepted_when_it_follows_and_never_goes_back(desk: Desk) -> None:
    head = _released(desk)
    other = desk.wire.open(head=b"\5" * 48)
    with pytest.raises(VerificationError, match="off-6") as caught:
        session_of(desk, "ada", other).submit({"visits": frame_of(1)})
    assert caught.value.code == "head"
    genesis, following = desk.wire.open(), desk.wire.open(head=head)
    session_of(desk, "ada", following).submit({"visits": frame_of(1)})
    series = desk.members["ada"].state.series(desk.agreement.series)
    assert series is not None and (series.head, series.sequence) == (head, 1)
    # The host rolls back: it offers the old head, or hides the record.
    with pytest.raises(VerificationError, match="off-6"):
        session_of(desk, "ada", genesis).verify()
    desk.wire.records.clear()
    desk.wire.heads.clear()
    with pytest.raises(VerificationError, match="off-6"):
        session_of(desk, "ada", genesis).verify()


def test_a_forged_record_moves_no_head(desk: Desk) -> None:
    head = _released(desk)
    record, document = desk.wire.records[0]
    desk.wire.records[0] = (record[:-1] + bytes([record[-1] ^ 1]), document)
    with pytest.raises(VerificationError, match="rec-3"):
        session_of(desk, "ada", desk.wire.open(head=head)).verify()


def test_only_the_newest_signed_version_is_joined(desk: Desk) -> None:
    second = desk.amended()
    desk.connect("ada").sign(second)
    with pytest.raises(StateError, match="you signed version 2"):
        session_of(desk, "ada", desk.wire.open()).submit({"visits": frame_of(1)})
    assert not desk.wire.sent


def test_two_enclaves_under_one_head_are_not_both_fed(desk: Desk) -> None:
    first, second = desk.wire.open(), desk.wire.open()
    session_of(desk, "ada", first).submit({"visits": frame_of(1)})
    with pytest.raises(StateError, match="two enclaves may not both be fed"):
        session_of(desk, "ada", second).submit({"visits": frame_of(1)})
    assert [kind for kind, _ in desk.wire.sent] == ["join"]
    first.phase = "lost"
    session_of(desk, "ada", second).join()
    assert [kind for kind, _ in desk.wire.sent] == ["join", "join"]
    # What was lost stays lost in the client's own view: its one-time key is gone.
    before = payload(Join, desk.wire.sent[0][1])
    assert not desk.members["ada"].state.has_roster_key(before.roster_key)
    # The same uploads, the same noise share, another one-time key.
    after = payload(Join, desk.wire.sent[1][1])
    assert (before.uploads, before.share_digest) == (after.uploads, after.share_digest)
    assert before.roster_key != after.roster_key


def test_a_session_that_the_coordinator_does_not_know_any_more_is_lost(desk: Desk) -> None:
    """Its store was restored from a backup: whoever had joined would otherwise join nothing ever again."""
    first, second = desk.wire.open(), desk.wire.open()
    session_of(desk, "ada", first).submit({"visits": frame_of(1)})
    del desk.wire.sessions[first.paper.offer.session]
    session_of(desk, "ada", second).join()
    before = payload(Join, desk.wire.sent[0][1])
    assert not desk.members["ada"].state.has_roster_key(before.roster_key)
    joined = desk.members["ada"].state.joined(first.paper.offer.session)
    assert joined is not None
    assert joined.view == "lost"


@pytest.mark.parametrize("field", ["join", "uploads", "party", "offer"])
def test_a_receipt_for_something_else_is_no_receipt(desk: Desk, field: str) -> None:
    opened = desk.wire.open()
    honest = desk.wire.put_join

    def lying(session: bytes, signed: bytes) -> pb.JoinReply:
        receipt = payload(Receipt, honest(session, signed).receipt)
        wrong: dict[str, Any] = {"join": b"\1" * 48, "uploads": (b"\1" * 48,), "party": "bea", "offer": b"\1" * 48}
        return pb.JoinReply(receipt=opened.paper.sign(replace(receipt, **{field: wrong[field]})))

    desk.wire.put_join = lying  # type: ignore[method-assign]
    with pytest.raises(VerificationError, match=r"rcp-[23]"):
        session_of(desk, "ada", opened).submit({"visits": frame_of(1)})
    assert not desk.members["ada"].state.receipts()


def test_a_refused_join_names_its_code(desk: Desk) -> None:
    desk.wire.put_join = lambda session, signed: pb.JoinReply(code="multiplicity")  # type: ignore[method-assign]
    with pytest.raises(RefusedError) as caught:
        session_of(desk, "ada", desk.wire.open()).submit({"visits": frame_of(1)})
    assert caught.value.code == "multiplicity"


def test_a_join_that_got_no_answer_is_sent_again_as_it_is(desk: Desk) -> None:
    opened = desk.wire.open()
    honest, desk.wire.put_join = desk.wire.put_join, _unanswered  # type: ignore[method-assign]
    frame = frame_of(1)
    with pytest.raises(RefusedError):
        session_of(desk, "ada", opened).submit({"visits": frame})
    kept = desk.members["ada"].state.joined(opened.paper.offer.session)
    assert kept is not None
    desk.wire.put_join = honest  # type: ignore[method-assign]
    session_of(desk, "ada", opened).submit({"visits": frame})
    session_of(desk, "ada", opened).submit({"visits": frame})
    assert [signed for _, signed in desk.wire.sent] == [kept.join_cose]


def test_a_join_whose_key_was_used_up_before_it_was_answered_is_made_anew(desk: Desk) -> None:
    """It stood in a roster that has ended, and this member has no receipt of it: the same join is refused for good."""
    opened = desk.wire.open()
    honest, desk.wire.put_join = desk.wire.put_join, _unanswered  # type: ignore[method-assign]
    frame = frame_of(1)
    with pytest.raises(RefusedError):
        session_of(desk, "ada", opened).submit({"visits": frame})
    kept = desk.members["ada"].state.joined(opened.paper.offer.session)
    assert kept is not None

    def ended(session: bytes, signed: bytes) -> pb.JoinReply:
        return pb.JoinReply(code="conflict") if signed == kept.join_cose else honest(session, signed)

    desk.wire.put_join = ended  # type: ignore[method-assign]
    session_of(desk, "ada", opened).submit({"visits": frame})
    ((_, signed),) = desk.wire.sent
    assert payload(Join, signed).uploads == kept.join.uploads
    state = desk.members["ada"].state
    assert state.has_roster_key(payload(Join, signed).roster_key)
    assert not state.has_roster_key(kept.join.roster_key)


def test_a_conflict_of_a_new_join_is_told(desk: Desk) -> None:
    desk.wire.put_join = lambda session, signed: pb.JoinReply(code="conflict")  # type: ignore[method-assign]
    with pytest.raises(RefusedError) as caught:
        session_of(desk, "ada", desk.wire.open()).submit({"visits": frame_of(1)})
    assert caught.value.code == "conflict"


def _unanswered(session: bytes, signed: bytes) -> pb.JoinReply:
    raise RefusedError("internal")


# Rosters


def test_the_key_is_gone_and_the_signature_on_disk_before_it_is_sent(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    roster = opened.issue()
    state = desk.members["ada"].state
    seen: list[tuple[bool, bool]] = []
    honest = desk.wire.put_countersignature

    def looking(session: bytes, signed: bytes, former: list[Any]) -> pb.SessionState:
        on_disk = (state.folder / "rosters" / roster.digest.hex()).is_file()
        seen.append((on_disk, state.has_roster_key(opened.joins["ada"].roster_key)))
        raise RefusedError("internal") if len(seen) == 1 else RefusedError("busy")

    desk.wire.put_countersignature = looking  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(RefusedError):
            session_of(desk, "ada", opened).countersign()
    assert seen == [(True, False)] * 2
    desk.wire.put_countersignature = honest  # type: ignore[method-assign]
    session_of(desk, "ada", opened).countersign()
    session_of(desk, "ada", opened).countersign()
    sent = [signed for kind, signed in desk.wire.sent if kind == "countersignature"]
    assert len(set(sent)) == 1, "resent as it is"


def test_a_second_roster_of_one_join_is_never_signed(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    session_of(desk, "ada", opened).countersign()
    opened.issue(expires_at=now_ms() + 700_000)
    for by_hand in (False, True):
        with pytest.raises(StateError, match="one-time key of this join is used up"):
            session_of(desk, "ada", opened).countersign(by_hand=by_hand)


@pytest.mark.parametrize("field", ["uploads", "share_digest", "join", "roster_key"])
def test_a_roster_with_another_entry_of_ours_is_never_signed(desk: Desk, field: str) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    honest = opened.issue()
    wrong: dict[str, Any] = {
        "uploads": (b"\1" * 48,),
        "share_digest": b"\1" * 48,
        "join": b"\1" * 48,
        "roster_key": b"\1" * 32,
    }
    changed = tuple(
        replace(entry, **{field: wrong[field]}) if entry.party == "ada" else entry for entry in honest.included
    )
    opened.issue(included=changed)
    for by_hand in (False, True):
        with pytest.raises(StateError, match="another join of yours") as caught:
            session_of(desk, "ada", opened).countersign(by_hand=by_hand)
        assert caught.value.code == "roster"
    assert not [kind for kind, _ in desk.wire.sent if kind == "countersignature"]


def test_a_roster_with_an_absentee_is_signed_by_hand_alone(tmp_path: Path) -> None:
    desk = Desk(tmp_path, quorum=1)
    desk.sign()
    opened = desk.wire.open()
    session_of(desk, "ada", opened).submit({"visits": frame_of(1)})
    opened.issue(absent=("bea",))
    session = session_of(desk, "ada", opened)
    with pytest.raises(StateError, match=r"not signed by itself: bea is absent \(deadline\)"):
        session.countersign()
    with pytest.raises(StateError, match="bea is absent"):
        session.wait(timeout_s=0)
    session.countersign(by_hand=True)
    assert [kind for kind, _ in desk.wire.sent] == ["join", "countersignature"]


def test_an_expired_roster_is_not_signed(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue(expires_at=now_ms() - 1)
    with pytest.raises(RefusedError) as caught:
        session_of(desk, "ada", opened).countersign()
    assert caught.value.code == "expired"
    assert desk.members["ada"].state.has_roster_key(opened.joins["ada"].roster_key)


def test_a_roster_of_another_key_is_not_one(desk: Desk) -> None:
    opened, other = desk.wire.open(), desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    opened.roster_cose = other.paper.sign(opened.roster)  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match="ros-1"):
        session_of(desk, "ada", opened).countersign()


def _second_roster(desk: Desk, *, changed: bool) -> tuple[PaperSession, Roster]:
    """ada has signed a roster in a session that is lost; in the next one bea brings other inputs or the same."""
    first = desk.wire.open()
    both_join(desk, first)
    signed = first.issue()
    session_of(desk, "ada", first).countersign()
    first.phase = "lost"
    second = desk.wire.open()
    session_of(desk, "ada", second).join()
    session_of(desk, "bea", second).join()
    if changed:
        second.joins["bea"] = replace(second.joins["bea"], share_digest=share_digest(bytes(32)))
    second.issue()
    return first, signed


def test_the_same_inputs_are_signed_again_and_the_former_roster_is_named(desk: Desk) -> None:
    first, signed = _second_roster(desk, changed=False)
    second = list(desk.wire.sessions.values())[-1]
    session_of(desk, "ada", second).countersign()
    statement = payload(Countersignature, desk.wire.sent[-1][1])
    assert statement.former == (signed.digest,)
    offer, _, roster = desk.wire.former[-1][0]
    assert offer == first.paper.offer.to_bytes() and roster == first.roster_cose


def test_other_inputs_under_one_head_are_signed_by_hand_alone_and_named(desk: Desk) -> None:
    _, signed = _second_roster(desk, changed=True)
    second = list(desk.wire.sessions.values())[-1]
    with pytest.raises(StateError, match="before, with other inputs of bea"):
        session_of(desk, "ada", second).countersign()
    assert desk.members["ada"].state.has_roster_key(second.joins["ada"].roster_key)
    session_of(desk, "ada", second).countersign(by_hand=True)
    assert payload(Countersignature, desk.wire.sent[-1][1]).former == (signed.digest,)


def test_another_set_of_parties_under_one_head_is_signed_by_hand_alone(tmp_path: Path) -> None:
    desk = Desk(tmp_path, quorum=1)
    desk.sign()
    first = desk.wire.open()
    session_of(desk, "ada", first).submit({"visits": frame_of(1)})
    first.issue(absent=("bea",))
    session_of(desk, "ada", first).countersign(by_hand=True)
    first.phase = "lost"
    # Nobody is absent now, and ada's inputs are the same: what the two releases differ by is bea's.
    second = desk.wire.open()
    session_of(desk, "ada", second).join()
    session_of(desk, "bea", second).submit({"visits": frame_of(2)})
    roster = second.issue()
    assert not roster.absentees
    with pytest.raises(StateError, match="before, with other inputs of bea"):
        session_of(desk, "ada", second).countersign()


def test_who_refuses_does_not_sign_and_who_signed_does_not_refuse(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    with pytest.raises(RefusedError, match="no roster stands"):
        session_of(desk, "ada", opened).refuse()
    opened.issue()
    session_of(desk, "bea", opened).refuse()
    assert desk.wire.sent[-1][0] == "refusal"
    session_of(desk, "ada", opened).countersign()
    with pytest.raises(StateError, match="you have signed this roster"):
        session_of(desk, "ada", opened).refuse()


def test_who_may_not_start_does_not(desk: Desk) -> None:
    opened = desk.wire.open()
    with pytest.raises(RefusedError, match="cyd may not start; ada may"):
        session_of(desk, "cyd", opened).start()


# Releases


def _bundle(desk: Desk, opened: PaperSession, *, sign: bool = True) -> bytes:
    """The bundle of a session on paper whose roster both parties signed, where the agreement wants that."""
    if sign and needs_countersignatures(desk.agreement):
        for name in ("ada", "bea"):
            session_of(desk, name, opened).countersign()
    identities = {name: member.identity for name, member in desk.members.items()}
    made = release(desk.agreement, desk.root, identities, opened.paper.offer.head, now_ms=now_ms())
    roster = opened.roster
    assert roster is not None
    body = replace(made.record.body, inputs=tuple(entry.input for entry in roster.included))
    record = Record(body.to_bytes(), opened.paper.offer.session, opened.paper.offer.digest, roster.digest)
    consents = [signed for kind, signed in desk.wire.sent if kind == "countersignature"]
    sealed = SealedOutput.of(SALT, made.plaintext, 1000).to_bytes()
    bundle = replace(
        made.bundle,
        offer=opened.paper.offer.to_bytes(),
        offer_document=opened.paper.attest(),
        roster=opened.roster_cose,
        countersignatures=tuple(consents) if sign else made.bundle.countersignatures,
        record=opened.paper.sign(record),
        record_document=opened.paper.document(record_user_data(record.to_bytes()), None),
        sealed=tuple(
            BundledOutput(
                "by_site",
                name,
                hpke.seal(desk.agreement.members[name].sealing, sealed, output_info(record.head, "by_site", name)),
            )
            for name in desk.agreement.outputs["by_site"].recipients
        ),
        opened=(),
    )
    desk.wire.bundles[opened.paper.offer.session] = bundle.to_bytes()
    desk.wire.records.append((bundle.record, bundle.record_document))
    desk.wire.heads.append(record.head)
    opened.phase = "released"
    return record.head


def test_a_release_is_verified_and_then_the_head_moves(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    head = _bundle(desk, opened)
    for name in ("ada", "cyd"):
        found = session_of(desk, name, opened).release()
        assert list(found) == ["by_site"]
        series = desk.members[name].state.series(desk.agreement.series)
        assert series is not None and (series.head, series.sequence, series.charged) == (head, 1, 1)
    # From its own files, without the coordinator.
    desk.wire.bundles.clear()
    assert session_of(desk, "ada", opened).release().sequence == 1
    joined = desk.members["ada"].state.joined(opened.paper.offer.session)
    assert joined is not None and joined.view == "released"


def test_a_release_of_a_roster_that_was_not_signed_here_moves_nothing(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    _bundle(desk, opened)
    (desk.members["ada"].state.folder / "rosters" / opened.roster.digest.hex()).unlink()  # type: ignore[union-attr]
    with pytest.raises(StateError, match="roster that you did not sign"):
        session_of(desk, "ada", opened).release()
    series = desk.members["ada"].state.series(desk.agreement.series)
    assert series is not None and series.head == GENESIS
    assert desk.members["ada"].state.release(opened.paper.offer.session) is None


def test_the_release_of_another_session_is_refused(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    _bundle(desk, opened)
    other = desk.wire.open()
    desk.wire.bundles[other.paper.offer.session] = desk.wire.bundles[opened.paper.offer.session]
    with pytest.raises(StateError, match="release of another session"):
        session_of(desk, "cyd", other).release()


def test_a_release_that_does_not_follow_the_known_head_is_refused(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    _bundle(desk, opened)
    desk.wire.records.clear()
    desk.wire.heads.clear()
    rival = _released(desk)
    session_of(desk, "cyd", desk.wire.open(head=rival)).verify()
    state = desk.members["cyd"].state
    state.move_head(desk.agreement.series, ChainState(rival, 1, 1, 1))
    with pytest.raises(StateError, match="forked") as caught:
        session_of(desk, "cyd", opened).release()
    assert caught.value.code == "head"


def test_an_altered_bundle_is_refused(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    _bundle(desk, opened, sign=False)
    with pytest.raises(VerificationError, match=r"cos-1|bun-5"):
        session_of(desk, "cyd", opened).release()


def test_the_wait_of_a_lost_session_says_so(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.phase = "lost"
    with pytest.raises(RefusedError) as caught:
        session_of(desk, "ada", opened).wait()
    assert caught.value.code == "lost"
    joined = desk.members["ada"].state.joined(opened.paper.offer.session)
    assert joined is not None and joined.view == "lost"


def test_after_a_lapsed_roster_the_wait_joins_again_with_a_new_key(desk: Desk) -> None:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    session_of(desk, "ada", opened).countersign()
    opened.joins.clear()
    opened.roster, opened.phase = None, "open"
    before = payload(Join, desk.wire.sent[0][1])
    session_of(desk, "ada", opened).wait(timeout_s=0)
    after = opened.joins["ada"]
    assert after.roster_key != before.roster_key and after.uploads == before.uploads


def test_the_offer_of_a_session_does_not_change(desk: Desk) -> None:
    opened = desk.wire.open()
    session_of(desk, "ada", opened).submit({"visits": frame_of(1)})
    paper = desk.wire.open().paper
    paper.offer = replace(paper.offer, session=opened.paper.offer.session)
    opened.paper = paper
    with pytest.raises(StateError, match="another offer before"):
        session_of(desk, "ada", opened).join()


def test_a_stranger_takes_no_part(desk: Desk, tmp_path: Path) -> None:
    stranger = Member.generate("eve", tmp_path / "eve")
    with pytest.raises(RefusedError, match="your key is not in"):
        stranger.name_in(desk.agreement)


def test_an_amendment_that_all_signed_is_joined_under_the_head_that_it_follows(desk: Desk) -> None:
    head = _released(desk)
    second = desk.amended()
    desk.sign(second)
    opened = desk.wire.open(second, head=head)
    session_of(desk, "ada", opened).submit({"visits": frame_of(1)})
    series = desk.members["ada"].state.series(desk.agreement.series)
    assert series is not None and (series.head, series.newest.version) == (head, 2)
    # The host opens the older version again, which is still validly signed.
    with pytest.raises(StateError, match="you signed version 2"):
        session_of(desk, "ada", desk.wire.open(head=head)).verify()


def test_an_amendment_that_one_member_did_not_sign_is_not_joined(desk: Desk) -> None:
    second = desk.amended()
    for name in ("ada", "bea"):
        desk.connect(name).sign(second)
    with pytest.raises(VerificationError, match=r"agr-7: not signed by cyd"):
        session_of(desk, "ada", desk.wire.open(second)).submit({"visits": frame_of(1)})
    assert not desk.wire.sent and not desk.wire.uploaded


def test_with_standing_consent_no_roster_is_signed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, consent=Consent.STANDING)
    desk.sign()
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    session = session_of(desk, "ada", opened)
    session.wait(timeout_s=0)
    with pytest.raises(RefusedError, match="standing consent"):
        session.countersign(by_hand=True)
    assert {kind for kind, _ in desk.wire.sent} == {"join"}


@pytest.mark.parametrize("answered", [True, False])
def test_with_standing_consent_a_table_that_came_too_late_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """The release is of what was joined before, whether or not the member knew that it had arrived."""
    desk = Desk(tmp_path, consent=Consent.STANDING)
    desk.sign()
    opened = desk.wire.open()
    both_join(desk, opened)
    session = session_of(desk, "ada", opened)
    if not answered:
        joined = desk.members["ada"].state.joined(session.id)
        assert joined is not None
        path = desk.members["ada"].state.folder / "sessions" / session.id.hex()
        path.write_bytes(replace(joined, receipt_cose=b"").to_bytes())
    opened.issue()

    def closed(_session: bytes, _cose: bytes) -> pb.JoinReply:
        raise RefusedError("phase")

    monkeypatch.setattr(desk.wire, "put_join", closed)
    with pytest.raises(RefusedError) as late:
        session.submit({"visits": frame_of(7)})
    assert late.value.code == "phase"
    _bundle(desk, opened)
    assert session.release().sequence == 1


@pytest.mark.parametrize("answered", [True, False])
def test_with_standing_consent_a_release_of_a_replaced_join_is_refused_where_a_receipt_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """Without a receipt the enclave may not have had the later join; with one the former is gone, for later joins too."""
    desk = Desk(tmp_path, consent=Consent.STANDING)
    desk.sign()
    opened = desk.wire.open()
    both_join(desk, opened)
    former = opened.joins["ada"]
    session = session_of(desk, "ada", opened)

    def lost(_session: bytes, _cose: bytes) -> pb.JoinReply:
        raise UnavailableError("no answer")

    if answered:
        session.submit({"visits": frame_of(7)})
    monkeypatch.setattr(desk.wire, "put_join", lost)
    with pytest.raises(UnavailableError):
        session.submit({"visits": frame_of(8)})
    opened.joins["ada"] = former
    opened.issue()
    _bundle(desk, opened)
    if answered:
        with pytest.raises(StateError, match="other uploads of yours than you joined"):
            session.release()
    else:
        assert session.release().sequence == 1


@pytest.mark.parametrize("own", [True, False])
def test_with_standing_consent_a_release_of_another_kms_join_is_refused(tmp_path: Path, own: bool) -> None:
    desk = Desk(tmp_path, consent=Consent.STANDING, kms={"ada": arn()})
    desk.sign()
    ada, agreement = desk.members["ada"], desk.agreement

    def join(number: int) -> KmsJoin:
        uploads = (bytes([number]) * 48,)
        return KmsJoin(agreement.digest, "ada", uploads, b"ciphertext", share_digest(bytes(32)), NO_ROSTER_KEY, number)

    ada.state.begin_kms_join(agreement.series, agreement.digest, None, lambda _: ada.identity.sign(join(1).to_bytes()))
    opened = desk.wire.open()
    session_of(desk, "bea", opened).submit({"visits": frame_of(1)})
    opened.joins["ada"] = join(1 if own else 2)
    opened.issue()
    _bundle(desk, opened)
    session = session_of(desk, "ada", opened)
    if own:
        assert session.release().sequence == 1
    else:
        with pytest.raises(StateError, match="other uploads of yours than you joined"):
            session.release()
