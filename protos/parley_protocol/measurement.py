"""The measurement of an enclave image: what the Nitro hypervisor writes into PCR0, 1, 2 and 8 when it starts an EIF.

Source: aws-nitro-enclaves-image-format. All integers are big-endian.

    0x000  magic ".eif"        0x018  u16 reserved          0x21c  u32 unused
    0x004  u16 version         0x01a  u16 sections          0x220  u32 CRC-32 of everything else
    0x006  u16 flags           0x01c  u64 x 32 offsets
    0x008  u64 memory          0x11c  u64 x 32 sizes        then the sections: u16 type, u16 flags, u64 size, data
    0x010  u64 CPUs

    PCR0 = ext(kernel ‖ cmdline ‖ all ramdisks)    PCR1 = ext(kernel ‖ cmdline ‖ first ramdisk)
    PCR2 = ext(the other ramdisks)                 PCR8 = ext(DER of the signing certificate), where the image is signed

The boundaries of sections are not measured: bytes that move from one ramdisk to the next leave PCR0 as it is, so only all
three registers together name an image. Neither are the header, the metadata and the signature itself.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import BinaryIO, Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from parley_protocol import limits
from parley_protocol.attestation.document import extended
from parley_protocol.encoding import Value, decode, encode, sha384
from parley_protocol.errors import MalformedError

MAGIC: Final = b".eif"
VERSIONS: Final = (2, 3, 4)
HEADER: Final = struct.Struct(f">4sHHQQHH{limits.EIF_SECTIONS}Q{limits.EIF_SECTIONS}QII")
"""The header; its last field is the CRC."""
CRC_OFFSET: Final = HEADER.size - 4
SECTION: Final = struct.Struct(">HHQ")
"""The header of a section."""
EMPTY_PCR: Final = extended(sha384(b""))
"""PCR2 of every image with one ramdisk: it is measured over nothing and tells nothing."""
CERTIFICATE_KEY: Final = "signing_certificate"
SIGNATURE_KEY: Final = "signature"

_AARCH64: Final = 1
_METADATA_SINCE: Final = 4
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

# What the parser raises for a certificate that is none, as the documentation of cryptography.x509 lists it.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class Architecture(StrEnum):
    """The machine that an image is for: bit 0 of the header's flags."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"


class Kind(IntEnum):
    """What a section holds."""

    KERNEL = 1
    CMDLINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5


_NEEDS: Final = {Kind.CMDLINE: (Kind.KERNEL,), Kind.RAMDISK: (Kind.KERNEL, Kind.CMDLINE)}
"""What stands before a section of a kind."""
_BOUNDS: Final = {
    Kind.CMDLINE: limits.EIF_CMDLINE_BYTES,
    Kind.METADATA: limits.EIF_METADATA_BYTES,
    Kind.SIGNATURE: limits.EIF_SIGNATURE_BYTES,
}


@dataclass(frozen=True, slots=True)
class Section:
    """A section: `offset` is where its data begin in the file, `size` their bytes."""

    kind: Kind
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SigningCertificate:
    """Whose key signed an image. Nothing vouches for the names in it: PCR8 is the digest of these very bytes."""

    der: bytes = field(repr=False)
    subject: str
    issuer: str
    curve: str
    not_before_ms: int
    not_after_ms: int


@dataclass(frozen=True, slots=True)
class Image:
    """What an EIF is measured to be: `pcrs` has 0, 1, 2 and, where the image is signed, 8.

    Measured are kernel, `cmdline` and ramdisks. All else is what the file says of itself: `architecture`, `memory_bytes` and
    `cpus` (defaults that whoever starts it may change) and `metadata` (None before version 4), which nobody should believe.
    """

    pcrs: Mapping[int, bytes]
    version: int
    architecture: Architecture
    memory_bytes: int
    cpus: int
    size: int
    sections: tuple[Section, ...]
    cmdline: bytes
    metadata: Mapping[str, object] | None = field(repr=False)
    certificate: SigningCertificate | None

    @property
    def ramdisks(self) -> tuple[Section, ...]:
        """The ramdisks, in the order in which they are measured."""
        return tuple(section for section in self.sections if section.kind is Kind.RAMDISK)


