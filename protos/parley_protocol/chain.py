"""Chains: the versions of an agreement, and the records of its releases (SPEC, "Chain").

Every offer names the head of its series' chain of records. Enclave and clients verify the records by the same code, so
a host that hides or forks releases is caught by the first honest party that sees both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.claims import verify_record
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import VerificationError
from parley_protocol.transcript import GENESIS, Record


@dataclass(frozen=True, slots=True)
class ChainState:
    """Where a chain stands: its head, the number of records, the releases charged, the version of the last record."""

    head: bytes = GENESIS
    sequence: int = 0
    charged: int = 0
    version: int = 1


def verify_lineage(signed: Sequence[SignedAgreement]) -> tuple[Agreement, ...]:
    """The versions of a series, oldest first, each signed by all its members.

    lin-1 the first is version 1, lin-2 each of the others is the next version and names the digest that it replaces and
    the series, lin-3 every signature of every version (agr-*).
    """
    if not signed:
        raise VerificationError("lin-1", "no agreement", code="agreement")
    lineage: list[Agreement] = []
    for item in signed:
        agreement = item.verify()  # lin-3
        if not lineage:
            if agreement.version != 1:
                raise VerificationError("lin-1", "the versions do not begin with version 1", code="agreement")
        elif not _follows(agreement, lineage):
            raise VerificationError("lin-2", "the versions are no chain from version 1", code="agreement")
        lineage.append(agreement)
    return tuple(lineage)


def _follows(agreement: Agreement, lineage: Sequence[Agreement]) -> bool:
    before = lineage[-1]
    return (
        agreement.version == before.version + 1
        and agreement.replaces == before.digest
        and agreement.series == lineage[0].digest
    )


def verify_chain(
    records: Sequence[tuple[bytes, bytes]],
    lineage: Sequence[Agreement],
    *,
    now_ms: int,
    start: ChainState | None = None,
) -> ChainState:
    """The state after `records`: (COSE, document) pairs, oldest first, that follow `start`.

    chn-1 each is of an agreement of the lineage, no older than the last one's, chn-2 follows the head, chn-3 has the next
    sequence number, chn-4 charges at least one release more, chn-5 is itself good (rec-*).
    """
    state = start or ChainState()
    for signed, document in records:
        state = _follow(state, signed, document, lineage, now_ms)
    return state


def _follow(state: ChainState, signed: bytes, document: bytes, lineage: Sequence[Agreement], now_ms: int) -> ChainState:
    body = Record.from_bytes(payload_unverified(signed)).body
    agreement = next((version for version in lineage if version.digest == body.agreement), None)
    if agreement is None or agreement.version < state.version:
        raise VerificationError(
            "chn-1", "a record of an agreement that is not of this series, or older", code="agreement"
        )
    if body.previous != state.head:
        raise VerificationError(
            "chn-2", "a record does not follow the head", code="head", expected=state.head, actual=body.previous
        )
    if body.sequence != state.sequence + 1:
        raise VerificationError("chn-3", "a record has a wrong sequence number", code="head")
    if body.charged <= state.charged:
        raise VerificationError("chn-4", "a record charges no release", code="head")
    verified = verify_record(signed, document, agreement, now_ms=now_ms)  # chn-5
    return ChainState(verified.record.head, body.sequence, body.charged, agreement.version)
