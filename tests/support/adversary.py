"""A malicious coordinator that the real client talks to, in front of real enclave processes.

`Relay` is an honest coordinator in this process, with a hook for each operation: a hook sees who asks for what, may ask
the honest side, once, often or never, and answers what it likes. What it ever held, it remembers. The client runs as it
is: `Wire` stands where its transport stands, and everything above is the client's own code.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from parley.connection import Connection
from parley.member import Member
from parley.release import Release
from parley.session import Session
from parley.transport import Transport
from parley_protocol import cose
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.bundle import Bundle, BundledAgreement, BundledOutput
from parley_protocol.errors import ParleyError, RefusedError
from parley_protocol.hpke import SealingKey
from parley_protocol.output import OutputTable
from parley_protocol.transcript import (
    GENESIS,
    Countersignature,
    Join,
    Offer,
    Record,
    Refusal,
    Roster,
    join_info,
)
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1 import enclave_pb2 as epb
from support.attacks import told
from support.enclave import Host, Rows, Simulation, agreement_of, rows_of, until
from support.paperwire import NoEvents


@dataclass
class Call:
    """One call of a member: `op` is the method's name. `honest` gives what an honest coordinator answers."""

    relay: Relay
    member: str
    op: str
    arguments: tuple[Any, ...]

    def honest(self, *arguments: Any) -> Any:
        """The honest answer, to other arguments where they are given."""
        return getattr(self.relay, self.op)(self.member, *(arguments or self.arguments))


Hook = Callable[[Call], Any]
"""What the malicious coordinator answers to a call."""


@dataclass
class Kept:
    """A session as the coordinator knows it."""

    session: bytes
    agreement: bytes
    host: Den
    offer: bytes
    roster: bytes = b""
    consents: dict[str, bytes] = field(default_factory=dict)
    joins: dict[str, bytes] = field(default_factory=dict)
    document: bytes = b""
    bundle: bytes = b""
    lost: str = ""


class Den(Host):
    """A host that remembers the request of the session that it began last."""

    request = b""