def measurements_json(pcrs: Mapping[int, bytes]) -> str:
    """Measurements in the form that `nitro-cli build-enclave` prints."""
    registers = {f"PCR{index}": value.hex() for index, value in sorted(pcrs.items())}
    return json.dumps({"Measurements": {"HashAlgorithm": "Sha384 { ... }", **registers}}, indent=2) + "\n"


def measure(file: BinaryIO) -> Image:
    """Measures the EIF that `file` gives from its position to its end, in chunks, without seeking.

    MalformedError, and nothing else but what `file` itself raises, where it is no EIF, its CRC is wrong, its signature does
    not verify, or it is one that two readers could measure in two ways.
    """
    reader = _Reader(file)
    fields = reader.take(HEADER.size, "header")
    header = _Header.parse(fields)
    reader.crc = zlib.crc32(fields[:CRC_OFFSET])
    sections: list[Section] = []
    held: dict[Kind, bytes] = {}
    whole, boot, application = hashlib.sha384(), None, hashlib.sha384()
    for size in header.sizes:
        section = _section(reader, size)
        _check_order(section, sections, header.version)
        sections.append(section)
        # eif-7
        if section.kind in _BOUNDS:
            held[section.kind] = reader.take(size, _name(section.kind))
            if section.kind is Kind.CMDLINE:
                whole.update(held[section.kind])
            continue
        for chunk in reader.chunks(size, _name(section.kind)):
            whole.update(chunk)
            if boot is not None:
                application.update(chunk)
        if section.kind is Kind.RAMDISK and boot is None:
            boot = whole.copy()  # what comes before the second ramdisk is all of PCR1
    if boot is None or (header.version >= _METADATA_SINCE and Kind.METADATA not in held):  # eif-4
        raise MalformedError(f"image: no {'ramdisk' if boot is None else 'metadata, which version 4 must have'}")
    if reader.read(1):  # eif-5
        raise MalformedError("image: bytes after the last section")
    if reader.crc != header.crc:  # eif-6
        raise MalformedError(f"image: damaged: its CRC is {reader.crc:08x}, the header says {header.crc:08x}")
    pcrs = {index: extended(hasher.digest()) for index, hasher in enumerate((whole, boot, application))}
    certificate = None
    if Kind.SIGNATURE in held:
        certificate = _signer(held[Kind.SIGNATURE], pcrs[0])
        pcrs[8] = extended(sha384(certificate.der))
    return Image(
        pcrs=MappingProxyType(pcrs),
        version=header.version,
        architecture=header.architecture,
        memory_bytes=header.memory_bytes,
        cpus=header.cpus,
        size=reader.position,
        sections=tuple(sections),
        cmdline=held[Kind.CMDLINE],
        metadata=_metadata(held[Kind.METADATA]) if Kind.METADATA in held else None,
        certificate=certificate,
    )


class _Reader:
    """A stream that is read once, with its position and the CRC of what was read."""

    __slots__ = ("_file", "crc", "position")

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc = 0
        self.position = 0

    def read(self, most: int) -> bytes:
        """At most that many bytes; none at the end."""
        chunk = self._file.read(most)
        self.crc = zlib.crc32(chunk, self.crc)
        self.position += len(chunk)
        return chunk

    def chunks(self, count: int, what: str) -> Iterator[bytes]:
        """The next `count` bytes, which may be any number; MalformedError where the stream ends before."""
        while count:
            chunk = self.read(min(count, limits.EIF_CHUNK_BYTES))
            if not chunk:
                raise MalformedError(f"image: truncated: {count} bytes of the {what} are missing")
            count -= len(chunk)
            yield chunk

    def take(self, count: int, what: str) -> bytes:
        """The same at once, for what fits in memory."""
        return b"".join(self.chunks(count, what))


