"""Attestation documents under a root of the tests, of which every part can be made wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from functools import cache
from typing import Any

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA384

from parley_deploy.pki import Issued, LocalRoot, issue, moment
from parley_protocol import cose
from parley_protocol.attestation.document import extended
from parley_protocol.attestation.policy import Measurement, Policy, RootPolicy
from parley_protocol.encoding import sha384

NOW = 1_800_000_000_000
"""The time of the tests: 2027-01-15 08:00:00 UTC."""
INSTANCE = "i-0123456789abcdef0"
MODULE = f"{INSTANCE}-enc0123456789abcdef"
AGREEMENT = sha384(b"an agreement")
IMAGE = Measurement(b"\1" * 48, b"\2" * 48, b"\3" * 48)
NONCE = b"n" * 32
USER_DATA = b"user data"
PUBLIC_KEY = b"k" * 32
PCRS: Mapping[int, bytes] = {
    **dict.fromkeys(range(16), bytes(48)),
    0: IMAGE.pcr0,
    1: IMAGE.pcr1,
    2: IMAGE.pcr2,
    4: extended(INSTANCE.encode()),
    16: extended(AGREEMENT),
}
_CA = frozenset({"digital_signature", "key_cert_sign", "crl_sign"})
_LEVELS: tuple[Mapping[str, Any], ...] = (
    {"name": "root.nitro-enclaves", "life": timedelta(days=9000), "authority": True},
    {"name": "a1.local.aws.nitro-enclaves", "life": timedelta(hours=481), "authority": True, "path_length": 2},
    {"name": "b2.zonal.local.aws.nitro-enclaves", "life": timedelta(days=6), "authority": True, "path_length": 1},
    {"name": f"{INSTANCE}.local.aws.nitro-enclaves", "life": timedelta(days=1), "authority": True, "path_length": 0},
    {
        "name": f"{MODULE}.local.aws",
        "life": timedelta(seconds=10803),
        "authority": False,
        "usage": frozenset({"digital_signature", "content_commitment"}),
        "usage_critical": False,
    },
)


@cache
def chain() -> tuple[Issued, ...]:
    """Root, region, zone, instance, enclave: as they should be. Made once; every document of the tests may use them."""
    return altered_chain({})


def altered_chain(changes: Mapping[int, Mapping[str, Any]]) -> tuple[Issued, ...]:
    """A chain in which `changes` maps a place (0 the root .. 4 the enclave) to other arguments of `issue`."""
    made: list[Issued] = []
    for place, level in enumerate(_LEVELS):
        arguments = {"start": moment(NOW) - timedelta(minutes=1), **level, **changes.get(place, {})}
        issuer = arguments.pop("issuer", made[-1] if made else None)
        made.append(issue(arguments.pop("name"), issuer, **arguments))
    return tuple(made)


def extended_certificate(issued: Issued, issuer: Issued, extension: x509.ExtensionType) -> Issued:
    """The same certificate with one more critical extension."""
    old = issued.certificate
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, old.public_key(), old.serial_number, old.not_valid_before_utc, old.not_valid_after_utc
    )
    for one in old.extensions:
        builder = builder.add_extension(one.value, one.critical)
    return Issued(builder.add_extension(extension, critical=True).sign(issuer.key, SHA384()), issued.key)


def payload(certificates: Collection[bytes | Issued] | None = None, **changes: Any) -> dict[str, Any]:
    """The payload of a good document, with `changes`; a register set to None is left out."""
    ders = [one.der if isinstance(one, Issued) else one for one in (certificates or chain())]
    registers = {**PCRS, **changes.pop("pcrs", {})}
    return {
        "module_id": MODULE,
        "digest": "SHA384",
        "timestamp": NOW,
        "pcrs": {index: value for index, value in registers.items() if value is not None},
        "certificate": ders[-1],
        "cabundle": ders[:-1],
        "public_key": PUBLIC_KEY,
        "user_data": USER_DATA,
        "nonce": NONCE,
        **changes,
    }


def document(
    certificates: tuple[Issued, ...] | None = None, *, key: EllipticCurvePrivateKey | None = None, **changes: Any
) -> bytes:
    """A document signed by the key of the last certificate, or by `key`."""
    used = certificates or chain()
    return cose.sign(cbor2.dumps(payload(used, **changes)), key or used[-1].key)


def root_sha256(certificates: tuple[Issued, ...] | None = None) -> bytes:
    """The SHA-256 of a chain's root."""
    return LocalRoot((certificates or chain())[0]).sha256


def policy(certificates: tuple[Issued, ...] | None = None, *images: Measurement) -> Policy:
    """The policy that accepts a good document under the chain's root."""
    return Policy(images or (IMAGE,), RootPolicy.simulated(root_sha256(certificates)), AGREEMENT)
