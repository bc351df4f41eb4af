"""A coordinator and enclaves on paper, behind the methods of the client's transport: for tests of what a client decides.

Every document is made by a simulated module and every statement by the session's key, so the client's checks run as they
are. Hooks are plain attributes that a test replaces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from parley import Connection, Member, Session
from parley_deploy.nsm import LocalRoot, image_measurements
from parley_protocol import cose
from parley_protocol.agreement.model import Agreement, Measurement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.errors import RefusedError
from parley_protocol.transcript import Absentee, AnyJoin, Included, Join, KmsJoin, Receipt, Roster
from parley_protocol.v1 import coordinator_pb2 as pb
from support.client import frame_of
from support.enclave import Simulation, agreement_of
from support.world import Paper


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class NoEvents(Iterator[pb.Event]):
    """A stream in which nothing happens."""

    def __next__(self) -> pb.Event:
        raise StopIteration

    def close(self) -> None:
        """Ends it."""


class PaperSession:
    """A session of an enclave on paper, with the joins that it admitted last."""

    def __init__(self, paper: Paper) -> None:
        self.paper = paper
        self.joins: dict[str, AnyJoin] = {}
        self.refused: dict[str, str] = {}
        self.roster: Roster | None = None
        self.roster_cose = b""
        self.phase = "open"

    def issue(self, *, absent: tuple[str, ...] = (), **changes: Any) -> Roster:
        """A roster of the joins at hand. `changes` replaces fields of it, or `included` by a list."""
        agreement = self.paper.agreement
        included = tuple(
            Included(
                p, self.joins[p].uploads, self.joins[p].share_digest, self.joins[p].digest, self.joins[p].roster_key
            )
            for p in agreement.parties
            if p not in absent
        )
        absentees = tuple(Absentee(party, "deadline") for party in absent)
        roster = Roster(self.paper.offer.digest, bytes(48), included, absentees, now_ms() + 600_000)
        roster = replace(roster, **changes)
        digest = roster.inputs(agreement.digest, self.paper.offer.head).digest
        self.roster = replace(roster, inputs_digest=digest)
        self.roster_cose = self.paper.sign(self.roster)
        self.phase = "rostered"
        return self.roster


class PaperWire:
    """What all members call. `sent` are the statements that arrived, in order."""

    def __init__(self, agreement: Agreement, root: LocalRoot) -> None:
        self.agreement = agreement
        self.root = root
        self.agreements: dict[bytes, SignedAgreement] = {}
        self.sessions: dict[bytes, PaperSession] = {}
        self.records: list[tuple[bytes, bytes]] = []
        self.heads: list[bytes] = []
        self.bundles: dict[bytes, bytes] = {}
        self.sent: list[tuple[str, bytes]] = []
        self.former: list[Any] = []
        self.uploaded: dict[bytes, bytes] = {}

    def open(self, agreement: Agreement | None = None, **options: Any) -> PaperSession:
        """One session more."""
        made = PaperSession(Paper(agreement or self.agreement, self.root, now_ms=now_ms(), **options))
        self.sessions[made.paper.offer.session] = made
        return made

    # The methods of the transport

    def put_agreement(self, canonical: bytes) -> pb.AgreementState:
        signed = SignedAgreement(canonical)
        self.agreements.setdefault(signed.digest, signed)
        return self.get_agreement(digest=signed.digest)

    def put_signature(self, agreement: bytes, member: str, signed: bytes) -> pb.AgreementState:
        self.agreements[agreement] = self.agreements[agreement].with_signature(member, signed)
        return self.get_agreement(digest=agreement)

    def get_agreement(self, *, digest: bytes | None = None, series: bytes | None = None) -> pb.AgreementState:
        if digest not in self.agreements:
            raise RefusedError("unknown-agreement")
        found = self.agreements[digest]
        return pb.AgreementState(canonical=found.canonical, signatures=dict(found.signatures))

    def inbox(self) -> pb.InboxReply:
        return pb.InboxReply()

    def get_session(self, session: bytes) -> pb.SessionState:
        if session not in self.sessions:
            raise RefusedError("unknown-session")
        found = self.sessions[session]
        parties = [
            pb.PartyState(party=party, phase="refused", code=found.refused[party])
            if party in found.refused
            else pb.PartyState(party=party, phase="joined" if party in found.joins else "absent")
            for party in found.paper.agreement.parties
        ]
        return pb.SessionState(
            session=session, agreement=found.paper.agreement.digest, phase=found.phase, parties=parties
        )

    def attest(self, session: bytes, nonce: bytes) -> pb.AttestReply:
        paper = self.sessions[session].paper
        paper.clock = now_ms()
        return pb.AttestReply(offer=paper.offer.to_bytes(), document=paper.attest(nonce))

    def upload(self, digest: bytes, signed: bytes, blob: Path, progress: object = None) -> None:
        self.uploaded[digest] = blob.read_bytes()

    def put_join(self, session: bytes, signed: bytes) -> pb.JoinReply:
        self.sent.append(("join", signed))
        found = self.sessions[session]
        join = Join.from_bytes(cose.payload_unverified(signed))
        found.joins[join.party] = join
        receipt = Receipt(found.paper.offer.digest, join.party, join.uploads, join.digest, now_ms())
        return pb.JoinReply(receipt=found.paper.sign(receipt))

    def put_kms_join(self, signed: bytes) -> pb.KmsJoinState:
        self.sent.append(("kms-join", signed))
        join = KmsJoin.from_bytes(cose.payload_unverified(signed))
        for found in self.sessions.values():
            known = found.joins.get(join.party)
            if known is not None and known.digest == join.digest:
                continue  # a session tries each once
            if found.phase == "open" and found.paper.agreement.digest == join.agreement:
                found.joins[join.party] = join
                found.refused.pop(join.party, None)
        return pb.KmsJoinState(join=join.digest, number=join.number)

    def start(self, session: bytes, signed: bytes) -> pb.RosterReply:
        found = self.sessions[session]
        if found.roster is None:
            found.issue()
        return pb.RosterReply(cose=found.roster_cose)

    def get_roster(self, session: bytes) -> pb.RosterReply:
        found = self.sessions[session]
        if found.roster is None:
            raise RefusedError("phase")
        return pb.RosterReply(cose=found.roster_cose)

    def put_countersignature(self, session: bytes, signed: bytes, former: list[Any]) -> pb.SessionState:
        self.sent.append(("countersignature", signed))
        self.former.append(former)
        return self.get_session(session)

    def refuse(self, session: bytes, signed: bytes) -> pb.SessionState:
        self.sent.append(("refusal", signed))
        return self.get_session(session)

    def chain(self, series: bytes, after: bytes) -> list[tuple[bytes, bytes]]:
        if after in (b"", bytes(48)):
            return list(self.records)
        if after not in self.heads:
            raise RefusedError("head")
        return self.records[self.heads.index(after) + 1 :]

    def bundle(self, session: bytes, progress: object = None) -> bytes:
        return self.bundles[session]

    def events(self, after: int, session: bytes, seconds: float) -> NoEvents:
        return NoEvents()

    def close(self) -> None:
        pass


class Desk:
    """Members `ada` and `bea` (parties) and `cyd` (analyst), who have confirmed and signed, and their wire."""

    def __init__(self, folder: Path, **session: Any) -> None:
        self.root = LocalRoot.create(now_ms())
        self.members: dict[str, Member] = {name: Member.generate(name, folder / name) for name in ("ada", "bea", "cyd")}
        measured = image_measurements(None)
        image = Measurement(measured[0], measured[1], measured[2])
        simulation = cast("Simulation", SimpleNamespace(root=self.root, measurement=image))
        identities = {name: member.identity for name, member in self.members.items()}
        self.agreement = agreement_of(simulation, identities, analysts=["cyd"], **session)
        self.wire = PaperWire(self.agreement, self.root)
        for member in self.members.values():
            for name, other in self.members.items():
                member.contacts.put(name, other.public)
                if other is not member:
                    member.contacts.confirm(name, other.fingerprint)

    def connect(self, name: str, **options: Any) -> Connection:
        """A connection of a member, loaded anew from its files."""
        return Connection(Member.load(self.members[name].path, **options), cast("Any", self.wire))

    def sign(self, agreement: Agreement | None = None) -> None:
        """Everybody signs."""
        for name in self.members:
            self.connect(name).sign(agreement or self.agreement)

    def amended(self, **changes: Any) -> Agreement:
        """A second version."""
        changed: Mapping[str, Any] = {"purpose": "Another purpose.", **changes}
        first = self.agreement
        return replace(first, version=2, series_digest=first.digest, replaces=first.digest, **changed)


def session_of(desk: Desk, name: str, opened: PaperSession, **options: Any) -> Session:
    """A session as one member takes part in it, from its files anew."""
    connection = desk.connect(name, **options)
    return Session(connection, opened.paper.agreement, opened.paper.offer.session)


def both_join(desk: Desk, opened: PaperSession) -> None:
    """ada and bea bring tables."""
    for seed, name in enumerate(("ada", "bea")):
        session_of(desk, name, opened).submit({"visits": frame_of(seed)})


def payload(kind: Any, signed: bytes) -> Any:
    """The statement of a kind in an envelope."""
    return kind.from_bytes(cose.payload_unverified(signed))
