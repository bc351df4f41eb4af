"""The measurement of an image, step by step (SPEC eif-1 to eif-10), on images written out here field by field."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, BinaryIO, Final, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from parley_protocol import limits
from parley_protocol.encoding import encode
from parley_protocol.errors import MalformedError
from parley_protocol.measurement import EMPTY_PCR, Architecture, Kind, measure, measurements_json

KERNEL, CMDLINE, RAMDISK, SIGNATURE, METADATA = 1, 2, 3, 4, 5
PARTS: Final = (
    (KERNEL, b"kernel" * 7),
    (CMDLINE, b"console=ttyS0"),
    (METADATA, b'{"ImageName":"small"}'),
    (RAMDISK, b"boot" * 5),
    (RAMDISK, b"application"),
)


@dataclass(frozen=True)
class Eif:
    """Every field of an image, so that a test can change one."""

    parts: Sequence[tuple[int, bytes]] = PARTS
    magic: bytes = b".eif"
    version: int = 4
    flags: int = 0
    memory: int = 1 << 30
    cpus: int = 2
    reserved: int = 0
    count: int | None = None
    offsets: dict[int, int] | None = None
    sizes: dict[int, int] | None = None
    unused: int = 0
    crc: int | None = None
    section_flags: int = 0
    told: dict[int, int] | None = None
    tail: bytes = b""

    def data(self) -> bytes:
        """The file, with the right CRC unless another one is asked for."""
        body, offsets, sizes = b"", [0] * 32, [0] * 32
        for number, (kind, content) in enumerate(self.parts):
            offsets[number], sizes[number] = 548 + len(body), len(content)
            told = (self.told or {}).get(number, len(content))
            body += struct.pack(">HHQ", kind, self.section_flags, told) + content
        for table, changed in ((offsets, self.offsets), (sizes, self.sizes)):
            for number, value in (changed or {}).items():
                table[number] = value
        count = len(self.parts) if self.count is None else self.count
        head = struct.pack(
            ">4sHHQQHH", self.magic, self.version, self.flags, self.memory, self.cpus, self.reserved, count
        )
        head += struct.pack(">64QI", *offsets, *sizes, self.unused)
        body += self.tail
        crc = zlib.crc32(head + body) if self.crc is None else self.crc
        return head + struct.pack(">I", crc) + body


SMALL: Final = Eif()


def mended(data: bytes) -> bytes:
    """The same file with the CRC that its bytes have."""
    return data[:544] + struct.pack(">I", zlib.crc32(data[:544] + data[548:])) + data[548:]


def measured(eif: Eif) -> Any:
    return measure(io.BytesIO(eif.data()))


def refused(eif: Eif, why: str) -> None:
    with pytest.raises(MalformedError, match=why):
        measured(eif)


def ext(*parts: bytes) -> bytes:
    return hashlib.sha384(bytes(48) + hashlib.sha384(b"".join(parts)).digest()).digest()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"magic": b".elf"}, "not an EIF"),
        ({"version": 1}, "version 1"),
        ({"version": 5}, "version 5"),
        ({"flags": 2}, "reserved bits"),
        ({"flags": 0x8001}, "reserved bits"),
        ({"reserved": 1}, "reserved bits"),
        ({"unused": 1}, "reserved bits"),
    ],
)
def test_eif_1_the_header_is_one_of_the_format(change: dict[str, Any], why: str) -> None:
    assert measured(SMALL).version == 4
    refused(replace(SMALL, **change), why)


@pytest.mark.parametrize(("flags", "architecture"), [(0, Architecture.X86_64), (1, Architecture.AARCH64)])
def test_eif_1_the_header_says_machine_memory_and_cpus(flags: int, architecture: Architecture) -> None:
    image = measured(replace(SMALL, flags=flags, memory=5, cpus=7))
    assert (image.architecture, image.memory_bytes, image.cpus) == (architecture, 5, 7)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"count": 0}, "0 sections"),
        ({"count": 33}, "33 sections"),
        ({"count": 4}, "entries after the 4 sections"),
        ({"offsets": {9: 1}}, "entries after the 5 sections"),
        ({"sizes": {31: 1}}, "entries after the 5 sections"),
        ({"offsets": {0: 549}}, "section 1 begins at 549"),
        ({"offsets": {0: 0}}, "section 1 begins at 0"),
        ({"offsets": {2: 548}}, "section 3 begins at 548"),
        ({"sizes": {1: 12}}, "section 3 begins at"),
        ({"sizes": {1: (1 << 64) - 1}}, "section 3 begins at"),
        ({"sizes": {4: limits.EIF_BYTES}}, "more than"),
    ],
)
def test_eif_2_the_sections_stand_one_after_the_other(change: dict[str, Any], why: str) -> None:
    refused(replace(SMALL, **change), why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"section_flags": 1}, "reserved bits of the kernel's header"),
        ({"told": {1: 12}}, "the command line has 12 bytes, the header's table says 13"),
        ({"parts": ((0, b"x"), *PARTS)}, "unknown type 0"),
        ({"parts": (*PARTS, (6, b"x"))}, "unknown type 6"),
        ({"parts": (*PARTS, (0x103, b"x"))}, "unknown type 259"),
        ({"parts": (*PARTS, (RAMDISK, b""))}, "an empty ramdisk"),
        ({"parts": ((KERNEL, b""), *PARTS[1:])}, "an empty kernel"),
        ({"parts": (PARTS[0], (CMDLINE, bytes(4097)), *PARTS[2:])}, "command line has more than 4096 bytes"),
        ({"parts": (*PARTS[:2], (METADATA, bytes((1 << 20) + 1)), *PARTS[3:])}, "metadata has more than"),
        ({"parts": (*PARTS, (SIGNATURE, bytes(32_769)))}, "signature has more than 32768 bytes"),
    ],
)
def test_eif_3_a_section_is_what_the_table_says(change: dict[str, Any], why: str) -> None:
    refused(replace(SMALL, **change), why)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((PARTS[0], *PARTS), "more than one kernel"),
        ((*PARTS, PARTS[1]), "more than one command line"),
        ((*PARTS, PARTS[2]), "more than one metadata"),
        ((PARTS[3], *PARTS), "a ramdisk before the kernel"),
        ((PARTS[1], PARTS[0], *PARTS[2:]), "a command line before the kernel"),
        ((PARTS[0], PARTS[3], PARTS[1], *PARTS[2:]), "a ramdisk before the command line"),
        (PARTS[:3], "no ramdisk"),
        (PARTS[:1], "no ramdisk"),
        ((*PARTS[:2], *PARTS[3:]), "no metadata"),
    ],
)
def test_eif_4_there_is_one_order_in_which_to_measure(parts: Sequence[tuple[int, bytes]], why: str) -> None:
    refused(replace(SMALL, parts=parts), why)


@pytest.mark.parametrize("version", [2, 3])
def test_eif_4_metadata_come_with_version_4(version: int) -> None:
    old = replace(SMALL, version=version, parts=(*PARTS[:2], *PARTS[3:]))
    assert measured(old).metadata is None
    assert measured(old).pcrs == measured(SMALL).pcrs
    refused(replace(SMALL, version=version), "metadata in an image of version")


def test_eif_4_metadata_may_stand_anywhere() -> None:
    for order in ((2, 0, 1, 3, 4), (0, 2, 1, 3, 4), (0, 1, 3, 2, 4), (0, 1, 3, 4, 2)):
        assert measured(replace(SMALL, parts=[PARTS[place] for place in order])).pcrs == measured(SMALL).pcrs


def test_eif_5_the_file_ends_with_the_last_section() -> None:
    refused(replace(SMALL, tail=b"\0"), "bytes after the last section")
    data = SMALL.data()
    for length in range(len(data)):
        with pytest.raises(MalformedError, match="truncated"):
            measure(io.BytesIO(data[:length]))


def test_eif_6_the_crc_covers_all_but_itself() -> None:
    right = struct.unpack(">I", SMALL.data()[544:548])[0]
    refused(replace(SMALL, crc=right ^ 1), f"damaged: its CRC is {right:08x}, the header says {right ^ 1:08x}")


def test_eif_6_every_flipped_bit_is_refused() -> None:
    data = SMALL.data()
    for position in range(len(data)):
        for bit in range(8):
            flipped = data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
            with pytest.raises(MalformedError):
                measure(io.BytesIO(flipped))


def test_eif_6_and_with_the_crc_mended_it_changes_a_register_or_what_is_not_measured() -> None:
    data, before = SMALL.data(), measured(SMALL)
    unmeasured = set()
    for position in range(len(data)):
        for bit in range(8):
            flipped = mended(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            try:
                after = measure(io.BytesIO(flipped))
            except MalformedError:
                continue
            if after.pcrs == before.pcrs:
                unmeasured.add(position)
                if not 544 <= position < 548:  # the CRC itself was mended: it is the same file
                    assert after != before
                    told = {"architecture": before.architecture, "memory_bytes": 0, "cpus": 0, "metadata": None}
                    assert replace(after, **told) == replace(before, **told)
    start, size = next((s.offset, s.size) for s in before.sections if s.kind is Kind.METADATA)
    assert unmeasured == {7, *range(8, 24), *range(544, 548)} | (unmeasured & {*range(start, start + size)})


def test_eif_7_registers_are_of_kernel_command_line_and_ramdisks() -> None:
    kernel, cmdline, _, boot, application = (content for _, content in PARTS)
    assert measured(SMALL).pcrs == {
        0: ext(kernel, cmdline, boot, application),
        1: ext(kernel, cmdline, boot),
        2: ext(application),
    }
    assert measured(replace(SMALL, parts=(*PARTS, (RAMDISK, b"more")))).pcrs == {
        0: ext(kernel, cmdline, boot, application, b"more"),
        1: ext(kernel, cmdline, boot),
        2: ext(application, b"more"),
    }


def test_eif_7_with_one_ramdisk_pcr2_is_of_nothing() -> None:
    pcrs = measured(replace(SMALL, parts=PARTS[:4])).pcrs
    assert pcrs[2] == EMPTY_PCR == ext(b"")
    assert pcrs[0] == pcrs[1]


def test_eif_7_an_empty_command_line_is_one() -> None:
    kernel, _, _, boot, _ = (content for _, content in PARTS)
    assert measured(replace(SMALL, parts=(PARTS[0], (CMDLINE, b""), *PARTS[2:]))).pcrs[1] == ext(kernel, boot)


class Endless(io.RawIOBase):
    """An image with a ramdisk of any size, of which nothing is ever in memory; `most` is the largest read."""

    def __init__(self, size: int) -> None:
        self.head = replace(SMALL, sizes={4: size}, told={4: size}, parts=(*PARTS[:4], (RAMDISK, b""))).data()
        self.size, self.position, self.most = size, 0, 0

    def read(self, count: int = -1) -> bytes:
        self.most = max(self.most, count)
        end = len(self.head) + self.size
        start, self.position = self.position, min(self.position + count, end)
        head = self.head[start : self.position]
        return head + bytes(self.position - start - len(head))


def test_eif_7_memory_does_not_grow_with_the_image() -> None:
    size = 40 * limits.EIF_CHUNK_BYTES + 5
    file = Endless(size)
    with pytest.raises(MalformedError, match="damaged"):
        measure(cast("BinaryIO", file))
    assert file.position == len(file.head) + size
    assert file.most == limits.EIF_CHUNK_BYTES


# Signatures

Change = Callable[[dict[str, Any]], None]
CURVES: Final[dict[str, tuple[ec.EllipticCurve, HashAlgorithm, int, int]]] = {
    "P-256": (ec.SECP256R1(), SHA256(), -7, 32),
    "P-384": (ec.SECP384R1(), SHA384(), -35, 48),
    "P-521": (ec.SECP521R1(), SHA512(), -36, 66),
}
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def certificate(key: Key) -> bytes:
    """A certificate of `key` in PEM, valid for a year."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "signer")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return (builder.not_valid_before(start).not_valid_after(start.replace(year=2027)).sign(key, SHA384())).public_bytes(
        Encoding.PEM
    )


