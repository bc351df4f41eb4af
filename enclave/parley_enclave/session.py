"""One session: its offer, the joins, the roster, the release. The state of a run, and nothing of processes or the wire.

Whoever owns it holds a lock. What must be forgotten after the release is forgotten by `forget`.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

from parley_enclave.admission import Checked, Opened
from parley_enclave.compute import Job
from parley_enclave.keys import SessionKeys
from parley_enclave.pool import Parts
from parley_enclave.recipient import Recipient
from parley_enclave.release import Release
from parley_enclave.roster import Standing
from parley_protocol import cose, limits
from parley_protocol.agreement.model import Agreement
from parley_protocol.chain import ChainState
from parley_protocol.errors import RefusedError, VerificationError
from parley_protocol.secret import Secret
from parley_protocol.transcript import AnyJoin, KmsJoin, Offer, Receipt, Roster


@dataclass(frozen=True, slots=True)
class Joined:
    """A party's admitted join and its receipt."""

    opened: Opened
    receipt: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The last roster, which ended without a computation: `code` is "expired" or "roster" (refused).

    `members`: those who had not signed it, or the one who refused it.
    """

    code: str
    roster: Roster
    cose: bytes
    members: tuple[str, ...]


@dataclass(slots=True)
class Session(Secret):
    """A session from its offer to its end."""

    agreement: Agreement
    request: bytes
    offer: Offer
    chain: ChainState
    keys: SessionKeys | None = field(repr=False)
    guard_key: bytes = field(repr=False)
    joins: dict[str, Joined] = field(default_factory=dict, repr=False)
    tables: dict[bytes, Checked] = field(default_factory=dict, repr=False)
    """Admitted uploads by digest: a join that is repeated after a lapsed roster needs no second admission."""
    admitting: dict[bytes, Future[Parts]] = field(default_factory=dict, repr=False)
    percents: dict[bytes, int] = field(default_factory=dict)
    """How far each admission is."""
    turns: dict[bytes, int] = field(default_factory=dict)
    """The order in which joins came first, by digest."""
    latest: dict[str, int] = field(default_factory=dict)
    """The turn of the last join that was admitted, by party."""
    numbers: dict[str, int] = field(default_factory=dict)
    """The number of the last KMS join that was admitted, by party."""
    roster_keys: set[bytes] = field(default_factory=set)
    """One-time roster keys that stood in a roster: a join may not bring one of them again."""
    recipients: dict[str, tuple[bytes, Recipient]] = field(default_factory=dict, repr=False)
    """For each party the KMS join that waits for an answer, and the key which that answer is for."""
    unopened: Counter[str] = field(default_factory=Counter)
    """Answers for a party that did not open, or not yet."""
    standing: Standing | None = None
    ended: Ended | None = None
    job: Job | None = field(default=None, repr=False)
    percent: int = 0
    release: Release | None = field(default=None, repr=False)
    code: str = ""

    @property
    def missing(self) -> list[str]:
        """The parties that have not joined, in the agreement's order."""
        return [party for party in self.agreement.parties if party not in self.joins]

    def receipt_of(self, join: AnyJoin) -> bytes | None:
        """The receipt of a join that is admitted already: the same one answers it again (adm-8)."""
        known = self.joins.get(join.party)
        return known.receipt if known is not None and known.opened.join.digest == join.digest else None

    def live_keys(self) -> SessionKeys:
        """The private keys; RefusedError "phase" when they are forgotten."""
        if self.keys is None:
            raise RefusedError("phase")
        return self.keys

    def check_roster_key(self, join: AnyJoin) -> None:
        """That a join brings a roster key which stood in no roster (adm-6); RefusedError "conflict"."""
        if join.roster_key in self.roster_keys:
            raise RefusedError("conflict")

    def check_turn(self, join: AnyJoin) -> None:
        """That no join which came later was admitted (adm-7), of KMS joins none with a greater number (kms-11).

        RefusedError "conflict". Neither a slow admission nor a host that repeats a join of before puts an old table in place
        of a new one.
        """
        turn = self.turns.setdefault(join.digest, len(self.turns))
        if turn < self.latest.get(join.party, turn):
            raise RefusedError("conflict")
        if isinstance(join, KmsJoin) and join.number < self.numbers.get(join.party, 0):
            raise RefusedError("conflict")

    def await_answer(self, join: KmsJoin, recipient: Recipient) -> None:
        """Waits for an answer of KMS to this key, and to no other of the party any more (kms-6)."""
        self.recipients[join.party] = (join.digest, recipient)

    def answered(self, join: KmsJoin) -> Recipient:
        """The key of the answer to a KMS join: it is given once. VerificationError, code "key", where none waits, or where too
        many answers did not open (kms-10)."""
        digest, recipient = self.recipients.get(join.party, (b"", None))
        if recipient is None or digest != join.digest:
            raise VerificationError("kms-10", "no answer is waited for", code="key")
        del self.recipients[join.party]
        if self.unopened[join.party] >= limits.KMS_ANSWERS:
            raise VerificationError("kms-10", "too many answers did not open", code="key")
        # Before it is opened, so that answers which come at once count as well; a good one is taken back.
        self.unopened[join.party] += 1
        return recipient

    def admit(self, opened: Opened, now_ms: int) -> bytes:
        """Takes an admitted join in place of the party's last one; its signed receipt (adm-7)."""
        join = opened.join
        self.latest[join.party] = self.turns[join.digest]
        if isinstance(join, KmsJoin):
            self.numbers[join.party] = join.number
        receipt = Receipt(self.offer.digest, join.party, join.uploads, join.digest, now_ms)
        signed = cose.sign(receipt.to_bytes(), self.live_keys().signing)
        self.joins[join.party] = Joined(opened, signed)
        return signed

    def issue(self, roster: Roster) -> Standing:
        """Signs a roster; it stands until it is computed, lapses or is refused."""
        self.standing = Standing(roster, cose.sign(roster.to_bytes(), self.live_keys().signing))
        self.roster_keys |= {entry.roster_key for entry in roster.included}
        self.ended = None
        return self.standing

    def end_roster(self, code: str, members: tuple[str, ...]) -> None:
        """Ends the standing roster without a computation. All joins go with it: their one-time keys are used up."""
        assert self.standing is not None
        self.ended = Ended(code, self.standing.roster, self.standing.cose, members)
        self.standing = None
        self.job = None
        self.joins.clear()

    def forget(self) -> None:
        """Drops all that could open a table (ses-12): keys, shares, tags, plans. Python cannot overwrite them; they are garbage."""
        self.keys = None
        self.guard_key = b""
        self.joins.clear()
        self.tables.clear()
        self.admitting.clear()
        self.recipients.clear()
        self.job = None
