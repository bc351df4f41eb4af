"""The parameter `Recipient`: a genuine attestation document and the key in it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from parley_deploy.kms.envelope import spki_of
from parley_deploy.kms.errors import KmsError, constraint, invalid
from parley_protocol.attestation.verify import check_document
from parley_protocol.errors import VerificationError

ALGORITHM: Final = "RSAES_OAEP_SHA_256"
MODULUS_BITS: Final = 2048
DOCUMENT_BYTES: Final = 262_144
"""Longest document in AWS's model of the parameter."""


@dataclass(frozen=True, slots=True)
class Recipient:
    """Whom an answer is for: the attested key, and the registers, which are condition keys of policies."""

    key: RSAPublicKey = field(repr=False)
    spki: bytes = field(repr=False)
    registers: Mapping[int, bytes] = field(repr=False)
    module_id: str

    def conditions(self) -> dict[str, str]:
        """The condition keys `kms:RecipientAttestation:*` of a request that carries this document."""
        found = {f"kms:RecipientAttestation:PCR{index}": value.hex() for index, value in self.registers.items()}
        if 0 in self.registers:
            found["kms:RecipientAttestation:ImageSha384"] = self.registers[0].hex()
        return found


def read(value: object, *, root_sha256: bytes, now_ms: int) -> Recipient | None:
    """The recipient that a request names; None where it names none. ValidationException where it is not genuine now.

    Debug enclaves are genuine: their registers are zero, and it is for policies not to accept zero.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise KmsError("SerializationException", "Recipient is not a structure")
    algorithm = value.get("KeyEncryptionAlgorithm")
    if algorithm != ALGORITHM:
        raise constraint(algorithm, "recipient.keyEncryptionAlgorithm", f"satisfy enum value set: [{ALGORITHM}]")
    encoded = value.get("AttestationDocument")
    try:
        document = base64.b64decode(encoded or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise KmsError("SerializationException", "AttestationDocument is not base64") from None
    if not 1 <= len(document) <= DOCUMENT_BYTES:
        name = "recipient.attestationDocument"
        raise constraint(
            "…", name, f"have length greater than or equal to 1 and less than or equal to {DOCUMENT_BYTES}"
        )
    try:
        found = check_document(document, root_sha256=root_sha256, at_ms=now_ms)
    except VerificationError as error:
        raise invalid(f"The attestation document is not valid: {error.message}") from None
    if found.public_key is None:
        raise invalid("The attestation document carries no public key")
    key = _rsa(found.public_key)
    return Recipient(key, found.public_key, found.pcrs, found.module_id)


def _rsa(der: bytes) -> RSAPublicKey:
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        raise invalid("The public key in the attestation document is no DER SubjectPublicKeyInfo") from None
    # The loader also takes PKCS#1, of which nobody could know the hash that names the recipient in the answer.
    if not isinstance(key, RSAPublicKey) or key.key_size != MODULUS_BITS or spki_of(key) != der:
        raise invalid(f"The public key in the attestation document is no RSA key of {MODULUS_BITS} bits")
    return key
