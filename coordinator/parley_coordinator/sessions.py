"""Sessions: opened by those whom the operator lists, found again after a restart. What needs the enclave is in `live`."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from parley_coordinator import live, log
from parley_coordinator import store as db
from parley_coordinator.agreements import parsed
from parley_coordinator.images import Wanted
from parley_coordinator.launcher import EnclaveHandle
from parley_coordinator.live import Live, World
from parley_coordinator.models import (
    LIVE,
    AgreementRow,
    CountersignatureRow,
    JoinRow,
    KmsJoinRow,
    OpenRequest,
    RosterRow,
    SessionRow,
    UploadRow,
)
from parley_protocol import limits
from parley_protocol.claims import needs_countersignatures
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import MalformedError, ParleyError, RefusedError, UnavailableError
from parley_protocol.transcript import Roster
from parley_protocol.v1 import coordinator_pb2

NONCE_BYTES = 32
JUDGED = 8
"""Joins of one key at a time: one in each session that a coordinator's enclaves run, and its repetitions."""
JUDGED_MS = 5000


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as its members see it; `parties`: (party, absent | uploaded | refused | joined | countersigned)."""

    session: bytes
    agreement: bytes
    phase: str
    parties: tuple[tuple[str, str], ...]
    code: str
    deadline_ms: int
    percent: int
    refused: Mapping[str, str] = field(default_factory=dict)
    """The codes with which joins by KMS were refused, by party."""


class Sessions:
    """What may be done with sessions. `key` is the caller's."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._lock = threading.Lock()
        self._live: dict[int, Live] = {}
        self._series: dict[bytes, threading.Lock] = {}
        self._judged: Counter[bytes] = Counter()

    def close(self) -> None:
        """Lets go of all enclaves, which live on until the next start."""
        with self._lock:
            attached = list(self._live.values())
            self._live.clear()
        for session in attached:
            session.close()

    # Opening

    def open(self, key: bytes, request: bytes, digest: bytes) -> SessionView:
        """The live session of the agreement: opened now, or before; the same request has the same answer (crd-10)."""
        least, most = limits.REQUEST_ID_BYTES
        if not least <= len(request) <= most:
            raise MalformedError(f"OpenSessionRequest.request_id: not {least} to {most} bytes")
        with self._world.store.read() as session:
            agreement, _ = db.agreement_for(session, digest, key)
            if not db.is_operator(session, key):
                raise RefusedError("stranger", "the operator does not list this key as one that may open sessions")
        with self._opening(agreement.series):
            number = self._find_or_add(key, request, agreement)
            with self._world.store.read() as session:
                phase = session.get_one(SessionRow, number).phase
            if phase == "launching":
                self._launch(number, agreement)
        return self._view(number)

    def _find_or_add(self, key: bytes, request: bytes, agreement: AgreementRow) -> int:
        with self._world.store.read() as session:
            before = session.get(OpenRequest, (key, request))
            if before is not None:
                if session.get_one(SessionRow, before.number).agreement != agreement.digest:
                    raise RefusedError("conflict", "this request id has opened a session of another agreement")
                return before.number
            if agreement.complete_ms is None:
                raise RefusedError("agreement", "the agreement is not signed by all")
            if agreement.expires_ms <= self._world.clock():
                raise RefusedError("expired", "the agreement has expired")
            newest = db.newest(session, agreement.series, complete=True)
            if newest is not None and newest.version > agreement.version:
                raise RefusedError("agreement", "a newer version of the agreement is signed by all")
            row = db.live_session(session, agreement.series)
        if row is not None and row.agreement != agreement.digest:
            if row.phase not in ("launching", "open"):
                raise RefusedError("busy", "a session of an earlier version must end first")
            self._end(row.number, "agreement")
            row = None
        with self._world.store.write() as session:
            if row is None:
                row = SessionRow(
                    session=None,
                    agreement=agreement.digest,
                    series=agreement.series,
                    begin=secrets.token_bytes(16),
                    phase="launching",
                    offer=None,
                    document=None,
                    start=None,
                    roster=None,
                    opened_ms=self._world.clock(),
                    ended_ms=None,
                )
                session.add(row)
                session.flush()
            session.add(OpenRequest(key=key, request=request, number=row.number))
            return row.number

    def _launch(self, number: int, agreement: AgreementRow) -> None:
        handle = None
        try:
            living = self._world.launcher.find()
            handle = next((found for found in living if found.agreement == agreement.digest), None)
            if handle is None:
                handle = self._world.launcher.launch(Wanted.of(parsed(agreement.canonical)))
            serves = live.begin(self._world, number, agreement, handle, secrets.token_bytes(NONCE_BYTES))
        except UnavailableError as error:
            live.lose(self._world, number, error.code)
            if handle is not None:
                self._world.launcher.stop(handle)
            self._forget_request(number)
            raise
        except ParleyError as error:
            live.lose(self._world, number, error.code)
            if handle is not None:
                self._world.launcher.stop(handle)
            raise
        self._attach(number, agreement, handle, serves)

    def _forget_request(self, number: int) -> None:
        """A request that found no enclave may be repeated as it is."""
        with self._world.store.write() as session:
            for request in session.scalars(select(OpenRequest).where(OpenRequest.number == number)):
                session.delete(request)

    def _attach(self, number: int, agreement: AgreementRow, handle: EnclaveHandle, serves: int) -> None:
        attached = Live(self._world, number, parsed(agreement.canonical), handle, serves, self._detach)
        with self._lock:
            self._live[number] = attached
        attached.run()

    def _detach(self, number: int) -> None:
        with self._lock:
            self._live.pop(number, None)

    def _end(self, number: int, code: str) -> None:
        with self._lock:
            attached = self._live.get(number)
        if attached is not None:
            attached.lose(code)
        else:
            live.lose(self._world, number, code)

    def _opening(self, series: bytes) -> threading.Lock:
        with self._lock:
            return self._series.setdefault(series, threading.Lock())

    def recover(self) -> None:
        """Finds the enclaves of all live sessions again; sessions without one are lost, enclaves without one are ended."""
        handles = {handle.id: handle for handle in self._world.launcher.find()}
        with self._world.store.read() as session:
            rows = list(session.scalars(select(SessionRow).where(SessionRow.phase.in_(LIVE))))
            untold = list(
                session.scalars(select(SessionRow).where(SessionRow.phase == "released", ~SessionRow.stored_told))
            )
            agreements = {row.agreement: session.get_one(AgreementRow, row.agreement) for row in rows}
        for row in rows:
            agreement = agreements[row.agreement]
            if row.phase == "launching":
                begun = next((found for found in handles.values() if found.agreement == row.agreement), None)
                if begun is not None:
                    del handles[begun.id]
                threading.Thread(target=self._relaunch, args=(row.number, agreement), daemon=True).start()
            elif (handle := handles.pop(row.enclave, None)) is not None:
                self._reattach(row.number, agreement, handle)
            else:
                live.lose(self._world, row.number, "lost")
        for row in untold:
            live.tell_stored(self._world, row.number, handles.pop(row.enclave, None))
        for stray in handles.values():
            log.warning("enclave-without-session", enclave=stray.id)
            self._world.launcher.stop(stray)

    def _reattach(self, number: int, agreement: AgreementRow, handle: EnclaveHandle) -> None:
        try:
            serves = live.load(self._world, agreement, handle)
        except ParleyError as error:
            log.warning("enclave-not-found-again", enclave=handle.id, code=error.code)
            live.lose(self._world, number, "lost")
            self._world.launcher.stop(handle)
        else:
            self._attach(number, agreement, handle, serves)

    def _relaunch(self, number: int, agreement: AgreementRow) -> None:
        with self._opening(agreement.series):
            with self._world.store.read() as session:
                if session.get_one(SessionRow, number).phase != "launching":
                    return
            try:
                self._launch(number, agreement)
            except ParleyError as error:
                log.warning("relaunch-failed", number=number, code=error.code)
            except Exception:  # noqa: BLE001  # a thread that dies silently would leave the session launching for ever
                log.fault("relaunch-failed", number=number)
                live.lose(self._world, number, "internal")

    # What members ask for

    def get(self, key: bytes, identifier: bytes) -> SessionView:
        """A session."""
        with self._world.store.read() as session:
            row, _ = db.session_for(session, identifier, key)
        return self._view(row.number)

    def attest(self, key: bytes, identifier: bytes, nonce: bytes) -> tuple[bytes, bytes]:
        """(offer, document with the nonce) of a session whose enclave lives (crd-11)."""
        if len(nonce) != NONCE_BYTES:
            raise MalformedError(f"AttestRequest.nonce: not {NONCE_BYTES} bytes")
        row, _, attached = self._attached(key, identifier)
        assert row.offer is not None
        return row.offer, attached.attest(nonce)

    def join(self, key: bytes, identifier: bytes, cose: bytes) -> tuple[bytes, str]:
        """(receipt, "") or (b"", code). A key that has JUDGED joins judged already is told to come again: each holds a thread,
        for as long as its tables take, and the other members need some too."""
        _, name, attached = self._attached(key, identifier)
        with self._lock:
            if self._judged[key] >= JUDGED:
                raise UnavailableError(
                    f"{JUDGED} joins of this key are judged; wait for one", code="busy", retry_after_ms=JUDGED_MS
                )
            self._judged[key] += 1
        try:
            return attached.join(name, cose)
        finally:
            with self._lock:
                self._judged[key] -= 1
                if not self._judged[key]:
                    del self._judged[key]

    def start(self, key: bytes, identifier: bytes, cose: bytes) -> tuple[bytes, tuple[str, ...]]:
        """(roster, who has not countersigned)."""
        _, name, attached = self._attached(key, identifier)
        attached.start(name, cose)
        return self.roster(key, identifier)

    def roster(self, key: bytes, identifier: bytes) -> tuple[bytes, tuple[str, ...]]:
        """(roster, who has not countersigned) of a session that has one."""
        with self._world.store.read() as session:
            row, _ = db.session_for(session, identifier, key)
            if row.roster is None:
                live.require(row, "rostered")
                raise RefusedError("phase")
            found = session.get_one(RosterRow, row.roster)
            return found.cose, _missing(session, row)

    def countersign(
        self, key: bytes, identifier: bytes, cose: bytes, former: coordinator_pb2.PutCountersignatureRequest
    ) -> SessionView:
        """The session after a party's consent; one that came before is answered alike, also after the release."""
        with self._world.store.read() as session:
            row, name = db.session_for(session, identifier, key)
            done = None if row.roster is None else session.get(CountersignatureRow, (row.roster, name))
        if row.phase == "released" and done is not None and payload_unverified(done.cose) == payload_unverified(cose):
            return self._view(row.number)
        row, name, attached = self._attached(key, identifier)
        attached.countersign(name, cose, former)
        return self._view(row.number)

    def refuse(self, key: bytes, identifier: bytes, cose: bytes) -> SessionView:
        """The session after a party's refusal."""
        row, name, attached = self._attached(key, identifier)
        attached.refuse(name, cose)
        return self._view(row.number)

    def _attached(self, key: bytes, identifier: bytes) -> tuple[SessionRow, str, Live]:
        with self._world.store.read() as session:
            row, name = db.session_for(session, identifier, key)
        live.require(row, *LIVE)
        with self._lock:
            attached = self._live.get(row.number)
        if attached is None:
            raise UnavailableError("the session is being attached to its enclave; try again", retry_after_ms=1000)
        return row, name, attached

    def _view(self, number: int) -> SessionView:
        with self._lock:
            attached = self._live.get(number)
        with self._world.store.read() as session:
            row = session.get_one(SessionRow, number)
            percent = 100 if row.phase == "released" else attached.percent if attached is not None else 0
            deadline = row.deadline_ms
            if row.phase in ("rostered", "computing") and row.roster is not None:
                deadline = session.get_one(RosterRow, row.roster).expires_ms
            return SessionView(
                session=row.session or b"",
                agreement=row.agreement,
                phase=row.phase,
                parties=parties(session, row),
                code=row.code,
                deadline_ms=deadline,
                percent=percent if row.phase in ("computing", "released") else 0,
                refused=refused_by_kms(session, row),
            )


