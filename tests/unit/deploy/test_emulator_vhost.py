"""The vhost-user core: what a front end and a guest may say, and what each wrong thing ends with."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parley_deploy.emulator.loop import Loop
from parley_deploy.emulator.vhost import CHAIN_BYTES, Device, GuestError, Request
from support.enclave import until
from support.frontend import GUEST, INDIRECT, MEMORY, NEXT, RING, USER, WRITE, FrontEnd, served


class Echo(Device):
    """Writes what it reads."""

    queues = 2

    def kicked(self, index: int) -> None:
        ring = self.rings[index]
        while (chain := ring.take()) is not None:
            data = chain.read(chain.readable_bytes)
            chain.write(data)
            ring.finish(chain, len(data))
        ring.notify()

    def stopped(self) -> None:
        pass


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pv-") as folder:
        yield Path(folder) / "device.sock"


@pytest.fixture
def failed(path: Path) -> Iterator[list[GuestError]]:
    def make(loop: Loop, failed: Callable[[GuestError], None]) -> Device:
        return Echo(loop, path, b"12345678", failed)

    with served(make) as errors:
        yield errors


@pytest.fixture
def front(path: Path, failed: list[GuestError]) -> Iterator[FrontEnd]:
    with FrontEnd(path, 2) as made:
        yield made.start()


def works(front: FrontEnd) -> None:
    """An echo through the first ring."""
    queue = front.queues[0]
    head = queue.add([b"abc", b"defg"], [5, 100])
    queue.kick()
    assert queue.wait() == [(head, b"abcdefg")]


def refused(front: FrontEnd, failed: list[GuestError], words: str) -> None:
    """The device hangs up for this reason, and serves the next front end as if nothing had been."""
    assert front.gone()
    until(lambda: failed)
    (error,) = failed
    assert words in str(error)
    failed.clear()
    with FrontEnd(Path(front.socket.getpeername()), 2) as other:
        works(other.start())


def test_chains_come_back_with_what_was_written_over_many_turns_of_the_ring(front: FrontEnd) -> None:
    queue = front.queues[1]
    for turn in range(5 * RING):
        head = queue.add([str(turn).encode()], [8])
        queue.kick()
        assert queue.wait() == [(head, str(turn).encode())]
    # The indices have 16 bits, and go on at 0.
    works(front)


def test_indices_wrap_at_16_bits(path: Path, failed: list[GuestError]) -> None:
    with FrontEnd(path, 2) as front:
        for queue in front.queues:
            queue.given = queue.seen = 0xFFFE
            for place in (queue.available, queue.used):
                struct.pack_into("<HH", front.memory, place, 0, 0xFFFE)
        front.start()
        for _ in range(4):
            works(front)


def test_many_chains_with_one_kick(front: FrontEnd) -> None:
    queue = front.queues[0]
    heads = [queue.add([bytes([number])], [1]) for number in range(RING // 2)]
    queue.kick()
    assert queue.wait(len(heads)) == [(head, bytes([number])) for number, head in enumerate(heads)]


def test_the_configuration_is_read_in_parts_and_ends_with_zeros(front: FrontEnd) -> None:
    for offset, size, found in ((0, 8, b"12345678"), (6, 4, b"78\0\0"), (100, 2, b"\0\0")):
        request = struct.pack("<III", offset, size, 0) + bytes(size)
        assert front.ask(Request.GET_CONFIG, request) == struct.pack("<III", offset, size, 0) + found


def test_a_reset_gives_the_index_and_the_ring_starts_again_there(front: FrontEnd) -> None:
    for _ in range(3):
        works(front)
    assert front.ask(Request.GET_VRING_BASE, struct.pack("<II", 0, 0)) == struct.pack("<II", 0, 3)
    queue = front.queues[0]
    queue.add([b"x"], [1])
    queue.kick()
    assert front.ask(Request.GET_QUEUE_NUM) == struct.pack("<Q", 2)
    assert list(queue.finished()) == []
    queue.front.done(Request.SET_VRING_NUM, struct.pack("<II", 0, RING))
    queue.given -= 1
    queue.start()
    queue.given += 1
    assert [data for _, data in queue.wait()] == [b"x"]


def test_a_disabled_ring_is_left_alone(front: FrontEnd) -> None:
    front.done(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 0))
    queue = front.queues[0]
    queue.add([b"x"], [1])
    queue.kick()
    assert front.ask(Request.GET_QUEUE_NUM)
    assert list(queue.finished()) == []
    front.done(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 1))
    assert [data for _, data in queue.wait()] == [b"x"]


def test_a_second_front_end_is_turned_away(front: FrontEnd, path: Path) -> None:
    with FrontEnd(path, 2) as other:
        assert other.gone()
    works(front)


def test_a_front_end_that_ends_is_no_failure(path: Path, failed: list[GuestError]) -> None:
    for _ in range(3):
        with FrontEnd(path, 2) as front:
            works(front.start())
    assert failed == []


def test_no_descriptor_is_left_open(path: Path, failed: list[GuestError]) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        with FrontEnd(path, 2) as front:
            works(front.start())
            front.tell(Request.SET_MEM_TABLE, bytes(40), [front.descriptor] * 3)
            assert front.gone()
    until(lambda: count() == before)


PLACE = GUEST + MEMORY // 2
DESCRIPTORS: dict[str, tuple[list[tuple[int, int, int, int, int]], str]] = {
    "outside": ([(0, GUEST - 1, 8, 0, 0)], "not in the guest's memory"),
    "across the end": ([(0, GUEST + MEMORY - 4, 8, WRITE, 0)], "not in the guest's memory"),
    "at the last address": ([(0, (1 << 64) - 1, 8, 0, 0)], "not in the guest's memory"),
    "huge": ([(0, GUEST, (1 << 32) - 1, WRITE, 0)], f"more than {CHAIN_BYTES} bytes"),
    "huge in parts": ([(n, GUEST, 1 << 19, NEXT, n + 1) for n in range(3)], f"more than {CHAIN_BYTES} bytes"),
    "empty": ([(0, PLACE, 0, 0, 0)], "empty"),
    "indirect": ([(0, PLACE, 16, INDIRECT, 0)], "flags 0x4"),
    "unknown flags": ([(0, PLACE, 16, 0x8000, 0)], "flags 0x8000"),
    "to itself": ([(0, PLACE, 8, NEXT, 0)], "comes back to itself"),
    "a loop of two": ([(0, PLACE, 8, NEXT, 1), (1, PLACE, 8, NEXT, 0)], "comes back to itself"),
    "next beyond the ring": ([(0, PLACE, 8, NEXT, RING)], f"descriptor {RING} of a ring"),
    "readable after writable": ([(0, PLACE, 8, WRITE | NEXT, 1), (1, PLACE, 8, 0, 0)], "after one to be written"),
    "more to write than room": ([(0, PLACE, 9, NEXT, 1), (1, PLACE, 8, WRITE, 0)], "too short for 9"),
}


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_a_malformed_chain_ends_the_device(front: FrontEnd, failed: list[GuestError], name: str) -> None:
    descriptors, words = DESCRIPTORS[name]
    works(front)
    queue = front.queues[0]
    for number, *fields in descriptors:
        queue.describe(number, *fields)
    queue.give(0)
    queue.kick()
    refused(front, failed, words)


def test_a_head_beyond_the_ring_ends_the_device(front: FrontEnd, failed: list[GuestError]) -> None:
    front.queues[0].give(0xFFFF)
    front.queues[0].kick()
    refused(front, failed, "descriptor 65535 of a ring")


def test_an_index_that_runs_ahead_ends_the_device(front: FrontEnd, failed: list[GuestError]) -> None:
    front.queues[0].give(0, count=RING + 1)
    front.queues[0].kick()
    refused(front, failed, f"with {RING + 1} entries")


def table(*regions: tuple[int, int, int, int]) -> bytes:
    return struct.pack("<II", len(regions), 0) + b"".join(struct.pack("<4Q", *region) for region in regions)


TABLES = {
    "none": (table(), 0, "count of its regions"),
    "fewer descriptors": (table((GUEST, 4096, USER, 0), (0, 4096, 0, 0)), 1, "count of its regions"),
    "too many": (struct.pack("<II", 9, 0) + bytes(9 * 32), 8, "count of its regions"),
    "short": (table((GUEST, 4096, USER, 0))[:-1], 1, "count of its regions"),
    "empty body": (b"", 0, "count of its regions"),
    "beyond the file": (table((GUEST, MEMORY + 1, USER, 0)), 1, "not within its file"),
    "an offset beyond the file": (table((GUEST, 4096, USER, MEMORY)), 1, "not within its file"),
    "empty region": (table((GUEST, 0, USER, 0)), 1, "not within its file"),
    "an address that wraps": (table(((1 << 64) - 1, 4096, USER, 0)), 1, "not within its file"),
    "overlapping": (table((GUEST, 8192, USER, 0), (GUEST + 4096, 8192, 0, 0)), 2, "overlaps"),
    "no longer with its rings": (table((GUEST, 4096, 0x1000, 0)), 1, "a ring of"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_malformed_memory_table_ends_the_device(front: FrontEnd, failed: list[GuestError], name: str) -> None:
    body, count, words = TABLES[name]
    front.tell(Request.SET_MEM_TABLE, body, [front.descriptor] * count)
    refused(front, failed, words)


PAIR = struct.Struct("<II")
MESSAGES = {
    "unknown": (99, b"", "message 99"),
    "too long": (Request.SET_OWNER, bytes(5000), "5000 bytes"),
    "ring 2": (Request.SET_VRING_NUM, PAIR.pack(2, 4), "ring 2 of 2"),
    "kick of ring 255": (Request.SET_VRING_KICK, struct.pack("<Q", 255 | 1 << 8), "ring 255 of 2"),
    "kick without a descriptor": (Request.SET_VRING_KICK, struct.pack("<Q", 0), "0 descriptors"),
    "size 0": (Request.SET_VRING_NUM, PAIR.pack(0, 0), "not a power of two"),
    "size 48": (Request.SET_VRING_NUM, PAIR.pack(0, 48), "not a power of two"),
    "size 2048": (Request.SET_VRING_NUM, PAIR.pack(0, 2048), "not a power of two"),
    "index of 17 bits": (Request.SET_VRING_BASE, PAIR.pack(0, 1 << 16), "more than 16 bits"),
    "short fields": (Request.SET_VRING_NUM, b"\0\0\0\0", "4 bytes instead of 8"),
    "long fields": (Request.SET_FEATURES, bytes(9), "9 bytes instead of 8"),
    "features not offered": (Request.SET_FEATURES, struct.pack("<Q", 1 << 32 | 1 << 28), "not what was offered"),
    "features of no version": (Request.SET_FEATURES, bytes(8), "not those of version 1"),
    "protocol features": (Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", 1 << 15), "not what was offered"),
    "configuration": (Request.GET_CONFIG, struct.pack("<III", 0, 1 << 31, 0), "bytes of the configuration"),
    "ring outside": (Request.SET_VRING_ADDR, struct.pack("<II4Q", 0, 0, 0, 0, 0, 0), "not in the guest's memory"),
    "ring not aligned": (
        Request.SET_VRING_ADDR,
        struct.pack("<II4Q", 0, 0, USER, USER + 0x2000, USER + 0x1001, 0),
        "not aligned to 2",
    ),
    "ring across the end": (
        Request.SET_VRING_ADDR,
        struct.pack("<II4Q", 0, 0, USER + MEMORY - 16, USER, USER, 0),
        "not in the guest's memory",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_malformed_message_ends_the_device(front: FrontEnd, failed: list[GuestError], name: str) -> None:
    request, body, words = MESSAGES[name]
    front.tell(request, body)
    refused(front, failed, words)


@pytest.mark.parametrize(("flags", "size"), [(0, 0), (2, 0), (5, 0), (1, 1 << 31)])
def test_a_malformed_header_ends_the_device(front: FrontEnd, failed: list[GuestError], flags: int, size: int) -> None:
    front.socket.sendall(struct.pack("<III", Request.SET_OWNER, flags, size))
    refused(front, failed, "flags")


def test_a_kick_that_is_no_eventfd_ends_the_device(front: FrontEnd, failed: list[GuestError]) -> None:
    front.tell(Request.SET_VRING_KICK, struct.pack("<Q", 0), [front.descriptor])
    refused(front, failed, "descriptor of a kick")


def test_a_message_that_ends_in_the_middle_ends_the_device(front: FrontEnd, failed: list[GuestError]) -> None:
    front.socket.sendall(struct.pack("<III", Request.SET_VRING_NUM, 1, 8) + bytes(3))
    front.socket.shutdown(1)
    refused(front, failed, "within a message")


def test_a_device_before_its_memory_table_takes_nothing(path: Path, failed: list[GuestError]) -> None:
    with FrontEnd(path, 2) as front:
        assert front.ask(Request.GET_FEATURES)
        front.tell(Request.SET_VRING_KICK, struct.pack("<Q", 0), [front.queues[0].kick_descriptor])
        front.tell(Request.SET_VRING_ENABLE, PAIR.pack(0, 1))
        front.queues[0].add([b"x"], [1])
        front.queues[0].kick()
        assert front.ask(Request.GET_QUEUE_NUM)
        assert list(front.queues[0].finished()) == []
    assert failed == []
