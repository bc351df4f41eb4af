"""Releases taken back from bundles: what is verified, what must stand in the store, and what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from parley import Member, Release
from parley_coordinator import recovery
from parley_coordinator import store as db
from parley_coordinator.agreements import Agreements
from parley_coordinator.blobs import Directory, bundle_name
from parley_coordinator.config import Quotas
from parley_coordinator.models import (
    AgreementRow,
    BundleRow,
    EventRow,
    JoinRow,
    LeaseRow,
    Operator,
    RosterRow,
    SessionRow,
)
from parley_coordinator.releases import Releases
from parley_coordinator.store import Store
from parley_protocol import hpke
from parley_protocol.bundle import Bundle, BundledOutput, verify_bundle
from parley_protocol.errors import MalformedError, RefusedError, VerificationError
from parley_protocol.transcript import SealedOutput, output_info
from support.world import NOW, World, release, signed, world

LATER = NOW + 3_600_000


class Restored:
    """A store whose backup was older than the first releases of an agreement."""

    def __init__(self, folder: Path, database: str) -> None:
        self.first = world()
        self.store = Store(database)
        self.blobs = Directory(folder / "blobs")
        agreements = Agreements(self.store, Quotas(), lambda: NOW)
        w = self.first
        with self.store.write() as session:
            session.add(Operator(key=w.members["ada"].public.signing, label="ada", added_ms=NOW))
        agreements.put(w.members["ada"].public.signing, w.agreement.canonical)
        for name, cose in signed(w.agreement, w.members).signatures.items():
            agreements.sign(w.members[name].public.signing, w.agreement.digest, name, cose)

    def after(self, before: World, **changes: Any) -> World:
        """The release after one."""
        body = before.record.body
        return release(
            before.agreement,
            before.root,
            before.members,
            before.record.head,
            body.sequence + 1,
            body.charged + 1,
            **changes,
        )

    def restore(self, *worlds: World) -> list[tuple[int, bool]]:
        """Takes back releases: (number, whether it was new)."""
        found = self.bring(*(w.bundle for w in worlds))
        return [(one.sequence, one.new) for one in found]

    def bring(self, *bundles: Bundle, replace_outputs: bool = False) -> list[recovery.Restored]:
        """Takes back releases from bundles."""
        data = [bundle.to_bytes() for bundle in bundles]
        return recovery.restore(self.store, self.blobs, lambda: LATER, data, replace_outputs=replace_outputs)

    def stored(self) -> Bundle:
        """The first release as a member fetches it, to the last byte that the coordinator promises."""
        w = self.first
        releases = Releases(self.store, self.blobs, lambda: LATER)
        opened = releases.bundle(w.members["cyd"].public.signing, w.paper.offer.session)
        data = opened.reader.read(0, opened.reader.size)
        opened.reader.close()
        assert len(data) == opened.size
        return Bundle.from_bytes(data)

    def chain(self) -> list[int]:
        """The numbers of the records that are here."""
        with self.store.read() as session:
            return [row.sequence for row in db.records(session, self.first.agreement.series)]

    def add(self, phase: str, identifier: bytes) -> int:
        """A session of a coordinator that serves it."""
        w = self.first
        with self.store.write() as session:
            row = SessionRow(
                session=identifier,
                agreement=w.agreement.digest,
                series=w.agreement.series,
                begin=b"b" * 16,
                phase=phase,
                offer=b"o",
                document=b"d",
                start=None,
                roster=None,
                opened_ms=NOW,
                ended_ms=None,
            )
            session.add(row)
            session.flush()
            session.add(
                LeaseRow(number=row.number, node="n", holder="h", address="a:1", token=7, expires_ms=LATER + 60_000)
            )
            session.add(
                JoinRow(number=row.number, digest=b"j", party="ada", cose=b"c", receipt=b"r", code="", at_ms=NOW)
            )
            return row.number


@pytest.fixture
def here(tmp_path: Path, database: str) -> Iterator[Restored]:
    made = Restored(tmp_path, database)
    yield made
    made.store.close()


def refusal(work: Any, code: str) -> str:
    with pytest.raises(RefusedError) as caught:
        work()
    assert caught.value.code == code
    return caught.value.message


def test_crd_24_releases_come_back_in_the_order_of_their_chain_and_once(here: Restored) -> None:
    second = here.after(here.first)
    third = here.after(second)
    assert here.restore(third, here.first, second) == [(1, True), (2, True), (3, True)]
    assert here.restore(second) == [(2, False)]
    assert here.chain() == [1, 2, 3]
    w = second
    releases = Releases(here.store, here.blobs, lambda: LATER)
    opened = releases.bundle(w.members["bea"].public.signing, w.paper.offer.session)
    data = opened.reader.read(0, opened.size + 1)
    opened.reader.close()
    # What stood open in the file that somebody kept is for nobody's storage.
    assert w.bundle.opened and Bundle.from_bytes(data) == replace(w.bundle, opened=())
    verify_bundle(data, now_ms=LATER)
    chain = releases.chain(w.members["cyd"].public.signing, w.agreement.series, here.first.record.head)
    assert chain == [(v.bundle.record, v.bundle.record_document) for v in (second, third)]
    with here.store.read() as session:
        rows = session.scalars(select(SessionRow)).all()
        assert {(row.phase, row.stored_told) for row in rows} == {("released", True)}
        events = [row.kind for row in session.scalars(select(EventRow)) if row.session is not None]
    assert events == ["released"] * 3


@pytest.mark.parametrize("wrong", ["record", "roster", "countersignatures", "cut", "no bundle"])
def test_crd_24_what_does_not_verify_is_not_taken(here: Restored, wrong: str) -> None:
    w = here.first
    other = here.after(w)
    data = {
        "record": replace(w.bundle, record=other.bundle.record).to_bytes(),
        "roster": replace(w.bundle, roster=other.bundle.roster).to_bytes(),
        "countersignatures": replace(w.bundle, countersignatures=w.bundle.countersignatures[:1]).to_bytes(),
        "cut": w.bundle.to_bytes()[:-9],
        "no bundle": b"no bundle",
    }[wrong]
    with pytest.raises((VerificationError, MalformedError)):
        recovery.restore(here.store, here.blobs, lambda: LATER, [data])
    assert here.chain() == []


def test_crd_24_another_record_with_the_number_stays_what_it_is(here: Restored) -> None:
    w = here.first
    # What a session of the restored database released, before anybody remembered: the same inputs, another head.
    fork = release(w.agreement, w.root, w.members, charged=2)
    assert here.restore(w) == [(1, True)]
    assert "another record 1" in refusal(lambda: here.restore(fork), "conflict")
    # Nor does the other branch go on here.
    with pytest.raises(VerificationError) as caught:
        here.restore(here.after(fork))
    assert caught.value.step == "chn-2"
    assert here.chain() == [1]


@pytest.mark.parametrize("known", [False, True])
def test_crd_24_the_same_computation_in_another_session_is_no_fork(here: Restored, known: bool) -> None:
    w = here.first
    # Members who had not seen the lost release ran again with the same uploads: the same body, and so the same head.
    again = release(w.agreement, w.root, w.members)
    assert again.record.head == w.record.head
    assert here.restore(w) == [(1, True)]
    if known:
        here.add("lost", again.paper.offer.session)
    for replaced in (False, True):
        [found] = here.bring(again.bundle, replace_outputs=replaced)
        assert (found.sequence, found.new, found.outputs, found.session) == (1, False, False, w.paper.offer.session)
    assert here.chain() == [1]
    assert here.stored() == replace(w.bundle, opened=())
    with pytest.raises(FileNotFoundError):
        here.blobs.reader(bundle_name(again.paper.offer.session))
    # Both branches are one chain, which goes on.
    assert here.restore(here.after(again)) == [(2, True)]


def test_crd_24_none_is_left_out(here: Restored) -> None:
    second = here.after(here.first)
    said = refusal(lambda: here.restore(second), "head")
    assert "this is record 2 and the store has 0" in said
    assert here.chain() == []
    # What comes before one that is refused is restored.
    refusal(lambda: here.restore(here.after(here.after(second)), here.first), "head")
    assert here.chain() == [1]


def test_crd_24_its_agreement_must_be_here_and_signed(here: Restored) -> None:
    refusal(lambda: here.restore(world()), "unknown-agreement")
    with here.store.write() as session:
        session.get_one(AgreementRow, here.first.agreement.digest).complete_ms = None
    refusal(lambda: here.restore(here.first), "agreement")


@pytest.mark.parametrize("same", [True, False])
def test_crd_24_what_lives_under_the_head_before_is_lost(here: Restored, same: bool) -> None:
    identifier = here.first.paper.offer.session if same else b"x" * 16
    number = here.add("open", identifier)
    assert here.restore(here.first) == [(1, True)]
    with here.store.read() as session:
        row = session.get_one(SessionRow, number)
        assert (row.phase, row.code) == (("released", "") if same else ("lost", "head"))
        # Whoever served it does not any more.
        assert session.get_one(LeaseRow, number).token == 8
        assert session.scalars(select(JoinRow)).all() == []
        assert db.live_session(session, row.series) is None
        assert session.scalars(select(RosterRow)).one().cose == here.first.bundle.roster


@pytest.mark.parametrize("phase", ["rostered", "computing"])
def test_crd_24_what_has_a_roster_must_end_first(here: Restored, phase: str) -> None:
    number = here.add(phase, b"x" * 16)
    assert phase in refusal(lambda: here.restore(here.first), "busy")
    with here.store.read() as session:
        assert session.get_one(SessionRow, number).phase == phase
    assert here.chain() == []


def test_crd_24_a_session_that_was_lost_meanwhile_is_released_after_all(here: Restored) -> None:
    # Under the backup it lived; its enclave was gone when the coordinator came back.
    number = here.add("lost", here.first.paper.offer.session)
    assert here.restore(here.first) == [(1, True)]
    with here.store.read() as session:
        row = session.get_one(SessionRow, number)
        assert (row.phase, row.code, row.roster) == ("released", "", here.first.roster.digest)
        assert session.get_one(BundleRow, number).size == len(replace(here.first.bundle, opened=()).to_bytes())


def test_a_bundle_whose_blob_is_gone_is_put_again_and_one_that_was_deleted_is_not(here: Restored) -> None:
    w = here.first
    here.restore(w)
    name = bundle_name(w.paper.offer.session)
    here.blobs.delete(name)
    assert here.restore(w) == [(1, False)]
    here.blobs.reader(name).close()
    with here.store.write() as session:
        session.delete(session.scalars(select(BundleRow)).one())
    here.blobs.delete(name)
    assert here.restore(w) == [(1, False)]
    with pytest.raises(FileNotFoundError):
        here.blobs.reader(name)


def spoiled(w: World, *, anew: bool = False) -> Bundle:
    """The bundle with outputs that are none: zeros, or what anybody can seal `anew` to the recipients."""

    def other(item: BundledOutput) -> bytes:
        if not anew:
            return bytes(len(item.sealed) - 9)
        inner = SealedOutput.of(bytes(32), b"made up", 9)
        info = output_info(w.record.head, item.output, item.recipient)
        return hpke.seal(w.agreement.members[item.recipient].sealing, inner.to_bytes(), info)

    return replace(w.bundle, opened=(), sealed=tuple(replace(item, sealed=other(item)) for item in w.bundle.sealed))


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_crd_24_spoiled_outputs_take_no_place_of_good_ones(here: Restored, named: bool, anew: bool) -> None:
    w = here.first
    good = replace(w.bundle, opened=())
    if named:
        here.restore(w)
    else:
        # The database was lost, the blobs were not.
        here.blobs.put(bundle_name(w.paper.offer.session), [good.to_bytes()])
    [found] = here.bring(spoiled(w, anew=anew))
    assert (found.new, found.outputs) == (not named, False)
    assert here.stored() == good


@pytest.mark.parametrize("anew", [False, True])
def test_crd_24_spoiled_outputs_are_noticed_by_recipients_and_replaced_on_wish(
    here: Restored, tmp_path: Path, anew: bool
) -> None:
    w = here.first
    good, bad = replace(w.bundle, opened=()), spoiled(w, anew=anew)
    cyd = Member(tmp_path / "cyd.key", w.members["cyd"])
    [found] = here.bring(bad)
    assert (found.new, found.outputs) == (True, True)
    with pytest.raises(VerificationError) as caught:
        Release.read(here.stored().to_bytes(), cyd, at_ms=LATER)
    assert caught.value.step == ("bun-9" if anew else "idn-4")
    # Which of two is the good one nobody can tell but a recipient: the operator says which it is to be.
    [found] = here.bring(good)
    assert (found.new, found.outputs) == (False, False)
    assert here.stored() == bad
    [found] = here.bring(good, replace_outputs=True)
    assert (found.new, found.outputs) == (False, True)
    assert here.stored() == good
    assert set(Release.read(here.stored().to_bytes(), cyd, at_ms=LATER).outputs) == {"by_site"}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("damage", ["cut", "empty", "another", "gone"])
def test_crd_24_outputs_that_are_damaged_are_stored_again(here: Restored, damage: str, named: bool) -> None:
    w = here.first
    good = replace(w.bundle, opened=())
    name = bundle_name(w.paper.offer.session)
    if named:
        here.bring(spoiled(w))
    if damage == "gone":
        here.blobs.delete(name)
    else:
        left = {"cut": good.to_bytes()[:-9], "empty": b"", "another": here.after(w).bundle.to_bytes()}
        here.blobs.put(name, [left[damage]])
    [found] = here.bring(good)
    assert (found.new, found.outputs) == (not named, True)
    assert here.stored() == good
