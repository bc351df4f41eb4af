"""The writer of images: AWS's bytes from AWS's parts, and signatures that the measurement takes."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from parley_deploy.image.eif import Part, Signer, metadata, sign, write
from parley_deploy.image.errors import ImageError
from parley_protocol.encoding import decode
from parley_protocol.errors import MalformedError
from parley_protocol.measurement import Architecture, Kind, measure
from support.images import certificate as self_signed
from support.vectors import images

IMAGES = images()
UNSIGNED = sorted(name for name in IMAGES if name.startswith("unsigned"))
BUILT = datetime(2024, 1, 1, tzinfo=UTC)
NOW_MS = 1_790_000_000_000
DAY_MS = 86_400_000


def part(content: bytes) -> Part:
    return Part.whole(io.BytesIO(content))


def parts(data: bytes) -> dict[str, Any]:
    """What `write` needs to make an image again."""
    image = measure(io.BytesIO(data))
    found = {kind: [data[s.offset : s.offset + s.size] for s in image.sections if s.kind is kind] for kind in Kind}
    return {
        "kernel": part(found[Kind.KERNEL][0]),
        "cmdline": found[Kind.CMDLINE][0],
        "metadata": found[Kind.METADATA][0],
        "ramdisks": [part(ramdisk) for ramdisk in found[Kind.RAMDISK]],
        "architecture": image.architecture,
    }


def made(**fields: Any) -> bytes:
    out = io.BytesIO()
    write(out, **fields)
    return out.getvalue()


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def certificate(key: ec.EllipticCurvePrivateKey) -> bytes:
    return self_signed(key, start_ms=NOW_MS)


@pytest.mark.parametrize("name", UNSIGNED)
def test_the_parts_of_an_aws_image_make_the_same_file(name: str) -> None:
    assert made(**parts(IMAGES[name].data)) == IMAGES[name].data


def test_metadata_are_written_as_aws_writes_them() -> None:
    data = metadata(
        "test",
        "1.0",
        built=BUILT,
        tool="refeif",
        tool_version="0.3.0",
        system="Linux",
        kernel_version="4.14",
    )
    assert data == parts(IMAGES["unsigned_x86_2rd"].data)["metadata"]


def test_a_time_of_building_has_a_zone() -> None:
    with pytest.raises(ValueError, match="without its zone"):
        metadata("a", "1", built=datetime(2024, 1, 1), tool="b", tool_version="1", system="c", kernel_version="6")  # noqa: DTZ001


def test_defaults_and_the_machine_stand_in_the_header() -> None:
    fields = {"kernel": part(b"k"), "cmdline": b"c", "metadata": b"{}", "ramdisks": [part(b"r")]}
    image = measure(io.BytesIO(made(**fields)))
    assert (image.memory_bytes, image.cpus, image.architecture) == (1 << 30, 2, Architecture.X86_64)
    image = measure(io.BytesIO(made(**fields, memory_bytes=3, cpus=1, architecture=Architecture.AARCH64)))
    assert (image.memory_bytes, image.cpus, image.architecture) == (3, 1, Architecture.AARCH64)


def test_an_image_needs_a_ramdisk_and_has_32_sections_at_most() -> None:
    fields = {"kernel": part(b"k"), "cmdline": b"c", "metadata": b"{}"}
    with pytest.raises(ImageError, match="at least one ramdisk"):
        made(**fields, ramdisks=[])
    assert len(measure(io.BytesIO(made(**fields, ramdisks=[part(b"r")] * 29))).sections) == 32
    with pytest.raises(ImageError, match="at most 32 sections"):
        made(**fields, ramdisks=[part(b"r")] * 30)


def test_a_part_that_became_shorter_is_noticed() -> None:
    file = io.BytesIO(b"kernel")
    kernel = Part.whole(file)
    file.truncate(3)
    with pytest.raises(ImageError, match="became shorter"):
        made(kernel=kernel, cmdline=b"c", metadata=b"{}", ramdisks=[part(b"r")])


def test_a_signed_image_measures_with_its_certificate(key: ec.EllipticCurvePrivateKey) -> None:
    data = IMAGES["unsigned_x86_2rd"].data
    pem = certificate(key)
    signer = Signer(key, pem, now_ms=NOW_MS)
    found = made(**parts(data), signer=signer)
    image = measure(io.BytesIO(found))
    assert image.certificate == signer.certificate
    assert image.certificate.der == x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    assert {index: image.pcrs[index] for index in (0, 1, 2)} == IMAGES["unsigned_x86_2rd"].pcrs
    assert 8 in image.pcrs
    assert made(**parts(data), signer=Signer(key, pem, now_ms=NOW_MS)) == found  # no randomness in it
    out = io.BytesIO()
    sign(io.BytesIO(data), out, signer)
    assert out.getvalue() == found


def test_a_signature_has_the_form_of_aws(key: ec.EllipticCurvePrivateKey) -> None:
    """The same keys in the same order, the same types, and all but certificate and signature the same bytes."""
    theirs = IMAGES["signed_p384_2rd"].data
    out = io.BytesIO()
    sign(io.BytesIO(theirs), out, Signer(key, certificate(key), now_ms=NOW_MS))
    sections = []
    for data in (theirs, out.getvalue()):
        place = measure(io.BytesIO(data)).sections[-1]
        assert place.kind is Kind.SIGNATURE
        sections.append(data[place.offset : place.offset + place.size])
    assert sections[0][:22] == sections[1][:22]
    envelopes = []
    for section in sections:
        value: Any = decode(section, foreign=True)
        assert list(value[0]) == ["signing_certificate", "signature"]
        envelopes.append(bytes(value[0]["signature"]))
    assert len(envelopes[0]) == len(envelopes[1])
    assert envelopes[0][:-96] == envelopes[1][:-96]


def test_a_new_signature_takes_the_place_of_an_old_one(key: ec.EllipticCurvePrivateKey) -> None:
    out = io.BytesIO()
    sign(io.BytesIO(IMAGES["signed_p256_2rd"].data), out, Signer(key, certificate(key), now_ms=NOW_MS))
    image = measure(io.BytesIO(out.getvalue()))
    assert [section.kind for section in image.sections].count(Kind.SIGNATURE) == 1
    assert image.pcrs[8] != IMAGES["signed_p256_2rd"].pcrs[8]
    assert image.pcrs[0] == IMAGES["signed_p256_2rd"].pcrs[0]


def test_a_damaged_image_is_not_signed(key: ec.EllipticCurvePrivateKey) -> None:
    with pytest.raises(MalformedError, match="damaged"):
        sign(io.BytesIO(IMAGES["bad_crc"].data), io.BytesIO(), Signer(key, certificate(key), now_ms=NOW_MS))


def test_a_signer_has_the_key_of_its_certificate(key: ec.EllipticCurvePrivateKey) -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(ImageError, match="another key"):
        Signer(key, certificate(other), now_ms=NOW_MS)


def test_a_signer_has_a_key_on_p384() -> None:
    for curve in (ec.SECP256R1(), ec.SECP521R1()):
        other = ec.generate_private_key(curve)
        with pytest.raises(ImageError, match="signed with P-384"):
            Signer(other, certificate(other), now_ms=NOW_MS)


@pytest.mark.parametrize("now_ms", [NOW_MS - 1, NOW_MS + 30 * DAY_MS + 1])
def test_a_signer_has_a_certificate_that_is_valid_now(key: ec.EllipticCurvePrivateKey, now_ms: int) -> None:
    Signer(key, certificate(key), now_ms=NOW_MS)
    Signer(key, certificate(key), now_ms=NOW_MS + 30 * DAY_MS)
    with pytest.raises(ImageError, match="not valid now"):
        Signer(key, certificate(key), now_ms=now_ms)


def test_a_signer_has_a_certificate_at_all(key: ec.EllipticCurvePrivateKey) -> None:
    with pytest.raises(ImageError, match="not one PEM block"):
        Signer(key, b"", now_ms=NOW_MS)


def test_a_certificate_must_fit_its_section(key: ec.EllipticCurvePrivateKey) -> None:
    signer = Signer(key, b"#" * 40_000 + b"\n" + certificate(key), now_ms=NOW_MS)
    with pytest.raises(ImageError, match="too long"):
        made(kernel=part(b"k"), cmdline=b"c", metadata=b"{}", ramdisks=[part(b"r")], signer=signer)
