"""The agreement that an enclave serves: signed by all its members, with its ancestors, and bound into PCR16.

One enclave process serves one agreement until it ends, so that verifiers and key policies can pin the agreement together
with the image (REVIEW E2). No document is made before the register is locked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from parley_enclave.nsm import Nsm
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.attestation.document import ZERO_PCR, extended
from parley_protocol.attestation.policy import AGREEMENT_PCR, IMAGE_PCRS
from parley_protocol.chain import verify_lineage
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import RefusedError
from parley_protocol.transcript import GENESIS, AgreementSignature, Record


def verify(signed: Sequence[tuple[bytes, Mapping[str, bytes]]]) -> tuple[Agreement, ...]:
    """The versions of a series from (canonical form, signatures by member), oldest first, the one to serve last.

    ParleyError where one is malformed, not signed by all its members, or does not follow the one before (lin-*).
    """
    return verify_lineage([SignedAgreement(canonical, dict(signatures)) for canonical, signatures in signed])


def named_heads(signatures: Mapping[str, bytes]) -> frozenset[bytes]:
    """The heads that an amendment's signers named; the signatures are verified already."""
    return frozenset(AgreementSignature.from_bytes(payload_unverified(signed)).head for signed in signatures.values())


def check_heads(named: frozenset[bytes], records: Sequence[tuple[bytes, bytes]]) -> None:
    """That every named head stands on the chain of verified records: the host hides none that a signer had seen.

    RefusedError "head".
    """
    heads = {GENESIS, *(Record.from_bytes(payload_unverified(signed)).head for signed, _ in records)}
    if not named <= heads:
        raise RefusedError("head")


def check_image(agreement: Agreement, nsm: Nsm) -> None:
    """That the agreement accepts this image, so that nobody waits for clients to find out; RefusedError "attestation"."""
    own = tuple(nsm.register(index).data for index in IMAGE_PCRS)
    if not any((accepted.pcr0, accepted.pcr1, accepted.pcr2) == own for accepted in agreement.measurements):
        raise RefusedError("attestation")


def bind(agreement: Agreement, nsm: Nsm) -> None:
    """Extends PCR16 by the agreement's digest and locks it; RefusedError "conflict" where it holds another one.

    Idempotent: an enclave process that was started again under the same module finds the register as it left it.
    """
    wanted = extended(agreement.digest)
    register = nsm.register(AGREEMENT_PCR)
    if register.data == ZERO_PCR and not register.locked:
        nsm.extend(AGREEMENT_PCR, agreement.digest)
        register = nsm.register(AGREEMENT_PCR)
    if register.data != wanted:
        raise RefusedError("conflict")
    if not register.locked:
        nsm.lock(AGREEMENT_PCR)


def check_time(agreement: Agreement, now_ms: int) -> None:
    """That the agreement has not expired; RefusedError "expired"."""
    if now_ms >= agreement.expires_ms:
        raise RefusedError("expired")
