"""The certificates of a document: five, in a fixed order, walked by hand (SPEC att-4 to att-9).

    cabundle[0]  the root, pinned by its SHA-256
    cabundle[1]  <hex>.<region>.aws.nitro-enclaves            pathLen 2
    cabundle[2]  <hex>.zonal.<region>.aws.nitro-enclaves      pathLen 1
    cabundle[3]  <instance>.<region>.aws.nitro-enclaves       pathLen 0
    certificate  <module id>.<region>.aws                     no CA

General path validators refuse these (they lack the key identifiers of RFC 5280) or accept more than these. There is no
revocation: AWS says not to use the CRLs that the certificates name, and reachability of a third party must not decide.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from parley_protocol.attestation.document import Document
from parley_protocol.errors import VerificationError

_REGION: Final = r"[a-z0-9-]{1,32}"
_CA_NAMES: Final = (
    re.compile(rf"[0-9a-f]{{1,16}}\.({_REGION})\.aws\.nitro-enclaves"),
    re.compile(rf"[0-9a-f]{{1,16}}\.zonal\.({_REGION})\.aws\.nitro-enclaves"),
)
_PATH_LENGTHS: Final = (None, 2, 1, 0)
# What the parser raises for a certificate that is none, as the documentation of cryptography.x509 lists it.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def check_chain(document: Document, *, roots: Collection[bytes], at_ms: int) -> EllipticCurvePublicKey:
    """The key that must have signed `document`, after all certificates hold at `at_ms`; VerificationError otherwise.

    `roots`: SHA-256 digests of the DER of accepted root certificates.
    """
    root = hashlib.sha256(document.cabundle[0]).digest()
    if root not in roots:
        raise VerificationError("att-4", "the chain ends in another root", code="attestation", actual=root)
    certificates = [_load(der) for der in (*document.cabundle, document.certificate)]
    keys = [_key(certificate) for certificate in certificates]
    _check_constraints(certificates)
    _check_names(document, certificates[1:])
    for certificate in certificates:
        if not _milliseconds(certificate, start=True) <= at_ms <= _milliseconds(certificate, start=False):
            raise VerificationError("att-8", "a certificate is not valid at this time", code="expired", actual=at_ms)
    for issuer, certificate in pairwise(certificates):
        try:
            certificate.verify_directly_issued_by(issuer)
        except (InvalidSignature, *_UNREADABLE):
            raise VerificationError(
                "att-9", "a certificate is not issued by the one before it", code="signature"
            ) from None
    return keys[-1]


def _load(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except _UNREADABLE:
        raise VerificationError("att-5", "a certificate cannot be read", code="malformed") from None


def _key(certificate: x509.Certificate) -> EllipticCurvePublicKey:
    try:
        key = certificate.public_key()
        version = certificate.version
        algorithm = certificate.signature_algorithm_oid
    except _UNREADABLE:
        raise VerificationError("att-5", "a certificate cannot be read", code="malformed") from None
    if (
        version is not x509.Version.v3
        or algorithm != SignatureAlgorithmOID.ECDSA_WITH_SHA384
        or not isinstance(key, EllipticCurvePublicKey)
        or not isinstance(key.curve, SECP384R1)
    ):
        raise VerificationError("att-5", "a certificate is not of P-384 and ecdsa-with-SHA384", code="attestation")
    return key


def _check_constraints(certificates: list[x509.Certificate]) -> None:
    for place, certificate in enumerate(certificates):
        try:
            extensions = certificate.extensions
            constraints = extensions.get_extension_for_class(x509.BasicConstraints)
            usage = extensions.get_extension_for_class(x509.KeyUsage).value
        except x509.ExtensionNotFound:
            raise VerificationError("att-6", "a certificate lacks its constraints", code="attestation") from None
        except _UNREADABLE:
            raise VerificationError("att-5", "a certificate cannot be read", code="malformed") from None
        known = (x509.BasicConstraints, x509.KeyUsage)
        if any(extension.critical and not isinstance(extension.value, known) for extension in extensions):
            raise VerificationError("att-6", "a certificate has an unknown critical extension", code="attestation")
        authority = place < len(_PATH_LENGTHS)
        holds = constraints.critical and constraints.value.ca is authority and usage.key_cert_sign is authority
        if authority:
            holds = holds and constraints.value.path_length == _PATH_LENGTHS[place]
        else:
            holds = holds and constraints.value.path_length is None and usage.digital_signature
        if not holds:
            raise VerificationError("att-6", "a certificate may not be used for this", code="attestation")


def _check_names(document: Document, certificates: list[x509.Certificate]) -> None:
    names = [_common_name(certificate) for certificate in certificates]
    instance = document.instance_id
    if instance is None:
        raise VerificationError("att-7", "the module is not an enclave", code="attestation")
    found = [pattern.fullmatch(name) for pattern, name in zip(_CA_NAMES, names, strict=False)]
    regions = {match[1] for match in found if match}
    if not all(found) or len(regions) != 1:
        raise VerificationError("att-7", "the certificates are not of one region", code="attestation")
    region = regions.pop()
    if names[2:] != [f"{instance}.{region}.aws.nitro-enclaves", f"{document.module_id}.{region}.aws"]:
        raise VerificationError("att-7", "the certificates are not of this instance and module", code="attestation")


def _common_name(certificate: x509.Certificate) -> str:
    try:
        names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except _UNREADABLE:
        raise VerificationError("att-5", "a certificate cannot be read", code="malformed") from None
    if len(names) != 1 or not isinstance(names[0], str):
        raise VerificationError("att-7", "a certificate has not one common name", code="attestation")
    return names[0]


def _milliseconds(certificate: x509.Certificate, *, start: bool) -> int:
    # Both ends are within the period (RFC 5280, 4.1.2.5), whose unit is the second.
    moment = certificate.not_valid_before_utc if start else certificate.not_valid_after_utc
    return int(moment.timestamp()) * 1000 + (0 if start else 999)