class Relay:
    """The coordinator's memory, its enclaves, and its hooks. An operation takes the caller's name first."""

    def __init__(self, *simulations: Simulation) -> None:
        self.simulations = list(simulations)
        self.hosts: list[Den] = []
        self.agreements: dict[bytes, SignedAgreement] = {}
        self.blobs: dict[bytes, tuple[int, bytes, bytes]] = {}
        """Upload digest to the host's number, the signed upload, the bytes."""
        self.sessions: dict[bytes, Kept] = {}
        self.records: dict[bytes, list[tuple[bytes, bytes]]] = {}
        """Series to (record, document), oldest first."""
        self.hooks: dict[str, Hook] = {}
        self.history: list[tuple[Call, Any]] = []
        """Every call, with its answer; None where it was refused."""
        self._offers: list[bytes] = []
        self._rosters: list[bytes] = []
        self._loaded: dict[bytes, list[Den]] = {}

    # What a client calls

    def answer(self, member: str, op: str, *arguments: Any) -> Any:
        """What the coordinator answers, honest or not."""
        call = Call(self, member, op, arguments)
        hook = self.hooks.get(op)
        place = len(self.history)
        self.history.append((call, None))
        reply = call.honest() if hook is None else hook(call)
        self.history[place] = (call, reply)
        return reply

    def offers(self) -> list[bytes]:
        """The offers that enclaves of this relay made."""
        return list(self._offers)

    def rosters(self) -> list[bytes]:
        """The rosters that enclaves of this relay signed."""
        return list(self._rosters)

    def answers(self, op: str) -> list[Any]:
        """What was answered to an operation so far."""
        return [reply for call, reply in self.history if call.op == op]

    # The honest side

    def put_agreement(self, _member: str, canonical: bytes) -> pb.AgreementState:
        signed = SignedAgreement(canonical)
        self.agreements.setdefault(signed.digest, signed)
        return self._state(signed.digest)

    def put_signature(self, _member: str, agreement: bytes, name: str, signature: bytes) -> pb.AgreementState:
        self.agreements[agreement] = self.agreements[agreement].with_signature(name, signature)
        return self._state(agreement)

    def get_agreement(self, _member: str, digest: bytes | None, series: bytes | None) -> pb.AgreementState:
        if digest is None:
            versions = [item.agreement() for item in self.agreements.values() if item.agreement().series == series]
            digest = max(versions, key=lambda item: item.version).digest if versions else b""
        if digest not in self.agreements:
            raise RefusedError("unknown-agreement")
        return self._state(digest)

    def _state(self, digest: bytes) -> pb.AgreementState:
        signed = self.agreements[digest]
        return pb.AgreementState(
            canonical=signed.canonical, signatures=dict(signed.signatures), missing=list(signed.missing())
        )

    def inbox(self, member: str) -> pb.InboxReply:
        live = [kept for kept in self.sessions.values() if not kept.lost and not kept.bundle]
        kind = pb.InboxItem.KIND_JOIN
        items = [
            pb.InboxItem(kind=kind, agreement=kept.agreement, session=kept.session, member=member) for kept in live[-1:]
        ]
        return pb.InboxReply(items=items)

    def lineage(self, digest: bytes) -> list[SignedAgreement]:
        """All versions up to this one, oldest first."""
        found = [self.agreements[digest]]
        while (before := found[0].agreement().replaces) is not None:
            found.insert(0, self.agreements[before])
        return found

    def load(self, digest: bytes, simulation: Simulation | None = None) -> Den:
        """An enclave that has the agreement: the one that has it already, or another where `simulation` is given."""
        known = self._loaded.setdefault(digest, [])
        if known and simulation is None:
            return known[0]
        simulation = simulation or self.simulations[len(self.hosts)]
        host = Den(simulation.path)
        self.hosts.append(host)
        host.load(
            *(
                epb.SignedAgreement(canonical=item.canonical, signatures=dict(item.signatures))
                for item in self.lineage(digest)
            )
        )
        known.append(host)
        return host

    def adopt(self, digest: bytes, host: Den) -> None:
        """Uses an enclave that has the agreement already."""
        self._loaded[digest] = [host]
        self.hosts.append(host)

    def series(self, digest: bytes) -> bytes:
        """The series of an agreement."""
        return self.agreements[digest].agreement().series

    def open_session(self, _member: str, request: bytes, agreement: bytes) -> pb.SessionState:
        live = [kept for kept in self.sessions.values() if not kept.lost and not kept.bundle]
        if live and live[-1].agreement == agreement:
            return self._session(live[-1])
        return self._session(self.begin(agreement, request))

    def begin(
        self,
        agreement: bytes,
        request: bytes | None = None,
        *,
        host: Den | None = None,
        records: list[tuple[bytes, bytes]] | None = None,
    ) -> Kept:
        """Begins a session in an enclave, after these records, or all that there are."""
        host = host or self.load(agreement)
        chain = self.records.setdefault(self.series(agreement), []) if records is None else records
        signed = [epb.SignedRecord(cose=record, document=document) for record, document in chain]
        host.request = request or os.urandom(16)
        offered = host.want("offered", begin=epb.Begin(request=host.request, chain=signed))
        session = Offer.from_bytes(offered.offer).session
        self._offers.append(offered.offer)
        return self.sessions.setdefault(session, Kept(session, agreement, host, offered.offer))

    def kept(self, session: bytes) -> Kept:
        """A session; RefusedError."""
        if session not in self.sessions:
            raise RefusedError("unknown-session")
        return self.sessions[session]

    def get_session(self, _member: str, session: bytes) -> pb.SessionState:
        return self._session(self.kept(session))

    def _session(self, kept: Kept) -> pb.SessionState:
        agreement = self.agreements[kept.agreement].agreement()
        phase = "released" if kept.bundle else "lost" if kept.lost else "rostered" if kept.roster else "open"
        parties = []
        for party in agreement.parties:
            where = "countersigned" if party in kept.consents else "joined" if party in kept.joins else "absent"
            parties.append(pb.PartyState(party=party, phase=where))
        return pb.SessionState(
            session=kept.session, agreement=kept.agreement, phase=phase, parties=parties, code=kept.lost
        )

    def attest(self, _member: str, session: bytes, nonce: bytes) -> pb.AttestReply:
        kept = self.kept(session)
        document = self._good(kept.host.ask(attest=epb.Attest(session=session, nonce=nonce))).attested.document
        kept.document = document
        return pb.AttestReply(offer=kept.offer, document=document)

    def upload(self, _member: str, digest: bytes, signed: bytes, blob: bytes) -> None:
        known = self.blobs.get(digest)
        number = int.from_bytes(os.urandom(6), "big") if known is None else known[0]
        self.blobs[digest] = (number, signed, blob)
        for host in self.hosts:
            host.blobs[number] = blob

    def put_join(self, member: str, session: bytes, signed: bytes) -> pb.JoinReply:
        kept = self.kept(session)
        join = Join.from_bytes(cose.payload_unverified(signed))
        missing = [digest for digest in join.uploads if digest not in self.blobs]
        if missing:
            raise RefusedError("unknown-upload")
        uploads = []
        for digest in join.uploads:
            number, upload, blob = self.blobs[digest]
            kept.host.blobs[number] = blob
            uploads.append(epb.SignedUpload(cose=upload, blob=number))
        answer = kept.host.ask(join=epb.Join(session=session, cose=signed, uploads=uploads))
        if answer.WhichOneof("op") == "failed":
            return pb.JoinReply(code=answer.failed.code)
        kept.joins[join.party] = signed
        return pb.JoinReply(receipt=answer.joined.receipt)

    def start(self, _member: str, session: bytes, signed: bytes) -> pb.RosterReply:
        kept = self.kept(session)
        answer = self._good(kept.host.ask(start=epb.Start(session=session, cose=signed)))
        kept.roster = answer.rostered.cose
        self._rosters.append(kept.roster)
        return self._roster(kept)

    def get_roster(self, _member: str, session: bytes) -> pb.RosterReply:
        kept = self.kept(session)
        if not kept.roster:
            raise RefusedError("phase")
        return self._roster(kept)

    def _roster(self, kept: Kept) -> pb.RosterReply:
        included = [entry.party for entry in Roster.from_bytes(cose.payload_unverified(kept.roster)).included]
        return pb.RosterReply(cose=kept.roster, missing=[party for party in included if party not in kept.consents])

    def put_countersignature(
        self, member: str, session: bytes, signed: bytes, former: list[tuple[bytes, bytes, bytes]]
    ) -> pb.SessionState:
        kept = self.kept(session)
        proofs = [epb.FormerRoster(offer=offer, document=document, cose=roster) for offer, document, roster in former]
        answer = self._good(kept.host.ask(countersign=epb.Countersign(session=session, cose=signed, former=proofs)))
        kept.consents[member] = signed
        if answer.WhichOneof("op") == "released":
            self._release(kept, answer.released)
        return self._session(kept)

    def _release(self, kept: Kept, released: epb.Released) -> None:
        if kept.bundle:
            return
        roster = Roster.from_bytes(cose.payload_unverified(kept.roster))
        bundle = Bundle(
            tuple(BundledAgreement.of(item) for item in self.lineage(kept.agreement)),
            kept.offer,
            kept.document,
            kept.roster,
            tuple(kept.consents[entry.party] for entry in roster.included),
            released.cose,
            released.document,
            tuple(BundledOutput(item.output, item.recipient, item.sealed) for item in released.outputs),
            (),
        )
        kept.bundle = bundle.to_bytes()
        self.records[self.series(kept.agreement)].append((released.cose, released.document))
        record = Record.from_bytes(cose.payload_unverified(released.cose)).digest
        kept.host.ask(stored=epb.Stored(session=kept.session, record=record))

    def refuse(self, _member: str, session: bytes, signed: bytes) -> pb.SessionState:
        kept = self.kept(session)
        self._good(kept.host.ask(refuse=epb.Refuse(session=session, cose=signed)))
        kept.roster = b""
        kept.joins.clear()
        kept.consents.clear()
        return self._session(kept)

    def _good(self, answer: epb.Answer) -> epb.Answer:
        if answer.WhichOneof("op") == "failed":
            raise RefusedError.from_wire(answer.failed.code, "")
        return answer

    def bundle(self, _member: str, session: bytes) -> bytes:
        kept = self.kept(session)
        if not kept.bundle:
            raise RefusedError("phase")
        return kept.bundle

    def chain(self, _member: str, series: bytes, after: bytes) -> list[tuple[bytes, bytes]]:
        records = self.records.get(series, [])
        if after in (b"", GENESIS):
            return list(records)
        heads = [Record.from_bytes(cose.payload_unverified(record)).head for record, _ in records]
        if after not in heads:
            raise RefusedError("head")
        return records[heads.index(after) + 1 :]

    def close(self) -> None:
        """Ends all connections to enclaves."""
        for host in self.hosts:
            host.close()


