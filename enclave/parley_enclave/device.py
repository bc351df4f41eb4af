"""The device of the Nitro Security Module: one CBOR message in, one out.

In an image it is the kernel's /dev/nsm. Behind a Unix socket stands the simulated module: u32 big-endian length, then the
message, both ways. Whether a module is real is decided by those who verify its documents, never here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable
from typing import Final, Protocol

from parley_protocol import limits
from parley_protocol.errors import UnavailableError

_LENGTH = struct.Struct(">I")

NSM_IOCTL_RAW: Final = 0xC0200A00
"""_IOWR(0x0A, 0, struct nsm_raw), from the kernel's include/uapi/linux/nsm.h."""
_RAW = struct.Struct("=QQQQ")
"""struct nsm_raw: address and length of the request, address and length of the response."""

Ioctl = Callable[[int, int, bytearray], int]


class Device(Protocol):
    """An NSM: takes a request of at most 4 KiB, returns a response of at most 12 KiB."""

    def request(self, message: bytes) -> bytes:
        """The module's response; UnavailableError where it gives none."""


class KernelDevice:
    """The module behind the kernel's driver. Requests are serialised, and nothing of one is left in memory for the next."""

    def __init__(self, path: str, ioctl: Ioctl = fcntl.ioctl) -> None:
        self._ioctl = ioctl
        self._lock = threading.Lock()
        self._request = (ctypes.c_ubyte * limits.NSM_REQUEST_BYTES)()
        self._response = (ctypes.c_ubyte * limits.NSM_RESPONSE_BYTES)()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UnavailableError(f"{path} does not open: {_name(error)}") from error

    def request(self, message: bytes) -> bytes:
        if len(message) > limits.NSM_REQUEST_BYTES:
            raise ValueError("longer than an NSM request may be")
        with self._lock:
            try:
                return self._exchange(message)
            except OSError as error:
                raise UnavailableError(f"the NSM does not answer: {_name(error)}") from error
            finally:
                for buffer in (self._request, self._response):
                    ctypes.memset(buffer, 0, len(buffer))

    def close(self) -> None:
        """Closes the device; it answers no more."""
        os.close(self._descriptor)

    def _exchange(self, message: bytes) -> bytes:
        ctypes.memmove(self._request, message, len(message))
        # The driver cuts what is longer than the length that it is told, and says nothing: it is told the greatest.
        raw = bytearray(
            _RAW.pack(
                ctypes.addressof(self._request), len(message), ctypes.addressof(self._response), len(self._response)
            )
        )
        self._ioctl(self._descriptor, NSM_IOCTL_RAW, raw)
        _, _, _, length = _RAW.unpack(raw)
        if not 0 < length <= len(self._response):
            raise UnavailableError(f"the NSM answers with {length} bytes")
        return ctypes.string_at(self._response, length)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "without an error number")


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


def _place(address: str) -> tuple[str, str]:
    kind, _, path = address.partition(":")
    if kind not in ("unix", "dev") or not path:
        raise ValueError(f"not an address of an NSM: {address}")
    return kind, path


def require_private(address: str) -> None:
    """ValueError unless the module at this address is for this user alone: who else asks it gets documents of this image."""
    kind, path = _place(address)
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise ValueError(f"{path}: {_name(error)}") from error
    if not (stat.S_ISCHR if kind == "dev" else stat.S_ISSOCK)(found.st_mode):
        raise ValueError(f"{path} is no {'device' if kind == 'dev' else 'socket'}")
    if found.st_uid != os.geteuid():
        raise ValueError(f"{path} belongs to uid {found.st_uid}, not to this process")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ValueError(f"{path} is open to others: mode {stat.S_IMODE(found.st_mode):04o}")


def open_device(address: str) -> Device:
    """The device at `dev:PATH` or `unix:PATH`; ValueError for another address, UnavailableError without a device."""
    kind, path = _place(address)
    return KernelDevice(path) if kind == "dev" else SocketDevice(path)
