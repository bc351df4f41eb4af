"""A Serve connection, as a worker uses it: asks the host for byte ranges of stored blobs, and nothing else.

What arrives is checked for its length only; the engine checks each frame against the upload's digests (REVIEW T1).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence

from google.protobuf.message import DecodeError

from parley_enclave.engine.frames import FrameError
from parley_protocol import framing, limits
from parley_protocol.errors import MalformedError
from parley_protocol.v1 import enclave_pb2

Range = tuple[int, int]


class UnservedError(Exception):
    """The connection is lost or out of step: the task may be repeated on another one."""


class Serve:
    """Pulls over one connection. Not thread-safe."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def pull(self, blob: int, ranges: Sequence[Range]) -> list[memoryview]:
        """The bytes of each (offset, length) of a blob.

        FrameError where the host does not hold one; UnservedError where the connection breaks.
        """
        data = memoryview(bytearray(sum(length for _, length in ranges)))
        at = 0
        for batch in _batches(ranges):
            total = sum(length for _, length in batch)
            self._exchange(blob, batch, data[at : at + total])
            at += total
        pieces = []
        at = 0
        for _, length in ranges:
            pieces.append(data[at : at + length].toreadonly())
            at += length
        return pieces

    def _exchange(self, blob: int, batch: Sequence[Range], into: memoryview) -> None:
        pull = enclave_pb2.Pull(
            blob=blob, ranges=[enclave_pb2.Range(offset=offset, length=length) for offset, length in batch]
        )
        until = time.monotonic() + limits.PULL_TIMEOUT_MS / 1000
        try:
            self._connection.settimeout(limits.PULL_TIMEOUT_MS / 1000)
            self._connection.sendall(framing.pack(enclave_pb2.Answer(pull=pull).SerializeToString()))
            head = self._take(memoryview(bytearray(framing.HEADER_BYTES)), until)
            message, payload = framing.header(head, limit_payload=len(into))
            ask = enclave_pb2.Ask.FromString(bytes(self._take(memoryview(bytearray(message)), until)))
            if ask.WhichOneof("op") != "frames":
                raise UnservedError("the host answers a pull with something else")
            if list(ask.frames.lengths) != [length for _, length in batch] or payload != len(into):
                # What is left in the stream is of no use, and the range is missing whatever the host says.
                self._connection.close()
                raise FrameError("the host does not hold a range")
            self._take(into, until)
        except (OSError, MalformedError, DecodeError) as error:
            raise UnservedError("the connection is lost") from error

    def _take(self, into: memoryview, until: float) -> memoryview:
        got = 0
        while got < len(into):
            self._connection.settimeout(max(0.001, until - time.monotonic()))
            received = self._connection.recv_into(into[got:])
            if not received:
                raise UnservedError("the host closed the connection")
            got += received
        return into


def _batches(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    """The same bytes in the same order, in pulls whose answers fit one payload."""
    batch: list[Range] = []
    total = 0
    for start, length in ranges:
        done = 0
        while done < length:
            take = min(length - done, limits.PAYLOAD_BYTES)
            if batch and (total + take > limits.PAYLOAD_BYTES or len(batch) == limits.PULL_RANGES):
                yield batch
                batch, total = [], 0
            batch.append((start + done, take))
            total += take
            done += take
    if batch:
        yield batch
