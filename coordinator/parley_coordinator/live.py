"""One live session and its enclave: relays statements, and keeps the store at what the enclave says.

The enclave decides. What members send is stored first and relayed then, so a coordinator that was killed in between relays
it again; what the enclave answers is stored before it is told. A monitor asks the enclave for its phase, so that a lapsed
roster, a finished computation or a lost enclave is noticed without a caller.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from parley_coordinator import log, relay, telemetry
from parley_coordinator import store as db
from parley_coordinator.agreements import parsed, signed
from parley_coordinator.blobs import BlobReader, BlobStore, bundle_name, upload_name
from parley_coordinator.clock import Clock
from parley_coordinator.config import Deadlines
from parley_coordinator.kms import Keys
from parley_coordinator.launcher import EnclaveHandle, Launcher
from parley_coordinator.leases import Lease, Leases
from parley_coordinator.models import (
    LIVE,
    AgreementRow,
    BundleRow,
    CountersignatureRow,
    JoinRow,
    KmsJoinRow,
    RecordRow,
    RefusalRow,
    RosterRow,
    SessionRow,
    UploadRow,
)
from parley_coordinator.store import Store
from parley_protocol.agreement.model import Agreement
from parley_protocol.bundle import Bundle, BundledAgreement, BundledOutput
from parley_protocol.claims import (
    needs_countersignatures,
    verify_countersignature,
    verify_join,
    verify_refusal,
    verify_start,
)
from parley_protocol.cose import payload_unverified
from parley_protocol.encoding import sha384
from parley_protocol.errors import MalformedError, ParleyError, RefusedError, UnavailableError
from parley_protocol.transcript import (
    AnyJoin,
    Countersignature,
    Join,
    KmsJoin,
    Offer,
    Record,
    Roster,
    kms_context,
    read_join,
)
from parley_protocol.v1 import coordinator_pb2, enclave_pb2

ADMISSION: Final = frozenset(
    ("signature", "agreement", "key", "conflict", "schema", "order", "domain", "range", "multiplicity", "rows", "frame")
)
"""Codes with which the enclave refuses a join; all others say that it could not be judged now."""
JOINS_PER_PARTY: Final = 256
"""Joins of a party that are kept until a roster ends them: each wakes all members. One is enough, and some for mistakes."""
PROGRESS_STEP: Final = 10
"""Percents between two events: each is a row that all members read."""
CONSENT_WAIT_S: Final = 2.0
"""How long the last countersignature waits for the enclave to say no."""
RETRY_S: Final = 0.5
KMS_PAUSE_S: Final = 2.0
"""Before KMS is asked again for the same join, at first; it doubles."""
KMS_PAUSE_MOST_S: Final = 60.0
KMS_UNOPENED: Final = 3
"""So many answers to one join that the enclave does not open are followed by another document. An answer to a document that is
no more the newest one, as that of a coordinator whose session was taken over, uses up the one that is (kms-10)."""


@dataclass(frozen=True, slots=True)
class World:
    """What sessions work with."""

    store: Store
    blobs: BlobStore
    launcher: Launcher
    deadlines: Deadlines
    clock: Clock
    leases: Leases
    kms: Keys | None = None
    """None where nobody asks KMS: then joins by KMS wait."""


class Live:
    """A session that the enclave has begun. `ended` is called once, when it is released or lost."""

    def __init__(
        self,
        world: World,
        lease: Lease,
        agreement: Agreement,
        handle: EnclaveHandle,
        serves: int,
        ended: Callable[[int], None],
    ) -> None:
        self._world = world
        self._lease = lease
        self._number = number = lease.number
        self._agreement = agreement
        self._handle = handle
        self._ended = ended
        # Held while statements are relayed that are answered at once, and while the store follows the enclave.
        self._lock = threading.RLock()
        # Grows with every change under the lock: what the enclave said of itself before one is not to be followed after it.
        self._epoch = 0
        self._over = threading.Event()
        self._closing = False
        self._channel = relay.Channel(handle.address)
        self._joining: dict[bytes, Future[tuple[bytes, str]]] = {}
        # When KMS is asked again, by the monotonic clock, and after how many times in vain.
        self._kms_later: dict[bytes, tuple[float, int]] = {}
        self._kms_unopened: dict[bytes, int] = {}
        self._follower: threading.Thread | None = None
        self.percent = 0
        with world.store.read() as session:
            row = self._row(session)
            assert row.offer is not None and row.session is not None
            self._session = row.session
            self._offer = Offer.from_bytes(row.offer)
        self._frames = relay.FrameServer(handle.address, serves, self._blob)
        self._monitor = threading.Thread(target=self._watch, name=f"monitor-{number}", daemon=True)

    def run(self) -> None:
        """Begins to follow the enclave."""
        self._glance()
        self._monitor.start()

    def close(self) -> None:
        """Lets go of the enclave, which lives on and goes on with what was begun."""
        self._closing = True
        self._over.set()
        self._channel.close()
        self._frames.close()
        if self._monitor.is_alive():  # one that is closed before it runs ends with its first look
            self._monitor.join(timeout=relay.CONNECT_S)

    # What members ask for

    def attest(self, nonce: bytes) -> bytes:
        """The document of the offer with a nonce."""
        return self._ask(
            enclave_pb2.Ask(attest=enclave_pb2.Attest(session=self._session, nonce=nonce))
        ).attested.document

    def join(self, name: str, cose: bytes) -> tuple[bytes, str]:
        """(receipt, "") or (b"", code of the refusal) of a party's join; blocks until the enclave has judged it (crd-12)."""
        join = verify_join(cose, self._offer, self._agreement)
        if join.party != name:
            raise RefusedError("not-a-member", "the join is another party's")
        self._settle("open")
        with self._changing():
            with self._write() as session:
                row = session.get(JoinRow, (self._number, join.digest))
                if row is not None and (row.receipt or row.code):
                    return row.receipt or b"", row.code
                self._require(session, "open")
                self._uploads(session, join)
                if row is None:
                    self._make_place(session, join)
                    self._add_join(session, join, cose)
            outcome = self._joining.get(join.digest)
            mine = outcome is None
            if outcome is None:
                outcome = self._joining[join.digest] = Future()
        if mine:
            self._relay_join(join, cose, outcome)
        return outcome.result()

    def start(self, name: str, cose: bytes) -> None:
        """Closes the inputs: the enclave's roster is then in the store (crd-13)."""
        start = verify_start(cose, self._offer, self._agreement)
        if start.member != name:
            raise RefusedError("not-a-member", "the request is another member's")
        with self._changing():
            with self._write() as session:
                row = self._require(session, *LIVE)
                if row.phase != "open":
                    return
                row.start = cose
            answer = self._ask(enclave_pb2.Ask(start=enclave_pb2.Start(session=self._session, cose=cose)))
            if answer.WhichOneof("op") == "rostered":
                self._rostered(answer.rostered.cose)
        self.tick()

    def countersign(self, name: str, cose: bytes, former: coordinator_pb2.PutCountersignatureRequest) -> None:
        """Stores and relays a party's consent; the last one starts the computation, which goes on by itself (crd-14)."""
        self._settle("rostered", "computing")
        with self._changing():
            with self._write() as session:
                row = self._require(session, "rostered", "computing")
                roster_row, roster = self._roster(session, row)
                statement = verify_countersignature(cose, roster, self._agreement)
                if statement.party != name:
                    raise RefusedError("not-a-member", "the countersignature is another party's")
                if (
                    self._store_consent(session, roster_row.digest, statement, cose, former)
                    and row.phase == "computing"
                ):
                    return
                missing = self._missing(session, roster)
            if missing:
                self._relay_consent(statement.party)
                return
            outcome: Future[None] = Future()
            self._follow(statement.party, outcome)
        done = _wait(outcome, CONSENT_WAIT_S)
        if done is not None:
            raise done

    def refuse(self, name: str, cose: bytes) -> None:
        """Stores and relays a party's refusal of the roster: the session is open again, without joins (crd-15)."""
        with self._changing():
            with self._write() as session:
                row = self._require(session, "rostered", "computing", "open")
                if row.phase == "open":
                    self._refused_before(session, cose)
                    return
                roster_row, roster = self._roster(session, row)
                refusal = verify_refusal(cose, roster, self._agreement)
                if refusal.party != name:
                    raise RefusedError("not-a-member", "the refusal is another party's")
                if session.get(RefusalRow, (roster_row.digest, name)) is None:
                    session.add(RefusalRow(roster=roster_row.digest, party=name, cose=cose, at_ms=self._world.clock()))
            self._ask(enclave_pb2.Ask(refuse=enclave_pb2.Refuse(session=self._session, cose=cose)))
            self._roster_ended("declined", name)

    def _refused_before(self, session: Session, cose: bytes) -> None:
        for refusal in session.scalars(
            select(RefusalRow)
            .join(RosterRow, RosterRow.digest == RefusalRow.roster)
            .where(RosterRow.number == self._number)
        ):
            if payload_unverified(refusal.cose) == payload_unverified(cose):
                return
        raise RefusedError("phase", "no roster stands")

    def tick(self) -> None:
        """Asks the enclave for its phase and makes the store follow."""
        if self._over.is_set():
            return
        epoch = self._epoch
        try:
            state = self._ask(enclave_pb2.Ask(status=enclave_pb2.Status())).state
        except relay.GoneError:
            time.sleep(RETRY_S)
            self._lose_if_gone()
            return
        except UnavailableError as error:
            self._lose_if_ended(error)
            return
        except (RefusedError, MalformedError) as error:
            log.warning("enclave-no-status", session=log.short(self._session), code=error.code)
            return
        with self._lock:
            if epoch == self._epoch and not self._over.is_set():
                self._reconcile(state)

    @contextmanager
    def _write(self) -> Iterator[Session]:
        """A transaction that changes this session: FencedError where another coordinator has taken it over."""
        with self._world.leases.fenced(self._lease) as session:
            yield session

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            self._epoch += 1
            try:
                yield
            finally:
                self._epoch += 1

    # How the store follows

    def _reconcile(self, state: enclave_pb2.State) -> None:
        if state.session != self._session or state.phase in ("empty", "loaded"):
            self.lose("lost")
        elif state.phase == "lost":
            self.lose(state.code or "lost")
        elif state.phase == "open":
            with self._world.store.read() as session:
                phase = self._row(session).phase
            if phase in ("rostered", "computing"):
                member = state.missing[0] if state.code == "roster" and state.missing else ""
                self._roster_ended("declined" if state.code == "roster" else "lapsed", member)
            if self._world.clock() >= self._agreement.expires_ms:
                # Nothing can be started any more, and the enclave has another use.
                self.lose("expired")
                return
            self._keep_joins(set(state.joined))
            self._relay_joins()
            self._ask_kms()
        else:
            if state.roster:
                self._rostered(state.roster)
            if state.phase == "rostered":
                self._relay_consents(set(state.missing))
            else:
                self._computing()
                self._follow(None, None)

    def _rostered(self, cose: bytes) -> None:
        roster = Roster.from_bytes(payload_unverified(cose))
        with self._write() as session:
            row = self._row(session)
            if row.roster == roster.digest or row.phase not in LIVE:
                return
            now = self._world.clock()
            if row.roster is not None:
                session.get_one(RosterRow, row.roster).ended = "lapsed"
            session.add(
                RosterRow(
                    digest=roster.digest, number=self._number, cose=cose, expires_ms=roster.expires_at, issued_ms=now
                )
            )
            row.roster, row.phase = roster.digest, "rostered"
            self._happened(session, "rostered")
        log.info("rostered", session=log.short(self._session))

    def _roster_ended(self, why: str, member: str) -> None:
        with self._write() as session:
            row = self._row(session)
            if row.phase not in ("rostered", "computing") or row.roster is None:
                return
            session.get_one(RosterRow, row.roster).ended = why
            # Their one-time keys are used up: each party joins again, without another upload.
            session.execute(delete(JoinRow).where(JoinRow.number == self._number))
            row.phase, row.roster, row.start = "open", None, None
            self._happened(session, why, member=member)
        log.info("roster-ended", session=log.short(self._session), why=why)

    def _computing(self) -> None:
        with self._lock, self._write() as session:
            row = self._row(session)
            if row.phase != "rostered":
                return
            row.phase = "computing"
            self._happened(session, "computing")

    def _keep_joins(self, joined: set[str]) -> None:
        with self._world.store.read() as session:
            rows = self._joins(session, admitted=True)
        gone = [row.digest for row in rows if row.party not in joined and row.digest not in self._joining]
        if gone:
            with self._write() as session:
                session.execute(delete(JoinRow).where(JoinRow.number == self._number, JoinRow.digest.in_(gone)))

    def _relay_joins(self) -> None:
        with self._world.store.read() as session:
            rows = [row for row in self._joins(session, admitted=False) if row.digest not in self._joining]
        for row in rows:
            outcome: Future[tuple[bytes, str]] = Future()
            self._joining[row.digest] = outcome
            join = Join.from_bytes(payload_unverified(row.cose))
            threading.Thread(target=self._relay_join_again, args=(join, row.cose, outcome), daemon=True).start()

    def _relay_join_again(self, join: Join, cose: bytes, outcome: Future[tuple[bytes, str]]) -> None:
        self._relay_join(join, cose, outcome)
        if (error := outcome.exception()) is not None:
            log.warning("join-not-relayed", session=log.short(self._session), error=type(error).__name__)

    def _relay_join(self, join: Join, cose: bytes, outcome: Future[tuple[bytes, str]]) -> None:
        """Fills `outcome`, whatever happens: others wait for it."""
        try:
            result = self._judge(join, cose)
        except BaseException as error:
            with self._lock:
                self._joining.pop(join.digest, None)
            outcome.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            outcome.set_result(result)

    def _judge(self, join: Join, cose: bytes) -> tuple[bytes, str]:
        with self._world.store.read() as session:
            uploads = self._uploads(session, join)
        request = enclave_pb2.Ask(
            join=enclave_pb2.Join(
                session=self._session,
                cose=cose,
                uploads=[enclave_pb2.SignedUpload(cose=row.cose, blob=row.number) for row in uploads],
            )
        )
        end = time.monotonic() + self._world.deadlines.join_s
        told = _Steps(lambda percent: self._progress(join.party, percent))
        while True:
            try:
                answer = self._ask(request, end - time.monotonic(), told)
                return self._judged(join, cose, answer.joined.receipt, "")
            except RefusedError as error:
                if error.code in ADMISSION:
                    return self._judged(join, cose, b"", error.code)
                if error.code != "busy" or time.monotonic() > end:
                    self._forget_join(join)
                    raise
            except UnavailableError:
                # The same join again is answered by the same receipt; a lost enclave ends this session.
                self._gone_or(end)
            if self._over.wait(RETRY_S):
                raise self._ended_error()

    def _ended_error(self) -> ParleyError:
        if self._closing:
            return UnavailableError("the coordinator is stopping; what was sent is stored")
        return RefusedError("lost")

    # Joins by KMS

    def _ask_kms(self) -> None:
        """Begins each KMS join that stands and was not tried in this session, in a thread of its own (kms-13)."""
        if not self._agreement.kms or self._world.kms is None:
            return
        with self._world.store.read() as session:
            rows = [
                row
                for row in session.scalars(select(KmsJoinRow).where(KmsJoinRow.agreement == self._agreement.digest))
                if row.digest not in self._joining and self._kms_wanted(session, row)
            ]
        now = time.monotonic()
        for row in rows:
            if self._kms_later.get(row.digest, (0.0, 0))[0] > now:
                continue
            self._joining[row.digest] = Future()
            join = KmsJoin.from_bytes(payload_unverified(row.cose))
            threading.Thread(
                target=self._join_by_kms, args=(join, row.cose), name=f"kms-{self._number}", daemon=True
            ).start()

    def _kms_wanted(self, session: Session, row: KmsJoinRow) -> bool:
        """Not where it was judged already, nor where the party has joined this session itself."""
        ours = session.scalars(select(JoinRow).where(JoinRow.number == self._number, JoinRow.party == row.party))
        return all(join.digest != row.digest and (join.code != "" or is_kms(join.cose)) for join in ours)

    def _join_by_kms(self, join: KmsJoin, cose: bytes) -> None:
        outcome = self._joining[join.digest]
        try:
            outcome.set_result(self._judge_by_kms(join, cose))
            self._kms_later.pop(join.digest, None)
        except (UnavailableError, RefusedError, MalformedError) as error:
            outcome.set_exception(error)
            log.warning("kms-join-waits", session=log.short(self._session), code=error.code)
            self._kms_again(join, getattr(error, "retry_after_ms", None))
        except Exception as error:  # noqa: BLE001  # a thread that dies silently would leave the join under way for ever
            outcome.set_exception(error)
            log.fault("kms-join-failed", session=log.short(self._session))
            self._kms_again(join, None)
        finally:
            with self._lock:
                self._joining.pop(join.digest, None)

    def _kms_again(self, join: KmsJoin, after_ms: int | None) -> None:
        _, times = self._kms_later.get(join.digest, (0.0, 0))
        pause = max((after_ms or 0) / 1000, min(KMS_PAUSE_S * 2**times, KMS_PAUSE_MOST_S))
        # Sessions that KMS throttled together do not come again together.
        pause *= 1 + secrets.randbelow(1000) / 2000
        self._kms_later[join.digest] = (time.monotonic() + pause, min(times + 1, 16))

    def _judge_by_kms(self, join: KmsJoin, cose: bytes) -> tuple[bytes, str]:
        assert self._world.kms is not None
        told = _Steps(lambda percent: self._progress(join.party, percent))
        try:
            with self._world.store.read() as session:
                uploads = [
                    enclave_pb2.SignedUpload(cose=row.cose, blob=row.number) for row in self._uploads(session, join)
                ]
            asked = self._ask(
                enclave_pb2.Ask(recipient=enclave_pb2.Recipient(session=self._session, cose=cose, uploads=uploads))
            )
            if asked.WhichOneof("op") == "joined":
                return self._judged(join, cose, asked.joined.receipt, "")
            answer = self._world.kms.decrypt(
                self._agreement.kms[join.party],
                join.ciphertext,
                kms_context(join.agreement, join.party, join.uploads),
                asked.recipient.document,
            )
            request = enclave_pb2.KmsJoin(session=self._session, cose=cose, uploads=uploads, answer=answer)
            try:
                joined = self._ask(enclave_pb2.Ask(kms_join=request), self._world.deadlines.join_s, told)
            except RefusedError as error:
                unopened = self._kms_unopened.get(join.digest, 0)
                if error.code != "key" or unopened >= KMS_UNOPENED:
                    raise
                self._kms_unopened[join.digest] = unopened + 1
                raise UnavailableError("the answer of KMS did not open") from None
            return self._judged(join, cose, joined.joined.receipt, "")
        except RefusedError as error:
            # An upload that is gone does not come back: the party has to know.
            if error.code in ADMISSION or error.code in ("revoked", "unknown-upload"):
                return self._judged(join, cose, b"", error.code)
            raise

    def _judged(self, join: AnyJoin, cose: bytes, receipt: bytes, code: str) -> tuple[bytes, str]:
        with self._changing():
            self._joining.pop(join.digest, None)
            with self._write() as session:
                if self._row(session).phase in LIVE:
                    row = session.get(JoinRow, (self._number, join.digest)) or self._add_join(session, join, cose)
                    row.receipt, row.code = receipt or None, code
                    self._happened(session, "refused" if code else "joined", member=join.party, code=code)
        log.info("joined", session=log.short(self._session), code=code)
        return receipt, code

    def _make_place(self, session: Session, join: Join) -> None:
        """A party's new join ends those of it that wait to be relayed: one that came later would take the new one's place."""
        ours = (JoinRow.number == self._number, JoinRow.party == join.party)
        waiting = (JoinRow.receipt.is_(None), JoinRow.code == "", JoinRow.digest.not_in(list(self._joining)))
        session.execute(delete(JoinRow).where(*ours, *waiting))
        if (session.scalar(select(func.count()).select_from(JoinRow).where(*ours)) or 0) >= JOINS_PER_PARTY:
            raise RefusedError("quota", "as many joins as a party may make before a roster")

    def _add_join(self, session: Session, join: AnyJoin, cose: bytes) -> JoinRow:
        row = JoinRow(
            number=self._number,
            digest=join.digest,
            party=join.party,
            cose=cose,
            receipt=None,
            code="",
            at_ms=self._world.clock(),
        )
        session.add(row)
        return row

    def _forget_join(self, join: Join) -> None:
        with self._write() as session:
            row = session.get(JoinRow, (self._number, join.digest))
            if row is not None and row.receipt is None:
                session.delete(row)

    # Consent and release

    def _store_consent(
        self,
        session: Session,
        roster: bytes,
        statement: Countersignature,
        cose: bytes,
        former: coordinator_pb2.PutCountersignatureRequest,
    ) -> bool:
        """Whether the same consent was there before."""
        row = session.get(CountersignatureRow, (roster, statement.party))
        if row is not None:
            if payload_unverified(row.cose) != statement.to_bytes():
                raise RefusedError("conflict", "the party has countersigned this roster in another way")
            return True
        proofs = coordinator_pb2.PutCountersignatureRequest(former=former.former).SerializeToString(deterministic=True)
        session.add(
            CountersignatureRow(
                roster=roster, party=statement.party, cose=cose, former=proofs, at_ms=self._world.clock()
            )
        )
        session.flush()
        self._happened(session, "countersigned", member=statement.party)
        return False

    def _relay_consents(self, missing: set[str]) -> None:
        with self._world.store.read() as session:
            row = self._row(session)
            if row.roster is None:
                return
            stored = [consent.party for consent in self._consents(session, row.roster)]
        for party in stored:
            if party in missing:
                try:
                    self._relay_consent(party)
                except (RefusedError, UnavailableError) as error:
                    log.warning("consent-not-relayed", session=log.short(self._session), code=error.code)

    def _relay_consent(self, party: str) -> None:
        """Relays one that is stored; where the enclave refuses it, it is forgotten. A broken channel is tried later."""
        request = self._consent(party)
        if request is None:
            return
        if self._is_last(party):
            self._follow(party, None)
            return
        try:
            self._ask(request)
        except RefusedError as error:
            self._drop_consent(party, error.code)
            raise
        except UnavailableError as error:
            log.warning("consent-waits", session=log.short(self._session), code=error.code)

    def _is_last(self, party: str) -> bool:
        with self._world.store.read() as session:
            row = self._row(session)
            return row.roster is not None and not self._missing(session, self._roster(session, row)[1]) and bool(party)

    def _consent(self, party: str | None) -> enclave_pb2.Ask | None:
        """The request whose answer is the release: a countersignature of the standing roster (`party`'s, or any)."""
        with self._world.store.read() as session:
            row = self._row(session)
            if row.roster is None:
                return None
            if not needs_countersignatures(self._agreement):
                return enclave_pb2.Ask(start=enclave_pb2.Start(session=self._session, cose=row.start or b""))
            consents = {consent.party: consent for consent in self._consents(session, row.roster)}
        consent = consents.get(party) if party is not None else next(iter(consents.values()), None)
        if consent is None:
            return None
        proofs = coordinator_pb2.PutCountersignatureRequest.FromString(consent.former).former
        return enclave_pb2.Ask(
            countersign=enclave_pb2.Countersign(
                session=self._session,
                cose=consent.cose,
                former=[
                    enclave_pb2.FormerRoster(offer=proof.offer, document=proof.document, cose=proof.cose)
                    for proof in proofs
                ],
            )
        )

    def _drop_consent(self, party: str, code: str) -> None:
        with self._write() as session:
            row = self._row(session)
            if row.phase == "rostered" and row.roster is not None:
                session.execute(
                    delete(CountersignatureRow).where(
                        CountersignatureRow.roster == row.roster, CountersignatureRow.party == party
                    )
                )
                self._happened(session, "refused", member=party, code=code)

    def _follow(self, party: str | None, outcome: Future[None] | None) -> None:
        """Waits in a thread of its own for the release; one at a time."""
        with self._lock:
            if self._over.is_set() or (self._follower is not None and self._follower.is_alive()):
                if outcome is not None:
                    outcome.set_result(None)
                return
            self._follower = threading.Thread(
                target=self._await_release,
                args=(party, outcome or Future()),
                name=f"follow-{self._number}",
                daemon=True,
            )
            self._follower.start()

    def _await_release(self, party: str | None, outcome: Future[None]) -> None:
        def told(percent: int) -> None:
            self._computing()
            if not outcome.done():
                outcome.set_result(None)
            self.percent = percent
            steps(percent)

        steps = _Steps(lambda percent: self._progress("", percent))
        try:
            request = self._consent(party)
            if request is None:
                log.warning("nothing-to-follow", session=log.short(self._session))
                return
            answer = self._ask(request, self._world.deadlines.compute_s, told)
            if answer.WhichOneof("op") == "released":
                self._computing()
                self._release(answer.released)
        except RefusedError as error:
            # Before the computation it is the consent that was refused; after it the monitor learns why.
            log.warning("consent-refused", session=log.short(self._session), code=error.code)
            if party is not None:
                self._drop_consent(party, error.code)
            if not outcome.done():
                outcome.set_exception(error)
        except UnavailableError as error:
            # The monitor follows again, or finds that the enclave is lost.
            log.warning("release-waits", session=log.short(self._session), code=error.code)
        except Exception:  # noqa: BLE001  # a thread that dies silently would leave the session computing for ever
            log.fault("release-failed", session=log.short(self._session))
        finally:
            if not outcome.done():
                outcome.set_result(None)

    def _release(self, released: enclave_pb2.Released) -> None:
        record = Record.from_bytes(payload_unverified(released.cose))
        with self._lock:
            if self._over.is_set():
                return
            bundle = self._bundle(released)
            size = self._world.blobs.put(bundle_name(self._session), _pieces(bundle))
            with self._write() as session:
                self._add_release(session, record, released, size)
            self.percent = 100
            telemetry.count("parley_sessions_ended_total", code=telemetry.OK)
            log.info("released", session=log.short(self._session), size=log.coarse(size))
            tell_stored(self._world, self._lease, self._handle)
            self._finish()

    def _add_release(self, session: Session, record: Record, released: enclave_pb2.Released, size: int) -> None:
        row = self._row(session)
        if row.phase == "released":
            # It was stored before, and the answer of the database was lost.
            return
        now = self._world.clock()
        row.phase, row.ended_ms = "released", now
        session.add(
            RecordRow(
                head=record.head,
                series=row.series,
                sequence=record.body.sequence,
                previous=record.body.previous,
                agreement=row.agreement,
                number=row.number,
                cose=released.cose,
                document=released.document,
                at_ms=now,
            )
        )
        session.add(BundleRow(number=row.number, size=size, at_ms=now))
        self._happened(session, "released", percent=100)

    def _bundle(self, released: enclave_pb2.Released) -> bytes:
        with self._world.store.read() as session:
            row = self._row(session)
            versions = db.lineage(session, session.get_one(AgreementRow, row.agreement))
            lineage = tuple(BundledAgreement.of(signed(session, version)) for version in versions)
            roster_row, roster = self._roster(session, row)
            consents = {consent.party: consent.cose for consent in self._consents(session, roster_row.digest)}
            assert row.offer is not None and row.document is not None
            return Bundle(
                lineage=lineage,
                offer=row.offer,
                offer_document=row.document,
                roster=roster_row.cose,
                countersignatures=tuple(consents[entry.party] for entry in roster.included if entry.party in consents),
                record=released.cose,
                record_document=released.document,
                sealed=tuple(BundledOutput(item.output, item.recipient, item.sealed) for item in released.outputs),
                opened=(),
            ).to_bytes()

    def lose(self, code: str) -> None:
        """The session is over without a release: its members join another one, with the uploads that are here (crd-17)."""
        with self._lock:
            lose(self._world, self._lease, code)
            self._world.launcher.stop(self._handle)
            self._finish()

    def _finish(self) -> None:
        self._over.set()
        self._frames.close()
        self._ended(self._number)

    # The enclave and the store

    def _watch(self) -> None:
        while not self._over.wait(self._world.deadlines.status_s):
            self._glance()

    def _glance(self) -> None:
        try:
            self.tick()
        except UnavailableError as error:
            # The database is away, or another coordinator has the session: then this one is let go of soon.
            log.warning("monitor-waits", session=log.short(self._session), error=type(error).__name__)
        except Exception:  # noqa: BLE001  # the monitor must go on: nobody else would notice a lost enclave
            log.fault("monitor-failed", session=log.short(self._session))

    def _ask(
        self, request: enclave_pb2.Ask, deadline_s: float | None = None, progress: Callable[[int], None] | None = None
    ) -> enclave_pb2.Answer:
        deadline = self._world.deadlines.short_s if deadline_s is None else max(0.1, deadline_s)
        return self._channel.ask(request, deadline, progress)

    def _lose_if_gone(self) -> None:
        try:
            relay.connect(self._handle.address).close()
        except relay.GoneError as error:
            if self._handle.address.startswith("unix:"):
                self.lose("lost")
            else:
                # Over vsock this is also what a listener says whose queue is full.
                self._lose_if_ended(error)
        except UnavailableError as error:
            self._lose_if_ended(error)

    def _lose_if_ended(self, error: UnavailableError) -> None:
        """What does not answer may be under load, or gone: a vsock whose machine has ended is silent. The launcher knows."""
        if self._world.launcher.alive(self._handle):
            log.warning("enclave-no-status", session=log.short(self._session), code=error.code)
        else:
            self.lose("lost")

    def _gone_or(self, end: float) -> None:
        with self._lock:
            if not self._over.is_set():
                self._lose_if_gone()
        if self._over.is_set():
            raise self._ended_error()
        if time.monotonic() > end:
            raise UnavailableError("the enclave took too long")

    def _settle(self, *phases: str) -> None:
        """Asks the enclave where the store is in none of `phases`: a roster may have lapsed since the last look."""
        with self._world.store.read() as session:
            there = self._row(session).phase in phases
        if not there:
            self.tick()

    def _row(self, session: Session) -> SessionRow:
        return session.get_one(SessionRow, self._number)

    def _require(self, session: Session, *phases: str) -> SessionRow:
        row = self._row(session)
        require(row, *phases)
        return row

    def _roster(self, session: Session, row: SessionRow) -> tuple[RosterRow, Roster]:
        if row.roster is None:
            raise RefusedError("phase", "no roster stands")
        found = session.get_one(RosterRow, row.roster)
        return found, Roster.from_bytes(payload_unverified(found.cose))

    def _missing(self, session: Session, roster: Roster) -> list[str]:
        there = {consent.party for consent in self._consents(session, roster.digest)}
        return [entry.party for entry in roster.included if entry.party not in there]

    def _consents(self, session: Session, roster: bytes) -> list[CountersignatureRow]:
        query = select(CountersignatureRow).where(CountersignatureRow.roster == roster)
        return list(session.scalars(query.order_by(CountersignatureRow.at_ms, CountersignatureRow.party)))

    def _joins(self, session: Session, *, admitted: bool) -> list[JoinRow]:
        rows = session.scalars(select(JoinRow).where(JoinRow.number == self._number))
        if admitted:
            return [row for row in rows if row.receipt is not None]
        return [row for row in rows if row.receipt is None and not row.code]

    def _uploads(self, session: Session, join: AnyJoin) -> list[UploadRow]:
        return uploads_of(session, self._agreement.digest, join)

    def _blob(self, number: int) -> BlobReader | None:
        """A blob of this agreement that is complete: an enclave reads no other agreement's."""
        with self._world.store.read() as session:
            row = session.get(UploadRow, number)
        if row is None or row.agreement != self._agreement.digest or row.complete_ms is None:
            return None
        try:
            reader = self._world.blobs.reader(upload_name(number))
        except FileNotFoundError:
            log.warning("blob-missing", blob=upload_name(number))
            return None
        if reader.size != row.size:
            log.warning("blob-damaged", blob=upload_name(number), error="size")
        return reader

    def _happened(self, session: Session, kind: str, *, member: str = "", code: str = "", percent: int = 0) -> None:
        db.happened(
            session,
            kind,
            self._agreement.digest,
            self._world.clock(),
            of=self._session,
            member=member,
            code=code,
            percent=percent,
        )

    def _progress(self, member: str, percent: int) -> None:
        with self._write() as session:
            self._happened(session, "progress", member=member, percent=percent)


