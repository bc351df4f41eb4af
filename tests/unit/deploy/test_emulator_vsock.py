"""vsock as a virtio device, against a guest that the test plays: streams, their ends, credit, and what a guest may not do."""

from __future__ import annotations

import queue
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parley_deploy.emulator import vsock
from parley_deploy.emulator.loop import READ, Loop
from parley_deploy.emulator.vhost import GuestError
from parley_deploy.emulator.vsock import BUFFER_BYTES, GUEST_CID, HOST_CID, REPLIES, Header, Operation, VsockDevice
from support.enclave import until
from support.frontend import RING, SECONDS, FrontEnd, served

HEADER = struct.Struct("<QQIIIHHIII")
BUFFER = 4096
"""What Linux gives for one packet."""
PORT = 5005
ACCEPTED = 9000
ROOM = 1 << 18


class Guest:
    """A driver with buffers in the first ring, and the other end of streams."""

    def __init__(self, front: FrontEnd) -> None:
        self.front = front
        self.rx, self.tx = front.queues
        self.packets: list[tuple[Header, bytes]] = []

    def supply(self, count: int = RING, sizes: tuple[int, ...] = (BUFFER,)) -> None:
        """Gives buffers for packets."""
        for _ in range(count):
            self.rx.add([], sizes)
        self.rx.kick()

    def give(self, data: bytes = b"", **fields: Any) -> None:
        """Any packet."""
        usual = {"source_cid": GUEST_CID, "target_cid": HOST_CID, "source_port": PORT, "target_port": 1}
        usual |= {
            "length": len(data),
            "kind": 1,
            "operation": Operation.RW,
            "flags": 0,
            "allowed": ROOM,
            "forwarded": 0,
        }
        self.tx.add([HEADER.pack(*Header(**{**usual, **fields})), *([data] if data else [])])
        self.tx.kick()

    def answer(self, to: Header, operation: Operation, data: bytes = b"", **fields: Any) -> None:
        """A packet of the stream that `to` belongs to, and the tx ring empty again."""
        self.give(data, operation=operation, source_port=to.target_port, target_port=to.source_port, **fields)
        self.tx.wait()

    def next(self, *, again: bool = True) -> tuple[Header, bytes]:
        """The next packet; its buffer is given back."""
        end = time.monotonic() + SECONDS
        while not self.packets:
            for _, data, buffers in self.rx.finished():
                self.packets.append((Header(*HEADER.unpack(data[:44])), data[44:]))
                if again:
                    ((place, size),) = buffers
                    self.rx.add_again(place, size)
            if self.packets:
                self.rx.kick()
                break
            assert time.monotonic() < end, "no packet"
            select.select([self.rx.call_descriptor], [], [], 0.05)
        return self.packets.pop(0)

    def quiet(self, seconds: float = 0.2) -> None:
        """No packet comes within a time."""
        time.sleep(seconds)
        found = [HEADER.unpack(data[:44]) for _, data, _ in self.rx.finished()]
        assert found == [] and self.packets == []


