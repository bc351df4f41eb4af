"""Who this coordinator is among several: one name for its folder, and one for the machine whose enclaves it reaches."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from parley_coordinator.config import Config, ConfigError
from parley_protocol.errors import UnavailableError

HOLDER_FILE: Final = "holder"
NODE_FILE: Final = "node"
LOCK_FILE: Final = "lock"
_POLL_S: Final = 0.05


class Identity:
    """The names of a running coordinator. `holder` is its folder's, and one process at a time has it: whoever finds it in
    the store knows that the process which wrote it there has ended. `node` is that of the launcher's folder: coordinators
    that share the one share the enclaves."""

    def __init__(self, holder: str, node: str, descriptor: int = -1) -> None:
        self.holder = holder
        self.node = node
        self._descriptor = descriptor

    @classmethod
    def claim(cls, config: Config) -> Self:
        """The names of a configuration's coordinator; ConfigError where it runs already."""
        path = config.folder / HOLDER_FILE
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"{config.folder}: another coordinator runs in this folder") from error
            holder = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
            if not holder:
                holder = secrets.token_hex(8)
                os.pwrite(descriptor, holder.encode(), 0)
                os.fsync(descriptor)
            return cls(holder, config.node or _node(config.launcher_folder), descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Lets another process have the names."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _node(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / NODE_FILE
    if not path.exists():
        part = folder / f"{NODE_FILE}-{secrets.token_hex(4)}"
        part.write_text(secrets.token_hex(8), encoding="ascii")
        try:
            # The first one's stands, whoever that is.
            path.hardlink_to(part)
        except FileExistsError:
            return path.read_text(encoding="ascii").strip()
        finally:
            part.unlink()
    return path.read_text(encoding="ascii").strip()


@contextmanager
def exclusive(folder: Path, seconds: float, name: str = LOCK_FILE) -> Iterator[None]:
    """Held by one process at a time for a folder of enclaves; UnavailableError where another one keeps it."""
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise UnavailableError("another coordinator is at the enclaves of this machine") from error
                time.sleep(_POLL_S)
            else:
                break
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Locks a file, which is made, for as long as the block and this process last."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether some process, this one included, has a file locked."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
