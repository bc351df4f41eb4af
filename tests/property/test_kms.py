"""The parser of KMS's answers and what stands behind it: nothing that a host sends raises anything else, or opens."""

from __future__ import annotations

import os

from hypothesis import example, given
from hypothesis import strategies as st

from parley_enclave import envelope
from parley_enclave.recipient import Recipient
from parley_protocol.errors import MalformedError
from support.kms import answer

RECIPIENT = Recipient()
KEYS = os.urandom(64)
GOOD = answer(RECIPIENT.public, KEYS)
IMPLICIT = answer(RECIPIENT.public, KEYS, implicit=True)


@st.composite
def altered(draw: st.DrawFn) -> bytes:
    """An answer with a few bytes changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from((GOOD, IMPLICIT))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(("change", "cut", "put"))):
            case "change":
                data[at] ^= draw(st.integers(1, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 40))]
            case _:
                data[at:at] = draw(st.binary(min_size=1, max_size=40))
        if not data:
            return b""
    return bytes(data)


ANY = st.one_of(st.binary(max_size=7000), altered())


@given(ANY)
@example(b"\x30\x80" * 3072)
def test_kms_7_the_parser_raises_malformed_and_nothing_else(data: bytes) -> None:
    try:
        found = envelope.parse(data)
    except MalformedError:
        return
    assert (len(found.recipient), len(found.wrapped), len(found.iv)) == (32, 256, 16)


@given(ANY, st.integers(0, 1100))
def test_kms_8_opening_raises_nothing_and_gives_as_many_bytes_as_were_asked_for(data: bytes, size: int) -> None:
    assert len(RECIPIENT.open(data, size)) == size


@given(altered())
def test_kms_8_an_altered_answer_opens_to_the_keys_only_where_they_are_in_it(data: bytes) -> None:
    """BER can be written in more than one way, and CBC is malleable: but no change that reaches the plaintext passes."""
    opened = RECIPIENT.open(data, len(KEYS))
    try:
        same = envelope.parse(data) in (envelope.parse(GOOD), envelope.parse(IMPLICIT))
    except MalformedError:
        same = False
    assert (opened == KEYS) is same
