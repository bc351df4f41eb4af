"""An attestation document: an ES384 COSE_Sign1 whose payload is a map of exactly nine keys (SPEC att-1 to att-3).

Source: aws-nitro-enclaves-nsm-api docs/attestation_process.md, and 104 real documents. NitroTPM documents of ordinary
EC2 instances are signed under the same root by certificates of the same form; they have another key in place of `pcrs`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from parley_protocol import limits
from parley_protocol.cose import Envelope, parse
from parley_protocol.encoding import Value, decode, sha384
from parley_protocol.errors import MalformedError

ZERO_PCR: Final = bytes(limits.PCR_BYTES)
_KEYS: Final = frozenset(
    {"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle", "public_key", "user_data", "nonce"}
)
_MODULE_ID: Final = re.compile(r"(i-[0-9a-f]{8,32})-enc[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Document:
    """The fields of a document. `pcrs`: index to 48 bytes; `cabundle`: DER, root first; None: the field was null."""

    module_id: str
    digest: str
    timestamp_ms: int
    pcrs: Mapping[int, bytes]
    certificate: bytes
    cabundle: tuple[bytes, ...]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None

    @property
    def instance_id(self) -> str | None:
        """The parent instance, as the module's id names it; None where the id is not one of an enclave."""
        found = _MODULE_ID.fullmatch(self.module_id)
        return found[1] if found else None


def extended(data: bytes) -> bytes:
    """A register that was extended once from zero by `data`: SHA-384(48 zero bytes ‖ data)."""
    return sha384(ZERO_PCR + data)


def parse_unverified(document: bytes) -> Document:
    """The fields of a document whose signature nobody has checked; MalformedError where it is none."""
    return parse_payload(parse_envelope(document).payload)


def parse_envelope(document: bytes) -> Envelope:
    """A document's envelope (att-1); MalformedError."""
    if len(document) > limits.DOCUMENT_BYTES:
        raise MalformedError(f"document: more than {limits.DOCUMENT_BYTES} bytes")
    return parse(document, limit=limits.DOCUMENT_BYTES)


def parse_payload(payload: bytes) -> Document:
    """The fields in a document's payload (att-2); MalformedError."""
    value = decode(payload, limit=limits.DOCUMENT_BYTES, foreign=True)
    if type(value) is not dict:
        raise MalformedError("document: the payload is not a map")
    if "nitrotpm_pcrs" in value:
        raise MalformedError("document: of a NitroTPM, which is no enclave")
    if value.keys() != _KEYS:
        raise MalformedError("document: other keys than the nine of an enclave's document")
    fields: Mapping[str, Value] = value  # type: ignore[assignment]  # its keys are those nine texts
    cabundle = fields["cabundle"]
    if type(cabundle) is not list or len(cabundle) != limits.CERTIFICATES - 1:
        raise MalformedError(f"document: cabundle is not {limits.CERTIFICATES - 1} certificates")
    return Document(
        module_id=_text(fields["module_id"], "module_id", limits.MODULE_ID_BYTES),
        digest=_text(fields["digest"], "digest", len("SHA384")),
        timestamp_ms=_timestamp(fields["timestamp"]),
        pcrs=_pcrs(fields["pcrs"]),
        certificate=_bytes(fields["certificate"], "certificate", 1, limits.CERTIFICATE_BYTES),
        cabundle=tuple(_bytes(item, "cabundle", 1, limits.CERTIFICATE_BYTES) for item in cabundle),
        public_key=_optional(fields["public_key"], "public_key", 1),
        user_data=_optional(fields["user_data"], "user_data", 0),
        nonce=_optional(fields["nonce"], "nonce", 0),
    )


def _text(value: Value, name: str, most: int) -> str:
    if type(value) is not str or not 1 <= len(value.encode()) <= most:
        raise MalformedError(f"document: {name} is not a text of 1 to {most} bytes")
    return value


def _bytes(value: Value, name: str, least: int, most: int) -> bytes:
    if type(value) is not bytes or not least <= len(value) <= most:
        raise MalformedError(f"document: {name} is not {least} to {most} bytes")
    return value


def _optional(value: Value, name: str, least: int) -> bytes | None:
    # Null and empty are different: the NSM writes null for what was not asked for.
    return None if value is None else _bytes(value, name, least, limits.ATTESTED_FIELD_BYTES)


def _timestamp(value: Value) -> int:
    if type(value) is not int or not 0 < value < 1 << 63:
        raise MalformedError("document: timestamp is not a time in milliseconds")
    return value


def _pcrs(value: Value) -> Mapping[int, bytes]:
    if type(value) is not dict or not 1 <= len(value) <= limits.PCRS:
        raise MalformedError(f"document: pcrs is not a map of 1 to {limits.PCRS} registers")
    registers: dict[int, bytes] = {}
    for index, register in value.items():
        if type(index) is not int or index >= limits.PCRS:
            raise MalformedError("document: pcrs has a key that is no register")
        if type(register) is not bytes or len(register) not in (32, 48, 64):
            raise MalformedError("document: a register has another length than a digest")
        registers[index] = register
    return MappingProxyType(registers)
