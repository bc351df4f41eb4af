"""A session as one member takes part in it. What is believed, and when something is signed, is decided here.

The enclave is verified each time before anything is sealed, joined or started. The client signs a roster by itself only when
nobody is absent and its own uploads are the listed ones; it never signs two computations under one head but for the same
inputs, unless it is told to by hand (REVIEW F2, F3, F7).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parley.clock import now_ms
from parley.disk import write_file
from parley.images import AcceptedImage, matching_image, seen_image
from parley.release import Release
from parley.spool import SealedTable, content_key
from parley.standing import NOISE_SHARE, Bringing, Progress, tell
from parley.state import Joined, Series, SignedRoster, View
from parley_protocol import hpke
from parley_protocol.agreement.model import Agreement
from parley_protocol.attestation.document import parse_unverified
from parley_protocol.chain import ChainState, verify_chain
from parley_protocol.claims import VerifiedOffer, needs_countersignatures, verify_offer, verify_receipt, verify_roster
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import CODES, MalformedError, ParleyError, RefusedError, StateError
from parley_protocol.transcript import (
    Countersignature,
    Included,
    Join,
    JoinKeys,
    KmsJoin,
    Offer,
    Receipt,
    Refusal,
    Roster,
    RosterConsent,
    Start,
    join_info,
    noise_share_context,
    share_digest,
)

if TYPE_CHECKING:
    from parley.connection import Connection
    from parley.kms import Key
    from parley.reading import Source
    from parley.transport import Events, Transport

_log: Final = logging.getLogger("parley")
_WAKE_S: Final = 10.0
"""Without an event, a waiting client asks so often."""
_BURST_S: Final = 0.2
"""How long a waiting client lets events gather before it asks."""


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """Where a session stands, as the coordinator says: nothing is decided by it. `parties`: (party, absent | uploaded |
    refused | joined | countersigned), `refused`: the codes with which KMS joins were; `phase`: launching, open, rostered, computing, released, lost."""

    session: bytes
    agreement: bytes
    phase: str
    parties: tuple[tuple[str, str], ...]
    code: str
    deadline_ms: int
    percent: int
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Verified:
    """An offer that was verified now, its document, and the chain up to its head."""

    offer: VerifiedOffer
    document: bytes
    chain: ChainState


class _Bell:
    """Rings when something happens in a session: one stream of events in a thread, for as long as somebody waits.

    The thread has ended when that does. One that is left in the middle of a call when the process ends may hold a lock of
    gRPC's, for which the end of the process then waits for ever.
    """

    def __init__(self, transport: Transport, session: bytes) -> None:
        self._transport = transport
        self._session = session
        self._rung = threading.Event()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._stream: Events | None = None
        self._error: ParleyError | None = None
        self._thread = threading.Thread(target=self._listen, name="parley-events", daemon=True)

    def __enter__(self) -> _Bell:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended.set()
            if self._stream is not None:
                self._stream.close()
        self._thread.join(_WAKE_S)

    def wait(self, seconds: float) -> None:
        """Returns at the next ring, or after `seconds`; raises what ended the stream."""
        if self._rung.wait(seconds) and self._error is None:
            # What happens in a burst, as many parties join, is looked at once.
            time.sleep(_BURST_S)
        self._rung.clear()
        if self._error is not None:
            raise self._error

    def _listen(self) -> None:
        after = 0
        while True:
            with self._lock:
                if self._ended.is_set():
                    return
                self._stream = stream = self._transport.events(after, self._session, _WAKE_S)
            try:
                for event in stream:
                    after = int(event.number)
                    self._rung.set()
            except ParleyError as error:
                self._error = error
                self._rung.set()
                return
            self._rung.set()
            self._ended.wait(_BURST_S)


class Session(Bringing):
    """One session (`id`, 16 bytes) of one agreement, over a connection."""

    def __init__(self, connection: Connection, agreement: Agreement, session: bytes) -> None:
        if len(session) != 16:
            raise MalformedError("a session's id has 16 bytes")
        super().__init__(connection, agreement)
        self.id = session
        self._sign = True
        self._image: AcceptedImage | None = None

    def __repr__(self) -> str:
        digits = self.id.hex()
        return f"Session({digits[:4]}-{digits[4:8]}, {self.agreement.title})"

    # What is there

    def status(self) -> SessionStatus:
        """Where it stands."""
        found = self._transport.get_session(self.id)
        if found.session != self.id or found.agreement != self.agreement.digest:
            raise MalformedError("the coordinator answered for another session")
        parties = tuple((party.party, party.phase) for party in found.parties)
        return SessionStatus(
            found.session,
            found.agreement,
            found.phase,
            parties,
            found.code,
            found.deadline_ms,
            found.percent,
            {party.party: party.code for party in found.parties if party.code},
        )

    def verify(self, *, trust_head: bytes | None = None) -> VerifiedOffer:
        """The enclave of this session, verified now with a fresh nonce: off-1 to off-6, att-*, chn-*.

        `trust_head`: a head (48 bytes) that another member told, where the state of the series is lost (F6). StateError
        where there is no state, or where a newer version than this one was signed.
        """
        return self._verify(trust_head).offer

    @property
    def image(self) -> AcceptedImage | None:
        """Which of the agreement's images the enclave was verified to run: when this object verified it last, otherwise when
        this member joined; None where neither was."""
        joined = self._state.joined(self.id)
        if self._image is None and joined is not None:
            document = parse_unverified(joined.document)  # it was verified before the state kept it
            return matching_image(self.agreement, document.pcrs, at_ms=document.timestamp_ms)
        return self._image

    def _verify(self, trust_head: bytes | None = None) -> _Verified:
        series = self._known_series(trust_head)
        self._check_newest(series)
        lineage = self._connection.lineage(self.agreement)
        nonce = secrets.token_bytes(32)
        reply = self._transport.attest(self.id, nonce)
        offered = Offer.from_bytes(reply.offer)
        if offered.session != self.id:
            raise MalformedError("the coordinator gave the offer of another session")
        chain = self._follow(series, lineage, offered.head)
        verified = verify_offer(
            self.agreement, reply.offer, reply.document, nonce=nonce, head=chain.head, now_ms=now_ms()
        )
        self._image = seen_image(self.agreement, verified.enclave)
        return _Verified(verified, reply.document, chain)

    def _follow(self, series: Series, lineage: Sequence[Agreement], head: bytes) -> ChainState:
        """The verified chain up to `head`; up to what was verified before where `head` does not follow it (then the
        caller refuses it)."""
        state = series.chain
        if series.anchored and state.head == head:
            return state
        try:
            records = self._transport.chain(series.series, state.head if state.sequence else b"")
        except RefusedError as error:
            if error.code != "head":
                raise
            # The host does not know what this client verified: it rolled the series back.
            return ChainState(series.head)
        found, seen = None, bool(series.anchored)
        for record in records:
            state = verify_chain([record], lineage, now_ms=now_ms(), start=state)
            seen = seen or state.head == series.head
            if seen and state.head == head:
                found = state
        return found or ChainState(series.head)

    # Bringing tables

    def submit(
        self,
        tables: Mapping[str, Source],
        progress: Progress | None = None,
        *,
        sign: bool = True,
        trust_head: bytes | None = None,
        kms_key: str | Key | None = None,
    ) -> Receipt | KmsJoin:
        """Verifies the enclave, seals and uploads one table for each name, and joins. The same again resumes.

        With `sign`, `wait` countersigns the roster when nobody is absent. DataError names file, row and column; then
        nothing was sent. Where the agreement names a KMS key of this member (`kms_key` can be no other), the join is one by
        KMS: it stands for every session, and nobody has to be there until a roster (see `join_by_kms`).
        """
        self._sign = sign
        key = self.kms_key(kms_key)
        sealed = self.seal(tables, progress, trust_head=trust_head)
        if key is None:
            self.upload(sealed, progress)
            return self.join(sealed, progress)
        self.check_kms_key(key)
        self.upload(sealed, progress)
        return self.join_by_kms(sealed, progress, kms_key=key)

    def seal(
        self, tables: Mapping[str, Source], progress: Progress | None = None, *, trust_head: bytes | None = None
    ) -> list[SealedTable]:
        """Reads, checks and seals tables into the spool; a table that stands there sealed already is not sealed again."""
        self._check_tables(tables)
        return self._seal(tables, self._verify(trust_head).offer, progress)

    # Joining

    def join(
        self,
        tables: Sequence[SealedTable] | None = None,
        progress: Progress | None = None,
        *,
        trust_head: bytes | None = None,
    ) -> Receipt:
        """Lets this session's enclave open the uploads: about 2 kB. Without `tables`: those that were joined last.

        StateError where the local state forbids it (F2, F5, F6); RefusedError with the enclave's code for what it found
        wrong in a table.
        """
        # One at a time on this machine: of two joins made at once, only the last one's key is kept, whichever arrives last.
        with self._state.joining(self.agreement.series):
            return self._join(self._verify(trust_head), tables, progress)

    # Joining by KMS

    def _renew_kms_join(self, join: KmsJoin) -> None:
        """Sends the next KMS join, where the last one's one-time key is used up."""
        with self._state.joining(self.agreement.series):
            self._transport.put_kms_join(self._new_kms_join(join.uploads, None)[1])

    def _send_last_kms_join(self) -> None:
        """What joins after a roster that ends unsigned; it may not have arrived yet."""
        last = self._state.kms_join(self.agreement.digest)
        assert last is not None
        self._transport.put_kms_join(last[1])

    def _used_up_join(self) -> KmsJoin | None:
        """The KMS join that stands, where its one-time key is gone."""
        known = self._state.kms_join(self.agreement.digest)
        series = self._state.series(self.agreement.series)
        if known is None or series is None or series.newest.agreement != self.agreement.digest:
            return None
        return None if self._usable(known[0]) else known[0]

    def _renew_used_up(self) -> None:
        """Sends the next KMS join, where the one-time key of the last one is gone, under `joining`. The coordinator brings
        that one into the next session, which would have a roster that this member cannot sign.

        What hinders it is told, not raised: it comes after what the member did, or saw."""
        join = self._used_up_join()
        if join is None:
            return
        try:
            self._transport.put_kms_join(self._new_kms_join(join.uploads, None)[1])
        except ParleyError as error:
            _log.warning("your next join by KMS is not sent, join again (%s): %s", error.code, error)

    def _renew_after(self) -> None:
        """`_renew_used_up`, for who does not hold `joining`; nobody is waited for in vain."""
        if self._used_up_join() is not None:
            with self._state.joining(self.agreement.series):
                self._renew_used_up()

    def _see(self, view: View) -> None:
        """Notes how this session ended; the one-time key of its join goes, and the next KMS join is made."""
        self._state.see(self.id, view)
        self._renew_after()

    def _adopted(self, joined: Joined | None, roster: Roster) -> Joined | None:
        """What is known of this session's join; where it is one by KMS, after the enclave was verified (kms-17)."""
        kms, entry = self._state.kms_join(self.agreement.digest), roster.entry(self.name)
        if kms is None or (joined is not None and not isinstance(joined.join, KmsJoin)):
            return joined
        # A roster that was signed with the join before the last stays what it was.
        if joined is not None and (joined.join == kms[0] or (entry is not None and entry.join == joined.join.digest)):
            return joined
        with self._state.joining(self.agreement.series):
            verified = self._verify()
            self._leave_others(verified)
            # The next one, where the key of this one went with a session that is lost.
            kms = self._state.kms_join(self.agreement.digest) or kms
            made = Joined(
                self.id,
                self.agreement.series,
                self.agreement.digest,
                verified.chain.head,
                verified.offer.offer.to_bytes(),
                verified.document,
                str(View.OPEN),
                kms[1],
                b"",
            )
            self._state.adopt_kms_join(made, verified.chain)
            return made

    def _join(self, verified: _Verified, tables: Sequence[SealedTable] | None, progress: Progress | None) -> Receipt:
        tell(progress, "join", 0, 1)
        uploads = self._uploads(tables)
        known = self._state.joined(self.id)
        if known is not None and known.offer != verified.offer.offer.to_bytes():
            raise StateError("the session had another offer before", code="conflict")
        joined = None
        ordinary = known is not None and isinstance(known.join, Join)
        if known is not None and ordinary and known.join.uploads == uploads and known.view == View.OPEN:
            if known.receipt_cose and self._phase_of(self.name) in ("joined", "countersigned"):
                return verify_receipt(known.receipt_cose, verified.offer.offer, known.join)
            if not known.receipt_cose and self._state.has_roster_key(known.join.roster_key):
                joined = known  # it may have arrived: the same again
        if joined is None:
            self._leave_others(verified)
            joined = self._new_join(verified, uploads)
        reply = self._transport.put_join(self.id, joined.join_cose)
        if reply.code == "conflict" and joined is known:
            # It had arrived, and stood in a roster that has ended before this member had its receipt: its key is used up.
            joined = self._new_join(verified, uploads)
            reply = self._transport.put_join(self.id, joined.join_cose)
        if reply.code:
            raise RefusedError.from_wire(reply.code, f"the enclave refused: {reply.code}")
        receipt = verify_receipt(reply.receipt, verified.offer.offer, joined.join)
        self._state.end_join(self.id, reply.receipt)
        tell(progress, "join", 1, 1)
        return receipt

    def _uploads(self, tables: Sequence[SealedTable] | None) -> tuple[bytes, ...]:
        here = self._state.joined(self.id)
        return here.join.uploads if tables is None and here is not None else super()._uploads(tables)

    def _refused(self) -> str:
        return self.status().refused.get(self.name, "")

    def _leave_others(self, verified: _Verified) -> None:
        """Learns which other sessions under this head are lost; the state refuses the join while one is not (F2)."""
        for other in self._state.others(self.agreement.series, verified.chain.head, self.id):
            try:
                phase = self._transport.get_session(other.session).phase
            except RefusedError as error:
                # A coordinator whose store was restored from a backup knows no such session. That is no more than its word, as
                # "lost" is; with the one-time key goes what this member could still sign there.
                if error.code != "unknown-session":
                    raise
                phase = "lost"
            if phase == "lost":
                self._state.see(other.session, View.LOST)
                self._renew_used_up()

    def _new_join(self, verified: _Verified, uploads: tuple[bytes, ...]) -> Joined:
        offer, identity = verified.offer, self.member.identity
        roster_key = Ed25519PrivateKey.generate()
        context = noise_share_context(self.agreement.series, verified.chain.head)
        share = identity.derive(NOISE_SHARE, context, 32)
        keys = tuple(content_key(self._state.upload(upload), self._state.vault) for upload in uploads)
        info = join_info(offer.digest, self.name, uploads)
        sealed = hpke.seal(offer.offer.sealing_key, JoinKeys(keys, share).to_bytes(), info)
        public = roster_key.public_key().public_bytes_raw()
        join = Join(offer.digest, self.name, uploads, sealed, share_digest(share), public)
        joined = Joined(
            self.id,
            self.agreement.series,
            self.agreement.digest,
            verified.chain.head,
            offer.offer.to_bytes(),
            verified.document,
            str(View.OPEN),
            identity.sign(join.to_bytes()),
            b"",
        )
        self._state.begin_join(joined, roster_key, verified.chain)
        return joined

    def _phase_of(self, party: str) -> str:
        return dict(self.status().parties).get(party, "absent")

    # The roster

    def start(self) -> Roster:
        """Closes the inputs; the roster that the enclave issues. By members named in the agreement's `start` only."""
        if self.name not in self.agreement.session.start:
            raise RefusedError(
                "not-a-member", f"{self.name} may not start; {', '.join(self.agreement.session.start)} may"
            )
        offer = self._verify().offer
        signed = self.member.identity.sign(Start(offer.digest, self.name).to_bytes())
        reply = self._transport.start(self.id, signed)
        return verify_roster(reply.cose, offer.offer, self.agreement)

    def roster(self) -> Roster | None:
        """The roster that stands, verified; None where there is none."""
        found = self._roster()
        return None if found is None else found[0]

    def _roster(self) -> tuple[Roster, bytes] | None:
        try:
            reply = self._transport.get_roster(self.id)
        except RefusedError as error:
            if error.code != "phase":
                raise
            return None
        joined = self._state.joined(self.id)
        # What was joined was verified then; who did not join verifies now.
        offer = self._verify().offer.offer if joined is None else Offer.from_bytes(joined.offer)
        return verify_roster(reply.cose, offer, self.agreement), reply.cose

    def check_roster(self, roster: Roster) -> tuple[str, ...]:
        """Why a roster is not signed without being asked: nobody may be absent, and a roster signed before under this head
        must have had the same parties with the same inputs. Empty where there is no reason.

        StateError, code "roster", where it is never signed: this member's own entry is not its own join.
        """
        joined = self._joined(roster)
        join, entry = joined.join, roster.entry(self.name)
        if entry is None:
            raise StateError("the roster leaves you out: there is nothing to sign", code="roster")
        own = (join.uploads, join.share_digest, join.digest, join.roster_key)
        if (entry.uploads, entry.share_digest, entry.join, entry.roster_key) != own:
            raise StateError("the roster lists another join of yours than the one you made", code="roster")
        reasons = [f"{absentee.party} is absent ({absentee.reason})" for absentee in roster.absentees]
        for former in self._former(roster, joined):
            before = {item.party: item.input for item in former.roster.included}
            now = {item.party: item.input for item in roster.included}
            # Not only other inputs: who is in one and not in the other is what the two releases differ by (G8).
            changed = [party for party in self.agreement.parties if before.get(party) != now.get(party)]
            if changed:
                reasons.append(f"you signed a roster under this head before, with other inputs of {', '.join(changed)}")
        return tuple(reasons)

    def _former(self, roster: Roster, joined: Joined) -> list[SignedRoster]:
        signed = self._state.signed_rosters(joined.head)
        return [former for former in signed if former.roster.digest != roster.digest]

    def _joined(self, roster: Roster) -> Joined:
        joined = self._adopted(self._state.joined(self.id), roster)
        if joined is None:
            raise StateError("you have not joined this session on this machine")
        return joined

    def countersign(self, *, by_hand: bool = False) -> SessionStatus:
        """Consents to the roster that stands; one that was signed before is sent again as it is.

        StateError, code "roster", where the roster is never signed, or only by hand and `by_hand` is not given. One that
        lists an earlier join by KMS, whose key is gone, is such a roster: then the last one is sent again first (kms-17).
        """
        found = self._roster()
        if found is None:
            raise RefusedError("phase", "no roster stands")
        roster, cose = found
        joined = self._joined(roster)
        if not needs_countersignatures(self.agreement):
            raise RefusedError("phase", "the agreement has standing consent: rosters are not signed")
        try:
            signed = self._state.sign_roster(joined, cose, self._consenting(roster, by_hand=by_hand))
            statement = Countersignature.from_bytes(payload_unverified(signed.countersignature))
            proofs = {former.roster.digest: former for former in self._state.signed_rosters(signed.head)}
            evidence = [proofs[digest] for digest in statement.former]
            self._transport.put_countersignature(
                self.id, signed.countersignature, [(item.offer, item.document, item.cose) for item in evidence]
            )
        except StateError:
            if not self._used_up(roster):
                raise
            self._renew_after()
            self._send_last_kms_join()
            raise StateError(
                "the roster lists another join of yours than the last, whose one-time key is used up: refuse it, or wait until "
                "it ends; your next join by KMS is sent, countersign the roster after this one",
                code="roster",
            ) from None
        finally:
            # The next session needs nobody either; least of all where the enclave died meanwhile.
            self._renew_after()
        return self.status()

    def _consenting(
        self, roster: Roster, *, by_hand: bool
    ) -> Callable[[Ed25519PrivateKey, Sequence[SignedRoster]], bytes]:
        # It runs under the lock of the state, so that no other process signs between the checks and the signature.
        def make(key: Ed25519PrivateKey, before: Sequence[SignedRoster]) -> bytes:
            reasons = self.check_roster(roster)
            if reasons and not by_hand:
                raise StateError(f"not signed by itself: {'; '.join(reasons)}", code="roster")
            if roster.expires_at <= now_ms():
                raise RefusedError("expired", "the time to sign this roster is over")
            former = tuple(item.roster.digest for item in before if item.roster.digest != roster.digest)
            consent = RosterConsent(roster.digest, self.name, former)
            one_time = key.sign(consent.to_bytes())
            statement = Countersignature(consent.roster, consent.party, consent.former, one_time)
            return self.member.identity.sign(statement.to_bytes())

        return make

    def refuse(self) -> SessionStatus:
        """Refuses the roster that stands: it ends, and the refusal names this member. StateError where it is signed.

        Whatever the host does with the refusal, this member cannot sign that roster any more. Where its join was one by KMS,
        the next one is sent, so that the next roster needs it no earlier than this one did (kms-17)."""
        found = self._roster()
        if found is None:
            raise RefusedError("phase", "no roster stands")
        roster, _ = found
        self._state.decline(self.id, self.agreement.digest, roster)
        signed = self.member.identity.sign(Refusal(roster.digest, self.name).to_bytes())
        try:
            self._transport.refuse(self.id, signed)
        finally:
            self._renew_after()
        return self.status()

    # Waiting

    def wait(
        self,
        progress: Progress | None = None,
        *,
        sign: bool | None = None,
        timeout_s: float | None = None,
        seen: Callable[[SessionStatus], None] | None = None,
    ) -> SessionStatus:
        """Waits for the release, and does meanwhile what this member owes: joins again where a roster has lapsed, and
        (`sign`; by default as `submit` was told) countersigns. `seen` is called with each status.

        Returns when the session is released, or after `timeout_s`. RefusedError "lost" where it ended without a release:
        then join the next one; nothing is uploaded twice.
        """
        sign = self._sign if sign is None else sign
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with _Bell(self._transport, self.id) as bell:
            return self._wait(progress, sign, end, seen or (lambda _status: None), bell)

    def _wait(
        self,
        progress: Progress | None,
        sign: bool,
        end: float | None,
        seen: Callable[[SessionStatus], None],
        bell: _Bell,
    ) -> SessionStatus:
        while True:
            status = self.status()
            seen(status)
            if status.phase == "released":
                return status
            if status.phase == "lost":
                self._see(View.LOST)
                raise RefusedError(
                    "lost", f"the session is lost ({status.code or 'no reason given'}): join the next one"
                )
            if self._act(status, sign):
                continue
            phases = [phase for _, phase in status.parties]
            if status.phase == "computing":
                tell(progress, "compute", status.percent, 100)
            else:
                ready = "countersigned" if status.phase == "rostered" else "joined"
                tell(progress, "wait", sum(phase in (ready, "countersigned") for phase in phases), len(phases))
            left = _WAKE_S if end is None else min(_WAKE_S, end - time.monotonic())
            if left <= 0:
                return status
            bell.wait(left)

    def _act(self, status: SessionStatus, sign: bool) -> bool:
        """Does what this member owes; whether it did something."""
        joined = self._state.joined(self.id)
        mine = dict(status.parties).get(self.name)
        kms = self._state.kms_join(self.agreement.digest)
        if kms is not None and (joined is None or isinstance(joined.join, KmsJoin)):
            return self._act_by_kms(kms[0], status, mine, sign)
        if joined is None or not joined.receipt_cose:
            return False
        if status.phase == "open" and mine not in ("joined", "countersigned"):
            self.join()
            return True
        if status.phase == "rostered" and sign and mine == "joined" and needs_countersignatures(self.agreement):
            try:
                self.countersign()
            except RefusedError as error:
                if error.code != "phase":  # it ended meanwhile
                    raise
            return True
        return False

    def _act_by_kms(self, join: KmsJoin, status: SessionStatus, mine: str | None, sign: bool) -> bool:
        if status.phase == "open":
            code = status.refused.get(self.name, "") if mine == "refused" else ""
            if code not in ("", "conflict"):
                raise RefusedError.from_wire(code, f"your join by KMS was refused: {CODES.get(code, code)}")
            # "conflict": its one-time key stood in a roster which ended.
            if code == "conflict" or not self._usable(join):
                self._renew_kms_join(join)
                return True
        elif status.phase == "rostered" and sign and mine == "joined" and needs_countersignatures(self.agreement):
            try:
                self.countersign()
            except RefusedError as error:
                if error.code != "phase":  # it ended meanwhile
                    raise
            except StateError:
                roster = self.roster()
                if roster is not None and not self._used_up(roster):
                    raise
                # It ends unsigned.
                self._send_last_kms_join()
                return False
            return True
        return False

    def _used_up(self, roster: Roster) -> bool:
        """Whether a roster lists a KMS join of this member's whose one-time key is gone, unsigned: nobody can sign it."""
        entry = roster.entry(self.name)
        if entry is None or self._state.has_roster_key(entry.roster_key):
            return False
        listed = (entry.uploads, entry.share_digest, entry.join, entry.roster_key)
        kms = [join for join, _ in self._state.kms_joins(self.agreement.digest)]
        own = [(join.uploads, join.share_digest, join.digest, join.roster_key) for join in kms]
        return listed in own and self._state.signed_roster(roster.digest) is None

    # The release

    def release(self, progress: Progress | None = None) -> Release:
        """The release of this session, verified: bundle (bun-*), this member's own roster, the known head. Then the head
        moves. RefusedError "phase" where there is none yet."""
        data = self._state.release(self.id)
        if data is None:
            data = self._transport.bundle(self.id, progress)
        release = Release.read(data, self.member)
        self._accept(release)
        self._state.keep_release(self.id, data)
        self._see(View.RELEASED)
        return release

    def fetch(self, path: str | Path, progress: Progress | None = None, *, opened: bool = False) -> Release:
        """The release, and its bundle as a file; `opened`: with this member's outputs open for everybody to read."""
        release = self.release(progress)
        write_file(Path(path), release.opened_bundle() if opened else release.data, 0o644)
        return release

    def _accept(self, release: Release) -> None:
        verified = release.verified
        record = verified.record.record
        if verified.agreement.digest != self.agreement.digest or record.session != self.id:
            raise StateError("the coordinator gave the release of another session", code="conflict")
        joined = self._state.joined(self.id)
        if joined is not None and verified.bundle.offer != joined.offer:
            raise StateError("the release is of another enclave than the one that was joined", code="conflict")
        mine = verified.roster.entry(self.name)
        if mine is not None and needs_countersignatures(self.agreement):
            signed = self._state.signed_roster(verified.roster.digest)
            if signed is None:
                raise StateError("the release is of a roster that you did not sign on this machine", code="roster")
        elif mine is not None and self._strange(mine, joined):
            raise StateError("the release used other uploads of yours than you joined", code="roster")
        self._move(release)

    def _strange(self, mine: Included, joined: Joined | None) -> bool:
        """Whether a roster that nobody signs used uploads of this member that it has not joined, as far as is known here."""
        kms = [join for join, _ in self._state.kms_joins(self.agreement.digest)]
        if mine.join in {join.digest for join in kms}:
            return False
        if joined is None or isinstance(joined.join, KmsJoin):
            return bool(kms)
        # Until the receipt of a later one, which may have come too late, one that it has replaced is its own, too.
        own = (joined.join, *self._state.replaced_joins(self.id))
        return mine.uploads not in {join.uploads for join in own}

    def _move(self, release: Release) -> None:
        """Moves the head to the release's record; the record must follow what is known, or what is known follow it."""
        series = self._state.series(self.agreement.series)
        if series is None:
            raise StateError(
                "nothing is known here of this series: restore your state, or trust a head that another member tells you"
            )
        bundle, record = release.verified.bundle, release.verified.record.record
        body = record.body
        known = series.chain
        if series.anchored and known.head == record.head:
            return
        if series.anchored and known.head == body.previous:
            moved = verify_chain(
                [(bundle.record, bundle.record_document)], release.verified.lineage, now_ms=now_ms(), start=known
            )
            self._state.move_head(series.series, moved)
            return
        if series.anchored and body.sequence <= known.sequence:
            # An older release: what is known must follow it.
            start = ChainState(record.head, body.sequence, body.charged, self.agreement.version)
            newest = self._connection.agreement(series.newest.agreement).agreement
            before = Series(series.series, record.head, body.sequence, body.charged, start.version, 1, series.signed)
            if self._follow(before, self._connection.lineage(newest), known.head).head != known.head:
                raise StateError(
                    "the release is not in the chain of records that is known: the chain is forked", code="head"
                )
            return
        moved = self._follow(series, release.verified.lineage, record.head)
        if moved.head != record.head or not moved.sequence:
            raise StateError("the release does not follow the head that was verified", code="head")
        self._state.move_head(series.series, moved)
