"""HPKE (RFC 9180) with the one suite of Parley: MLKEM768_X25519, HKDF_SHA384, AES_256_GCM, base mode.

A public key is the 1,184 bytes of ML-KEM-768 and the 32 of X25519, a private one the 64-byte seed of ML-KEM-768 and the 32
bytes of X25519. A sealed message is the 1,120 bytes of the encapsulation, then the ciphertext with its tag of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from parley_protocol import limits
from parley_protocol.errors import MalformedError, VerificationError

PRIVATE_BYTES: Final = 96
OVERHEAD_BYTES: Final = 1120 + 16
"""What sealing adds: encapsulation and tag."""
_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA384, AEAD.AES_256_GCM)
_SEED_BYTES: Final = 64
_X25519_BYTES: Final = 32


class SealingKey:
    """A private key. It prints and pickles nothing of itself; whoever drops it has forgotten it."""

    __slots__ = ("_key", "_raw", "public")

    public: bytes

    def __init__(self, raw: bytes) -> None:
        if len(raw) != PRIVATE_BYTES:
            raise MalformedError(f"a private sealing key has {PRIVATE_BYTES} bytes")
        self._raw = raw
        mlkem = MLKEM768PrivateKey.from_seed_bytes(raw[:_SEED_BYTES])
        x25519 = X25519PrivateKey.from_private_bytes(raw[_SEED_BYTES:])
        self._key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def private_bytes(self) -> bytes:
        """The key itself, for the file of a private identity and nothing else."""
        return self._raw

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """What was sealed to this key for `info`; VerificationError idn-4, code "key", where nothing was."""
        try:
            return _SUITE.decrypt(sealed, self._key, info)
        except (InvalidTag, ValueError):
            raise VerificationError("idn-4", "not sealed to this key for this purpose", code="key") from None

    def __repr__(self) -> str:
        return "SealingKey(<private>)"

    def __reduce__(self) -> str:
        raise TypeError("a private key is not pickled")


def generate_sealing_key(random: Callable[[int], bytes]) -> SealingKey:
    """A fresh private key; `.public` are the 1,216 bytes that others seal to."""
    return SealingKey(random(PRIVATE_BYTES))


def check_public(public: bytes) -> None:
    """MalformedError where these are no bytes that one could seal to."""
    _public(public)


def seal(public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """`plaintext` sealed to a public key for `info`; MalformedError where the key is none."""
    return _SUITE.encrypt(plaintext, _public(public), info)


def open(private: SealingKey, ciphertext: bytes, info: bytes) -> bytes:  # noqa: A001 - the name of the operation in RFC 9180
    """What `seal` sealed; VerificationError idn-4, code "key", where it was not to this key and for this `info`."""
    return private.open(ciphertext, info)


def _public(public: bytes) -> MLKEM768X25519PublicKey:
    if len(public) != limits.SEALING_KEY_BYTES:
        raise MalformedError(f"a public sealing key has {limits.SEALING_KEY_BYTES} bytes")
    try:
        mlkem = MLKEM768PublicKey.from_public_bytes(public[:-_X25519_BYTES])
        x25519 = X25519PublicKey.from_public_bytes(public[-_X25519_BYTES:])
        # A point of small order has no shared secret; any private key shows it.
        X25519PrivateKey.from_private_bytes(bytes(_X25519_BYTES)).exchange(x25519)
    except ValueError:
        raise MalformedError("a public sealing key is no key") from None
    return MLKEM768X25519PublicKey(mlkem, x25519)
