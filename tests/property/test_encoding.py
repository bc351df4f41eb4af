"""One value, one encoding: whatever decodes encodes to the same bytes, and all else is a MalformedError."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parley_protocol import limits
from parley_protocol.encoding import Value, decode, encode, sha384
from parley_protocol.errors import MalformedError

integers = st.integers(limits.CBOR_INT_MIN, limits.CBOR_INT_MAX)
scalars = st.none() | st.booleans() | integers | st.binary(max_size=40) | st.text(max_size=30)
values: st.SearchStrategy[Value] = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=30), inner, max_size=5)
        | st.dictionaries(st.integers(0, limits.CBOR_INT_MAX), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(values)
def test_enc_1_values_come_back_and_agree_with_another_library(value: Value) -> None:
    data = encode(value)
    assert data == cbor2.dumps(value, canonical=True)
    back = decode(data)
    assert back == value and encode(back) == data


@given(st.binary(max_size=80))
@example(b"\x9f\xff")
@example(b"\xa2\x61b\x00\x61a\x00")
def test_enc_2_any_bytes_decode_to_a_value_of_exactly_these_bytes_or_are_malformed(data: bytes) -> None:
    try:
        value = decode(data)
    except MalformedError:
        return
    assert encode(value) == data


@given(values, st.data())
def test_enc_2_altered_encodings_are_other_values_or_malformed(value: Value, draw: st.DataObject) -> None:
    data = bytearray(encode(value))
    place = draw.draw(st.integers(0, len(data) - 1))
    data[place] ^= draw.draw(st.integers(1, 255))
    try:
        other = decode(bytes(data))
    except MalformedError:
        return
    assert encode(other) == bytes(data) != encode(value)


@pytest.mark.parametrize(
    ("step", "data", "says"),
    [
        ("enc-3", "f93c00", "float"),
        ("enc-3", "fb3ff0000000000000", "float"),
        ("enc-3", "f7", "float"),
        ("enc-3", "f820", "float"),
        ("enc-3", "c240", "tag"),
        ("enc-3", "d8184100", "tag"),
        ("enc-4", "9fff", "indefinite"),
        ("enc-4", "5f4100ff", "indefinite"),
        ("enc-4", "bfff", "indefinite"),
        ("enc-4", "1c", "reserved"),
        ("enc-4", "1800", "minimal"),
        ("enc-4", "1817", "minimal"),
        ("enc-4", "1900ff", "minimal"),
        ("enc-4", "1a0000ffff", "minimal"),
        ("enc-4", "1b00000000ffffffff", "minimal"),
        ("enc-4", "580100", "minimal"),
        ("enc-4", "3b8000000000000000", "range"),
        ("enc-5", "a2616100616100", "duplicate"),
        ("enc-5", "a2616200616100", "sorted"),
        ("enc-5", "a262616100616200", "sorted"),
        ("enc-5", "a201000000", "sorted"),
        ("enc-5", "a20000616100", "different types"),
        ("enc-5", "a1f500", "neither"),
        ("enc-5", "a12000", "neither"),
        ("enc-5", "a1410000", "neither"),
        ("enc-6", "0000", "trailing"),
        ("enc-6", "", "truncated"),
        ("enc-6", "8200", "truncated"),
        ("enc-6", "9bffffffffffffffff", "truncated"),
        ("enc-6", "5bffffffffffffffff", "truncated"),
        ("enc-6", "bbffffffffffffffff", "truncated"),
        ("enc-7", "61ff", "UTF-8"),
        ("enc-7", "63eda080", "UTF-8"),
    ],
)
def test_enc_refuses(step: str, data: str, says: str) -> None:
    with pytest.raises(MalformedError, match=says):
        decode(bytes.fromhex(data))


def test_enc_3_refuses_floats_and_tags() -> None:
    for data in ("f93c00", "c240"):
        with pytest.raises(MalformedError):
            decode(bytes.fromhex(data))
    for value in (
        1.0,
        (1,),
        {1, 2},
        bytearray(b""),
        1 << 64,
        -(1 << 63) - 1,
        "\ud800",
        {1: 0, "a": 0},
        {True: 0},
        {-1: 0},
    ):
        with pytest.raises(MalformedError):
            encode(value)  # type: ignore[arg-type]


def test_enc_4_refuses_what_is_not_minimal() -> None:
    with pytest.raises(MalformedError, match="minimal"):
        decode(b"\x18\x17")
    assert decode(b"\x18\x18") == 24


def test_enc_5_refuses_unsorted_and_duplicate_keys_and_foreign_only_duplicate_ones() -> None:
    unsorted = bytes.fromhex("a2616200616100")
    with pytest.raises(MalformedError, match="sorted"):
        decode(unsorted)
    assert decode(unsorted, foreign=True) == {"a": 0, "b": 0}
    with pytest.raises(MalformedError, match="duplicate"):
        decode(bytes.fromhex("a2616100616100"), foreign=True)


def test_enc_4_only_foreign_maps_may_be_of_indefinite_length() -> None:
    assert decode(bytes.fromhex("bf6161bf01f6ffff"), foreign=True) == {"a": {1: None}}
    for data in ("bf616100ff", "bfff"):
        with pytest.raises(MalformedError, match="indefinite"):
            decode(bytes.fromhex(data))
    for data in ("9fff", "5f4100ff", "7fff", "bf616100", "bf6161ff", "bf616100616100ff", "ff", "bf", "bf616100ffff"):
        with pytest.raises(MalformedError):
            decode(bytes.fromhex(data), foreign=True)


@given(st.binary(max_size=60))
def test_enc_2_any_foreign_bytes_decode_or_are_malformed(data: bytes) -> None:
    try:
        value = decode(data, foreign=True)
    except MalformedError:
        return
    assert decode(encode(value)) == value == cbor2.loads(data)


def test_enc_6_refuses_trailing_bytes_and_more_than_the_limit() -> None:
    with pytest.raises(MalformedError, match="trailing"):
        decode(b"\x00\x00")
    with pytest.raises(MalformedError, match="more than 3"):
        decode(b"\x43abc", limit=3)
    assert decode(b"\x43abc", limit=4) == b"abc"


def test_enc_7_refuses_deep_nesting_both_ways() -> None:
    deep: Value = 0
    for _ in range(limits.CBOR_DEPTH):
        deep = [deep]
    assert decode(encode(deep)) == deep
    with pytest.raises(MalformedError, match="nested"):
        encode([deep])
    with pytest.raises(MalformedError, match="nested"):
        decode(b"\x81" * 10_000 + b"\x00")


def test_sha384_is_the_digest() -> None:
    assert sha384(b"").hex().startswith("38b060a751ac9638")
