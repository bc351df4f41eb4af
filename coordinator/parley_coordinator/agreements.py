"""Agreements and their signatures: put by those whom the operator lists, signed by members, seen by members alone."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from parley_coordinator import store as db
from parley_coordinator.clock import Clock
from parley_coordinator.config import Quotas
from parley_coordinator.models import AgreementRow, Membership, SignatureRow
from parley_coordinator.store import Store
from parley_protocol import limits
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.claims import verify_agreement_signature
from parley_protocol.errors import RefusedError, VerificationError
from parley_protocol.transcript import GENESIS

PARSED_BYTES: Final = 16 << 20
"""Canonical forms whose agreements are kept: thousands of usual ones, or the two largest."""


class Parsed:
    """Agreements by canonical form, those that were asked for last: an inbox asks for all of a member's, one by one."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, Agreement] = OrderedDict()
        self._bytes = 0

    def get(self, canonical: bytes) -> Agreement:
        """The agreement of a canonical form; AgreementError or MalformedError."""
        with self._lock:
            found = self._kept.get(canonical)
            if found is not None:
                self._kept.move_to_end(canonical)
                return found
        agreement = parse(canonical)
        with self._lock:
            if canonical not in self._kept:
                self._kept[canonical] = agreement
                self._bytes += len(canonical)
            while self._bytes > self._most and len(self._kept) > 1:
                self._bytes -= len(self._kept.popitem(last=False)[0])
        return agreement

    def __len__(self) -> int:
        return len(self._kept)


_PARSED: Final = Parsed(PARSED_BYTES)


def parsed(canonical: bytes) -> Agreement:
    """The agreement of a canonical form; AgreementError or MalformedError. Large domains take a while, so it is kept."""
    return _PARSED.get(canonical)


def signed(session: Session, row: AgreementRow) -> SignedAgreement:
    """An agreement with the signatures that are here."""
    return SignedAgreement(row.canonical, db.signatures(session, row.digest))


class AgreementView:
    """An agreement as members see it: canonical form, signatures by member, members that have not signed, and the live session
    of this version, empty where there is none."""

    __slots__ = ("canonical", "missing", "session", "signatures")

    def __init__(self, session: Session, row: AgreementRow) -> None:
        self.canonical = row.canonical
        self.signatures = db.signatures(session, row.digest)
        self.missing = [name for name in parsed(row.canonical).members if name not in self.signatures]
        live = db.live_session(session, row.series)
        self.session = live.session or b"" if live is not None and live.agreement == row.digest else b""


class Agreements:
    """What may be done with agreements. `key` is the caller's."""

    def __init__(self, store: Store, quotas: Quotas, clock: Clock) -> None:
        self._store = store
        self._quotas = quotas
        self._clock = clock

    def put(self, key: bytes, canonical: bytes) -> AgreementView:
        """Stores an agreement, again without effect (crd-4, crd-5)."""
        with self._store.read() as session:
            if not db.is_operator(session, key):
                raise RefusedError("stranger", "the operator does not list this key as one that may put agreements")
        if len(canonical) > limits.AGREEMENT_BYTES:
            raise RefusedError("too-large", f"an agreement has at most {limits.AGREEMENT_BYTES} bytes")
        agreement = parsed(canonical)
        with self._store.write() as session:
            row = session.get(AgreementRow, agreement.digest)
            if row is None:
                self._check_place(session, key, agreement)
                row = self._add(session, key, agreement)
            return AgreementView(session, row)

    def _check_place(self, session: Session, key: bytes, agreement: Agreement) -> None:
        now = self._clock()
        if agreement.expires_ms <= now:
            raise RefusedError("expired", "the agreement has expired")
        put = session.scalar(select(func.count()).select_from(AgreementRow).where(AgreementRow.put_by == key)) or 0
        if put >= self._quotas.agreements_per_member:
            raise RefusedError("quota", "this key has put as many agreements as it may")
        if agreement.replaces is not None:
            before = session.get(AgreementRow, agreement.replaces)
            if before is None:
                raise RefusedError("unknown-agreement", "the version that it replaces is not here")
            if before.complete_ms is None:
                raise RefusedError("agreement", "the version that it replaces is not signed by all")
            if (before.series, before.version + 1) != (agreement.series, agreement.version):
                raise RefusedError("agreement", "it is not the next version of what it replaces")

    def _add(self, session: Session, key: bytes, agreement: Agreement) -> AgreementRow:
        row = AgreementRow(
            digest=agreement.digest,
            series=agreement.series,
            version=agreement.version,
            replaces=agreement.replaces,
            canonical=agreement.canonical,
            put_by=key,
            put_ms=self._clock(),
            complete_ms=None,
            expires_ms=agreement.expires_ms,
        )
        session.add(row)
        session.flush()
        session.add_all(
            Membership(agreement=agreement.digest, name=name, key=member.signing)
            for name, member in agreement.members.items()
        )
        return row

    def sign(self, key: bytes, digest: bytes, member: str, cose: bytes) -> AgreementView:
        """Stores a member's signature once it is one (crd-6)."""
        with self._store.read() as session:
            row, _ = db.agreement_for(session, digest, key)
        agreement = parsed(row.canonical)
        statement = verify_agreement_signature(cose, agreement, member)
        if agreement.version == 1 and statement.head != GENESIS:
            raise VerificationError("agr-8", "signed version 1 after a record", code="head")
        with self._store.write() as session:
            row = session.get_one(AgreementRow, digest)
            there = session.get(SignatureRow, (digest, member))
            if there is None:
                self._store_signature(session, row, agreement, member, cose)
            elif verify_agreement_signature(there.cose, agreement, member).digest != statement.digest:
                raise RefusedError("conflict", "the member has signed with another head")
            return AgreementView(session, row)

    def _store_signature(
        self, session: Session, row: AgreementRow, agreement: Agreement, member: str, cose: bytes
    ) -> None:
        now = self._clock()
        session.add(SignatureRow(agreement=row.digest, member=member, cose=cose, at_ms=now))
        session.flush()
        db.happened(session, "signed", row.digest, now, member=member)
        if set(db.signatures(session, row.digest)) == set(agreement.members):
            row.complete_ms = now
            db.happened(session, "complete", row.digest, now)

    def get(self, key: bytes, digest: bytes) -> AgreementView:
        """An agreement by its digest."""
        with self._store.read() as session:
            row, _ = db.agreement_for(session, digest, key)
            return AgreementView(session, row)

    def newest(self, key: bytes, series: bytes) -> AgreementView:
        """The newest version of a series that the caller is a member of."""
        with self._store.read() as session:
            row = session.scalar(
                select(AgreementRow)
                .join(Membership, Membership.agreement == AgreementRow.digest)
                .where(AgreementRow.series == series, Membership.key == key)
                .order_by(AgreementRow.version.desc(), AgreementRow.put_ms)
                .limit(1)
            )
            if row is None:
                raise RefusedError("unknown-agreement")
            return AgreementView(session, row)
