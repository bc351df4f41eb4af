"""The keeper: deletes what is no longer needed, after the times of the configuration.

What is to be deleted is first noted, in the transaction that takes away its row, and then deleted; so nothing that a row names
is ever missing, and nothing is left behind by a coordinator that was killed in between.
"""

from __future__ import annotations

import random
import threading
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from parley_coordinator import log, telemetry
from parley_coordinator.blobs import BlobStore, bundle_name, upload_name
from parley_coordinator.clock import Clock
from parley_coordinator.config import Keep
from parley_coordinator.models import LIVE, AgreementRow, BundleRow, DoomedBlob, KmsJoinRow, SessionRow, UploadRow
from parley_coordinator.store import Store
from parley_protocol.errors import UnavailableError

AT_A_TIME: Final = 200
"""Rows of one transaction, which others wait for."""
NUMBER_DIGITS: Final = 15
"""Of the number of an upload: what is longer is none that a database could hold."""


class Keeper:
    """Looks in a thread of its own; several coordinators may."""

    def __init__(self, store: Store, blobs: BlobStore, keep: Keep, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._keep = keep
        self._clock = clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def close(self) -> None:
        """Ends, after the blob that is being deleted."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._keep.every_s * (0.5 + random.random())):  # noqa: S311  # jitter
            try:
                self.look()
            except UnavailableError as error:
                log.warning("keeper-waits", code=error.code)
            except Exception:  # noqa: BLE001  # it must go on: nobody else makes room
                log.fault("keeper-failed")

    def look(self) -> None:
        """Deletes what is due."""
        while self._doom() and not self._stopping.is_set():
            pass
        self._delete()
        swept = self._blobs.sweep(self._clock() - int(self._keep.parts_s * 1000), self._growing)
        if swept:
            log.info("swept", count=swept)

    def _doom(self) -> bool:
        with self._store.write() as session:
            rows = self._uploads(session) if self._keep.uploads_s else []
            for row in rows:
                self._note(session, upload_name(row.number), row.state)
                session.delete(row)
            bundles = self._bundles(session) if self._keep.bundles_s else []
            for bundle, identifier in bundles:
                self._note(session, bundle_name(identifier), "")
                session.delete(bundle)
        return len(rows) + len(bundles) > 0

    def _note(self, session: Session, name: str, state: str) -> None:
        session.add(DoomedBlob(name=name, state=state, at_ms=self._clock()))

    def _uploads(self, session: Session) -> list[UploadRow]:
        """Complete ones some time after the last release of their agreement, unless a join by KMS stands, with which later
        sessions use them; all some time after its end."""
        due = self._clock() - int(self._keep.uploads_s * 1000)
        released = (
            select(func.max(SessionRow.ended_ms))
            .where(SessionRow.agreement == UploadRow.agreement, SessionRow.phase == "released")
            .scalar_subquery()
        )
        running = select(SessionRow.number).where(
            SessionRow.agreement == UploadRow.agreement, SessionRow.phase.in_(LIVE)
        )
        standing = select(KmsJoinRow.number).where(
            KmsJoinRow.agreement == UploadRow.agreement, KmsJoinRow.party == UploadRow.party
        )
        query = (
            select(UploadRow)
            .join(AgreementRow, AgreementRow.digest == UploadRow.agreement)
            .where(
                ~running.exists(),
                (AgreementRow.expires_ms <= due)
                | ((released <= due) & (UploadRow.complete_ms <= due) & ~standing.exists()),
            )
            .order_by(UploadRow.number)
            .limit(AT_A_TIME)
        )
        return list(session.scalars(query))

    def _bundles(self, session: Session) -> list[tuple[BundleRow, bytes]]:
        due = self._clock() - int(self._keep.bundles_s * 1000)
        query = (
            select(BundleRow, SessionRow.session)
            .join(SessionRow, SessionRow.number == BundleRow.number)
            .where(BundleRow.at_ms <= due)
            .order_by(BundleRow.number)
            .limit(AT_A_TIME)
        )
        return [(bundle, identifier) for bundle, identifier in session.execute(query) if identifier is not None]

    def _delete(self) -> None:
        while not self._stopping.is_set():
            with self._store.read() as session:
                rows = list(session.scalars(select(DoomedBlob).order_by(DoomedBlob.name).limit(AT_A_TIME)))
            if not rows:
                return
            for row in rows:
                self._blobs.delete(row.name, row.state)
                with self._store.write() as session:
                    there = session.get(DoomedBlob, row.name)
                    if there is not None:
                        session.delete(there)
                telemetry.count("parley_blobs_deleted_total")
                log.info("blob-deleted", blob=row.name)

    def _growing(self, name: str) -> str | None:
        word, _, number = name.partition("-")
        if word != "upload" or len(number) > NUMBER_DIGITS:
            return None
        with self._store.read() as session:
            row = session.get(UploadRow, int(number, 16))
        return None if row is None or row.complete_ms is not None else row.state
