"""COSE_Sign1: only what the key signed, in the one form of envelope."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from parley_protocol import cose
from parley_protocol.encoding import Value, decode, encode
from parley_protocol.errors import MalformedError, VerificationError

ED = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
EC = generate_private_key(SECP384R1())
P384_ORDER = int("ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)


def parts(signed: bytes) -> list[Value]:
    value = decode(signed)
    assert type(value) is list
    return value


@pytest.mark.parametrize("key", [ED, EC])
def test_enc_8_a_signed_payload_comes_back(key: Ed25519PrivateKey) -> None:
    signed = cose.sign(b"payload", key)
    assert cose.verify(signed, key.public_key()) == b"payload"
    assert cose.payload_unverified(signed) == b"payload"


def test_enc_8_the_signed_bytes_are_those_of_rfc_9052() -> None:
    protected, unprotected, payload, signature = parts(cose.sign(b"payload", ED))
    assert (protected, unprotected, payload) == (b"\xa1\x01\x27", {}, b"payload")
    structure = bytes.fromhex("846a5369676e61747572653143a10127404770") + b"ayload"
    assert type(signature) is bytes
    ED.public_key().verify(signature, structure)


@pytest.mark.parametrize("key", [ED, EC])
@given(draw=st.data())
def test_enc_8_altered_envelopes_are_malformed_or_do_not_verify(key: Ed25519PrivateKey, draw: st.DataObject) -> None:
    signed = bytearray(cose.sign(b"payload", key))
    signed[draw.draw(st.integers(0, len(signed) - 1))] ^= draw.draw(st.integers(1, 255))
    with pytest.raises((MalformedError, VerificationError)):
        cose.verify(bytes(signed), key.public_key())


@given(st.binary(max_size=100))
def test_any_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        cose.payload_unverified(data)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, b""),
        (0, encode({})),
        (0, encode({1: -7})),
        (0, encode({1: -8, 4: b"kid"})),
        (0, {1: -8}),
        (1, {4: b"kid"}),
        (1, {1: -8}),
        (1, None),
        (2, None),
        (2, "payload"),
        (3, b""),
        (3, bytes(63)),
        (3, bytes(96)),
        (3, None),
    ],
)
def test_enc_9_refuses_any_other_envelope(place: int, value: Value) -> None:
    envelope = parts(cose.sign(b"payload", ED))
    envelope[place] = value
    with pytest.raises(MalformedError):
        cose.verify(encode(envelope), ED.public_key())


def test_enc_9_refuses_tag_18_and_a_fifth_element() -> None:
    signed = cose.sign(b"payload", ED)
    for other in (b"\xd2" + signed, encode([*parts(signed), None]), signed + b"\0"):
        with pytest.raises(MalformedError):
            cose.payload_unverified(other)


def test_enc_8_refuses_another_key_and_another_algorithm_at_the_step_of_the_caller() -> None:
    for signer, checker in (
        (ED, Ed25519PrivateKey.generate()),
        (ED, EC),
        (EC, ED),
        (EC, generate_private_key(SECP384R1())),
    ):
        with pytest.raises(VerificationError) as refusal:
            cose.verify(cose.sign(b"payload", signer), checker.public_key(), step="rcp-1")
        assert (refusal.value.step, refusal.value.code) == ("rcp-1", "signature")


def test_only_p384_signs_es384() -> None:
    with pytest.raises(TypeError):
        cose.sign(b"", generate_private_key(SECP256R1()))


def test_enc_10_the_twin_of_an_es384_signature_verifies_so_bytes_of_envelopes_name_nothing() -> None:
    envelope = parts(cose.sign(b"payload", EC))
    signature = envelope[3]
    assert type(signature) is bytes
    twin = P384_ORDER - int.from_bytes(signature[48:], "big")
    envelope[3] = signature[:48] + twin.to_bytes(48, "big")
    assert cose.verify(encode(envelope), EC.public_key()) == b"payload"


def test_enc_8_zero_and_out_of_range_es384_signatures_do_not_verify() -> None:
    envelope = parts(cose.sign(b"payload", EC))
    for signature in (bytes(96), b"\xff" * 96):
        envelope[3] = signature
        with pytest.raises(VerificationError):
            cose.verify(encode(envelope), EC.public_key())
