"""Unit keys, against SHA-256 of the standard library."""

from __future__ import annotations

import hashlib
from pathlib import Path

from parley.reading import prepare
from parley_protocol.transcript import unit_salt
from support.world import world


def test_tab_4_the_key_is_the_start_of_the_salted_hash(tmp_path: Path) -> None:
    agreement = world().agreement
    names = [f"tail-{number}" for number in range(200)] + ["Zoë", "東京", "x" * 5000]
    file = tmp_path / "visits.csv"
    file.write_text("id,amount,score,site\n" + "".join(f"{name},1.50,2.5,north\n" for name in names), encoding="utf-8")
    salt = unit_salt(agreement.series, agreement.unit.name)
    hashed = (hashlib.sha256(salt + name.encode()).digest()[:8] for name in names)
    wanted = sorted(int.from_bytes(first, "little") for first in hashed)
    assert prepare(file, agreement, "visits").columns[0].tolist() == wanted
