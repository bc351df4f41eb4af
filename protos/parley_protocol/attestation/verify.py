"""The verifier of attestation documents, in the numbered steps of SPEC (att-1 to att-18).

Two questions, two functions, two results that cannot stand for each other: `verify_live` asks whether an agreed enclave
is there now, by the verifier's clock, with the verifier's nonce; `verify_statement` asks whether one said something at
the document's own time, which stays true for ever and proves nothing about now.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Final

from parley_protocol import limits
from parley_protocol.attestation.chain import check_chain
from parley_protocol.attestation.document import ZERO_PCR, Document, extended, parse_envelope, parse_payload
from parley_protocol.attestation.policy import AGREEMENT_PCR, IMAGE_PCRS, Measurement, Policy
from parley_protocol.errors import MalformedError, VerificationError

_TOKEN: Final = object()
_INSTANCE_PCR: Final = 4


@dataclass(frozen=True, slots=True)
class _Verified:
    module_id: str
    timestamp_ms: int
    pcrs: Mapping[int, bytes] = field(repr=False)
    measurement: Measurement = field(repr=False)
    simulated: bool
    public_key: bytes
    user_data: bytes
    nonce: bytes | None
    # Not a field: `dataclasses.replace` must not carry it over to a changed copy.
    token: InitVar[object]

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError(f"a {type(self).__name__} comes from the verifier and from nowhere else")


@dataclass(frozen=True, slots=True)
class VerifiedEnclave(_Verified):
    """An enclave of the policy that is there now. Only `verify_live` makes it."""


@dataclass(frozen=True, slots=True)
class VerifiedStatement(_Verified):
    """What an enclave of the policy said at `timestamp_ms`. Only `verify_statement` makes it."""


def check_document(document: bytes, *, root_sha256: bytes, at_ms: int | None) -> Document:
    """The fields of a document that is genuine at `at_ms`, or at its own time where that is None: att-1 to att-11.

    Genuine means made by an NSM under this root, for any enclave in the world: no policy is applied.
    """
    return _check(document, roots=(root_sha256,), now_ms=at_ms, tolerance_ms=0)


def verify_live(
    document: bytes, *, policy: Policy, nonce: bytes, user_data: bytes, public_key: bytes, now_ms: int
) -> VerifiedEnclave:
    """The enclave that answered `nonce` (fresh, at least 16 bytes) just now; VerificationError with the step otherwise.

    `user_data` and `public_key` are what the document must carry; `now_ms` is the verifier's clock.
    """
    if len(nonce) < 16:
        raise ValueError("a nonce of fewer than 16 bytes may repeat")
    found = _check(document, roots=policy.root.accepted, now_ms=now_ms, tolerance_ms=limits.CLOCK_SKEW_MS)
    if now_ms - found.timestamp_ms > policy.max_age_ms:  # att-12
        raise VerificationError("att-12", "the document is too old", code="expired", actual=found.timestamp_ms)
    _check_not_of_the_future(found, now_ms)
    measurement = _check_policy(found, policy, at_ms=max(now_ms, found.timestamp_ms))
    if found.nonce != nonce:  # att-16
        raise VerificationError("att-16", "the document answers another nonce", code="attestation")
    _check_contents(found, user_data, public_key)
    return VerifiedEnclave(
        module_id=found.module_id,
        timestamp_ms=found.timestamp_ms,
        pcrs=found.pcrs,
        measurement=measurement,
        simulated=policy.root.platform == "simulated",
        public_key=public_key,
        user_data=user_data,
        nonce=found.nonce,
        token=_TOKEN,
    )


def verify_statement(
    document: bytes, *, policy: Policy, user_data: bytes, public_key: bytes, nonce_present: bool, now_ms: int
) -> VerifiedStatement:
    """What an enclave said at the document's own time, not after `now_ms`; VerificationError with the step otherwise.

    `nonce_present`: whether documents of this kind carry the nonce of a caller; those of records have none.
    """
    found = _check(document, roots=policy.root.accepted, now_ms=None, tolerance_ms=0)
    _check_not_of_the_future(found, now_ms)
    measurement = _check_policy(found, policy, at_ms=found.timestamp_ms)
    if (found.nonce is not None) is not nonce_present:  # att-16
        raise VerificationError("att-16", "a nonce where none belongs, or none where one does", code="attestation")
    _check_contents(found, user_data, public_key)
    return VerifiedStatement(
        module_id=found.module_id,
        timestamp_ms=found.timestamp_ms,
        pcrs=found.pcrs,
        measurement=measurement,
        simulated=policy.root.platform == "simulated",
        public_key=public_key,
        user_data=user_data,
        nonce=found.nonce,
        token=_TOKEN,
    )


def _check(document: bytes, *, roots: Collection[bytes], now_ms: int | None, tolerance_ms: int) -> Document:
    try:
        envelope = parse_envelope(document)
    except MalformedError as error:
        raise VerificationError("att-1", error.message, code="malformed") from None
    try:
        found = parse_payload(envelope.payload)
    except MalformedError as error:
        raise VerificationError("att-2", error.message, code="malformed") from None
    if found.digest != "SHA384" or any(len(register) != limits.PCR_BYTES for register in found.pcrs.values()):
        raise VerificationError("att-3", "the registers are not of SHA-384", code="attestation")
    # The module's clock may be ahead of the verifier's, and its certificate may be as young as the document.
    at_ms = found.timestamp_ms if now_ms is None else max(now_ms, min(found.timestamp_ms, now_ms + tolerance_ms))
    key = check_chain(found, roots=roots, at_ms=at_ms)  # att-4 to att-9
    envelope.check_signature(key, step="att-10")
    assert found.instance_id is not None, "att-7 has checked the module's id"
    if found.pcrs.get(_INSTANCE_PCR) != extended(found.instance_id.encode()):
        raise VerificationError("att-11", "PCR4 is not of the instance that the module names", code="attestation")
    return found


def _check_not_of_the_future(document: Document, now_ms: int) -> None:
    if document.timestamp_ms > now_ms + limits.CLOCK_SKEW_MS:
        raise VerificationError("att-12", "the document is of the future", code="expired", actual=document.timestamp_ms)


def _check_policy(document: Document, policy: Policy, *, at_ms: int) -> Measurement:
    image = [document.pcrs.get(index) for index in IMAGE_PCRS]
    # Real debug enclaves have zero only here; their PCR3 and PCR4 are set.
    if any(register in (None, ZERO_PCR) for register in image):
        raise VerificationError("att-13", "a debug enclave: PCR0, 1 or 2 is zero or absent", code="attestation")
    matching = [measurement for measurement in policy.measurements if measurement.matches(document.pcrs)]
    if not matching:
        raise VerificationError("att-14", "not an image of the agreement", code="attestation", actual=image)
    current = [item for item in matching if item.until_ms is None or at_ms < item.until_ms]
    if not current:
        raise VerificationError("att-14", "the image is no longer accepted", code="expired", actual=image)
    # Only locked registers stand in a document, so what is there cannot change any more.
    if document.pcrs.get(AGREEMENT_PCR) != extended(policy.agreement):
        raise VerificationError("att-15", "PCR16 is not this agreement, or not locked", code="agreement")
    return current[0]


def _check_contents(document: Document, user_data: bytes, public_key: bytes) -> None:
    if document.user_data != user_data:
        raise VerificationError("att-17", "the document carries another statement", code="attestation")
    if document.public_key != public_key:
        raise VerificationError("att-18", "the document carries another key", code="attestation")
