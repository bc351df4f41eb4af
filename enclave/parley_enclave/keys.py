"""Keys of a session: made of the kernel's randomness and the module's together, kept in memory, never written.

The Ed25519 key, the X25519 half and the ML-KEM half of the sealing key are made from seeds that mix both sources, so that
one bad source is not enough. What HPKE draws inside `cryptography` (encapsulation) comes from the kernel alone, which the
init of an image seeds from the module; `seed_kernel` gives it more, without credit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from parley_protocol.errors import VerificationError

Random = Callable[[int], bytes]


def random_bytes(module: Random, count: int) -> bytes:
    """`count` bytes from the kernel's randomness and that of the module, mixed by HKDF-SHA384."""
    secret = os.urandom(64) + module(64)
    return HKDF(algorithm=hashes.SHA384(), length=count, salt=None, info=b"parley/1/enclave-random").derive(secret)


def seed_kernel(module: Random) -> None:
    """Mixes randomness of the module into the kernel's pool."""
    with open("/dev/urandom", "wb", buffering=0) as pool:
        pool.write(module(256))


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The private keys of one session."""

    signing: Ed25519PrivateKey = field(repr=False)
    sealing: MLKEM768X25519PrivateKey = field(repr=False)
    sealing_public: bytes = field(repr=False)

    @property
    def signing_public(self) -> bytes:
        """The public half of the signing key, 32 bytes."""
        return self.signing.public_key().public_bytes_raw()

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """What was sealed to this session (HPKE, RFC 9180, base mode); VerificationError adm-3 where it was not."""
        try:
            return SUITE.decrypt(sealed, self.sealing, info=info)
        except (InvalidTag, ValueError):
            raise VerificationError("adm-3", "the sealed keys do not open", code="key") from None


def make(module: Random) -> SessionKeys:
    """Fresh keys; `module` gives random bytes of the NSM."""
    sealing = MLKEM768X25519PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(random_bytes(module, 64)),
        X25519PrivateKey.from_private_bytes(random_bytes(module, 32)),
    )
    public = sealing.public_key()
    return SessionKeys(Ed25519PrivateKey.from_private_bytes(random_bytes(module, 32)), sealing, b"")
