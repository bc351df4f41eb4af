"""Frames as the engine reads them: pulled from the host, checked, opened into arrays.

At admission each frame is checked against the SHA-256 that its party signed. From then on a tag under a key that only this
enclave knows says the same at a fraction of the cost: a party knows its frame key and can make any number of frames that
open, so the tag of AES-GCM proves nothing against it (REVIEW T1).
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from parley_protocol.agreement.schema import Column
from parley_protocol.encoding import encode, sha384
from parley_protocol.errors import RefusedError
from parley_protocol.secret import Secret
from parley_protocol.table import KEY_PAD, TAG_BYTES, Layout, frame_nonce
from parley_protocol.transcript import UploadHeader

Pull = Callable[[int, Sequence[tuple[int, int]]], list[memoryview]]
"""(blob, [(offset, length)...]) to the bytes of each range; FrameError where the host does not hold one."""
Progress = Callable[[int], None]
"""Told percents, 0 to 100."""
Keys = NDArray[np.uint64]
Values = NDArray[Any]

_DIGEST_BYTES: Final = 48
_INDEX_DTYPE: Final = np.dtype("<u8")


class FrameError(RefusedError):
    """A frame is missing, or is not the one that was admitted."""

    def __init__(self, message: str) -> None:
        super().__init__("frame", message)


@dataclass(frozen=True, slots=True)
class Source(Secret):
    """One admitted or arriving upload: whose it is, where the host keeps it, and the key of its frames."""

    party: str
    table: str
    header: UploadHeader
    layout: Layout
    blob: int
    frame_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Admitted(Secret):
    """What admission found. It is data of the parties and never leaves the enclave.

    `index`: u64 little-endian, first and last key of the true rows of each group (2^64 - 1 twice for a group of padding),
    then the most rows that a unit has.
    `tags`: the upload's frames digest, then 16 bytes for each frame in the order of the layout.
    """

    rows: int = field(repr=False)
    index: bytes = field(repr=False)
    tags: bytes = field(repr=False)


class Guard:
    """Tags of the frames of one upload under the enclave's own key: GMAC, the nonce being the number of the frame."""

    def __init__(self, guard_key: bytes, source: Source, frames_digest: bytes) -> None:
        """A key of its own for each signed list of frames, so that no nonce serves two versions of a frame."""
        info = encode(["parley/1/guard-key", sha384(source.header.to_bytes()), frames_digest])
        self._aead = AESGCM(HKDF(algorithm=hashes.SHA384(), length=32, salt=None, info=info).derive(guard_key))

    def tag(self, number: int, sealed: memoryview) -> bytes:
        """16 bytes that only this frame at this place has."""
        return self._aead.encrypt(number.to_bytes(12, "big"), b"", sealed)


def dtypes(columns: Sequence[Column]) -> tuple[np.dtype[Any], ...]:
    """The dtypes of a sealed table, the unit key first."""
    return (np.dtype("<u8"), *(np.dtype(column.dtype) for column in columns))


def open_into(aead: AESGCM, column: int, group: int, sealed: memoryview, into: Values) -> None:
    """Decrypts a frame into a contiguous array of its size; FrameError where it does not open."""
    if len(sealed) != into.nbytes + TAG_BYTES:
        raise FrameError("a frame has a wrong length")
    try:
        aead.decrypt_into(frame_nonce(column, group), sealed, None, into.view(np.uint8).data)
    except InvalidTag:
        raise FrameError("a frame does not open") from None


class Reader:
    """Reads groups of an admitted upload, checking each frame against its tag before anything is made of it."""

    def __init__(
        self, source: Source, admitted: Admitted, columns: Sequence[Column], guard_key: bytes, pull: Pull
    ) -> None:
        layout = source.layout
        if len(admitted.tags) != _DIGEST_BYTES + layout.frames * TAG_BYTES:
            raise ValueError("tags: not one for each frame")
        self._layout = layout
        self._blob = source.blob
        self._pull = pull
        self._tags = admitted.tags
        self._aead = AESGCM(source.frame_key)
        self._guard = Guard(guard_key, source, admitted.tags[:_DIGEST_BYTES])
        self._dtypes = dtypes(columns)

    def pull(self, groups: range, columns: Sequence[int]) -> list[memoryview]:
        """The sealed frames of `columns` (0 is the key), group by group, not checked yet; FrameError where one is missing."""
        ranges = [self._layout.frame_range(group, column) for group in groups for column in columns]
        frames = self._pull(self._blob, ranges) if ranges else []
        if [len(frame) for frame in frames] != [length for _, length in ranges]:
            raise FrameError("the host does not hold a range")
        return frames

    def open(
        self, groups: range, columns: Sequence[int], frames: Sequence[memoryview], kept: Sequence[Values]
    ) -> list[Values]:
        """For each of `columns`: the rows in `kept`, followed by those in `frames`, which `pull` gave for the same groups.

        FrameError where a frame is not the admitted one.
        """
        self.check(groups, columns, frames)
        height = self._layout.group_rows
        result = []
        for column, before in zip(columns, kept, strict=True):
            values = np.empty(len(before) + len(groups) * height, self._dtypes[column])
            values[: len(before)] = before
            result.append(values)
        sealed = iter(frames)
        for place, group in enumerate(groups):
            for column, before, values in zip(columns, kept, result, strict=True):
                start = len(before) + place * height
                open_into(self._aead, column, group, next(sealed), values[start : start + height])
        return result

    def check(self, groups: range, columns: Sequence[int], frames: Sequence[memoryview]) -> None:
        """Checks each frame against its tag (eng-2); FrameError."""
        places = ((group, column) for group in groups for column in columns)
        for (group, column), frame in zip(places, frames, strict=True):
            number = self._layout.frame_index(group, column)
            start = _DIGEST_BYTES + number * TAG_BYTES
            if not hmac.compare_digest(self._guard.tag(number, frame), self._tags[start : start + TAG_BYTES]):
                raise FrameError("a frame is not the admitted one")


@dataclass(frozen=True, slots=True)
class Index(Secret):
    """First and last key of the true rows of each group that has any (both ascending), and the most rows of one unit."""

    first: Keys = field(repr=False)
    last: Keys = field(repr=False)
    longest: int = field(repr=False)

    @classmethod
    def of(cls, admitted: Admitted, layout: Layout) -> Index:
        """The index that admission made; ValueError where it has another size than the layout."""
        numbers = np.frombuffer(admitted.index, _INDEX_DTYPE)
        if len(numbers) != 2 * layout.groups + 1:
            raise ValueError("index: not a first and last key for each group")
        true = -(-admitted.rows // layout.group_rows)
        return cls(numbers[0:-1:2][:true].copy(), numbers[1::2][:true].copy(), int(numbers[-1]))


def index_bytes(first: Sequence[int], last: Sequence[int], longest: int) -> bytes:
    """The index as `Admitted` holds it."""
    numbers = np.empty(2 * len(first) + 1, _INDEX_DTYPE)
    numbers[0:-1:2] = np.array(first, np.uint64)
    numbers[1::2] = np.array(last, np.uint64)
    numbers[-1] = longest
    return numbers.tobytes()


def starts(keys: Values) -> NDArray[np.bool_]:
    """Whether a key differs from the one before; `keys` are sorted."""
    first = np.empty(len(keys), np.bool_)
    first[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return first


PAD: Final = np.uint64(KEY_PAD)
