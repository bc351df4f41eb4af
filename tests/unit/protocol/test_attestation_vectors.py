"""Real documents, and altered ones: the verdict that was recorded for each, with the step that refuses it."""

from __future__ import annotations

import time

import pytest

from parley_protocol.attestation.document import parse_unverified
from parley_protocol.attestation.policy import Measurement, Policy, RootPolicy
from parley_protocol.attestation.roots import AWS_NITRO_ROOT_G1
from parley_protocol.attestation.verify import check_document, verify_live, verify_statement
from parley_protocol.encoding import sha384
from parley_protocol.errors import VerificationError
from support.vectors import Recorded, attestation

VECTORS = attestation()

REFUSED_AT = {
    "negative/nitriding_b689637d_not_aws_root.cbor": "att-1",
    "negative/nitrite_e388022c_not_aws_root.cbor": "att-1",
    "negative/oyster-monorepo_a132128a_not_aws_root.cbor": "att-2",
    "negative/oyster-monorepo_d8032479_not_aws_root.cbor": "att-2",
    "negative/go-nitro-enclave-attestation_7df2cdc0_badsig.cbor": "att-10",
    "derived/tag18.cbor": "att-1",
    "derived/unprotected_kid.cbor": "att-1",
    "derived/unprotected_alg_es256.cbor": "att-1",
    "derived/trailing_byte.cbor": "att-1",
    "derived/nonminimal_array_len.cbor": "att-1",
    "derived/indefinite_array.cbor": "att-1",
    "derived/bad_truncated.cbor": "att-1",
    "derived/bad_payload_detached_null.cbor": "att-1",
    "derived/bad_protected_es256.cbor": "att-1",
    "derived/bad_protected_empty.cbor": "att-1",
    "derived/bad_payload_bitflip.cbor": "att-3",
    "derived/bad_signature_bitflip.cbor": "att-10",
    "derived/bad_zero_signature.cbor": "att-10",
}
"""The step for every file of negative/ and derived/ that is refused. Tag 18 may be refused by policy, and is."""


def step_of(vector: Recorded, at_ms: int | None) -> str | None:
    try:
        check_document(vector.data, root_sha256=AWS_NITRO_ROOT_G1, at_ms=at_ms)
    except VerificationError as refusal:
        return refusal.step
    return None


def expected_step(vector: Recorded) -> str | None:
    return "att-2" if vector.kind == "nitrotpm" else REFUSED_AT.get(vector.name)


def test_there_are_as_many_vectors_as_were_collected() -> None:
    kinds = [vector.kind for vector in VECTORS]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "prod": 61,
        "debug": 41,
        "nitrotpm": 2,
        "non-aws": 4,
        "badsig": 1,
        "derived": 14,
    }


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_every_document_has_its_recorded_verdict_at_its_own_time(vector: Recorded) -> None:
    step = step_of(vector, None)
    assert step == expected_step(vector)
    rejected = "REJECT" in vector.verdict and vector.kind != "debug"
    assert (step is not None) == (rejected or vector.name == "derived/tag18.cbor")


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_att_8_every_document_is_refused_today(vector: Recorded) -> None:
    early = expected_step(vector)
    assert step_of(vector, int(time.time() * 1000)) == (early if early in {"att-1", "att-2", "att-3"} else "att-8")


@pytest.mark.parametrize("vector", [one for one in VECTORS if one.kind in ("prod", "debug")], ids=lambda one: one.name)
def test_att_13_and_att_14_no_real_document_passes_a_policy_of_another_image(vector: Recorded) -> None:
    image = Measurement(b"\1" * 48, b"\2" * 48, b"\3" * 48)
    policy = Policy((image,), RootPolicy.nitro(), sha384(b"agreement"))
    found = parse_unverified(vector.data)
    at_ms = found.timestamp_ms
    for function, extra in (
        (verify_live, {"nonce": found.nonce if found.nonce and len(found.nonce) >= 16 else bytes(16)}),
        (verify_statement, {"nonce_present": found.nonce is not None}),
    ):
        with pytest.raises(VerificationError) as refusal:
            function(  # type: ignore[operator]
                vector.data,
                policy=policy,
                user_data=found.user_data or b"",
                public_key=found.public_key or b"",
                now_ms=at_ms,
                **extra,
            )
        assert refusal.value.step == ("att-13" if vector.kind == "debug" else "att-14")


@pytest.mark.parametrize("vector", [one for one in VECTORS if one.kind == "prod"], ids=lambda one: one.name)
def test_att_15_no_real_document_holds_an_agreement(vector: Recorded) -> None:
    found = parse_unverified(vector.data)
    policy = Policy(
        (Measurement(found.pcrs[0], found.pcrs[1], found.pcrs[2]),), RootPolicy.nitro(), sha384(b"agreement")
    )
    with pytest.raises(VerificationError) as refusal:
        verify_statement(
            vector.data,
            policy=policy,
            user_data=found.user_data or b"",
            public_key=found.public_key or b"",
            nonce_present=found.nonce is not None,
            now_ms=found.timestamp_ms,
        )
    assert refusal.value.step == "att-15"


def test_att_4_the_real_documents_are_refused_under_another_root() -> None:
    genuine = [vector for vector in VECTORS if vector.kind in ("prod", "debug")]
    for vector in genuine:
        with pytest.raises(VerificationError) as refusal:
            check_document(vector.data, root_sha256=bytes(32), at_ms=None)
        assert refusal.value.step == "att-4"
