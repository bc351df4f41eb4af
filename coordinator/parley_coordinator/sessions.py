"""Sessions: opened by those whom the operator lists, found again after a restart. What needs the enclave is in `live`."""

from __future__ import annotations

import functools
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from parley_coordinator import live, log, telemetry
from parley_coordinator import store as db
from parley_coordinator.agreements import parsed
from parley_coordinator.images import Wanted
from parley_coordinator.launcher import RETRY_MS as FULL_MS
from parley_coordinator.launcher import EnclaveHandle
from parley_coordinator.leases import RETRY_MS, ElsewhereError, FencedError, Lease
from parley_coordinator.live import Live, World
from parley_coordinator.models import (
    LIVE,
    AgreementRow,
    CountersignatureRow,
    EventRow,
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

_T = TypeVar("_T")

NONCE_BYTES = 32
JUDGED = 8
"""Joins of one key at a time: one in each session that a coordinator's enclaves run, and its repetitions."""
JUDGED_MS = 5000
FIRST_ATTEMPTS = 3
"""What an enclave is asked first, to load its agreement and begin, is asked so often: on a machine under load a connection is
refused, or an answer late, now and then, and a session would end for it."""
FIRST_PAUSE_S = 1.0
"""Between two of these, with jitter."""
OFFERED_S = 3.0
"""How long a session without a place is offered to other coordinators, besides two renewals of leases, in which each of them
looks for one: what a look may take."""
OFFERED_POLL_S = 0.2
SWEEP_S = 60.0
"""Between two looks for enclaves of no session."""


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
        # Leases of the sessions that are served here, those that are being launched included.
        self._held: dict[int, Lease] = {}
        # Those that are offered to other coordinators: not taken back before that ends.
        self._offering: set[int] = set()
        # Until when no launch is tried for others, since the launcher found no place while these sessions ran here.
        self._full_until = 0.0
        self._full_with: set[int] = set()
        self._series: dict[bytes, threading.Lock] = {}
        self._judged: Counter[bytes] = Counter()
        self._stopping = threading.Event()
        self._sweep_at = time.monotonic() + SWEEP_S
        self._suspects: set[str] = set()
        self._looker: threading.Thread | None = None

    def close(self) -> None:
        """Lets go of all enclaves, which live on until the next start."""
        self._stopping.set()
        if self._looker is not None:
            self._looker.join()
        with self._lock:
            attached, held = list(self._live.values()), list(self._held.values())
            self._live.clear()
            self._held.clear()
        for session in attached:
            session.close()
        if held:
            try:
                self._world.leases.give_up(held)
            except UnavailableError as error:
                log.warning("leases-not-given-up", error=error.code)

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
            before = session.get(OpenRequest, (key, request))
        with self._opening(agreement.series):
            if before is not None:
                self._require_place(before.number)
            number = self._find_or_add(key, request, agreement)
            with self._world.store.read() as session:
                phase = session.get_one(SessionRow, number).phase
            if phase == "launching":
                self._launch(self._to_launch(number), agreement)
        return self._view(number)

    def _require_place(self, number: int) -> None:
        """UnavailableError `no-capacity` where a session for which a caller has waited was given up for that."""
        with self._world.store.read() as session:
            row = session.get_one(SessionRow, number)
        if (row.phase, row.code) == ("lost", "no-capacity"):
            # Whoever gave it up may have been killed before this.
            self._forget_request(number)
            raise UnavailableError(
                "no coordinator has a place for an enclave", code="no-capacity", retry_after_ms=FULL_MS
            )

    def _find_or_add(self, key: bytes, request: bytes, agreement: AgreementRow) -> int:
        self._end_earlier(key, request, agreement)
        with self._world.store.write() as session:
            before = session.get(OpenRequest, (key, request))
            if before is not None:
                return self._same(session, before, agreement)
            self._check_open(session, agreement)
            row = db.live_session(session, agreement.series)
            if row is not None and row.agreement != agreement.digest:
                raise UnavailableError(
                    "a session of an earlier version is ending", code="busy", retry_after_ms=RETRY_MS
                )
            lease = None
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
                lease = self._world.leases.add(session, row.number)
            session.add(OpenRequest(key=key, request=request, number=row.number))
            number = row.number
        if lease is not None:
            self._hold(lease)
        return number

    @staticmethod
    def _same(session: Session, before: OpenRequest, agreement: AgreementRow) -> int:
        if session.get_one(SessionRow, before.number).agreement != agreement.digest:
            raise RefusedError("conflict", "this request id has opened a session of another agreement")
        return before.number

    def _check_open(self, session: Session, agreement: AgreementRow) -> None:
        if agreement.complete_ms is None:
            raise RefusedError("agreement", "the agreement is not signed by all")
        if agreement.expires_ms <= self._world.clock():
            raise RefusedError("expired", "the agreement has expired")
        newest = db.newest(session, agreement.series, complete=True)
        if newest is not None and newest.version > agreement.version:
            raise RefusedError("agreement", "a newer version of the agreement is signed by all")

    def _end_earlier(self, key: bytes, request: bytes, agreement: AgreementRow) -> None:
        """A session of an earlier version gives way as long as it has no roster."""
        with self._world.store.read() as session:
            if session.get(OpenRequest, (key, request)) is not None:
                return
            self._check_open(session, agreement)
            row = db.live_session(session, agreement.series)
        if row is None or row.agreement == agreement.digest:
            return
        if row.phase not in ("launching", "open"):
            raise RefusedError("busy", "a session of an earlier version must end first")
        lease = self._to_launch(row.number) if row.phase == "launching" else self._holding(row.number)
        with self._lock:
            attached = self._live.get(row.number)
        if attached is not None:
            attached.lose("agreement")
        else:
            live.lose(self._world, lease, "agreement")
            self._let_go(row.number)

    def _launch(self, lease: Lease, agreement: AgreementRow) -> None:
        handle = None
        try:
            handle = self._unused(agreement.digest)
            if handle is None:
                handle = self._world.launcher.launch(Wanted.of(parsed(agreement.canonical)))
            begun, nonce = handle, secrets.token_bytes(NONCE_BYTES)
            serves = self._patiently(begun, lambda: live.begin(self._world, lease, agreement, begun, nonce))
        except FencedError:
            # Whoever took the session over has found the enclave, or ends it.
            self._let_go(lease.number)
            raise
        except ParleyError as error:
            if error.code == "no-capacity" and not self._world.store.sqlite:
                lease = self._offered(lease)
            self._give_up(lease, handle, error)
            raise
        self._attach(lease, agreement, handle, serves)

    def _patiently(self, handle: EnclaveHandle, work: Callable[[], _T], attempts: int = FIRST_ATTEMPTS) -> _T:
        """What an enclave is asked first, again where the channel broke or nothing answered in time: all of it is answered
        alike when it is repeated. Not where the enclave has ended, or another coordinator has the session."""
        for left in reversed(range(attempts)):
            try:
                return work()
            except FencedError:
                raise
            except UnavailableError as error:
                if not left or not self._world.launcher.alive(handle):
                    raise
                log.warning("enclave-silent", enclave=handle.id, code=error.code, left=left)
                if self._stopping.wait(FIRST_PAUSE_S * (0.5 + random.random())):  # noqa: S311  # jitter
                    raise
        raise AssertionError("unreachable")

    def _unused(self, agreement: bytes) -> EnclaveHandle | None:
        """An enclave of an agreement that no session has, as a launch left it that was interrupted. What is left of one whose
        session has ended begins no other, and is ended."""
        living = [found for found in self._world.launcher.find() if found.agreement == agreement]
        with self._world.store.read() as session:
            query = select(SessionRow.enclave).where(SessionRow.enclave.in_([found.id for found in living]))
            used = set(session.scalars(query))
        for found in living:
            # Nobody begins a session with it, so nobody has to be asked.
            if found.id in used:
                log.warning("enclave-without-session", enclave=found.id)
                self._world.launcher.stop(found)
        return next((found for found in living if found.id not in used), None)

    def _offered(self, lease: Lease) -> Lease:
        """Lets another coordinator of this store launch, one that has a place for an enclave: ElsewhereError where one does.
        Otherwise the session's lease, which is this coordinator's again; FencedError where it is not."""
        number = lease.number
        with self._lock:
            self._full_until, self._full_with = time.monotonic() + FULL_MS / 1000, set(self._live)
            self._offering.add(number)
        try:
            self._let_go(number)
            self._world.leases.give_up([lease])
            end = time.monotonic() + OFFERED_S + 2 * self._world.leases.renew_s
            while time.monotonic() < end and not self._stopping.wait(OFFERED_POLL_S):
                address = self._world.leases.elsewhere(number)
                if address is not None:
                    raise ElsewhereError(address)
            again = self._world.leases.take(number, first=False)
            if again is None:
                raise FencedError("another coordinator serves this session now; try again", retry_after_ms=RETRY_MS)
            self._hold(again)
        finally:
            with self._lock:
                self._offering.discard(number)
        return again

    def _room(self) -> bool:
        """Whether a launch for others would find a place: what the launcher counts is not all that takes memory and CPUs, so
        once it found none, not for a while, or until a session that ran here has ended."""
        with self._lock:
            full = time.monotonic() < self._full_until and self._full_with <= self._live.keys()
        return not full and self._world.launcher.room()

    def _give_up(self, lease: Lease, handle: EnclaveHandle | None, error: ParleyError) -> None:
        self._let_go(lease.number)
        live.lose(self._world, lease, error.code)
        if handle is not None:
            self._world.launcher.stop(handle)
        if isinstance(error, UnavailableError):
            self._forget_request(lease.number)

    def _forget_request(self, number: int) -> None:
        """A request that found no enclave may be repeated as it is."""
        with self._world.store.write() as session:
            for request in session.scalars(select(OpenRequest).where(OpenRequest.number == number)):
                session.delete(request)

    def _attach(self, lease: Lease, agreement: AgreementRow, handle: EnclaveHandle, serves: int) -> None:
        attached = Live(self._world, lease, parsed(agreement.canonical), handle, serves, self._let_go)
        with self._lock:
            self._live[lease.number] = attached
        attached.run()

    def _opening(self, series: bytes) -> threading.Lock:
        with self._lock:
            return self._series.setdefault(series, threading.Lock())

    def _to_launch(self, number: int) -> Lease:
        """The lease of a session that is to be launched: also of one that nobody serves, since nobody had a place for it."""
        with self._lock:
            lease = self._held.get(number)
        if lease is None and self._world.leases.elsewhere(number) is None:
            lease = self._world.leases.take(number, first=False)
            if lease is not None:
                self._hold(lease)
        return lease or self._holding(number)

    # Leases

    def _hold(self, lease: Lease) -> None:
        with self._lock:
            self._held[lease.number] = lease

    def _let_go(self, number: int) -> None:
        with self._lock:
            self._live.pop(number, None)
            self._held.pop(number, None)

    def _holding(self, number: int) -> Lease:
        """The lease of a session that is served here; ElsewhereError where it is not, or nobody serves it yet."""
        with self._lock:
            lease = self._held.get(number)
        if lease is not None:
            return lease
        address = self._world.leases.elsewhere(number)
        if address is not None:
            raise ElsewhereError(address)
        raise UnavailableError("the session is being attached to its enclave; try again", retry_after_ms=RETRY_MS)

    def recover(self) -> None:
        """Takes up all sessions that this coordinator may serve: finds their enclaves again, gives up those that have none,
        and ends enclaves of no session. From then on it prolongs its leases, and looks for sessions whose coordinator died."""
        self._world.launcher.find()
        self._look(first=True)
        self._end_strays(self._strays())
        self._looker = threading.Thread(target=self._keep_looking, name="leases", daemon=True)
        self._looker.start()

    def _keep_looking(self) -> None:
        while not self._stopping.wait(self._world.leases.renew_s * (0.8 + 0.4 * random.random())):  # noqa: S311  # jitter
            try:
                self._renew()
                self._look(first=False)
                if time.monotonic() >= self._sweep_at:
                    self._sweep()
            except UnavailableError as error:
                log.warning("leases-wait", code=error.code)
            except Exception:  # noqa: BLE001  # it must go on: without it all sessions here would be taken over
                log.fault("leases-failed")

    def _sweep(self) -> None:
        """Ends enclaves of sessions that others have taken over and given up. What was not one the time before may be in the
        hands of a coordinator that is just about to use it."""
        self._sweep_at = time.monotonic() + SWEEP_S
        strays = self._strays()
        self._end_strays([stray for stray in strays if stray.id in self._suspects])
        self._suspects = {stray.id for stray in strays}

    def _strays(self) -> list[EnclaveHandle]:
        # Enclaves first: one that is launched in between has a session that says so.
        handles = self._world.launcher.find()
        enclaves, starting = self._world.leases.of_node()
        return [handle for handle in handles if handle.id not in enclaves and handle.agreement not in starting]

    def _end_strays(self, strays: list[EnclaveHandle]) -> None:
        for stray in strays:
            log.warning("enclave-without-session", enclave=stray.id)
            self._world.launcher.stop(stray, unless=partial(self._wanted, stray))

    def _wanted(self, stray: EnclaveHandle) -> bool:
        """Whether a session has come that uses an enclave, or may: its coordinator notes that before it looks for enclaves."""
        enclaves, starting = self._world.leases.of_node()
        return stray.id in enclaves or stray.agreement in starting

    def _renew(self) -> None:
        with self._lock:
            held = list(self._held.values())
        telemetry.put("parley_leases", len(held))
        for lease in self._world.leases.renew(held) if held else ():
            with self._lock:
                if self._held.get(lease.number) != lease:
                    continue
                del self._held[lease.number]
                attached = self._live.pop(lease.number, None)
            telemetry.count("parley_leases_lost_total")
            log.warning("overtaken", number=lease.number, token=lease.token)
            if attached is not None:
                # It waits for what is under way; the other leases do not.
                threading.Thread(target=attached.close, name="overtaken", daemon=True).start()

    def _look(self, *, first: bool) -> None:
        with self._lock:
            held = self._held.keys() | self._offering
        numbers = [number for number in self._world.leases.free(first=first) if number not in held]
        if not numbers:
            return
        handles = {handle.id: handle for handle in self._world.launcher.find()}
        for number in numbers:
            if self._stopping.is_set():
                return
            if not first and self._needs_place(number) and not self._room():
                continue
            lease = self._world.leases.take(number, first=first)
            if lease is None:
                continue
            self._hold(lease)
            try:
                self._adopt(lease, handles)
            except ParleyError as error:
                # Once the lease has expired, it is tried again.
                self._let_go(number)
                log.warning("not-taken-over", number=number, code=error.code)

    def _needs_place(self, number: int) -> bool:
        with self._world.store.read() as session:
            row = session.get_one(SessionRow, number)
            return row.phase == "launching" and not row.enclave

    def _adopt(self, lease: Lease, handles: dict[str, EnclaveHandle]) -> None:
        with self._world.store.read() as session:
            row = session.get_one(SessionRow, lease.number)
            agreement = session.get_one(AgreementRow, row.agreement)
        handle = handles.get(row.enclave)
        if row.phase == "released":
            live.tell_stored(self._world, lease, handle)
            self._let_go(lease.number)
        elif row.phase == "launching":
            threading.Thread(target=self._relaunch, args=(lease, agreement), daemon=True).start()
        elif row.phase in LIVE and handle is not None:
            self._reattach(lease, agreement, handle)
        else:
            # Also where the enclave is on another machine: nobody there has come back to it.
            self._let_go(lease.number)
            live.lose(self._world, lease, "lost")

    def _reattach(self, lease: Lease, agreement: AgreementRow, handle: EnclaveHandle) -> None:
        try:
            serves = live.load(self._world, agreement, handle)
        except UnavailableError as error:
            log.warning("enclave-silent", enclave=handle.id, code=error.code, left=FIRST_ATTEMPTS - 1)
            # In a thread of its own: other sessions, and the leases of all, do not wait for it.
            threading.Thread(target=self._reattach_later, args=(lease, agreement, handle), daemon=True).start()
        except ParleyError as error:
            self._not_found_again(lease, handle, error.code)
        else:
            self._reattached(lease, agreement, handle, serves)

    def _reattach_later(self, lease: Lease, agreement: AgreementRow, handle: EnclaveHandle) -> None:
        if self._stopping.wait(FIRST_PAUSE_S):
            return
        try:
            try:
                work = functools.partial(live.load, self._world, agreement, handle)
                serves = self._patiently(handle, work, FIRST_ATTEMPTS - 1)
            except ParleyError as error:
                if not self._stopping.is_set():
                    self._not_found_again(lease, handle, error.code)
                return
            with self._lock:
                if self._stopping.is_set() or self._held.get(lease.number) != lease:
                    return  # the next one to hold the lease finds it
            self._reattached(lease, agreement, handle, serves)
        except UnavailableError as error:
            # The database is away, or the session is another coordinator's by now; once the lease has expired, it is tried again.
            self._let_go(lease.number)
            log.warning("not-taken-over", number=lease.number, code=error.code)
        except Exception:  # noqa: BLE001  # a thread that dies silently would leave the session without a coordinator for ever
            log.fault("reattach-failed", number=lease.number)
            self._let_go(lease.number)

    def _reattached(self, lease: Lease, agreement: AgreementRow, handle: EnclaveHandle, serves: int) -> None:
        # The enclave keeps twice as many as it asks for, and drops the oldest: those of a coordinator that was stopped
        # would make it wait for frames.
        self._attach(lease, agreement, handle, 2 * serves if lease.overtaken else serves)

    def _not_found_again(self, lease: Lease, handle: EnclaveHandle, code: str) -> None:
        log.warning("enclave-not-found-again", enclave=handle.id, code=code)
        self._let_go(lease.number)
        live.lose(self._world, lease, "lost")
        self._world.launcher.stop(handle)

    def _relaunch(self, lease: Lease, agreement: AgreementRow) -> None:
        with self._opening(agreement.series):
            with self._world.store.read() as session:
                if session.get_one(SessionRow, lease.number).phase != "launching":
                    return
            try:
                self._launch(lease, agreement)
            except ParleyError as error:
                log.warning("relaunch-failed", number=lease.number, code=error.code)
            except Exception:  # noqa: BLE001  # a thread that dies silently would leave the session launching for ever
                log.fault("relaunch-failed", number=lease.number)
                self._let_go(lease.number)
                live.lose(self._world, lease, "internal")

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
        try:
            _, name, attached = self._attached(key, identifier)
        except RefusedError as error:
            return self._released(error, key, identifier, _receipt(cose))
        with self._lock:
            if self._judged[key] >= JUDGED:
                raise UnavailableError(
                    f"{JUDGED} joins of this key are judged; wait for one", code="busy", retry_after_ms=JUDGED_MS
                )
            self._judged[key] += 1
        try:
            return attached.join(name, cose)
        except RefusedError as error:
            return self._released(error, key, identifier, _receipt(cose))
        finally:
            with self._lock:
                self._judged[key] -= 1
                if not self._judged[key]:
                    del self._judged[key]

    def start(self, key: bytes, identifier: bytes, cose: bytes) -> tuple[bytes, tuple[str, ...]]:
        """(roster, who has not countersigned)."""
        try:
            _, name, attached = self._attached(key, identifier)
            attached.start(name, cose)
        except RefusedError as error:
            self._released(error, key, identifier, _started(cose))
        return self.roster(key, identifier)

    def _released(
        self,
        error: RefusedError,
        key: bytes,
        identifier: bytes,
        before: Callable[[Session, SessionRow, str], _T | None],
    ) -> _T:
        """The answer that a statement got before the session was released, for a caller that did not hear it; else `error`."""
        if error.code != "phase":
            raise error
        with self._world.store.read() as session:
            row, name = db.session_for(session, identifier, key)
            found = before(session, row, name) if row.phase == "released" else None
        if found is None:
            raise error
        return found

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
        try:
            _, name, attached = self._attached(key, identifier)
            attached.countersign(name, cose, former)
        except RefusedError as error:
            self._released(error, key, identifier, _consented(cose))
        return self.get(key, identifier)

    def refuse(self, key: bytes, identifier: bytes, cose: bytes) -> SessionView:
        """The session after a party's refusal."""
        row, name, attached = self._attached(key, identifier)
        attached.refuse(name, cose)
        return self._view(row.number)

    def _attached(self, key: bytes, identifier: bytes) -> tuple[SessionRow, str, Live]:
        with self._world.store.read() as session:
            row, name = db.session_for(session, identifier, key)
        live.require(row, *LIVE)
        self._holding(row.number)
        with self._lock:
            attached = self._live.get(row.number)
        if attached is None:
            raise UnavailableError("the session is being attached to its enclave; try again", retry_after_ms=RETRY_MS)
        return row, name, attached

    def _view(self, number: int) -> SessionView:
        with self._lock:
            attached = self._live.get(number)
        with self._world.store.read() as session:
            row = session.get_one(SessionRow, number)
            percent = (
                100 if row.phase == "released" else attached.percent if attached is not None else told(session, row)
            )
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


def _receipt(cose: bytes) -> Callable[[Session, SessionRow, str], tuple[bytes, str] | None]:
    def before(session: Session, row: SessionRow, name: str) -> tuple[bytes, str] | None:
        rows = session.scalars(select(JoinRow).where(JoinRow.number == row.number, JoinRow.party == name))
        same = (one for one in rows if payload_unverified(one.cose) == payload_unverified(cose))
        return next(((one.receipt, "") for one in same if one.receipt), None)

    return before


def _started(cose: bytes) -> Callable[[Session, SessionRow, str], bool | None]:
    def before(_: Session, row: SessionRow, __: str) -> bool | None:
        return (row.start is not None and payload_unverified(row.start) == payload_unverified(cose)) or None

    return before


def _consented(cose: bytes) -> Callable[[Session, SessionRow, str], bool | None]:
    def before(session: Session, row: SessionRow, name: str) -> bool | None:
        done = None if row.roster is None else session.get(CountersignatureRow, (row.roster, name))
        return (done is not None and payload_unverified(done.cose) == payload_unverified(cose)) or None

    return before


def told(session: Session, row: SessionRow) -> int:
    """How far the computation of a session is that another coordinator serves: what the newest event says."""
    newest = (
        select(EventRow.percent)
        .where(EventRow.session == row.session, EventRow.kind == "progress", EventRow.member == "")
        .order_by(EventRow.number.desc())
        .limit(1)
    )
    return session.scalar(newest) or 0


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
