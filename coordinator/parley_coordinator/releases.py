"""Releases: bundles as they were stored, and the chain of records of a series."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select

from parley_coordinator import log
from parley_coordinator import store as db
from parley_coordinator.blobs import BlobReader, BlobStore, bundle_name
from parley_coordinator.clock import Clock
from parley_coordinator.models import AgreementRow, FetchRow, Membership, SessionRow
from parley_coordinator.store import Store
from parley_protocol.errors import RefusedError
from parley_protocol.transcript import GENESIS


@dataclass(frozen=True, slots=True)
class OpenBundle:
    """A bundle that one member reads: session's number, member's name, size in bytes."""

    number: int
    member: str
    size: int
    reader: BlobReader


class Releases:
    """What members fetch. `key` is the caller's."""

    def __init__(self, store: Store, blobs: BlobStore, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock

    def bundle(self, key: bytes, identifier: bytes) -> OpenBundle:
        """The bundle of a released session (crd-19); the caller closes its reader."""
        with self._store.read() as session:
            row, name = db.session_for(session, identifier, key)
            size = db.bundle_of(session, row).size
        try:
            reader = self._blobs.reader(bundle_name(identifier))
        except FileNotFoundError as error:
            log.warning("blob-missing", blob=bundle_name(identifier))
            raise RefusedError("internal", "the coordinator's store has lost the bundle") from error
        return OpenBundle(row.number, name, size, reader)

    def fetched(self, bundle: OpenBundle) -> None:
        """Notes that a member has got all of a bundle."""
        with self._store.write() as session:
            if session.get(FetchRow, (bundle.number, bundle.member)) is None:
                now = self._clock()
                session.add(FetchRow(number=bundle.number, member=bundle.member, at_ms=now))
                row = session.get_one(SessionRow, bundle.number)
                db.happened(session, "fetched", row.agreement, now, of=row.session, member=bundle.member)

    def chain(self, key: bytes, series: bytes, after: bytes) -> list[tuple[bytes, bytes]]:
        """(record, document) after a head, oldest first, to members of any version; "head" for one that is not here (crd-20)."""
        with self._store.read() as session:
            member = session.scalar(
                select(Membership.name)
                .join(AgreementRow, AgreementRow.digest == Membership.agreement)
                .where(AgreementRow.series == series, Membership.key == key)
                .limit(1)
            )
            if member is None:
                raise RefusedError("unknown-agreement")
            rows = db.records(session, series)
        if after in (b"", GENESIS):
            return [(row.cose, row.document) for row in rows]
        heads = [row.head for row in rows]
        if after not in heads:
            raise RefusedError("head", "no record here has this head")
        return [(row.cose, row.document) for row in rows[heads.index(after) + 1 :]]
