"""Uploads: sealed tables on their way to the blob store. Only bytes that are on the disk for good are told as `stored`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from parley_coordinator import log
from parley_coordinator import store as db
from parley_coordinator.agreements import parsed
from parley_coordinator.blobs import BlobStore, BlobWriter, upload_name
from parley_coordinator.clock import Clock
from parley_coordinator.config import Quotas
from parley_coordinator.models import UploadRow
from parley_coordinator.store import Store
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement
from parley_protocol.claims import verify_upload
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import MalformedError, RefusedError, UnavailableError
from parley_protocol.table import Layout
from parley_protocol.transcript import Upload

HANDOVER_S: Final = 10.0
"""How long a stream waits for the one that it takes over from, whose last bytes are on their way to the disk."""


@dataclass(frozen=True, slots=True)
class UploadView:
    """How far an upload is: bytes on the disk, bytes in all, whether it is complete."""

    stored: int
    size: int
    complete: bool


def view(row: UploadRow) -> UploadView:
    """An upload's row as the caller sees it."""
    return UploadView(row.stored, row.size, row.complete_ms is not None)


def blob_size(upload: Upload, agreement: Agreement) -> int:
    """The bytes of an upload's blob: they follow from its header and the agreed columns."""
    header = upload.header
    return Layout.of(header, agreement.tables[header.table].widths).size


@dataclass(frozen=True, slots=True)
class _Turn:
    """That of the one stream of an upload in this process, from before its blob is opened until it is closed."""

    superseded: threading.Event
    ended: threading.Event


@dataclass(frozen=True, slots=True)
class _Whole:
    """The writer of a complete upload: its blob is not touched again, and all of it is skipped."""

    position: int
    state: str

    def write(self, data: bytes) -> None:
        assert not data

    def sync(self, *, whole: bool = True) -> int:  # noqa: ARG002
        return self.position

    def close(self) -> None:
        """Nothing to free."""


class Writing:
    """One upload that is being written. `write` and `sync` may run in two threads; all else in one at a time."""

    def __init__(
        self, store: Store, clock: Clock, row: UploadRow, writer: BlobWriter, superseded: threading.Event
    ) -> None:
        self._store = store
        self._clock = clock
        self._number = row.number
        self._writer = writer
        self._synced = row.stored
        self._generation = row.writer
        self.size = row.size
        self.superseded = superseded

    @property
    def position(self) -> int:
        """The next byte that is missing, stored for good or not."""
        return self._writer.position

    @property
    def unsynced(self) -> int:
        """Bytes that are written and not yet stored for good."""
        return self._writer.position - self._synced

    def write(self, offset: int, data: bytes) -> None:
        """Appends a chunk; what is there already is skipped. RefusedError for a gap, or beyond the end (crd-9)."""
        if self.superseded.is_set():
            raise RefusedError("busy", "another stream has taken over this upload")
        if not data:
            raise MalformedError("Chunk.data: empty")
        if len(data) > limits.CHUNK_BYTES:
            raise RefusedError("too-large", f"a chunk has at most {limits.CHUNK_BYTES} bytes")
        if offset + len(data) > self.size:
            raise RefusedError("too-large", f"the upload has {self.size} bytes and no more")
        position = self._writer.position
        if offset > position:
            raise RefusedError("incomplete", f"the next missing byte is {position}, not {offset}")
        if offset + len(data) > position:
            self._writer.write(data[position - offset :])

    def sync(self, *, whole: bool = True) -> UploadView:
        """Makes what was written durable and says so in the store; with the last byte the upload is complete.

        RefusedError "busy" where a stream at another coordinator has taken over.
        """
        return db.retried(self._note, self._writer.sync(whole=whole))

    def _note(self, synced: int) -> UploadView:
        with self._store.write() as session:
            row = session.get(UploadRow, self._number)
            if row is None:
                raise RefusedError("unknown-upload", "the upload has been deleted")
            if row.writer != self._generation:
                self.superseded.set()
                raise RefusedError("busy", "another stream has taken over this upload")
            if synced >= row.stored:
                # Also where nothing was added: what was reserved and not used is free again.
                row.stored, row.state = synced, self._writer.state
            if row.stored == row.size and row.complete_ms is None:
                row.complete_ms = self._clock()
                db.happened(session, "uploaded", row.agreement, row.complete_ms, member=row.party, table=row.table_name)
            self._synced = row.stored
            return view(row)

    def close(self) -> None:
        """Closes the blob; called once, by `Uploads.writing`."""
        self._writer.close()


