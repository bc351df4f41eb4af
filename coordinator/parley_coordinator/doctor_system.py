"""What `doctor` looks at: one object that stands for the machine, so that each check is a function of it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import resource
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final

_GET_LOCAL_CID: Final = 0x7B9
"""IOCTL_VM_SOCKETS_GET_LOCAL_CID of <linux/vm_sockets.h>."""
_UNSYNCHRONISED: Final = 0x0040
"""STA_UNSYNC of <linux/timex.h>."""
_TIME_ERROR: Final = 5
_TIMEX_BYTES: Final = 512
"""More than struct timex has on any machine."""
_STATUS: Final = struct.Struct("@Illlli")
"""The beginning of struct timex: modes, offset, freq, maxerror, esterror, status."""


class Verdict(StrEnum):
    """How a check ended. `warn` works and may not for long, `fail` does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: what was looked at, what was found, and what to do where it is not well."""

    name: str
    verdict: Verdict
    found: str
    do: str = ""


def ok(name: str, found: str) -> Check:
    """As it should be."""
    return Check(name, Verdict.OK, found)


def warn(name: str, found: str, do: str) -> Check:
    """Works, and may not for long or not for all."""
    return Check(name, Verdict.WARN, found, do)


def fail(name: str, found: str, do: str) -> Check:
    """Does not work."""
    return Check(name, Verdict.FAIL, found, do)


def skip(name: str, found: str) -> Check:
    """Not looked at, and why."""
    return Check(name, Verdict.SKIP, found)


def synchronised() -> bool | None:
    """Whether the kernel says that its clock is kept by NTP; None where it does not tell."""
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    status: int = _STATUS.unpack_from(buffer.raw)[5]
    return state != _TIME_ERROR and not status & _UNSYNCHRONISED


def local_cid(device: Path) -> int | None:
    """The CID of this machine; None where the device does not tell."""
    buffer = bytearray(4)
    try:
        with device.open("rb", buffering=0) as file:
            fcntl.ioctl(file, _GET_LOCAL_CID, buffer)
    except OSError:
        return None
    return int.from_bytes(buffer, "little" if struct.pack("=H", 1)[0] else "big")


def free(folder: Path) -> int:
    """Bytes that this user may still write where a folder is."""
    return shutil.disk_usage(folder).free


def owner(path: Path) -> int | None:
    """The number of the user whom a file belongs to; None where it is not there, or not to be seen."""
    try:
        return path.stat().st_uid
    except OSError:
        return None


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class System:
    """The machine. `root` is where its paths begin; the rest is what files do not tell."""

    root: Path = Path("/")
    now: Callable[[], datetime] = _now
    machine: str = field(default_factory=platform.machine)
    which: Callable[[str], str | None] = shutil.which
    synchronised: Callable[[], bool | None] = synchronised
    local_cid: Callable[[Path], int | None] = local_cid
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    access: Callable[[Path, int], bool] = os.access
    owner: Callable[[Path], int | None] = owner
    free: Callable[[Path], int] = free
    user: int = field(default_factory=os.geteuid)
    files: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    def path(self, name: str) -> Path:
        """A path of the machine, as /dev/vsock."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """The text of a small file; None where there is none that can be read."""
        try:
            return self.path(name).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def usable(self, path: Path) -> bool:
        """Whether this user may read and write a file."""
        return self.access(path, os.R_OK | os.W_OK)
