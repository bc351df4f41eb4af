"""Small enclave images that boot nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from parley_deploy.image.eif import Part, Signer, write


def certificate(key: ec.EllipticCurvePrivateKey, *, start_ms: int, days: int = 30, name: str = "maker") -> bytes:
    """A certificate of `key` in PEM, signed by itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start, end = (datetime.fromtimestamp(start_ms // 1000 + day * 86_400, UTC) for day in (0, days))
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 7, start, end)
    return builder.sign(key, SHA384()).public_bytes(Encoding.PEM)


def signer(*, start_ms: int, days: int = 30, name: str = "maker") -> Signer:
    """A fresh key with its certificate, which signs on the first day."""
    key = ec.generate_private_key(ec.SECP384R1())
    return Signer(key, certificate(key, start_ms=start_ms, days=days, name=name), now_ms=start_ms)


def image(
    ramdisks: Sequence[bytes] = (b"boot", b"application"),
    *,
    metadata: bytes = b'{"ImageName":"small","ImageVersion":"7"}',
    signed_by: Signer | None = None,
) -> bytes:
    """An image of these ramdisks."""
    out = io.BytesIO()
    write(
        out,
        kernel=Part.whole(io.BytesIO(b"kernel")),
        cmdline=b"console=ttyS0",
        metadata=metadata,
        ramdisks=[Part.whole(io.BytesIO(ramdisk)) for ramdisk in ramdisks],
        signer=signed_by,
    )
    return out.getvalue()
