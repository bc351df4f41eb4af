"""A folder as a ramdisk: the "newc" form of cpio, the same bytes for the same files on every machine.

Entries stand in the order of their names, owned by 0:0, dated 0, with modes that say only what is executable. Source: the
kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final

MAGIC: Final = b"070701"
TRAILER: Final = "TRAILER!!!"
BLOCK: Final = 512
"""Archives end at a multiple of this: the kernel reads the next one at a multiple of four."""
COPY_BYTES: Final = 1 << 20

FOLDER: Final = stat.S_IFDIR | 0o755
LINK: Final = stat.S_IFLNK | 0o777
FILE: Final = stat.S_IFREG | 0o644
PROGRAM: Final = stat.S_IFREG | 0o755


def mode(path: Path) -> int:
    """The mode that an entry gets; ValueError for what is neither file, folder nor symbolic link."""
    found = path.lstat().st_mode
    if stat.S_ISDIR(found):
        return FOLDER
    if stat.S_ISLNK(found):
        return LINK
    if stat.S_ISREG(found):
        return PROGRAM if found & stat.S_IXUSR else FILE
    raise ValueError(f"{path}: neither a file, a folder nor a symbolic link")


def pack(folder: Path, names: Iterable[str], out: IO[bytes]) -> None:
    """Writes the entries `names` (relative, `/` between parts) of `folder`, and the folders above them, to `out`."""
    wanted = {parent for name in names for parent in _with_parents(name)}
    size = 0
    # By parts, so that a folder stands before what is in it and nothing stands between.
    for number, name in enumerate(sorted(wanted, key=lambda name: name.split("/")), 1):
        path = folder / name
        kind = mode(path)
        if kind == LINK:
            target = os.fsencode(path.readlink())
            size += _entry(out, number, name, kind, len(target))
            size += _padded(out, target)
        elif kind == FOLDER:
            size += _entry(out, number, name, kind, 0)
        else:
            length = path.stat().st_size
            size += _entry(out, number, name, kind, length)
            size += _copy(path, length, out)
    size += _entry(out, 0, TRAILER, 0, 0)
    out.write(bytes(-size % BLOCK))


def names(folder: Path) -> list[str]:
    """Everything below `folder`, relative, links not followed."""
    found: list[str] = []
    for base, folders, files in os.walk(folder):
        found += [(Path(base) / name).relative_to(folder).as_posix() for name in (*folders, *files)]
    return sorted(found)


def _with_parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _entry(out: IO[bytes], inode: int, name: str, kind: int, size: int) -> int:
    if size >= 1 << 32:
        raise ValueError(f"{name}: {size} bytes do not fit the format")
    encoded = os.fsencode(name) + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (4), length of the name, checksum
    fields = (inode, kind, 0, 0, 1, 0, size, 0, 0, 0, 0, len(encoded), 0)
    return _padded(out, MAGIC + b"".join(b"%08X" % field for field in fields) + encoded)


def _padded(out: IO[bytes], data: bytes) -> int:
    padding = -len(data) % 4
    out.write(data + bytes(padding))
    return len(data) + padding


def _copy(path: Path, length: int, out: IO[bytes]) -> int:
    left = length
    with path.open("rb") as file:
        while left:
            part = file.read(min(left, COPY_BYTES))
            if not part:
                raise OSError(f"{path}: became shorter while it was read")
            out.write(part)
            left -= len(part)
    padding = -length % 4
    out.write(bytes(padding))
    return length + padding