class Wire:
    """Stands for the client's transport: the same calls, answered by the relay in this process."""

    def __init__(self, relay: Relay, member: str) -> None:
        self.relay = relay
        self.member = member
        self.address = "relay:1"
        self.pin = None

    def close(self) -> None:
        """Nothing is open."""

    def _answer(self, op: str, *arguments: Any) -> Any:
        return self.relay.answer(self.member, op, *arguments)

    def put_agreement(self, canonical: bytes) -> Any:
        return self._answer("put_agreement", canonical)

    def put_signature(self, agreement: bytes, member: str, cose: bytes) -> Any:
        return self._answer("put_signature", agreement, member, cose)

    def get_agreement(self, *, digest: bytes | None = None, series: bytes | None = None) -> Any:
        return self._answer("get_agreement", digest, series)

    def inbox(self) -> Any:
        return self._answer("inbox")

    def open_session(self, request: bytes, agreement: bytes) -> Any:
        return self._answer("open_session", request, agreement)

    def get_session(self, session: bytes) -> Any:
        return self._answer("get_session", session)

    def attest(self, session: bytes, nonce: bytes) -> Any:
        return self._answer("attest", session, nonce)

    def put_join(self, session: bytes, cose: bytes) -> Any:
        return self._answer("put_join", session, cose)

    def start(self, session: bytes, cose: bytes) -> Any:
        return self._answer("start", session, cose)

    def get_roster(self, session: bytes) -> Any:
        return self._answer("get_roster", session)

    def put_countersignature(self, session: bytes, cose: bytes, former: list[tuple[bytes, bytes, bytes]]) -> Any:
        return self._answer("put_countersignature", session, cose, former)

    def refuse(self, session: bytes, cose: bytes) -> Any:
        return self._answer("refuse", session, cose)

    def events(self, after: int, session: bytes, seconds: float) -> NoEvents:
        return NoEvents()

    def upload(self, digest: bytes, cose: bytes, blob: Path, progress: Any = None) -> None:
        self._answer("upload", digest, cose, blob.read_bytes())

    def bundle(self, session: bytes, progress: Any = None) -> Any:
        return self._answer("bundle", session)

    def chain(self, series: bytes, after: bytes) -> Any:
        return self._answer("chain", series, after)