class Host:
    """The device's host: asks for streams in the device's own thread, and accepts those of the guest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.accepted: queue.Queue[socket.socket] = queue.Queue()
        self.work: queue.Queue[Callable[[], None]] = queue.Queue()
        self.answers: list[bool] = []
        self.opened: list[socket.socket] = []
        self.bell, self.ring = socket.socketpair()

    def make(self, loop: Loop, failed: Callable[[GuestError], None]) -> VsockDevice:
        self.device = VsockDevice(loop, self.path, self.accept, failed)
        loop.add(self.bell, READ, self.turn)
        return self.device

    def turn(self, _: int) -> None:
        self.bell.recv(1)
        self.work.get_nowait()()

    def accept(self, port: int) -> socket.socket | None:
        if port != ACCEPTED:
            return None
        ours, theirs = self.pair()
        self.accepted.put(ours)
        return theirs

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.settimeout(SECONDS)
        self.opened.append(ours)
        return ours, theirs

    def connect(self, port: int = PORT) -> socket.socket:
        ours, theirs = self.pair()
        self.work.put(lambda: self.device.connect(theirs, port, self.answers.append))
        self.ring.send(b"x")
        return ours

    def close(self) -> None:
        for end in (self.bell, self.ring, *self.opened):
            end.close()


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="pv-") as folder:
        made = Host(Path(folder) / "vsock.sock")
        yield made
        made.close()


@pytest.fixture
def failed(host: Host) -> Iterator[list[GuestError]]:
    with served(host.make) as errors:
        yield errors


@pytest.fixture
def guest(host: Host, failed: list[GuestError]) -> Iterator[Guest]:
    with FrontEnd(host.path, 2) as front:
        made = Guest(front.start())
        made.supply()
        yield made


def opened(host: Host, guest: Guest, **fields: Any) -> tuple[socket.socket, Header]:
    """A stream from the host, and its request; the guest has accepted it."""
    end = host.connect()
    request, data = guest.next()
    while request.operation == Operation.CREDIT_UPDATE:
        request, data = guest.next()
    assert (request.operation, data) == (Operation.REQUEST, b"")
    guest.answer(request, Operation.RESPONSE, **fields)
    return end, request


def test_the_guest_reads_its_id(guest: Guest) -> None:
    assert guest.front.ask(24, struct.pack("<III", 0, 8, 0) + bytes(8))[12:] == struct.pack("<Q", GUEST_CID)


def test_the_host_connects_and_both_speak(host: Host, guest: Guest) -> None:
    end = host.connect()
    request, _ = guest.next()
    assert request[:4] == (HOST_CID, GUEST_CID, request.source_port, PORT)
    assert (request.kind, request.flags, request.allowed, request.forwarded) == (1, 0, BUFFER_BYTES, 0)
    assert host.answers == []
    end.sendall(b"early")
    guest.quiet()
    guest.answer(request, Operation.RESPONSE)
    header, data = guest.next()
    assert (header.operation, header.length, data) == (Operation.RW, 5, b"early")
    until(lambda: host.answers == [True])
    guest.answer(request, Operation.RW, b"and back")
    assert end.recv(100) == b"and back"


def test_a_guest_that_refuses_closes_the_socket(host: Host, guest: Guest) -> None:
    end = host.connect()
    request, _ = guest.next()
    guest.answer(request, Operation.RST)
    assert end.recv(1) == b""
    until(lambda: host.answers == [False])


def test_a_guest_that_does_not_answer_is_given_up(host: Host, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "CONNECT_SECONDS", 0.1)
    end = host.connect()
    guest.next()
    assert end.recv(1) == b""
    assert guest.next()[0].operation == Operation.RST
    until(lambda: host.answers == [False])


def test_without_a_guest_a_connection_is_closed(host: Host, failed: list[GuestError]) -> None:
    assert host.connect().recv(1) == b""
    until(lambda: host.answers == [False])


def test_the_guest_connects_where_somebody_accepts(host: Host, guest: Guest) -> None:
    guest.give(operation=Operation.REQUEST, source_port=77, target_port=ACCEPTED)
    header, _ = guest.next()
    assert (header.operation, header.source_port, header.target_port) == (Operation.RESPONSE, ACCEPTED, 77)
    end = host.accepted.get(timeout=SECONDS)
    guest.give(b"\xb7", source_port=77, target_port=ACCEPTED)
    assert end.recv(10) == b"\xb7"
    end.sendall(b"\xb7")
    assert guest.next()[1] == b"\xb7"


@pytest.mark.parametrize(
    "fields",
    [
        {"operation": Operation.REQUEST, "target_port": ACCEPTED + 1},
        {"operation": Operation.REQUEST, "target_port": ACCEPTED, "target_cid": 2},
        {"operation": Operation.REQUEST, "target_port": ACCEPTED, "kind": 2},
        {"operation": Operation.RW},
        {"operation": Operation.SHUTDOWN},
        {"operation": Operation.CREDIT_REQUEST},
        {"operation": 99},
    ],
)
def test_what_belongs_to_no_stream_is_reset(host: Host, guest: Guest, fields: dict[str, Any]) -> None:
    guest.give(source_port=77, **fields)
    header, _ = guest.next()
    assert (header.operation, header.target_port) == (Operation.RST, 77)
    guest.quiet()


def test_a_reset_of_no_stream_and_packets_of_others_are_not_answered(guest: Guest) -> None:
    guest.give(operation=Operation.RST)
    guest.give(operation=Operation.REQUEST, target_port=ACCEPTED, source_cid=GUEST_CID + 1)
    guest.quiet()


def serve(guest: Guest, ends: dict[int, str], stop: threading.Event) -> None:
    """A guest that accepts, echoes, and ends when the host has ended, until `stop`; `ends` says how each stream ended."""
    received: dict[int, int] = {}
    allowed: dict[int, tuple[int, int]] = {}
    pending: dict[int, bytearray] = {}
    sent: dict[int, int] = {}
    over: set[int] = set()
    while not stop.is_set():
        try:
            select.select([guest.rx.call_descriptor], [], [], 0.01)
            packets = []
            for _, data, buffers in guest.rx.finished():
                packets.append((Header(*HEADER.unpack(data[:44])), data[44:]))
                ((place, size),) = buffers
                guest.rx.add_again(place, size)
            guest.rx.kick()
        except ValueError:
            return
        for header, data in packets:
            port = header.source_port
            allowed[port] = (header.allowed, header.forwarded)
            match header.operation:
                case Operation.REQUEST:
                    received[port], sent[port], pending[port] = 0, 0, bytearray()
                    guest.answer(header, Operation.RESPONSE)
                case Operation.RW:
                    received[port] += len(data)
                    pending[port] += data
                    guest.give(operation=Operation.CREDIT_UPDATE, target_port=port, forwarded=received[port])
                    guest.tx.wait()
                case Operation.SHUTDOWN:
                    over.add(port)
                case Operation.RST:
                    ends[port] = "reset"
                    pending.pop(port, None)
                    over.discard(port)
        for port, waiting in pending.items():
            credit = allowed[port][0] - (sent[port] - allowed[port][1])
            part = bytes(waiting[: min(credit, 1 << 16)])
            if part:
                guest.give(part, target_port=port, forwarded=received[port])
                guest.tx.wait()
                sent[port] += len(part)
                del waiting[: len(part)]
            elif not waiting and port in over:
                over.discard(port)
                guest.give(operation=Operation.SHUTDOWN, flags=3, target_port=port)
                guest.tx.wait()


@pytest.fixture
def echoing(guest: Guest) -> Iterator[dict[int, str]]:
    """The guest echoes in a thread; how streams ended, by the host's port."""
    ends: dict[int, str] = {}
    stop = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        # Its memory is small: what is written is never needed again.
        guest.front.free = 1 << 20
        try:
            serve(guest, ends, stop)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield ends
    stop.set()
    thread.join(SECONDS)
    assert errors == []


