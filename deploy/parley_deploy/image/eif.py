"""Writes and signs EIFs, byte for byte the same from the same parts (what the bytes are: `parley_protocol.measurement`).

The sections stand as AWS's builder has them: kernel, command line, metadata, ramdisks, signature. Everything that could differ
between two builds is an argument; a signature is deterministic (RFC 6979).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from typing import BinaryIO, Final, Self

from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from parley_deploy.image.errors import ImageError
from parley_protocol import limits
from parley_protocol.attestation.document import extended
from parley_protocol.encoding import encode
from parley_protocol.errors import MalformedError
from parley_protocol.measurement import (
    CERTIFICATE_KEY,
    CRC_OFFSET,
    HEADER,
    MAGIC,
    SECTION,
    SIGNATURE_KEY,
    Architecture,
    Kind,
    measure,
    read_certificate,
    signature_form,
    signed_bytes,
    signed_payload,
)

VERSION: Final = 4
MEMORY_BYTES: Final = 1 << 30
"""Default memory of AWS's builder."""
CPUS: Final = 2
"""Default CPUs of AWS's builder."""


@dataclass(frozen=True, slots=True)
class Part:
    """`size` bytes of a file that can be read twice, from `offset`."""

    file: BinaryIO = field(repr=False)
    offset: int
    size: int

    @classmethod
    def whole(cls, file: BinaryIO) -> Self:
        """All of a file."""
        return cls(file, 0, file.seek(0, os.SEEK_END))

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in pieces that fit in memory; ImageError where the file has become shorter."""
        self.file.seek(self.offset)
        left = self.size
        while left:
            chunk = self.file.read(min(left, limits.EIF_CHUNK_BYTES))
            if not chunk:
                raise ImageError("a part of the image became shorter while it was read")
            left -= len(chunk)
            yield chunk


def metadata(
    name: str, version: str, *, built: datetime, tool: str, tool_version: str, system: str, kernel_version: str
) -> bytes:
    """The metadata section. Nothing of it is measured; `built` is a time that all builders of this version agree on."""
    if built.tzinfo is None:
        raise ValueError("built: a time without its zone")
    fields = {
        "ImageName": name,
        "ImageVersion": version,
        "BuildMetadata": {
            "BuildTime": built.isoformat(timespec="seconds"),
            "BuildTool": tool,
            "BuildToolVersion": tool_version,
            "OperatingSystem": system,
            "KernelVersion": kernel_version,
        },
        "DockerInfo": {},
        "CustomMetadata": None,
    }
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


class Signer:
    """A P-384 key with its certificate, valid at the time it is to sign.

    ImageError where the certificate cannot be read, is of another key or curve, or is not valid at `now_ms`: nitro-cli would
    refuse to start what it signs.
    """

    def __init__(self, key: EllipticCurvePrivateKey, certificate_pem: bytes, *, now_ms: int) -> None:
        try:
            certificate, public = read_certificate(certificate_pem)
        except MalformedError as error:
            raise ImageError(error.message) from None
        if not isinstance(key.curve, SECP384R1):
            raise ImageError(f"signing key: on the curve {key.curve.name}; images are signed with P-384")
        if key.public_key() != public:
            raise ImageError("signing certificate: it is of another key than the signing key")
        if not certificate.not_before_ms <= now_ms <= certificate.not_after_ms:
            raise ImageError("signing certificate: it is not valid now")
        self._key = key
        self._pem = certificate_pem
        self.certificate = certificate

    def section(self, pcr0: bytes) -> bytes:
        """The signature section of the image with this PCR0, in the form of AWS's tools: bytes as arrays of integers."""
        payload, form = signed_payload(pcr0), signature_form(self._key.public_key())
        digest = ECDSA(form.hash, deterministic_signing=True)
        r, s = decode_dss_signature(self._key.sign(signed_bytes(form.protected, payload), digest))
        signature = b"".join(number.to_bytes(form.coordinate, "big") for number in (r, s))
        envelope = encode([form.protected, {}, payload, signature])
        # Written in AWS's order of the keys, which is not the deterministic one.
        section = b"\x81\xa2" + encode(CERTIFICATE_KEY) + encode(list(self._pem))
        section += encode(SIGNATURE_KEY) + encode(list(envelope))
        if len(section) > limits.EIF_SIGNATURE_BYTES:
            raise ImageError(f"signing certificate: too long for a section of {limits.EIF_SIGNATURE_BYTES} bytes")
        return section


