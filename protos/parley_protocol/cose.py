"""COSE_Sign1 (RFC 9052): untagged, attached payload, no external data, one protected header and no unprotected one.

The protected header is exactly {1: -8} (EdDSA; here Ed25519, RFC 9053) or {1: -35} (ES384, r ‖ s of 48 bytes each). All
members and session keys sign with Ed25519; ES384 is what an NSM signs its documents with. An ECDSA signature has a twin
(r, n-s) that verifies too, and AWS does not forbid it: so nothing is ever named or compared by the bytes of an envelope (enc-10).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from parley_protocol import limits
from parley_protocol.encoding import decode, encode
from parley_protocol.errors import MalformedError, VerificationError

_EDDSA: Final = encode({1: -8})
_ES384: Final = encode({1: -35})
_SIGNATURE_BYTES: Final = {_EDDSA: 64, _ES384: 96}
_COORDINATE: Final = 48
_OVERHEAD: Final = 128
"""More than the envelope adds to the payload: header, signature and lengths."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A COSE_Sign1 in its parts. Its payload is worth nothing before `check_signature` has returned."""

    protected: bytes
    payload: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def check_signature(self, key: Ed25519PublicKey | EllipticCurvePublicKey, *, step: str) -> None:
        """Returns where `key` signed this; VerificationError at `step`, code "signature", otherwise."""
        signed = _signed_bytes(self.protected, self.payload)
        try:
            if isinstance(key, Ed25519PublicKey) and self.protected == _EDDSA:
                return key.verify(self.signature, signed)
            if (
                isinstance(key, EllipticCurvePublicKey)
                and isinstance(key.curve, SECP384R1)
                and self.protected == _ES384
            ):
                r = int.from_bytes(self.signature[:_COORDINATE], "big")
                s = int.from_bytes(self.signature[_COORDINATE:], "big")
                return key.verify(encode_dss_signature(r, s), signed, ECDSA(SHA384()))
        except InvalidSignature:
            raise VerificationError(step, "the signature does not verify", code="signature") from None
        raise VerificationError(step, "signed with another algorithm than the key's", code="signature")


def sign(payload: bytes, key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> bytes:
    """A COSE_Sign1 over `payload` by an Ed25519 key (EdDSA) or a P-384 key (ES384)."""
    if isinstance(key, Ed25519PrivateKey):
        return encode([_EDDSA, {}, payload, key.sign(_signed_bytes(_EDDSA, payload))])
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise TypeError("a COSE_Sign1 is signed by an Ed25519 or a P-384 key")
    r, s = decode_dss_signature(key.sign(_signed_bytes(_ES384, payload), ECDSA(SHA384())))
    return encode([_ES384, {}, payload, r.to_bytes(_COORDINATE, "big") + s.to_bytes(_COORDINATE, "big")])


def verify(
    cose: bytes,
    key: Ed25519PublicKey | EllipticCurvePublicKey,
    *,
    step: str = "enc-8",
    limit: int = limits.CBOR_BYTES,
) -> bytes:
    """The payload of a COSE_Sign1 that `key` signed. `limit` bounds the payload.

    MalformedError where `cose` is no such envelope; VerificationError at `step`, code "signature", where the key did
    not make the signature, or is not of the envelope's algorithm.
    """
    envelope = parse(cose, limit=limit)
    envelope.check_signature(key, step=step)
    return envelope.payload


def payload_unverified(cose: bytes, *, limit: int = limits.CBOR_BYTES) -> bytes:
    """The payload of a COSE_Sign1 whose signature nobody has checked; MalformedError where `cose` is none."""
    return parse(cose, limit=limit).payload


def parse(cose: bytes, *, limit: int = limits.CBOR_BYTES) -> Envelope:
    """The parts of a COSE_Sign1 whose signature nobody has checked; MalformedError where `cose` is none."""
    value = decode(cose, limit=limit + _OVERHEAD)
    # enc-9
    if type(value) is not list or len(value) != 4:
        raise MalformedError("COSE_Sign1: not an array of four")
    protected, unprotected, payload, signature = value
    if type(protected) is not bytes or protected not in _SIGNATURE_BYTES:
        raise MalformedError("COSE_Sign1: the protected header is neither EdDSA nor ES384 alone")
    if unprotected != {}:
        raise MalformedError("COSE_Sign1: the unprotected header is not empty")
    if type(payload) is not bytes:
        raise MalformedError("COSE_Sign1: the payload is not a byte string")
    if type(signature) is not bytes or len(signature) != _SIGNATURE_BYTES[protected]:
        raise MalformedError("COSE_Sign1: the signature has a wrong length")
    return Envelope(protected, payload, signature)


def _signed_bytes(protected: bytes, payload: bytes) -> bytes:
    return encode(["Signature1", protected, b"", payload])
