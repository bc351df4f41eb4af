"""The channel to an enclave: one connection for each operation, and the `Serve` connections on which the enclave asks.

What the enclave pulls goes from the file to the socket in the kernel. An address is `unix:PATH` or `vsock:CID:PORT`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from google.protobuf.message import DecodeError

from parley_coordinator import log, telemetry
from parley_coordinator.blobs import BlobReader
from parley_protocol import framing, limits
from parley_protocol.errors import MalformedError, ParleyError, RefusedError, UnavailableError
from parley_protocol.v1 import enclave_pb2 as pb

CONNECT_S: Final = 10.0
_LENGTHS: Final = struct.Struct(">II")
_VSOCK: Final = re.compile(r"vsock:([0-9]{1,10}):([0-9]{1,10})")
_VSOCK_CONNECT_TIMEOUT: Final = 6
"""SO_VM_SOCKETS_CONNECT_TIMEOUT of <linux/vm_sockets.h>, which `socket` does not name."""
_RESETS: Final = 3
_RESET_PAUSE_S: Final = 0.1
_PART: Final = 1 << 20
_READERS: Final = 256
"""Open files of one Serve connection: 17 parties with several tables each."""

Resolve = Callable[[int], BlobReader | None]
"""The blob with the enclave's number for it, or None."""


class GoneError(UnavailableError):
    """Nothing listens at the enclave's address."""


def connect(address: str, timeout_s: float = CONNECT_S) -> socket.socket:
    """A connection to an enclave, whose operations time out after `timeout_s`.

    GoneError where nothing listens at the address; UnavailableError where that is not known, as when time runs out.
    ValueError where the address is none.
    """
    if address.startswith("unix:"):
        return _connect(socket.AF_UNIX, address.removeprefix("unix:"), timeout_s)
    cid, port = vsock_address(address)
    for left in reversed(range(_RESETS)):
        try:
            return _connect(socket.AF_VSOCK, (cid, port), timeout_s)
        except GoneError as error:
            # A reset comes from a port where nothing listens, and as well from a listener whose queue is full.
            if not left or not isinstance(error.__cause__, ConnectionResetError):
                raise
        time.sleep(_RESET_PAUSE_S)
    raise AssertionError("unreachable")


def vsock_address(address: str) -> tuple[int, int]:
    """(CID, port) of an address `vsock:CID:PORT`; ValueError for all else."""
    match = _VSOCK.fullmatch(address)
    if match is None or not all(int(number) < socket.VMADDR_CID_ANY for number in match.groups()):
        raise ValueError(f"{address}: not an address of an enclave")
    return int(match[1]), int(match[2])


def _connect(family: int, where: str | tuple[int, int], timeout_s: float) -> socket.socket:
    try:
        connection = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"this machine has no such sockets: {error.strerror}") from error
    try:
        connection.settimeout(timeout_s)
        if family == socket.AF_VSOCK:
            _connect_timeout(connection, timeout_s)
        connection.connect(where)
    except OSError as error:
        connection.close()
        # ENODEV: no machine has this CID, or this one no vsock device. ECONNRESET: the answer of a vsock without listener.
        gone = (errno.ECONNREFUSED, errno.ENOENT, errno.ENODEV, errno.ECONNRESET)
        if error.errno in gone:
            raise GoneError("the enclave does not listen") from error
        raise UnavailableError(f"the enclave does not take a connection: {error}") from error
    return connection


def _connect_timeout(connection: socket.socket, seconds: float) -> None:
    """Lets a vsock take so long to connect; the kernel's own limit is 2 seconds, less than an enclave under load may take."""
    whole, rest = divmod(seconds, 1)
    # Python gives a vsock's options 8 bytes and this one has 16: so a second object, which thinks that it is another kind.
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, os.dup(connection.fileno()))
    with other:
        limit = struct.pack("ll", int(whole), int(rest * 1e6))
        other.setsockopt(socket.AF_VSOCK, _VSOCK_CONNECT_TIMEOUT, limit)


