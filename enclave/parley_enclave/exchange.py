"""Parcels between the main process and its workers: a CBOR header, raw parts, and on the way to a worker sometimes a socket.

Workers parse what hostile parties made, so nothing that they send back is ever unpickled or evaluated.
u32 BE length of the header, u64 BE length of all parts, the header [fields, lengths of the parts], the parts.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from parley_protocol import limits
from parley_protocol.encoding import Encodable, Value, decode, encode
from parley_protocol.errors import MalformedError

_LENGTHS = struct.Struct(">IQ")


@dataclass(frozen=True, slots=True)
class Parcel:
    """What was received: the fields of the header and the raw parts. Fields may hold keys, so neither is printed."""

    fields: list[Value] = field(repr=False)
    parts: tuple[bytes, ...] = field(repr=False)


def send(
    control: socket.socket, fields: Sequence[Encodable], parts: Sequence[bytes] = (), *, fds: Sequence[int] = ()
) -> None:
    """Sends one parcel, with the open files `fds` beside it; OSError where the other side is gone."""
    header = encode([list(fields), [len(part) for part in parts]])
    lengths = _LENGTHS.pack(len(header), sum(map(len, parts)))
    if fds:
        # The files travel with the first bytes, which are few enough never to be split.
        socket.send_fds(control, [lengths], list(fds))
    else:
        control.sendall(lengths)
    control.sendall(header)
    for part in parts:
        control.sendall(part)


def receive(control: socket.socket) -> Parcel:
    """The next parcel. EOFError where the other side is gone; MalformedError.

    The kernel closes files that come with it: a worker that a table has taken over would use up those of the main process.
    """
    return _parcel(control, control.recv(_LENGTHS.size))


def receive_with_files(control: socket.socket) -> tuple[Parcel, list[int]]:
    """The same, and the files that came with it: for a worker, which believes the main process."""
    first, fds, _, _ = socket.recv_fds(control, _LENGTHS.size, 1)
    return _parcel(control, first), fds


def _parcel(control: socket.socket, first: bytes) -> Parcel:
    header_bytes, body_bytes = _LENGTHS.unpack(first + _take(control, _LENGTHS.size - len(first), gone=not first))
    if header_bytes > limits.WORKER_HEADER_BYTES or body_bytes > limits.WORKER_MESSAGE_BYTES:
        raise MalformedError("a parcel is too long")
    value = decode(_take(control, header_bytes), limit=limits.WORKER_HEADER_BYTES)
    if type(value) is not list or len(value) != 2:
        raise MalformedError("a parcel has no header")
    fields, lengths = value
    if type(fields) is not list or type(lengths) is not list:
        raise MalformedError("a parcel has no header")
    sizes = [length for length in lengths if type(length) is int and length >= 0]
    if len(sizes) != len(lengths) or sum(sizes) != body_bytes:
        raise MalformedError("a parcel's parts have wrong lengths")
    return Parcel(fields, tuple(_take(control, size) for size in sizes))


def _take(control: socket.socket, count: int, *, gone: bool = False) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    got = 0
    while got < count and not gone:
        received = control.recv_into(view[got:])
        gone = received == 0
        got += received
    if gone and got < count:
        raise EOFError("the other side is gone")
    return bytes(data)