@dataclass(frozen=True, slots=True)
class _Header:
    version: int
    architecture: Architecture
    memory_bytes: int
    cpus: int
    sizes: tuple[int, ...]
    crc: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        magic, version, flags, memory, cpus, reserved, count, *table, unused, crc = HEADER.unpack(data)
        # eif-1
        if magic != MAGIC:
            raise MalformedError("image: not an EIF: it does not begin with its magic")
        if version not in VERSIONS:
            raise MalformedError(f"image: version {version}, not one of {', '.join(map(str, VERSIONS))}")
        if flags & ~_AARCH64 or reserved or unused:
            raise MalformedError("image: reserved bits of the header are set")
        # eif-2
        offsets, sizes = table[: limits.EIF_SECTIONS], table[limits.EIF_SECTIONS :]
        if not 0 < count <= limits.EIF_SECTIONS:
            raise MalformedError(f"image: {count} sections, not 1 to {limits.EIF_SECTIONS}")
        if any(offsets[count:]) or any(sizes[count:]):
            raise MalformedError(f"image: the table has entries after the {count} sections")
        end = HEADER.size
        for number, (offset, size) in enumerate(zip(offsets[:count], sizes[:count], strict=True), 1):
            if offset != end:
                raise MalformedError(f"image: section {number} begins at {offset}, where the one before ends is {end}")
            end += SECTION.size + size
        if end > limits.EIF_BYTES:
            raise MalformedError(f"image: more than {limits.EIF_BYTES} bytes")
        architecture = Architecture.AARCH64 if flags & _AARCH64 else Architecture.X86_64
        return cls(version, architecture, memory, cpus, tuple(sizes[:count]), crc)


def _section(reader: _Reader, size: int) -> Section:
    kind, flags, told = SECTION.unpack(reader.take(SECTION.size, "header of a section"))
    # eif-3
    try:
        kind = Kind(kind)
    except ValueError:
        raise MalformedError(f"image: a section of the unknown type {kind}") from None
    if flags:
        raise MalformedError(f"image: reserved bits of the {_name(kind)}'s header are set")
    if told != size:
        raise MalformedError(f"image: the {_name(kind)} has {told} bytes, the header's table says {size}")
    if not size and kind is not Kind.CMDLINE:
        raise MalformedError(f"image: an empty {_name(kind)}")
    if kind in _BOUNDS and size > _BOUNDS[kind]:
        raise MalformedError(f"image: the {_name(kind)} has more than {_BOUNDS[kind]} bytes")
    return Section(kind, reader.position, size)


def _check_order(section: Section, before: list[Section], version: int) -> None:
    # eif-4
    kinds = [other.kind for other in before]
    if section.kind in kinds and section.kind is not Kind.RAMDISK:
        raise MalformedError(f"image: more than one {_name(section.kind)}")
    if section.kind is Kind.METADATA and version < _METADATA_SINCE:
        raise MalformedError(f"image: metadata in an image of version {version}, which has none")
    missing = [kind for kind in _NEEDS.get(section.kind, ()) if kind not in kinds]
    if missing:
        # AWS measures in the order of the file, others by kind: only in this order do they agree.
        raise MalformedError(f"image: a {_name(section.kind)} before the {_name(missing[0])}")


def _name(kind: Kind) -> str:
    return {Kind.CMDLINE: "command line"}.get(kind, kind.name.lower())


def _metadata(data: bytes) -> Mapping[str, object]:
    # eif-10
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise MalformedError("image: the metadata is no JSON") from None
    if type(value) is not dict:
        raise MalformedError("image: the metadata is no JSON object")
    return MappingProxyType(value)


