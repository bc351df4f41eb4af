"""Sealing: a prepared table to a blob on disk, once. What was sealed is only ever sent again, never sealed again.

A content key seals one content: a changed file gets a new key and a new upload (REVIEW T2). The blob, the signed statement
and the content key stand in one directory of the spool, which appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parley.disk import Vault, locked, make_folder, sync_folder, write_file
from parley.kms import CheckedKey
from parley.reading import PreparedTable, Progress
from parley.spool import BLOB, ENTRY, SealedTable, Spooled, sealed_table
from parley_protocol.agreement.schema import Table
from parley_protocol.claims import VerifiedOffer
from parley_protocol.errors import StateError
from parley_protocol.identity import PrivateIdentity
from parley_protocol.table import HASH_BYTES, KEY_PAD, Layout, bucket, frames_digest, seal_frame, seal_manifest
from parley_protocol.transcript import Upload, UploadHeader, frame_key, key_commitment


def source_digest(source: object, prepared: PreparedTable | None = None) -> bytes:
    """SHA-256 of a file's bytes, or of the columns that a frame was prepared to."""
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    if prepared is None:
        raise ValueError("the content of a frame is known once it is prepared")
    digest = hashlib.sha256()
    for column in prepared.columns:
        digest.update(np.ascontiguousarray(column).data)
    return digest.digest()


def seal(
    prepared: PreparedTable,
    proof: VerifiedOffer | CheckedKey,
    party: str,
    identity: PrivateIdentity,
    vault: Vault,
    spool: Path,
    *,
    source: bytes,
    random: Callable[[int], bytes] = secrets.token_bytes,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SealedTable:
    """Seals a table under a fresh content key into a new directory of `spool`, named by the upload's digest.

    The host learns the size only to a bucket. Nothing is sealed for an enclave that was not verified, or
    under a KMS key that opens to others: hence the proof.
    StateError where the spool takes no more, as on a full disk; then nothing is left of the draft.
    """
    agreement = proof.agreement
    table = agreement.tables[prepared.name]
    groups, group_rows = bucket(prepared.rows)
    content_key = random(32)
    header = UploadHeader(
        agreement.digest,
        party,
        table.name,
        table.schema_digest,
        groups,
        group_rows,
        random(16),
        key_commitment(content_key),
    )
    header_bytes = header.to_bytes()
    layout = Layout.of(header, table.widths)
    try:
        with _drafted(spool, f".{header.upload_id.hex()}") as draft:
            key = AESGCM(frame_key(content_key, header_bytes))
            digests = _write_blob(draft / BLOB, prepared, table, layout, key, threads, progress)
            upload = Upload(header_bytes, frames_digest(digests))
            entry = Spooled(
                agreement.digest,
                party,
                table.name,
                upload.digest,
                identity.sign(upload.to_bytes()),
                source,
                vault.seal(content_key, b"content-key" + upload.digest),
                prepared.rows,
                prepared.units,
                prepared.dropped,
                layout.size,
            )
            write_file(draft / ENTRY, entry.to_bytes())
            folder = spool / upload.digest.hex()
            draft.rename(folder)
            sync_folder(spool)
    except OSError as error:
        raise StateError(f"the sealed table does not go into {spool}: {error.strerror}") from error
    return sealed_table(folder, entry, prepared.ignored)


@contextmanager
def _drafted(spool: Path, name: str) -> Iterator[Path]:
    """A new folder, gone again where it was not renamed. What killed processes left is removed on the way: a draft is held
    by a lock as long as its process lives."""
    make_folder(spool)
    draft = spool / name
    with locked(spool.with_suffix(".lock")):
        for left in spool.glob(".*"):
            with suppress(FileNotFoundError), _held(left) as free:  # another process may finish it just now
                if free:
                    shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(mode=0o700)
        holding = _held(draft)
        holding.__enter__()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        holding.__exit__(None, None, None)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether the lock of a folder was free; it is held meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _write_blob(
    path: Path,
    prepared: PreparedTable,
    table: Table,
    layout: Layout,
    key: AESGCM,
    threads: int | None,
    progress: Progress | None,
) -> bytes:
    columns = prepared.columns
    pads = [KEY_PAD, *(column.null_value for column in table.columns)]
    digests = bytearray(layout.frames * HASH_BYTES)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, layout.size)

        def put(frame: bytes, offset: int, index: int) -> None:
            digests[index * HASH_BYTES : (index + 1) * HASH_BYTES] = hashlib.sha256(frame).digest()
            view = memoryview(frame)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written

        def group(number: int) -> None:
            start = number * layout.group_rows
            for place, values in enumerate(columns):
                part = values[start : start + layout.group_rows]
                if len(part) < layout.group_rows:
                    part = np.concatenate(
                        (part, np.full(layout.group_rows - len(part), pads[place], dtype=values.dtype))
                    )
                frame = seal_frame(key, number, place, part.data.cast("B"))
                put(frame, layout.frame_range(number, place)[0], layout.frame_index(number, place))

        put(seal_manifest(key, prepared.rows), layout.manifest_range[0], 0)
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            for done, _ in enumerate(pool.map(group, range(layout.groups)), 1):
                if progress is not None:
                    progress("seal", done, layout.groups)
        os.pwrite(descriptor, bytes(digests), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return bytes(digests)
