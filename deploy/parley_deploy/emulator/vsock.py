"""vsock as a virtio device: streams of the guest become Unix sockets of this process.

The guest sees its host, the parent, at context id 3, as on Nitro. What it may have in flight towards a socket is bounded
by credit, a guest that sends more is reset, and replies wait in a queue that stops the guest's own when it is long.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

from parley_deploy.emulator.loop import HANGUP, READ, WRITE, Loop
from parley_deploy.emulator.vhost import Chain, Device, GuestError, Ring

HOST_CID: Final = 3
GUEST_CID: Final = 16
"""nitro-cli's first enclave has this id; each guest has a device of its own, so that all may have the same."""
BUFFER_BYTES: Final = 256 * 1024
"""What the guest may have in flight in one stream."""
STREAMS: Final = 512
"""Streams at a time; each has a descriptor, of which a process usually has 1024."""
REPLIES: Final = 256
"""Packets that may wait for buffers of the guest before no more of its own are taken."""
TURN: Final = 64
"""Packets that one stream may send before the others have their turn."""
BATCH: Final = 256
"""Packets of the guest that are taken before other events have their turn."""
CONNECT_SECONDS: Final = 10
"""How long the guest may take to accept a stream."""
CLOSE_SECONDS: Final = 8
"""How long it may take to say that it has read all of a stream that was closed, as in Linux."""

_RX: Final = 0
_TX: Final = 1
_STREAM: Final = 1
_NO_RECEIVE: Final = 1
_NO_SEND: Final = 2
_BOTH: Final = _NO_RECEIVE | _NO_SEND
_HEADER: Final = struct.Struct("<QQIIIHHIII")
_U32: Final = 0xFFFFFFFF
_FIRST_PORT: Final = 1 << 30


class Operation(IntEnum):
    """What a packet says."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Header(NamedTuple):
    """The header of a packet."""

    source_cid: int
    target_cid: int
    source_port: int
    target_port: int
    length: int
    kind: int
    operation: int
    flags: int
    allowed: int
    forwarded: int


class Stream:
    """One connection: a socket here, and a port of the guest."""

    def __init__(self, end: socket.socket, host_port: int, guest_port: int) -> None:
        self.socket: Final = end
        self.answered: Callable[[bool], None] | None = None
        """Hears whether the guest accepted."""
        self.key: Final = (host_port, guest_port)
        self.open = False
        """Whether both sides have agreed to it."""
        self.backlog: deque[memoryview] = deque()
        """Bytes of the guest that the socket did not take yet."""
        self.waiting = 0
        """How many those are."""
        self.forwarded = 0
        self.told = 0
        """How far the guest has heard of `forwarded`."""
        self.sent = 0
        self.guest_allows = 0
        self.guest_forwarded = 0
        self.guest_ended = False
        """The guest sends no more."""
        self.socket_ended = False
        """Nothing more comes from the socket, or the guest wants none."""
        self.held = False
        """The socket is not read until there are buffers and credit."""
        self.watched: int | None = None
        """Events that the loop reports, None where it does not know the socket."""
        self.hung = False
        """The loop has said that the other end of the socket is gone."""
        self.closing = False
        """The socket is closed; the guest may still read what it has."""
        self.owes_credit = False

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for."""
        return self.guest_allows - ((self.sent - self.guest_forwarded) & _U32)


