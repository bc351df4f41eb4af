"""An agreement with its signatures: the file `.parley` (SPEC, "Agreements").

The file is CBOR: ["parley/1/signed-agreement", canonical form, {member: COSE_Sign1}].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Self

from parley_protocol import limits
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.model import Agreement
from parley_protocol.encoding import decode, encode, sha384
from parley_protocol.errors import MalformedError, VerificationError
from parley_protocol.identity import PrivateIdentity
from parley_protocol.transcript import GENESIS, AgreementSignature

LABEL: Final = "parley/1/signed-agreement"
_SIGNATURE_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class SignedAgreement:
    """The canonical form and the members' signatures so far, by name. Nothing in it is verified but by `verify`."""

    canonical: bytes = field(repr=False)
    signatures: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "signatures", MappingProxyType(dict(self.signatures)))

    @property
    def digest(self) -> bytes:
        """The digest of the agreement."""
        return sha384(self.canonical)

    def agreement(self) -> Agreement:
        """The agreement, whoever signed it; MalformedError."""
        return parse(self.canonical)

    def missing(self) -> tuple[str, ...]:
        """Members without a signature, in the agreement's order; those that are there are not verified."""
        return tuple(name for name in self.agreement().members if name not in self.signatures)

    def with_signature(self, member: str, signed: bytes) -> SignedAgreement:
        """The same with one signature more."""
        return SignedAgreement(self.canonical, {**self.signatures, member: signed})

    def verify(self) -> Agreement:
        """The agreement, signed by all its members.

        MalformedError; VerificationError agr-1 to agr-3 for a signature that does not hold, agr-7 for one that is missing
        or that no member made, with the names.
        """
        from parley_protocol.claims import verify_agreement_signature

        agreement = self.agreement()
        missing = [name for name in agreement.members if name not in self.signatures]
        if missing:
            raise VerificationError("agr-7", f"not signed by {_listed(missing)}", code="agreement")
        strangers = [name for name in self.signatures if name not in agreement.members]
        if strangers:
            raise VerificationError("agr-7", f"signed by {_listed(strangers)}, no members", code="agreement")
        for name, signed in self.signatures.items():
            statement = verify_agreement_signature(signed, agreement, name)
            if agreement.version == 1 and statement.head != GENESIS:
                raise VerificationError("agr-8", f"{name} signed version 1 after a record", code="head")
        return agreement

    def to_bytes(self) -> bytes:
        """The file."""
        return encode([LABEL, self.canonical, dict(self.signatures)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What a file holds; MalformedError. The agreement in it is not parsed yet."""
        value = decode(data, limit=limits.SIGNED_AGREEMENT_BYTES)
        if type(value) is not list or len(value) != 3 or value[0] != LABEL:
            raise MalformedError("not a signed agreement")
        canonical, signatures = value[1], value[2]
        if type(canonical) is not bytes or type(signatures) is not dict or len(canonical) > limits.AGREEMENT_BYTES:
            raise MalformedError("not a signed agreement")
        checked: dict[str, bytes] = {}
        for name, signed in signatures.items():
            if type(name) is not str or type(signed) is not bytes or len(signed) > _SIGNATURE_BYTES:
                raise MalformedError("a signature of an agreement is not one")
            checked[name] = signed
        if len(checked) > limits.MEMBERS:
            raise MalformedError("more signatures than members")
        return cls(canonical, checked)


def sign(agreement: Agreement, member: str, identity: PrivateIdentity, head: bytes = GENESIS) -> bytes:
    """A member's signature: `head` is genesis for version 1, else the head that the amendment follows.

    VerificationError agr-3 where the identity is not the one that the agreement names.
    """
    if agreement.members.get(member) != identity.public:
        raise VerificationError("agr-3", f"this is not the key of {member} in the agreement", code="not-a-member")
    return identity.sign(AgreementSignature(agreement.digest, member, head).to_bytes())


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
