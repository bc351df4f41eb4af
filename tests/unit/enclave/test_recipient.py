"""The key that KMS answers to: what opens, and that everything else is opened to random bytes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from parley_enclave import envelope
from parley_enclave.recipient import Recipient
from support import vectors
from support.kms import answer, parts, written

RECIPIENT = Recipient()
OTHER = Recipient()
KEYS = bytes(range(64))


@pytest.mark.parametrize(
    "recorded", [item for item in vectors.kms() if item.key is not None], ids=lambda item: item.name
)
def test_kms_8_an_answer_that_kms_sent_opens(recorded: vectors.RecordedAnswer) -> None:
    assert recorded.key is not None and recorded.plaintext is not None
    key = serialization.load_pem_private_key(recorded.key, None)
    assert isinstance(key, rsa.RSAPrivateKey)
    recipient = Recipient(key)
    assert recipient.open(recorded.data, len(recorded.plaintext)) == recorded.plaintext


@pytest.mark.parametrize("size", [32, 47, 48, 64, 1056])
@pytest.mark.parametrize("implicit", [False, True])
def test_kms_8_both_encodings_open_at_every_size(size: int, implicit: bool) -> None:
    plaintext = bytes(number % 251 for number in range(size))
    assert RECIPIENT.open(answer(RECIPIENT.public, plaintext, implicit=implicit), size) == plaintext


def test_a_key_is_fresh_of_2048_bits_and_fits_a_document() -> None:
    key = serialization.load_der_public_key(RECIPIENT.public)
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.key_size == 2048 and len(RECIPIENT.public) == 294
    assert RECIPIENT.public != OTHER.public


def _of(**changes: bytes) -> bytes:
    identifier, wrapped, iv, body = parts(RECIPIENT.public, KEYS)
    found = {"identifier": identifier, "wrapped": wrapped, "iv": iv, "body": body} | changes
    return written(found["identifier"], found["wrapped"], found["iv"], found["body"])


WRONG: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no envelope": lambda: b"\x30\x80" + bytes(300),
    "truncated": lambda: answer(RECIPIENT.public, KEYS)[:-1],
    "for another key": lambda: answer(OTHER.public, KEYS),
    "another key's name": lambda: _of(identifier=bytes(32)),
    "wrapped for another key": lambda: _of(wrapped=parts(OTHER.public, KEYS)[1]),
    "no wrapped key": lambda: _of(wrapped=bytes(256)),
    "above the modulus": lambda: _of(wrapped=b"\xff" * 256),
    "a short content key": lambda: _of(wrapped=_wrapped(bytes(16))),
    "a long content key": lambda: _of(wrapped=_wrapped(bytes(33))),
    "no body": lambda: _of(body=b""),
    "no whole blocks": lambda: _of(body=bytes(79)),
    "a block less": lambda: _of(body=parts(RECIPIENT.public, KEYS)[3][:-16]),
    "a longer plaintext": lambda: answer(RECIPIENT.public, KEYS + bytes(16)),
    "a shorter plaintext": lambda: answer(RECIPIENT.public, KEYS[:-1]),
    "no padding": lambda: written(*parts(RECIPIENT.public, KEYS, padded=KEYS + bytes(16))),
    "padding of ISO 10126": lambda: written(*parts(RECIPIENT.public, KEYS, padded=KEYS + bytes(15) + b"\x10")),
    "another content key": lambda: _of(wrapped=_wrapped(bytes(32))),
}


def _wrapped(cek: bytes) -> bytes:
    from support.kms import OAEP

    key = serialization.load_der_public_key(RECIPIENT.public)
    assert isinstance(key, rsa.RSAPublicKey)
    return key.encrypt(cek, OAEP)


@pytest.mark.parametrize("wrong", WRONG)
def test_kms_8_what_is_not_the_answer_is_random_bytes_of_the_size_asked_for(wrong: str) -> None:
    data = WRONG[wrong]()
    found = {RECIPIENT.open(data, 64) for _ in range(2)}
    assert len(found) == 2, "the same bytes twice are not random"
    assert all(len(opened) == 64 and opened != KEYS for opened in found)


def test_kms_8_what_it_opens_to_is_the_substitute_that_was_drawn_before() -> None:
    """The random bytes are drawn before anything is looked at, so a failure costs no draw that success does not."""

    def drawing(drawn: list[int]) -> Callable[[int], bytes]:
        def random(count: int) -> bytes:
            drawn.append(count)
            return bytes([len(drawn)]) * count

        return random

    good: list[int] = []
    bad: list[int] = []
    assert RECIPIENT.open(answer(RECIPIENT.public, KEYS), 64, drawing(good)) == KEYS
    assert RECIPIENT.open(WRONG["no padding"](), 64, drawing(bad)) == b"\x01" * 64
    assert good == bad


def test_a_private_key_is_neither_printed_nor_pickled() -> None:
    assert repr(RECIPIENT) == "Recipient(<private>)"
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            take(RECIPIENT)


def test_an_envelope_holds_no_secret() -> None:
    found = envelope.parse(answer(RECIPIENT.public, KEYS))
    assert KEYS not in (found.body, found.wrapped)
