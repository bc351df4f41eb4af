"""The key with which KMS answers to this enclave and nobody else: made for one call, attested, and used once.

What the host brings back is not authenticated, and CBC under it would be an oracle: whoever can tell a wrong padding from a
wrong key learns the plaintext in a few thousand calls, although every call has a fresh key (REVIEW E3). So an answer is always
opened to as many bytes as were asked for. Where anything is wrong with it they are random, and the one check that follows, of
commitments that the party signed, fails as it does for any other wrong key.

The steps do the same work whichever of them fails, except that a form which is no envelope is seen at once and that RSA and
exceptions take some microseconds more or less; `enclave` therefore answers every refusal at the same time after its arrival.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from typing import Final, NoReturn, SupportsIndex

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from parley_enclave import envelope
from parley_enclave.envelope import Envelope
from parley_protocol.errors import MalformedError

_RSA_BITS: Final = 2048
_CEK_BYTES: Final = 32
_BLOCK: Final = 16
_OAEP: Final = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


class Recipient:
    """A fresh RSA key. `public` is the DER of its SubjectPublicKeyInfo, which the document carries."""

    __slots__ = ("_key", "public")

    public: bytes

    def __init__(self, key: rsa.RSAPrivateKey | None = None) -> None:
        self._key = key or rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
        self.public = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def open(self, answer: bytes, size: int, random: Callable[[int], bytes] = os.urandom) -> bytes:
        """`size` bytes: the plaintext of an answer, or random ones where it is not for this key or not of this size (kms-8).

        It never fails, and nothing but a check of the bytes tells which of the two they are.
        """
        substitute = random(size)
        found, good = self._envelope(answer, size, random)
        cek, unwrapped = self._unwrap(found.wrapped, random)
        decryptor = Cipher(algorithms.AES256(cek), modes.CBC(found.iv)).decryptor()
        padded = decryptor.update(found.body) + decryptor.finalize()
        good &= unwrapped & hmac.compare_digest(padded[size:], _padding(size))
        return _chosen(padded[:size], substitute, take_first=good)

    def _envelope(self, answer: bytes, size: int, random: Callable[[int], bytes]) -> tuple[Envelope, int]:
        """The envelope and 1; a random one of the right form and 0 where the answer is none for this key and size."""
        length = size + len(_padding(size))
        instead = Envelope(
            bytes(envelope.IDENTIFIER_BYTES),
            random(envelope.WRAPPED_BYTES),
            random(envelope.IV_BYTES),
            random(length),
        )
        try:
            found = envelope.parse(answer)
        except MalformedError:
            return instead, 0
        if len(found.body) != length:
            return instead, 0
        return found, int(hmac.compare_digest(found.recipient, hashlib.sha256(self.public).digest()))

    def _unwrap(self, wrapped: bytes, random: Callable[[int], bytes]) -> tuple[bytes, int]:
        instead = random(_CEK_BYTES)
        try:
            cek = self._key.decrypt(wrapped, _OAEP)
        except ValueError:
            return instead, 0
        return (cek, 1) if len(cek) == _CEK_BYTES else (instead, 0)

    def __repr__(self) -> str:
        return "Recipient(<private>)"

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a private key is not pickled")


def _padding(size: int) -> bytes:
    """PKCS#7 of a plaintext of `size` bytes."""
    count = _BLOCK - size % _BLOCK
    return bytes([count]) * count


def _chosen(first: bytes, second: bytes, *, take_first: int) -> bytes:
    """One of two byte strings of the same length, by the same work for either."""
    mask = -take_first & 0xFF
    return bytes((a & mask) | (b & ~mask & 0xFF) for a, b in zip(first, second, strict=True))