def refused_by_kms(session: Session, row: SessionRow) -> dict[str, str]:
    """The parties whose standing KMS joins this session has refused, with the codes (kms-14)."""
    found = session.execute(
        select(KmsJoinRow.party, JoinRow.code)
        .join(JoinRow, JoinRow.digest == KmsJoinRow.digest)
        .where(JoinRow.number == row.number, JoinRow.code != "")
    ).all()
    return {row.party: row.code for row in found}


def parties(session: Session, row: SessionRow) -> tuple[tuple[str, str], ...]:
    """(party, phase) of each party of a session, in the agreement's order."""
    agreement = parsed(session.get_one(AgreementRow, row.agreement).canonical)
    uploads = session.execute(
        select(UploadRow.party, UploadRow.table_name).where(
            UploadRow.agreement == row.agreement, UploadRow.complete_ms.is_not(None)
        )
    ).all()
    uploaded = {(party, table) for party, table in uploads}
    joined = set(
        session.scalars(select(JoinRow.party).where(JoinRow.number == row.number, JoinRow.receipt.is_not(None)))
    )
    signed: set[str] = set()
    # A lost session's countersignatures are as void as its joins.
    if row.roster is not None and row.phase != "lost":
        signed = set(session.scalars(select(CountersignatureRow.party).where(CountersignatureRow.roster == row.roster)))

    refused = refused_by_kms(session, row)

    def phase(party: str) -> str:
        if party in signed:
            return "countersigned"
        if party in joined:
            return "joined"
        if party in refused:
            return "refused"
        complete = all((party, table) in uploaded for table in agreement.tables_of(party))
        return "uploaded" if complete else "absent"

    return tuple((party, phase(party)) for party in agreement.parties)


def _missing(session: Session, row: SessionRow) -> tuple[str, ...]:
    assert row.roster is not None
    agreement = parsed(session.get_one(AgreementRow, row.agreement).canonical)
    if not needs_countersignatures(agreement):
        return ()
    roster = Roster.from_bytes(payload_unverified(session.get_one(RosterRow, row.roster).cose))
    signed = set(session.scalars(select(CountersignatureRow.party).where(CountersignatureRow.roster == row.roster)))
    return tuple(entry.party for entry in roster.included if entry.party not in signed)
