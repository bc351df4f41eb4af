"""Joins by KMS that stand: put by a party once, used in every session of its agreement until a later one comes."""

from __future__ import annotations

from parley_coordinator import store as db
from parley_coordinator.agreements import parsed
from parley_coordinator.clock import Clock
from parley_coordinator.live import uploads_of
from parley_coordinator.models import KmsJoinRow
from parley_coordinator.store import Store
from parley_protocol.claims import verify_kms_join
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import RefusedError
from parley_protocol.transcript import KmsJoin


class KmsJoins:
    """What may be done with them. `key` is the caller's."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def put(self, key: bytes, cose: bytes) -> tuple[bytes, int]:
        """Stores a KMS join, again without effect (kms-12); (digest, number) of the one that stands."""
        claimed = KmsJoin.from_bytes(payload_unverified(cose))
        with self._store.read() as session:
            row, name = db.agreement_for(session, claimed.agreement, key)
        agreement = parsed(row.canonical)
        join = verify_kms_join(cose, agreement)
        if join.party != name:
            raise RefusedError("not-a-member", "the join is another party's")
        if row.complete_ms is None:
            raise RefusedError("agreement", "the agreement is not signed by all")
        if row.expires_ms <= self._clock():
            raise RefusedError("expired", "the agreement has expired")
        with self._store.write() as session:
            uploads_of(session, agreement.digest, join)
            standing = session.get(KmsJoinRow, (agreement.digest, name))
            if standing is not None and standing.digest == join.digest:
                return standing.digest, standing.number
            if standing is not None and standing.number >= join.number:
                raise RefusedError("conflict", "a later join by KMS stands")
            if standing is not None:
                session.delete(standing)
                session.flush()
            session.add(
                KmsJoinRow(
                    agreement=agreement.digest,
                    party=name,
                    digest=join.digest,
                    number=join.number,
                    cose=cose,
                    at_ms=self._clock(),
                )
            )
        return join.digest, join.number
