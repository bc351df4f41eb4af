"""The back end of a vhost-user device: one device behind one Unix socket, split virtqueues, guest memory shared.

The front end (QEMU) hands over the guest's memory and the places of the rings; the guest fills the rings. Neither is
believed: each length, index and address is checked before it is used, and what breaks the rules is a GuestError, the only
exception that a message or a ring can cause. Not offered, and so refused: indirect descriptors, packed rings, suppressed
notifications, logging, migration, memory slots.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import ClassVar, Final

from parley_deploy.emulator.loop import READ, Loop

MESSAGE_BYTES: Final = 4096
"""Longest body of a message; the longest in use, a memory table, has 264 bytes."""
MESSAGE_SECONDS: Final = 5
"""How long the front end may take over one message."""
REGIONS: Final = 8
"""Regions that a memory table may have."""
RING_SIZE: Final = 1024
"""Descriptors that a ring may have."""
CHAIN_BYTES: Final = 1 << 20
"""Most that one chain of descriptors may hold; vsock packets of Linux have at most 64 KiB, NSM's messages 12 KiB."""

F_VERSION_1: Final = 1 << 32
_F_PROTOCOL: Final = 1 << 30
_P_MQ: Final = 1 << 0
_P_REPLY_ACK: Final = 1 << 3
_P_CONFIG: Final = 1 << 9
_VERSION: Final = 1
_REPLY: Final = 4
_NEED_REPLY: Final = 8
_NO_DESCRIPTOR: Final = 1 << 8
_NEXT: Final = 1
_WRITE: Final = 2
_HEADER: Final = struct.Struct("<III")
_REGION: Final = struct.Struct("<4Q")
_DESCRIPTOR: Final = struct.Struct("<QIHH")
_U64: Final = struct.Struct("<Q")
_PAIR: Final = struct.Struct("<II")
_ADDRESSES: Final = struct.Struct("<II4Q")
_CONFIG: Final = struct.Struct("<III")
_WRAP: Final = 0xFFFF


class GuestError(Exception):
    """The front end or the guest broke a rule; the device ends with it."""


class Request(IntEnum):
    """The messages of the front end that are answered."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25


@dataclass(frozen=True, slots=True)
class _Region:
    guest: int
    user: int
    size: int
    view: memoryview


class Memory:
    """The guest's memory, by guest addresses and by those of the front end."""

    def __init__(self, table: bytes, descriptors: Sequence[int]) -> None:
        """Maps the regions of a SET_MEM_TABLE; the descriptors remain the caller's."""
        count = struct.unpack_from("<I", table)[0] if len(table) >= _PAIR.size else -1
        if count != len(descriptors) or not 1 <= count <= REGIONS or len(table) < _PAIR.size + count * _REGION.size:
            raise GuestError("memory table: the count of its regions is not that of its descriptors")
        self._regions: list[_Region] = []
        for index, descriptor in enumerate(descriptors):
            guest, size, user, offset = _REGION.unpack_from(table, _PAIR.size + index * _REGION.size)
            # Beyond the end of the file there would be a signal instead of an error.
            if not size or offset + size > os.fstat(descriptor).st_size or max(guest, user) + size > 1 << 64:
                raise GuestError(f"memory table: region {index} is not within its file")
            if any(_overlap(guest, size, other.guest, other.size) for other in self._regions):
                raise GuestError(f"memory table: region {index} overlaps another")
            try:
                mapped = mmap.mmap(descriptor, offset + size)
            except OSError as error:
                raise GuestError(f"memory table: region {index}: {error}") from None
            self._regions.append(_Region(guest, user, size, memoryview(mapped)[offset : offset + size]))

    def guest(self, address: int, length: int) -> memoryview:
        """The memory at an address of the guest; GuestError where it is not all in one region."""
        for region in self._regions:
            start = address - region.guest
            if start >= 0 and start + length <= region.size:
                return region.view[start : start + length]
        raise GuestError(f"{length} bytes at {address:#x} are not in the guest's memory")

    def user(self, address: int, length: int, alignment: int) -> memoryview:
        """The memory at an address of the front end, aligned; GuestError where it is not all in one region."""
        for region in self._regions:
            start = address - region.user
            if start >= 0 and start + length <= region.size:
                if address % alignment:
                    raise GuestError(f"a ring at {address:#x} is not aligned to {alignment} bytes")
                return region.view[start : start + length]
        raise GuestError(f"a ring of {length} bytes at {address:#x} is not in the guest's memory")


def _overlap(start: int, size: int, other: int, other_size: int) -> bool:
    return start < other + other_size and other < start + size


