"""Admission of hostile tables: each is refused with its code and without a value, whatever else is right (adm-10 on)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley_enclave import engine
from parley_enclave.engine import Admitted, FrameError
from parley_enclave.engine.frames import Index
from parley_protocol import limits
from parley_protocol.errors import RefusedError
from parley_protocol.table import KEY_PAD
from support.blobs import GUARD_KEY, Array, Blob, Host, admit, agreement_of, seal

COLUMNS = {
    "kind": {"type": "category", "values": ["a", "b", "c"]},
    "sort": {"type": "category", "values": ["x", "y"], "null": True},
    "open": {"type": "bool"},
    "shut": {"type": "bool", "null": True},
    "score": {"type": "float", "min": -5, "max": 5, "null": True},
    "level": {"type": "float", "min": 0, "max": 1},
    "age": {"type": "int", "min": 0, "max": 150},
    "pay": {"type": "decimal", "scale": 2, "min": 0, "max": 100, "null": True},
    "day": {"type": "date", "min": "1970-01-01", "max": "1970-12-31"},
    "at": {"type": "timestamp", "min": "1970-01-01", "max": "1970-01-02", "null": True},
}
NAMES = ["key", *COLUMNS]
AGREED = agreement_of(
    ["amber"],
    {"t": {"from": "amber", "key": "id", "rows_per_unit": 3, "columns": COLUMNS}},
    {"out": {"from": "t", "values": {"n": "count"}}},
)


def good(rows: int) -> tuple[Array, list[Array]]:
    """Rows that pass, three of each unit, every second value null where it may be."""
    random = np.random.default_rng(rows)
    every = np.arange(rows) % 2 == 0
    return np.arange(3, rows + 3, dtype="<u8") // np.uint64(3), [
        random.integers(1, 4, rows).astype("u1"),
        random.integers(0, 3, rows).astype("u1"),
        random.integers(0, 2, rows).astype("u1"),
        random.choice(np.array([0, 1, 255], "u1"), rows),
        np.where(every, np.nan, random.uniform(-5, 5, rows)),
        random.uniform(0, 1, rows),
        random.integers(0, 151, rows),
        np.where(every, -(2**63), random.integers(0, 10_001, rows)),
        random.integers(0, 365, rows).astype("<i4"),
        np.where(every, -(2**63), random.integers(0, 86_400_000_001, rows)),
    ]


def sealed(count: int = 5000, change: Callable[[list[Array]], None] | None = None, **lies: Any) -> Blob:
    keys, columns = good(count)
    return seal(AGREED, "amber", "t", keys, columns, change=change, **lies)


def refusal(blob: Blob, host: Host | None = None) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        admit(AGREED, blob, host or Host())
    return caught.value


def put(column: str, row: int | slice, value: Any) -> Callable[[list[Array]], None]:
    """Changes one value of the padded columns."""

    def change(columns: list[Array]) -> None:
        columns[NAMES.index(column)][row] = value

    return change


@pytest.mark.parametrize("rows", [0, 1, 1024, 1025, 16384, 16385, 70_000])
def test_adm_12_good_tables_are_admitted(rows: int) -> None:
    host = Host()
    blob = sealed(rows)
    admitted = admit(AGREED, blob, host)
    index = Index.of(admitted, blob.source.layout)
    keys, _ = good(rows)
    height = blob.source.layout.group_rows
    assert admitted.rows == rows
    assert index.first.tolist() == keys[::height].tolist()
    assert index.last.tolist() == [int(keys[min(start + height, rows) - 1]) for start in range(0, rows, height)]
    assert index.longest == min(3, rows)
    assert max(sum(length for _, length in ranges) for _, ranges in host.pulls) <= limits.ADMISSION_BYTES
    assert "rows" not in repr(admitted) and "index" not in repr(admitted)


# A group ends at row 16,384; the table of 20,000 rows is padded to 32,768.


def refused_with(code: str, change: Callable[[list[Array]], None]) -> None:
    """The table with this change is refused with this code, in words without a figure."""
    refused = refusal(sealed(20_000, change))
    assert refused.code == code
    assert not any(character.isdigit() for character in str(refused))


@pytest.mark.parametrize(
    "change",
    [
        put("key", 7000, 1),
        put("key", 16384, 1),
    ],
)
def test_adm_13_rows_are_sorted(change: Callable[[list[Array]], None]) -> None:
    refused_with("order", change)


@pytest.mark.parametrize(
    "change",
    [
        put("key", 0, 0),
    ],
)
def test_adm_14_no_null_key(change: Callable[[list[Array]], None]) -> None:
    refused_with("domain", change)


@pytest.mark.parametrize(
    "change",
    [
        put("key", slice(19_998, 20_000), KEY_PAD),
        put("key", 20_000, KEY_PAD - 1),
        put("key", 32_767, 2**40),
        put("kind", 20_000, 1),
        put("score", 32_767, 0.0),
        put("open", 25_000, 0),
        put("age", 25_000, 3),
    ],
)
def test_adm_15_padding_and_nothing_else_after_the_true_rows(change: Callable[[list[Array]], None]) -> None:
    refused_with("rows", change)


@pytest.mark.parametrize(
    "change",
    [
        put("key", slice(300, 304), 101),
        put("key", slice(16382, 16386), 5461),
    ],
)
def test_adm_16_rows_per_unit(change: Callable[[list[Array]], None]) -> None:
    refused_with("multiplicity", change)


@pytest.mark.parametrize(
    "change",
    [
        put("kind", 3, 4),
        put("kind", 3, 0),
        put("sort", 19_999, 3),
        put("sort", 3, 255),
        put("open", 3, 255),
        put("open", 3, 2),
        put("shut", 3, 254),
        put("level", 16_385, np.nan),
        put("age", 3, -(2**63)),
        put("day", 3, -(2**31)),
    ],
)
def test_adm_17_domains_and_nulls(change: Callable[[list[Array]], None]) -> None:
    refused_with("domain", change)


@pytest.mark.parametrize(
    "change",
    [
        put("score", 3, np.inf),
        put("score", 3, -np.inf),
        put("score", 3, 5.0000001),
        put("level", 3, -1e-300),
        put("age", 3, 151),
        put("age", 3, -1),
        put("pay", 3, 10_001),
        put("day", 3, 365),
        put("at", 3, -1),
    ],
)
def test_adm_18_ranges(change: Callable[[list[Array]], None]) -> None:
    refused_with("range", change)


@pytest.mark.parametrize(
    ("lies", "code"),
    [
        ({"rows": 4999}, "rows"),
        ({"rows": 5001}, "rows"),
        ({"rows": 16_385}, "rows"),
        ({"rows": 2**63}, "rows"),
        ({"rows": 4096}, "rows"),
        ({"size": (2, 16384)}, "rows"),
    ],
)
def test_adm_12_wrong_row_counts(lies: dict[str, Any], code: str) -> None:
    assert refusal(sealed(5000, **lies)).code == code


def test_adm_16_one_row_per_unit() -> None:
    single = agreement_of(
        ["amber"],
        {"t": {"from": "amber", "key": "id", "rows_per_unit": 1, "columns": {"x": {"type": "bool"}}}},
        {"out": {"from": "t", "values": {"n": "count"}}},
    )
    keys = np.array([5, 6, 6, 9], "<u8")
    with pytest.raises(RefusedError) as caught:
        admit(single, seal(single, "amber", "t", keys, [np.ones(4, "u1")]), Host())
    assert caught.value.code == "multiplicity"


def test_adm_10_another_list_of_digests() -> None:
    blob = sealed(100)
    host = Host(twist=lambda number, offset, data: data[:-1] + b"\0" if offset == 0 else data)
    assert refusal(blob, host).code == "frame"
    swapped = bytearray(blob.data)
    swapped[0:32], swapped[32:64] = swapped[32:64], swapped[0:32]
    blob.data = bytes(swapped)
    assert refusal(blob).code == "frame"


def test_adm_11_every_byte_of_a_blob_counts() -> None:
    blob = sealed(100)
    whole = blob.data

    @given(at=st.integers(0, len(whole) - 1), bit=st.integers(0, 7))
    def flipped(at: int, bit: int) -> None:
        data = bytearray(whole)
        data[at] ^= 1 << bit
        blob.data = bytes(data)
        assert refusal(blob).code == "frame"

    flipped()


def test_adm_11_a_truncated_blob() -> None:
    blob = sealed(100)
    for size in (0, 10, blob.source.layout.digest_range[1], len(blob.data) - 1):
        host = Host({0: blob.data[:size]})
        with pytest.raises(FrameError):
            engine.admit(blob.source, AGREED, blob.frames_digest, GUARD_KEY, host.pull, lambda percent: None)


def test_adm_11_a_signed_frame_under_another_key() -> None:
    blob, other = sealed(100), sealed(100, number=1)
    blob.source = other.source
    host = Host({1: blob.data})
    with pytest.raises(FrameError):
        engine.admit(blob.source, AGREED, blob.frames_digest, GUARD_KEY, host.pull, lambda percent: None)


def test_schema_of_another_table_or_party() -> None:
    other = agreement_of(
        ["amber", "birch"],
        {"t": {"from": "birch", "key": "id", "rows_per_unit": 3, "columns": COLUMNS}},
        {"out": {"from": "t", "values": {"n": "count"}}},
    )
    with pytest.raises(RefusedError) as caught:
        admit(other, sealed(100), Host())
    assert caught.value.code == "schema"


def test_progress_goes_to_the_end() -> None:
    blob = sealed(70_000)
    told: list[int] = []
    host = Host({0: blob.data})
    engine.admit(blob.source, AGREED, blob.frames_digest, GUARD_KEY, host.pull, told.append)
    assert told == sorted(told) and told[-1] == 100


def test_tags_of_two_uploads_differ() -> None:
    first, second = sealed(100), sealed(101)
    tags = [admit(AGREED, blob, Host()).tags for blob in (first, second)]
    assert tags[0] != tags[1]
    assert isinstance(admit(AGREED, first, Host()), Admitted)