def joins_sent(relay: Relay) -> list[Join]:
    """Every join that a client sent, whatever became of it."""
    return [
        Join.from_bytes(cose.payload_unverified(call.arguments[1]))
        for call, _ in relay.history
        if call.op == "put_join"
    ]


# The honest side


@dataclass
class Outcome:
    """What became of a session: the errors that clients gave, as (member, step, what it says), and what they accepted."""

    errors: list[tuple[str, str, str]] = field(default_factory=list)
    releases: dict[str, Release] = field(default_factory=dict)

    @property
    def told(self) -> list[str]:
        """What the errors say, in order."""
        return [said for _, _, said in self.errors]


class Stage:
    """Real clients of one agreement on this machine, a relay, and an enclave that serves one stage after another.

    `clients` have signed the agreement and sealed their tables; each stage begins from a copy of their folders.
    """

    def __init__(self, players: Cast, folder: Path) -> None:
        self.cast = players
        self.agreement = players.agreement
        self.folder = folder
        shutil.copytree(players.folder, folder, dirs_exist_ok=True)
        self.relay = Relay(players.simulation)
        self.relay.agreements = dict(players.agreements)
        self.relay.adopt(players.agreement.digest, players.host)
        self.members = {name: Member.load(folder / f"{name}.key") for name in players.agreement.members}
        self.request = players.request()
        self.kept = self.relay.begin(self.agreement.digest, self.request)

    def connection(self, name: str, member: Member | None = None) -> Connection:
        """A member's connection to the relay."""
        return Connection(member or self.members[name], cast_transport(Wire(self.relay, name)))

    def session(self, name: str, session: bytes | None = None, member: Member | None = None) -> Session:
        """A session as a member sees it; the one of this stage where none is named."""
        return Session(self.connection(name, member), self.agreement, session or self.kept.session)

    def table(self, name: str) -> dict[str, Any]:
        """What a party brings."""
        return {"visits": self.folder / f"{name}.csv"}

    def play(self, tries: int = 1) -> Outcome:
        """A session from its submits to the releases. A member whose step fails tries it again, then gives up."""
        outcome = Outcome()
        parties = self.agreement.parties
        starter = self.agreement.session.start[0]
        gone: set[str] = set()

        def step(name: str, what: str, act: Callable[[], Any]) -> Any:
            if name in gone:
                return None
            for _ in range(tries):
                try:
                    return act()
                except ParleyError as error:
                    outcome.errors.append((name, what, told(error)))
            gone.add(name)
            return None

        # A session that was released before is only fetched.
        for name in () if self.kept.bundle else parties:
            step(name, "submit", lambda name=name: self.session(name).submit(self.table(name)))
        if not self.kept.bundle:
            step(starter, "start", lambda: self.session(starter).start())
        for name in () if self.kept.bundle else parties:
            step(name, "countersign", lambda name=name: self.session(name).countersign())
        for name in self.agreement.members:
            release = step(name, "release", lambda name=name: self.session(name).release())
            if release is not None:
                outcome.releases[name] = release
        return outcome

    def check(self, outcome: Outcome, attackers: Sequence[SealingKey] = ()) -> None:
        """The invariant: whatever a client accepted is the release of an undisturbed run, and nothing that it sent opens
        for anybody but the enclave whose offer was verified."""
        for name, release in outcome.releases.items():
            assert release.verified.record.record.head == self.cast.head, f"{name} accepted another record"
            tables = {output: found.table for output, found in release.outputs.items()}
            assert tables == self.cast.tables, f"{name} accepted another output"
        genuine = {Offer.from_bytes(offer).digest: Offer.from_bytes(offer) for offer in self.relay.offers()}
        for join in joins_sent(self.relay):
            assert join.offer in genuine, "a join to an offer that no enclave made"
            assert genuine[join.offer].agreement == self.agreement.digest
            for key in attackers:
                try:
                    key.open(join.sealed_keys, join_info(join.offer, join.party, join.uploads))
                except ParleyError:
                    continue
                raise AssertionError("content keys were sealed to the attacker")
        seen: dict[tuple[str, bytes], set[bytes]] = {}
        for party, roster in rosters_signed(self.relay):
            seen.setdefault((party, self.kept.offer), set()).add(roster.inputs_digest)
        assert all(len(inputs) == 1 for inputs in seen.values()), "two rosters over different inputs were signed"

    def close(self) -> None:
        """Leaves the enclave as the next stage can use it."""
        self.relay.hooks.clear()
        self.cast.settle(self.members)


