"""The other side of a vhost-user device: QEMU's messages, and a driver that fills the rings in shared memory."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from parley_deploy.emulator.loop import READ, Loop
from parley_deploy.emulator.vhost import F_VERSION_1, Device, GuestError, Request

MEMORY = 1 << 24
GUEST = 0x4000_0000
"""Where the guest's memory begins for the guest, and for QEMU."""
USER = 0x7F00_0000_0000
RING = 64
SECONDS = 10.0
NEXT, WRITE, INDIRECT = 1, 2, 4
_RING_BYTES = 0x4000


@contextmanager
def served(make: Callable[[Loop, Callable[[GuestError], None]], Device]) -> Iterator[list[GuestError]]:
    """A device whose loop runs in a thread; the errors for which it cut a front end off."""
    loop, failed = Loop(), list[GuestError]()
    device = make(loop, failed.append)
    # A pipe whose other end is closed wakes the loop to end it.
    woken, waker = os.pipe()
    loop.add(woken, READ, lambda _: loop.stop())
    errors: list[BaseException] = []

    def run() -> None:
        try:
            loop.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield failed
    finally:
        os.close(waker)
        thread.join(SECONDS)
        assert not thread.is_alive()
        loop.drop(woken)
        os.close(woken)
        device.close()
        loop.close()
        assert not errors, errors


