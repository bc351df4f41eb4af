"""CiphertextForRecipient: the CMS EnvelopedData that KMS makes for an attested RSA key, in the BER that it really writes.

Lengths are definite or indefinite, and the content is one implicit primitive or a constructed run of octet strings (kms-7).
Whatever has another form is refused with MalformedError; nothing is decided here about what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NoReturn

from parley_protocol import limits
from parley_protocol.errors import MalformedError

IV_BYTES: Final = 16
IDENTIFIER_BYTES: Final = 32
WRAPPED_BYTES: Final = 256

_DEPTH: Final = 8
"""Nesting: the content's octet strings stand in five levels, the algorithms in six."""
_SEQUENCE: Final = 0x30
_SET: Final = 0x31
_INTEGER: Final = 0x02
_OCTETS: Final = 0x04
_OID: Final = 0x06
_CONTEXT_0: Final = 0x80
_CONSTRUCTED: Final = 0x20

_ENVELOPED_DATA: Final = bytes.fromhex("2a864886f70d010703")
_DATA: Final = bytes.fromhex("2a864886f70d010701")
_AES256_CBC: Final = bytes.fromhex("60864801650304012a")
_OAEP_SHA256: Final = bytes.fromhex(
    "06092a864886f70d010107302fa00f300d06096086480165030402010500a11c301a06092a864886f70d010108300d06096086480165030402010500"
)
"""RSAES-OAEP with SHA-256, MGF1 with SHA-256 and the empty label, as KMS writes it: nothing else is asked of KMS."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What an answer of KMS consists of. `recipient`: SHA-256 of the DER of the key that it is for."""

    recipient: bytes
    wrapped: bytes
    iv: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class _Element:
    """One element: its identifier, its content as it stands, its end in the input."""

    tag: int
    content: bytes
    end: int


def parse(data: bytes) -> Envelope:
    """The envelope in an answer of KMS; MalformedError for anything else."""
    if len(data) > limits.KMS_BLOB_BYTES:
        _bad()
    kind, content = _children(_only(data, _SEQUENCE), 2)
    _equal(kind, _OID, _ENVELOPED_DATA)
    enveloped = _only(_content(content, _CONTEXT_0 | _CONSTRUCTED), _SEQUENCE)
    version, recipients, encrypted = _children(enveloped, 3)
    _equal(version, _INTEGER, b"\x02")
    recipient, wrapped = _recipient(_only(_content(recipients, _SET), _SEQUENCE))
    iv, body = _encrypted(_content(encrypted, _SEQUENCE))
    return Envelope(recipient, wrapped, iv, body)


def _recipient(data: bytes) -> tuple[bytes, bytes]:
    version, identifier, algorithm, wrapped = _children(data, 4)
    _equal(version, _INTEGER, b"\x02")
    _equal(algorithm, _SEQUENCE, _OAEP_SHA256)
    return _sized(identifier, _CONTEXT_0, IDENTIFIER_BYTES), _sized(wrapped, _OCTETS, WRAPPED_BYTES)


def _encrypted(data: bytes) -> tuple[bytes, bytes]:
    kind, algorithm, content = _children(data, 3)
    _equal(kind, _OID, _DATA)
    cipher, iv = _children(_content(algorithm, _SEQUENCE), 2)
    _equal(cipher, _OID, _AES256_CBC)
    if content.tag == _CONTEXT_0:
        body = content.content
    else:
        parts = _list(_content(content, _CONTEXT_0 | _CONSTRUCTED))
        body = b"".join(_content(part, _OCTETS) for part in parts)
    return _sized(iv, _OCTETS, IV_BYTES), body


# BER


def _element(data: bytes, at: int, depth: int) -> _Element:
    if depth > _DEPTH or at + 2 > len(data):
        _bad()
    tag, first = data[at], data[at + 1]
    if tag & 0x1F == 0x1F or tag == 0:
        _bad()
    at += 2
    if first == 0x80:
        if not tag & _CONSTRUCTED:
            _bad()
        start = at
        while data[at : at + 2] != b"\0\0":
            at = _element(data, at, depth + 1).end
        return _Element(tag, data[start:at], at + 2)
    length = first
    if first > 0x80:
        width = first & 0x7F
        if width > 2 or at + width > len(data):
            _bad()
        length = int.from_bytes(data[at : at + width], "big")
        at += width
    if at + length > len(data):
        _bad()
    return _Element(tag, data[at : at + length], at + length)


def _list(data: bytes) -> list[_Element]:
    found = []
    at = 0
    while at < len(data):
        element = _element(data, at, 0)
        found.append(element)
        at = element.end
    return found


def _children(data: bytes, count: int) -> list[_Element]:
    found = _list(data)
    if len(found) != count:
        _bad()
    return found


def _only(data: bytes, tag: int) -> bytes:
    (element,) = _children(data, 1)
    return _content(element, tag)


def _content(element: _Element, tag: int) -> bytes:
    if element.tag != tag:
        _bad()
    return element.content


def _equal(element: _Element, tag: int, content: bytes) -> None:
    if _content(element, tag) != content:
        _bad()


def _sized(element: _Element, tag: int, size: int) -> bytes:
    content = _content(element, tag)
    if len(content) != size:
        _bad()
    return content


def _bad() -> NoReturn:
    raise MalformedError("not an answer of KMS for an attested key")
