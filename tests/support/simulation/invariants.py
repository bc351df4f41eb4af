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
from dataclasses import dataclass, replace
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
    noise_share_context,
)
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1 import enclave_pb2 as epb
from support.coordinator import now_ms
from support.simulation.calls import Observed
from support.simulation.plan import NAMES, PARTIES

if TYPE_CHECKING:
    from support.simulation.node import Node
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


class Invariants:
    """The witness of one play."""

    def __init__(self, theatre: Theatre) -> None:
        self._theatre = theatre
        self._lock = threading.RLock()
        self.codes: Counter[str] = Counter()
        """Codes of calls that failed, with the method."""
        self._problems: list[str] = []
        self._acknowledged: dict[str, dict[bytes, int]] = defaultdict(dict)
        """Address of a coordinator, upload: bytes that it told to have."""
        self._labels: dict[str, str] = {}
        self._stored: dict[str, dict[bytes, int]] = defaultdict(dict)
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
                    before = self._acknowledged[observed.node].get(upload, 0)
                    if state.stored < before and observed.delivered and observed.method == "Upload":
                        self._problems.append(f"stored: {state.stored} bytes told after {before}")
                    self._acknowledged[observed.node][upload] = max(before, state.stored)
            case "Attest" if observed.replies:
                offer = Offer.from_bytes(pb.AttestReply.FromString(observed.replies[0]).offer)
                self._offers[offer.digest] = offer
            case "PutCountersignature":
                request = pb.PutCountersignatureRequest.FromString(observed.requests[0]) if observed.requests else None
                if request is not None:
                    for former in request.former:
                        self._roster(former.cose)
                    self._countersigned(request.cose)
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

    def continues(self, before: Node, after: Node) -> None:
        """`after` has the whole store of `before`, which has ended."""
        with self._lock:
            self._merge(before)
            self._stored[after.label] = dict(self._stored[before.label])
            self._chains[after.label] = list(self._chains[before.label])
            for (label, number), phase in list(self._phases.items()):
                if label == before.label:
                    self._phases[after.label, number] = phase

    def forks(self, honest: Node, second: Node) -> None:
        """`second` has a store that was taken from `honest`: it owes nothing but what stands in it."""
        with self._lock:
            self._chains[second.label] = [head for head, *_ in _records(honest)]

    def _merge(self, node: Node) -> None:
        for address in node.addresses:
            for upload, stored in self._acknowledged.pop(address, {}).items():
                known = self._stored[node.label]
                known[upload] = max(known.get(upload, 0), stored)

    # Checks

    def check(self, when: str) -> None:
        """All that can be looked at while the play goes on; BrokenError names the invariant."""
        for name, holds in self._names:
            for problem in self._twice(holds):
                raise BrokenError(f"{name}: {problem} ({when})")
        with self._lock:
            if self._problems:
                raise BrokenError(f"{self._problems[0]} ({when})")

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
    def _nodes(self) -> list[Node]:
        return [node for node in self._theatre.nodes if (node.folder / "coordinator.db").exists()]

    def _check_stored(self) -> Iterator[str]:
        node = self._theatre.node
        with self._lock:
            self._merge(node)
            told = dict(self._stored[node.label])
        rows = {
            digest: (number, stored)
            for number, digest, stored in node.rows("SELECT number, digest, stored FROM uploads")
        }
        for upload, stored in told.items():
            if upload not in rows or rows[upload][1] < stored:
                yield f"{stored} bytes of {upload.hex()[:8]} were told, there are {rows.get(upload, (0, 0))[1]}"
            elif stored and len(node.blob(upload_name(rows[upload][0]))) < stored:
                yield f"the blob of {upload.hex()[:8]} has fewer bytes than {stored}"

    def _check_blobs(self) -> Iterator[str]:
        for node in self._nodes:
            for number, digest, party, stored in node.rows("SELECT number, digest, party, stored FROM uploads"):
                sealed = (self._theatre.member(party).state.spool / digest.hex() / "blob").read_bytes()
                if stored and node.blob(upload_name(number))[:stored] != sealed[:stored]:
                    yield f"upload {digest.hex()[:8]} at {node.label}"

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
        for node in self._nodes:
            records = _records(node)
            heads = [head for head, *_ in records]
            known = self._chains[node.label]
            if heads[: len(known)] != known:
                yield f"records of {node.label} have gone"
            if len(heads) > len(known):
                chain = verify_chain(
                    [(cose, document) for _, cose, document in records], [self._theatre.agreement], now_ms=now_ms()
                )
                if chain.head != heads[-1]:
                    yield f"the chain of {node.label} does not end with its last record"
                self._chains[node.label] = heads
        known_heads = self._heads()
        for name in NAMES:
            series = self._theatre.member(name).state.series(self._theatre.agreement.series)
            if series is None or series.head not in known_heads:
                yield f"{name} knows a head that no coordinator has"

    def _check_charge(self) -> Iterator[str]:
        for node in self._nodes:
            query = (
                "SELECT session FROM bundles JOIN sessions USING (number) JOIN records USING (number) ORDER BY sequence"
            )
            chain = ChainState()
            for (session,) in node.rows(query):
                bundle = Bundle.from_bytes(node.blob(bundle_name(session)))
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
                    yield f"{node.label}: {body.charged - chain.charged} charged where {charge} were signed"
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
        return any(node.rows(query, name, signed.roster.digest) != [(0,)] for node in self._nodes)

    def _heads(self) -> set[bytes]:
        return {GENESIS, *(head for node in self._nodes for head in self._chains[node.label])}

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
        for node in self._nodes:
            live = 0
            for number, phase in node.rows("SELECT number, phase FROM sessions"):
                before = self._phases.get((node.label, number), "")
                if before in ("released", "lost") and phase != before:
                    yield f"session {number} of {node.label} was {before} and is {phase}"
                self._phases[node.label, number] = phase
                live += phase not in ("released", "lost")
            if live > 1:
                yield f"{node.label} has {live} live sessions of one series"

    def _check_codes(self) -> Iterator[str]:
        expected = EXPECTED | FORKED if self._theatre.forked else EXPECTED
        for name in NAMES:
            for line in self._theatre.log(name):
                if line[0] == "fault":
                    yield f"{name}'s program failed: {line[1]}"
                elif line[0] == "error" and line[2] not in expected:
                    yield f"{name} met {line[1:]}"

    def _check_faults(self) -> Iterator[str]:
        for node in self._nodes:
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
        for node in self._nodes:
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


def _records(node: Node) -> list[tuple[bytes, bytes, bytes]]:
    return [
        (head, cose, document)
        for head, cose, document in node.rows("SELECT head, cose, document FROM records ORDER BY sequence")
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
