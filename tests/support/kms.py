"""KMS played in this process: ciphertexts under one key, and answers in the BER that KMS writes for an attested key.

The answers are made from scratch, so that a test can give any part of one another value.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.attestation.document import parse_unverified

OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
_ALGORITHM = bytes.fromhex(
    "06092a864886f70d010107302fa00f300d06096086480165030402010500a11c301a06092a864886f70d010108300d06096086480165030402010500"
)


def arn(digit: str = "1") -> KeyArn:
    """The name of a key that nobody has."""
    return KeyArn("aws", "eu-central-1", "111122223333", f"{digit * 8}-1111-4111-8111-111111111111")


def tlv(tag: int, *content: bytes) -> bytes:
    """One element of definite length."""
    data = b"".join(content)
    if len(data) < 0x80:
        return bytes([tag, len(data)]) + data
    width = (len(data).bit_length() + 7) // 8
    return bytes([tag, 0x80 | width]) + len(data).to_bytes(width, "big") + data


def endless(tag: int, *content: bytes) -> bytes:
    """One element of indefinite length."""
    return bytes([tag, 0x80]) + b"".join(content) + b"\0\0"


def oid(digits: str) -> bytes:
    """An object identifier by the hexadecimal digits of its content."""
    return tlv(0x06, bytes.fromhex(digits))


def written(
    identifier: bytes, wrapped: bytes, iv: bytes, body: bytes, *, implicit: bool = False, algorithm: bytes = _ALGORITHM
) -> bytes:
    """The envelope of these parts, in either of the encodings that KMS has used."""
    recipient = tlv(
        0x30, tlv(0x02, b"\x02"), tlv(0x80, identifier), tlv(0x30, algorithm), bytes([0x04, 0x82, 1, 0]) + wrapped
    )
    content = tlv(0x80, body) if implicit else endless(0xA0, tlv(0x04, body))
    encrypted = endless(0x30, oid("2a864886f70d010701"), tlv(0x30, oid("60864801650304012a"), tlv(0x04, iv)), content)
    enveloped = endless(0x30, tlv(0x02, b"\x02"), tlv(0x31, recipient), encrypted)
    return endless(0x30, oid("2a864886f70d010703"), endless(0xA0, enveloped))


def parts(public: bytes, plaintext: bytes, *, padded: bytes | None = None) -> tuple[bytes, bytes, bytes, bytes]:
    """Identifier, wrapped key, IV and body of an answer to the RSA key `public` (DER); `padded` is encrypted as it is."""
    key = serialization.load_der_public_key(public)
    assert isinstance(key, rsa.RSAPublicKey)
    cek, iv = os.urandom(32), os.urandom(16)
    count = 16 - len(plaintext) % 16
    encryptor = Cipher(algorithms.AES256(cek), modes.CBC(iv)).encryptor()
    body = encryptor.update(plaintext + bytes([count]) * count if padded is None else padded) + encryptor.finalize()
    return hashlib.sha256(public).digest(), key.encrypt(cek, OAEP), iv, body


def answer(public: bytes, plaintext: bytes, *, implicit: bool = False) -> bytes:
    """CiphertextForRecipient of a plaintext for an RSA key."""
    return written(*parts(public, plaintext), implicit=implicit)


class PaperKms:
    """One symmetric key and no policy: whoever asks with a document gets an answer to the key in it."""

    def __init__(self) -> None:
        self._key = AESGCM(os.urandom(32))
        self.implicit = False

    def encrypt(self, plaintext: bytes, context: Mapping[str, str]) -> bytes:
        """A ciphertext blob, bound to its context."""
        nonce = os.urandom(12)
        return nonce + self._key.encrypt(nonce, plaintext, _text(context))

    def decrypt(self, blob: bytes, context: Mapping[str, str], document: bytes) -> bytes:
        """CiphertextForRecipient; ValueError where the blob is another key's or another context's."""
        try:
            plaintext = self._key.decrypt(blob[:12], blob[12:], _text(context))
        except InvalidTag:
            raise ValueError("InvalidCiphertextException") from None
        public = parse_unverified(document).public_key
        assert public is not None
        return answer(public, plaintext, implicit=self.implicit)


def _text(context: Mapping[str, str]) -> bytes:
    return json.dumps(sorted(context.items())).encode()
