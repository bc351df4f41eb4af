"""The spool: sealed uploads on disk, with what their owner needs to send them and to open them to a session."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from parley.disk import Vault
from parley_protocol import limits
from parley_protocol.errors import MalformedError, StateError
from parley_protocol.shapes import Bytes, Shape, Statement, Text, Uint

BLOB = "blob"
ENTRY = "upload"
_STATEMENT = Bytes(1, limits.STATEMENT_BYTES)


@dataclass(frozen=True, slots=True)
class Spooled(Statement):
    """An upload that stands sealed in the spool. `source`: SHA-256 of what it was made from; `key`: the content key, sealed
    to this member's own state."""

    LABEL: ClassVar[str] = "parley/1/state-upload"
    SHAPES: ClassVar[tuple[Shape, ...]] = (
        Bytes(48),
        Text(),
        Text(),
        Bytes(48),
        _STATEMENT,
        Bytes(32),
        Bytes(1, 256),
        Uint(),
        Uint(),
        Uint(),
        Uint(),
    )
    agreement: bytes
    party: str
    table: str
    upload: bytes
    cose: bytes = field(repr=False)
    source: bytes = field(repr=False)
    key: bytes = field(repr=False)
    rows: int = field(repr=False)
    units: int = field(repr=False)
    dropped: int = field(repr=False)
    size: int


@dataclass(frozen=True, slots=True)
class SealedTable:
    """A sealed upload and where it stands: `folder` holds the blob of `size` bytes. Only its owner learns the counts."""

    table: str
    upload: bytes
    rows: int
    units: int
    dropped: int
    size: int
    folder: Path = field(repr=False)
    cose: bytes = field(repr=False)
    agreement: bytes = field(repr=False)
    ignored: tuple[str, ...] = ()

    @property
    def blob(self) -> Path:
        """The file with the sealed frames."""
        return self.folder / BLOB


def spooled(spool: Path) -> list[tuple[Spooled, SealedTable]]:
    """What stands in the spool; drafts of runs that were interrupted are no part of it."""
    found = []
    for folder in sorted(spool.glob("[0-9a-f]*")):
        entry = read_entry(folder)
        found.append((entry, sealed_table(folder, entry)))
    return found


def read_entry(folder: Path) -> Spooled:
    """The entry of one upload; StateError where it is damaged. After a restore it has no blob: what was sent stays sent."""
    try:
        entry = Spooled.from_bytes((folder / ENTRY).read_bytes())
    except (MalformedError, OSError):
        raise StateError(f"the spooled upload {folder.name[:8]} is damaged; remove {folder}") from None
    blob = folder / BLOB
    if entry.upload.hex() != folder.name or (blob.exists() and blob.stat().st_size != entry.size):
        raise StateError(f"the spooled upload {folder.name[:8]} is damaged; remove {folder}")
    return entry


def content_key(entry: Spooled, vault: Vault) -> bytes:
    """The content key of a spooled upload."""
    return vault.open(entry.key, b"content-key" + entry.upload)


def sealed_table(folder: Path, entry: Spooled, ignored: tuple[str, ...] = ()) -> SealedTable:
    """An entry of the spool as its owner sees it."""
    return SealedTable(
        entry.table,
        entry.upload,
        entry.rows,
        entry.units,
        entry.dropped,
        entry.size,
        folder,
        entry.cose,
        entry.agreement,
        ignored,
    )