def echo(end: socket.socket, data: bytes) -> bytes:
    """What comes back until the end, when all was sent and this side has ended."""

    def give() -> None:
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=give)
    thread.start()
    got = bytearray()
    while part := end.recv(1 << 16):
        got += part
    thread.join()
    return bytes(got)


def test_a_large_stream_comes_back_whole_and_ends(host: Host, echoing: dict[int, str]) -> None:
    data = bytes(range(256)) * 1600
    assert echo(host.connect(), data) == data
    until(lambda: list(echoing.values()) == ["reset"])


def test_many_streams_at_once(host: Host, echoing: dict[int, str]) -> None:
    results: dict[int, bool] = {}

    def one(number: int) -> None:
        data = bytes([number]) * (number * 1000)
        results[number] = echo(host.connect(), data) == data

    threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(40), True)
    until(lambda: len(echoing) == 40)


# Ends


def test_the_host_ends_its_half_and_still_reads(host: Host, guest: Guest) -> None:
    end, request = opened(host, guest)
    end.sendall(b"last")
    end.shutdown(socket.SHUT_WR)
    assert guest.next()[1] == b"last"
    header, _ = guest.next()
    assert (header.operation, header.flags) == (Operation.SHUTDOWN, 2)
    guest.answer(request, Operation.RW, b"more")
    assert end.recv(10) == b"more"
    guest.answer(request, Operation.SHUTDOWN, flags=3)
    assert end.recv(10) == b""
    assert guest.next()[0].operation == Operation.RST
    guest.quiet()


