"""Frames arrive whole however the stream is cut, and nothing is allocated for a length that a stranger claims."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley_protocol.errors import MalformedError
from parley_protocol.framing import Frame, FrameReader, buffers, header, pack

frames = st.lists(st.builds(Frame, st.binary(max_size=40), st.binary(max_size=60)), min_size=1, max_size=4)


def test_frames_split_at_every_byte() -> None:
    sent = [Frame(b"one", b"payload"), Frame(b"", b""), Frame(b"three"), Frame(b"", b"x" * 300)]
    stream = b"".join(pack(frame.message, frame.payload) for frame in sent)
    for cut in range(len(stream) + 1):
        reader = FrameReader(100, 1000)
        assert reader.feed(stream[:cut]) + reader.feed(stream[cut:]) == sent
        reader.close()


def test_frames_byte_by_byte() -> None:
    reader = FrameReader(100, 1000)
    stream = pack(b"a", b"bc") + pack(b"", b"d")
    assert [frame for byte in stream for frame in reader.feed(bytes([byte]))] == [Frame(b"a", b"bc"), Frame(b"", b"d")]


@given(frames, st.lists(st.integers(0, 400), max_size=8))
def test_any_cuts_give_the_same_frames(sent: list[Frame], cuts: list[int]) -> None:
    stream = b"".join(pack(frame.message, frame.payload) for frame in sent)
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader = FrameReader(100, 100)
    got = [frame for a, b in pairwise(places) for frame in reader.feed(stream[a:b])]
    assert got == sent
    reader.close()


@given(st.binary(max_size=64))
def test_any_bytes_are_frames_or_malformed(data: bytes) -> None:
    reader = FrameReader(16, 16)
    try:
        got = reader.feed(data)
        reader.close()
    except MalformedError:
        return
    assert b"".join(pack(frame.message, frame.payload) for frame in got) == data


def test_frm_1_refuses_a_long_message_from_its_header_alone() -> None:
    reader = FrameReader(100, 100)
    with pytest.raises(MalformedError, match="message"):
        reader.feed(struct.pack(">II", 101, 0))
    with pytest.raises(MalformedError, match="broken"):
        reader.feed(b"")


def test_frm_2_refuses_a_long_payload_from_its_header_alone() -> None:
    with pytest.raises(MalformedError, match="payload"):
        header(struct.pack(">II", 0, 2**32 - 1), limit_message=100, limit_payload=100)


def test_frm_3_refuses_the_end_of_the_stream_within_a_frame() -> None:
    for part in (b"\0", struct.pack(">II", 1, 0)):
        reader = FrameReader(100, 100)
        assert reader.feed(part) == []
        with pytest.raises(MalformedError, match="ended"):
            reader.close()


def test_buffers_do_not_copy_the_payload() -> None:
    piece = memoryview(bytearray(b"12345678")).cast("Q")
    parts = buffers(b"m", [piece, b"", b"9"])
    assert len(parts) == 3
    assert isinstance(parts[1], memoryview) and parts[1].obj is piece.obj
    assert b"".join(parts) == pack(b"m", b"123456789")
