"""The operations of an enclave, in the order of a session. Bytes in, bytes out; the wire is in `service`.

Every operation first asks the table of phases, then checks what it was given, then changes the state: one that is refused
changes nothing. All of them may be repeated (SPEC, "Phases").
"""

from __future__ import annotations

import gc
import hmac
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

from parley_enclave import admission, compute, keys, lineage, release, roster
from parley_enclave.nsm import Nsm
from parley_enclave.phases import Op, Phase, Phases
from parley_enclave.pool import Parts, Pool, WorkerError
from parley_enclave.recipient import Recipient
from parley_enclave.release import Release
from parley_enclave.roster import Former
from parley_enclave.session import Session
from parley_protocol import claims, cose, limits
from parley_protocol.agreement.model import Agreement, Platform
from parley_protocol.chain import verify_chain
from parley_protocol.errors import MalformedError, RefusedError, VerificationError
from parley_protocol.transcript import Countersignature, Offer, Refusal, kms_user_data, offer_user_data

Progress = Callable[[int], None]
NONCE_BYTES = 32
REQUEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Status:
    """What the host may know at any time."""

    phase: Phase
    agreement: bytes = b""
    session: bytes = b""
    offer: bytes = b""
    roster: bytes = b""
    joined: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    code: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a host gets that wants to ask KMS for a join's keys: a document, or the receipt of the join."""

    document: bytes = b""
    receipt: bytes = b""


