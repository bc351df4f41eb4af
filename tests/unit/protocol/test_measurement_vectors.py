"""Every recorded image measures as AWS's own code measured it."""

from __future__ import annotations

import io

import pytest

from parley_protocol.errors import MalformedError
from parley_protocol.measurement import Architecture, measure
from support.vectors import images

IMAGES = images()
BAD = "bad_crc"
SHIFTED, STRAIGHT = "malicious_section_shift_same_pcr0", "unsigned_x86_2rd"


def test_all_images_are_here() -> None:
    assert len(IMAGES) == 8 and {BAD, SHIFTED, STRAIGHT} < IMAGES.keys()


@pytest.mark.parametrize("name", sorted(IMAGES.keys() - {BAD}))
def test_an_image_measures_as_recorded(name: str) -> None:
    with IMAGES[name].path.open("rb") as file:
        image = measure(file)
    assert image.pcrs == IMAGES[name].pcrs
    assert image.size == IMAGES[name].path.stat().st_size
    assert (image.version, image.memory_bytes, image.cpus) == (4, 1 << 30, 2)
    assert image.architecture is (Architecture.AARCH64 if "arm64" in name else Architecture.X86_64)
    assert len(image.ramdisks) == (2 if name == SHIFTED else int(name[-3]))
    assert image.metadata is not None and image.metadata["ImageName"] == "test"
    assert (image.certificate is not None) == name.startswith("signed")


def test_a_signing_certificate_is_told() -> None:
    for curve in ("256", "384"):
        certificate = measure(io.BytesIO(IMAGES[f"signed_p{curve}_2rd"].data)).certificate
        assert certificate is not None
        assert certificate.curve == f"P-{curve}"
        assert certificate.subject == certificate.issuer == f"CN=eif-signer-p{curve},O=Test,C=US"
        assert certificate.not_before_ms == 1_795_420_644_000 < certificate.not_after_ms


def test_bytes_moved_between_ramdisks_change_pcr1_and_pcr2_alone() -> None:
    shifted, straight = (measure(io.BytesIO(IMAGES[name].data)).pcrs for name in (SHIFTED, STRAIGHT))
    assert shifted[0] == straight[0]
    assert shifted[1] != straight[1] and shifted[2] != straight[2]


def test_a_wrong_crc_is_refused() -> None:
    with pytest.raises(MalformedError, match="damaged: its CRC is 7ec7cc36, the header says 7fc7cc36"):
        measure(io.BytesIO(IMAGES[BAD].data))
