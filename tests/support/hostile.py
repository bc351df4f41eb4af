"""What a party that lies can seal: any columns, any manifest, any header, under its own keys."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parley_protocol import table
from parley_protocol.agreement.model import Agreement
from parley_protocol.transcript import Upload, UploadHeader, frame_key, key_commitment
from support.enclave import Party, Rows, Sealed

Columns = Sequence[np.ndarray[Any, Any]]


def columns_of(agreement: Agreement, name: str, rows: Rows) -> list[np.ndarray[Any, Any]]:
    """The padded columns of a `visits` table, the key first."""
    groups, group_rows = table.bucket(len(rows.keys))
    total = groups * group_rows
    spec = agreement.tables[name]
    padded: list[np.ndarray[Any, Any]] = [
        np.full(total, table.KEY_PAD, "<u8"),
        *(np.full(total, c.null_value, c.dtype) for c in spec.columns),
    ]
    for column, values in zip(padded, (rows.keys, rows.amount, rows.score, rows.site), strict=True):
        column[: len(values)] = values
    return padded


def reseal(
    agreement: Agreement,
    party: Party,
    columns: Columns,
    rows: int,
    *,
    number: int = 0,
    fresh: bool = True,
    header: Mapping[str, Any] | None = None,
) -> Sealed:
    """Any padded columns with a manifest of `rows`, sealed and signed by a party.

    With `fresh` under a new content key and id; without, a second version under the same ones: what a party can make and
    an honest one never does. `header` replaces fields of the header.
    """
    before = party.sealed[number]
    content_key = os.urandom(32) if fresh else before.content_key
    made = before.upload.header
    if fresh:
        made = replace(made, upload_id=os.urandom(16), key_commitment=key_commitment(content_key))
    groups, group_rows = table.bucket(len(columns[0]))
    assert groups * group_rows == len(columns[0])
    made = replace(made, groups=groups, group_rows=group_rows)
    made = replace(made, **(header or {}))
    key = AESGCM(frame_key(content_key, made.to_bytes()))
    frames = [table.seal_manifest(key, rows)]
    for group in range(groups):
        part = slice(group * group_rows, (group + 1) * group_rows)
        frames += [table.seal_frame(key, group, place, column[part].tobytes()) for place, column in enumerate(columns)]
    return sealed_of(party, made, frames, content_key)


def sealed_of(party: Party, header: UploadHeader, frames: Sequence[bytes], content_key: bytes) -> Sealed:
    """Frames with the list of their digests, signed by a party."""
    digests = b"".join(hashlib.sha256(frame).digest() for frame in frames)
    upload = Upload(header.to_bytes(), table.frames_digest(digests))
    return Sealed(upload, party.identity.sign(upload.to_bytes()), digests + b"".join(frames), content_key)


def party_with(party: Party, *sealed: Sealed) -> Party:
    """The same party, with other uploads."""
    made = Party(party.agreement, party.name, party.identity, {})
    made.sealed = list(sealed)
    made.numbers = [int.from_bytes(os.urandom(6), "big") for _ in sealed]
    return made


def frames_of(party: Party, number: int = 0) -> tuple[bytes, list[tuple[int, int]]]:
    """The blob of an upload, and (offset, length) of the manifest and each frame in it."""
    sealed = party.sealed[number]
    header = sealed.upload.header
    spec = party.agreement.tables[header.table]
    layout = table.Layout.of(header, spec.widths)
    places = [layout.manifest_range]
    for group in range(layout.groups):
        places += [layout.frame_range(group, column) for column in range(len(layout.widths))]
    return sealed.blob, places
