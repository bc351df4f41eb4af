"""Files that hold: written whole or not at all, on the disk before a function returns; secrets in them under the member's key."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parley_protocol.errors import StateError
from parley_protocol.identity import PrivateIdentity

_NONCE_BYTES = 12


class Vault:
    """Seals secrets of the local state under a key that only the member's private key gives.

    A passphrase on the private key so protects the state's secrets too. It prints and pickles nothing of itself.
    """

    __slots__ = ("_key",)

    def __init__(self, identity: PrivateIdentity) -> None:
        self._key = AESGCM(identity.derive(b"parley/1/state", b"", 32))

    def seal(self, secret: bytes, purpose: bytes) -> bytes:
        """`secret` for a file; `purpose` must be the same to open it."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._key.encrypt(nonce, secret, purpose)

    def open(self, sealed: bytes, purpose: bytes) -> bytes:
        """What was sealed for `purpose`; StateError where it was not, or by another member."""
        try:
            return self._key.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], purpose)
        except (InvalidTag, ValueError):
            raise StateError("a secret of the local state is damaged, or of another key") from None

    def __repr__(self) -> str:
        return "Vault(<secret>)"

    def __reduce__(self) -> str:
        raise TypeError("a vault is not pickled")


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces a file atomically: after a crash it holds the old bytes or the new ones, and the new ones after the return."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say where
        raise
    sync_folder(path.parent)


def remove_file(path: Path) -> None:
    """Unlinks a file if it is there, for good."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """A folder for its owner alone, with its parents, for good."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, which other processes of this machine wait for."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
