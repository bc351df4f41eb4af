"""The reader of images takes any bytes: it measures them, or says MalformedError; and it measures what was written."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from typing import Final

from hypothesis import given
from hypothesis import strategies as st

from parley_deploy.image.eif import Part, write
from parley_protocol.errors import MalformedError
from parley_protocol.measurement import Architecture, Image, measure


def written(kernel: bytes, cmdline: bytes, ramdisks: list[bytes], architecture: Architecture) -> bytes:
    out = io.BytesIO()
    write(
        out,
        kernel=Part.whole(io.BytesIO(kernel)),
        cmdline=cmdline,
        metadata=b"{}",
        ramdisks=[Part.whole(io.BytesIO(ramdisk)) for ramdisk in ramdisks],
        architecture=architecture,
    )
    return out.getvalue()


SMALL: Final = written(b"kernel", b"cmdline", [b"boot", b"application"], Architecture.X86_64)


def attempt(data: bytes) -> Image | None:
    """What `data` is measured to be; nothing but MalformedError refuses it."""
    try:
        return measure(io.BytesIO(data))
    except MalformedError:
        return None


def mended(data: bytes) -> bytes:
    """The same with the CRC that its bytes have, where it is long enough to have one."""
    if len(data) < 548:
        return data
    return data[:544] + struct.pack(">I", zlib.crc32(data[:544] + data[548:])) + data[548:]


@given(st.binary(max_size=2000))
def test_any_bytes_are_measured_or_malformed(data: bytes) -> None:
    assert attempt(data) is None
    attempt(mended(b".eif\0\4" + data))


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_change_is_measured_or_malformed(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL)
    for position, value in changes:
        data[position] = value
    found = attempt(mended(bytes(data)))
    assert found is None or found.size == len(SMALL)
    unmended = attempt(bytes(data))
    assert unmended is None or bytes(data) == SMALL


@given(st.binary(max_size=40), st.binary(max_size=64))
def test_any_signature_is_measured_or_malformed(start: bytes, section: bytes) -> None:
    count, end = 6, len(SMALL)
    head = bytearray(SMALL)
    struct.pack_into(">H", head, 0x1A, count)
    struct.pack_into(">Q", head, 0x1C + 8 * (count - 1), end)
    struct.pack_into(">Q", head, 0x11C + 8 * (count - 1), len(start + section))
    found = attempt(mended(bytes(head) + struct.pack(">HHQ", 4, 0, len(start + section)) + start + section))
    assert found is None


@given(
    st.binary(min_size=1, max_size=300),
    st.binary(max_size=100),
    st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=8),
    st.sampled_from(Architecture),
)
def test_what_is_written_is_measured(
    kernel: bytes, cmdline: bytes, ramdisks: list[bytes], architecture: Architecture
) -> None:
    image = measure(io.BytesIO(written(kernel, cmdline, ramdisks, architecture)))
    parts = {0: [kernel, cmdline, *ramdisks], 1: [kernel, cmdline, ramdisks[0]], 2: ramdisks[1:]}
    assert image.pcrs == {
        index: hashlib.sha384(bytes(48) + hashlib.sha384(b"".join(content)).digest()).digest()
        for index, content in parts.items()
    }
    assert (image.cmdline, image.architecture) == (cmdline, architecture)
