"""Keys of a session: made of the kernel's randomness and the module's together, kept in memory, never written.

All private keys are made from seeds that mix both sources, so that one bad source is not enough. What HPKE draws inside
`cryptography` when outputs are sealed comes from the kernel alone; `seed_kernel` gives the kernel more, without credit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from parley_protocol.hpke import SealingKey, generate_sealing_key
from parley_protocol.secret import Secret

Random = Callable[[int], bytes]


def random_bytes(module: Random, count: int) -> bytes:
    """`count` bytes from the kernel's randomness and that of the module, mixed by HKDF-SHA384."""
    secret = os.urandom(64) + module(64)
    return HKDF(algorithm=hashes.SHA384(), length=count, salt=None, info=b"parley/1/enclave-random").derive(secret)


def seed_kernel(module: Random) -> None:
    """Mixes randomness of the module into the kernel's pool."""
    with Path("/dev/urandom").open("wb", buffering=0) as pool:
        pool.write(module(256))


@dataclass(frozen=True, slots=True)
class SessionKeys(Secret):
    """The private keys of one session."""

    signing: Ed25519PrivateKey = field(repr=False)
    sealing: SealingKey = field(repr=False)

    @property
    def signing_public(self) -> bytes:
        """The public half of the signing key, 32 bytes."""
        return self.signing.public_key().public_bytes_raw()

    @property
    def sealing_public(self) -> bytes:
        """The public half of the sealing key."""
        return self.sealing.public


def make(module: Random) -> SessionKeys:
    """Fresh keys; `module` gives random bytes of the NSM."""

    def random(count: int) -> bytes:
        return random_bytes(module, count)

    return SessionKeys(Ed25519PrivateKey.from_private_bytes(random(32)), generate_sealing_key(random))
