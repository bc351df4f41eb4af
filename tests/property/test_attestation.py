"""Whatever is altered in a document, the verifier refuses it with its one error and never with another."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley_protocol import cose
from parley_protocol.attestation.document import Document, parse_payload, parse_unverified
from parley_protocol.attestation.verify import check_document
from parley_protocol.errors import MalformedError, VerificationError
from support.documents import NOW, chain, document, payload, root_sha256

GOOD = document()
KEYS = sorted(payload())


@given(st.binary(max_size=200))
def test_any_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_unverified(data)


values = st.recursive(
    st.none() | st.integers(-5, 1 << 63) | st.binary(max_size=60) | st.text(max_size=20) | st.floats(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.integers(0, 40), inner, max_size=4),
    max_leaves=6,
)


@given(st.sampled_from(KEYS), values)
def test_any_field_parses_or_is_malformed(key: str, value: object) -> None:
    try:
        assert isinstance(parse_payload(cbor2.dumps({**payload(), key: value})), Document)
    except MalformedError:
        return


# The library reads a serial number that is not positive, and warns.
@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_any_altered_byte_is_refused(place: int, change: int) -> None:
    data = bytearray(GOOD)
    data[place] ^= change
    with pytest.raises(VerificationError):
        check_document(bytes(data), root_sha256=root_sha256(), at_ms=NOW)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=300)
@given(st.integers(1, 4), st.data())
def test_any_altered_certificate_is_refused_though_the_envelope_verifies(level: int, draw: st.DataObject) -> None:
    ders = [issued.der for issued in chain()]
    altered = bytearray(ders[level])
    for _ in range(draw.draw(st.integers(1, 3))):
        altered[draw.draw(st.integers(0, len(altered) - 1))] = draw.draw(st.integers(0, 255))
    if bytes(altered) == ders[level]:
        return
    ders[level] = bytes(altered)
    data = cose.sign(cbor2.dumps(payload(ders)), chain()[-1].key)
    with pytest.raises(VerificationError):
        check_document(data, root_sha256=root_sha256(), at_ms=NOW)
