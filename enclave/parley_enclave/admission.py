"""Admission of a party's join: everything that can be checked without its table, and the task that checks the table.

A refusal has a stable code and no value of the data, and consumes nothing: the party may join again.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from parley_enclave.keys import SessionKeys
from parley_enclave.pool import Parts, Task
from parley_protocol import claims
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import MalformedError, RefusedError, VerificationError
from parley_protocol.secret import Secret
from parley_protocol.transcript import (
    AnyJoin,
    JoinKeys,
    KmsJoin,
    Offer,
    Upload,
    frame_key,
    join_info,
    key_commitment,
    share_digest,
)

_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Checked(Secret):
    """What admission found in one sealed table: the rows, the first and last key of each group, a tag for each frame.

    None of it leaves the enclave.
    """

    rows: int = field(repr=False)
    index: bytes = field(repr=False)
    tags: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Brought(Secret):
    """One upload of a join: the statement, where the host keeps the blob, and the key of its frames."""

    upload: Upload
    blob: int
    frame_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Opened(Secret):
    """A join whose statements and keys are good; its tables are not yet looked at."""

    join: AnyJoin
    brought: tuple[Brought, ...]
    noise_share: bytes = field(repr=False)


def open_join(
    signed: bytes, uploads: Sequence[tuple[bytes, int]], offer: Offer, agreement: Agreement, keys: SessionKeys
) -> Opened:
    """Checks a join and the uploads that come with it, (COSE, blob) in the join's order.

    adm-1 the join is good (join-*), adm-2 each upload is good (upl-*) and is the one that the join names, by its party,
    for each of the party's tables in their order, adm-3 the sealed keys open, adm-4 each content key and the noise share
    match their commitments.
    """
    join = claims.verify_join(signed, offer, agreement)  # adm-1
    statements = _uploads(join, uploads, agreement)
    try:
        opened = JoinKeys.from_bytes(
            keys.sealing.open(join.sealed_keys, join_info(join.offer, join.party, join.uploads))
        )
    except (MalformedError, VerificationError):
        raise VerificationError("adm-3", "the sealed keys do not open", code="key") from None
    if len(opened.content_keys) != len(statements):
        raise VerificationError("adm-3", "not one content key for each upload", code="key")
    if share_digest(opened.noise_share) != join.share_digest:
        raise VerificationError("adm-4", "another noise share than committed", code="key")
    pairs = zip(opened.content_keys, statements, strict=True)
    if any(key_commitment(key) != upload.header.key_commitment for key, upload in pairs):
        raise VerificationError("adm-4", "another content key than committed", code="key")
    return _opened(join, statements, uploads, opened.content_keys, opened.noise_share)


@dataclass(frozen=True, slots=True)
class KmsBrought:
    """A KMS join whose statements are good, with its uploads; its keys are still KMS's."""

    join: KmsJoin
    statements: tuple[Upload, ...]
    uploads: tuple[tuple[bytes, int], ...]

    @property
    def size(self) -> int:
        """Bytes of what its ciphertext holds: 32 for each upload and for the noise share."""
        return _KEY_BYTES * (len(self.statements) + 1)


def read_kms_join(signed: bytes, uploads: Sequence[tuple[bytes, int]], agreement: Agreement) -> KmsBrought:
    """Checks a KMS join (kms-1 to kms-5) and the uploads that come with it (adm-2)."""
    join = claims.verify_kms_join(signed, agreement)
    return KmsBrought(join, _uploads(join, uploads, agreement), tuple(uploads))


def open_kms_join(brought: KmsBrought, keys: bytes) -> Opened:
    """The join with what KMS answered; VerificationError kms-9, code "key", where it is not what the party committed to.

    Every commitment is computed and compared, and there is one error, whatever the bytes are.
    """
    parts = tuple(keys[start : start + _KEY_BYTES] for start in range(0, brought.size, _KEY_BYTES))
    *content_keys, share = parts
    good = hmac.compare_digest(share_digest(share), brought.join.share_digest)
    for key, upload in zip(content_keys, brought.statements, strict=True):
        good &= hmac.compare_digest(key_commitment(key), upload.header.key_commitment)
    if not good:
        raise VerificationError("kms-9", "not the keys that the party committed to", code="key")
    return _opened(brought.join, brought.statements, brought.uploads, tuple(content_keys), share)


def _uploads(join: AnyJoin, uploads: Sequence[tuple[bytes, int]], agreement: Agreement) -> tuple[Upload, ...]:
    """The uploads that come with a join (adm-2)."""
    statements = tuple(claims.verify_upload(cose, agreement) for cose, _ in uploads)
    if tuple(upload.digest for upload in statements) != join.uploads:
        raise VerificationError("adm-2", "not the uploads that the join names", code="conflict")
    headers = tuple(upload.header for upload in statements)
    if any(header.party != join.party for header in headers):
        raise VerificationError("adm-2", "an upload of another party", code="conflict")
    if tuple(header.table for header in headers) != agreement.tables_of(join.party):
        raise VerificationError("adm-2", "not the party's tables in their order", code="schema")
    return statements


def _opened(
    join: AnyJoin,
    statements: Sequence[Upload],
    uploads: Sequence[tuple[bytes, int]],
    content_keys: Sequence[bytes],
    noise_share: bytes,
) -> Opened:
    return Opened(
        join,
        tuple(
            Brought(upload, blob, frame_key(key, upload.header_bytes))
            for upload, (_, blob), key in zip(statements, uploads, content_keys, strict=True)
        ),
        noise_share,
    )


def task(brought: Brought, agreement: Agreement, guard_key: bytes, progress: Callable[[int], None]) -> Task:
    """The work of admitting one table (adm-5)."""
    header = brought.upload.header
    return Task(
        [
            "admit",
            header.party,
            header.table,
            brought.upload.header_bytes,
            brought.blob,
            brought.frame_key,
            brought.upload.frames_digest,
            guard_key,
        ],
        (agreement.canonical,),
        progress=progress,
    )


def checked(parts: Parts) -> Checked:
    """What the worker answers to `task`."""
    if len(parts) != 3 or len(parts[0]) != 8:
        raise RefusedError("internal")
    return Checked(int.from_bytes(parts[0], "big"), parts[1], parts[2])
