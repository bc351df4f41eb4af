"""The server's TLS key: a self-made certificate for local use, and the digest that caller statements are bound to."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parley_coordinator.config import ConfigError
from parley_protocol.encoding import sha384

_VALID: Final = timedelta(days=3650)
"""Members pin the key, not a date; a self-made certificate that ends earlier only stops work."""


def make(certificate: Path, key: Path, names: Sequence[str], now: datetime) -> None:
    """Writes a P-256 key (0600) and a certificate signed by itself, for `names` (host names and addresses) and localhost.

    FileExistsError where one of them is there: members have pinned it.
    """
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "parley-coordinator")])
    alternatives = [
        _alternative(name) for name in dict.fromkeys([*names, "localhost", "127.0.0.1", "::1", socket.gethostname()])
    ]
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    _write(key, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write(certificate, made.public_bytes(Encoding.PEM), 0o644)


def server_digest(certificate: bytes) -> bytes:
    """SHA-384 of the SubjectPublicKeyInfo (DER) of the first certificate in a PEM file; ConfigError where there is none."""
    try:
        key = x509.load_pem_x509_certificate(certificate).public_key()
    except ValueError as error:
        raise ConfigError("tls.certificate: not a PEM certificate") from error
    return sha384(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