def signature(curve: str, change: Change = lambda _: None) -> tuple[bytes, bytes]:
    """(section, PEM): `change` may alter what is about to be signed and written."""
    kind, digest, algorithm, width = CURVES[curve]
    key = ec.generate_private_key(kind)
    fields: dict[str, Any] = {
        "pem": certificate(key),
        "protected": encode({1: algorithm}),
        "unprotected": {},
        "payload": encode({"register_index": 0, "register_value": list(measured(SMALL).pcrs[0])}),
        "key": key,
    }
    change(fields)
    signed = encode(["Signature1", fields["protected"], b"", fields["payload"]])
    r, s = decode_dss_signature(fields["key"].sign(signed, ec.ECDSA(digest)))
    raw = fields.get("raw", r.to_bytes(width, "big") + s.to_bytes(width, "big"))
    envelope = encode([fields["protected"], fields["unprotected"], fields["payload"], raw])
    entry = {"signing_certificate": list(fields["pem"]), "signature": list(fields.get("envelope", envelope))}
    return fields.get("section", encode([entry])), fields["pem"]


def signed(section: bytes) -> Eif:
    return replace(SMALL, parts=(*PARTS, (SIGNATURE, section)))


@pytest.mark.parametrize("curve", CURVES)
def test_eif_8_pcr8_is_of_the_certificate(curve: str) -> None:
    section, pem = signature(curve)
    image = measured(signed(section))
    der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    assert image.pcrs == {**measured(SMALL).pcrs, 8: ext(der)}
    assert image.certificate.der == der
    assert (image.certificate.subject, image.certificate.curve) == ("CN=signer", curve)


