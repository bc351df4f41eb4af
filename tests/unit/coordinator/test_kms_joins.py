"""Joins by KMS in the store, and in sessions: one stands for each party, and is tried once in each session."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import select

from parley_coordinator import live
from parley_coordinator.config import Deadlines
from parley_coordinator.kms_joins import KmsJoins
from parley_coordinator.live import Live
from parley_coordinator.models import EventRow, JoinRow, KmsJoinRow, SessionRow, UploadRow
from parley_coordinator.sessions import parties, refused_by_kms
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import RefusedError, UnavailableError, VerificationError
from parley_protocol.transcript import Join, KmsJoin, kms_context
from parley_protocol.v1 import enclave_pb2 as pb
from support.desk import MEMBERS, NOW, STRANGER, Desk, key, make_agreement
from support.enclave import Party, rows_of, until
from support.kms import PaperKms, arn

AGREEMENT = make_agreement(kms={"ann": arn()})


class Put:
    """A desk at which ann has uploaded."""

    def __init__(self, folder: Path) -> None:
        self.desk = Desk(folder)
        self.desk.sign(AGREEMENT)
        self.party = Party(AGREEMENT, "ann", MEMBERS["ann"], {"visits": rows_of(1, 900)})
        self.joins = KmsJoins(self.desk.store, self.desk.clock)
        self.kms = PaperKms()

    def upload(self, end: int | None = None) -> None:
        self.desk.upload(self.party.sealed[0], "ann", 0, end)

    def cose(self, number: int = 1, **wrong: Any) -> bytes:
        return self.party.kms_join(self.kms, number, **wrong).cose

    def put(self, cose: bytes, name: str = "ann") -> int:
        return self.joins.put(key(name), cose)[1]

    def standing(self) -> list[int]:
        with self.desk.store.read() as session:
            return list(session.scalars(select(KmsJoinRow.number)))


@pytest.fixture
def made(tmp_path: Path) -> Put:
    return Put(tmp_path)


def refused(act: Callable[[], object]) -> str:
    with pytest.raises((RefusedError, VerificationError)) as caught:
        act()
    return caught.value.code


def test_kms_12_the_greatest_number_stands_and_the_same_again_changes_nothing(made: Put) -> None:
    made.upload()
    first, second = made.cose(1), made.cose(3)
    assert [made.put(first), made.put(first), made.put(second), made.put(second)] == [1, 1, 3, 3]
    assert made.standing() == [3]
    assert refused(lambda: made.put(first)) == "conflict"
    assert refused(lambda: made.put(made.cose(3))) == "conflict"
    assert made.standing() == [3]


def test_kms_12_only_a_partys_own_good_join_over_whole_uploads_is_stored(made: Put) -> None:
    cose = made.cose()
    assert refused(lambda: made.put(cose)) == "unknown-upload"
    made.upload(1000)
    assert refused(lambda: made.put(cose)) == "incomplete"
    made.upload()
    assert refused(lambda: made.put(cose, "bob")) == "not-a-member"
    assert refused(lambda: made.joins.put(STRANGER.public.signing, cose)) == "unknown-agreement"
    assert refused(lambda: made.put(made.cose(roster_key=bytes(32)))) == "agreement"
    assert made.standing() == []
    assert made.put(cose) == 1
    made.desk.now = AGREEMENT.expires_ms
    assert refused(lambda: made.put(made.cose(2))) == "expired"


def test_kms_12_an_agreement_that_is_not_signed_by_all_takes_none(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.sign(AGREEMENT, "ann")
    party = Party(AGREEMENT, "ann", MEMBERS["ann"], {"visits": rows_of(1, 900)})
    joins = KmsJoins(desk.store, desk.clock)
    assert refused(lambda: joins.put(key("ann"), party.kms_join(PaperKms()).cose)) == "agreement"


# In a session


class Enclave(Live):
    """A live session whose enclave answers by `answers`, in turn, and notes what it was asked."""

    def __init__(self, made: Put, decrypt: Callable[..., bytes], *answers: pb.Answer | Exception) -> None:
        self._number, self._lease = made.desk.open(AGREEMENT)
        self.kms = SimpleNamespace(decrypt=decrypt)
        world = SimpleNamespace(
            store=made.desk.store,
            clock=made.desk.clock,
            deadlines=Deadlines(),
            kms=self.kms,
            leases=made.desk.leases,
        )
        self._world = cast("Any", world)
        self._agreement = AGREEMENT
        self._session = b"s" * 16
        self._lock = threading.RLock()
        self._epoch = 0
        self._joining = {}
        self._kms_later = {}
        self._kms_unopened = {}
        self.answers = list(answers)
        self.asked: list[pb.Ask] = []

    def _ask(self, request: pb.Ask, deadline_s: float | None = None, progress: Any = None) -> pb.Answer:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tried(self) -> None:
        """One look at what stands, until its threads have ended."""
        self._ask_kms()
        until(lambda: not any(thread.name == f"kms-{self._number}" for thread in threading.enumerate()))

    @property
    def rows(self) -> list[tuple[str, bool, str]]:
        """(party, admitted, code) of the joins of this session."""
        with self._world.store.read() as session:
            return [(row.party, row.receipt is not None, row.code) for row in session.scalars(select(JoinRow))]

    def parties(self) -> tuple[dict[str, str], dict[str, str]]:
        """What members are shown: phases, and codes of those that are refused."""
        with self._world.store.read() as session:
            row = session.get_one(SessionRow, self._number)
            return dict(parties(session, row)), refused_by_kms(session, row)


DOCUMENT = pb.Answer(recipient=pb.RecipientDocument(document=b"document"))
JOINED = pb.Answer(joined=pb.Joined(receipt=b"receipt"))


def good(key: KeyArn, ciphertext: bytes, context: Mapping[str, str], document: bytes) -> bytes:
    assert key == AGREEMENT.kms["ann"] and document == b"document" and ciphertext
    return b"answer"


def failing(error: Exception) -> Callable[..., bytes]:
    def decrypt(*_: object) -> bytes:
        raise error

    return decrypt


def ready(made: Put) -> bytes:
    made.upload()
    cose = made.cose()
    made.put(cose)
    return cose


def test_kms_13_a_session_joins_a_party_that_is_not_there(made: Put) -> None:
    cose = ready(made)
    seen: list[Mapping[str, str]] = []

    def decrypt(key: KeyArn, ciphertext: bytes, context: Mapping[str, str], document: bytes) -> bytes:
        seen.append(context)
        return good(key, ciphertext, context, document)

    session = Enclave(made, decrypt, DOCUMENT, JOINED)
    assert made.desk.waiting("ann") == [], "it is not asked to join"
    session.tried()
    join = KmsJoin.from_bytes(payload_unverified(cose))
    assert seen == [kms_context(join.agreement, "ann", join.uploads)]
    assert [ask.WhichOneof("op") for ask in session.asked] == ["recipient", "kms_join"]
    assert session.asked[1].kms_join.answer == b"answer" and session.asked[1].kms_join.cose == cose
    assert session.rows == [("ann", True, "")]
    session.tried()
    assert len(session.asked) == 2, "once is enough"


def test_kms_13_a_coordinator_that_comes_back_gets_the_receipt_without_kms(made: Put) -> None:
    ready(made)
    session = Enclave(made, failing(AssertionError("KMS was asked")), JOINED)
    session.tried()
    assert session.rows == [("ann", True, "")]


def test_kms_13_what_may_pass_is_tried_again_later_with_a_fresh_document(
    made: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(made)
    monkeypatch.setattr(live, "KMS_PAUSE_S", 0.01)
    outcomes: list[Exception] = [UnavailableError("throttled"), UnavailableError("throttled")]

    def decrypt(*arguments: Any) -> bytes:
        if outcomes:
            raise outcomes.pop(0)
        return good(*arguments)

    session = Enclave(made, decrypt, DOCUMENT, DOCUMENT, DOCUMENT, JOINED)

    def joined() -> bool:
        session.tried()
        return bool(session.rows)

    until(joined)
    assert [ask.WhichOneof("op") for ask in session.asked] == ["recipient"] * 3 + ["kms_join"]


def test_kms_13_it_waits_as_long_as_it_is_told(made: Put) -> None:
    ready(made)
    session = Enclave(made, failing(UnavailableError("", retry_after_ms=60_000)), DOCUMENT)
    session.tried()
    session.tried()
    assert len(session.asked) == 1
    ((later, times),) = session._kms_later.values()
    assert times == 1 and 55 < later - __import__("time").monotonic() < 95


def test_kms_14_a_party_that_has_revoked_is_shown_as_that(made: Put) -> None:
    ready(made)
    session = Enclave(made, failing(RefusedError("revoked")), DOCUMENT)
    session.tried()
    assert session.rows == [("ann", False, "revoked")]
    phases, codes = session.parties()
    assert (phases["ann"], codes) == ("refused", {"ann": "revoked"})
    assert made.desk.waiting("ann") == ["JOIN"]
    with made.desk.store.read() as store:
        event = store.scalars(select(EventRow).where(EventRow.kind == "refused")).one()
        assert (event.member, event.code) == ("ann", "revoked")
    session.tried()
    assert len(session.asked) == 1, "a revocation is not argued with"


def test_kms_14_the_partys_next_join_is_tried(made: Put) -> None:
    ready(made)
    session = Enclave(made, failing(RefusedError("revoked")), DOCUMENT, DOCUMENT, JOINED)
    session.tried()
    made.put(made.cose(2))
    session.kms.decrypt = good
    session.tried()
    assert sorted(session.rows) == [("ann", False, "revoked"), ("ann", True, "")]
    phases, codes = session.parties()
    assert (phases["ann"], codes) == ("joined", {})


@pytest.mark.parametrize("wrong", [1, 3, 4])
def test_kms_13_an_answer_that_does_not_open_is_followed_by_another_document(
    made: Put, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    ready(made)
    monkeypatch.setattr(live, "KMS_PAUSE_S", 0.01)
    answers: list[pb.Answer | Exception] = [DOCUMENT, RefusedError("key")] * wrong
    session = Enclave(made, good, *answers, DOCUMENT, JOINED)

    def judged() -> bool:
        session.tried()
        return bool(session.rows)

    until(judged)
    assert session.rows == [("ann", wrong < 4, "key" if wrong == 4 else "")]
    assert [ask.WhichOneof("op") for ask in session.asked] == ["recipient", "kms_join"] * min(wrong + 1, 4)


def test_kms_14_a_ciphertext_that_kms_does_not_open_is_not_argued_about(made: Put) -> None:
    ready(made)
    session = Enclave(made, failing(RefusedError("key")), DOCUMENT)
    session.tried()
    assert session.rows == [("ann", False, "key")]


@pytest.mark.parametrize("code", ["conflict", "frame", "domain"])
def test_what_the_enclave_refuses_is_refused(made: Put, code: str) -> None:
    ready(made)
    session = Enclave(made, good, DOCUMENT, RefusedError(code))
    session.tried()
    assert session.rows == [("ann", False, code)]


def test_kms_14_an_upload_that_is_gone_is_a_refusal(made: Put) -> None:
    ready(made)
    session = Enclave(made, good)
    with made.desk.store.write() as store:
        store.delete(store.query(UploadRow).one())
    session.tried()
    session.tried()
    assert session.rows == [("ann", False, "unknown-upload")]
    assert (session.asked, session._kms_later) == ([], {})
    assert session.parties()[1] == {"ann": "unknown-upload"}


def test_a_party_that_has_joined_by_itself_is_left_alone(made: Put) -> None:
    ready(made)
    session = Enclave(made, good)
    with made.desk.store.write() as store:
        join = Join(bytes(48), "ann", (bytes(48),), b"sealed", bytes(48), bytes(32))
        ordinary = MEMBERS["ann"].sign(join.to_bytes())
        store.add(JoinRow(number=1, digest=b"j", party="ann", cose=ordinary, receipt=b"r", code="", at_ms=NOW))
    session.tried()
    assert session.asked == []