def _signer(section: bytes, pcr0: bytes) -> SigningCertificate:
    """The certificate whose key signed `pcr0`, as the signature section says and proves."""
    # eif-8
    value = _decoded(section, foreign=True)
    entry = value[0] if type(value) is list and len(value) == 1 else None
    if type(entry) is not dict or entry.keys() != {CERTIFICATE_KEY, SIGNATURE_KEY}:
        raise MalformedError("image: the signature is not one entry of a certificate and a signature")
    parts: Mapping[str, Value] = entry  # type: ignore[assignment]  # its keys are those two texts
    certificate, key = read_certificate(_octets(parts[CERTIFICATE_KEY], CERTIFICATE_KEY))
    # eif-9
    envelope = _decoded(_octets(parts[SIGNATURE_KEY], SIGNATURE_KEY), foreign=False)
    form = signature_form(key)
    match envelope:
        case [form.protected, {**unprotected}, bytes(payload), bytes(signature)] if not unprotected:
            pass
        case _:
            raise MalformedError(f"image: the signature is no COSE_Sign1 of the certificate's curve, {form.curve}")
    if payload != signed_payload(pcr0):
        raise MalformedError("image: the signature is over another image than this one")
    if len(signature) != 2 * form.coordinate:
        raise MalformedError("image: the signature has a wrong length")
    r, s = (int.from_bytes(half, "big") for half in (signature[: form.coordinate], signature[form.coordinate :]))
    try:
        key.verify(encode_dss_signature(r, s), signed_bytes(form.protected, payload), ECDSA(form.hash))
    except InvalidSignature:
        raise MalformedError("image: the signature does not verify") from None
    return certificate


def read_certificate(pem: bytes) -> tuple[SigningCertificate, EllipticCurvePublicKey]:
    """The one certificate in a PEM file, and its key on one of the three curves; MalformedError (eif-8)."""
    if (
        pem.count(b"-----BEGIN ") != 1
    ):  # whoever reads the first of several measures another PCR8 than who reads the last
        raise MalformedError("signing certificate: not one PEM block")
    try:
        found = x509.load_pem_x509_certificate(pem)
        key = found.public_key()
        certificate = SigningCertificate(
            found.public_bytes(Encoding.DER),
            found.subject.rfc4514_string(),
            found.issuer.rfc4514_string(),
            key.curve.name if isinstance(key, EllipticCurvePublicKey) else "",
            _milliseconds(found.not_valid_before_utc),
            _milliseconds(found.not_valid_after_utc),
        )
    except _UNREADABLE:
        raise MalformedError("signing certificate: it cannot be read") from None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _FORMS:
        raise MalformedError("signing certificate: its key is on none of the curves P-256, P-384 and P-521")
    return replace(certificate, curve=_FORMS[key.curve.name].curve), key


@dataclass(frozen=True, slots=True)
class SignatureForm:
    """How a key on one curve signs: the protected header, the hash, and the bytes of r and of s."""

    curve: str
    protected: bytes
    hash: HashAlgorithm
    coordinate: int


_FORMS: Final = {
    "secp256r1": SignatureForm("P-256", encode({1: -7}), SHA256(), 32),
    "secp384r1": SignatureForm("P-384", encode({1: -35}), SHA384(), 48),
    "secp521r1": SignatureForm("P-521", encode({1: -36}), SHA512(), 66),
}


def signature_form(key: EllipticCurvePublicKey) -> SignatureForm:
    """How this key, of a certificate that `read_certificate` took, signs an image."""
    return _FORMS[key.curve.name]


def signed_payload(pcr0: bytes) -> bytes:
    """What is signed of an image: register 0 and its value, which AWS's tools write as an array of integers."""
    return encode({"register_index": 0, "register_value": list(pcr0)})


def signed_bytes(protected: bytes, payload: bytes) -> bytes:
    """What the key signs: the Sig_structure of RFC 9052."""
    return encode(["Signature1", protected, b"", payload])


def _decoded(data: bytes, *, foreign: bool) -> Value:
    try:
        return decode(data, limit=limits.EIF_SIGNATURE_BYTES, foreign=foreign)
    except MalformedError as error:
        raise MalformedError(f"image: the signature is no CBOR: {error.message}") from None


def _octets(value: Value, name: str) -> bytes:
    # AWS's tools write bytes as arrays of integers.
    if type(value) is not list or not all(type(item) is int and 0 <= item < 256 for item in value):
        raise MalformedError(f"image: {name} is not an array of bytes")
    return bytes(value)  # type: ignore[arg-type]  # all are integers below 256


def _milliseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(milliseconds=1)
