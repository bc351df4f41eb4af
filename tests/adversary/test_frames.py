"""The engine without its second look at frames: what a party and the host then make of a session (REVIEW T1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parley_enclave import engine
from parley_enclave.engine.frames import FrameError, Reader
from parley_protocol.output import OutputTable
from support.blobs import GUARD_KEY, Host, admit, agreement_of, seal

PARTIES = ["amber", "birch", "cedar"]
VICTIM = 41_548


def agreed() -> Any:
    columns = {"x": {"type": "int", "min": 0, "max": 1_000_000}}
    return agreement_of(
        PARTIES,
        {"t": {"from": PARTIES, "key": "id", "rows_per_unit": 1, "columns": columns}},
        {"out": {"from": "t", "values": {"people": "units", "total": "sum(x)"}}},
    )


def total(plan: engine.Plan, host: Host) -> tuple[int, str]:
    """(people, total) of the output."""
    partials = [engine.scan(plan, number, GUARD_KEY, host.pull, lambda percent: None) for number in range(plan.ranges)]
    (table,) = engine.finish(plan, partials)
    return cell(table, "people"), cell(table, "total")


def cell(table: OutputTable, name: str) -> Any:
    return next(column.cells[0] for column in table.columns if column.name == name)


@pytest.fixture
def attack() -> tuple[engine.Plan, Host]:
    """Cedar is admitted with 200 people, and the host serves another version of its frames at the second pull: same header,
    same keys, other people and values."""
    agreement = agreed()
    host = Host()
    sources = []
    for number, party in enumerate(PARTIES):
        keys = np.arange(1, 201, dtype="<u8") + number * 1000
        values = np.full(200, VICTIM if number == 0 else 1, "<i8")
        blob = seal(agreement, party, "t", keys, [values], number=number)
        sources.append((blob.source, admit(agreement, blob, host)))
    plan = engine.plan(agreement, sources)
    second = seal(agreement, "cedar", "t", np.arange(1, 201, dtype="<u8"), [np.zeros(200, "<i8")], number=2)
    assert second.source == sources[2][0]
    host.blobs[2] = second.data
    return plan, host


def test_a_second_version_at_the_second_pull_is_seen(attack: tuple[engine.Plan, Host]) -> None:
    with pytest.raises(FrameError):
        total(*attack)


def test_without_the_second_look_it_changes_what_is_computed(
    attack: tuple[engine.Plan, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reader, "check", lambda *_: None)
    people, found = total(*attack)
    # Cedar's rows of the signed upload are 200 of 600 people; those of the second version are amber's people again.
    assert people == 400 and int(found) == 200 * VICTIM + 200 * 1
