"""The device of the Nitro Security Module: one CBOR message in, one out.

Behind a Unix socket stands the simulated module: u32 big-endian length, then the message, both ways. Whether a module is
real is decided by those who verify its documents, never here.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Protocol

from parley_protocol import limits
from parley_protocol.errors import UnavailableError

_LENGTH = struct.Struct(">I")


class Device(Protocol):
    """An NSM: takes a request of at most 4 KiB, returns a response of at most 12 KiB."""

    def request(self, message: bytes) -> bytes:
        """The module's response; UnavailableError where it gives none."""


class SocketDevice:
    """A module behind a Unix socket. Requests are serialised, as the kernel's driver does."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def request(self, message: bytes) -> bytes:
        if len(message) > limits.NSM_REQUEST_BYTES:
            raise ValueError("longer than an NSM request may be")
        with self._lock:
            try:
                return self._exchange(message)
            except OSError as error:
                self.close()
                raise UnavailableError("the NSM does not answer") from error

    def close(self) -> None:
        """Closes the connection; the next request opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _exchange(self, message: bytes) -> bytes:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(limits.NSM_TIMEOUT_MS / 1000)
            self._socket.connect(self._path)
        self._socket.sendall(_LENGTH.pack(len(message)) + message)
        (length,) = _LENGTH.unpack(self._take(self._socket, _LENGTH.size))
        if length > limits.NSM_RESPONSE_BYTES:
            raise OSError("the response is too long")
        return self._take(self._socket, length)

    @staticmethod
    def _take(connection: socket.socket, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = connection.recv(count - len(data))
            if not part:
                raise OSError("the module closed the connection")
            data += part
        return bytes(data)


def open_device(address: str) -> Device:
    """The device at `unix:PATH`; ValueError for another address."""
    kind, _, path = address.partition(":")
    if kind != "unix" or not path:
        raise ValueError(f"not an address of an NSM: {address}")
    return SocketDevice(path)