@pytest.mark.parametrize(
    ("section", "why"),
    [
        (b"\xff", "truncated|simple value"),
        (encode([]), "not one entry"),
        (encode([{"signature": [1], "signing_certificate": [1]}] * 2), "not one entry"),
        (encode([{"signature": [1]}]), "not one entry"),
        (encode([{"signature": [1], "signing_certificate": [1], "more": 1}]), "not one entry"),
        (encode({"signature": [1], "signing_certificate": [1]}), "not one entry"),
        (encode([{"signature": [1], "signing_certificate": b"x"}]), "signing_certificate is not an array of bytes"),
        (encode([{"signature": [1], "signing_certificate": [256]}]), "signing_certificate is not an array of bytes"),
        (encode([{"signature": [1], "signing_certificate": [True]}]), "signing_certificate is not an array of bytes"),
        (encode([{"signature": [1], "signing_certificate": [-1]}]), "signing_certificate is not an array of bytes"),
        (encode([{"signature": [1], "signing_certificate": [1]}]), "not one PEM block"),
    ],
)
def test_eif_8_a_signature_section_has_one_entry(section: bytes, why: str) -> None:
    refused(signed(section), why)


@pytest.mark.parametrize(
    ("pem", "why"),
    [
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be read"),
        (certificate(ec.generate_private_key(ec.SECP384R1())) * 2, "not one PEM block"),
        (certificate(ec.generate_private_key(ec.SECP256K1())), "none of the curves"),
        (certificate(rsa.generate_private_key(65537, 2048)), "none of the curves"),
    ],
    ids=["no certificate", "two", "another curve", "rsa"],
)
def test_eif_8_the_certificate_is_one_and_on_a_known_curve(pem: bytes, why: str) -> None:
    section, _ = signature("P-384", lambda fields: fields.update(pem=pem))
    refused(signed(section), why)


