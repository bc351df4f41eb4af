"""The sealed table: sizes, places, keys and nonces."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parley_protocol import table
from parley_protocol.errors import MalformedError, VerificationError
from parley_protocol.table import Layout, bucket
from parley_protocol.transcript import UploadHeader

HEADER = UploadHeader(bytes(48), "AA", "flights", bytes(48), 5, 16384, bytes(16), bytes(48))
KEY = AESGCM(b"k" * 32)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (0, (1, 1024)),
        (1024, (1, 1024)),
        (1025, (1, 4096)),
        (4097, (1, 16384)),
        (16384, (1, 16384)),
        (16385, (2, 16384)),
        (7 * 16384 + 1, (8, 16384)),
        (8 * 16384 + 1, (10, 16384)),
        (13 * 16384, (14, 16384)),
        (16 * 16384 + 1, (20, 16384)),
        (1_000_000, (64, 16384)),
    ],
)
def test_tab_1_sizes_are_rounded_up_to_the_ladder(rows: int, wanted: tuple[int, int]) -> None:
    assert bucket(rows) == wanted
    assert table.is_bucket(*wanted)


def test_tab_2_every_bucket_is_on_the_ladder_and_costs_at_most_a_quarter() -> None:
    for groups in range(1, 3000):
        made, group_rows = bucket(groups * 16384)
        assert table.is_bucket(made, group_rows)
        assert groups <= made <= max(groups * 1.25, groups)
    for groups, group_rows in ((9, 16384), (11, 16384), (2, 1024), (0, 16384), (1, 2048), (65537, 16384), (33, 16384)):
        assert not table.is_bucket(groups, group_rows)
    with pytest.raises(MalformedError):
        bucket(65536 * 16384 + 1)


def test_tab_7_frames_tile_the_blob() -> None:
    layout = Layout.of(HEADER, (8, 1, 4))
    ranges = [layout.digest_range, layout.manifest_range]
    ranges += [layout.frame_range(group, column) for group in range(5) for column in range(4)]
    position = 0
    for offset, length in ranges:
        assert offset == position and length > 0
        position += length
    assert position == layout.size
    indices = [layout.frame_index(group, column) for group in range(5) for column in range(4)]
    assert [0, *indices] == list(range(layout.frames))


def test_tab_7_the_digest_is_of_the_list() -> None:
    digests = hashlib.sha256(b"a").digest() + hashlib.sha256(b"b").digest()
    assert table.frames_digest(digests) == hashlib.sha384(digests).digest()


def test_tab_5_nonces_are_all_different_and_bind_the_place() -> None:
    nonces = {table.frame_nonce(c, g) for c in (0, 1, 255, table.MANIFEST_COLUMN) for g in (0, 1, 2**40)}
    assert len(nonces) == 12 and {len(nonce) for nonce in nonces} == {12}


def test_tab_6_a_frame_opens_only_at_its_place_and_under_its_key() -> None:
    sealed = table.seal_frame(KEY, 3, 2, b"v" * 64)
    assert table.open_frame(KEY, 3, 2, sealed) == b"v" * 64
    for key, group, column, data in (
        (KEY, 2, 3, sealed),
        (KEY, 3, 1, sealed),
        (AESGCM(b"l" * 32), 3, 2, sealed),
        (KEY, 3, 2, sealed[:-1]),
        (KEY, 3, 2, b"\1" + sealed[1:]),
        (KEY, 3, 2, b""),
    ):
        with pytest.raises(VerificationError) as caught:
            table.open_frame(key, group, column, data)
        assert caught.value.code == "frame" and caught.value.step == "tab-6"


def test_tab_6_a_manifest_is_no_frame_and_has_one_length() -> None:
    sealed = table.seal_manifest(KEY, 12345)
    assert table.open_manifest(KEY, sealed) == 12345
    for bad in (sealed[:-1], sealed + b"\0", table.seal_frame(KEY, 0, 0, b"12345678")):
        with pytest.raises(VerificationError):
            table.open_manifest(KEY, bad)


def test_a_header_of_another_size_is_refused() -> None:
    with pytest.raises(MalformedError):
        Layout.of(dataclasses.replace(HEADER, groups=9), (8,))
    with pytest.raises(MalformedError):
        Layout.of(dataclasses.replace(HEADER, group_rows=2048), (8,))
