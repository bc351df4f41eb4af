"""Bundles: valid for years, and refused for each thing that is altered, missing or of another release."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parley_protocol.bundle import Bundle, BundledOutput, verify_bundle
from parley_protocol.errors import MalformedError, VerificationError
from parley_protocol.transcript import output_commitment
from support.world import NOW, SALT, World, release, table_of, world

LATER = NOW + 5 * 365 * 86_400_000


@pytest.fixture(scope="module")
def w() -> World:
    return world()


@pytest.fixture(scope="module")
def other(w: World) -> World:
    return release(w.agreement, w.root, w.members)


def refused(step: str, bundle: Bundle) -> None:
    with pytest.raises(VerificationError) as caught:
        verify_bundle(bundle.to_bytes(), now_ms=LATER)
    assert caught.value.step == step, caught.value


def test_bun_1_a_bundle_is_verified_years_later(w: World) -> None:
    verified = verify_bundle(w.bundle.to_bytes(), now_ms=LATER)
    assert verified.simulated and verified.countersigned == ("ada", "bea")
    assert verified.tables["by_site"] == table_of(w.agreement)
    data = w.bundle.to_bytes()
    for bad in (b"", data[:-1], data + b"\0", b"\x80"):
        with pytest.raises(MalformedError):
            verify_bundle(bad, now_ms=LATER)


def test_bun_1_any_flipped_byte_is_refused(w: World) -> None:
    data = w.bundle.to_bytes()
    sealed = sum(len(item.sealed) for item in w.bundle.sealed)
    # Sealed outputs are for their recipients to check; every byte before them is checked here.
    for position in range(0, data.index(w.bundle.sealed[0].sealed), 97):
        bad = bytearray(data)
        bad[position] ^= 1
        with pytest.raises((VerificationError, MalformedError)):
            verify_bundle(bytes(bad), now_ms=LATER)
    assert sealed < len(data)


def test_bun_2_without_a_members_signature(w: World) -> None:
    agreement = w.bundle.lineage[0]
    refused("agr-7", replace(w.bundle, lineage=(replace(agreement, signatures=agreement.signatures[1:]),)))


def test_bun_3_with_the_offer_of_another_session(w: World, other: World) -> None:
    refused("ros-1", replace(w.bundle, offer=other.bundle.offer, offer_document=other.bundle.offer_document))


def test_bun_4_with_the_roster_of_another_session(w: World, other: World) -> None:
    refused("ros-1", replace(w.bundle, roster=other.bundle.roster))


def test_bun_5_without_a_countersignature(w: World) -> None:
    for changed in ((), w.bundle.countersignatures[:1], (*w.bundle.countersignatures, w.bundle.countersignatures[0])):
        refused("bun-5", replace(w.bundle, countersignatures=changed))


def test_bun_6_with_a_record_of_another_enclave(w: World, other: World) -> None:
    refused("bun-6", replace(w.bundle, record=other.bundle.record, record_document=other.bundle.record_document))


def test_bun_7_with_a_record_of_another_roster(w: World) -> None:
    from parley_protocol.transcript import record_user_data

    record = replace(w.record, roster=b"\7" * 48)
    document = w.paper.document(record_user_data(record.to_bytes()), None)
    refused("rec-6", replace(w.bundle, record=w.paper.sign(record), record_document=document))


def test_bun_8_sealed_to_others_or_not_to_all(w: World) -> None:
    extra = BundledOutput("by_site", "eve", b"sealed")
    for sealed in (w.bundle.sealed[1:], (*w.bundle.sealed, extra), (*w.bundle.sealed, w.bundle.sealed[0])):
        refused("bun-8", replace(w.bundle, sealed=sealed))


def test_bun_9_an_output_that_does_not_fit_its_commitment(w: World) -> None:
    (opened,) = w.bundle.opened
    for changes in ({"salt": bytes(32)}, {"plaintext": opened.plaintext + b"\0"}, {"output": "other"}):
        changed: Any = replace(opened, **changes)  # type: ignore[arg-type]
        refused("bun-9", replace(w.bundle, opened=(changed,)))
    refused("bun-9", replace(w.bundle, opened=(opened, opened)))


def test_bun_10_an_output_of_another_agreement(w: World) -> None:
    from parley_protocol.bundle import open_output

    table = replace(table_of(w.agreement), agreement=b"\7" * 48).to_bytes()
    committed = replace(w.record.body.outputs[0], commitment=output_commitment(SALT, table))
    body = replace(w.record.body, outputs=(committed,))
    from parley_protocol.claims import verify_record
    from parley_protocol.transcript import record_user_data

    record = replace(w.record, body_bytes=body.to_bytes())
    document = w.paper.document(record_user_data(record.to_bytes()), None)
    verified = verify_record(w.paper.sign(record), document, w.agreement, now_ms=LATER)
    with pytest.raises(VerificationError) as caught:
        open_output(verified, "by_site", SALT, table)
    assert caught.value.step == "bun-10"


def test_an_unopened_bundle_is_valid_and_says_nothing_of_the_values(w: World) -> None:
    verified = verify_bundle(replace(w.bundle, opened=()).to_bytes(), now_ms=LATER)
    assert verified.tables == {}
