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