def uploads_of(session: Session, agreement: bytes, join: AnyJoin) -> list[UploadRow]:
    """The uploads that a join names, all of them whole; RefusedError "unknown-upload", "incomplete"."""
    found = []
    for digest in join.uploads:
        row = session.scalar(select(UploadRow).where(UploadRow.digest == digest))
        if row is None or row.agreement != agreement or row.party != join.party:
            raise RefusedError("unknown-upload", "the join names an upload that is not here")
        if row.complete_ms is None:
            raise RefusedError("incomplete", "an upload that the join names lacks bytes")
        found.append(row)
    return found


class _Steps:
    """Passes on percentages in steps."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._last = 0

    def __call__(self, percent: int) -> None:
        if percent >= self._last + PROGRESS_STEP:
            self._last = percent
            self._tell(percent)


def is_kms(cose: bytes) -> bool:
    """Whether a stored join is one by KMS."""
    return isinstance(read_join(payload_unverified(cose)), KmsJoin)


def require(row: SessionRow, *phases: str) -> None:
    """RefusedError where a session is in none of `phases`: "lost" with the code that ended it, else "phase"."""
    if row.phase == "lost" and "lost" not in phases:
        raise RefusedError("lost", f"the enclave of this session is gone ({row.code}); join again")
    if row.phase not in phases:
        raise RefusedError("phase", f"not possible while the session is {row.phase}")


def lose(world: World, lease: Lease, code: str) -> None:
    """Marks a live session as lost; its joins are void, its members' uploads stay. FencedError where it is another's now."""
    number = lease.number
    with world.store.write() as session:
        row = session.get_one(SessionRow, number)
        if row.phase not in LIVE:
            return
        world.leases.check(session, lease)
        row.phase, row.code, row.ended_ms = "lost", code, world.clock()
        session.execute(delete(JoinRow).where(JoinRow.number == number))
        if row.session is not None:
            db.happened(session, "lost", row.agreement, row.ended_ms, of=row.session, code=code)
    telemetry.count("parley_sessions_ended_total", code=code)
    log.warning("lost", number=number, code=code)


def tell_stored(world: World, lease: Lease, handle: EnclaveHandle | None) -> None:
    """Tells an enclave, where it is still there, that its release is stored, and ends it: with it goes what is left of the
    session's keys."""
    if handle is not None:
        with world.store.read() as session:
            row = session.get_one(SessionRow, lease.number)
            record = session.scalar(select(RecordRow).where(RecordRow.number == lease.number))
        assert record is not None and row.session is not None
        stored = enclave_pb2.Stored(session=row.session, record=sha384(payload_unverified(record.cose)))
        try:
            relay.Channel(handle.address).ask(enclave_pb2.Ask(stored=stored), world.deadlines.short_s)
        except ParleyError as error:
            # It is ended anyway; what it would have forgotten goes with its memory.
            log.warning("stored-not-told", session=log.short(row.session), code=error.code)
        world.launcher.stop(handle)
    with world.leases.fenced(lease) as session:
        session.get_one(SessionRow, lease.number).stored_told = True


