"""The steps of SPEC at which a process changes what is durable or shared, and processes that are killed there.

A moment is a place on a wire: a message that has come and is not passed on yet. What was written before it is written, and
what follows from it is not.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from support.simulation.calls import Rule
from support.simulation.front import FrontRule
from support.simulation.link import LinkRule
from support.simulation.theatre import Theatre


@dataclass(frozen=True)
class Moment:
    """A step of SPEC, what changes there, and where it is met: a call of a member, an operation of the enclave's, or one of KMS
    that a coordinator or the party asks for; when it was asked or when it was answered. `last`: only when all parties' consents are stored."""

    step: str
    changes: str
    wire: str
    op: str
    when: str
    last: bool = False

    def __str__(self) -> str:
        return f"{self.step}-{'last-' if self.last else ''}{self.op}-{self.when}"


MOMENTS: Final[Sequence[Moment]] = (
    Moment("crd-10", "nothing: the request is not here", "calls", "OpenSession", "asked"),
    Moment("ses-2", "a session is launching", "enclave", "load", "asked"),
    Moment("ses-2", "PCR16 is extended and locked", "enclave", "load", "answered"),
    Moment("ses-3", "the enclave has the agreement", "enclave", "begin", "asked"),
    Moment("ses-3", "keys are made, an offer stands", "enclave", "begin", "answered"),
    Moment("ses-4", "the offer is not stored", "enclave", "attest", "asked"),
    Moment("ses-4", "its document is not stored", "enclave", "attest", "answered"),
    Moment("crd-10", "the session is open", "calls", "OpenSession", "answered"),
    Moment("crd-11", "nothing: a member verifies", "calls", "Attest", "asked"),
    Moment("crd-11", "a member has not got the document", "calls", "Attest", "answered"),
    Moment("crd-7", "a table stands in a spool", "calls", "Upload", "asked"),
    Moment("crd-9", "an upload is complete", "calls", "Upload", "answered"),
    Moment("crd-12", "a join stands in a member's state", "calls", "PutJoin", "asked"),
    Moment("adm-1", "the join is stored", "enclave", "join", "asked"),
    Moment("adm-5", "a worker reads the table", "enclave", "pull", "asked"),
    Moment("adm-7", "the enclave holds the party's keys", "enclave", "join", "answered"),
    Moment("crd-12", "the receipt is stored", "calls", "PutJoin", "answered"),
    Moment("crd-13", "all receipts are given", "calls", "Start", "asked"),
    Moment("ses-5", "the start is stored", "enclave", "start", "asked"),
    Moment("ses-5", "the enclave has closed the inputs", "enclave", "start", "answered"),
    Moment("crd-13", "the roster is stored", "calls", "Start", "answered"),
    Moment("crd-14", "a signature stands, its one-time key is gone", "calls", "PutCountersignature", "asked"),
    Moment("ses-6", "one consent is stored", "enclave", "countersign", "asked"),
    Moment("ses-6", "the enclave has it", "enclave", "countersign", "answered"),
    Moment("crd-14", "the member is not told", "calls", "PutCountersignature", "answered"),
    Moment("ses-6", "all consents are stored", "enclave", "countersign", "asked", last=True),
    Moment("eng-1", "a worker computes", "enclave", "pull", "asked", last=True),
    Moment("ses-12", "all is released and nothing stored", "enclave", "countersign", "answered", last=True),
    Moment("ses-8", "bundle and record are stored", "enclave", "stored", "asked"),
    Moment("ses-8", "the enclave has forgotten them", "enclave", "stored", "answered"),
    Moment("crd-19", "a member begins to fetch", "calls", "GetBundle", "asked"),
    Moment("crd-19", "it has all of the bundle", "calls", "GetBundle", "answered"),
)
"""Every moment, in the order of a session."""

KMS_MOMENTS: Final[Sequence[Moment]] = (
    Moment("kms-15", "nothing: a party reads the policy of its key", "party", "GetKeyPolicy", "asked"),
    Moment("kms-16", "its keys are not under KMS", "party", "Encrypt", "asked"),
    Moment("kms-16", "they are, and in no join", "party", "Encrypt", "answered"),
    Moment("kms-12", "a KMS join stands in a member's state", "calls", "PutKmsJoin", "asked"),
    Moment("kms-12", "it stands for every session", "calls", "PutKmsJoin", "answered"),
    Moment("kms-6", "nothing: the enclave is not asked", "enclave", "recipient", "asked"),
    Moment("kms-6", "a document waits for its answer", "enclave", "recipient", "answered"),
    Moment("kms-13", "KMS is asked", "coordinator", "Decrypt", "asked"),
    Moment("kms-13", "it has answered to nobody yet", "coordinator", "Decrypt", "answered"),
    Moment("kms-7", "the answer is with the coordinator alone", "enclave", "kms_join", "asked"),
    Moment("kms-11", "the enclave holds the party's keys", "enclave", "kms_join", "answered"),
)
"""And those of a join by KMS, in its order."""

