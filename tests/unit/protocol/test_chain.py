"""Chains of versions and of records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parley_protocol import chain
from parley_protocol.agreement.model import Agreement
from parley_protocol.chain import ChainState
from parley_protocol.errors import VerificationError
from parley_protocol.transcript import GENESIS
from support.world import NOW, World, release, signed, world


@pytest.fixture(scope="module")
def w() -> World:
    return world()


def amended(w: World, **changes: Any) -> Agreement:
    changes = {"version": 2, "series_digest": w.agreement.digest, "replaces": w.agreement.digest, **changes}
    return replace(w.agreement, **changes)


def pair(w: World) -> tuple[bytes, bytes]:
    return w.paper.sign(w.record), w.record_document


def test_lin_1_a_series_begins_with_version_1(w: World) -> None:
    second = signed(amended(w), w.members)
    assert [a.version for a in chain.verify_lineage([signed(w.agreement, w.members), second])] == [1, 2]
    for lineage in ([], [second]):
        with pytest.raises(VerificationError) as caught:
            chain.verify_lineage(lineage)
        assert caught.value.step == "lin-1"


@pytest.mark.parametrize(
    "changes", [{"version": 3, "replaces": b"\7" * 48}, {"replaces": b"\7" * 48, "series_digest": b"\7" * 48}]
)
def test_lin_2_each_version_names_the_one_before(w: World, changes: dict[str, Any]) -> None:
    with pytest.raises(VerificationError) as caught:
        chain.verify_lineage([signed(w.agreement, w.members), signed(amended(w, **changes), w.members)])
    assert caught.value.step == "lin-2"


def test_lin_3_every_member_signed_every_version(w: World) -> None:
    whole = signed(w.agreement, w.members)
    for name in w.members:
        less = replace(whole, signatures={k: v for k, v in whole.signatures.items() if k != name})
        with pytest.raises(VerificationError) as caught:
            chain.verify_lineage([less])
        assert caught.value.step == "agr-7"


def test_chn_5_two_records_make_a_chain(w: World) -> None:
    second = release(w.agreement, w.root, w.members, w.record.head, 2, 3)
    state = chain.verify_chain([pair(w), pair(second)], [w.agreement], now_ms=NOW + 9)
    assert state == ChainState(second.record.head, 2, 3, 1)
    middle = chain.verify_chain([pair(w)], [w.agreement], now_ms=NOW + 9)
    assert chain.verify_chain([pair(second)], [w.agreement], now_ms=NOW + 9, start=middle) == state
    assert chain.verify_chain([], [w.agreement], now_ms=NOW) == ChainState(GENESIS, 0, 0, 1)
    with pytest.raises(VerificationError, match="att-"):
        chain.verify_chain([(pair(w)[0], pair(second)[1])], [w.agreement], now_ms=NOW + 9)


def test_chn_1_a_record_of_another_series_or_an_older_version(w: World) -> None:
    other = amended(w)
    under_second = release(other, w.root, w.members)
    with pytest.raises(VerificationError) as caught:
        chain.verify_chain([pair(under_second)], [w.agreement], now_ms=NOW + 9)
    assert caught.value.step == "chn-1"
    older = release(w.agreement, w.root, w.members, under_second.record.head, 2, 2)
    with pytest.raises(VerificationError) as caught:
        chain.verify_chain([pair(under_second), pair(older)], [w.agreement, other], now_ms=NOW + 9)
    assert caught.value.step == "chn-1"


def refused_second(w: World, step: str, head: bytes, sequence: int, charged: int) -> None:
    second = release(w.agreement, w.root, w.members, head, sequence, charged)
    with pytest.raises(VerificationError) as caught:
        chain.verify_chain([pair(w), pair(second)], [w.agreement], now_ms=NOW + 9)
    assert caught.value.step == step


def test_chn_2_a_record_that_does_not_follow_the_head(w: World) -> None:
    refused_second(w, "chn-2", GENESIS, 2, 2)


def test_chn_3_a_wrong_sequence_number(w: World) -> None:
    refused_second(w, "chn-3", w.record.head, 3, 2)
    refused_second(w, "chn-3", w.record.head, 1, 2)


def test_chn_4_a_record_that_charges_nothing(w: World) -> None:
    refused_second(w, "chn-4", w.record.head, 2, 1)