def test_the_guest_ends_its_half_and_still_reads(host: Host, guest: Guest) -> None:
    end, request = opened(host, guest)
    guest.answer(request, Operation.RW, b"last")
    guest.answer(request, Operation.SHUTDOWN, flags=2)
    assert end.recv(10) == b"last" and end.recv(10) == b""
    end.sendall(b"more")
    assert guest.next()[1] == b"more"
    # What comes after its end is against the rules.
    guest.answer(request, Operation.RW, b"late")
    assert guest.next()[0].operation == Operation.RST
    assert end.recv(10) == b""


def test_a_closed_socket_lets_the_guest_read_what_there_was(host: Host, guest: Guest) -> None:
    end, request = opened(host, guest)
    end.sendall(b"bye")
    end.close()
    assert guest.next()[1] == b"bye"
    assert [guest.next()[0][6:8] for _ in range(2)] == [(Operation.SHUTDOWN, 2), (Operation.SHUTDOWN, 3)]
    guest.answer(request, Operation.RW, b"nobody reads")
    assert guest.next()[0].operation == Operation.RST
    guest.answer(request, Operation.RW, b"none")
    assert guest.next()[0].operation == Operation.RST


def test_a_guest_that_keeps_a_closed_stream_is_reset(host: Host, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "CLOSE_SECONDS", 0.1)
    end, _ = opened(host, guest)
    end.close()
    assert [guest.next()[0].operation for _ in range(3)] == [Operation.SHUTDOWN, Operation.SHUTDOWN, Operation.RST]


def test_a_reset_by_the_guest_closes_the_socket(host: Host, guest: Guest) -> None:
    end, request = opened(host, guest)
    guest.answer(request, Operation.RST)
    assert end.recv(1) == b""
    guest.quiet()


@pytest.mark.parametrize("how", ["reset", "gone"])
def test_all_streams_end_with_the_guest(host: Host, guest: Guest, how: str) -> None:
    ends = [opened(host, guest)[0] for _ in range(3)]
    waiting = host.connect()
    guest.next()
    if how == "reset":
        guest.front.stop()
    else:
        guest.front.socket.close()
    for end in (*ends, waiting):
        assert end.recv(1) == b""
    until(lambda: host.answers == [True, True, True, False])
    assert host.connect().recv(1) == b""


def test_after_a_reset_streams_are_new(host: Host, guest: Guest) -> None:
    opened(host, guest)
    guest.front.stop()
    for ring in (guest.rx, guest.tx):
        ring.renew()
        ring.start()
    guest.supply()
    end, request = opened(host, guest)
    guest.answer(request, Operation.RW, b"again")
    assert end.recv(10) == b"again"


# Credit


def test_the_guest_gets_no_more_than_it_has_room_for(host: Host, guest: Guest) -> None:
    end, request = opened(host, guest, allowed=1000)
    end.sendall(bytes(2500))
    assert len(guest.next()[1]) == 1000
    guest.quiet()
    guest.answer(request, Operation.CREDIT_UPDATE, allowed=1000, forwarded=600)
    assert len(guest.next()[1]) == 600
    guest.answer(request, Operation.CREDIT_UPDATE, allowed=5000, forwarded=1600)
    assert len(guest.next()[1]) == 900
    guest.quiet()


def test_a_guest_that_has_forwarded_more_than_it_got_gets_nothing(host: Host, guest: Guest) -> None:
    end, request = opened(host, guest, allowed=1000, forwarded=1)
    end.sendall(bytes(10))
    guest.quiet()
    guest.answer(request, Operation.CREDIT_UPDATE, allowed=1000, forwarded=0)
    assert len(guest.next()[1]) == 10


