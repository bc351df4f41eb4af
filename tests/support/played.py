"""Runs a demo for a test and compares what its members received with the oracle."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from parley_deploy.demo import DEMOS, Played, agreement_members, play
from parley_protocol.bundle import VerifiedBundle, verify_bundle
from parley_protocol.output import OutputTable
from support.oracle import Key, Values


def run(name: str, folder: Path, coalition: int | None) -> tuple[Played, list[str]]:
    """Plays a demo; what it left, and the lines it printed."""
    lines: list[str] = []
    return play(name, folder, coalition=coalition, say=lines.append), lines


def opened(played: Played) -> VerifiedBundle:
    """The opened bundle that the demo's auditor got, verified."""
    return verify_bundle(played.opened.read_bytes(), now_ms=time.time_ns() // 1_000_000)


def party_files(played: Played, name: str) -> dict[str, dict[str, Path]]:
    """The plaintext files that the parties brought: party -> table -> file."""
    return {
        member: {
            path.stem: path
            for path in sorted(played.member(member).iterdir())
            if path.stem in ("flights", "planes", "staff")
        }
        for member in agreement_members(DEMOS[name])
        if member != "analyst"
    }


def compare(table: OutputTable, expected: Mapping[Key, Values]) -> int:
    """Fails unless the output is the oracle's: the same combinations in the same order, exactly the same values hidden,
    counts equal, floats to 1e-9 relative. Returns how many values were compared and shown."""
    labels = [column for column in table.columns if column.type == "label"]
    measures = [column for column in table.columns if column.type != "label"]
    keys = [tuple(column.cells[row] for column in labels) for row in range(table.rows)]
    assert keys == list(expected)
    seen = 0
    for row, values in enumerate(expected.values()):
        assert [column.name for column in measures] == list(values)
        for column in measures:
            found, wanted = column.cells[row], values[column.name]
            where = (*keys[row], column.name)
            assert (found is None) == (wanted is None), (where, found, wanted)
            if wanted is not None:
                seen += 1
                assert found == (pytest.approx(wanted, rel=1e-9, abs=0) if column.type == "float" else wanted), where
    return seen
