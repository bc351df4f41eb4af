"""The sealed table: fixed-width columns in frames of one group of rows and one column (SPEC, "Sealed table").

A blob is the list of SHA-256 of every frame, then the frames: the manifest, then group by group each column in order. All
offsets follow from the header and the schema, so the enclave pulls the columns it needs, in any number of passes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parley_protocol import limits
from parley_protocol.errors import MalformedError, VerificationError
from parley_protocol.transcript import UploadHeader

KEY_NULL = 0
KEY_PAD = 2**64 - 1
KEY_WIDTH = 8
TAG_BYTES = 16
HASH_BYTES = 32
MANIFEST_COLUMN = 2**32 - 1
_MANIFEST = struct.Struct("<Q")
MANIFEST_BYTES = _MANIFEST.size + TAG_BYTES
_NONCE = struct.Struct(">IQ")


def bucket(rows: int) -> tuple[int, int]:
    """(groups, rows per group) of a table: all that the host learns of its size (tab-1, tab-2).

    Small tables are one group of 1,024, 4,096 or 16,384 rows; larger ones quarter steps of a power of two of full groups.
    """
    if not 0 <= rows <= limits.GROUPS * limits.GROUP_ROWS[-1]:
        raise MalformedError("more rows than a table may have")
    for group_rows in limits.GROUP_ROWS:
        if rows <= group_rows:
            return 1, group_rows
    return _round_up(-(-rows // limits.GROUP_ROWS[-1])), limits.GROUP_ROWS[-1]


def _round_up(groups: int) -> int:
    step = 1 << max(0, groups.bit_length() - 3)
    return -(-groups // step) * step


def is_bucket(groups: int, group_rows: int) -> bool:
    """Whether a header may say so."""
    if group_rows not in limits.GROUP_ROWS or not 1 <= groups <= limits.GROUPS:
        return False
    return groups == 1 or (group_rows == limits.GROUP_ROWS[-1] and _round_up(groups) == groups)


def frame_nonce(column: int, group: int) -> bytes:
    """The AES-GCM nonce of a frame (tab-5): unique under an upload's frame key, since nothing is sealed twice (tab-8)."""
    return _NONCE.pack(column, group)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the frames of a blob stand (tab-7). `widths`: bytes per value of each column, the unit key first."""

    groups: int
    group_rows: int
    widths: tuple[int, ...]

    @classmethod
    def of(cls, header: UploadHeader, widths: Sequence[int]) -> Layout:
        """The layout of an upload whose table has columns of these widths, without the key; MalformedError."""
        if not is_bucket(header.groups, header.group_rows):
            raise MalformedError("UploadHeader: groups and group_rows are no size of SPEC")
        return cls(header.groups, header.group_rows, (KEY_WIDTH, *widths))

    @property
    def frames(self) -> int:
        """Number of frames, the manifest included."""
        return 1 + self.groups * len(self.widths)

    @property
    def digest_range(self) -> tuple[int, int]:
        """(offset, length) of the list of frame digests."""
        return 0, self.frames * HASH_BYTES

    @property
    def manifest_range(self) -> tuple[int, int]:
        """(offset, length) of the manifest frame."""
        return self.frames * HASH_BYTES, MANIFEST_BYTES

    @property
    def group_bytes(self) -> int:
        """Bytes of the frames of one group."""
        return sum(self.frame_bytes(column) for column in range(len(self.widths)))

    @property
    def size(self) -> int:
        """Bytes of the whole blob."""
        return self.frames * HASH_BYTES + MANIFEST_BYTES + self.groups * self.group_bytes

    def frame_bytes(self, column: int) -> int:
        """Bytes of a sealed frame of a column."""
        return self.group_rows * self.widths[column] + TAG_BYTES

    def frame_range(self, group: int, column: int) -> tuple[int, int]:
        """(offset, length) of a frame."""
        start = self.frames * HASH_BYTES + MANIFEST_BYTES + group * self.group_bytes
        return start + sum(self.frame_bytes(before) for before in range(column)), self.frame_bytes(column)

    def frame_index(self, group: int, column: int) -> int:
        """The place of a frame in the list of digests; the manifest is 0."""
        return 1 + group * len(self.widths) + column


def frames_digest(digest_list: bytes) -> bytes:
    """What an upload says of its list of frame digests."""
    return hashlib.sha384(digest_list).digest()


def seal_frame(key: AESGCM, group: int, column: int, values: bytes | memoryview) -> bytes:
    """A sealed frame: `values` are all rows of the group, padding included."""
    return key.encrypt(frame_nonce(column, group), bytes(values), None)


def open_frame(key: AESGCM, group: int, column: int, sealed: bytes | memoryview) -> bytes:
    """The values of a frame; VerificationError tab-6 where it is not the frame of this key and place."""
    try:
        return key.decrypt(frame_nonce(column, group), bytes(sealed), None)
    except InvalidTag:
        raise VerificationError("tab-6", "a frame does not open", code="frame") from None


def seal_manifest(key: AESGCM, rows: int) -> bytes:
    """The sealed manifest: the true number of rows."""
    return key.encrypt(frame_nonce(MANIFEST_COLUMN, 0), _MANIFEST.pack(rows), None)


def open_manifest(key: AESGCM, sealed: bytes | memoryview) -> int:
    """The true number of rows; VerificationError tab-6."""
    if len(sealed) != MANIFEST_BYTES:
        raise VerificationError("tab-6", "the manifest has a wrong length", code="frame")
    (rows,) = _MANIFEST.unpack(open_frame(key, 0, MANIFEST_COLUMN, sealed))
    return int(rows)