def _other_payload(fields: dict[str, Any]) -> None:
    fields["payload"] = encode({"register_index": 0, "register_value": [1] * 48})


def _other_index(fields: dict[str, Any]) -> None:
    value = list(measured(SMALL).pcrs[0])
    fields["payload"] = encode({"register_index": 8, "register_value": value})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_other_payload, "over another image"),
        (_other_index, "over another image"),
        (lambda fields: fields.update(key=ec.generate_private_key(ec.SECP384R1())), "does not verify"),
        (lambda fields: fields.update(protected=encode({1: -7})), "no COSE_Sign1 of the certificate's curve, P-384"),
        (lambda fields: fields.update(unprotected={1: 1}), "no COSE_Sign1"),
        (lambda fields: fields.update(raw=bytes(95)), "wrong length"),
        (lambda fields: fields.update(raw=bytes(96)), "does not verify"),
        (lambda fields: fields.update(envelope=encode([1, 2, 3])), "no COSE_Sign1"),
        (lambda fields: fields.update(envelope=b"\xd2" + encode([b"", {}, b"", b""])), "tag"),
        (lambda fields: fields.update(envelope=encode({})), "no COSE_Sign1"),
    ],
)
def test_eif_9_the_certificates_key_signed_this_pcr0(change: Change, why: str) -> None:
    section, _ = signature("P-384", change)
    refused(signed(section), why)


def test_eif_9_a_signature_of_another_image_is_refused() -> None:
    section, _ = signature("P-384")
    measured(signed(section))
    parts = (*PARTS[:4], (RAMDISK, b"another"), (SIGNATURE, section))
    refused(replace(SMALL, parts=parts), "over another image")


# Metadata


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        ("{}".encode("utf-16"), "no JSON"),
        (b"[]", "no JSON object"),
        (b"1", "no JSON object"),
        (b'{"a":' + b"1" * 5000 + b"}", "no JSON"),
        (b"[" * 100_000, "no JSON"),
    ],
    ids=["cut", "utf-8", "utf-16", "list", "number", "digits", "depth"],
)
def test_eif_10_metadata_are_a_json_object(data: bytes, why: str) -> None:
    refused(replace(SMALL, parts=(*PARTS[:2], (METADATA, data), *PARTS[3:])), why)


def test_eif_10_metadata_are_carried_and_change_no_register() -> None:
    image = measured(replace(SMALL, parts=(*PARTS[:2], (METADATA, b'{"ImageName":"other"}'), *PARTS[3:])))
    assert image.metadata == {"ImageName": "other"}
    assert image.pcrs == measured(SMALL).pcrs


def test_measurements_are_printed_as_nitro_cli_prints_them() -> None:
    text = measurements_json({1: b"\1" * 48, 0: bytes(48), 2: b"\2" * 48})
    assert json.loads(text) == {
        "Measurements": {
            "HashAlgorithm": "Sha384 { ... }",
            "PCR0": "00" * 48,
            "PCR1": "01" * 48,
            "PCR2": "02" * 48,
        }
    }
    assert text.endswith("}\n")
