"""What a member remembers beside its key: `NAME.state`. It is what makes the promises of a client hold across runs.

Every change is one short transaction under a lock, on the disk before anything is sent that depends on it. The order of a
countersignature is: the signature is written, then the one-time key is unlinked, then the signature is sent; so a member
can sign one roster per join and no more, whatever crashes (REVIEW F7).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parley import spool
from parley.clock import now_ms
from parley.disk import Vault, locked, make_folder, remove_file, write_file
from parley.spool import SealedTable, Spooled
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.chain import ChainState
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import MalformedError, StateError
from parley_protocol.identity import PrivateIdentity
from parley_protocol.kms_policy import Principals
from parley_protocol.shapes import Bytes, Row, Seq, Shape, Statement, Text, Uint
from parley_protocol.transcript import GENESIS, AgreementSignature, AnyJoin, KmsJoin, Receipt, Roster, read_join

_T = TypeVar("_T", bound=Statement)
_DIGEST = Bytes(48)
_COSE = Bytes(0, limits.STATEMENT_BYTES)
_DOCUMENT = Bytes(1, limits.DOCUMENT_BYTES)

Reached = Callable[[str], None]
"""Told the name of each durable step as it is reached; tests stop there."""


class View(StrEnum):
    """What a client knows of a session that it joined: it lives, it is lost, or its release was verified."""

    OPEN = "open"
    LOST = "lost"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class SignedVersion:
    """A version of a series that this member signed."""

    SHAPES: ClassVar[tuple[Shape, ...]] = (Uint(1), _DIGEST)
    version: int
    agreement: bytes


@dataclass(frozen=True, slots=True)
class Series(Statement):
    """A series of agreements: the verified chain, and what this member signed, oldest first. `anchored` 0: the head was
    trusted by hand, and the chain that leads to it is yet to be verified."""

    LABEL: ClassVar[str] = "parley/1/state-series"
    SHAPES: ClassVar[tuple[Shape, ...]] = (
        _DIGEST,
        _DIGEST,
        Uint(),
        Uint(),
        Uint(1),
        Uint(0, 1),
        Seq(Row(SignedVersion), 1, limits.VERSIONS),
    )
    series: bytes
    head: bytes
    sequence: int
    charged: int
    version: int
    anchored: int
    signed: tuple[SignedVersion, ...]

    @property
    def chain(self) -> ChainState:
        """Where the verified chain stands; its beginning where only the head is trusted."""
        return ChainState(self.head, self.sequence, self.charged, self.version) if self.anchored else ChainState()

    @property
    def newest(self) -> SignedVersion:
        """The newest version that this member signed: the only one under which it joins."""
        return self.signed[-1]


@dataclass(frozen=True, slots=True)
class Joined(Statement):
    """A session that this member joined: the attested offer, the last join, its receipt (empty until it came)."""

    LABEL: ClassVar[str] = "parley/1/state-joined"
    SHAPES: ClassVar[tuple[Shape, ...]] = (Bytes(16), _DIGEST, _DIGEST, _DIGEST, _COSE, _DOCUMENT, Text(), _COSE, _COSE)
    session: bytes
    series: bytes
    agreement: bytes
    head: bytes
    offer: bytes = field(repr=False)
    document: bytes = field(repr=False)
    view: str
    join_cose: bytes = field(repr=False)
    receipt_cose: bytes = field(repr=False)

    @property
    def join(self) -> AnyJoin:
        """The last join; a KMS join where the session was joined by one."""
        return read_join(payload_unverified(self.join_cose))


@dataclass(frozen=True, slots=True)
class SignedRoster(Statement):
    """A roster that this member signed, with the proof of what it was, and the countersignature as it was first sent."""

    LABEL: ClassVar[str] = "parley/1/state-roster"
    SHAPES: ClassVar[tuple[Shape, ...]] = (Bytes(16), _DIGEST, _COSE, _DOCUMENT, _COSE, _COSE)
    session: bytes
    head: bytes
    offer: bytes = field(repr=False)
    document: bytes = field(repr=False)
    cose: bytes = field(repr=False)
    countersignature: bytes = field(repr=False)

    @property
    def roster(self) -> Roster:
        """The roster."""
        return Roster.from_bytes(payload_unverified(self.cose))


@dataclass(frozen=True, slots=True)
class KeptReceipt:
    """A receipt and the session that gave it."""

    session: bytes
    receipt: Receipt
    cose: bytes = field(repr=False)


class State:
    """The local state of one member, in `folder`. Nothing is cached: other processes of the member may run."""

    def __init__(self, folder: Path, identity: PrivateIdentity, *, reached: Reached | None = None) -> None:
        self.folder = folder
        self._identity = identity
        self.vault = Vault(identity)
        self._reached = reached or (lambda _step: None)

    def __repr__(self) -> str:
        return f"State({self.folder})"

    @property
    def spool(self) -> Path:
        """Where sealed uploads stand."""
        make_folder(self.folder / "uploads")
        return self.folder / "uploads"

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        make_folder(self.folder)
        with locked(self.folder / "lock"):
            yield

    # Coordinator

    def remember_coordinator(self, address: str, certificate: str | None) -> None:
        """Notes the coordinator that was used last: its address, and the PEM text or SPKI digest that it is pinned to."""
        make_folder(self.folder)
        write_file(
            self.folder / "coordinator.json", json.dumps({"address": address, "certificate": certificate}).encode()
        )

    def coordinator(self) -> tuple[str, str | None] | None:
        """(address, pin) of the coordinator that was used last."""
        found = self._json(self.folder / "coordinator.json")
        return None if found is None else (str(found["address"]), found["certificate"])

    # KMS

    def remember_principals(self, key: str, principals: Principals) -> None:
        """Notes who stands in the policy of the member's KMS key `key`, its ARN."""
        self._write(_principals_name(key), json.dumps(asdict(principals)).encode())

    def principals(self, key: str) -> Principals | None:
        """Who stands in the policy of a KMS key; None where the member never said."""
        found = self._json(self.folder / _principals_name(key))
        if found is None:
            return None
        return Principals(found["coordinator"], tuple(found["administrators"]), tuple(found["sealers"]))

    # Agreements and series

    def keep_agreement(self, signed: SignedAgreement) -> None:
        """Keeps an agreement with signatures that were verified, beside those that are known."""
        with self._transaction():
            known = self.signed_agreement(signed.digest)
            signatures = {**signed.signatures, **(known.signatures if known is not None else {})}
            self._write(
                f"agreements/{signed.digest.hex()}.parley", SignedAgreement(signed.canonical, signatures).to_bytes()
            )

    def signed_agreement(self, digest: bytes) -> SignedAgreement | None:
        """An agreement that is known here."""
        data = self._bytes(self.folder / "agreements" / f"{digest.hex()}.parley")
        return None if data is None else SignedAgreement.from_bytes(data)

    def agreements(self) -> list[SignedAgreement]:
        """All agreements that are known here."""
        paths = sorted((self.folder / "agreements").glob("*.parley"))
        return [SignedAgreement.from_bytes(path.read_bytes()) for path in paths]

    def series(self, series: bytes) -> Series | None:
        """What is known of a series; None where this member has signed nothing of it on this machine."""
        return self._load(Series, f"series/{series.hex()}")

    def sign(self, agreement: Agreement, name: str, *, trust_head: bytes | None = None) -> bytes:
        """This member's signature of an agreement, and the state of its series with it: the same one when asked again.

        StateError: a second successor of one version (F5), an older version than the newest signed, an amendment whose
        series is not known here and no `trust_head` (F6).
        """
        digest, version = agreement.digest, agreement.version
        with self._transaction():
            known = self.series(agreement.series)
            signed = known.signed if known is not None else ()
            if any(entry.version >= version and entry.agreement != digest for entry in signed):
                raise StateError(f"another version {version} of {agreement.title}, or a newer one, is signed already")
            if not any(entry.agreement == digest for entry in signed):
                known = self._successor(known, agreement, trust_head)
                self._write(f"series/{agreement.series.hex()}", known.to_bytes())
                self._reached("series")
            assert known is not None
            before = self._bytes(self.folder / "signatures" / digest.hex())
            if before is not None:
                return before
            cose = self._identity.sign(AgreementSignature(digest, name, known.head).to_bytes())
            kept = self.signed_agreement(digest) or SignedAgreement(agreement.canonical)
            self._write(f"agreements/{digest.hex()}.parley", kept.with_signature(name, cose).to_bytes())
            self._write(f"signatures/{digest.hex()}", cose)
            return cose

    def _successor(self, known: Series | None, agreement: Agreement, trust_head: bytes | None) -> Series:
        entry = SignedVersion(agreement.version, agreement.digest)
        if known is not None:
            follows = known.newest.agreement == agreement.replaces and known.newest.version + 1 == agreement.version
            if not follows:
                raise StateError(
                    f"version {agreement.version} does not replace the version {known.newest.version} you signed"
                )
            return replace(known, signed=(*known.signed, entry))
        if agreement.version == 1:
            return Series(agreement.series, GENESIS, 0, 0, 1, 1, (entry,))
        if trust_head is None:
            raise StateError(
                "nothing is known here of the earlier versions: restore your state, or trust a head that another member tells you"
            )
        return _trusted(agreement, trust_head)

    def trust(self, agreement: Agreement, head: bytes) -> Series:
        """Begins anew with a head that another member told, where the state of a series is lost (F6)."""
        with self._transaction():
            if self.series(agreement.series) is not None:
                raise StateError("the state of this series is there; a head is trusted only where it is lost")
            made = _trusted(agreement, head)
            self._write(f"series/{agreement.series.hex()}", made.to_bytes())
            return made

    def move_head(self, series: bytes, chain: ChainState) -> None:
        """Goes on to a verified head; never back."""
        with self._transaction():
            known = self._known(series)
            if known.anchored and chain.sequence < known.sequence:
                raise StateError("the chain of records would go back", code="head")
            if known.anchored and chain.sequence == known.sequence and chain.head != known.head:
                raise StateError("another head is known with this number: the chain is forked", code="head")
            moved = replace(
                known,
                head=chain.head,
                sequence=chain.sequence,
                charged=chain.charged,
                version=chain.version,
                anchored=1,
            )
            self._write(f"series/{series.hex()}", moved.to_bytes())
            self._reached("head")

    def _known(self, series: bytes) -> Series:
        known = self.series(series)
        if known is None:
            raise StateError(
                "nothing is known here of this series: restore your state, or trust a head that another member tells you"
            )
        return known

    # Uploads

    def uploads(self, agreement: bytes, table: str) -> list[tuple[Spooled, SealedTable]]:
        """The uploads of a table that stand in the spool."""
        found = spool.spooled(self.spool)
        return [pair for pair in found if pair[0].agreement == agreement and pair[0].table == table]

    def upload(self, digest: bytes) -> Spooled:
        """One upload in the spool; StateError where it is not there."""
        folder = self.spool / digest.hex()
        if not folder.is_dir():
            raise StateError("an upload of this session is not in your state; submit the table again")
        return spool.read_entry(folder)

    # Joins

    def joined(self, session: bytes) -> Joined | None:
        """What is known of a session that this member joined."""
        return self._load(Joined, f"sessions/{session.hex()}")

    def sessions(self) -> list[Joined]:
        """All sessions that this member joined."""
        return [_parsed(Joined, path) for path in sorted((self.folder / "sessions").glob("[0-9a-f]*"))]

    def others(self, series: bytes, head: bytes, session: bytes) -> list[Joined]:
        """Other sessions of a series under one head that are neither lost nor released, as far as is known here (F2)."""
        return [
            joined
            for joined in self.sessions()
            if joined.series == series
            and joined.head == head
            and joined.session != session
            and joined.view == View.OPEN
        ]

    @contextmanager
    def joining(self, series: bytes) -> Iterator[None]:
        """Held while a join is made, sent and answered; other clients of this member wait for it."""
        make_folder(self.folder)
        with locked(self.folder / f".joining-{series.hex()[:16]}"):
            yield

    def begin_join(self, joined: Joined, roster_key: Ed25519PrivateKey, chain: ChainState) -> None:
        """Keeps a join before it is sent: first its one-time key, then the join itself; the former join's key goes, and where
        it had other uploads it is kept: the enclave may have it.

        StateError: no state of the series, not the newest version signed, another head than the verified one, another
        session under this head that is neither lost nor released.
        """
        with self._transaction():
            self._check_join(joined, chain)
            before = self.joined(joined.session)
            self._keep_roster_key(roster_key)
            self._follow_chain(joined, chain)
            if before is not None and before.join.uploads != joined.join.uploads:
                name = f"{joined.session.hex()}-{before.join.digest.hex()[:16]}"
                self._write(f"joins/{name}", before.join_cose)
            self._write(f"sessions/{joined.session.hex()}", joined.to_bytes())
            self._reached("join")
            if before is not None:
                self._drop_roster_key(before.join.roster_key)

    def _keep_roster_key(self, roster_key: Ed25519PrivateKey) -> None:
        public = roster_key.public_key().public_bytes_raw()
        sealed = self.vault.seal(roster_key.private_bytes_raw(), b"roster-key" + public)
        self._write(f"roster-keys/{public.hex()}", sealed)
        self._reached("roster-key")

    def _check_join(self, joined: Joined, chain: ChainState) -> None:
        known = self._known(joined.series)
        if known.newest.agreement != joined.agreement:
            raise StateError(f"you signed version {known.newest.version}; sessions of other versions are not joined")
        # Another process of this member may have gone on since the chain was verified, perhaps along another fork.
        behind = chain.sequence < known.sequence or (chain.sequence == known.sequence and chain.head != known.head)
        if joined.head != chain.head or (known.anchored and behind):
            raise StateError("the session does not continue the head that was verified", code="head")
        others = self.others(joined.series, joined.head, joined.session)
        if others:
            raise StateError(
                f"session {others[0].session.hex()[:8]} under the same head is neither lost nor released: two enclaves may not both be fed"
            )
        before = self.joined(joined.session)
        if before is not None and before.offer != joined.offer:
            raise StateError("the session had another offer before", code="conflict")

    def _follow_chain(self, joined: Joined, chain: ChainState) -> None:
        known = self._known(joined.series)
        moved = replace(
            known,
            head=chain.head,
            sequence=chain.sequence,
            charged=chain.charged,
            version=chain.version,
            anchored=1,
        )
        if moved != known:
            self._write(f"series/{joined.series.hex()}", moved.to_bytes())

    def replaced_joins(self, session: bytes) -> list[AnyJoin]:
        """This member's joins of a session that had other uploads than the one after them; none that a receipt has ruled out."""
        return [read_join(payload_unverified(path.read_bytes())) for path in self._replaced(session)]

    def _replaced(self, session: bytes) -> list[Path]:
        return sorted((self.folder / "joins").glob(f"{session.hex()}-*"))

    # Joins by KMS

    def kms_joins(self, agreement: bytes) -> list[tuple[KmsJoin, bytes]]:
        """This member's KMS joins under an agreement, with their envelopes, the last one at the end."""
        found = []
        for path in (self.folder / "kms-joins").glob(f"{agreement.hex()}-*"):
            cose = path.read_bytes()
            found.append((KmsJoin.from_bytes(payload_unverified(cose)), cose))
        return sorted(found, key=lambda item: item[0].number)

    def kms_join(self, agreement: bytes) -> tuple[KmsJoin, bytes] | None:
        """The KMS join that stands under an agreement."""
        found = self.kms_joins(agreement)
        return found[-1] if found else None

    def begin_kms_join(
        self, series: bytes, agreement: bytes, roster_key: Ed25519PrivateKey | None, make: Callable[[int], bytes]
    ) -> bytes:
        """Keeps a KMS join before it is sent: its one-time key first; the former one's key goes (kms-16). The envelope.

        `make` gives it for its number: later ones have greater numbers, also after a backup was restored.
        """
        with self._transaction():
            known = self._known(series)
            if known.newest.agreement != agreement:
                raise StateError(f"you signed version {known.newest.version}; others are not joined by KMS")
            before = self.kms_join(agreement)
            cose = make(max(now_ms(), before[0].number + 1 if before else 1))
            if roster_key is not None:
                self._keep_roster_key(roster_key)
            number = KmsJoin.from_bytes(payload_unverified(cose)).number
            self._write(f"kms-joins/{agreement.hex()}-{number}", cose)
            self._reached("kms-join")
            if before is not None:
                self._drop_roster_key(before[0].roster_key)
            return cose

    def adopt_kms_join(self, joined: Joined, chain: ChainState) -> None:
        """Notes that a session has this member's KMS join, before its roster is looked at (kms-17): as `begin_join`, under
        the same conditions, but with the one-time key that is there."""
        with self._transaction():
            self._check_join(joined, chain)
            self._follow_chain(joined, chain)
            self._write(f"sessions/{joined.session.hex()}", joined.to_bytes())
            self._reached("join")

    # Receipts

    def end_join(self, session: bytes, receipt_cose: bytes) -> None:
        """Keeps the verified receipt of the last join; the joins that it replaced go: none of them comes back (adm-7)."""
        with self._transaction():
            joined = self.joined(session)
            assert joined is not None
            receipt = Receipt.from_bytes(payload_unverified(receipt_cose))
            if receipt.join != joined.join.digest:
                raise StateError("the receipt is for an earlier join", code="conflict")
            self._write(f"receipts/{session.hex()}-{receipt.digest.hex()[:16]}", receipt_cose)
            for path in self._replaced(session):
                remove_file(path)
            self._write(f"sessions/{session.hex()}", replace(joined, receipt_cose=receipt_cose).to_bytes())
            self._reached("receipt")

    def see(self, session: bytes, view: View) -> None:
        """Notes that a session is lost, or that its release was verified. Its one-time key goes."""
        with self._transaction():
            joined = self.joined(session)
            if joined is not None and joined.view != View.RELEASED:
                self._write(f"sessions/{session.hex()}", replace(joined, view=str(view)).to_bytes())
                self._drop_roster_key(joined.join.roster_key)

    def receipts(self) -> list[KeptReceipt]:
        """All receipts, oldest first."""
        found = []
        for path in (self.folder / "receipts").glob("[0-9a-f]*"):
            cose = path.read_bytes()
            receipt = Receipt.from_bytes(payload_unverified(cose))
            found.append(KeptReceipt(bytes.fromhex(path.name.split("-")[0]), receipt, cose))
        return sorted(found, key=lambda kept: kept.receipt.admitted_at)

    # Rosters

    def has_roster_key(self, public: bytes) -> bool:
        """Whether the one-time key of a join is still there."""
        return (self.folder / "roster-keys" / public.hex()).is_file()

    def signed_rosters(self, head: bytes) -> list[SignedRoster]:
        """The rosters that this member signed under a head, oldest first."""
        paths = sorted((self.folder / "rosters").glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime_ns)
        return [signed for signed in (_parsed(SignedRoster, path) for path in paths) if signed.head == head]

    def signed_roster(self, digest: bytes) -> SignedRoster | None:
        """A roster that this member signed; its one-time key is gone for good when this returns it."""
        with self._transaction():
            signed = self._load(SignedRoster, f"rosters/{digest.hex()}")
            if signed is not None:
                self._finish_signature(signed)
            return signed

    def sign_roster(
        self, joined: Joined, cose: bytes, make: Callable[[Ed25519PrivateKey, Sequence[SignedRoster]], bytes]
    ) -> SignedRoster:
        """The countersignature of a roster: one that was made before as it is, else what `make` gives for the one-time key
        and the rosters signed before under this head. It is on the disk, and the key gone, when this returns."""
        roster = Roster.from_bytes(payload_unverified(cose))
        with self._transaction():
            signed = self._load(SignedRoster, f"rosters/{roster.digest.hex()}")
            if signed is None:
                if self.joined(joined.session) != joined:
                    raise StateError("the session was joined anew meanwhile: look at the roster again", code="conflict")
                public = joined.join.roster_key
                sealed = self._bytes(self.folder / "roster-keys" / public.hex())
                if sealed is None:
                    raise StateError("the one-time key of this join is used up; join again")
                private = Ed25519PrivateKey.from_private_bytes(self.vault.open(sealed, b"roster-key" + public))
                countersignature = make(private, self.signed_rosters(joined.head))
                signed = SignedRoster(
                    joined.session, joined.head, joined.offer, joined.document, cose, countersignature
                )
                self._write(f"rosters/{roster.digest.hex()}", signed.to_bytes())
                self._reached("roster-signature")
            self._finish_signature(signed)
            return signed

    def decline(self, session: bytes, agreement: bytes, roster: Roster) -> None:
        """Makes a refusal hold before it is sent: the one-time key goes, so a host that keeps the refusal to itself gains
        nothing. StateError, code "roster", where the roster is signed."""
        with self._transaction():
            if self._load(SignedRoster, f"rosters/{roster.digest.hex()}") is not None:
                raise StateError("you have signed this roster; a consent is not taken back", code="roster")
            joined, listed = self.joined(session), {entry.roster_key for entry in roster.included}
            own = {join.roster_key for join, _ in self.kms_joins(agreement)}
            if joined is not None:
                own.add(joined.join.roster_key)
            for key in own & listed:
                self._drop_roster_key(key)
            self._reached("refusal")

    def _finish_signature(self, signed: SignedRoster) -> None:
        # A crash between the signature and this leaves the key; it must go before the signature is sent.
        joined = self.joined(signed.session)
        keys = {entry.roster_key for entry in signed.roster.included}
        if joined is not None and joined.join.roster_key in keys:
            self._drop_roster_key(joined.join.roster_key)
        self._reached("roster-key-removed")

    def _drop_roster_key(self, public: bytes) -> None:
        if self.has_roster_key(public):
            remove_file(self.folder / "roster-keys" / public.hex())

    # Releases

    def keep_release(self, session: bytes, bundle: bytes) -> None:
        """Keeps a verified bundle."""
        with self._transaction():
            self._write(f"releases/{session.hex()}.bundle", bundle)

    def release(self, session: bytes) -> bytes | None:
        """The bundle of a release that was verified before."""
        return self._bytes(self.folder / "releases" / f"{session.hex()}.bundle")

    def releases(self) -> list[bytes]:
        """The sessions whose releases are kept."""
        return sorted(bytes.fromhex(path.stem) for path in (self.folder / "releases").glob("[0-9a-f]*.bundle"))

    # Files

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        make_folder(path.parent)
        write_file(path, data)

    def _load(self, kind: type[_T], name: str) -> _T | None:
        path = self.folder / name
        return _parsed(kind, path) if path.is_file() else None

    @staticmethod
    def _bytes(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def _json(self, path: Path) -> dict[str, Any] | None:
        data = self._bytes(path)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            raise StateError(f"{path} is damaged") from None
        return found if isinstance(found, dict) else None


def _principals_name(key: str) -> str:
    return f"kms/{key.split(':')[4]}-{key.rpartition('/')[2]}.json"


def _parsed(kind: type[_T], path: Path) -> _T:
    try:
        return kind.from_bytes(path.read_bytes())
    except MalformedError:
        raise StateError(f"{path} is damaged: restore your state from a backup") from None


def _trusted(agreement: Agreement, head: bytes) -> Series:
    if len(head) != len(GENESIS):
        raise MalformedError(f"a head has {len(GENESIS)} bytes")
    entry = SignedVersion(agreement.version, agreement.digest)
    return Series(agreement.series, head, 0, 0, 1, int(head == GENESIS), (entry,))
