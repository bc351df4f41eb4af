"""A local copy of the PKI of Nitro enclaves: a root in a folder, and chains of five P-384 certificates shaped like AWS's.

Everything here is simulated: whoever can read the folder can sign any document under this root. An agreement that
accepts it says `simulated` and names the root's SHA-256, which can never be one of the verifier's own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from parley_protocol.errors import StateError

REGION: Final = "local"
"""The region in the names of simulated certificates: one that AWS does not have."""
ROOT_LIFE: Final = timedelta(days=30 * 365)
LIVES: Final = (timedelta(hours=481), timedelta(days=6), timedelta(hours=24), timedelta(hours=3, seconds=3))
"""Region, zone, instance, enclave: as in real chains."""
RENEWAL: Final = timedelta(minutes=40)
"""A certificate with less than this left is renewed: so real leaves are, as documents up to 8,277 s old in them show."""

_CA_USAGE: Final = frozenset({"digital_signature", "key_cert_sign", "crl_sign"})
_INSTANCE_USAGE: Final = frozenset({"key_cert_sign"})
_LEAF_USAGE: Final = frozenset({"digital_signature", "content_commitment"})
_USAGES: Final = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey = field(repr=False)

    @property
    def der(self) -> bytes:
        """The certificate's DER."""
        return self.certificate.public_bytes(Encoding.DER)


def issue(
    name: str,
    issuer: Issued | None,
    *,
    start: datetime,
    life: timedelta,
    authority: bool,
    path_length: int | None = None,
    usage: frozenset[str] = _CA_USAGE,
    usage_critical: bool = True,
    serial: int | None = None,
    key: EllipticCurvePrivateKey | None = None,
) -> Issued:
    """A certificate with the common name `name` and a new key, signed by `issuer`, or by itself where that is None."""
    own = key or generate_private_key(SECP384R1())
    public: EllipticCurvePublicKey = own.public_key()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Parley (simulated)"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number() if serial is None else serial)
        .not_valid_before(start)
        .not_valid_after(start + life)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=path_length), critical=True)
        .add_extension(x509.KeyUsage(**{one: one in usage for one in _USAGES}), critical=usage_critical)
    )
    return Issued(builder.sign(own if issuer is None else issuer.key, SHA384()), own)


class LocalRoot:
    """The root of a folder: `root.pem`, the certificate, and `root.key`, which only its owner can read."""

    __slots__ = ("issued",)

    def __init__(self, issued: Issued) -> None:
        self.issued = issued

    @classmethod
    def create(cls, now_ms: int) -> Self:
        """A new root in memory."""
        start = moment(now_ms) - timedelta(hours=1)
        return cls(issue("simulated.nitro-enclaves", None, start=start, life=ROOT_LIFE, authority=True))

    @classmethod
    def load_or_create(cls, folder: Path, now_ms: int | None = None) -> Self:
        """The root of `folder`, made where there is none. Several processes that ask at once get the same one."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "root.pem").exists():
                cls.create(system_now_ms() if now_ms is None else now_ms).save(folder)
            return cls.load(folder)
        finally:
            os.close(lock)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The root of `folder`; StateError where there is none or its key is not of its certificate."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / "root.pem").read_bytes())
            key = load_pem_private_key((folder / "root.key").read_bytes(), None)
        except FileNotFoundError as error:
            raise StateError(f"{folder}: no local root here") from error
        if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise StateError(f"{folder}: root.key is not the key of root.pem")
        return cls(Issued(certificate, key))

    @property
    def sha256(self) -> bytes:
        """What an agreement pins: SHA-256 of the certificate's DER."""
        return hashlib.sha256(self.issued.der).digest()

    @property
    def pem(self) -> bytes:
        """The certificate, PEM: what `root:` of an agreement names."""
        return self.issued.certificate.public_bytes(Encoding.PEM)

    def save(self, folder: Path) -> None:
        """Writes the two files into `folder`, which must be there."""
        # The certificate comes last: its presence says that the key is there.
        secret = self.issued.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        for name, data, mode in (("root.key", secret, 0o600), ("root.pem", self.pem, 0o644)):
            part = folder / f"{name}.part"
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(folder / name)


class Chain:
    """The certificates of one enclave below a root, renewed as they come near their ends."""

    __slots__ = ("_issued", "_names", "_root", "_serial")

    def __init__(self, root: LocalRoot, module_id: str, *, random: Callable[[int], bytes]) -> None:
        self._root = root
        instance, _, enclave = module_id.partition("-enc")
        self._serial = int(enclave, 16) << 64
        self._names = (
            f"{random(8).hex()}.{REGION}.aws.nitro-enclaves",
            f"{random(8).hex()}.zonal.{REGION}.aws.nitro-enclaves",
            f"{instance}.{REGION}.aws.nitro-enclaves",
            f"{module_id}.{REGION}.aws",
        )
        self._issued: list[Issued] = []

    def at(self, now_ms: int) -> tuple[tuple[bytes, ...], Issued]:
        """The cabundle (DER, root first) and the enclave's own certificate with its key, valid at `now_ms`."""
        now = moment(now_ms)
        fresh = 0
        for issued in self._issued:
            certificate = issued.certificate
            if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc - RENEWAL:
                break
            fresh += 1
        # Whatever stands below a renewed one is renewed with it, for its issuer has another key now.
        del self._issued[fresh:]
        for level in range(fresh, len(self._names)):
            self._issued.append(self._issue(level, now))
        bundle = (self._root.issued.der, *(issued.der for issued in self._issued[:-1]))
        return bundle, self._issued[-1]

    def _issue(self, level: int, now: datetime) -> Issued:
        leaf = level == len(self._names) - 1
        return issue(
            self._names[level],
            self._issued[level - 1] if level else self._root.issued,
            start=now,
            life=LIVES[level],
            authority=not leaf,
            path_length=None if leaf else 2 - level,
            usage=_LEAF_USAGE if leaf else _INSTANCE_USAGE if level == 2 else _CA_USAGE,
            usage_critical=not leaf,
            serial=self._serial | int(now.timestamp()) if leaf else None,
        )


def moment(now_ms: int) -> datetime:
    """The second of a time in milliseconds: certificates know no shorter unit."""
    return datetime.fromtimestamp(now_ms // 1000, UTC)


def system_now_ms() -> int:
    """This machine's clock, in milliseconds since the epoch."""
    return int(datetime.now(UTC).timestamp() * 1000)
