"""The scan against a host that answers otherwise at a later pull, skewed keys, and plans that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parley_enclave import engine
from parley_enclave.engine import FrameError
from parley_enclave.engine.frames import starts
from parley_enclave.engine.windows import Lookup, Rows, windows
from parley_protocol import limits
from parley_protocol.agreement.schema import Column, ColumnType
from parley_protocol.errors import MalformedError, RefusedError
from support.blobs import GUARD_KEY, Array, Blob, Host, Run, admit, agreement_of, prepare, seal
from support.engine_oracle import cells_of

PARTIES = ["amber", "birch", "cedar"]


def agreed(rows_per_unit: int = 100_000, parties: list[str] = PARTIES) -> Any:
    columns = {"x": {"type": "float", "min": 0, "max": 1}, "unused": {"type": "int", "min": 0, "max": 9}}
    return agreement_of(
        parties,
        {"t": {"from": parties, "key": "id", "rows_per_unit": rows_per_unit, "columns": columns}},
        {"out": {"from": "t", "values": {"n": "count", "u": "units", "s": "sum(x)"}}},
    )


def table(keys: Array) -> tuple[Array, list[Array]]:
    return keys, [np.full(len(keys), 0.5), np.zeros(len(keys), "<i8")]


def spread(rows: int, seed: int = 0) -> tuple[Array, list[Array]]:
    return table(np.sort(np.random.default_rng(seed).integers(1, 2**64 - 2, rows, dtype="<u8")))


def run_of(**tables: tuple[Array, list[Array]]) -> Run:
    return prepare(agreed(), {(party, "t"): found for party, found in tables.items()})


def second_version(blob: Blob, number: int) -> bytes:
    """The blob with another good frame, sealed by its party under the same key and nonce, in one place."""
    keys = np.sort(np.random.default_rng(9).integers(1, 2**64 - 2, 40_000, dtype="<u8"))
    columns = [np.full(len(keys), 0.25), np.zeros(len(keys), "<i8")]
    other = seal(agreed(), blob.source.party, "t", keys, columns, number=blob.source.blob)
    layout = blob.source.layout
    assert other.source.layout == layout and other.source.frame_key == blob.source.frame_key
    group, column = divmod(number - 1, len(layout.widths))
    offset, length = layout.frame_range(group, column)
    return blob.data[:offset] + other.data[offset : offset + length] + blob.data[offset + length :]


@pytest.mark.parametrize("number", [1, 2, 4, 5, 7])
def test_eng_2_a_second_version_of_a_frame_at_the_second_pull(number: int) -> None:
    agreement = agreed()
    host = Host()
    blobs = [seal(agreement, party, "t", *spread(40_000, seed), number=seed) for seed, party in enumerate(PARTIES)]
    sources = [(blob.source, admit(agreement, blob, host)) for blob in blobs]
    plan = engine.plan(agreement, sources)
    assert plan.ranges == 1
    good = engine.scan(plan, 0, GUARD_KEY, host.pull, lambda percent: None)
    host.blobs[1] = second_version(blobs[1], number)
    with pytest.raises(FrameError) as caught:
        engine.scan(plan, 0, GUARD_KEY, host.pull, lambda percent: None)
    assert caught.value.code == "frame"
    host.blobs[1] = blobs[1].data
    assert engine.scan(plan, 0, GUARD_KEY, host.pull, lambda percent: None) == good


def test_eng_1_a_frame_of_padding_is_checked_too() -> None:
    run = run_of(amber=spread(70_000), birch=spread(100), cedar=spread(100))
    layout = run.plan.tables["t"].inputs[0].source.layout
    assert layout.groups == 5
    # Groups 4 to the last true one hold rows; make one of padding alone.
    run = run_of(amber=spread(16_384 * 8 + 1), birch=spread(100), cedar=spread(100))
    part = run.plan.tables["t"].inputs[0]
    assert part.source.layout.groups == 10 and len(part.index.last) == 9
    offset, _ = part.source.layout.frame_range(9, 0)
    run.scan(run.plan.ranges - 1)
    data = run.host.blobs[0]
    run.host.blobs[0] = data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]
    with pytest.raises(FrameError):
        run.scan(run.plan.ranges - 1)


def test_eng_1_frames_of_columns_that_no_output_reads_are_not_pulled() -> None:
    run = run_of(amber=spread(20_000), birch=spread(5), cedar=spread(5))
    layout = run.plan.tables["t"].inputs[0].source.layout
    run.host.pulls.clear()
    run.outputs()
    pulled = {place for blob, ranges in run.host.pulls if blob == 0 for place in ranges}
    assert pulled == {layout.frame_range(group, column) for group in range(2) for column in (0, 1)}


def test_another_guard_key_opens_nothing() -> None:
    run = run_of(amber=spread(50), birch=spread(5), cedar=spread(5))
    with pytest.raises(FrameError):
        engine.scan(run.plan, 0, bytes(32), run.host.pull, lambda percent: None)


def test_a_host_that_lacks_a_blob_or_answers_too_little() -> None:
    run = run_of(amber=spread(50), birch=spread(5), cedar=spread(5))
    run.host.twist = lambda blob, offset, data: data[:-1]
    with pytest.raises(FrameError):
        run.scan(0)
    with pytest.raises(FrameError):
        engine.scan(run.plan, 0, GUARD_KEY, lambda blob, ranges: [], lambda percent: None)
    run.host.blobs.clear()
    with pytest.raises(FrameError):
        run.scan(0)


@pytest.mark.parametrize("key", [1, 2**63, 2**64 - 2])
def test_all_rows_of_one_unit(key: int) -> None:
    keys = np.full(50_000, key, "<u8")
    run = run_of(amber=table(keys), birch=table(keys[:40_000]), cedar=table(keys[:1]))
    cells = cells_of(run.outputs()[0])
    # One unit: everything is hidden, and nothing breaks.
    assert cells == {(): {"n": None, "u": None, "s": None}}


def test_skewed_keys_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WINDOW_ROWS", 1000)
    monkeypatch.setattr(limits, "RANGE_GROUPS", 1)
    runs = (np.arange(1, 5001), np.full(30_000, 5001), np.arange(5002, 10_002))
    keys = np.append(np.concatenate(runs).astype("<u8"), np.uint64(2**64 - 2))
    run = run_of(amber=table(keys), birch=table(keys[:7000]), cedar=table(keys[36_000:]))
    rows = 2 * len(keys) - 36_000 + 7000
    assert cells_of(run.outputs()[0]) == {(): {"n": rows, "u": 10_002, "s": rows / 2}}


def test_eng_3_windows_are_short_and_never_split_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WINDOW_ROWS", 4000)
    monkeypatch.setattr(limits, "RANGE_GROUPS", 1)
    random = np.random.default_rng(3)
    tables = {party: table(np.sort(random.integers(1, 9000, 60_000).astype("<u8"))) for party in PARTIES}
    run = run_of(**tables)
    assert run.plan.ranges > 1
    last = 0
    total = 0
    for number in range(run.plan.ranges):
        for window in windows(run.plan, number, GUARD_KEY, run.host.pull, lambda percent: None):
            rows = window.tables["t"]
            assert 0 < len(rows) <= 8000 + 200
            assert int(rows.keys[0]) > last and bool((rows.keys[1:] >= rows.keys[:-1]).all())
            within = ~starts(rows.keys)[1:]
            assert bool((rows.parties[1:][within] >= rows.parties[:-1][within]).all())
            last = int(rows.keys[-1])
            total += len(rows)
    assert total == 180_000


def test_eng_6_parties_keep_their_order_within_a_unit() -> None:
    run = run_of(
        cedar=table(np.array([1, 3, 3], "<u8")), amber=table(np.array([3, 4], "<u8")), birch=table(np.array([3], "<u8"))
    )
    (window,) = windows(run.plan, 0, GUARD_KEY, run.host.pull, lambda percent: None)
    assert window.tables["t"].keys.tolist() == [1, 3, 3, 3, 3, 4]
    assert window.tables["t"].parties.tolist() == [2, 0, 1, 2, 2, 0]


def test_eng_4_ranges_follow_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    single = agreed(parties=["amber"])
    for rows, ranges in ((400_000, 1), (16_384 * 32, 2), (16_384 * 63, 2), (16_384 * 64, 4)):
        assert prepare(single, {("amber", "t"): spread(rows)}).plan.ranges == ranges
    # States of so many ranges would not fit the process that merges them.
    monkeypatch.setattr(limits, "PARTIALS_BYTES", 150)
    assert prepare(single, {("amber", "t"): spread(16_384 * 64)}).plan.ranges == 1


def test_eng_4_ranges_do_not_depend_on_the_order_of_arrival() -> None:
    tables = {(party, "t"): spread(200_000, seed) for seed, party in enumerate(PARTIES)}
    first = prepare(agreed(), tables).plan
    second = prepare(agreed(), dict(reversed(list(tables.items())))).plan
    assert first.cuts == second.cuts and first.bounds.tolist() == second.bounds.tolist()


def test_eng_5_a_unit_too_great_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.full(60_000, 5, "<u8")
    run = run_of(amber=table(keys), birch=spread(5), cedar=spread(5))
    sources = [(part.source, part.admitted) for part in run.plan.tables["t"].inputs]
    monkeypatch.setattr(limits, "WINDOW_BYTES", 8 << 20)
    monkeypatch.setattr(limits, "WINDOW_ROWS", 1 << 10)
    with pytest.raises(RefusedError) as caught:
        engine.plan(agreed(), sources)
    assert caught.value.code == "memory"
    assert engine.plan(agreed(), sources[1:]).ranges == 1


def test_eng_5_a_state_too_great_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STATE_BYTES", 64)
    with pytest.raises(RefusedError) as caught:
        run_of(amber=spread(5))
    assert caught.value.code == "memory"


def test_eng_7_a_unit_of_two_parties_matches_nothing_in_a_lookup() -> None:
    column = Column("x", ColumnType.INT, False, 0, 9)
    keys = np.array([3, 5, 5, 8], "<u8")
    lookup = Lookup(Rows(keys, np.array([0, 0, 1, 1], "u1"), {1: np.array([1, 2, 3, 4])}), {1: column})
    asked = np.array([2, 3, 3, 5, 8, 9], "<u8")
    found = lookup.find(Rows(asked, np.zeros(6, "u1"), {}))
    assert lookup.column(1)[found].tolist() == [-(2**63), 1, 1, -(2**63), 4, -(2**63)]
    assert (found == lookup.none).tolist() == [True, False, False, True, False, True]


def test_eng_12_partials_of_another_plan_are_refused() -> None:
    run = run_of(amber=spread(50), birch=spread(5), cedar=spread(5))
    (partial,) = run.partials()
    other = prepare(agreed(7), {("amber", "t"): spread(50)})
    for bad in (b"", partial[:-1], partial + b"\0", other.scan(0), partial[4:]):
        with pytest.raises(MalformedError):
            engine.finish(run.plan, [bad])
    with pytest.raises(ValueError, match="not one for each range"):
        engine.finish(run.plan, [])


def test_secrets_do_not_show() -> None:
    run = run_of(amber=spread(50), birch=spread(5), cedar=spread(5))
    part = run.plan.tables["t"].inputs[0]
    text = repr(run.plan)
    assert repr(part.source.frame_key)[2:-1] not in text
    assert "tags=" not in text and "index=Index()" in text
