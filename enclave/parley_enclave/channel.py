"""The channel from the host: a listener, one thread for each connection, all of it bounded in number, size and time.

A Unix socket and AF_VSOCK by the same code. The host opens every connection; the enclave opens none.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from parley_protocol import framing, limits
from parley_protocol.errors import MalformedError
from parley_protocol.v1 import enclave_pb2

HOST_CID = 3
"""The parent instance's context id (VMADDR of the Nitro hypervisor's vsock)."""
_PORT_ANY = 2**32 - 1
"""VMADDR_PORT_ANY: the kernel would choose a port, where nobody finds the enclave."""


class Connection:
    """One connection of the host: asks in, answers out."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def receive(self) -> enclave_pb2.Ask:
        """The next message. Within a deadline; MalformedError for bytes that are none, OSError or EOFError without one."""
        until = time.monotonic() + limits.ASK_TIMEOUT_MS / 1000
        length, _ = framing.header(self._take(framing.HEADER_BYTES, until), limit_payload=0)
        try:
            return enclave_pb2.Ask.FromString(self._take(length, until))
        except DecodeError:
            raise MalformedError("not an Ask") from None

    def send(self, answer: enclave_pb2.Answer) -> None:
        """Sends an answer; OSError where the host is gone or does not read it in time."""
        self._socket.settimeout(limits.ANSWER_TIMEOUT_MS / 1000)
        self._socket.sendall(framing.pack(answer.SerializeToString(deterministic=True)))

    def detach(self) -> socket.socket:
        """Gives the socket away; this connection is then closed."""
        given = socket.socket(fileno=self._socket.detach())
        given.settimeout(None)
        return given

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _take(self, count: int, until: float) -> bytes:
        # Grows with what arrives: a header alone allocates nothing.
        data = bytearray()
        while len(data) < count:
            self._socket.settimeout(max(0.001, until - time.monotonic()))
            part = self._socket.recv(min(count - len(data), 1 << 20))
            if not part:
                raise EOFError("the host closed the connection")
            data += part
        return bytes(data)


def is_host(family: int, peer: object) -> bool:
    """Whether the other end of an accepted connection is the host: over vsock CID 3 alone; a Unix socket has its file mode."""
    if family == socket.AF_VSOCK:
        return isinstance(peer, tuple) and len(peer) == 2 and peer[0] == HOST_CID
    return family == socket.AF_UNIX


def listen(address: str) -> socket.socket:
    """A listener at `unix:PATH` (mode 0600) or `vsock:PORT`; ValueError for another address, OSError without the family."""
    kind, _, place = address.partition(":")
    if kind == "unix" and place:
        if Path(place).is_socket():
            Path(place).unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            listener.bind(place)
        finally:
            os.umask(previous)
    elif kind == "vsock" and place.isascii() and place.isdigit() and len(place) <= 10 and int(place) < _PORT_ANY:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, int(place)))
    else:
        raise ValueError(f"not an address to listen at: {address}")
    listener.listen(limits.CONNECTIONS)
    return listener


class Server:
    """Accepts connections and gives each its thread. Beyond `connections` at a time new ones are closed unread."""

    def __init__(
        self, listener: socket.socket, handle: Callable[[Connection], None], *, connections: int = limits.CONNECTIONS
    ) -> None:
        self._listener = listener
        self._handle = handle
        self._free = threading.BoundedSemaphore(connections)

    def run(self) -> None:
        """Accepts until the listener is closed."""
        while True:
            try:
                accepted, peer = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                # No descriptor is free, or the host left before it was accepted: others may come.
                time.sleep(limits.ACCEPT_PAUSE_MS / 1000)
                continue
            if not is_host(accepted.family, peer) or not self._free.acquire(blocking=False):
                accepted.close()
                continue
            threading.Thread(target=self._serve, args=(Connection(accepted),), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            self._handle(connection)
        finally:
            connection.close()
            self._free.release()
