"""Agreements at the coordinator: who may put them, what is stored, and who sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from parley_coordinator.config import Quotas
from parley_coordinator.models import Operator
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.signed import sign
from parley_protocol.errors import MalformedError, ParleyError, RefusedError, VerificationError
from support.desk import MEMBERS, NOW, STRANGER, Desk, key, make_agreement


@pytest.fixture
def desk(tmp_path: Path, database: str) -> Iterator[Desk]:
    made = Desk(tmp_path, database=database)
    yield made
    made.store.close()


def refusal(caught: pytest.ExceptionInfo[RefusedError]) -> str:
    return caught.value.code


def version_2(first: Agreement) -> Agreement:
    return replace(first, version=2, series_digest=first.digest, replaces=first.digest)


def test_crd_4_only_listed_keys_put_agreements(desk: Desk) -> None:
    agreement = make_agreement()
    for caller in (key("bob"), STRANGER.public.signing):
        with pytest.raises(RefusedError) as caught:
            desk.agreements.put(caller, agreement.canonical)
        assert refusal(caught) == "stranger"
    view = desk.agreements.put(key("ann"), agreement.canonical)
    assert (view.canonical, view.missing, view.signatures) == (agreement.canonical, ["ann", "bob", "cyd"], {})
    assert desk.agreements.put(key("ann"), agreement.canonical).missing == view.missing


def test_crd_4_a_removed_operator_puts_no_more(desk: Desk) -> None:
    with desk.store.write() as session:
        session.delete(session.get_one(Operator, key("ann")))
    with pytest.raises(RefusedError):
        desk.agreements.put(key("ann"), make_agreement().canonical)


@pytest.mark.parametrize("data", [b"", b"\x80", b"x" * 100])
def test_crd_4_what_is_no_agreement_is_malformed(desk: Desk, data: bytes) -> None:
    with pytest.raises(MalformedError):
        desk.agreements.put(key("ann"), data)


def test_crd_4_too_large_expired_and_over_quota(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        desk.agreements.put(key("ann"), bytes(limits.AGREEMENT_BYTES + 1))
    assert refusal(caught) == "too-large"
    agreement = make_agreement()
    desk.now = agreement.expires_ms
    with pytest.raises(RefusedError) as caught:
        desk.agreements.put(key("ann"), agreement.canonical)
    assert refusal(caught) == "expired"
    (tmp_path / "small").mkdir()
    small = Desk(tmp_path / "small", Quotas(agreements_per_member=1))
    small.sign(agreement)
    with pytest.raises(RefusedError) as caught:
        small.agreements.put(key("ann"), make_agreement(max_releases=9).canonical)
    assert refusal(caught) == "quota"


def test_crd_5_an_amendment_follows_a_version_that_all_signed(desk: Desk) -> None:
    first = make_agreement()
    second = version_2(first)
    with pytest.raises(RefusedError) as caught:
        desk.agreements.put(key("ann"), second.canonical)
    assert refusal(caught) == "unknown-agreement"
    desk.sign(first, "ann", "bob")
    with pytest.raises(RefusedError) as caught:
        desk.agreements.put(key("ann"), second.canonical)
    assert refusal(caught) == "agreement"
    desk.sign(first)
    desk.agreements.put(key("ann"), second.canonical)
    assert desk.agreements.newest(key("bob"), first.digest).canonical == second.canonical
    desk.sign(second)
    for version, series in ((4, first.digest), (3, b"x" * 48)):
        wrong = replace(second, version=version, series_digest=series, replaces=second.digest)
        with pytest.raises(RefusedError) as caught:
            desk.agreements.put(key("ann"), wrong.canonical)
        assert refusal(caught) == "agreement"


def test_crd_6_garbage_is_not_stored(desk: Desk) -> None:
    agreement = make_agreement()
    desk.agreements.put(key("ann"), agreement.canonical)
    good = sign(agreement, "bob", MEMBERS["bob"])
    other = make_agreement(max_releases=9)
    wrong: list[tuple[str, bytes]] = [
        ("bob", b"garbage"),
        ("bob", good[:-1] + bytes([good[-1] ^ 1])),
        ("cyd", good),
        ("dan", good),
        ("bob", sign(other, "bob", MEMBERS["bob"])),
        ("bob", sign(agreement, "bob", MEMBERS["bob"], head=b"h" * 48)),
    ]
    for member, cose in wrong:
        with pytest.raises((MalformedError, VerificationError)):
            desk.agreements.sign(key("bob"), agreement.digest, member, cose)
    assert desk.agreements.get(key("bob"), agreement.digest).signatures == {}
    view = desk.agreements.sign(key("bob"), agreement.digest, "bob", good)
    assert (view.signatures, view.missing) == ({"bob": good}, ["ann", "cyd"])
    assert desk.agreements.sign(key("bob"), agreement.digest, "bob", good).missing == view.missing


def test_crd_6_another_head_is_a_conflict(desk: Desk) -> None:
    first = make_agreement()
    desk.sign(first)
    second = version_2(first)
    desk.agreements.put(key("ann"), second.canonical)
    desk.agreements.sign(key("bob"), second.digest, "bob", sign(second, "bob", MEMBERS["bob"], head=b"1" * 48))
    with pytest.raises(RefusedError) as caught:
        desk.agreements.sign(key("bob"), second.digest, "bob", sign(second, "bob", MEMBERS["bob"], head=b"2" * 48))
    assert refusal(caught) == "conflict"


def test_crd_3_others_learn_nothing_of_an_agreement(desk: Desk) -> None:
    agreement = make_agreement()
    desk.sign(agreement)
    outsider = STRANGER.public.signing
    tries = [
        lambda: desk.agreements.get(outsider, agreement.digest),
        lambda: desk.agreements.newest(outsider, agreement.series),
        lambda: desk.agreements.sign(outsider, agreement.digest, "ann", b""),
        lambda: desk.releases.chain(outsider, agreement.series, b""),
        lambda: desk.agreements.get(key("ann"), b"x" * 48),
    ]
    for attempt in tries:
        with pytest.raises(ParleyError) as caught:
            attempt()
        assert caught.value.code == "unknown-agreement"


def test_crd_20_a_chain_without_records(desk: Desk) -> None:
    agreement = make_agreement()
    desk.sign(agreement)
    assert desk.releases.chain(key("bob"), agreement.series, b"") == []
    assert desk.releases.chain(key("bob"), agreement.series, bytes(48)) == []
    with pytest.raises(RefusedError) as caught:
        desk.releases.chain(key("bob"), agreement.series, b"h" * 48)
    assert refusal(caught) == "head"


def test_crd_16_the_inbox_asks_for_signatures_first(desk: Desk) -> None:
    agreement = make_agreement()
    desk.sign(agreement, "ann")
    assert [desk.waiting(name) for name in MEMBERS] == [[], ["SIGN"], ["SIGN"]]
    desk.now = NOW + 5
    desk.sign(agreement)
    assert [desk.waiting(name) for name in MEMBERS] == [["UPLOAD"], ["UPLOAD"], []]
    desk.now = agreement.expires_ms
    assert [desk.waiting(name) for name in MEMBERS] == [[], [], []]