@dataclass(frozen=True, slots=True)
class Chain:
    """What the guest gave with one entry of a ring: parts to read, then parts to write, in its own memory."""

    head: int
    readable: tuple[memoryview, ...]
    writable: tuple[memoryview, ...]

    @property
    def readable_bytes(self) -> int:
        """The length of all parts to read."""
        return sum(map(len, self.readable))

    @property
    def writable_bytes(self) -> int:
        """The length of all parts to write."""
        return sum(map(len, self.writable))

    def read(self, limit: int) -> bytes:
        """The first `limit` bytes of the parts to read, copied: the guest may change its own at any time."""
        data = bytearray()
        for part in self.readable:
            data += part[: limit - len(data)]
        return bytes(data)

    def write(self, data: bytes) -> None:
        """Fills the parts to write with `data`, which must fit."""
        if len(data) > self.writable_bytes:
            raise GuestError(f"a buffer of {self.writable_bytes} bytes is too short for {len(data)}")
        at = 0
        for part in self.writable:
            piece = data[at : at + len(part)]
            part[: len(piece)] = piece
            at += len(piece)


class Ring:
    """One virtqueue, from the device's side."""

    def __init__(self) -> None:
        self.kick = -1
        self.call = -1
        self.enabled = False
        self._size = 0
        self._addresses: tuple[int, int, int] | None = None
        self._memory: Memory | None = None
        self._last = 0
        self._done = 0
        self._unmap()

    @property
    def ready(self) -> bool:
        """Whether the guest's entries may be taken: mapped, started and enabled."""
        return self._mapped and self.enabled and self.kick >= 0

    def resize(self, size: int) -> None:
        """The number of descriptors."""
        if not 1 <= size <= RING_SIZE or size & (size - 1):
            raise GuestError(f"a ring of {size} descriptors: not a power of two up to {RING_SIZE}")
        self._size = size
        self._map()

    def start_at(self, index: int) -> None:
        """The next entry to take."""
        if index > _WRAP:
            raise GuestError(f"a ring that starts at {index}: more than 16 bits")
        self._last = index

    def place(self, descriptors: int, used: int, available: int) -> None:
        """Where the three parts are, as addresses of the front end."""
        self._addresses = (descriptors, used, available)
        self._map()

    def remember(self, memory: Memory | None) -> None:
        """The guest's memory, where it has changed."""
        self._memory = memory
        self._map()

    def stop(self) -> int:
        """Takes no more entries; the index of the next."""
        self.enabled = False
        self._addresses = None
        self._unmap()
        return self._last

    def _unmap(self) -> None:
        # Memory is only unmapped when no view of it is left.
        self._descriptors = self._available = self._used_entries = self._used_words = memoryview(b"")
        self._mapped = False

    def _map(self) -> None:
        self._unmap()
        if self._addresses is None or self._memory is None or not self._size:
            return
        descriptors, used, available = self._addresses
        self._descriptors = self._memory.user(descriptors, _DESCRIPTOR.size * self._size, 16)
        # As numbers of 16 bits: an index is loaded and stored whole, never byte by byte.
        self._available = self._memory.user(available, 4 + 2 * self._size, 2).cast("H")
        used_part = self._memory.user(used, 4 + 8 * self._size, 4)
        self._used_entries, self._used_words = used_part.cast("I"), used_part.cast("H")
        self._done = self._used_words[1]
        self._mapped = True

    def waiting(self) -> int:
        """How many entries the guest has given that were not taken."""
        if not self.ready:
            return 0
        count = (self._available[1] - self._last) & _WRAP
        if count > self._size:
            raise GuestError(f"a ring of {self._size} descriptors with {count} entries")
        return count

    def take(self) -> Chain | None:
        """The next chain, None where there is none. `put_back` undoes it, `finish` gives it back to the guest."""
        if not self.waiting():
            return None
        assert self._memory is not None
        head = index = self._available[2 + self._last % self._size]
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        total = 0
        for _ in range(self._size):
            if index >= self._size:
                raise GuestError(f"descriptor {index} of a ring of {self._size}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(self._descriptors, _DESCRIPTOR.size * index)
            total += length
            if not length or total > CHAIN_BYTES:
                raise GuestError(f"descriptor {index}: empty, or a chain of more than {CHAIN_BYTES} bytes")
            if flags & ~(_NEXT | _WRITE):
                raise GuestError(f"descriptor {index}: flags {flags:#x}, of which not all were offered")
            if writable and not flags & _WRITE:
                raise GuestError(f"descriptor {index}: to be read, after one to be written")
            (writable if flags & _WRITE else readable).append(self._memory.guest(address, length))
            if not flags & _NEXT:
                self._last = (self._last + 1) & _WRAP
                return Chain(head, tuple(readable), tuple(writable))
            index = following
        raise GuestError("a chain of descriptors that comes back to itself")

    def put_back(self) -> None:
        """The chain taken last was not taken."""
        self._last = (self._last - 1) & _WRAP

    def finish(self, chain: Chain, written: int) -> None:
        """Gives a chain back, with so many bytes written in it."""
        slot = 1 + 2 * (self._done % self._size)
        self._used_entries[slot] = chain.head
        self._used_entries[slot + 1] = written
        self._done = (self._done + 1) & _WRAP
        self._used_words[1] = self._done

    def notify(self) -> None:
        """Tells the guest that chains came back."""
        if self.call >= 0:
            try:
                os.eventfd_write(self.call, 1)
            except BlockingIOError:
                # Its counter is full: the guest has been told.
                return
            except OSError as error:
                raise GuestError(f"the descriptor of a call: {error}") from None


class Device(ABC):
    """A device behind a Unix socket. One front end at a time; `failed` hears why it was cut off, where it was."""

    features: ClassVar[int] = F_VERSION_1
    queues: ClassVar[int]

    def __init__(self, loop: Loop, path: Path, config: bytes = b"", failed: Callable[[GuestError], None] | None = None):
        self.loop: Final = loop
        self.rings: Final = [Ring() for _ in range(self.queues)]
        self._config = config
        self._offered = _P_MQ | _P_REPLY_ACK | (_P_CONFIG if config else 0)
        self._failed = failed
        self._connection: socket.socket | None = None
        self._protocol = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(1)
        loop.add(self._listener, READ, self._accept)

    @abstractmethod
    def kicked(self, index: int) -> None:
        """The guest has given entries in a ring, or may have."""

    @abstractmethod
    def stopped(self) -> None:
        """The guest has reset the device, or the front end is gone: no ring may be used until the next kick."""

    def close(self) -> None:
        """Ends the device."""
        self._hang_up()
        self.loop.drop(self._listener)
        self._listener.close()

    def guarded(self, call: Callable[[], None]) -> None:
        """Runs what touches rings; a GuestError cuts the front end off."""
        try:
            call()
        except GuestError as error:
            self._hang_up()
            if self._failed is not None:
                self._failed(error)

    def _accept(self, _: int) -> None:
        connection, _ = self._listener.accept()
        if self._connection is not None:
            connection.close()
            return
        connection.settimeout(MESSAGE_SECONDS)
        self._connection = connection
        self.loop.add(connection, READ, lambda _: self.guarded(self._message))

    def _hang_up(self) -> None:
        if self._connection is None:
            return
        self.loop.drop(self._connection)
        self._connection.close()
        self._connection = None
        self._protocol = 0
        self._reset()

    def _reset(self) -> None:
        for ring in self.rings:
            self._set_kick(ring, -1)
            self._set_call(ring, -1)
            ring.stop()
            ring.remember(None)
        self.stopped()

    def _message(self) -> None:
        assert self._connection is not None
        descriptors: list[int] = []
        try:
            head, descriptors, flags, _ = socket.recv_fds(self._connection, _HEADER.size, REGIONS)
            if not head:
                self._hang_up()
                return
            head += self._take(_HEADER.size - len(head))
            number, how, size = _HEADER.unpack(head)
            if flags & socket.MSG_CTRUNC or how & 3 != _VERSION or how & _REPLY or size > MESSAGE_BYTES:
                raise GuestError(f"message {number}: flags {how:#x} and {size} bytes")
            reply = self._handle(_request(number), self._take(size), descriptors)
            if reply is None and how & _NEED_REPLY and self._protocol & _P_REPLY_ACK:
                reply = _U64.pack(0)
            if reply is not None:
                self._connection.sendall(_HEADER.pack(number, _VERSION | _REPLY, len(reply)) + reply)
        except OSError as error:
            raise GuestError(f"the front end's socket: {error}") from None
        finally:
            # What a handler kept, it took out of the list.
            for descriptor in descriptors:
                os.close(descriptor)

    def _take(self, size: int) -> bytes:
        assert self._connection is not None
        data = bytearray()
        while len(data) < size:
            part = self._connection.recv(size - len(data))
            if not part:
                raise GuestError("the front end ended within a message")
            data += part
        return bytes(data)

    def _handle(self, request: Request, body: bytes, descriptors: list[int]) -> bytes | None:
        match request:
            case Request.GET_FEATURES:
                return _U64.pack(self.features | _F_PROTOCOL)
            case Request.SET_FEATURES:
                (chosen,) = _fields(request, _U64, body)
                if chosen & ~(self.features | _F_PROTOCOL) or not chosen & F_VERSION_1:
                    raise GuestError(f"features {chosen:#x}: not what was offered, or not those of version 1")
            case Request.SET_OWNER | Request.SET_CONFIG:
                pass
            case Request.RESET_OWNER:
                self._reset()
            case Request.GET_PROTOCOL_FEATURES:
                return _U64.pack(self._offered)
            case Request.SET_PROTOCOL_FEATURES:
                (chosen,) = _fields(request, _U64, body)
                if chosen & ~self._offered:
                    raise GuestError(f"protocol features {chosen:#x}: not what was offered")
                self._protocol = chosen
            case Request.GET_QUEUE_NUM:
                return _U64.pack(self.queues)
            case Request.GET_CONFIG:
                offset, size, flags = _fields(request, _CONFIG, body[: _CONFIG.size])
                if size > MESSAGE_BYTES - _CONFIG.size:
                    raise GuestError(f"{size} bytes of the configuration")
                data = self._config[offset : offset + size].ljust(size, b"\0")
                return _CONFIG.pack(offset, size, flags) + data
            case Request.SET_MEM_TABLE:
                memory = Memory(body, descriptors)
                for ring in self.rings:
                    ring.remember(memory)
            case _:
                return self._handle_ring(request, body, descriptors)
        return None

    def _handle_ring(self, request: Request, body: bytes, descriptors: list[int]) -> bytes | None:
        match request:
            case Request.SET_VRING_NUM:
                index, number = _fields(request, _PAIR, body)
                self._ring(index).resize(number)
            case Request.SET_VRING_BASE:
                index, number = _fields(request, _PAIR, body)
                self._ring(index).start_at(number)
            case Request.SET_VRING_ADDR:
                index, _, table, used, available, _ = _fields(request, _ADDRESSES, body)
                self._ring(index).place(table, used, available)
            case Request.SET_VRING_ENABLE:
                index, number = _fields(request, _PAIR, body)
                self._ring(index).enabled = number == 1
                self._kicked(index)
            case Request.GET_VRING_BASE:
                index, _ = _fields(request, _PAIR, body)
                ring = self._ring(index)
                self._set_kick(ring, -1)
                last = ring.stop()
                self.stopped()
                return _PAIR.pack(index, last)
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                (word,) = _fields(request, _U64, body)
                ring = self._ring(word & 0xFF)
                given = not word & _NO_DESCRIPTOR
                if len(descriptors) != given:
                    raise GuestError(f"{request.name}: {len(descriptors)} descriptors")
                descriptor = descriptors.pop() if given else -1
                if request is Request.SET_VRING_KICK:
                    self._set_kick(ring, descriptor)
                elif request is Request.SET_VRING_CALL:
                    self._set_call(ring, descriptor)
                elif descriptor >= 0:
                    os.close(descriptor)
            case _:
                raise GuestError(f"{request.name} is not answered")
        return None

    def _ring(self, index: int) -> Ring:
        if index >= self.queues:
            raise GuestError(f"ring {index} of {self.queues}")
        return self.rings[index]

    def _set_kick(self, ring: Ring, descriptor: int) -> None:
        if ring.kick >= 0:
            self.loop.drop(ring.kick)
            os.close(ring.kick)
        ring.kick = descriptor
        if descriptor >= 0:
            os.set_blocking(descriptor, False)
            index = self.rings.index(ring)
            try:
                self.loop.add(descriptor, READ, lambda _: self.guarded(lambda: self._read_kick(index)))
            except OSError as error:
                os.close(descriptor)
                ring.kick = -1
                raise GuestError(f"the descriptor of a kick: {error}") from None

    def _set_call(self, ring: Ring, descriptor: int) -> None:
        if ring.call >= 0:
            os.close(ring.call)
        ring.call = descriptor
        if descriptor >= 0:
            os.set_blocking(descriptor, False)

    def _read_kick(self, index: int) -> None:
        try:
            os.eventfd_read(self.rings[index].kick)
        except BlockingIOError:
            return
        except OSError as error:
            raise GuestError(f"the descriptor of a kick: {error}") from None
        self._kicked(index)

    def _kicked(self, index: int) -> None:
        if self.rings[index].ready:
            self.kicked(index)


def _request(number: int) -> Request:
    try:
        return Request(number)
    except ValueError:
        raise GuestError(f"message {number} is not answered") from None


def _fields(request: Request, form: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) != form.size:
        raise GuestError(f"{request.name}: {len(body)} bytes instead of {form.size}")
    return form.unpack(body)
