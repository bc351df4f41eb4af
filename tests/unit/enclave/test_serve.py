"""A worker's pulls, against hosts of all kinds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from parley_enclave.engine import FrameError
from parley_enclave.serve import Serve, UnservedError
from parley_protocol import framing, limits
from parley_protocol.v1 import enclave_pb2 as pb
from support.enclave import receive

BLOB = bytes(range(256)) * 64
Answer = Callable[[pb.Pull], bytes]


def frames(pieces: list[bytes]) -> bytes:
    message = pb.Ask(frames=pb.Frames(lengths=[len(piece) for piece in pieces])).SerializeToString()
    return framing.pack(message, b"".join(pieces))


def honest(pull: pb.Pull) -> bytes:
    return frames([BLOB[part.offset : part.offset + part.length] for part in pull.ranges])


@pytest.fixture
def host() -> Iterator[Callable[[Answer], Serve]]:
    open_sockets: list[socket.socket] = []

    def make(answer: Answer) -> Serve:
        theirs, ours = socket.socketpair()
        open_sockets.extend((theirs, ours))

        def run() -> None:
            try:
                while True:
                    theirs.sendall(answer(pb.Answer.FromString(receive(theirs)[0]).pull))
            except (OSError, EOFError):
                theirs.close()

        threading.Thread(target=run, daemon=True).start()
        return Serve(ours)

    yield make
    for each in open_sockets:
        each.close()


def test_ranges_come_in_order_and_read_only(host: Callable[[Answer], Serve]) -> None:
    ranges = [(5, 10), (0, 0), (1000, 3), (0, 256)]
    pieces = host(honest).pull(9, ranges)
    assert [bytes(piece) for piece in pieces] == [BLOB[start : start + length] for start, length in ranges]
    assert all(piece.readonly for piece in pieces)


def test_long_and_many_ranges_are_split_over_pulls(
    host: Callable[[Answer], Serve], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parley_protocol.limits.PAYLOAD_BYTES", 1000)
    monkeypatch.setattr("parley_protocol.limits.PULL_RANGES", 7)
    seen: list[pb.Pull] = []

    def answer(pull: pb.Pull) -> bytes:
        seen.append(pull)
        return honest(pull)

    ranges = [(0, 2500), *((start, 10) for start in range(20)), (3, 999), (4, 1000)]
    pieces = host(answer).pull(1, ranges)
    assert [bytes(piece) for piece in pieces] == [BLOB[start : start + length] for start, length in ranges]
    assert all(sum(part.length for part in pull.ranges) <= 1000 and len(pull.ranges) <= 7 for pull in seen)
    assert len(seen) > 5


@pytest.mark.parametrize(
    "answer",
    [
        lambda pull: frames([b"" for _ in pull.ranges]),
        lambda pull: frames([b"x" * (part.length - 1) for part in pull.ranges]),
        lambda pull: frames([b"x" * part.length for part in pull.ranges][:-1]),
        lambda pull: framing.pack(pb.Ask(frames=pb.Frames(lengths=[10, 20])).SerializeToString(), b"x" * 29),
    ],
)
def test_a_range_that_the_host_does_not_hold_is_a_frame_error(host: Callable[[Answer], Serve], answer: Answer) -> None:
    with pytest.raises(FrameError):
        host(answer).pull(1, [(0, 10), (10, 20)])


@pytest.mark.parametrize(
    "answer",
    [
        lambda pull: framing.pack(pb.Ask(status=pb.Status()).SerializeToString()),
        lambda pull: framing.pack(b"\xff\xff"),
        lambda pull: frames([b"x" * (part.length + 1) for part in pull.ranges]),
        lambda pull: (limits.MESSAGE_BYTES + 1).to_bytes(4, "big") + bytes(4),
    ],
)
def test_ses_11_nonsense_costs_the_connection(host: Callable[[Answer], Serve], answer: Answer) -> None:
    with pytest.raises(UnservedError):
        host(answer).pull(1, [(0, 10), (10, 20)])


def test_ses_11_a_host_that_leaves_or_is_slow_costs_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = socket.socketpair()
    with theirs, ours:
        monkeypatch.setattr("parley_protocol.limits.PULL_TIMEOUT_MS", 50)
        with pytest.raises(UnservedError):
            Serve(ours).pull(1, [(0, 10)])
    theirs, ours = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(UnservedError):
            Serve(ours).pull(1, [(0, 10)])
