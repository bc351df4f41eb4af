"""Ciphertext and bundles. A blob is written from its start to its end, and resumed after the bytes that were synced.

How many bytes are stored for good is the store's knowledge (`UploadRow.stored`), never the length of a file: after a power
cut a file may be longer than what reached the disk.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

from parley_protocol.errors import UnavailableError

_NAME: Final = re.compile(r"[a-z]+-[0-9a-f]{1,64}")
_NO_SENDFILE: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_PIECE: Final = 1 << 20


class BlobWriter(Protocol):
    """One blob that grows. For one thread at a time, but for `sync`, which may run beside `write`."""

    @property
    def position(self) -> int:
        """Bytes written so far."""

    @property
    def state(self) -> str:
        """What `writer` needs to go on after the bytes of the last `sync`; to be stored together with their number. Where that
        of a new writer is not what was reserved, it is to be stored before anything is written."""

    def write(self, data: bytes) -> None:
        """Appends; UnavailableError where the store is full or broken."""

    def sync(self, *, whole: bool = True) -> int:
        """Makes what was written before the call durable, all of it where `whole`, which is the end of a writer; returns how
        many bytes are.

        With the blob's last byte it can be read. UnavailableError where the store is broken.
        """

    def close(self) -> None:
        """Ends writing. What was not synced may be gone."""


class BlobReader(Protocol):
    """One blob at rest. For one thread."""

    @property
    def size(self) -> int:
        """Bytes that are there."""

    def read(self, offset: int, length: int) -> bytes:
        """A range; shorter where the blob ends before."""

    def send(self, to: socket.socket, offset: int, length: int) -> None:
        """Sends a range to a connected stream socket, all of it or OSError."""

    def close(self) -> None:
        """Frees the reader."""


class BlobStore(Protocol):
    """Where blobs are. Names are words and hex digits, such as `upload-2a`."""

    def reserve(self, state: str) -> str:
        """The state to store before a writer goes on from `state`, so that a later one, which may come before its first sync,
        does not meet it. OSError where it is no state."""

    def writer(self, name: str, stored: int, size: int = 0, state: str = "") -> BlobWriter:
        """Goes on after the first `stored` of `size` bytes, which were synced before with this `state`.

        OSError where they are not there; UnavailableError where the store does not answer.
        """

    def reader(self, name: str) -> BlobReader:
        """FileNotFoundError where there is no such blob; UnavailableError where the store does not answer."""

    def put(self, name: str, pieces: Iterable[bytes]) -> int:
        """Writes a whole blob: after a crash it is there as a whole or not at all. Returns its size."""

    def delete(self, name: str, state: str = "") -> None:
        """Removes a blob and what was synced of it with this `state`, if there is anything."""

    def sweep(self, before_ms: int, growing: Callable[[str], str | None]) -> int:
        """Removes what was left of writing that ended before a time; returns how much it was.

        `growing`: the `state` of a blob that is still written, None where a name is no such blob's.
        """

    def close(self) -> None:
        """Frees the store."""


def upload_name(number: int) -> str:
    """The blob of an upload."""
    return f"upload-{number:x}"


def bundle_name(session: bytes) -> str:
    """The blob of a session's bundle."""
    return f"bundle-{session.hex()}"


def is_name(name: str) -> bool:
    """Whether something may be the name of a blob."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """ValueError for what is no name of a blob."""
    if not is_name(name):
        raise ValueError("not a name of a blob")


class Directory:
    """Blobs as files of one folder tree."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def reserve(self, state: str) -> str:
        return state

    def writer(self, name: str, stored: int, size: int = 0, state: str = "") -> BlobWriter:  # noqa: ARG002
        path = self._path(name)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            length = os.fstat(descriptor).st_size
            if length < stored:
                raise OSError(f"{name} has {length} bytes where {stored} were stored")
            os.ftruncate(descriptor, stored)
            if stored == 0:
                _sync_folder(path.parent)
                _sync_folder(self._folder)
        except BaseException:
            os.close(descriptor)
            raise
        return _FileWriter(descriptor, stored)

    def reader(self, name: str) -> BlobReader:
        return _FileReader(os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC))

    def put(self, name: str, pieces: Iterable[bytes]) -> int:
        path = self._path(name)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        part = path.with_suffix(".part")
        writer = _FileWriter(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), 0)
        try:
            for piece in pieces:
                writer.write(piece)
            size = writer.sync()
        finally:
            writer.close()
        part.replace(path)
        _sync_folder(path.parent)
        _sync_folder(self._folder)
        return size

    def delete(self, name: str, state: str = "") -> None:  # noqa: ARG002
        path = self._path(name)
        if path.exists():
            path.unlink()
            _sync_folder(path.parent)

    def sweep(self, before_ms: int, growing: Callable[[str], str | None]) -> int:  # noqa: ARG002
        swept = 0
        for path in self._folder.glob("*/*.part"):
            if path.stat().st_mtime_ns // 1_000_000 < before_ms:
                path.unlink()
                swept += 1
        return swept

    def close(self) -> None:
        """Nothing to free."""

    def _path(self, name: str) -> Path:
        check_name(name)
        return self._folder / name[-2:].replace("-", "0") / name


class _FileWriter:
    def __init__(self, descriptor: int, position: int) -> None:
        self._descriptor = descriptor
        self._position = position

    @property
    def position(self) -> int:
        return self._position

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                written = os.pwrite(self._descriptor, left, self._position)
            except OSError as error:
                raise UnavailableError(f"the store of the coordinator takes no more: {error.strerror}") from error
            self._position += written
            left = left[written:]

    @property
    def state(self) -> str:
        return ""

    def sync(self, *, whole: bool = True) -> int:  # noqa: ARG002
        position = self._position
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise UnavailableError(f"the store of the coordinator takes no more: {error.strerror}") from error
        return position

    def close(self) -> None:
        os.close(self._descriptor)


class _FileReader:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def send(self, to: socket.socket, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            try:
                sent = os.sendfile(to.fileno(), self._descriptor, offset, end - offset)
            except OSError as error:
                # Not every kind of socket and of file system lets the kernel do it.
                if error.errno not in _NO_SENDFILE:
                    raise
                piece = self.read(offset, min(end - offset, _PIECE))
                to.sendall(piece)
                sent = len(piece)
            if sent == 0:
                raise OSError("the blob ended while it was sent")
            offset += sent

    def close(self) -> None:
        os.close(self._descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