class FrontEnd:
    """One connection to a device, with memory of its own. Nothing is checked: a test may say anything."""

    def __init__(self, path: Path, queues: int) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(SECONDS)
        self.socket.connect(str(path))
        self.descriptor = os.memfd_create("guest")
        os.ftruncate(self.descriptor, MEMORY)
        self.memory = mmap.mmap(self.descriptor, MEMORY)
        self.free = queues * _RING_BYTES
        self.queues = [Virtqueue(self, index) for index in range(queues)]

    def tell(self, request: int, body: bytes = b"", descriptors: Sequence[int] = (), flags: int = 1) -> None:
        """A message without a reply."""
        head = struct.pack("<III", request, flags, len(body))
        socket.send_fds(self.socket, [head + body], descriptors)

    def ask(self, request: int, body: bytes = b"", descriptors: Sequence[int] = (), flags: int = 1) -> bytes:
        """A message with a reply: its body, empty where the device has hung up."""
        self.tell(request, body, descriptors, flags)
        return self.reply()

    def reply(self) -> bytes:
        """The body of the next reply, empty where the device has hung up."""
        try:
            head = self.socket.recv(12, socket.MSG_WAITALL)
            return self.socket.recv(struct.unpack("<III", head)[2], socket.MSG_WAITALL) if head else b""
        except ConnectionResetError:
            return b""

    def done(self, request: int, body: bytes, descriptors: Sequence[int] = ()) -> None:
        """A message of which the device says that it was carried out."""
        assert self.ask(request, body, descriptors, flags=1 | 8) == bytes(8)

    def start(self) -> Self:
        """All that QEMU says before a driver's first kick."""
        (features,) = struct.unpack("<Q", self.ask(Request.GET_FEATURES))
        assert features == F_VERSION_1 | 1 << 30
        (protocol,) = struct.unpack("<Q", self.ask(Request.GET_PROTOCOL_FEATURES))
        self.tell(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
        assert self.ask(Request.GET_QUEUE_NUM) == struct.pack("<Q", len(self.queues))
        self.done(Request.SET_OWNER, b"")
        self.done(Request.SET_FEATURES, struct.pack("<Q", features))
        self.set_memory()
        for queue in self.queues:
            queue.start()
        return self

    def set_memory(self) -> None:
        """The table of one region: all of the memory."""
        table = struct.pack("<II4Q", 1, 0, GUEST, MEMORY, USER, 0)
        self.done(Request.SET_MEM_TABLE, table, [self.descriptor])

    def stop(self) -> None:
        """What QEMU says when the guest resets the device."""
        for queue in self.queues:
            self.ask(Request.GET_VRING_BASE, struct.pack("<II", queue.index, 0))

    def room(self, size: int) -> int:
        """The offset of fresh memory."""
        place = self.free
        self.free += size
        assert self.free <= MEMORY
        return place

    def gone(self) -> bool:
        """Whether the device has hung up."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        """As when QEMU ends."""
        self.socket.close()
        for queue in self.queues:
            queue.close()
        self.memory.close()
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Virtqueue:
    """The driver's side of one ring."""

    def __init__(self, front: FrontEnd, index: int) -> None:
        self.front = front
        self.index = index
        base = index * _RING_BYTES
        self.table, self.available, self.used = base, base + 0x1000, base + 0x2000
        self.kick_descriptor = os.eventfd(0)
        self.call_descriptor = os.eventfd(0)
        self.given = 0
        self.seen = 0
        self.unused = deque(range(RING))
        self.chains: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}

    def start(self) -> None:
        """Where it is, and that it runs."""
        front = self.front
        front.done(Request.SET_VRING_NUM, struct.pack("<II", self.index, RING))
        front.done(Request.SET_VRING_BASE, struct.pack("<II", self.index, self.given & 0xFFFF))
        addresses = (USER + self.table, USER + self.used, USER + self.available)
        front.done(Request.SET_VRING_ADDR, struct.pack("<II4Q", self.index, 0, *addresses, 0))
        front.done(Request.SET_VRING_CALL, struct.pack("<Q", self.index), [self.call_descriptor])
        front.done(Request.SET_VRING_KICK, struct.pack("<Q", self.index), [self.kick_descriptor])
        front.done(Request.SET_VRING_ENABLE, struct.pack("<II", self.index, 1))

    def renew(self) -> None:
        """Empty, as a driver makes it when it starts."""
        self.given = self.seen = 0
        self.unused = deque(range(RING))
        self.chains.clear()
        for place in (self.available, self.used):
            struct.pack_into("<HH", self.front.memory, place, 0, 0)

    def describe(self, number: int, address: int, length: int, flags: int, following: int = 0) -> None:
        """One descriptor, of any kind."""
        struct.pack_into("<QIHH", self.front.memory, self.table + 16 * number, address, length, flags, following)

    def give(self, head: int, count: int = 1) -> None:
        """An entry of the ring, and an index that says `count` more."""
        struct.pack_into("<H", self.front.memory, self.available + 4 + 2 * (self.given % RING), head)
        self.given += count
        memoryview(self.front.memory).cast("H")[self.available // 2 + 1] = self.given & 0xFFFF

    def kick(self) -> None:
        """Tells the device."""
        os.eventfd_write(self.kick_descriptor, 1)

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> int:
        """A chain of parts with these bytes, then of buffers of these sizes; its head. The device is not told yet."""
        parts = [(self.front.room(len(data)), len(data), 0) for data in readable]
        for (place, length, _), data in zip(parts, readable, strict=True):
            self.front.memory[place : place + length] = data
        parts += [(self.front.room(size), size, WRITE) for size in writable]
        return self._add(parts)

    def add_again(self, place: int, size: int) -> int:
        """A chain of one buffer that was used before."""
        return self._add([(place, size, WRITE)])

    def _add(self, parts: list[tuple[int, int, int]]) -> int:
        numbers = [self.unused.popleft() for _ in parts]
        for index, (place, length, flags) in enumerate(parts):
            last = index == len(parts) - 1
            following = 0 if last else numbers[index + 1]
            self.describe(numbers[index], GUEST + place, length, flags | (0 if last else NEXT), following)
        self.chains[numbers[0]] = (numbers, [(place, length) for place, length, flags in parts if flags & WRITE])
        self.give(numbers[0])
        return numbers[0]

    def finished(self) -> Iterator[tuple[int, bytes, list[tuple[int, int]]]]:
        """The chains that came back: head, what was written, and the buffers."""
        while memoryview(self.front.memory).cast("H")[self.used // 2 + 1] != self.seen & 0xFFFF:
            entry = self.used + 4 + 8 * (self.seen % RING)
            head, length = struct.unpack_from("<II", self.front.memory, entry)
            self.seen += 1
            numbers, buffers = self.chains.pop(head)
            self.unused.extend(numbers)
            data = b"".join(bytes(self.front.memory[place : place + size]) for place, size in buffers)
            yield head, data[:length], buffers

    def wait(self, count: int = 1) -> list[tuple[int, bytes]]:
        """So many chains, with what was written in them."""
        found: list[tuple[int, bytes]] = []
        while len(found) < count:
            new = [(head, data) for head, data, _ in self.finished()]
            found += new
            if not new:
                ready, _, _ = select.select([self.call_descriptor], [], [], SECONDS)
                assert ready, f"{len(found)} of {count} chains came back"
                os.eventfd_read(self.call_descriptor)
        return found

    def close(self) -> None:
        """Its descriptors."""
        os.close(self.kick_descriptor)
        os.close(self.call_descriptor)