class Cast:
    """The members of one agreement with their tables, in `folder`, an enclave that has the agreement, and what an
    undisturbed session releases."""

    def __init__(
        self, simulation: Simulation, folder: Path, parties: Sequence[str], analysts: Sequence[str], **changes: Any
    ):
        self.simulation = simulation
        self.folder = folder
        names = [*parties, *analysts]
        self.members = {name: Member.generate(name, folder) for name in names}
        identities = {name: member.identity for name, member in self.members.items()}
        self.agreement = agreement_of(simulation, identities, analysts=analysts, **changes)
        for member in self.members.values():
            for name, other in self.members.items():
                if other is not member:
                    member.contacts.put(name, other.public)
                    member.contacts.confirm(name, other.fingerprint)
        signed = SignedAgreement(self.agreement.canonical)
        for name, member in self.members.items():
            signed = signed.with_signature(name, member.sign(self.agreement))
        for member in self.members.values():
            member.state.keep_agreement(signed)
        self.agreements = {signed.digest: signed}
        for seed, name in enumerate(parties):
            write_csv(folder / f"{name}.csv", rows_of(seed, 800))
        relay = Relay(simulation)
        relay.agreements = dict(self.agreements)
        self.host = relay.load(signed.digest)
        self.head = b""
        self.tables: dict[str, OutputTable] = {}
        self._prepare(relay)

    def _prepare(self, relay: Relay) -> None:
        kept = relay.begin(self.agreement.digest)
        for name in self.agreement.parties:
            connection = Connection(self.members[name], cast_transport(Wire(relay, name)))
            Session(connection, self.agreement, kept.session).seal({"visits": self.folder / f"{name}.csv"})

    def undisturbed(self, folder: Path) -> None:
        """Plays a session that nobody disturbs, to know its release."""
        stage = Stage(self, folder)
        outcome = stage.play()
        assert not outcome.errors and set(outcome.releases) == set(self.agreement.members), outcome.errors
        found = outcome.releases[self.agreement.parties[0]]
        self.head = found.verified.record.record.head
        self.tables = {name: output.table for name, output in found.outputs.items()}
        stage.check(outcome)
        stage.close()

    def request(self) -> bytes:
        """The request of the session that is open, or of the next one."""
        return self.host.request if self.host.state().phase == "open" else os.urandom(16)

    def settle(self, members: Mapping[str, Member]) -> None:
        """Ends what stands, so that another session may begin: the enclave then is loaded, open or lost."""
        until(lambda: self.host.state().phase != "computing")
        state = self.host.state()
        if state.phase == "rostered":
            roster = Roster.from_bytes(cose.payload_unverified(state.roster))
            name = roster.included[0].party
            refusal = members[name].identity.sign(Refusal(roster.digest, name).to_bytes())
            self.host.want("awaiting", refuse=epb.Refuse(session=state.session, cose=refusal))
        assert self.host.state().phase in ("loaded", "open", "lost"), self.host.state().phase


def cast_transport(wire: Wire) -> Transport:
    """The wire as the client's own code sees it."""
    return cast("Transport", wire)


def write_csv(path: Path, rows: Rows) -> None:
    """A party's file of `visits`."""
    sites = ("", "north", "south", "west")
    lines = ["id,amount,score,site"]
    for key, amount, score, site in zip(rows.keys, rows.amount, rows.score, rows.site, strict=True):
        lines.append(f"p{key},{amount // 100}.{amount % 100:02d},{score:.6f},{sites[site]}")
    path.write_text("\n".join(lines) + "\n")


def rosters_signed(relay: Relay) -> list[tuple[str, Roster]]:
    """(party, roster) of every countersignature that a client sent of a roster that this relay knows."""
    known = {Roster.from_bytes(cose.payload_unverified(data)).digest: data for data in relay.rosters()}
    found = []
    for call, _ in relay.history:
        if call.op == "put_countersignature":
            statement = Countersignature.from_bytes(cose.payload_unverified(call.arguments[1]))
            assert statement.roster in known, "a roster that no enclave made was signed"
            found.append((call.member, Roster.from_bytes(cose.payload_unverified(known[statement.roster]))))
    return found
