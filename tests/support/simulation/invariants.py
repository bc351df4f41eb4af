"""What holds whatever goes wrong: the promises of DESIGN 2 and 5, each with a name, checked after every step of a play.

They are judged from what stands on disks (stores, blobs, members' states, logs), from what crossed the wires, and from what
the kernel says of the processes; nothing is asked of the programs themselves.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from parley.session import NOISE_SHARE
from parley.spool import content_key
from parley.state import SignedRoster, View
from parley_coordinator.blobs import bundle_name, upload_name
from parley_coordinator.status import TABLE
from parley_protocol import framing
from parley_protocol.bundle import Bundle
from parley_protocol.chain import ChainState, verify_chain
from parley_protocol.claims import verify_receipt
from parley_protocol.cose import payload_unverified
from parley_protocol.transcript import (
    GENESIS,
    Countersignature,
    Offer,
    Receipt,
    Record,
    RecordBody,
    Roster,
    Upload,
    kms_share_context,
    noise_share_context,
)
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1 import enclave_pb2 as epb
from support.coordinator import now_ms
from support.simulation.calls import Observed
from support.simulation.plan import KMS_PARTY, NAMES, PARTIES

if TYPE_CHECKING:
    from support.simulation.node import Node
    from support.simulation.stores import Store
    from support.simulation.theatre import Theatre

AWAY: Final = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "UNKNOWN")
"""What a call without an answer ends with. A handler that fails ends with UNKNOWN too, and says so in the log."""
EXPECTED: Final = frozenset(
    (
        "lost",
        "unknown-session",
        "unknown-upload",
        "phase",
        "busy",
        "unavailable",
        "no-capacity",
        "expired",
        "roster",
        "incomplete",
        "state",
        "quorum",
        "file",
    )
)
"""Codes that a member of a session with faults may meet. What is damaged, forged or refused for good has others."""
FORKED: Final = frozenset(("head", "conflict"))
"""And where a host leads its members to two chains or two enclaves."""
WITHDRAWN: Final = frozenset(("revoked", "policy"))
"""And where a party takes the enclaves out of the policy of its key."""
MEMORY_MIB: Final = {"coordinator": 400, "enclave": 250, "worker": 250, "module": 200, "member": 450}
FILES: Final = 512
THREADS: Final = 256


class BrokenError(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Signed:
    """A countersignature that was seen, with its roster."""

    party: str
    statement: Countersignature
    roster: Roster


@dataclass
class _Told:
    """What a store's coordinators have told members to have."""

    uploads: dict[bytes, int] = field(default_factory=dict)
    """Upload to bytes."""
    sessions: set[bytes] = field(default_factory=set)
    consents: set[tuple[bytes, str]] = field(default_factory=set)
    """Roster, party."""
    kms_join: int = 0
    """The number of the greatest one."""

    def add(self, other: _Told) -> None:
        """And what another one says."""
        for upload, stored in other.uploads.items():
            self.uploads[upload] = max(self.uploads.get(upload, 0), stored)
        self.sessions |= other.sessions
        self.consents |= other.consents
        self.kms_join = max(self.kms_join, other.kms_join)


