"""What a client does and refuses to do with a join by KMS, whatever the coordinator says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from parley import Member, backup, restore
from parley.kms import Key
from parley_protocol import kms_policy
from parley_protocol.agreement.model import Consent
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import RefusedError, StateError, UnavailableError
from parley_protocol.kms_policy import Principals
from parley_protocol.transcript import KmsJoin, key_commitment, kms_context, share_digest
from support.client import frame_of
from support.kms import PaperKms, arn
from support.paperwire import Desk, PaperSession, session_of

KEY = arn()
ROLE, ADMIN = "arn:aws:iam::111122223333:role/parley", "arn:aws:iam::444455556666:role/admin"
PRINCIPALS = Principals(ROLE, (ADMIN,), (ADMIN,))


class PaperKey:
    """A key that is as agreed, or as a test says."""

    def __init__(self, desk: Desk) -> None:
        self.arn = KEY.text
        self.live: dict[str, Any] = kms_policy.policy_of(desk.agreement, PRINCIPALS)
        self.kms = PaperKms()
        self.encrypted: list[tuple[bytes, dict[str, str]]] = []

    def policy(self) -> dict[str, Any]:
        return kms_policy.read(__import__("json").dumps(self.live))

    def grants(self) -> tuple[Any, ...]:
        return ()

    def facts(self) -> tuple[str, ...]:
        return ()

    def encrypt(self, plaintext: bytes, context: dict[str, str]) -> bytes:
        self.encrypted.append((plaintext, context))
        return self.kms.encrypt(plaintext, context)


class Stage(Desk):
    """ada has a KMS key."""

    def __init__(self, folder: Path, **session: Any) -> None:
        super().__init__(folder, kms={"ada": KEY}, **session)
        self.sign()
        self.key = PaperKey(self)
        self.members["ada"].state.remember_principals(KEY.text, PRINCIPALS)

    def submit(self, opened: PaperSession, seed: int = 1) -> KmsJoin:
        found = session_of(self, "ada", opened).submit({"visits": frame_of(seed)}, kms_key=cast("Key", self.key))
        assert isinstance(found, KmsJoin)
        return found

    def bea(self, opened: PaperSession) -> None:
        session_of(self, "bea", opened).submit({"visits": frame_of(2)})

    def kept(self) -> list[KmsJoin]:
        return [join for join, _ in self.members["ada"].state.kms_joins(self.agreement.digest)]

    def sent(self, kind: str) -> list[bytes]:
        return [signed for name, signed in self.wire.sent if name == kind]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def refusal(act: Any) -> StateError:
    with pytest.raises(StateError) as caught:
        act()
    return caught.value


def test_kms_16_what_is_encrypted_is_what_the_statement_commits_to(stage: Stage) -> None:
    join = stage.submit(stage.wire.open())
    ((plaintext, context),) = stage.key.encrypted
    assert context == kms_context(stage.agreement.digest, "ada", join.uploads)
    assert len(plaintext) == 64 and share_digest(plaintext[32:]) == join.share_digest
    upload = stage.members["ada"].state.upload(join.uploads[0])
    from parley_protocol.transcript import Upload

    assert key_commitment(plaintext[:32]) == Upload.from_bytes(payload_unverified(upload.cose)).header.key_commitment
    assert stage.members["ada"].state.has_roster_key(join.roster_key)


def test_kms_15_a_drifted_policy_lets_nothing_out(stage: Stage) -> None:
    opened = stage.wire.open()
    stage.key.live["Statement"].append({"Effect": "Allow", "Principal": "*", "Action": "kms:*", "Resource": "*"})
    found = refusal(lambda: stage.submit(opened))
    assert found.code == "policy" and "nothing is sent" in found.message
    assert not stage.key.encrypted and not stage.wire.uploaded and not stage.wire.sent


def test_kms_15_the_policy_of_another_version_is_drift(stage: Stage) -> None:
    second = stage.amended()
    stage.sign(second)
    session = session_of(stage, "ada", stage.wire.open(second))
    found = refusal(lambda: session.submit({"visits": frame_of(1)}, kms_key=cast("Key", stage.key)))
    assert (found.code == "policy" and "PCR16" in found.message) or "pcr16" in found.message


def test_kms_16_a_party_that_signed_a_newer_version_joins_no_older_one_by_kms(stage: Stage) -> None:
    opened = stage.wire.open()
    stage.submit(opened)
    stage.sign(stage.amended())
    found = refusal(lambda: session_of(stage, "ada", opened).join_by_kms(kms_key=cast("Key", stage.key)))
    assert "version 2" in found.message
    assert len(stage.sent("kms-join")) == 1


def test_kms_17_a_roster_with_another_join_than_the_last_is_not_signed(stage: Stage) -> None:
    opened = stage.wire.open()
    stage.submit(opened)
    stage.bea(opened)
    opened.issue()
    stage.wire.sessions[opened.paper.offer.session].phase = "rostered"
    stage.submit(opened, seed=3)
    found = refusal(lambda: session_of(stage, "ada", opened).countersign())
    assert found.code == "roster" and "another join of yours" in found.message
    assert not stage.sent("countersignature")


def test_kms_17_a_host_that_alters_the_entry_gets_no_signature(stage: Stage) -> None:
    opened = stage.wire.open()
    stage.submit(opened)
    stage.bea(opened)
    for change in ({"uploads": (b"u" * 48,)}, {"share_digest": bytes(48)}, {"roster_key": b"r" * 32}):
        opened.roster = None
        roster = opened.issue()
        entries = tuple(
            replace(entry, **change) if entry.party == "ada" else entry  # type: ignore[arg-type]
            for entry in roster.included
        )
        opened.issue(included=entries)
        assert refusal(lambda: session_of(stage, "ada", opened).countersign()).code == "roster"
    assert not stage.sent("countersignature")


def test_kms_17_of_two_sessions_under_one_head_one_is_signed(stage: Stage) -> None:
    first, second = stage.wire.open(), stage.wire.open()
    stage.submit(first)
    stage.bea(first)
    second.joins = dict(first.joins)
    for opened in (first, second):
        opened.issue()
    session_of(stage, "ada", first).countersign()
    found = refusal(lambda: session_of(stage, "ada", second).countersign())
    assert "two enclaves may not both be fed" in found.message
    assert len(stage.sent("countersignature")) == 1
    # The first is lost: now the second is signed, but by the key of its own join alone, which the first one used up.
    first.phase = "lost"
    found = refusal(lambda: session_of(stage, "ada", second).countersign())
    assert found.code == "roster" or "used up" in found.message


def test_kms_17_a_false_enclave_gets_no_signature(stage: Stage) -> None:
    good = stage.wire.open()
    stage.submit(good)
    stage.bea(good)
    other = stage.wire.open(pcr16=bytes(48))
    other.joins = dict(good.joins)
    other.issue()
    with pytest.raises(Exception, match="att-15"):
        session_of(stage, "ada", other).countersign()
    assert not stage.sent("countersignature")


def test_kms_17_after_the_signature_the_next_join_goes_with_the_same_ciphertext(stage: Stage) -> None:
    opened = stage.wire.open()
    first = stage.submit(opened)
    stage.bea(opened)
    opened.issue()
    session = session_of(stage, "ada", opened)
    session.countersign()
    second = stage.kept()[-1]
    assert (second.uploads, second.ciphertext, second.share_digest) == (
        first.uploads,
        first.ciphertext,
        first.share_digest,
    )
    assert second.number > first.number and second.roster_key != first.roster_key
    assert len(stage.key.encrypted) == 1
    # The same again sends the signature as it was, and makes no third.
    session_of(stage, "ada", opened).countersign()
    signed = stage.sent("countersignature")
    assert signed[0] == signed[1] and stage.kept()[-1] == second
    # The roster that was signed can still be looked at.
    roster = opened.roster
    assert roster is not None and session_of(stage, "ada", opened).check_roster(roster) == ()


def test_kms_17_a_used_up_key_is_replaced_where_the_session_says_so(stage: Stage) -> None:
    opened = stage.wire.open()
    first = stage.submit(opened)
    opened.refused["ada"] = "conflict"
    status = session_of(stage, "ada", opened).wait(timeout_s=0.1)
    assert dict(status.parties)["ada"] == "joined" and stage.kept()[-1].number > first.number


@pytest.mark.parametrize("code", ["revoked", "key", "domain"])
def test_a_join_that_is_refused_is_told(stage: Stage, code: str) -> None:
    opened = stage.wire.open()
    stage.submit(opened)
    opened.refused["ada"] = code
    with pytest.raises(RefusedError) as caught:
        session_of(stage, "ada", opened).wait(timeout_s=0.1)
    assert caught.value.code == code
    assert len(stage.kept()) == 1


def usable(stage: Stage, first: KmsJoin) -> bool:
    """Whether the last KMS join was sent, follows the first one, and can be signed with."""
    last = stage.kept()[-1]
    arrived = payload_unverified(stage.sent("kms-join")[-1]) == last.to_bytes()
    same = (last.uploads, last.ciphertext) == (first.uploads, first.ciphertext)
    return (
        arrived and same and last.number > first.number and stage.members["ada"].state.has_roster_key(last.roster_key)
    )


def test_kms_17_a_lost_session_takes_the_key_and_the_next_join_is_sent(stage: Stage) -> None:
    first, second = stage.wire.open(), stage.wire.open()
    join = stage.submit(first)
    stage.bea(first)
    second.joins = dict(first.joins)
    for opened in (first, second):
        opened.issue()
    assert first.roster is not None
    session_of(stage, "ada", first).check_roster(first.roster)
    first.phase = "lost"
    # The second roster cannot be signed any more: that is waited for, and no error.
    waiting = session_of(stage, "ada", second)
    assert waiting.wait(timeout_s=0.1).phase == "rostered"
    assert not stage.members["ada"].state.has_roster_key(join.roster_key) and usable(stage, join)
    assert not stage.sent("countersignature")
    # It ends, the coordinator brings the last join, and the next roster is signed.
    second.phase, second.roster = "open", None
    second.joins["ada"] = stage.kept()[-1]
    second.issue()
    session_of(stage, "ada", second).countersign()
    assert len(stage.sent("countersignature")) == 1


@pytest.mark.parametrize("arrives", [True, False])
def test_kms_17_a_refusal_takes_the_key_and_the_next_join_is_sent(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    opened = stage.wire.open()
    join = stage.submit(opened)
    stage.bea(opened)
    opened.issue()
    if arrives:
        session_of(stage, "ada", opened).refuse()
    else:

        def away(*_: object) -> None:
            raise UnavailableError("the coordinator does not answer")

        monkeypatch.setattr(stage.wire, "refuse", away)
        with pytest.raises(UnavailableError):
            session_of(stage, "ada", opened).refuse()
    assert not stage.members["ada"].state.has_roster_key(join.roster_key) and usable(stage, join)
    # What the host makes of the refusal: nobody signs this roster any more, and the next one is signed.
    opened.issue()
    assert refusal(session_of(stage, "ada", opened).countersign).code == "roster"
    assert not stage.sent("countersignature")
    opened.phase, opened.roster = "open", None
    opened.joins["ada"] = stage.kept()[-1]
    opened.issue()
    session_of(stage, "ada", opened).countersign()
    assert len(stage.sent("countersignature")) == 1


def test_kms_17_a_used_up_roster_signed_by_hand_says_what_to_do(stage: Stage) -> None:
    first, second = stage.wire.open(), stage.wire.open()
    join = stage.submit(first)
    stage.bea(first)
    second.joins = dict(first.joins)
    for opened in (first, second):
        opened.issue()
    session_of(stage, "ada", first).countersign()
    first.phase = "lost"
    with pytest.raises(RefusedError, match="lost"):
        session_of(stage, "ada", first).wait(timeout_s=0.1)
    sent = len(stage.sent("kms-join"))
    found = refusal(lambda: session_of(stage, "ada", second).countersign(by_hand=True))
    assert found.code == "roster" and "countersign the roster after this one" in found.message
    assert len(stage.sent("kms-join")) == sent + 1 and usable(stage, join)


def test_kms_17_a_roster_with_an_altered_entry_is_no_roster_to_wait_for(stage: Stage) -> None:
    opened = stage.wire.open()
    stage.submit(opened)
    stage.bea(opened)
    roster = opened.issue()
    opened.issue(included=tuple(replace(entry, roster_key=b"r" * 32) for entry in roster.included))
    assert refusal(lambda: session_of(stage, "ada", opened).wait(timeout_s=0.1)).code == "roster"


def test_kms_17_a_session_that_is_seen_lost_is_followed_by_the_next_join(stage: Stage) -> None:
    opened = stage.wire.open()
    join = stage.submit(opened)
    stage.bea(opened)
    roster = opened.issue()
    session = session_of(stage, "ada", opened)
    session.check_roster(roster)
    opened.phase = "lost"
    with pytest.raises(RefusedError, match="lost"):
        session.wait(timeout_s=0.1)
    assert usable(stage, join)


def test_kms_17_an_enclave_that_dies_at_the_signature_does_not_stop_the_next_join(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = stage.wire.open()
    join = stage.submit(opened)
    stage.bea(opened)
    opened.issue()

    def lost(*_: object) -> None:
        raise RefusedError("lost")

    monkeypatch.setattr(stage.wire, "put_countersignature", lost)
    with pytest.raises(RefusedError):
        session_of(stage, "ada", opened).countersign()
    assert usable(stage, join)


def test_kms_17_a_consent_that_arrived_stands_also_where_the_next_join_does_not_arrive(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = stage.wire.open()
    join = stage.submit(opened)
    stage.bea(opened)
    opened.issue()

    def away(_: bytes) -> None:
        raise UnavailableError("the coordinator does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(stage.wire, "put_kms_join", away)
        session_of(stage, "ada", opened).countersign()
    assert len(stage.sent("countersignature")) == 1
    assert "your next join by KMS is not sent" in caplog.text
    session_of(stage, "ada", opened).join_by_kms(kms_key=cast("Key", stage.key))
    assert usable(stage, join)


@pytest.mark.parametrize(("code", "encrypted"), [("revoked", 1), ("key", 2)])
def test_kms_14_a_refused_join_is_followed_by_another_one(stage: Stage, code: str, encrypted: int) -> None:
    opened = stage.wire.open()
    first = stage.submit(opened)
    opened.refused["ada"] = code
    second = stage.submit(opened)
    assert second.number > first.number and second.uploads == first.uploads
    assert (second.ciphertext == first.ciphertext) == (code == "revoked")
    assert len(stage.key.encrypted) == encrypted and not opened.refused
    # It is good: nothing more is made.
    assert stage.submit(opened) == second


def test_a_restored_backup_cannot_sign_and_joins_anew(stage: Stage, tmp_path: Path) -> None:
    opened = stage.wire.open()
    first = stage.submit(opened)
    stage.bea(opened)
    ada = stage.members["ada"]
    backup(ada, tmp_path / "ada.backup", "correct horse battery")
    (tmp_path / "again").mkdir()
    restore(tmp_path / "ada.backup", tmp_path / "again", "correct horse battery")
    stage.members["ada"] = Member.load(next((tmp_path / "again").glob("*.key")))
    opened.issue()
    assert "used up" in refusal(lambda: session_of(stage, "ada", opened).countersign()).message
    opened.phase = "open"
    session_of(stage, "ada", opened).wait(timeout_s=0.1)
    assert stage.kept()[-1].number > first.number


@pytest.mark.parametrize("step", ["roster-key", "kms-join"])
def test_kms_16_a_crash_leaves_a_join_that_can_be_sent_or_made_anew(stage: Stage, step: str) -> None:
    opened = stage.wire.open()

    class Killed(BaseException):
        pass

    def reached(name: str) -> None:
        if name == step:
            raise Killed

    session = session_of(stage, "ada", opened, reached=reached)
    with pytest.raises(Killed):
        session.submit({"visits": frame_of(1)}, kms_key=cast("Key", stage.key))
    assert not stage.sent("kms-join")
    kept = stage.kept()
    assert len(kept) == (step == "kms-join")
    join = stage.submit(opened)
    assert not kept or join == kept[0]
    assert stage.members["ada"].state.has_roster_key(join.roster_key)


def test_with_standing_consent_there_is_no_roster_key_to_lose(tmp_path: Path) -> None:
    stage = Stage(tmp_path, consent=Consent.STANDING)
    opened = stage.wire.open()
    join = stage.submit(opened)
    assert stage.submit(opened) == join
    assert not (stage.members["ada"].state.folder / "roster-keys").exists()
