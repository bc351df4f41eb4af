"""The output kind `aggregate`, over random tables, against DuckDB and plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley_enclave.outputs.aggregate import decimal_text
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement
from support.blobs import Array, Tables, agreement_of, compute, prepare
from support.engine_oracle import cells_of, expected, same

PARTIES = ["amber", "birch", "cedar", "dune"]
EVENTS = {
    "kind": {"type": "category", "values": ["a", "b", "c"], "null": True},
    "region": {"type": "category", "values": ["north", "south"]},
    "open": {"type": "bool", "null": True},
    "score": {"type": "float", "min": -1000, "max": 1000, "null": True},
    "pay": {"type": "decimal", "scale": 2, "min": -5000, "max": 5000, "null": True},
    "huge": {"type": "int", "null": True},
    "count": {"type": "int", "min": 0, "max": 9},
    "day": {"type": "date", "min": "2020-01-01", "max": "2020-12-31", "null": True},
    "at": {"type": "timestamp", "null": True},
}
UNITS = {
    "engine": {"type": "category", "values": ["jet", "prop", "rocket"], "null": True},
    "year": {"type": "int", "min": 1900, "max": 2020, "null": True},
}
ALL_VALUES = {
    "rows": "count",
    "people": "units",
    "scores": "count(score)",
    "days": "count(day)",
    "sum_score": "sum(score)",
    "mean_score": "mean(score)",
    "var_score": "variance(score)",
    "sd_score": "std(score)",
    "sum_pay": "sum(pay)",
    "mean_pay": "mean(pay)",
    "sd_pay": "std(pay)",
    "sum_huge": "sum(huge)",
    "var_huge": "variance(huge)",
    "sum_count": "sum(count)",
    "sd_count": "std(count)",
}


def events(random: np.random.Generator, rows: int, units: int) -> tuple[Array, list[Array]]:
    """Rows of `events`, sorted by key; a tenth of what may be null is null."""

    def holes(values: Array, null: Any) -> Array:
        values[random.random(rows) < 0.1] = null
        return values

    return np.sort(random.integers(1, units + 1, rows).astype("<u8") * np.uint64(2**64 // (units + 2))), [
        random.integers(0, 4, rows).astype("u1"),
        random.integers(1, 3, rows).astype("u1"),
        random.choice(np.array([0, 1, 255], "u1"), rows),
        holes(random.normal(100, 200, rows).clip(-1000, 1000), np.nan),
        holes(random.integers(-500_000, 500_001, rows), -(2**63)),
        holes(random.integers(-(2**63) + 1, 2**63 - 1, rows), -(2**63)),
        random.integers(0, 10, rows),
        holes(random.integers(18262, 18628, rows).astype("<i4"), -(2**31)),
        holes(random.integers(-(10**15), 10**15, rows), -(2**63)),
    ]


def units_of(random: np.random.Generator, units: int) -> tuple[Array, list[Array]]:
    """Rows of `units`: about two thirds of all, one row each."""
    keys = (np.flatnonzero(random.random(units) < 0.7) + 1).astype("<u8") * np.uint64(2**64 // (units + 2))
    years = random.integers(1900, 2021, len(keys))
    years[random.random(len(keys)) < 0.2] = -(2**63)
    return keys, [random.integers(0, 4, len(keys)).astype("u1"), years]


def agreement(output: dict[str, Any], rules: dict[str, Any] | None = None) -> Agreement:
    return agreement_of(
        [*PARTIES, "registry"],
        {
            "events": {"from": PARTIES, "key": "id", "rows_per_unit": 1000, "columns": EVENTS},
            "units": {"from": "registry", "key": "id", "rows_per_unit": 1, "columns": UNITS},
        }
        if "join" in output
        else {"events": {"from": PARTIES, "key": "id", "rows_per_unit": 1000, "columns": EVENTS}},
        {"out": {"from": "events", **output}},
        rules,
    )


def data(seed: int, rows: int, units: int, joined: bool) -> Tables:
    random = np.random.default_rng(seed)
    tables = {(party, "events"): events(random, int(random.integers(0, rows + 1)), units) for party in PARTIES}
    return tables | ({("registry", "units"): units_of(random, units)} if joined else {})


def check(agreed: Agreement, tables: Tables, where: str | None = None) -> None:
    """The engine gives what the oracle gives, hidden values and reasons included."""
    output = compute(agreed, tables)["out"]
    wanted = expected(agreed, agreed.outputs["out"], tables, where)
    actual = cells_of(output)
    assert list(actual) == list(wanted.cells)
    for key, values in wanted.cells.items():
        assert same(actual[key], values), (key, actual[key], values)
    assert {reason.rule: reason.values for reason in output.reasons} == wanted.reasons
    assert type(output).from_bytes(output.to_bytes()) == output


WHERES = [
    (None, None),
    ("score > 100 and region == 'north'", "events.score > 100 and events.region = 'north'"),
    ("not (score > 100 or open)", "not (events.score > 100 or events.open)"),
    ("kind in ['a', 'c']", "events.kind in ('a', 'c')"),
    ("kind not in ['a'] or open is null", "events.kind not in ('a') or events.open is null"),
    ("kind is not null and score is null", "events.kind is not null and events.score is null"),
    ("pay >= 12.5", "events.pay >= 1250"),
    ("-100 < score <= 250.5", "-100 < events.score and events.score <= 250.5"),
    ("pay + count * 2 > 3.25 - pay", "events.pay + events.count * 200 > 325 - events.pay"),
    ("score - count < pay", "events.score - events.count < events.pay / 100.0"),
    ("day >= '2020-06-01' and day != '2020-07-01'", "events.day >= 18414 and events.day <> 18444"),
    ("at < '1970-01-02'", "events.at < 86400000000"),
    ("open == false", "events.open = false"),
    ("huge < -1 or huge > 1", "events.huge < -1 or events.huge > 1"),
    ("kind != 'b' and not open", "events.kind <> 'b' and not events.open"),
]


@pytest.mark.parametrize(("where", "sql"), WHERES)
def test_eng_8_conditions(where: str | None, sql: str | None) -> None:
    output = {"by": {"region": "region", "kind": "kind"}, "values": {"n": "count", "u": "units", "s": "sum(count)"}}
    check(agreement(output | ({"where": where} if where else {})), data(3, 400, 200, joined=False), sql)


@pytest.mark.parametrize("join", [None, "left"])
def test_eng_9_columns_whose_nulls_the_condition_drops(join: str | None) -> None:
    output: dict[str, Any] = {
        "by": {"kind": "kind", "open": "open", "pay": {"bin": "pay", "edges": [0]}},
        "values": {"n": "count", "u": "units"},
        "where": "kind is not null and open is not null and pay is not null",
    }
    sql = "events.kind is not null and events.open is not null and events.pay is not null"
    if join:
        output["join"] = {"units": join}
        output["by"] = {"engine": "engine", "kind": "kind", "built": {"bin": "year", "edges": [1950]}}
        output["where"], sql = (
            "engine is not null and year is not null",
            "units.engine is not null and units.year is not null",
        )
    agreed = agreement(output)
    assert sum(None in grouping.labels for grouping in agreed.outputs["out"].by) == (1 if join else 0)
    check(agreed, data(8, 400, 200, joined=bool(join)), sql)


RULES: list[dict[str, Any]] = [
    {"everyone": {"min_units": 2, "min_parties": 1, "coalition": 0}},
    {"everyone": {"min_units": 10, "min_parties": 2, "coalition": 1}},
    {"everyone": {"min_units": 4, "min_parties": 3, "coalition": 1}},
    {"everyone": {"min_units": 4, "min_parties": 2, "coalition": "all"}},
    {"everyone": {"min_units": 3, "min_parties": 2, "coalition": 1}, "birch": {"min_units": 12}},
    {
        "everyone": {"min_units": 3, "min_parties": 1, "coalition": 0},
        "amber": {"min_parties": 4},
        "dune": {"coalition": "all"},
    },
    {"everyone": {"min_units": 8, "min_parties": 1, "coalition": 2}},
    {"everyone": {"min_units": 3, "min_parties": 1, "coalition": 3}, "cedar": {"coalition": 2, "min_units": 6}},
]


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 300),
    units=st.integers(1, 150),
    join=st.sampled_from([None, "inner", "left"]),
    by=st.sampled_from([(), ("region",), ("kind", "open"), ("pay", "kind"), ("score", "day"), ("count",)]),
    rules=st.sampled_from(RULES),
    window=st.sampled_from([1, 16, 1 << 17]),
)
@settings(max_examples=60)
def test_dis_1_random_tables(
    seed: int, rows: int, units: int, join: str | None, by: Any, rules: Any, window: int
) -> None:
    edges = {"pay": [-1000, 0, 1234.56], "score": [0, 100.5], "day": ["2020-03-01"], "count": list(range(1, 10))}
    groupings: dict[str, Any] = {name: {"bin": name, "edges": edges[name]} if name in edges else name for name in by}
    output: dict[str, Any] = {"values": ALL_VALUES}
    if join:
        output["join"] = {"units": join}
        groupings |= {"engine": "engine", "built": {"bin": "year", "edges": [1950, 2000]}}
        output["values"] = ALL_VALUES | {"years": "count(year)"}
    output["by"] = groupings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "WINDOW_ROWS", window)
        check(agreement(output, rules), data(seed, rows, units, joined=bool(join)))


def test_a_party_without_rows_and_a_missing_table() -> None:
    output = {"join": {"units": "left"}, "by": {"engine": "engine"}, "values": {"n": "count", "u": "units"}}
    agreed = agreement(output)
    tables = dict(data(5, 200, 50, joined=True))
    keys, columns = tables["amber", "events"]
    tables["amber", "events"] = (keys[:0], [column[:0] for column in columns])
    check(agreed, tables)
    # An absent registry leaves no row of it: all units are unmatched.
    absent = {name: rows for name, rows in tables.items() if name[1] != "units"}
    cells = cells_of(compute(agreed, absent)["out"])
    total = sum(len(keys) for keys, _ in absent.values())
    assert cells[None,]["n"] == total
    assert all(values["n"] is None for key, values in cells.items() if key != (None,))


def test_no_upload_of_the_own_table_hides_everything() -> None:
    output = {"join": {"units": "inner"}, "by": {"engine": "engine"}, "values": {"n": "count", "m": "mean(score)"}}
    tables = {name: rows for name, rows in data(5, 200, 50, joined=True).items() if name[1] == "units"}
    table = compute(agreement(output), tables)["out"]
    assert [reason.values for reason in table.reasons] == [8]


def test_eng_10_exact_sums_beyond_64_bits() -> None:
    random = np.random.default_rng(1)
    keys, columns = events(random, 3000, 3000)
    columns[5][:] = 2**63 - 1
    tables = {(party, "events"): (keys, columns) for party in PARTIES}
    cells = cells_of(
        compute(agreement({"values": {"s": "sum(huge)", "m": "mean(huge)", "v": "variance(huge)"}}), tables)["out"]
    )
    assert cells[()] == {"s": str(12000 * (2**63 - 1)), "m": float(2**63 - 1), "v": 0.0}


def test_eng_11_floats_with_a_great_offset_keep_their_variance() -> None:
    agreed = agreement_of(
        ["amber"],
        {
            "t": {
                "from": "amber",
                "key": "id",
                "rows_per_unit": 1,
                "columns": {"x": {"type": "float", "min": 0, "max": 2e9}},
            }
        },
        {"out": {"from": "t", "values": {"v": "variance(x)", "s": "sum(x)"}}},
    )
    random = np.random.default_rng(2)
    values = 1e9 + random.normal(size=50_000)
    keys = np.arange(1, 50_001, dtype="<u8") * np.uint64(2**40)
    cells = cells_of(compute(agreed, {("amber", "t"): (keys, [values])})["out"])
    offsets = [float(value) for value in values - 1e9]
    assert cells[()]["v"] == pytest.approx(float(np.var(offsets, ddof=1)), rel=1e-9)
    assert cells[()]["s"] == pytest.approx(float(np.sum(values.astype(np.longdouble))), rel=1e-15)


def large() -> tuple[Agreement, Tables]:
    output = {
        "join": {"units": "left"},
        "by": {"kind": "kind", "engine": "engine"},
        "values": ALL_VALUES,
        "where": "count < 9",
    }
    random = np.random.default_rng(11)
    tables: dict[tuple[str, str], Any] = {(party, "events"): events(random, 40_000, 30_000) for party in PARTIES}
    tables["registry", "units"] = units_of(random, 30_000)
    return agreement(output, {"everyone": {"min_units": 20, "min_parties": 2, "coalition": 1}}), tables


def test_many_groups_windows_and_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed, tables = large()
    wanted = expected(agreed, agreed.outputs["out"], tables, "events.count < 9")
    single = cells_of(compute(agreed, tables)["out"])
    monkeypatch.setattr(limits, "RANGE_GROUPS", 1)
    monkeypatch.setattr(limits, "WINDOW_ROWS", 1 << 14)
    run = prepare(agreed, tables)
    assert run.plan.ranges > 1
    split = cells_of(run.outputs()[0])
    for key, values in wanted.cells.items():
        assert same(single[key], values), key
        assert same(split[key], values), key


def test_same_bytes_for_any_order_of_ranges_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RANGE_GROUPS", 1)
    monkeypatch.setattr(limits, "WINDOW_ROWS", 1 << 14)
    agreed, tables = large()
    run = prepare(agreed, tables)
    forward = run.outputs()[0].to_bytes()
    assert run.outputs(list(reversed(range(run.plan.ranges))))[0].to_bytes() == forward
    assert prepare(agreed, tables).outputs()[0].to_bytes() == forward
    # The order in which uploads arrive is not the order in which they are computed.
    assert prepare(agreed, dict(reversed(list(tables.items())))).outputs()[0].to_bytes() == forward


def test_eng_9_bins_nulls_and_the_order_of_cells() -> None:
    columns = {
        "open": {"type": "bool", "null": True},
        "age": {"type": "int", "min": 0, "max": 99, "null": True},
    }
    agreed = agreement_of(
        ["amber"],
        {"t": {"from": "amber", "key": "id", "rows_per_unit": 1, "columns": columns}},
        {
            "out": {
                "from": "t",
                "by": {"open": "open", "age": {"bin": "age", "edges": [10, 20]}},
                "values": {"n": "count"},
            }
        },
    )
    # Two of each combination, and one more at each edge.
    opens = np.repeat(np.array([0, 1, 255], "u1"), 8)
    ages = np.tile(np.array([0, 9, 10, 19, 20, 99, -(2**63), -(2**63)]), 3)
    keys = np.arange(1, 25, dtype="<u8")
    (table,) = compute(agreed, {("amber", "t"): (keys, [opens, ages])}).values()
    assert table.columns[0].cells == ("false",) * 4 + ("true",) * 4 + (None,) * 4
    assert table.columns[1].cells == ("before 10", "10 to 19", "20 and later", None) * 3
    assert table.columns[2].cells == (2,) * 12


def test_eng_13_types_and_texts_of_columns() -> None:
    table = compute(agreement({"by": {"region": "region"}, "values": ALL_VALUES}), data(4, 200, 100, joined=False))[
        "out"
    ]
    types = {column.name: column.type for column in table.columns}
    assert types["region"] == "label" and types["rows"] == types["people"] == types["scores"] == "count"
    assert types["sum_pay"] == types["sum_huge"] == types["sum_count"] == "decimal"
    assert {types[name] for name in ALL_VALUES if name.startswith(("mean", "sd", "var"))} == {"float"}
    pay = next(column for column in table.columns if column.name == "sum_pay").cells[0]
    assert isinstance(pay, str) and len(pay.partition(".")[2]) == 2


@pytest.mark.parametrize(
    ("scaled", "scale", "text"),
    [
        (0, 0, "0"),
        (0, 2, "0.00"),
        (-5, 2, "-0.05"),
        (12345, 2, "123.45"),
        (-(10**30), 18, "-1000000000000." + "0" * 18),
    ],
)
def test_eng_13_decimal_text(scaled: int, scale: int, text: str) -> None:
    assert decimal_text(scaled, scale) == text


def test_dis_8_reasons_add_up_to_what_is_hidden() -> None:
    table = compute(agreement({"by": {"kind": "kind"}, "values": ALL_VALUES}, RULES[2]), data(6, 20, 12, joined=False))[
        "out"
    ]
    hidden = sum(column.hidden for column in table.columns)
    assert hidden > 0
    assert sum(reason.values for reason in table.reasons) == hidden
    assert [reason.rule for reason in table.reasons] == sorted(reason.rule for reason in table.reasons)