class VsockDevice(Device):
    """vsock of one guest. `accept` is asked for a socket when the guest connects to a port of its parent.

    The event queue remains QEMU's own.
    """

    queues = 2

    def __init__(
        self,
        loop: Loop,
        path: Path,
        accept: Callable[[int], socket.socket | None],
        failed: Callable[[GuestError], None] | None = None,
    ) -> None:
        self._accept_port = accept
        self._streams: dict[tuple[int, int], Stream] = {}
        self._replies: deque[tuple[Stream | None, tuple[int, int], Operation, int]] = deque()
        self._held: set[Stream] = set()
        self._ports = itertools.cycle(range(_FIRST_PORT, _U32))
        super().__init__(loop, path, struct.pack("<Q", GUEST_CID), failed)

    def connect(self, end: socket.socket, port: int, answered: Callable[[bool], None] | None = None) -> None:
        """Joins a stream socket to a port of the guest; `answered` hears whether it was accepted, else it is closed."""
        if not self.rings[_RX].ready or len(self._streams) >= STREAMS:
            end.close()
            if answered is not None:
                answered(False)
            return
        key = next(key for host in self._ports if (key := (host, port)) not in self._streams)
        stream = self._add(end, key)
        stream.answered = answered
        self.loop.later(CONNECT_SECONDS, lambda: self.guarded(lambda: self._give_up(stream)))
        self.guarded(lambda: self._reply(stream, Operation.REQUEST))

    def kicked(self, index: int) -> None:
        """Sends what waits, then takes the guest's packets, as many as can be replied to."""
        if index == _RX:
            self._pump()
        self._receive()

    def stopped(self) -> None:
        """Drops all streams: after a reset the guest knows none of them."""
        self._replies.clear()
        for stream in list(self._streams.values()):
            self._remove(stream)

    # Towards the guest.

    def _reply(self, stream: Stream, operation: Operation, flags: int = 0) -> None:
        self._replies.append((stream, stream.key, operation, flags))
        self._pump()

    def _refuse(self, key: tuple[int, int]) -> None:
        self._replies.append((None, key, Operation.RST, 0))
        self._pump()

    def _pump(self) -> None:
        """Packets without data first; then streams that were held may go on."""
        ring = self.rings[_RX]
        sent = False
        while self._replies and ring.waiting():
            stream, key, operation, flags = self._replies.popleft()
            if stream is not None and self._streams.get(key) is not stream:
                continue
            chain = _take(ring)
            self._finish(ring, chain, stream, key, operation, flags, 0)
            sent = True
        if sent:
            ring.notify()
        if self._held and ring.waiting():
            for stream in [stream for stream in self._held if stream.credit > 0]:
                self._release(stream)

    def _finish(
        self,
        ring: Ring,
        chain: Chain,
        stream: Stream | None,
        key: tuple[int, int],
        operation: Operation,
        flags: int,
        length: int,
    ) -> None:
        forwarded = 0
        if stream is not None:
            stream.told, stream.owes_credit = stream.forwarded, False
            forwarded = stream.forwarded & _U32
        host, guest = key
        ports = (HOST_CID, GUEST_CID, host, guest)
        chain.write(_HEADER.pack(*ports, length, _STREAM, operation, flags, BUFFER_BYTES, forwarded))
        ring.finish(chain, _HEADER.size + length)

    def _send(self, stream: Stream) -> None:
        """Moves what the socket has into the guest's buffers, as far as its credit goes."""
        ring = self.rings[_RX]
        sent = 0
        while sent < TURN:
            room = stream.credit
            if room <= 0 or self._replies or not ring.waiting():
                stream.held = True
                self._held.add(stream)
                break
            chain = _take(ring)
            try:
                count = stream.socket.recvmsg_into(list(_after_header(chain.writable, room)))[0]
            except (BlockingIOError, InterruptedError):
                ring.put_back()
                break
            except OSError:
                count = 0
            if not count:
                ring.put_back()
                stream.socket_ended = True
                self._reply(stream, Operation.SHUTDOWN, _NO_SEND)
                break
            stream.sent += count
            self._finish(ring, chain, stream, stream.key, Operation.RW, 0, count)
            sent += 1
        if sent:
            ring.notify()
        self._watch(stream)

    # From the guest.

    def _receive(self) -> None:
        """Takes the guest's packets: as many as can be replied to, and then leaves the loop to others for once."""
        ring = self.rings[_TX]
        taken = 0
        while ring.ready and len(self._replies) < REPLIES and (chain := ring.take()) is not None:
            if chain.writable or chain.readable_bytes < _HEADER.size:
                raise GuestError("a packet that is no packet of vsock")
            header = Header(*_HEADER.unpack(chain.read(_HEADER.size)))
            self._packet(header, chain)
            ring.finish(chain, 0)
            taken += 1
            if taken == BATCH:
                self.loop.later(0, lambda: self.guarded(self._receive))
                break
        if taken:
            ring.notify()

    def _packet(self, header: Header, chain: Chain) -> None:
        if header.source_cid != GUEST_CID:
            return
        key = (header.target_port, header.source_port)
        stream = self._streams.get(key)
        if header.target_cid != HOST_CID or header.kind != _STREAM:
            stream = None
        elif header.operation == Operation.REQUEST and stream is None:
            self._open(key, header)
            return
        if stream is None:
            if header.operation != Operation.RST:
                self._refuse(key)
            return
        stream.guest_allows, stream.guest_forwarded = header.allowed, header.forwarded
        match header.operation:
            case Operation.RST:
                self._remove(stream)
                return
            case Operation.RESPONSE if not stream.open:
                stream.open = True
                self._watch(stream)
                self._answer(stream, accepted=True)
            case Operation.RW if stream.open and not stream.guest_ended:
                self._data(stream, header.length, chain)
            case Operation.SHUTDOWN if stream.open:
                stream.guest_ended = stream.guest_ended or bool(header.flags & _NO_SEND)
                stream.socket_ended = stream.socket_ended or bool(header.flags & _NO_RECEIVE)
                self._flush(stream)
            case Operation.CREDIT_REQUEST:
                self._owe(stream)
            case Operation.CREDIT_UPDATE:
                pass
            case _:
                self._cut(stream)
                return
        if stream.held and stream.credit > 0:
            self._release(stream)

    def _open(self, key: tuple[int, int], header: Header) -> None:
        end = self._accept_port(key[0]) if len(self._streams) < STREAMS else None
        if end is None:
            self._refuse(key)
            return
        stream = self._add(end, key)
        stream.open = True
        stream.guest_allows, stream.guest_forwarded = header.allowed, header.forwarded
        self._reply(stream, Operation.RESPONSE)
        self._watch(stream)

    def _data(self, stream: Stream, length: int, chain: Chain) -> None:
        if length != chain.readable_bytes - _HEADER.size:
            raise GuestError(f"a packet of {length} bytes in a chain of {chain.readable_bytes}")
        if stream.closing or stream.waiting + length > BUFFER_BYTES:
            # Nobody reads it any more; or the guest sends beyond its credit.
            self._cut(stream)
            return
        parts = list(_after_header(chain.readable, length))
        done = 0
        if not stream.backlog and parts:
            try:
                done = stream.socket.sendmsg(parts)
            except (BlockingIOError, InterruptedError):
                done = 0
            except OSError:
                self._cut(stream)
                return
        stream.forwarded += done
        if done < length:
            # A copy: the guest has its memory back after this.
            stream.backlog.append(memoryview(b"".join(parts))[done:])
            stream.waiting += length - done
            self._watch(stream)
        if stream.forwarded - stream.told >= BUFFER_BYTES // 4:
            self._owe(stream)

    def _flush(self, stream: Stream) -> None:
        """Gives the socket what it takes of the backlog; then carries out what the guest has ended."""
        while stream.backlog and not stream.closing:
            part = stream.backlog[0]
            try:
                count = stream.socket.send(part)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self._cut(stream)
                return
            stream.forwarded += count
            stream.waiting -= count
            if count == len(part):
                stream.backlog.popleft()
            else:
                stream.backlog[0] = part[count:]
        if stream.forwarded - stream.told >= BUFFER_BYTES // 4:
            self._owe(stream)
        if stream.guest_ended and not stream.backlog:
            if stream.socket_ended:
                self._cut(stream)
                return
            try:
                stream.socket.shutdown(socket.SHUT_WR)
            except OSError:
                self._cut(stream)
                return
        self._watch(stream)

    # Streams.

    def _add(self, end: socket.socket, key: tuple[int, int]) -> Stream:
        end.setblocking(False)
        self._streams[key] = stream = Stream(end, *key)
        return stream

    def _owe(self, stream: Stream) -> None:
        if not stream.owes_credit:
            stream.owes_credit = True
            self._reply(stream, Operation.CREDIT_UPDATE)

    def _release(self, stream: Stream) -> None:
        stream.held = False
        self._held.discard(stream)
        self._watch(stream)

    def _watch(self, stream: Stream) -> None:
        """Asks the loop for the events that can be used now; closes a stream whose socket has no more of them."""
        if stream.closing or self._streams.get(stream.key) is not stream:
            return
        if stream.hung and stream.socket_ended:
            self._close(stream)
            return
        reads = stream.open and not stream.socket_ended and not stream.held
        events = (READ if reads else 0) | (WRITE if stream.backlog else 0)
        # A hangup is reported over and over; once heard, only a socket with something to read or write is watched.
        wanted = None if stream.hung and not events else events
        if wanted == stream.watched:
            return
        if wanted is None:
            self.loop.drop(stream.socket)
        elif stream.watched is None:
            self.loop.add(stream.socket, wanted, lambda what: self.guarded(lambda: self._event(stream, what)))
        else:
            self.loop.change(stream.socket, wanted)
        stream.watched = wanted

    def _event(self, stream: Stream, what: int) -> None:
        stream.hung = stream.hung or bool(what & HANGUP)
        if what & WRITE and stream.backlog:
            self._flush(stream)
        if self._streams.get(stream.key) is not stream or stream.closing:
            return
        if what & READ and stream.open and not stream.socket_ended and not stream.held:
            self._send(stream)
        else:
            self._watch(stream)

    def _close(self, stream: Stream) -> None:
        """The other end of the socket is gone: the guest may read what it has, then resets the stream."""
        self._forget(stream)
        stream.closing = True
        stream.backlog.clear()
        stream.waiting = 0
        self._reply(stream, Operation.SHUTDOWN, _BOTH)
        self.loop.later(CLOSE_SECONDS, lambda: self.guarded(lambda: self._cut(stream)))

    def _give_up(self, stream: Stream) -> None:
        if not stream.open:
            self._cut(stream)

    def _cut(self, stream: Stream) -> None:
        """Ends a stream on both sides."""
        if self._streams.get(stream.key) is stream:
            self._remove(stream)
            self._refuse(stream.key)

    def _remove(self, stream: Stream) -> None:
        self._forget(stream)
        del self._streams[stream.key]
        self._answer(stream, accepted=False)

    def _answer(self, stream: Stream, *, accepted: bool) -> None:
        answered, stream.answered = stream.answered, None
        if answered is not None:
            answered(accepted)

    def _forget(self, stream: Stream) -> None:
        self._held.discard(stream)
        stream.held = False
        if stream.watched is not None:
            self.loop.drop(stream.socket)
            stream.watched = None
        stream.socket.close()


def _take(ring: Ring) -> Chain:
    """The next buffer for a packet of ours: only to be called where one waits."""
    chain = ring.take()
    assert chain is not None
    if chain.readable or chain.writable_bytes <= _HEADER.size:
        raise GuestError("a buffer for packets without room for one")
    return chain


def _after_header(parts: Sequence[memoryview], length: int) -> Iterator[memoryview]:
    """The parts that follow the header of a packet, `length` bytes at most."""
    skip = _HEADER.size
    for part in parts:
        rest = part[skip : skip + length]
        skip = max(0, skip - len(part))
        length -= len(rest)
        if len(rest):
            yield rest