def test_the_guest_hears_of_its_credit(host: Host, guest: Guest) -> None:
    end, request = opened(host, guest)
    piece = bytes(BUFFER_BYTES // 8)
    guest.answer(request, Operation.RW, piece)
    guest.quiet()
    guest.answer(request, Operation.RW, piece)
    header, _ = guest.next()
    assert (header.operation, header.forwarded) == (Operation.CREDIT_UPDATE, 2 * len(piece))
    guest.answer(request, Operation.CREDIT_REQUEST)
    assert guest.next()[0][6:] == (Operation.CREDIT_UPDATE, 0, BUFFER_BYTES, 2 * len(piece))
    assert end.recv(1 << 20) == bytes(2 * len(piece))


def test_a_guest_beyond_its_credit_is_reset(host: Host, guest: Guest) -> None:
    end, request = opened(host, guest)
    taken = 0
    # The socket takes some itself; what waits behind it is bounded.
    while taken < 32 * BUFFER_BYTES:
        guest.answer(request, Operation.RW, bytes(1 << 14))
        guest.front.free = 1 << 20
        taken += 1 << 14
        last = [Header(*HEADER.unpack(data[:44])) for _, data, _ in guest.rx.finished()]
        if any(header.operation == Operation.RST for header in last):
            break
    assert BUFFER_BYTES < taken < 8 * BUFFER_BYTES
    while end.recv(1 << 20):
        pass


def test_a_host_that_does_not_read_holds_up_its_stream_alone(host: Host, guest: Guest) -> None:
    _slow, first = opened(host, guest)
    for _ in range(40):
        guest.answer(first, Operation.RW, bytes(1 << 13))
    guest.front.free = 1 << 20
    end, second = opened(host, guest)
    guest.answer(second, Operation.RW, b"not held up")
    assert end.recv(100) == b"not held up"


# What a guest may not do


def test_replies_wait_in_bounded_number(host: Host, failed: list[GuestError]) -> None:
    with FrontEnd(host.path, 2) as front:
        guest = Guest(front.start())
        finished = 0
        end = time.monotonic() + SECONDS
        # Long enough to see that no more are taken.
        after = 0
        while after < 10:
            while len(guest.tx.unused) > 1:
                guest.give(operation=Operation.RW)
            time.sleep(0.02)
            finished += len(list(guest.tx.finished()))
            after += finished >= REPLIES
            assert time.monotonic() < end
        assert finished == REPLIES
        # With buffers for the replies it goes on.
        guest.supply()
        until(lambda: finished + len(list(guest.tx.finished())) > REPLIES)
    assert failed == []


@pytest.mark.parametrize(
    ("readable", "words"),
    [
        ([bytes(43)], "no packet of vsock"),
        ([HEADER.pack(GUEST_CID, HOST_CID, PORT, 1, 9, 1, Operation.RW, 0, ROOM, 0), b"12345678"], "packet of 9 bytes"),
    ],
)
def test_a_packet_that_is_none_ends_the_device(
    host: Host, guest: Guest, failed: list[GuestError], readable: list[bytes], words: str
) -> None:
    end, request = opened(host, guest)
    if len(readable) > 1:
        header = Header(*HEADER.unpack(readable[0]))._replace(target_port=request.source_port)
        readable = [HEADER.pack(*header), readable[1]]
    guest.tx.add(readable)
    guest.tx.kick()
    assert end.recv(1) == b""
    until(lambda: failed)
    assert words in str(failed[0])


@pytest.mark.parametrize("sizes", [(44,), (10, 20)])
def test_a_buffer_without_room_ends_the_device(host: Host, failed: list[GuestError], sizes: tuple[int, ...]) -> None:
    with FrontEnd(host.path, 2) as front:
        guest = Guest(front.start())
        guest.supply(1, sizes)
        end = host.connect()
        assert end.recv(1) == b""
        until(lambda: failed)
        assert "without room" in str(failed[0])


def test_headers_may_lie_across_buffers(host: Host, failed: list[GuestError]) -> None:
    with FrontEnd(host.path, 2) as front:
        guest = Guest(front.start())
        guest.supply(8, (20, 30, 100))
        end = host.connect()
        request, _ = guest.next(again=False)
        guest.answer(request, Operation.RESPONSE)
        end.sendall(bytes(range(200)))
        parts = [guest.next(again=False)[1] for _ in range(2)]
        assert parts == [bytes(range(106)), bytes(range(106, 200))]
        header = HEADER.pack(GUEST_CID, HOST_CID, PORT, request.source_port, 3, 1, Operation.RW, 0, ROOM, 0)
        guest.tx.add([header[:7], header[7:] + b"a", b"bc"])
        guest.tx.kick()
        assert end.recv(10) == b"abc"
    assert failed == []
