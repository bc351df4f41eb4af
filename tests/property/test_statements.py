"""Whatever bytes arrive, a parser of statements gives a statement that encodes back to them, or raises MalformedError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley_protocol import output, transcript
from parley_protocol.encoding import Value, encode
from parley_protocol.errors import MalformedError
from parley_protocol.shapes import Statement

KINDS: list[type[Statement]] = [
    kind
    for module in (transcript, output)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Statement) and kind is not Statement
]
SCALARS: st.SearchStrategy[Value] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.binary(max_size=64),
    st.sampled_from([16, 32, 48, 64, 1216]).map(bytes),
    st.text(max_size=12),
)
VALUES: st.SearchStrategy[Value] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=20,
)


def accepts_or_refuses(kind: type[Statement], data: bytes) -> None:
    try:
        statement = kind.from_bytes(data)
    except MalformedError:
        return
    assert statement.to_bytes() == data


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(fields=st.lists(VALUES, max_size=10))
def test_stm_1_any_array_under_the_label(kind: type[Statement], fields: list[Value]) -> None:
    accepts_or_refuses(kind, encode([kind.LABEL, *fields]))


@given(kind=st.sampled_from(KINDS), data=st.binary(max_size=200))
def test_stm_1_any_bytes(kind: type[Statement], data: bytes) -> None:
    accepts_or_refuses(kind, data)


@given(position=st.integers(0, 200), byte=st.integers(0, 255), cut=st.integers(0, 200))
def test_stm_1_a_changed_or_cut_statement(position: int, byte: int, cut: int) -> None:
    data = bytearray(transcript.Receipt(bytes(48), "AA", (bytes(48),), bytes(48), 1).to_bytes())
    data[position % len(data)] = byte
    accepts_or_refuses(transcript.Receipt, bytes(data))
    accepts_or_refuses(transcript.Receipt, bytes(data[: cut % len(data)]))
