"""The host as an attacker on what KMS answers: it reads no key from errors, and would if the errors differed (REVIEW E3).

Every call has a fresh RSA key, content key and IV; the plaintext is the same each time, and that is all the attack needs.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from parley_enclave import admission, envelope
from parley_enclave.recipient import Recipient
from parley_protocol.errors import ParleyError, VerificationError
from support.desk import MEMBERS, make_agreement
from support.enclave import Party, payload, rows_of
from support.kms import PaperKms, answer, arn, written

BLOCK: Final = 16
OAEP: Final = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


class Split(Recipient):
    """What a program does that opens as the textbooks say: a wrong padding is an error of its own."""

    def open(self, answer: bytes, size: int, random: Callable[[int], bytes] = os.urandom) -> bytes:
        found = envelope.parse(answer)
        decryptor = Cipher(algorithms.AES256(self._key.decrypt(found.wrapped, OAEP)), modes.CBC(found.iv)).decryptor()
        padded = decryptor.update(found.body) + decryptor.finalize()
        unpadder = PKCS7(128).unpadder()
        try:
            plaintext = unpadder.update(padded) + unpadder.finalize()
        except ValueError:
            raise VerificationError("kms-8", "wrong padding", code="malformed") from None
        return plaintext if len(plaintext) == size else bytes(size)


class Victim:
    """An enclave as a host sees it: a document, then a code for what the host brings. `kind` opens the answers."""

    def __init__(self, kind: type[Recipient]) -> None:
        agreement = make_agreement(kms={"ann": arn()})
        party = Party(agreement, "ann", MEMBERS["ann"], {"visits": rows_of(1, 900)})
        join = party.kms_join(PaperKms())
        uploads = [(item.cose, item.blob) for item in join.uploads]
        self._brought = admission.read_kms_join(join.cose, uploads, agreement)
        self._keys = party.kms_keys
        # Making keys takes long, and a fresh one hinders nobody: a few take turns.
        self._recipients = [kind() for _ in range(4)]
        self._calls = 0
        self.codes: Counter[str] = Counter()
        assert payload(join.cose)

    def kms(self) -> tuple[Recipient, envelope.Envelope, bytes]:
        """What the host gets from KMS for the next document."""
        self._calls += 1
        recipient = self._recipients[self._calls % len(self._recipients)]
        made = envelope.parse(answer(recipient.public, self._keys))
        return recipient, made, hashlib.sha256(recipient.public).digest()

    def code(self, recipient: Recipient, brought: bytes) -> str:
        """The code of the enclave's answer, "" where the join is admitted."""
        try:
            admission.open_kms_join(self._brought, recipient.open(brought, self._brought.size))
        except ParleyError as error:
            self.codes[error.code] += 1
            return error.code
        self.codes[""] += 1
        return ""

    def plaintext(self, block: int) -> bytes:
        """What the attacker is after."""
        return self._keys[block * BLOCK : (block + 1) * BLOCK]


def _short(blocks: list[bytes], block: int, mask: bytes) -> tuple[bytes, bytes]:
    """(IV, body) of one block alone, whose plaintext is that of `block` under a mask."""
    return _xor(blocks[block], mask), blocks[block + 1]


def _long(blocks: list[bytes], block: int, mask: bytes) -> tuple[bytes, bytes]:
    """The same at the end of a body of the right length."""
    body = [*blocks[1:-2], _xor(blocks[block], mask), blocks[block + 1]]
    return blocks[0], b"".join(body)


SHAPES: Final = {"short": _short, "long": _long}


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def attacked(
    victim: Victim, block: int, shape: Callable[[list[bytes], int, bytes], tuple[bytes, bytes]]
) -> bytes | None:
    """The plaintext of a block, byte by byte from its end, by what codes tell apart; None where they tell nothing."""

    def ask(mask: bytes) -> str:
        recipient, made, identifier = victim.kms()
        blocks = [made.iv, *(made.body[at : at + BLOCK] for at in range(0, len(made.body), BLOCK))]
        iv, body = shape(blocks, block, mask)
        return victim.code(recipient, written(identifier, made.wrapped, iv, body))

    usual = Counter(ask(os.urandom(BLOCK)) for _ in range(8)).most_common(1)[0][0]
    known = b""
    while len(known) < BLOCK:
        pad = len(known) + 1
        tail = bytes(value ^ pad for value in known)
        found = next((guess for guess in _guesses() if _tells(ask, usual, guess ^ pad, tail)), None)
        if found is None:
            return None
        known = bytes([found]) + known
    return known


def _guesses() -> Iterator[int]:
    yield from range(256)


def _tells(ask: Callable[[bytes], str], usual: str, value: int, tail: bytes) -> bool:
    head = BLOCK - 1 - len(tail)
    if ask(bytes(head) + bytes([value]) + tail) == usual:
        return False
    # The last byte could be right by accident, as the end of a longer padding: then another byte before it changes that.
    return head == 0 or ask(bytes(head - 1) + b"\xff" + bytes([value]) + tail) != usual


@pytest.mark.parametrize("shape", SHAPES)
def test_a_padding_oracle_reads_nothing(shape: str) -> None:
    victim = Victim(Recipient)
    assert attacked(victim, 1, SHAPES[shape]) is None
    assert set(victim.codes) == {"key"}
    # The victim is not deaf: what KMS says as it is is taken.
    recipient, made, identifier = victim.kms()
    assert victim.code(recipient, written(identifier, made.wrapped, made.iv, made.body)) == ""


@pytest.mark.parametrize("shape", SHAPES)
def test_with_split_codes_the_oracle_reads_a_content_key(shape: str) -> None:
    victim = Victim(Split)
    assert attacked(victim, 1, SHAPES[shape]) == victim.plaintext(1)
    assert set(victim.codes) == {"key", "malformed"}