class Uploads:
    """What may be done with uploads. `key` is the caller's."""

    def __init__(
        self, store: Store, blobs: BlobStore, quotas: Quotas, clock: Clock, handover_s: float = HANDOVER_S
    ) -> None:
        self._handover_s = handover_s
        self._store = store
        self._blobs = blobs
        self._quotas = quotas
        self._clock = clock
        # Held while the table is looked at, and never while the database or the blob store is asked: one upload whose answer
        # is slow to come stops no other.
        self._lock = threading.Lock()
        self._turns: dict[int, _Turn] = {}

    def get(self, key: bytes, digest: bytes) -> UploadView:
        """How far the caller's upload is."""
        with self._store.read() as session:
            return view(db.upload_for(session, digest, key))

    def begin(self, key: bytes, signed: bytes) -> UploadRow:
        """The upload of a signed statement, made where it is new (crd-7, crd-8)."""
        if len(signed) > limits.STATEMENT_BYTES:
            raise RefusedError("too-large", f"a statement has at most {limits.STATEMENT_BYTES} bytes")
        header = Upload.from_bytes(payload_unverified(signed)).header
        with self._store.read() as session:
            agreement_row, name = db.agreement_for(session, header.agreement, key)
            if agreement_row.complete_ms is None:
                raise RefusedError("agreement", "the agreement is not signed by all")
        agreement = parsed(agreement_row.canonical)
        upload = verify_upload(signed, agreement)
        if header.party != name:
            raise RefusedError("not-a-member", "the upload is another party's")
        if agreement.expires_ms <= self._clock():
            raise RefusedError("expired", "the agreement has expired")
        size = blob_size(upload, agreement)
        with self._store.write() as session:
            row = session.scalar(select(UploadRow).where(UploadRow.digest == upload.digest))
            if row is not None:
                return row
            self._check_quota(session, key, header.agreement, name, header.table, size)
            row = UploadRow(
                digest=upload.digest,
                agreement=header.agreement,
                party=name,
                table_name=header.table,
                cose=signed,
                owner=key,
                size=size,
                stored=0,
                begun_ms=self._clock(),
                complete_ms=None,
            )
            session.add(row)
            session.flush()
            return row

    def _check_quota(self, session: Session, key: bytes, agreement: bytes, party: str, table: str, size: int) -> None:
        if db.stored_bytes(session, key) + size > self._quotas.bytes_per_member:
            raise RefusedError("quota", "the uploads of this key would take more than its quota of bytes")
        same = (
            select(func.count())
            .select_from(UploadRow)
            .where(UploadRow.agreement == agreement, UploadRow.party == party, UploadRow.table_name == table)
        )
        if (session.scalar(same) or 0) >= self._quotas.uploads_per_table:
            raise RefusedError("quota", "as many uploads of this table as a party may have")

    @contextmanager
    def writing(self, row: UploadRow) -> Iterator[Writing]:
        """The one stream that writes an upload; a later one takes over, since the former one's client has gone (crd-9)."""
        turn = self._take_turn(row.number)
        try:
            # What was acknowledged may have grown since `row` was read; from here on no other stream adds to it.
            with self._store.write() as session:
                found = session.get(UploadRow, row.number)
                if found is None:
                    raise RefusedError("unknown-upload", "the upload has been deleted")
                state = found.state
                if found.complete_ms is None:
                    found.writer += 1
                    found.state = self._reserve(found)
            # The stream before may have sent the last byte meanwhile.
            writer = self._open(found, state) if found.complete_ms is None else _Whole(found.size, state)
            current = Writing(self._store, self._clock, found, writer, turn.superseded)
            try:
                if writer.state != found.state:
                    # Whoever comes next need not do again what was done to open the blob.
                    self._note(found, writer.state)
                yield current
            finally:
                current.close()
        finally:
            with self._lock:
                del self._turns[row.number]
            turn.ended.set()

    def _take_turn(self, number: int) -> _Turn:
        """The turn at an upload, after the stream before has ended; RefusedError "busy" where it does not in time."""
        with self._lock:
            before = self._turns.get(number)
        if before is not None:
            before.superseded.set()
            if not before.ended.wait(self._handover_s):
                raise RefusedError("busy", "another stream still writes this upload")
        turn = _Turn(threading.Event(), threading.Event())
        with self._lock:
            if self._turns.setdefault(number, turn) is not turn:
                raise RefusedError("busy", "another stream writes this upload")
        return turn

    def _reserve(self, row: UploadRow) -> str:
        try:
            return self._blobs.reserve(row.state)
        except OSError as error:
            raise _damaged(row, error) from error

    def _open(self, row: UploadRow, state: str) -> BlobWriter:
        try:
            return self._blobs.writer(upload_name(row.number), row.stored, row.size, state)
        except OSError as error:
            raise _damaged(row, error) from error
        except UnavailableError:
            # Nothing was written, and it will be tried again: each try would use up what it reserved.
            self._note(row, state)
            raise

    def _note(self, row: UploadRow, state: str) -> None:
        """Stores a state, unless another stream has come meanwhile."""
        with self._store.write() as session:
            found = session.get(UploadRow, row.number)
            if found is not None and found.writer == row.writer:
                found.state = state


def _damaged(row: UploadRow, error: OSError) -> RefusedError:
    name = upload_name(row.number)
    log.warning("blob-damaged", blob=name, error=type(error).__name__)
    return RefusedError("internal", "the coordinator's store has lost bytes of this upload")
