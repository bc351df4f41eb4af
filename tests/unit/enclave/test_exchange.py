"""Parcels between the main process and its workers."""

from __future__ import annotations

import os
import socket
import struct
import threading

import pytest

from parley_enclave import exchange
from parley_protocol import limits
from parley_protocol.encoding import encode
from parley_protocol.errors import MalformedError


def test_a_parcel_arrives_with_its_parts_and_its_file() -> None:
    left, right = socket.socketpair()
    with left, right, open(os.devnull) as file:
        parts = (b"", b"x" * 3_000_000, b"end")
        sender = threading.Thread(
            target=exchange.send, args=(left, ["scan", 3, None], parts), kwargs={"fds": [file.fileno()]}
        )
        sender.start()
        parcel, fds = exchange.receive_with_files(right)
        sender.join()
        assert (parcel.fields, parcel.parts) == (["scan", 3, None], parts)
        assert len(fds) == 1 and os.fstat(fds[0]).st_rdev == os.fstat(file.fileno()).st_rdev
        os.close(fds[0])


def test_files_that_nobody_asked_for_are_not_kept() -> None:
    left, right = socket.socketpair()
    with left, right, open(os.devnull) as file:
        before = os.listdir("/proc/self/fd")
        for _ in range(200):
            exchange.send(left, ["progress", 1], fds=[file.fileno()])
            assert exchange.receive(right).fields == ["progress", 1]
        assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("cut", [0, 1, 11, 12, 15, 27])
def test_the_other_side_gone_is_an_end(cut: int) -> None:
    left, right = socket.socketpair()
    header = encode([["done"], [7]])
    whole = struct.pack(">IQ", len(header), 7) + header + b"1234567"
    with left, right:
        left.sendall(whole[:cut])
        left.close()
        with pytest.raises(EOFError):
            exchange.receive(right)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"\x00" * 5, 0),
        (encode([["done"], [7]]), 6),
        (encode([["done"], [-1, 8]]), 7),
        (encode([["done"]]), 0),
        (encode({"a": 1}), 0),
    ],
)
def test_a_parcel_that_is_none_is_refused(header: bytes, body: int) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(struct.pack(">IQ", len(header), body) + header + bytes(body))
        with pytest.raises(MalformedError):
            exchange.receive(right)


@pytest.mark.parametrize(
    ("header", "body"), [(limits.WORKER_HEADER_BYTES + 1, 0), (1, limits.WORKER_MESSAGE_BYTES + 1)]
)
def test_lengths_are_checked_before_anything_is_allocated(header: int, body: int) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(struct.pack(">IQ", header, body))
        with pytest.raises(MalformedError):
            exchange.receive(right)


def test_keys_in_a_parcel_are_not_printed() -> None:
    parcel = exchange.Parcel([b"\xaasecret"], (b"secret",))
    assert "secret" not in repr(parcel)
