"""The flights demo with real processes over sockets, compared with pandas: 17 parties, two tables, a join."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import oracle, played
from support.oracle import Rule


@pytest.mark.parametrize("coalition", [1, 0])
def test_flights_is_what_pandas_computes_from_the_plaintext(tmp_path: Path, coalition: int) -> None:
    done, lines = played.run("flights", tmp_path / "demo", coalition)
    bundle = played.opened(done)
    expected = oracle.flights(played.party_files(done, "flights"), [Rule(10, 3, coalition)])
    assert oracle.shown(expected) == 6
    assert played.compare(bundle.tables["delay_by_engine"], expected) == 24
    assert bundle.simulated
    assert len(bundle.countersigned) == 17
    text = "\n".join(lines)
    assert "18 of 24 combinations are hidden or empty" in text
    assert "valid, and simulated" in text