def write(
    out: BinaryIO,
    *,
    kernel: Part,
    cmdline: bytes,
    metadata: bytes,
    ramdisks: Sequence[Part],
    architecture: Architecture = Architecture.X86_64,
    memory_bytes: int = MEMORY_BYTES,
    cpus: int = CPUS,
    signer: Signer | None = None,
) -> None:
    """Writes an EIF to the empty file `out`, which can seek. The parts are read once, or twice where the image is signed."""
    sections: list[tuple[Kind, Part | bytes]] = [
        (Kind.KERNEL, kernel),
        (Kind.CMDLINE, cmdline),
        (Kind.METADATA, metadata),
        *((Kind.RAMDISK, ramdisk) for ramdisk in ramdisks),
    ]
    if not ramdisks:
        raise ImageError("an image has at least one ramdisk")
    if signer is not None:
        measured = hashlib.sha384()
        for kind, content in sections:
            if kind is not Kind.METADATA:
                for chunk in _chunks(content):
                    measured.update(chunk)
        sections.append((Kind.SIGNATURE, signer.section(extended(measured.digest()))))
    if len(sections) > limits.EIF_SECTIONS:
        raise ImageError(f"an image has at most {limits.EIF_SECTIONS} sections")
    header = _header(architecture, memory_bytes, cpus, [_size(content) for _, content in sections])
    out.write(header)
    crc = zlib.crc32(header[:CRC_OFFSET])
    for kind, content in sections:
        for chunk in chain((SECTION.pack(kind, 0, _size(content)),), _chunks(content)):
            crc = zlib.crc32(chunk, crc)
            out.write(chunk)
    out.seek(CRC_OFFSET)
    out.write(crc.to_bytes(4, "big"))
    out.seek(0, os.SEEK_END)


def sign(image: BinaryIO, out: BinaryIO, signer: Signer) -> None:
    """Writes the EIF `image` to `out` with a signature, in place of one that it has.

    MalformedError where `image` cannot be measured; ImageError where it is not of version 4.
    """
    image.seek(0)
    found = measure(image)
    if found.version != VERSION:
        raise ImageError(f"an image of version {found.version}; only version {VERSION} is written")
    parts = {kind: [Part(image, s.offset, s.size) for s in found.sections if s.kind is kind] for kind in Kind}
    write(
        out,
        kernel=parts[Kind.KERNEL][0],
        cmdline=found.cmdline,
        metadata=b"".join(parts[Kind.METADATA][0].chunks()),
        ramdisks=parts[Kind.RAMDISK],
        architecture=found.architecture,
        memory_bytes=found.memory_bytes,
        cpus=found.cpus,
        signer=signer,
    )


def _header(architecture: Architecture, memory_bytes: int, cpus: int, sizes: Sequence[int]) -> bytes:
    offsets, end = [], HEADER.size
    for size in sizes:
        offsets.append(end)
        end += SECTION.size + size
    unused = [0] * (limits.EIF_SECTIONS - len(sizes))
    flags = int(architecture is Architecture.AARCH64)
    return HEADER.pack(
        MAGIC, VERSION, flags, memory_bytes, cpus, 0, len(sizes), *offsets, *unused, *sizes, *unused, 0, 0
    )


def _size(content: Part | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.size


def _chunks(content: Part | bytes) -> Iterator[bytes]:
    return iter((content,)) if isinstance(content, bytes) else content.chunks()
