"""Identities: an Ed25519 key that signs and a hybrid HPKE key that opens (SPEC, "Identities").

Names prove nothing: people compare fingerprints. Files are PEM (RFC 7468): a private one holds the signing key in PKCS#8 and
the sealing key in a block of its own, since the hybrid key has no PKCS#8 form; with a passphrase both stand in one block
that scrypt and AES-256-GCM protect.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from parley_protocol import cose, limits
from parley_protocol.encoding import decode, encode, sha384
from parley_protocol.errors import MalformedError, VerificationError
from parley_protocol.hpke import PRIVATE_BYTES, SealingKey, check_public

Random = Callable[[int], bytes]

_LABEL: Final = "parley/1/identity"
_DERIVE_LABEL: Final = "parley/1/derive"
_ENCRYPTED_LABEL: Final = "parley/1/encrypted-identity"
_PUBLIC_BLOCK: Final = "PARLEY PUBLIC IDENTITY"
_SIGNING_BLOCK: Final = "PRIVATE KEY"
_SEALING_BLOCK: Final = "PARLEY SEALING KEY"
_ENCRYPTED_BLOCK: Final = "PARLEY ENCRYPTED IDENTITY"
_SIGNING_BYTES: Final = 32
_SALT_BYTES: Final = 16
_NONCE_BYTES: Final = 12
_BLOCK: Final = re.compile(
    rb"-----BEGIN ([A-Z ]{1,64})-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END ([A-Z ]{1,64})-----[ \t]*(?:\r?\n|\Z)"
)


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What others know of a member. MalformedError where the bytes are no keys."""

    signing: bytes = field(repr=False)
    sealing: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if type(self.signing) is not bytes or len(self.signing) != _SIGNING_BYTES:  # idn-2
            raise MalformedError(f"a public signing key has {_SIGNING_BYTES} bytes")
        if type(self.sealing) is not bytes:
            raise MalformedError("a public sealing key is not a byte string")
        check_public(self.sealing)

    @property
    def fingerprint(self) -> str:
        """What people read to each other, such as "7f3a-91c2-0b5e-d4d8": 64 bits of SHA-384 of the statement (idn-3)."""
        digits = sha384(self.to_bytes())[:8].hex()
        return "-".join(digits[start : start + 4] for start in range(0, 16, 4))

    def to_bytes(self) -> bytes:
        """The statement ["parley/1/identity", signing, sealing]."""
        return encode([_LABEL, self.signing, self.sealing])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The identity that the statement names (idn-1); MalformedError for anything else."""
        value = decode(data, limit=limits.KEY_FILE_BYTES)
        if type(value) is not list or len(value) != 3 or value[0] != _LABEL:
            raise MalformedError("not a public identity")
        signing, sealing = value[1], value[2]
        if type(signing) is not bytes or type(sealing) is not bytes:
            raise MalformedError("not a public identity")
        return cls(signing, sealing)

    def verify(self, signed: bytes, *, step: str = "idn-5") -> bytes:
        """The payload of a COSE_Sign1 of this member; VerificationError at `step`, code "signature"."""
        return cose.verify(signed, Ed25519PublicKey.from_public_bytes(self.signing), step=step)

    def __repr__(self) -> str:
        return f"PublicIdentity({self.fingerprint})"


class PrivateIdentity:
    """A member's keys. They are never printed, copied or pickled; `dump_private` is the one way out."""

    __slots__ = ("_sealing", "_signing", "public")

    public: PublicIdentity

    def __init__(self, signing: Ed25519PrivateKey, sealing: SealingKey) -> None:
        self._signing = signing
        self._sealing = sealing
        self.public = PublicIdentity(signing.public_key().public_bytes_raw(), sealing.public)

    @classmethod
    def generate(cls, random: Random) -> Self:
        """Fresh keys from `random`, which gives as many unpredictable bytes as it is asked for."""
        return cls(Ed25519PrivateKey.from_private_bytes(random(_SIGNING_BYTES)), SealingKey(random(PRIVATE_BYTES)))

    def sign(self, payload: bytes) -> bytes:
        """A COSE_Sign1 over a statement's bytes."""
        return cose.sign(payload, self._signing)

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """What was sealed to this member for `info`; VerificationError idn-4, code "key", where nothing was."""
        return self._sealing.open(sealed, info)

    def private_blocks(self) -> tuple[bytes, bytes]:
        """The signing key in PKCS#8 and the raw sealing key, for `dump_private` and nothing else."""
        signing = self._signing.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return signing, self._sealing.private_bytes()

    def derive(self, label: bytes, context: bytes, length: int) -> bytes:
        """`length` secret bytes that only this member can make, the same every time for the same label and context."""
        info = encode([_DERIVE_LABEL, label, context])  # idn-7
        return HKDF(hashes.SHA384(), length, None, info).derive(self._signing.private_bytes_raw())

    def __repr__(self) -> str:
        return f"PrivateIdentity({self.public.fingerprint})"

    def __reduce__(self) -> str:
        raise TypeError("a private identity is neither pickled nor copied")