class Enclave:
    """One enclave: the agreement that it serves, the session that it runs, its workers and its module."""

    def __init__(self, nsm: Nsm, pool: Pool, *, log: Callable[[str], None]) -> None:
        self._nsm = nsm
        self._pool = pool
        self._log = log
        self._changed = threading.Condition(threading.RLock())
        self._phases = Phases()
        self._bound: bytes | None = None
        self._lineage: tuple[Agreement, ...] = ()
        self._named_heads: frozenset[bytes] = frozenset()
        self._session: Session | None = None
        self._last_request = b""
        self._stored: tuple[bytes, bytes] | None = None

    # The agreement

    def load(self, signed: Sequence[tuple[bytes, Mapping[str, bytes]]]) -> int:
        """Takes the agreement (ses-2); how many Serve connections the host keeps open. "conflict" for another one."""
        with self._changed:
            self._phases.require(Op.LOAD)
            versions = lineage.verify(signed)
            agreement = versions[-1]
            if self._bound not in (None, agreement.digest):
                raise RefusedError("conflict")
            lineage.check_image(agreement, self._nsm)
            lineage.bind(agreement, self._nsm)
            self._bound = agreement.digest
            lineage.check_time(agreement, self._nsm.now_ms())
            if self._phases.now is Phase.EMPTY:
                self._lineage = versions
                self._named_heads = lineage.named_heads(signed[-1][1])
                self._move(Op.LOAD, Phase.LOADED)
            return self._pool.size

    # The session

    def begin(self, request: bytes, records: Sequence[tuple[bytes, bytes]]) -> bytes:
        """Begins a session after a chain of (record, document), oldest first (ses-3); the offer's bytes."""
        if len(request) != REQUEST_BYTES:
            raise MalformedError(f"Begin.request: not {REQUEST_BYTES} bytes")
        with self._changed:
            phase = self._phases.require(Op.BEGIN)
            if self._session is not None and phase is not Phase.LOST:
                if self._session.request != request:
                    raise RefusedError("phase")
                return self._session.offer.to_bytes()
            if request == self._last_request:
                raise RefusedError("phase")
            agreement = self._lineage[-1]
            now = self._nsm.now_ms()
            lineage.check_time(agreement, now)
            chain = verify_chain(records, self._lineage, now_ms=now)
            lineage.check_heads(self._named_heads, records)
            if chain.charged >= agreement.session.max_releases:
                raise RefusedError("exhausted")
            made = keys.make(self._nsm.random)
            offer = Offer(
                session=keys.random_bytes(self._nsm.random, 16),
                agreement=agreement.digest,
                sealing_key=made.sealing_public,
                signing_key=made.signing_public,
                head=chain.head,
                made_at=self._nsm.now_ms(),
            )
            guard_key = keys.random_bytes(self._nsm.random, 32)
            self._session = Session(agreement, request, offer, chain, made, guard_key)
            self._last_request = request
            self._stored = None
            self._move(Op.BEGIN, Phase.OPEN)
            return offer.to_bytes()

    def attest(self, session: bytes, nonce: bytes) -> bytes:
        """The document of the offer with the caller's nonce (ses-4)."""
        if len(nonce) != NONCE_BYTES:
            raise MalformedError(f"Attest.nonce: not {NONCE_BYTES} bytes")
        with self._changed:
            self._phases.require(Op.ATTEST)
            offer = self._of(session).offer
        return self._nsm.attest(user_data=offer_user_data(offer.to_bytes()), nonce=nonce, public_key=offer.signing_key)

    def join(self, session: bytes, signed: bytes, uploads: Sequence[tuple[bytes, int]], progress: Progress) -> bytes:
        """Admits a party's join; the signed receipt. Long: `progress` is told percents.

        A refusal at any point leaves the party's earlier join and all else as it was (adm-9).
        """
        with self._changed:
            self._lapse()
            phase = self._phases.require(Op.JOIN)
            state = self._of(session)
            opened = admission.open_join(signed, uploads, state.offer, state.agreement, state.live_keys())
            known = state.receipt_of(opened.join)
            if known is not None:
                return known
            if phase is not Phase.OPEN:
                raise RefusedError("phase")
        return self._admit(state, opened, progress)

    def recipient(self, session: bytes, signed: bytes, uploads: Sequence[tuple[bytes, int]]) -> Asked:
        """The document with which KMS is asked for the keys of a KMS join, with a key that is made for it (kms-6); or the
        receipt of a join that is admitted already."""
        brought, known = self._kms_join(Op.RECIPIENT, session, signed, uploads)
        if known is not None:
            return Asked(receipt=known)
        made = Recipient()
        with self._changed:
            state = self._kms_session(Op.RECIPIENT, session)
            state.await_answer(brought.join, made)
            bound = kms_user_data(state.offer.digest, brought.join.digest)
        return Asked(document=self._nsm.attest(user_data=bound, public_key=made.public))

    def kms_join(
        self, session: bytes, signed: bytes, uploads: Sequence[tuple[bytes, int]], answer: bytes, progress: Progress
    ) -> bytes:
        """Admits a party's KMS join with what KMS answered to its document; the signed receipt. Long, as `join`.

        Every answer that is not the right one is refused with code "key", and as late as any other (kms-9).
        """
        brought, known = self._kms_join(Op.KMS_JOIN, session, signed, uploads)
        if known is not None:
            return known
        begun = time.monotonic()
        try:
            with self._changed:
                # Anew: of a call that waited long for the lock, the answer would else tell when it was opened.
                begun = time.monotonic()
                state = self._kms_session(Op.KMS_JOIN, session)
                recipient = state.answered(brought.join)
            opened = admission.open_kms_join(brought, recipient.open(answer, brought.size))
        except VerificationError:
            time.sleep(max(0.0, begun + limits.KMS_OPEN_MS / 1000 - time.monotonic()))
            raise
        with self._changed:
            state.unopened[brought.join.party] -= 1
        return self._admit(state, opened, progress)

    def _kms_join(
        self, op: Op, session: bytes, signed: bytes, uploads: Sequence[tuple[bytes, int]]
    ) -> tuple[admission.KmsBrought, bytes | None]:
        """A KMS join whose statements are good and which may be admitted now, and its receipt where it is admitted."""
        with self._changed:
            self._lapse()
            state = self._kms_session(op, session)
            brought = admission.read_kms_join(signed, uploads, state.agreement)
            known = state.receipt_of(brought.join)
            if known is None:
                state.check_roster_key(brought.join)
                state.check_turn(brought.join)
            return brought, known

    def _kms_session(self, op: Op, session: bytes) -> Session:
        self._phases.require(op)
        return self._of(session)

    def _admit(self, state: Session, opened: admission.Opened, progress: Progress) -> bytes:
        """Has the tables of a join checked, and admits it (adm-5 to adm-9)."""
        join = opened.join
        with self._changed:
            if self._phases.now is not Phase.OPEN or self._session is not state:
                raise RefusedError("phase")
            state.check_roster_key(join)
            state.check_turn(join)
            waiting = {
                brought.upload.digest: self._admitting(state, brought)
                for brought in opened.brought
                if brought.upload.digest not in state.tables
            }

        def tell() -> None:
            progress(min(state.percents.get(digest, 0) for digest in waiting))

        found = {digest: admission.checked(_wait(future, tell)) for digest, future in waiting.items()}
        with self._changed:
            # Others went on meanwhile: a roster may stand, or the session may be over.
            self._lapse()
            if self._phases.now is not Phase.OPEN or self._session is not state:
                raise RefusedError("phase")
            state.check_roster_key(join)
            state.check_turn(join)
            state.tables |= found
            return state.admit(opened, self._nsm.now_ms())

    def start(self, session: bytes, signed: bytes) -> bytes | None:
        """Closes the inputs (ses-5); the signed roster.

        With standing consent the computation starts at once (ses-10), and None says that the release is to be waited for: the
        answer to each repetition.
        """
        with self._changed:
            self._lapse()
            phase = self._phases.require(Op.START)
            state = self._of(session)
            claims.verify_start(signed, state.offer, state.agreement)
            waits = claims.needs_countersignatures(state.agreement)
            if phase is not Phase.OPEN:
                assert state.standing is not None
                return state.standing.cose if waits else None
            now = self._nsm.now_ms()
            lineage.check_time(state.agreement, now)
            joins = {party: joined.opened.join for party, joined in state.joins.items()}
            issued = roster.make(state.agreement, state.offer, joins, now_ms=now)
            inputs = [
                (brought, state.tables[brought.upload.digest])
                for entry in issued.included
                for brought in state.joins[entry.party].opened.brought
            ]
            # Before the roster: a computation that does not fit is refused while that costs nobody a signature.
            state.job = compute.prepare(state.agreement, inputs, state.guard_key, name=issued.digest)
            standing = state.issue(issued)
            if waits:
                self._move(Op.START, Phase.ROSTERED)
            else:
                self._move(Op.START, Phase.COMPUTING)
                self._compute(state)
            return standing.cose

    def countersign(self, session: bytes, signed: bytes, former: Sequence[Former]) -> list[str] | None:
        """Takes a party's consent (ses-6); who has not yet signed, or None when the release is to be waited for."""
        with self._changed:
            self._lapse()
            state = self._of(session)
            self._check_ended(state, Countersignature.from_bytes(cose.payload_unverified(signed)).roster)
            phase = self._phases.require(Op.COUNTERSIGN)
            standing = state.standing
            if standing is None or not claims.needs_countersignatures(state.agreement):
                raise RefusedError("phase")
            statement = claims.verify_countersignature(signed, standing.roster, state.agreement)
            now = self._nsm.now_ms()
            before = roster.former_inputs(statement, former, self._lineage, state.offer.head, now_ms=now)
            standing.consent(statement, before)
            if phase is not Phase.ROSTERED:
                return None
            if standing.missing:
                return standing.missing
            if state.chain.charged + standing.charge > state.agreement.session.max_releases:
                self._pool.renew()
                self._lose(state, Op.COUNTERSIGN, "exhausted")
                raise RefusedError("exhausted")
            self._move(Op.COUNTERSIGN, Phase.COMPUTING)
            self._compute(state)
            return None

    def refuse(self, session: bytes, signed: bytes) -> list[str]:
        """Ends the roster by a party's refusal (ses-7); the members whose joins are asked for again."""
        with self._changed:
            self._lapse()
            state = self._of(session)
            ended = state.ended
            digest = Refusal.from_bytes(cose.payload_unverified(signed)).roster
            if ended is not None and ended.roster.digest == digest:
                claims.verify_refusal(signed, ended.roster, state.agreement)
                return [entry.party for entry in ended.roster.included]
            self._phases.require(Op.REFUSE)
            assert state.standing is not None
            refusal = claims.verify_refusal(signed, state.standing.roster, state.agreement)
            again = [entry.party for entry in state.standing.roster.included]
            state.end_roster("roster", (refusal.party,))
            self._move(Op.REFUSE, Phase.OPEN)
            return again

    def released(self, session: bytes, progress: Progress) -> Release:
        """Waits for the release of a computation that has begun; RefusedError with the session's code when it is lost."""
        while True:
            with self._changed:
                state = self._of(session)
                if state.release is not None:
                    return state.release
                if state.code:
                    raise RefusedError(state.code)
                self._changed.wait(timeout=limits.PROGRESS_MS / 1000)
                percent = state.percent
            progress(percent)

    def stored(self, session: bytes, record: bytes) -> None:
        """The host holds the release, which is forgotten (ses-8)."""
        with self._changed:
            if self._phases.now is Phase.LOADED and self._stored == (session, record):
                return
            self._phases.require(Op.STORED)
            state = self._of(session)
            if state.release is None or not hmac.compare_digest(state.release.record, record):
                raise RefusedError("conflict")
            self._stored = (session, record)
            self._session = None
            self._move(Op.STORED, Phase.LOADED)

    def status(self) -> Status:
        """Where the enclave stands."""
        with self._changed:
            self._lapse()
            phase = self._phases.now
            agreement = self._bound or b""
            state = self._session
            if state is None:
                return Status(phase, agreement)
            shown = state.standing.cose if state.standing else state.ended.cose if state.ended else b""
            missing = state.standing.missing if state.standing else state.missing
            if state.ended and not state.joins:
                missing = list(state.ended.members)
            code = state.code or (state.ended.code if state.ended else "")
            return Status(
                phase,
                agreement,
                state.offer.session,
                state.offer.to_bytes(),
                shown,
                tuple(party for party in state.agreement.parties if party in state.joins),
                tuple(missing),
                code,
            )

    # Inside; the lock is held

    def _of(self, session: bytes) -> Session:
        if self._session is None or self._session.offer.session != session:
            raise RefusedError("unknown-session")
        return self._session

    def _move(self, op: Op, target: Phase) -> None:
        before = self._phases.now
        self._phases.move(op, target)
        if target is not before:
            self._log(f"{before.value} -> {target.value}")
        self._changed.notify_all()

    def _lapse(self) -> None:
        """Ends a roster whose time is over, by the module's clock (ses-9)."""
        state = self._session
        if self._phases.now is not Phase.ROSTERED or state is None or state.standing is None:
            return
        if self._nsm.now_ms() >= state.standing.roster.expires_at:
            state.end_roster("expired", tuple(state.standing.missing))
            self._move(Op.LAPSE, Phase.OPEN)

    @staticmethod
    def _check_ended(state: Session, digest: bytes) -> None:
        if state.ended is not None and state.ended.roster.digest == digest:
            raise RefusedError(state.ended.code)

    def _admitting(self, state: Session, brought: admission.Brought) -> Future[Parts]:
        digest = brought.upload.digest
        running = state.admitting.get(digest)
        if running is not None:
            return running

        def progress(percent: int) -> None:
            state.percents[digest] = percent

        future = self._pool.submit(admission.task(brought, state.agreement, state.guard_key, progress))
        state.admitting[digest] = future

        def done(finished: Future[Parts]) -> None:
            with self._changed:
                state.admitting.pop(digest, None)
                state.percents.pop(digest, None)
                # A session that has meanwhile ended has forgotten its keys, and keeps nothing.
                if state.keys is not None and not finished.cancelled() and finished.exception() is None:
                    state.tables[digest] = admission.checked(finished.result())

        future.add_done_callback(done)
        return future

    def _lose(self, state: Session, op: Op, code: str) -> None:
        state.code = code
        state.forget()
        self._move(op, Phase.LOST)

    def _compute(self, state: Session) -> None:
        threading.Thread(target=self._run, args=(state,), daemon=True).start()

    # The computation, in a thread of its own

    def _run(self, state: Session) -> None:
        try:
            made = self._release(state)
            code = ""
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not end the thread
            made = None
            # ses-11: one code for what the host did to a frame, one for all else: no error is an output to it (REVIEW T6).
            code = "frame" if isinstance(error, RefusedError) and error.code == "frame" else "internal"
            self._explain(state, error)
        # ses-12: the workers' memory first; what they hold must be gone before the host sees a release.
        self._pool.renew()
        with self._changed:
            if made is None:
                self._lose(state, Op.FAIL, code)
            else:
                state.release = made
                state.forget()
                self._move(Op.FINISH, Phase.RELEASED)
        gc.collect()

    def _release(self, state: Session) -> Release:
        with self._changed:
            standing, job, session_keys = state.standing, state.job, state.live_keys()
            assert standing is not None and job is not None
            shares = [state.joins[entry.party].opened.noise_share for entry in standing.roster.included]

        def progress(percent: int) -> None:
            state.percent = percent

        tables = compute.run(job, self._pool, progress)
        return release.make(
            state.agreement,
            state.offer,
            standing.roster,
            chain=state.chain,
            charge=standing.charge,
            tables=tables,
            shares=shares,
            keys=session_keys,
            nsm=self._nsm,
        )

    def _explain(self, state: Session, error: Exception) -> None:
        """One coarse line, and where a simulated enclave failed the place in the code, since there is nothing to protect."""
        if state.agreement.platform is Platform.SIMULATED:
            place = error.place if isinstance(error, WorkerError) else _place(error)
            self._log(f"computation lost: {place}")
        else:
            self._log("computation lost")


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
    return f"{type(error).__name__}{where}"


def _wait(future: Future[Parts], tell: Callable[[], None]) -> Parts:
    while True:
        try:
            return future.result(timeout=limits.PROGRESS_MS / 1000)
        except FutureTimeout:
            if future.done():
                raise
            tell()