MEMBER_STEPS: Final[Sequence[tuple[str, str, str]]] = (
    ("tab-8", "a sealed table stands in the spool", "uploading"),
    ("crd-9", "a part of it has been sent", "chunk"),
    ("crd-9", "all of it is stored", "uploaded"),
    ("adm-6", "a one-time key stands, for no join", "roster-key"),
    ("join-1", "the join stands, and is not sent", "join"),
    ("crd-12", "the receipt has come, and does not stand", "joined"),
    ("rcp-1", "the receipt stands", "receipt"),
    ("cos-4", "a signature stands beside its one-time key", "roster-signature"),
    ("cos-4", "the one-time key is gone, the signature is not sent", "roster-key-removed"),
    ("crd-14", "the signature is sent", "signed"),
    ("crd-19", "a part of the bundle has come", "fetching"),
    ("crd-19", "all of it has come, and does not stand", "fetched"),
    ("chn-2", "the head has moved, the bundle does not stand", "head"),
)
"""Steps of a member: of SPEC, what has changed, and what the library calls it."""
KMS_MEMBER_STEPS: Final[Sequence[tuple[str, str, str]]] = (
    ("adm-6", "a one-time key stands, for no KMS join", "roster-key"),
    ("kms-16", "the KMS join stands, and is not sent", "kms-join"),
    ("kms-17", "the session counts as joined, nothing is signed", "join"),
    ("cos-4", "a signature stands beside its one-time key", "roster-signature"),
    ("cos-4", "the one-time key is gone, the signature is not sent", "roster-key-removed"),
    ("kms-17", "a one-time key stands, for no next KMS join", "roster-key"),
    ("kms-17", "the next KMS join stands, and is not sent", "kms-join"),
)
"""And those of a member that joins by KMS."""

TARGETS: Final = ("coordinator", "enclave", "machine", "module", "worker")
"""What is killed: the coordinator; the enclave; both, with all that belongs to them; the security module; a worker. Beside
them `kms`, the party's KMS; and `node`, of two coordinators the one that serves the session, for longer than its lease."""
AWAY_S: Final = 3.0
"""How long a `node` is away."""


class Killer:
    """Kills a target at each of some moments, one after the other."""

    def __init__(self, theatre: Theatre, target: str, moments: Sequence[Moment]) -> None:
        self.theatre = theatre
        self.target = target
        self.nobody: list[str] = []
        """Moments at which there was no such process any more."""
        self._left = list(moments)
        self._lock = threading.Lock()
        self._next()

    @property
    def missed(self) -> list[Moment]:
        """Moments that did not come: while one party was at one, the others had gone by the next."""
        return list(self._left)

    def _next(self) -> None:
        if not self._left:
            return
        moment = self._left[0]

        def act() -> None:
            with self._lock:
                # The next one first: it may come while this one's process starts again.
                self._left.pop(0)
                self._next()
                if self._kill():
                    return
                if self.target == "node":
                    # Both are away, and a call found none: it is tried again.
                    self._left.append(moment)
                else:
                    self.nobody.append(str(moment))

        if moment.wire == "calls":
            self.theatre.calls.arm(Rule(moment.when, moment.op, act=act))
        elif moment.wire in ("coordinator", "party"):
            assert self.theatre.kms is not None
            # What was asked of a KMS that is killed over it is not answered.
            self.theatre.kms.fronts[moment.wire].arm(
                FrontRule(moment.when, moment.op, drop=self.target == "kms", act=act)
            )
        else:
            only = self.theatre.all_consent if moment.last else lambda: True
            # What an enclave has said last does not arrive when it is killed.
            drop = self.target in ("enclave", "module")
            self.theatre.links.arm(LinkRule(moment.when, moment.op, only=only, drop=drop, act=act))

    def _kill(self) -> bool:
        match self.target:
            case "coordinator":
                return self.theatre.kill_coordinator(0.0)
            case "machine":
                return self.theatre.kill_machine(0.0)
            case "enclave":
                return self.theatre.kill_enclave()
            case "kms":
                return self.theatre.kill_kms(0.0)
            case "node":
                return self.theatre.kill_node("holder", AWAY_S)
            case "module":
                return self.theatre.kill_module()
            case _:
                return self.theatre.kill_worker()
