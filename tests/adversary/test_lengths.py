"""Lengths that lie, nesting without end, streams that never come: refused before anything is allocated for them."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from parley_protocol import cose, framing, limits
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.attestation.document import parse_unverified
from parley_protocol.bundle import Bundle
from parley_protocol.encoding import decode
from parley_protocol.errors import MalformedError
from parley_protocol.framing import FrameReader
from parley_protocol.identity import load_private, load_public
from parley_protocol.output import OutputTable
from parley_protocol.table import Layout
from parley_protocol.transcript import Join, Offer, Receipt, Record, Roster, Upload, UploadHeader
from parley_protocol.v1 import enclave_pb2 as pb
from support.enclave import Host, Simulation, receive

ALLOWED = 4 << 20
"""What a parser may take for a message that says it has gigabytes."""

# A head of CBOR with a length of its own choice, and nothing, or little, behind it.
HUGE = {
    "bytes of 2^63": b"\x5b" + struct.pack(">Q", 2**63),
    "bytes of 2^64-1": b"\x5b" + b"\xff" * 8,
    "bytes of 4 GiB": b"\x5a" + b"\xff" * 4,
    "text of 2^62": b"\x7b" + struct.pack(">Q", 2**62),
    "an array of 2^63": b"\x9b" + struct.pack(">Q", 2**63),
    "an array of 2^32-1 in an array": b"\x81\x9a" + b"\xff" * 4,
    "a map of 2^63": b"\xbb" + struct.pack(">Q", 2**63),
    "an array of 65,535 nulls that are not there": b"\x99\xff\xff\xf6",
    "arrays nested a million deep": b"\x81" * 1_000_000 + b"\xf6",
    "maps nested 100,000 deep": b"\xa1\x00" * 100_000 + b"\xf6",
    "tags nested 100,000 deep": b"\xc2" * 100_000,
    "indefinite arrays": b"\x9f" * 100_000,
    "indefinite bytes without end": b"\x5f" + b"\x41a" * 1000,
    "a number of 64 bytes": b"\xc2\x58\x40" + b"\xff" * 64,
}
PARSERS: dict[str, Callable[[bytes], object]] = {
    "decode": lambda data: decode(data, limit=1 << 20),
    "decode of a module's own": lambda data: decode(data, limit=1 << 20, foreign=True),
    "cose": cose.payload_unverified,
    "agreement": parse,
    "signed agreement": SignedAgreement.from_bytes,
    "bundle": Bundle.from_bytes,
    "document": parse_unverified,
    "output": OutputTable.from_bytes,
    "public key": load_public,
    "private key": load_private,
    **{kind.__name__: kind.from_bytes for kind in (Offer, Upload, UploadHeader, Join, Receipt, Roster, Record)},
}


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("parser", PARSERS)
def test_huge_lengths_are_refused_before_allocation(traced: None, parser: str) -> None:
    for name, data in HUGE.items():
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(MalformedError):
            PARSERS[parser](data)
        used = tracemalloc.get_traced_memory()[1] - before
        assert used < ALLOWED, (name, used)


def test_more_bytes_than_a_statement_may_have_are_not_looked_at(traced: None) -> None:
    data = b"\x59\xff\xff" * (1 << 20)
    for parser in (Offer.from_bytes, Roster.from_bytes, parse_unverified, load_public):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(MalformedError):
            parser(data)
        assert tracemalloc.get_traced_memory()[1] - before < 1 << 20


def test_frames_of_the_channel_are_bounded_by_their_header(traced: None) -> None:
    for message, payload in ((2**32 - 1, 0), (0, 2**32 - 1), (limits.MESSAGE_BYTES + 1, 0), (2**31, 2**31)):
        head = struct.pack(">II", message, payload)
        with pytest.raises(MalformedError):
            framing.header(head)
        reader = FrameReader()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for place in range(len(head) - 1):
            assert reader.feed(head[place : place + 1]) == []
        with pytest.raises(MalformedError):
            reader.feed(head[-1:])
        # Broken once, broken for good: what follows is never taken for a frame.
        with pytest.raises(MalformedError):
            reader.feed(framing.pack(b"x"))
        assert tracemalloc.get_traced_memory()[1] - before < 1 << 20


def test_sizes_of_a_table_are_bounded_by_its_header() -> None:
    header = UploadHeader(bytes(48), "ada", "visits", bytes(48), 1, 1024, bytes(16), bytes(48))
    for groups, group_rows in ((2**62, 16384), (2**16 + 1, 16384), (1, 2**40), (0, 1024), (9, 16384)):
        with pytest.raises(MalformedError):
            Layout.of(replace(header, groups=groups, group_rows=group_rows), [8])


def peak_kib(simulation: Simulation) -> int:
    """The most memory that the enclave's main process has held."""
    assert simulation.process is not None
    text = Path(f"/proc/{simulation.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM"))


def test_an_enclave_holds_out_against_lengths_that_lie(tmp_path: Path) -> None:
    with Simulation(tmp_path) as simulation:
        host = Host(simulation.path)
        assert host.state().phase == "empty"
        before = peak_kib(simulation)
        for head in (b"\xff" * 8, struct.pack(">II", limits.MESSAGE_BYTES + 1, 0), struct.pack(">II", 4, 1)):
            with host.connect() as connection:
                connection.sendall(head + bytes(64))
                # It answers with a code or closes; it does not wait for what was announced.
                try:
                    answer = pb.Answer.FromString(receive(connection)[0])
                except (EOFError, ConnectionError):
                    continue
                assert answer.failed.code == "malformed"
        # Heads that announce what is allowed and send nothing: each costs a connection and no memory.
        idle = [host.connect() for _ in range(20)]
        for connection in idle:
            connection.sendall(struct.pack(">II", limits.MESSAGE_BYTES, 0))
        assert host.state().phase == "empty"
        for connection in idle:
            connection.close()
        for name, data in HUGE.items():
            load = pb.Load(agreements=[pb.SignedAgreement(canonical=data)])
            assert host.refused(load=load) == "malformed", name
        assert host.state().phase == "empty"
        assert peak_kib(simulation) - before < 64 << 10
        host.close()
