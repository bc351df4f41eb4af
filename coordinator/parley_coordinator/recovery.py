"""Records that a restored database lacks, taken back from bundles that somebody has kept (crd-24).

Clients refuse a chain that stops before what they have seen. The bundle of a release proves its record: it is verified as
any reader does, offline, and must follow the chain that is here, so nobody has to be trusted for that who brings one. Of the
sealed outputs it proves nothing, which only their recipients can open: so those that are here stay.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from parley_coordinator import store as db
from parley_coordinator.blobs import BlobStore, bundle_name
from parley_coordinator.clock import Clock
from parley_coordinator.models import (
    AgreementRow,
    BundleRow,
    CountersignatureRow,
    JoinRow,
    LeaseRow,
    RecordRow,
    RosterRow,
    SessionRow,
)
from parley_coordinator.store import Store
from parley_protocol import limits
from parley_protocol.bundle import VerifiedBundle, verify_bundle
from parley_protocol.chain import verify_chain
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import MalformedError, RefusedError, VerificationError
from parley_protocol.transcript import Countersignature


@dataclass(frozen=True, slots=True)
class Restored:
    """What has become of one bundle: the session that has its record here, the number in the chain, whether the record was
    `new` here, and whether the sealed `outputs` of the bundle were stored."""

    series: bytes
    session: bytes
    sequence: int
    new: bool
    outputs: bool


def restore(
    store: Store, blobs: BlobStore, clock: Clock, bundles: Sequence[bytes], *, replace_outputs: bool = False
) -> list[Restored]:
    """Takes back the records and the sealed outputs of bundles, in the order of their chains; again without effect.

    A whole bundle of the same record that is in the store stays there, unless `replace_outputs`.

    VerificationError or MalformedError for what is no good bundle. RefusedError: "unknown-agreement" or "agreement" where
    its agreement is not here, signed by all; "conflict" where the store has another record with its number; "head" where
    one before it is missing; "busy" where a session of the series has a roster. What stands before the one that is
    refused is restored. A coordinator may run meanwhile.
    """
    found = [verify_bundle(data, now_ms=clock()) for data in bundles]
    found.sort(key=lambda verified: (verified.agreement.series, verified.record.record.body.sequence))
    return [_restore(store, blobs, clock, verified, replace_outputs) for verified in found]


def _restore(store: Store, blobs: BlobStore, clock: Clock, verified: VerifiedBundle, replace_outputs: bool) -> Restored:
    identifier = verified.record.record.session
    # Who opened the bundle for others to read did so outside: the store keeps ciphertext alone.
    data = replace(verified.bundle, opened=()).to_bytes()
    series, sequence = verified.agreement.series, verified.record.record.body.sequence
    with store.read() as session:
        holder = _check(session, verified, clock())
        if holder is not None and _row(session, identifier) is None:
            return Restored(series, holder, sequence, new=False, outputs=False)
    kept = None if replace_outputs else _size(blobs, verified, clock())
    # As after a release: the blob first, so that nothing which a row names is missing.
    size = blobs.put(bundle_name(identifier), [data]) if kept is None else kept
    with store.write() as session:
        holder = _check(session, verified, clock())
        if holder is None:
            _add(session, verified, size, clock())
        elif (row := _row(session, identifier)) is not None:
            row.size = size
    return Restored(series, holder or identifier, sequence, new=holder is None, outputs=kept is None)


def _size(blobs: BlobStore, verified: VerifiedBundle, now_ms: int) -> int | None:
    """Bytes of the bundle that the store has of the same record; None where there is none, or a damaged one."""
    try:
        reader = blobs.reader(bundle_name(verified.record.record.session))
    except FileNotFoundError:
        return None
    try:
        data = reader.read(0, min(reader.size, limits.BUNDLE_BYTES + 1))
    finally:
        reader.close()
    try:
        there = verify_bundle(data, now_ms=now_ms)
    except (MalformedError, VerificationError):
        return None
    return len(data) if there.record.record == verified.record.record else None


def _row(session: Session, identifier: bytes) -> BundleRow | None:
    """The bundle of a session, unless it was deleted in its time."""
    query = select(BundleRow).join(SessionRow, SessionRow.number == BundleRow.number)
    return session.scalar(query.where(SessionRow.session == identifier))


def _check(session: Session, verified: VerifiedBundle, now_ms: int) -> bytes | None:
    """None where the record is the next one of its chain here; where it is here already, the session that has it, which
    may be another one that repeated the computation."""
    record, body = verified.record.record, verified.record.record.body
    agreement = session.get(AgreementRow, body.agreement)
    if agreement is None:
        raise RefusedError("unknown-agreement", "the agreement of this release is not here: its members put it first")
    if agreement.complete_ms is None:
        raise RefusedError("agreement", "the agreement of this release is not signed by all here: its members do first")
    rows = db.records(session, agreement.series)
    same = next((row for row in rows if row.sequence == body.sequence), None)
    if same is not None and same.head == record.head:
        return session.get_one(SessionRow, same.number).session
    if same is not None:
        raise RefusedError(
            "conflict", f"the store has another record {body.sequence} of this series: the chain is forked"
        )
    if body.sequence > len(rows) + 1:
        raise RefusedError(
            "head", f"this is record {body.sequence} and the store has {len(rows)}: those between them come first"
        )
    chain = verify_chain([(row.cose, row.document) for row in rows], verified.lineage, now_ms=now_ms)
    verify_chain(
        [(verified.bundle.record, verified.bundle.record_document)], verified.lineage, now_ms=now_ms, start=chain
    )
    live = db.live_session(session, agreement.series)
    if live is not None and live.phase not in ("launching", "open"):
        raise RefusedError("busy", f"a session of this series is {live.phase}: start the coordinator, and let it end")
    return None


def _add(session: Session, verified: VerifiedBundle, size: int, now_ms: int) -> None:
    _end_live(session, verified.agreement.series, now_ms)
    bundle, record = verified.bundle, verified.record.record
    offer, roster, body = verified.offer.offer, verified.roster, record.body
    row = session.scalar(select(SessionRow).where(SessionRow.session == offer.session))
    if row is None:
        row = SessionRow(
            session=offer.session,
            agreement=body.agreement,
            series=verified.agreement.series,
            begin=secrets.token_bytes(16),
            phase="released",
            offer=bundle.offer,
            document=bundle.offer_document,
            start=None,
            roster=None,
            opened_ms=offer.made_at,
            ended_ms=now_ms,
        )
        session.add(row)
        session.flush()
    # Its enclave was told before the database was lost, or is none of a session any more.
    row.phase, row.code, row.roster, row.ended_ms, row.stored_told = "released", "", roster.digest, now_ms, True
    kept = session.get(RosterRow, roster.digest)
    if kept is None:
        session.add(
            RosterRow(
                digest=roster.digest,
                number=row.number,
                cose=bundle.roster,
                expires_ms=roster.expires_at,
                issued_ms=now_ms,
            )
        )
        session.flush()
    else:
        kept.ended = ""
    for cose in bundle.countersignatures:
        party = Countersignature.from_bytes(payload_unverified(cose)).party
        if session.get(CountersignatureRow, (roster.digest, party)) is None:
            session.add(CountersignatureRow(roster=roster.digest, party=party, cose=cose, former=b"", at_ms=now_ms))
    session.add(
        RecordRow(
            head=record.head,
            series=row.series,
            sequence=body.sequence,
            previous=body.previous,
            agreement=row.agreement,
            number=row.number,
            cose=bundle.record,
            document=bundle.record_document,
            at_ms=now_ms,
        )
    )
    session.add(BundleRow(number=row.number, size=size, at_ms=now_ms))
    db.happened(session, "released", row.agreement, now_ms, of=row.session, percent=100)


def _end_live(session: Session, series: bytes, now_ms: int) -> None:
    """Ends the session that lives under the head before: whoever has seen the release joins none of them."""
    row = db.live_session(session, series)
    if row is None:
        return
    # As by a coordinator that takes it over: the one that serves it changes nothing any more, and ends its enclave.
    lease = session.get(LeaseRow, row.number)
    if lease is not None:
        lease.token += 1
        lease.holder, lease.expires_ms = "", now_ms
    row.phase, row.code, row.ended_ms = "lost", "head", now_ms
    session.execute(delete(JoinRow).where(JoinRow.number == row.number))
    if row.session is not None:
        db.happened(session, "lost", row.agreement, now_ms, of=row.session, code="head")