class Invariants:
    """The witness of one play."""

    def __init__(self, theatre: Theatre) -> None:
        self._theatre = theatre
        self._lock = threading.RLock()
        self.codes: Counter[str] = Counter()
        """Codes of calls that failed, with the method."""
        self._problems: list[str] = []
        self._told_at: dict[str, _Told] = defaultdict(_Told)
        """By address of a coordinator."""
        self._told: dict[str, _Told] = defaultdict(_Told)
        """By store."""
        self._leases: dict[tuple[str, int], tuple[int, str]] = {}
        """Store and session to token and holder."""
        self._revoked: list[tuple[float, float]] = []
        """When the enclaves stood in the policy of the key no more: from, to."""
        self._opened: list[float] = []
        """When it was asked for what KMS opened."""
        self._receipts: dict[bytes, Receipt] = {}
        """Join to the receipt that an enclave gave."""
        self._rosters: dict[bytes, Roster] = {}
        self._offers: dict[bytes, Offer] = {}
        self._bodies: dict[tuple[object, ...], bytes] = {}
        self._signed: dict[tuple[str, bytes], Signed] = {}
        self._phases: dict[tuple[str, int], str] = {}
        self._chains: dict[str, list[bytes]] = defaultdict(list)
        self._kept: dict[str, set[bytes]] = defaultdict(set)
        self._crossed: list[bytes] = []
        self._secrets: dict[bytes, str] = {}
        self._names: list[tuple[str, Callable[[], Iterator[str]]]] = [
            ("stored: what was told to be stored is stored", self._check_stored),
            ("receipts: what an enclave acknowledged is kept, and rosters list just that", self._check_receipts),
            ("chain: records follow each other, and none goes", self._check_chain),
            ("charge: each distinct roster that was signed is charged, and once", self._check_charge),
            ("repeat: the same inputs under the same head make the same record body", lambda: iter(())),
            ("once: a one-time key signs one roster, and is gone before that is sent", self._check_once),
            ("named: who signs two rosters under one head names the first, and does it by hand where inputs differ",
             self._check_named),
            ("one-join: no two sessions under one head are joined that are neither lost nor released", self._check_joins),
            ("phases: a session that has ended has ended", self._check_phases),
            ("one-end: a session has one end, and one record where that is a release", self._check_ends),
            ("leases: whoever takes a session over counts its token up, and none goes back", self._check_leases),
            ("revoked: a key that was closed opens nothing", self._check_revoked),
            ("codes: members see documented codes, those that such faults have", self._check_codes),
            ("faults: no program says that it is wrong", self._check_faults),
            ("bounded: memory, files and threads of all processes", self._check_bounded),
        ]  # fmt: skip

    # What is seen

    def observe(self, observed: Observed) -> None:
        """A call of a member ended."""
        try:
            with self._lock:
                self._observe(observed)
        except Exception as error:  # it is in a thread of the proxy: the next check tells
            self._problems.append(f"witness: {observed.method}: {type(error).__name__}: {error}")

    def _observe(self, observed: Observed) -> None:
        if observed.code and observed.status != "CANCELLED":
            self.codes[observed.code] += 1
            known = TABLE.get(observed.code)
            if observed.code == "unanswered":
                if observed.status not in AWAY:
                    self._problems.append(f"codes: {observed.method} ended with {observed.status} and no code")
            elif known is None or (observed.status not in ("UNAUTHENTICATED", known.status.name)):
                self._problems.append(f"codes: {observed.method} ended with {observed.status} and {observed.code}")
            elif observed.code == "internal":
                self._problems.append(f"codes: {observed.method} of {observed.member} ended with {observed.code}")
        if observed.method != "Upload":
            self._crossed.extend(observed.requests + observed.replies)
        match observed.method:
            case "Upload" | "GetUpload" if observed.replies:
                state = pb.UploadState.FromString(observed.replies[-1])
                upload = self._upload_of(observed)
                if upload:
                    uploads = self._told_at[observed.node].uploads
                    before = uploads.get(upload, 0)
                    if state.stored < before and observed.delivered and observed.method == "Upload":
                        self._problems.append(f"stored: {state.stored} bytes told after {before}")
                    uploads[upload] = max(before, state.stored)
            case "Attest" if observed.replies:
                offer = Offer.from_bytes(pb.AttestReply.FromString(observed.replies[0]).offer)
                self._offers[offer.digest] = offer
            case "PutCountersignature":
                request = pb.PutCountersignatureRequest.FromString(observed.requests[0]) if observed.requests else None
                if request is not None:
                    for former in request.former:
                        self._roster(former.cose)
                    self._countersigned(request.cose)
                    if observed.replies:
                        statement = Countersignature.from_bytes(payload_unverified(request.cose))
                        self._told_at[observed.node].consents.add((statement.roster, statement.party))
            case "OpenSession" if observed.replies:
                if opened := pb.SessionState.FromString(observed.replies[0]).session:
                    self._told_at[observed.node].sessions.add(opened)
            case "PutKmsJoin" if observed.replies:
                told = self._told_at[observed.node]
                told.kms_join = max(told.kms_join, pb.KmsJoinState.FromString(observed.replies[0]).number)
            case "Start" | "GetRoster" if observed.replies:
                self._roster(pb.RosterReply.FromString(observed.replies[0]).cose)

    @staticmethod
    def _upload_of(observed: Observed) -> bytes:
        if not observed.requests:
            return b""
        if observed.method == "GetUpload":
            return pb.UploadRef.FromString(observed.requests[0]).upload
        cose = pb.UploadRequest.FromString(observed.requests[0]).begin.cose
        return Upload.from_bytes(payload_unverified(cose)).digest

    def saw(self, op: str, frame: bytes, answered: bool) -> None:
        """Something crossed between a coordinator and an enclave."""
        with self._lock:
            self._crossed.append(frame)
            if not answered:
                return
            try:
                self._answered(op, epb.Answer.FromString(frame[framing.HEADER_BYTES :]))
            except Exception as error:  # it is in a thread of the wire: the next check tells
                self._problems.append(f"witness: {op}: {type(error).__name__}: {error}")

    def _answered(self, op: str, answer: epb.Answer) -> None:
        match answer.WhichOneof("op"):
            case "joined":
                receipt = Receipt.from_bytes(payload_unverified(answer.joined.receipt))
                self._receipts[receipt.join] = receipt
            case "rostered":
                self._roster(answer.rostered.cose)
            case "released":
                self._body(Record.from_bytes(payload_unverified(answer.released.cose)).body)

    def _roster(self, cose: bytes) -> Roster:
        roster = Roster.from_bytes(payload_unverified(cose))
        self._rosters[roster.digest] = roster
        return roster

    def _countersigned(self, cose: bytes) -> None:
        statement = Countersignature.from_bytes(payload_unverified(cose))
        roster = self._rosters.get(statement.roster)
        if roster is not None:
            self._sign(Signed(statement.party, statement, roster))

    def _sign(self, signed: Signed) -> None:
        entry = signed.roster.entry(signed.party)
        if entry is None:
            self._problems.append(f"once: {signed.party} signed a roster that leaves it out")
            return
        before = self._signed.setdefault((signed.party, entry.roster_key), signed)
        if before.statement.roster != signed.statement.roster or before.statement.former != signed.statement.former:
            self._problems.append(f"once: {signed.party} signed two rosters with one key")

    def _body(self, body: RecordBody) -> None:
        key = (body.agreement, body.previous, body.inputs, body.absentees, body.charged)
        before = self._bodies.setdefault(key, body.to_bytes())
        if before != body.to_bytes():
            self._problems.append("repeat: the same inputs under the same head made two record bodies")

    def asked(self, operation: str, came: float, request: bytes, status: int, answer: bytes) -> None:
        """A coordinator asked KMS, at a time of the monotonic clock."""
        with self._lock:
            self._crossed += [request, answer]
            if operation == "Decrypt" and status == 200:
                self._opened.append(came)

    def revoked(self, *, taken: bool) -> None:
        """The enclaves are out of the key's policy from now on; or will be back from now on."""
        now = time.monotonic()
        with self._lock:
            if taken:
                self._revoked.append((now, float("inf")))
            elif self._revoked:
                self._revoked[-1] = (self._revoked[-1][0], min(now, self._revoked[-1][1]))

    def continues(self, before: Node, after: Node) -> None:
        """`after` has the whole store of `before`, which has ended."""
        with self._lock:
            old, new = before.store.label, after.store.label
            self._merge()
            self._told[new].add(self._told[old])
            self._chains[new] = list(self._chains[old])
            self._phases |= {(new, number): phase for (of, number), phase in self._phases.items() if of == old}
            self._leases |= {(new, number): lease for (of, number), lease in self._leases.items() if of == old}

    def forks(self, honest: Node, second: Node) -> None:
        """`second` has a store that was taken from `honest`: it owes nothing but what stands in it."""
        with self._lock:
            self._chains[second.store.label] = [head for head, *_ in _records(honest.store)]

    def _merge(self) -> None:
        for node in self._theatre.nodes:
            for address in node.addresses:
                if (told := self._told_at.pop(address, None)) is not None:
                    self._told[node.store.label].add(told)

    # Checks

    def check(self, when: str) -> None:
        """All that can be looked at while the play goes on; BrokenError names the invariant."""
        for name, holds in self._names:
            for problem in self._twice(holds):
                raise BrokenError(f"{name}: {problem} ({when})")
        with self._lock:
            if self._problems:
                raise BrokenError(f"{self._problems[0]} ({when})")

    def glance(self) -> None:
        """Whose sessions are, between two checks: what is wrong is told by the next one."""
        with suppress(OSError), self._lock:  # the database may be down
            self._problems += [f"leases: {problem}" for problem in self._check_leases()]

    def _twice(self, holds: Callable[[], Iterator[str]]) -> list[str]:
        # Files are looked at while they change: what is only half done is done a moment later.
        problems: list[str] = []
        for _ in range(3):
            try:
                problems = list(holds())
            except (OSError, KeyError) as error:
                problems = [f"{type(error).__name__}: {error}"]
            if not problems:
                return []
            time.sleep(0.2)
        return problems

    def check_end(self) -> None:
        """The releases, and that no secret of a member has ever been where the host is."""
        for name, holds in (
            ("release: members hold the release of a session in which nothing failed", self._check_releases),
            ("blind: the host holds no plaintext key", self._check_blind),
            ("blobs: stored bytes are those that were sealed", self._check_blobs),
        ):
            for problem in holds():
                raise BrokenError(f"{name}: {problem} (at the end)")

    @property
    def _stores(self) -> list[Store]:
        return self._theatre.stores

    def _check_stored(self) -> Iterator[str]:
        store = self._theatre.node.store
        with self._lock:
            self._merge()
            told = _Told()
            told.add(self._told[store.label])
        query = "SELECT digest, number, stored, size, state, complete_ms FROM uploads"
        rows = {digest: rest for digest, *rest in store.rows(query)}
        for upload, stored in told.uploads.items():
            if upload not in rows or rows[upload][1] < stored:
                yield f"{stored} bytes of {upload.hex()[:8]} were told, there are {rows.get(upload, (0, 0))[1]}"
            elif stored:
                number, there, size, state, complete_ms = rows[upload]
                lacks = store.lacks(number, there, size, state, complete=complete_ms is not None)
                if lacks:
                    yield f"of {upload.hex()[:8]} {stored} bytes were told: {lacks}"
        known = {session for (session,) in store.rows("SELECT session FROM sessions")}
        for session in told.sessions - known:
            yield f"session {session.hex()[:8]} was told to be open"
        for roster, party in told.consents:
            here = store.rows("SELECT 1 FROM countersignatures WHERE roster = ? AND party = ?", roster, party)
            # The enclave may refuse it after all; then the party is told.
            if not here and not store.rows("SELECT 1 FROM events WHERE kind = 'refused' AND member = ?", party):
                yield f"the consent of {party} to roster {roster.hex()[:8]} was told to be there"
        if told.kms_join and store.rows("SELECT 1 FROM kms_joins WHERE number >= ?", told.kms_join) == []:
            yield f"the KMS join {told.kms_join} was told to be there"

    def _check_blobs(self) -> Iterator[str]:
        for store in self._stores:
            query = "SELECT number, digest, party, stored, complete_ms FROM uploads"
            for number, digest, party, stored, complete_ms in store.rows(query):
                if not stored or (complete_ms is None and self._theatre.shared is not None):
                    continue  # of a bucket no object is there before all of it is
                sealed = (self._theatre.member(party).state.spool / digest.hex() / "blob").read_bytes()
                if store.blob(upload_name(number))[:stored] != sealed[:stored]:
                    yield f"upload {digest.hex()[:8]} at {store.label}"

    def _check_receipts(self) -> Iterator[str]:
        for name in PARTIES:
            state = self._theatre.member(name).state
            kept = {receipt.receipt.digest for receipt in state.receipts()}
            if not self._kept[name] <= kept:
                yield f"{name} has lost a receipt"
            self._kept[name] = kept
            for joined in state.sessions():
                if joined.receipt_cose:
                    verify_receipt(joined.receipt_cose, Offer.from_bytes(joined.offer), joined.join)
        with self._lock:
            rosters, receipts = list(self._rosters.values()), dict(self._receipts)
        for roster in rosters:
            for entry in roster.included:
                receipt = receipts.get(entry.join)
                if receipt is None or receipt.uploads != entry.uploads:
                    yield f"a roster lists a join of {entry.party} that has no such receipt"

    def _check_chain(self) -> Iterator[str]:
        for store in self._stores:
            records = _records(store)
            heads = [head for head, *_ in records]
            known = self._chains[store.label]
            if heads[: len(known)] != known:
                yield f"records of {store.label} have gone"
            if len(heads) > len(known):
                chain = verify_chain(
                    [(cose, document) for _, cose, document in records], [self._theatre.agreement], now_ms=now_ms()
                )
                if chain.head != heads[-1]:
                    yield f"the chain of {store.label} does not end with its last record"
                self._chains[store.label] = heads
        known_heads = self._heads()
        for name in NAMES:
            series = self._theatre.member(name).state.series(self._theatre.agreement.series)
            if series is None or series.head not in known_heads:
                yield f"{name} knows a head that no coordinator has"

    def _check_charge(self) -> Iterator[str]:
        for store in self._stores:
            query = (
                "SELECT session FROM bundles JOIN sessions USING (number) JOIN records USING (number) ORDER BY sequence"
            )
            chain = ChainState()
            for (session,) in store.rows(query):
                bundle = Bundle.from_bytes(store.blob(bundle_name(session)))
                body = Record.from_bytes(payload_unverified(bundle.record)).body
                with self._lock:
                    self._body(body)
                    roster = self._roster(bundle.roster)
                    former: set[bytes] = set()
                    for cose in bundle.countersignatures:
                        self._countersigned(cose)
                        for digest in Countersignature.from_bytes(payload_unverified(cose)).former:
                            former.add(self._rosters[digest].inputs_digest)
                charge = 1 + len(former - {roster.inputs_digest})
                if body.charged - chain.charged != charge:
                    yield f"{store.label}: {body.charged - chain.charged} charged where {charge} were signed"
                chain = replace(chain, charged=body.charged)

    def _check_once(self) -> Iterator[str]:
        for name in PARTIES:
            state = self._theatre.member(name).state
            for head in self._heads():
                for signed in state.signed_rosters(head):
                    with self._lock:
                        self._rosters[signed.roster.digest] = signed.roster
                        self._countersigned(signed.countersignature)
                    entry = signed.roster.entry(name)
                    joined = state.joined(signed.session)
                    sent = self._was_sent(name, signed)
                    if entry is not None and sent and joined is not None and state.has_roster_key(entry.roster_key):
                        yield f"{name} sent a signature and has its one-time key still"

    def _was_sent(self, name: str, signed: SignedRoster) -> bool:
        query = "SELECT count(*) FROM countersignatures WHERE party = ? AND roster = ?"
        return any(store.rows(query, name, signed.roster.digest) != [(0,)] for store in self._stores)

    def _heads(self) -> set[bytes]:
        return {GENESIS, *(head for store in self._stores for head in self._chains[store.label])}

    def _check_named(self) -> Iterator[str]:
        for name in PARTIES:
            state = self._theatre.member(name).state
            by_hand = {bytes.fromhex(line[1]) for line in self._theatre.log(name) if line[0] == "by-hand"}
            for head in self._heads():
                before: list[SignedRoster] = []
                for signed in state.signed_rosters(head):
                    statement = Countersignature.from_bytes(payload_unverified(signed.countersignature))
                    if set(statement.former) != {item.roster.digest for item in before}:
                        yield f"{name} signed a roster and did not name those that it signed before"
                    others = {item.roster.inputs_digest for item in before} - {signed.roster.inputs_digest}
                    if others and signed.session not in by_hand:
                        yield f"{name} signed rosters with different inputs without being asked"
                    before.append(signed)

    def _check_joins(self) -> Iterator[str]:
        for name in PARTIES:
            open_under = Counter(
                joined.head for joined in self._theatre.member(name).state.sessions() if joined.view == View.OPEN
            )
            if open_under and max(open_under.values()) > 1:
                yield f"{name} has joined {max(open_under.values())} sessions under one head"

    def _check_phases(self) -> Iterator[str]:
        for store in self._stores:
            live = 0
            for number, phase in store.rows("SELECT number, phase FROM sessions"):
                before = self._phases.get((store.label, number), "")
                if before in ("released", "lost") and phase != before:
                    yield f"session {number} of {store.label} was {before} and is {phase}"
                self._phases[store.label, number] = phase
                live += phase not in ("released", "lost")
            if live > 1:
                yield f"{store.label} has {live} live sessions of one series"

    def _check_ends(self) -> Iterator[str]:
        for store in self._stores:
            query = "SELECT session, count(*) FROM events WHERE kind IN ('released', 'lost') GROUP BY session"
            ends = dict(store.rows(query))
            query = (
                "SELECT s.session, s.phase, count(r.head), count(b.number) FROM sessions s"
                " LEFT JOIN records r ON r.number = s.number LEFT JOIN bundles b ON b.number = s.number"
                " WHERE s.session IS NOT NULL GROUP BY s.session, s.phase"
            )
            for session, phase, records, bundles in store.rows(query):
                over, released = phase in ("released", "lost"), phase == "released"
                found = (ends.get(session, 0), records, bundles)
                if found != (over, released, released):
                    yield f"session {session.hex()[:8]} of {store.label} is {phase} with {found} ends, records, bundles"

    def _check_leases(self) -> Iterator[str]:
        for store in self._stores:
            for number, token, holder in store.rows("SELECT number, token, holder FROM leases"):
                before = self._leases.get((store.label, number), (0, ""))
                if token < before[0] or (token == before[0] and holder != before[1]):
                    yield f"session {number} of {store.label}: {before} became {(token, holder)}"
                self._leases[store.label, number] = (token, holder)

    def _check_revoked(self) -> Iterator[str]:
        with self._lock:
            for start, end in self._revoked:
                if any(start < came < end for came in self._opened):
                    yield "KMS has opened it"

    def _check_codes(self) -> Iterator[str]:
        expected = EXPECTED
        if self._theatre.forked:
            expected |= FORKED
        with self._lock:
            if self._revoked:
                expected |= WITHDRAWN
        for name in NAMES:
            for line in self._theatre.log(name):
                if line[0] == "fault":
                    yield f"{name}'s program failed: {line[1]}"
                elif line[0] == "error" and line[2] not in expected:
                    yield f"{name} met {line[1:]}"

    def _check_faults(self) -> Iterator[str]:
        for node in self._theatre.nodes:
            for line in node.faults:
                yield f"{node.label}: {line[:1000]}"

    def _check_bounded(self) -> Iterator[str]:
        for kind, pid in self._processes():
            found = _sizes(pid)
            if found is None:
                continue
            memory, threads, files = found
            if memory > MEMORY_MIB[kind]:
                yield f"a {kind} has {memory} MiB"
            if threads > THREADS or files > FILES:
                yield f"a {kind} has {threads} threads and {files} files"

    def _processes(self) -> Iterator[tuple[str, int]]:
        for node in self._theatre.nodes:
            if node.process is not None:
                yield "coordinator", node.process.pid
            for kind, pid in (("enclave", node.enclave()), ("module", node.nsm())):
                if pid is not None:
                    yield kind, pid
            for pid in node.workers():
                yield "worker", pid
        for pid in self._theatre.actors.values():
            yield "member", pid

    # At the end

    def _check_releases(self) -> Iterator[str]:
        by_sequence: dict[tuple[bytes, int], set[bytes]] = defaultdict(set)
        for name in NAMES:
            released = [line for line in self._theatre.log(name) if line[0] == "released"]
            if not released:
                yield f"{name} holds none"
            for _, session, body_hex, plaintexts in released:
                body = RecordBody.from_bytes(bytes.fromhex(body_hex))
                by_sequence[bytes.fromhex(session), body.sequence].add(body.to_bytes())
                versions = tuple(
                    self._theatre.stage.uploads[entry.party].index(entry.uploads[0]) for entry in body.inputs
                )
                if [entry.party for entry in body.inputs] != list(PARTIES):
                    yield f"{name}'s release has inputs of {[entry.party for entry in body.inputs]}"
                expected = self._theatre.stage.oracle(versions)
                if [plain for *_, plain in plaintexts] != [plain for *_, plain in expected.plaintexts]:
                    yield f"{name}'s release of {session} has other values than one in which nothing failed"
                if body.previous == GENESIS:
                    if [*map(tuple, plaintexts)] != [*map(tuple, expected.plaintexts)]:
                        yield f"{name}'s release of {session} has other salts than one in which nothing failed"
                    if replace(body, charged=1) != expected.body:
                        yield f"{name}'s release of {session} has another body than one in which nothing failed"
        for (session, _), bodies in by_sequence.items():
            if len(bodies) > 1:
                yield f"members hold different releases of session {session.hex()}"

    def _gather_secrets(self) -> None:
        agreement = self._theatre.agreement
        for name in PARTIES:
            member = self._theatre.member(name)
            state = member.state
            for spooled, _ in state.uploads(agreement.digest, "visits"):
                self._secrets[content_key(spooled, state.vault)] = f"a content key of {name}"
            if self._theatre.kms is not None and name == KMS_PARTY:
                for upload in self._theatre.stage.uploads[name]:
                    context = kms_share_context(agreement.digest, (upload,))
                    self._secrets[member.identity.derive(NOISE_SHARE, context, 32)] = f"a noise share of {name}"
            for head in self._heads():
                share = member.identity.derive(NOISE_SHARE, noise_share_context(agreement.series, head), 32)
                self._secrets[share] = f"a noise share of {name}"
            for path in (state.folder / "roster-keys").glob("[0-9a-f]*"):
                private = state.vault.open(path.read_bytes(), b"roster-key" + bytes.fromhex(path.name))
                self._secrets[private] = f"a one-time key of {name}"

    def _check_blind(self) -> Iterator[str]:
        self._gather_secrets()
        with self._lock:
            crossed = b"\0".join(self._crossed)
        places = {"a wire": crossed}
        for store in self._stores:
            places |= {f"{store.label}: {where}": data for where, data in store.dump()}
        for node in self._theatre.nodes:
            for path in node.folder.rglob("*"):
                if path.is_file() and "tls" not in path.name:
                    places[f"{node.label}: {path.relative_to(node.folder)}"] = path.read_bytes()
        # It would be found: a needle that is there.
        assert hashlib.sha384(self._theatre.agreement.canonical).digest() in crossed
        for secret, what in self._secrets.items():
            forms = (
                secret,
                secret.hex().encode(),
                base64.b64encode(secret)[:40],
                base64.urlsafe_b64encode(secret)[:40],
            )
            for place, data in places.items():
                if any(form in data for form in forms):
                    yield f"{what} in {place}"


def _records(store: Store) -> list[tuple[bytes, bytes, bytes]]:
    return [
        (head, cose, document)
        for head, cose, document in store.rows("SELECT head, cose, document FROM records ORDER BY sequence")
    ]


def _sizes(pid: int) -> tuple[int, int, int] | None:
    """(MiB of its own and its share of what it shares, threads, open files) of a process that lives."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return None
    pss = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    threads = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:")), 0)
    return pss >> 10, threads, files
