"""Admission of a sealed table: every frame pulled once and checked, in bounded memory (SPEC adm-10 to adm-18).

A refusal has a stable code and holds no value of the data.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from parley_enclave.engine.frames import (
    PAD,
    Admitted,
    FrameError,
    Guard,
    Progress,
    Pull,
    Source,
    Values,
    dtypes,
    index_bytes,
    open_into,
)
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.schema import Column, ColumnType, Table
from parley_protocol.errors import RefusedError, VerificationError
from parley_protocol.table import HASH_BYTES, KEY_NULL, Layout, bucket, frames_digest, open_manifest


def admit(
    source: Source, agreement: Agreement, expected: bytes, guard_key: bytes, pull: Pull, progress: Progress
) -> Admitted:
    """Pulls a whole upload and checks it against the agreement; `expected` is the frames digest that the party signed.

    RefusedError with the code frame, rows, order, multiplicity, domain or range.
    """
    table, layout = agreement.tables[source.table], source.layout
    if source.party not in table.parties or layout.widths[1:] != table.widths:
        raise RefusedError("schema")
    hashes = _pulled(pull, source.blob, *layout.digest_range)  # adm-10
    if not hmac.compare_digest(frames_digest(bytes(hashes)), expected):
        raise FrameError("the list of digests is not the signed one")
    guard = Guard(guard_key, source, expected)
    aead = AESGCM(source.frame_key)
    tags = bytearray(expected)

    def checked(number: int, sealed: memoryview) -> memoryview:
        digest = hashlib.sha256(sealed).digest()  # adm-11
        if not hmac.compare_digest(digest, hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]):
            raise FrameError("a frame is not the signed one")
        tags.extend(guard.tag(number, sealed))
        return sealed

    try:
        rows = open_manifest(aead, checked(0, _pulled(pull, source.blob, *layout.manifest_range)))
    except VerificationError:
        raise FrameError("the manifest does not open") from None
    if rows > layout.groups * layout.group_rows or bucket(rows) != (layout.groups, layout.group_rows):
        raise RefusedError("rows")  # adm-12
    check = _Check(table, rows)
    for groups, sealed in _batches(pull, source.blob, layout):
        columns: list[Values] = [np.empty(len(groups) * layout.group_rows, dtype) for dtype in dtypes(table.columns)]
        at = 0
        for place, group in enumerate(groups):
            height = slice(place * layout.group_rows, (place + 1) * layout.group_rows)
            for number, column in enumerate(columns):
                length = layout.frame_bytes(number)
                frame = checked(layout.frame_index(group, number), sealed[at : at + length])
                open_into(aead, number, group, frame, column[height])
                at += length
        check.take(columns, layout.group_rows)
        progress(groups.stop * 100 // layout.groups)
    return Admitted(rows=rows, index=index_bytes(check.first, check.last, check.longest), tags=bytes(tags))


def _pulled(pull: Pull, blob: int, offset: int, length: int) -> memoryview:
    pieces = pull(blob, [(offset, length)])
    if len(pieces) != 1 or len(pieces[0]) != length:
        raise FrameError("the host does not hold a range")
    return pieces[0]


def _batches(pull: Pull, blob: int, layout: Layout) -> Iterator[tuple[range, memoryview]]:
    """The frames of several groups at a time: those of a group follow one another in the blob."""
    step = max(1, limits.ADMISSION_BYTES // layout.group_bytes)
    for start in range(0, layout.groups, step):
        groups = range(start, min(start + step, layout.groups))
        offset, _ = layout.frame_range(start, 0)
        yield groups, _pulled(pull, blob, offset, len(groups) * layout.group_bytes)


class _Check:
    """What is carried from one batch of groups to the next: the last key and how many rows it has so far."""

    def __init__(self, table: Table, rows: int) -> None:
        self._table = table
        self._left = rows
        self._key = np.uint64(KEY_NULL)
        self._count = 0
        self.longest = 0
        self.first: list[int] = []
        self.last: list[int] = []

    def take(self, columns: list[Values], group_rows: int) -> None:
        """Checks whole groups; RefusedError."""
        true = min(self._left, len(columns[0]))
        self._left -= true
        self._keys(columns[0][:true])
        for column, values in zip(self._table.columns, columns[1:], strict=True):
            _check_column(column, values[:true])
        self._padding([values[true:] for values in columns])
        for start in range(0, len(columns[0]), group_rows):
            group = columns[0][start : min(start + group_rows, true)]
            self.first.append(int(group[0] if len(group) else PAD))
            self.last.append(int(group[-1] if len(group) else PAD))

    def _keys(self, keys: Values) -> None:
        if not len(keys):
            return
        if keys[0] < self._key or bool((keys[1:] < keys[:-1]).any()):
            raise RefusedError("order")  # adm-13
        # The keys are sorted: the first says whether any is null, the last whether any is padding.
        if keys[0] == KEY_NULL:
            raise RefusedError("domain")  # adm-14
        if keys[-1] == PAD:
            raise RefusedError("rows")  # adm-15
        starts = np.flatnonzero(keys[1:] != keys[:-1]) + 1
        runs = np.diff(np.concatenate(([0], starts, [len(keys)])))
        if keys[0] == self._key:
            runs[0] += self._count
        self.longest = max(self.longest, int(runs.max()))
        if self.longest > self._table.rows_per_unit:
            raise RefusedError("multiplicity")  # adm-16
        self._key, self._count = keys[-1], int(runs[-1])

    def _padding(self, columns: list[Values]) -> None:
        keys, *others = columns
        nulls = (is_null(column, values) for column, values in zip(self._table.columns, others, strict=True))
        if not bool((keys == PAD).all()) or not all(bool(null.all()) for null in nulls):
            raise RefusedError("rows")  # adm-15


def _check_column(column: Column, values: Values) -> None:
    """The true rows of one column; RefusedError domain or range."""
    null = is_null(column, values)
    if not column.null and bool(null.any()):
        raise RefusedError("domain")  # adm-17
    if column.type is ColumnType.BOOL:
        good: NDArray[np.bool_] = values <= 1
    elif column.type is ColumnType.CATEGORY:
        good = values <= len(column.values)
    else:
        # An infinity is out of every range.
        good = (values >= column.low) & (values <= column.high)
    if not bool((good | null).all()):
        raise RefusedError("range" if column.low is not None else "domain")  # adm-17, adm-18


def is_null(column: Column, values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values of a column stand for null."""
    if column.type is ColumnType.FLOAT:
        null: NDArray[np.bool_] = np.isnan(values)
    else:
        null = values == values.dtype.type(column.null_value)
    return null