def dump_public(identity: PublicIdentity) -> bytes:
    """The file that a member gives to the others."""
    return _pem(_PUBLIC_BLOCK, identity.to_bytes())


def load_public(data: bytes) -> PublicIdentity:
    """The identity in a public file; MalformedError for anything else, a private file included."""
    blocks = _blocks(data)
    if [name for name, _ in blocks] != [_PUBLIC_BLOCK]:
        raise MalformedError("not a file of a public identity")
    return PublicIdentity.from_bytes(blocks[0][1])


def dump_private(identity: PrivateIdentity, passphrase: str | None = None, *, random: Random) -> bytes:
    """The file of a private identity, for nobody else to read; `random` gives salt and nonce."""
    signing, sealing = identity.private_blocks()
    plain = _pem(_SIGNING_BLOCK, signing) + _pem(_SEALING_BLOCK, sealing)
    if passphrase is None:
        return plain
    salt, nonce = random(_SALT_BYTES), random(_NONCE_BYTES)
    ciphertext = AESGCM(_passphrase_key(passphrase, salt)).encrypt(nonce, plain, _ENCRYPTED_LABEL.encode())
    return _pem(_ENCRYPTED_BLOCK, encode([_ENCRYPTED_LABEL, salt, nonce, ciphertext]))


def needs_passphrase(data: bytes) -> bool:
    """Whether the file of a private identity is protected by one; MalformedError where it is no PEM file."""
    return [name for name, _ in _blocks(data)] == [_ENCRYPTED_BLOCK]


def load_private(data: bytes, passphrase: str | None = None) -> PrivateIdentity:
    """The identity in a private file.

    MalformedError where the file is none; VerificationError idn-6, code "passphrase", where the passphrase is missing or
    wrong. A passphrase for a file that has none is not looked at.
    """
    blocks = _blocks(data)
    if [name for name, _ in blocks] == [_ENCRYPTED_BLOCK]:
        blocks = _blocks(_decrypt(blocks[0][1], passphrase))
    if [name for name, _ in blocks] != [_SIGNING_BLOCK, _SEALING_BLOCK]:
        raise MalformedError("not a file of a private identity")
    return PrivateIdentity(_signing_key(blocks[0][1]), SealingKey(blocks[1][1]))


def _signing_key(der: bytes) -> Ed25519PrivateKey:
    try:
        key = load_der_private_key(der, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise MalformedError("the signing key is no PKCS#8 key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise MalformedError("the signing key is not an Ed25519 key")
    return key


def _decrypt(data: bytes, passphrase: str | None) -> bytes:
    value = decode(data, limit=limits.KEY_FILE_BYTES)
    if type(value) is not list or len(value) != 4 or value[0] != _ENCRYPTED_LABEL:
        raise MalformedError("not an encrypted identity")
    _, salt, nonce, ciphertext = value
    if type(salt) is not bytes or type(nonce) is not bytes or type(ciphertext) is not bytes:
        raise MalformedError("not an encrypted identity")
    if len(salt) != _SALT_BYTES or len(nonce) != _NONCE_BYTES:
        raise MalformedError("not an encrypted identity")
    if passphrase is None:
        raise VerificationError("idn-6", "the file needs its passphrase", code="passphrase")
    try:
        return AESGCM(_passphrase_key(passphrase, salt)).decrypt(nonce, ciphertext, _ENCRYPTED_LABEL.encode())
    except InvalidTag:
        raise VerificationError("idn-6", "the passphrase is wrong, or the file is damaged", code="passphrase") from None


def _passphrase_key(passphrase: str, salt: bytes) -> bytes:
    secret = passphrase.encode("utf-8", "surrogatepass")
    if not 0 < len(secret) <= limits.PASSPHRASE_BYTES:
        raise VerificationError("idn-6", f"a passphrase has 1 to {limits.PASSPHRASE_BYTES} bytes", code="passphrase")
    return Scrypt(salt=salt, length=32, n=limits.SCRYPT_N, r=8, p=1).derive(secret)


def _pem(name: str, data: bytes) -> bytes:
    text = base64.b64encode(data)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"".join(
        [f"-----BEGIN {name}-----\n".encode(), *(line + b"\n" for line in lines), f"-----END {name}-----\n".encode()]
    )


def _blocks(data: bytes) -> list[tuple[str, bytes]]:
    """The blocks of a PEM file, in order: nothing but blank space may stand between them."""
    if len(data) > limits.KEY_FILE_BYTES:  # idn-8
        raise MalformedError(f"a key file has at most {limits.KEY_FILE_BYTES} bytes")
    found: list[tuple[str, bytes]] = []
    position = 0
    text = data.strip()
    while position < len(text):
        block = _BLOCK.match(text, position)
        if block is None or block[1] != block[3]:
            raise MalformedError("not a PEM file")
        try:
            content = base64.b64decode(re.sub(rb"[\r\n]", b"", block[2]), validate=True)
        except binascii.Error:
            raise MalformedError("a block of a PEM file is not base64") from None
        found.append((block[1].decode(), content))
        position = block.end()
        while text[position : position + 1].isspace():
            position += 1
    return found
