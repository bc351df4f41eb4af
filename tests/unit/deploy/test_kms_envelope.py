"""`CiphertextForRecipient` as the emulated KMS writes it: byte for byte what AWS sent, and what the enclave opens."""

from __future__ import annotations

import hashlib
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from parley_deploy.kms import envelope
from parley_deploy.kms.envelope import CHUNK, FORMS, Form, enveloped, seal, spki_of
from parley_enclave.envelope import parse
from parley_enclave.recipient import Recipient
from support import vectors
from support.vectors import RecordedAnswer


@pytest.mark.parametrize("recorded", vectors.kms(), ids=lambda recorded: recorded.name)
def test_every_recorded_answer_is_written_again(recorded: RecordedAnswer) -> None:
    form: Form = "implicit" if "implicit" in recorded.name else "octets"
    found = parse(recorded.data)
    if recorded.parts is not None:
        told = recorded.parts
        assert (found.wrapped, found.iv, found.body) == (told["encrypted_key"], told["iv"], told["ciphertext"])
    assert enveloped(found.recipient, found.wrapped, found.iv, found.body, form=form) == recorded.data


@pytest.mark.parametrize("form", FORMS)
def test_what_is_sealed_for_a_recorded_key_has_its_recorded_form(form: Form) -> None:
    [recorded] = [item for item in vectors.kms() if item.key is not None]
    assert recorded.key is not None and recorded.plaintext is not None
    key = load_pem_private_key(recorded.key, None)
    assert isinstance(key, RSAPrivateKey)
    spki = spki_of(key.public_key())
    assert hashlib.sha256(spki).digest() == parse(recorded.data).recipient
    made = seal(recorded.plaintext, spki, key.public_key(), form=form, random=os.urandom)
    assert Recipient(key).open(made, len(recorded.plaintext)) == recorded.plaintext
    assert Recipient(key).open(recorded.data, len(recorded.plaintext)) == recorded.plaintext
    assert len(made) == len(recorded.data) if form == "octets" else len(made) < len(recorded.data)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 15, 16, 32, 64, 96, CHUNK - 1, CHUNK, CHUNK + 1, 4096])
def test_the_enclave_opens_any_size(size: int, form: Form) -> None:
    recipient = Recipient()
    plaintext = os.urandom(size)
    public = recipient._key.public_key()
    made = seal(plaintext, recipient.public, public, form=form, random=os.urandom)
    assert made.startswith(b"\x30\x80\x06\x09") and made.endswith(bytes(8))
    assert recipient.open(made, size) == plaintext


def test_long_content_is_split_into_octet_strings() -> None:
    made = enveloped(bytes(32), bytes(256), bytes(16), b"\xee" * (2 * CHUNK + 16), form="octets")
    assert made.count(b"\x04\x82\x03\xe8" + b"\xee" * CHUNK) == 2 and b"\x04\x10" + b"\xee" * 16 in made


def test_a_content_key_and_a_vector_are_fresh_each_time() -> None:
    recipient = Recipient()
    asked: list[int] = []

    def random(count: int) -> bytes:
        asked.append(count)
        return os.urandom(count)

    made = {
        seal(b"x" * 32, recipient.public, recipient._key.public_key(), form="octets", random=random) for _ in range(3)
    }
    assert len(made) == 3 and asked == [32, 16] * 3
    assert envelope.FORMS == ("octets", "implicit")
