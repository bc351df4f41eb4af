"""The pay demo with real processes over sockets, compared with pandas: nine parties, one of which asks for more."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import oracle, played
from support.oracle import Rule


@pytest.mark.parametrize(("coalition", "shown"), [(1, 10), (0, 12)])
def test_pay_is_what_pandas_computes_from_the_plaintext(tmp_path: Path, coalition: int, shown: int) -> None:
    done, lines = played.run("pay", tmp_path / "demo", coalition)
    bundle = played.opened(done)
    rules = [Rule(5, 3, coalition), Rule(6, 3, coalition)]
    expected = oracle.pay(played.party_files(done, "pay"), rules)
    assert oracle.shown(expected) == shown
    assert played.compare(bundle.tables["salary"], expected) > 0
    assert bundle.simulated
    assert len(bundle.countersigned) == 9
    assert f"{18 - shown} of 18 combinations are hidden or empty" in "\n".join(lines)