class Channel:
    """Operations of one enclave. `close` ends those that are under way."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closed = False

    def ask(self, request: pb.Ask, deadline_s: float, progress: Callable[[int], None] | None = None) -> pb.Answer:
        """The enclave's answer to one operation; `progress` gets the percentages that come before it.

        RefusedError with the enclave's code; UnavailableError where the channel breaks or the deadline passes; then the
        operation may be asked again, since all of them are answered alike when they are repeated.
        """
        operation, started, code = request.WhichOneof("op") or "", time.monotonic(), telemetry.OK
        with telemetry.span("enclave", parley_operation=operation) as span:
            try:
                return self._ask(request, deadline_s, progress)
            except ParleyError as error:
                code = error.code
                raise
            finally:
                span.set("parley.code", code)
                seconds = time.monotonic() - started
                telemetry.observe("parley_enclave_seconds", seconds, operation=operation, code=code)

    def _ask(self, request: pb.Ask, deadline_s: float, progress: Callable[[int], None] | None) -> pb.Answer:
        end = time.monotonic() + deadline_s
        with connect(self.address) as connection:
            with self._lock:
                if self._closed:
                    raise UnavailableError("the coordinator is stopping")
                self._connections.add(connection)
            try:
                connection.settimeout(deadline_s)
                connection.sendall(framing.pack(request.SerializeToString()))
                while True:
                    # A release is as large as its bundle; all else is small.
                    answer = _answer(connection, end, limits.BUNDLE_BYTES)
                    kind = answer.WhichOneof("op")
                    if kind == "failed":
                        raise RefusedError.from_wire(answer.failed.code)
                    if kind != "progress":
                        return answer
                    if progress is not None:
                        progress(min(answer.progress.percent, 100))
            except OSError as error:
                raise UnavailableError(f"the channel to the enclave broke: {type(error).__name__}") from error
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def close(self) -> None:
        """Ends the operations that are under way, with UnavailableError; the enclave goes on with them."""
        with self._lock:
            self._closed = True
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def _answer(connection: socket.socket, end: float | None, limit: int = limits.MESSAGE_BYTES) -> pb.Answer:
    head = _receive(connection, framing.HEADER_BYTES, end)
    message, payload = framing.header(head, limit_message=limit, limit_payload=0)
    data = _receive(connection, message + payload, end)
    try:
        return pb.Answer.FromString(bytes(data))
    except DecodeError as error:
        raise MalformedError("the enclave's answer is no message of the channel") from error


def _receive(connection: socket.socket, length: int, end: float | None) -> bytearray:
    # Grows with what arrives: a header alone allocates nothing.
    data = bytearray()
    while len(data) < length:
        if end is not None:
            connection.settimeout(max(0.001, end - time.monotonic()))
        part = connection.recv(min(length - len(data), _PART))
        if not part:
            raise ConnectionResetError("closed by the enclave")
        data += part
    return data


class FrameServer:
    """Keeps `count` Serve connections to one enclave open and answers its Pulls, until it is closed or nothing listens."""

    def __init__(self, address: str, count: int, resolve: Resolve) -> None:
        self._address = address
        self._resolve = resolve
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads = [
            threading.Thread(target=self._run, name=f"serve-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends all connections and waits for their threads."""
        self._closing.set()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=CONNECT_S)

    def _run(self) -> None:
        pause = 0.05
        while not self._closing.is_set():
            try:
                with connect(self._address) as connection:
                    pause = 0.05
                    self._serve(connection)
            except (GoneError, ConnectionResetError):
                log.debug("serve-ended", address=self._address)
            except (OSError, UnavailableError, MalformedError) as error:
                if not self._closing.is_set():
                    log.warning("serve-broke", error=type(error).__name__)
            self._closing.wait(pause)
            pause = min(2 * pause, 2.0)

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            self._connections.add(connection)
        readers: dict[int, BlobReader] = {}
        try:
            connection.settimeout(None)
            connection.sendall(framing.pack(pb.Ask(serve=pb.Serve()).SerializeToString()))
            while True:
                answer = _answer(connection, None)
                if answer.WhichOneof("op") == "failed":
                    raise UnavailableError(f"the enclave takes no connection to serve: {answer.failed.code}")
                if answer.WhichOneof("op") != "pull":
                    raise MalformedError("not a Pull on a connection that serves")
                self._answer_pull(connection, answer.pull, readers)
        finally:
            with self._lock:
                self._connections.discard(connection)
            for reader in readers.values():
                reader.close()

    def _answer_pull(self, connection: socket.socket, pull: pb.Pull, readers: dict[int, BlobReader]) -> None:
        reader = self._reader(pull.blob, readers)
        size = 0 if reader is None else reader.size
        lengths, runs, total = plan(pull, size)
        message = pb.Ask(frames=pb.Frames(lengths=lengths)).SerializeToString()
        connection.sendall(_LENGTHS.pack(len(message), total) + message)
        if reader is not None:
            for offset, length in runs:
                reader.send(connection, offset, length)

    def _reader(self, blob: int, readers: dict[int, BlobReader]) -> BlobReader | None:
        if blob in readers:
            return readers[blob]
        reader = self._resolve(blob)
        if reader is not None:
            while len(readers) >= _READERS:
                readers.pop(next(iter(readers))).close()
            readers[blob] = reader
        return reader


def plan(pull: pb.Pull, size: int) -> tuple[list[int], list[tuple[int, int]], int]:
    """How a Pull of a blob of `size` bytes is answered: (length of each range, adjacent ranges joined, all bytes).

    A range that the blob does not hold as a whole has length 0, as has each beyond the limits of one frame.
    """
    lengths: list[int] = []
    runs: list[tuple[int, int]] = []
    total = 0
    for number, wanted in enumerate(pull.ranges):
        offset, length = wanted.offset, wanted.length
        if offset + length > size or total + length > limits.PAYLOAD_BYTES or number >= limits.BLOB_RANGES:
            length = 0
        lengths.append(length)
        total += length
        if length and runs and sum(runs[-1]) == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        elif length:
            runs.append((offset, length))
    return lengths, runs, total
