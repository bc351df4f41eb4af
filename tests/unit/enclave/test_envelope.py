"""CiphertextForRecipient: what KMS really sent, in both encodings, and everything else."""

from __future__ import annotations

import os

import pytest

from parley_enclave import envelope
from parley_protocol import limits
from parley_protocol.errors import MalformedError
from support import vectors
from support.kms import endless, oid, tlv, written

PARTS = (b"i" * 32, b"w" * 256, b"v" * 16, b"b" * 48)


@pytest.mark.parametrize("recorded", vectors.kms(), ids=lambda recorded: recorded.name)
def test_kms_7_what_kms_sent_is_read(recorded: vectors.RecordedAnswer) -> None:
    found = envelope.parse(recorded.data)
    assert len(found.recipient) == 32
    if recorded.parts is not None:
        parts = {"ciphertext": found.body, "iv": found.iv, "encrypted_key": found.wrapped}
        assert parts == recorded.parts
    else:
        assert recorded.key is not None


@pytest.mark.parametrize("recorded", vectors.kms(), ids=lambda recorded: recorded.name)
def test_the_maker_of_the_tests_writes_what_kms_wrote(recorded: vectors.RecordedAnswer) -> None:
    found = envelope.parse(recorded.data)
    implicit = "implicit" in recorded.name
    assert written(found.recipient, found.wrapped, found.iv, found.body, implicit=implicit) == recorded.data


@pytest.mark.parametrize("recorded", vectors.kms(), ids=lambda recorded: recorded.name)
def test_kms_7_a_truncated_or_longer_answer_is_malformed(recorded: vectors.RecordedAnswer) -> None:
    for length in range(len(recorded.data)):
        with pytest.raises(MalformedError):
            envelope.parse(recorded.data[:length])
    for more in (b"\0", b"\0\0", b"\x05\0", recorded.data):
        with pytest.raises(MalformedError):
            envelope.parse(recorded.data + more)


def _definite(*, content: bytes) -> bytes:
    """The same envelope in definite lengths, with any content."""
    recipient = tlv(
        0x30,
        tlv(0x02, b"\x02"),
        tlv(0x80, PARTS[0]),
        tlv(0x30, envelope._OAEP_SHA256),
        tlv(0x04, PARTS[1]),
    )
    cipher = tlv(0x30, oid("60864801650304012a"), tlv(0x04, PARTS[2]))
    encrypted = tlv(0x30, oid("2a864886f70d010701"), cipher, content)
    enveloped = tlv(0x30, tlv(0x02, b"\x02"), tlv(0x31, recipient), encrypted)
    return tlv(0x30, oid("2a864886f70d010703"), tlv(0xA0, enveloped))


def test_kms_7_the_content_may_come_in_pieces_and_every_length_may_be_definite() -> None:
    wanted = envelope.Envelope(*PARTS)
    body = PARTS[3]
    assert envelope.parse(_definite(content=tlv(0x80, body))) == wanted
    pieces = tlv(0x04, body[:16]), tlv(0x04, body[16:])
    assert envelope.parse(_definite(content=tlv(0xA0, *pieces))) == wanted
    assert envelope.parse(_definite(content=endless(0xA0, *pieces))) == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\x30",
        b"\x30\x80",
        b"\x30\x80\0\0",
        b"\x30\x84\xff\xff\xff\xff",
        b"\x30\x83\0\0\0",
        b"\x04\x80\0\0",
        b"\x1f\x80",
        b"\x30\x80" * 3000,
        b"\x30\x02\0\0",
        os.urandom(400),
        bytes(limits.KMS_BLOB_BYTES),
        written(b"i" * 31, *PARTS[1:]),
        written(b"i" * 33, *PARTS[1:]),
        written(PARTS[0], PARTS[1], b"v" * 15, PARTS[3]),
        written(*PARTS, algorithm=bytes.fromhex("06092a864886f70d0101010500")),
        written(*PARTS).replace(bytes.fromhex("60864801650304012a"), bytes.fromhex("608648016503040106")[:9]),
        written(*PARTS).replace(bytes.fromhex("2a864886f70d010703"), bytes.fromhex("2a864886f70d010702")),
        written(*PARTS).replace(b"\x02\x01\x02", b"\x02\x01\x00"),
        _definite(content=tlv(0x24, tlv(0x04, PARTS[3]))),
        _definite(content=tlv(0xA0, tlv(0x0C, PARTS[3]))),
        _definite(content=tlv(0xA1, tlv(0x04, PARTS[3]))),
        _definite(content=tlv(0x80, PARTS[3]) + tlv(0x05)),
        written(*PARTS[:3], bytes(limits.KMS_BLOB_BYTES)),
    ],
)
def test_kms_7_another_form_is_malformed(wrong: bytes) -> None:
    with pytest.raises(MalformedError):
        envelope.parse(wrong)


def test_kms_7_deep_nesting_is_refused_before_the_stack_ends() -> None:
    data = b""
    for _ in range(2000):
        data = endless(0x30, data)[:6144]
    with pytest.raises(MalformedError):
        envelope.parse(data)