def begin(world: World, lease: Lease, agreement: AgreementRow, handle: EnclaveHandle, nonce: bytes) -> int:
    """Loads the agreement into an enclave, begins the session and keeps its offer with a document; the serves it wants."""
    number = lease.number
    with world.store.read() as session:
        row = session.get_one(SessionRow, number)
        chain = [
            enclave_pb2.SignedRecord(cose=record.cose, document=record.document)
            for record in db.records(session, row.series)
        ]
    deadline = world.deadlines.short_s
    serves = load(world, agreement, handle)
    request = enclave_pb2.Ask(begin=enclave_pb2.Begin(request=row.begin, chain=chain))
    channel = relay.Channel(handle.address)
    offer_bytes = channel.ask(request, deadline).offered.offer
    offer = Offer.from_bytes(offer_bytes)
    attest = enclave_pb2.Ask(attest=enclave_pb2.Attest(session=offer.session, nonce=nonce))
    document = channel.ask(attest, deadline).attested.document
    with world.leases.fenced(lease) as session:
        row = session.get_one(SessionRow, number)
        # It is open already where the database's answer to an earlier attempt was lost.
        if (row.phase, row.offer, row.enclave) != ("open", offer_bytes, handle.id):
            require(row, "launching")
            row.session, row.offer, row.document, row.enclave = offer.session, offer_bytes, document, handle.id
            row.phase = "open"
            row.deadline_ms = offer.made_at + parsed(agreement.canonical).session.deadline_ms
            db.happened(session, "opened", row.agreement, world.clock(), of=offer.session)
    log.info("opened", session=log.short(offer.session), enclave=handle.id)
    return serves


def load(world: World, agreement: AgreementRow, handle: EnclaveHandle) -> int:
    """Loads an agreement with its ancestors, again without effect; how many Serve connections the enclave wants."""
    with world.store.read() as session:
        versions = [signed(session, version) for version in db.lineage(session, agreement)]
    request = enclave_pb2.Ask(
        load=enclave_pb2.Load(
            agreements=[
                enclave_pb2.SignedAgreement(canonical=version.canonical, signatures=dict(version.signatures))
                for version in versions
            ]
        )
    )
    return relay.Channel(handle.address).ask(request, world.deadlines.short_s).ready.serves


def _pieces(data: bytes) -> list[bytes]:
    step = 8 << 20
    return [data[start : start + step] for start in range(0, len(data), step)]


def _wait(outcome: Future[None], seconds: float) -> BaseException | None:
    try:
        return outcome.exception(timeout=seconds)
    except TimeoutError:
        return None
