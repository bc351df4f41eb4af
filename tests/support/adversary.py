"""A malicious coordinator that the real client talks to, in front of real enclave processes.

`Relay` is an honest coordinator in this process, with a hook for each operation: a hook sees who asks for what, may ask
the honest side, once, often or never, and answers what it likes. What it ever held, it remembers. The client runs as it
is: `Wire` stands where its transport stands, and everything above is the client's own code.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parley_protocol import cose
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.bundle import Bundle, BundledAgreement, BundledOutput
from parley_protocol.errors import RefusedError
from parley_protocol.transcript import GENESIS, Join, Offer, Record, Roster
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1 import enclave_pb2 as epb
from support.enclave import Host, Simulation


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
    host: Host
    offer: bytes
    roster: bytes = b""
    consents: dict[str, bytes] = field(default_factory=dict)
    joins: dict[str, bytes] = field(default_factory=dict)
    document: bytes = b""
    bundle: bytes = b""
    lost: str = ""


class Relay:
    """The coordinator's memory, its enclaves, and its hooks. An operation takes the caller's name first."""

    def __init__(self, *simulations: Simulation) -> None:
        self.simulations = list(simulations)
        self.hosts: list[Host] = []
        self.agreements: dict[bytes, SignedAgreement] = {}
        self.blobs: dict[bytes, tuple[int, bytes, bytes]] = {}
        """Upload digest to the host's number, the signed upload, the bytes."""
        self.sessions: dict[bytes, Kept] = {}
        self.records: dict[bytes, list[tuple[bytes, bytes]]] = {}
        """Series to (record, document), oldest first."""
        self.hooks: dict[str, Hook] = {}
        self.history: list[tuple[Call, Any]] = []
        """Every call that was answered, with the answer."""
        self._loaded: dict[bytes, list[Host]] = {}
        self._lock = threading.RLock()

    # What a client calls

    def answer(self, member: str, op: str, *arguments: Any) -> Any:
        """What the coordinator answers, honest or not."""
        call = Call(self, member, op, arguments)
        hook = self.hooks.get(op)
        reply = call.honest() if hook is None else hook(call)
        self.history.append((call, reply))
        return reply

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

    def load(self, digest: bytes, simulation: Simulation | None = None) -> Host:
        """An enclave that has the agreement: the one that has it already, or another where `simulation` is given."""
        known = self._loaded.setdefault(digest, [])
        if known and simulation is None:
            return known[0]
        simulation = simulation or self.simulations[len(self.hosts)]
        host = Host(simulation.path)
        self.hosts.append(host)
        host.load(
            *(
                epb.SignedAgreement(canonical=item.canonical, signatures=dict(item.signatures))
                for item in self.lineage(digest)
            )
        )
        known.append(host)
        return host

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
        host: Host | None = None,
        records: list[tuple[bytes, bytes]] | None = None,
    ) -> Kept:
        """Begins a session in an enclave, after these records, or all that there are."""
        host = host or self.load(agreement)
        chain = self.records.setdefault(self.series(agreement), []) if records is None else records
        signed = [epb.SignedRecord(cose=record, document=document) for record, document in chain]
        offered = host.want("offered", begin=epb.Begin(request=request or os.urandom(16), chain=signed))
        session = Offer.from_bytes(offered.offer).session
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
        document = kept.host.want("attested", attest=epb.Attest(session=session, nonce=nonce)).document
        kept.document = document
        return pb.AttestReply(offer=kept.offer, document=document)

    def upload(self, _member: str, digest: bytes, signed: bytes, blob: bytes) -> None:
        number = int.from_bytes(os.urandom(6), "big")
        self.blobs.setdefault(digest, (number, signed, blob))
        for host in self.hosts:
            host.blobs[self.blobs[digest][0]] = self.blobs[digest][2]

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

    def events(self, after: int, session: bytes, seconds: float) -> Iterator[Any]:
        yield from ()

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
