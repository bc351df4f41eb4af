"""`CiphertextForRecipient`: a CMS EnvelopedData in BER, byte for byte of the shape of recorded answers of AWS.

The outer levels have indefinite lengths, the recipient's information has definite ones. The encrypted content comes in
two forms: octet strings in a constructed [0], or the bytes themselves in a primitive [0].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, Literal

from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

Form = Literal["octets", "implicit"]
"""How the encrypted content stands: octet strings in a constructed [0], or bytes in a primitive [0]."""
FORMS: Final[tuple[Form, ...]] = ("octets", "implicit")
CHUNK: Final = 1000
"""Bytes of one octet string in the constructed form, as the library that AWS's form comes from splits them."""

_ENVELOPED_DATA: Final = bytes.fromhex("06092a864886f70d010703")
_DATA: Final = bytes.fromhex("06092a864886f70d010701")
_RSAES_OAEP: Final = bytes.fromhex("06092a864886f70d010107")
_MGF1: Final = bytes.fromhex("06092a864886f70d010108")
_SHA256: Final = bytes.fromhex("300d06096086480165030402010500")
_AES256_CBC: Final = bytes.fromhex("060960864801650304012a")
_VERSION: Final = bytes.fromhex("020102")
_SEQUENCE: Final = 0x30
_SET: Final = 0x31
_OCTETS: Final = 0x04
_CONTEXT_0: Final = 0x80
_CONTEXT_0_CONSTRUCTED: Final = 0xA0
_CONTEXT_1_CONSTRUCTED: Final = 0xA1


def seal(plaintext: bytes, spki: bytes, key: RSAPublicKey, *, form: Form, random: Callable[[int], bytes]) -> bytes:
    """`plaintext` for the holder of `key`, whose DER is `spki`. `random`: count in, bytes out."""
    content_key, vector = random(32), random(16)
    padder = PKCS7(128).padder()
    encryptor = Cipher(AES256(content_key), CBC(vector)).encryptor()
    content = encryptor.update(padder.update(plaintext) + padder.finalize()) + encryptor.finalize()
    encrypted_key = key.encrypt(content_key, OAEP(MGF1(SHA256()), SHA256(), None))
    return enveloped(hashlib.sha256(spki).digest(), encrypted_key, vector, content, form=form)


def enveloped(identifier: bytes, encrypted_key: bytes, vector: bytes, content: bytes, *, form: Form) -> bytes:
    """The bytes around what was encrypted. `identifier`: the SHA-256 of the recipient's SubjectPublicKeyInfo."""
    oaep = _definite(
        _SEQUENCE,
        _definite(_CONTEXT_0_CONSTRUCTED, _SHA256)
        + _definite(_CONTEXT_1_CONSTRUCTED, _definite(_SEQUENCE, _MGF1 + _SHA256)),
    )
    recipient = _definite(
        _SEQUENCE,
        _VERSION
        + _definite(_CONTEXT_0, identifier)
        + _definite(_SEQUENCE, _RSAES_OAEP + oaep)
        + _definite(_OCTETS, encrypted_key),
    )
    if form == "octets":
        parts = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
        encrypted = _indefinite(_CONTEXT_0_CONSTRUCTED, b"".join(_definite(_OCTETS, part) for part in parts))
    else:
        encrypted = _definite(_CONTEXT_0, content)
    algorithm = _definite(_SEQUENCE, _AES256_CBC + _definite(_OCTETS, vector))
    data = _VERSION + _definite(_SET, recipient) + _indefinite(_SEQUENCE, _DATA + algorithm + encrypted)
    return _indefinite(_SEQUENCE, _ENVELOPED_DATA + _indefinite(_CONTEXT_0_CONSTRUCTED, _indefinite(_SEQUENCE, data)))


def spki_of(key: RSAPublicKey) -> bytes:
    """The DER of a key's SubjectPublicKeyInfo."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _definite(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    size = (length.bit_length() + 7) // 8
    return bytes([tag, 0x80 | size]) + length.to_bytes(size, "big") + content


def _indefinite(tag: int, content: bytes) -> bytes:
    return bytes([tag, 0x80]) + content + b"\0\0"
