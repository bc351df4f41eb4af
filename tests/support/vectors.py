"""Where the recorded vectors are: the folder in PARLEY_VECTORS, by default `../shared/vectors` beside the checkout."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("PARLEY_VECTORS", Path(__file__).resolve().parents[2].parent / "shared" / "vectors"))


@dataclass(frozen=True, slots=True)
class Recorded:
    """One attestation document with what was recorded about it when it was collected."""

    name: str
    kind: str
    verdict: str
    data: bytes = field(repr=False)


def attestation() -> list[Recorded]:
    """All recorded documents; skips, and says so, where they are not on this machine."""
    index = FOLDER / "attestation" / "index.json"
    if not index.exists():
        pytest.skip(f"NO ATTESTATION VECTORS: {index} is not there; set PARLEY_VECTORS", allow_module_level=True)
    return [
        Recorded(
            entry["file"],
            entry["kind"],
            entry["verdict_at_own_timestamp"],
            (index.parent / entry["file"]).read_bytes(),
        )
        for entry in json.loads(index.read_text())
    ]


@dataclass(frozen=True, slots=True)
class RecordedImage:
    """An EIF that AWS's own code built, or one altered by hand, with the measurements recorded for it."""

    name: str
    path: Path
    pcrs: dict[int, bytes]

    @property
    def data(self) -> bytes:
        """The file."""
        return self.path.read_bytes()


def images() -> dict[str, RecordedImage]:
    """All recorded images by name; skips, and says so, where they are not on this machine."""
    folder = FOLDER / "eif"
    if not (folder / "index.json").exists():
        pytest.skip(f"NO IMAGE VECTORS: {folder} is not there; set PARLEY_VECTORS", allow_module_level=True)
    found = {}
    for path in sorted(folder.glob("*.eif")):
        told = json.loads(path.with_suffix(".build.json").read_text())
        registers = told.get("Measurements", told)
        pcrs = {int(name[3:]): bytes.fromhex(value) for name, value in registers.items() if name.startswith("PCR")}
        found[path.stem] = RecordedImage(path.stem, path, pcrs)
    return found


@dataclass(frozen=True, slots=True)
class RecordedAnswer:
    """A CiphertextForRecipient that KMS sent, with what was recorded of it: all of it where its key is there."""

    name: str
    data: bytes = field(repr=False)
    key: bytes | None = field(repr=False)
    plaintext: bytes | None = field(repr=False)
    parts: dict[str, bytes] | None = field(repr=False)


def kms() -> list[RecordedAnswer]:
    """All recorded answers of KMS; skips, and says so, where they are not on this machine."""
    index = FOLDER / "kms" / "index.json"
    if not index.exists():
        pytest.skip(f"NO KMS VECTORS: {index} is not there; set PARLEY_VECTORS", allow_module_level=True)

    def file(entry: dict[str, str], name: str) -> bytes | None:
        return (FOLDER / entry[name]).read_bytes() if name in entry else None

    found = []
    for entry in json.loads(index.read_text()):
        expected = file(entry, "expected")
        parts = None
        if expected is not None:
            parts = {name: bytes.fromhex(value) for name, value in json.loads(expected).items()}
        data = (FOLDER / entry["file"]).read_bytes()
        found.append(RecordedAnswer(entry["file"], data, file(entry, "key"), file(entry, "plaintext"), parts))
    return found
