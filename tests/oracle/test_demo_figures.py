"""What the two demos must show, recomputed with pandas from plaintext: the figures that EXAMPLES gives, and the rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from parley_deploy.data import CARRIERS, UNIVERSITIES, split_flights, split_pay
from support import oracle
from support.oracle import Rule


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return split_flights(tmp_path_factory.mktemp("flights"))


@pytest.fixture(scope="module")
def pay(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return split_pay(tmp_path_factory.mktemp("pay"))


def test_flights_files_hold_all_rows(flights: dict[str, dict[str, Path]]) -> None:
    assert sorted(flights) == sorted([*CARRIERS, "registry"])
    assert sum(len(oracle.read(tables["flights"])) for tables in flights.values() if "flights" in tables) == 336_776
    assert len(oracle.read(flights["registry"]["planes"])) == 3_322


def test_pay_files_hold_all_rows(pay: dict[str, dict[str, Path]]) -> None:
    assert sorted(pay) == sorted(UNIVERSITIES)
    assert sum(len(oracle.read(tables["staff"])) for tables in pay.values()) == 786


@pytest.mark.parametrize("coalition", [0, 1])
def test_flights_shows_six_of_24(flights: dict[str, dict[str, Path]], coalition: int) -> None:
    table = oracle.flights(flights, [Rule(10, 3, coalition)])
    assert len(table) == 24
    assert {key for key, values in table.items() if any(value is not None for value in values.values())} == {
        ("Turbo-fan", "before 1994"),
        ("Turbo-fan", "1994 to 2003"),
        ("Turbo-fan", "2004 and later"),
        ("Turbo-fan", None),
        ("Turbo-jet", "before 1994"),
        ("Turbo-jet", "1994 to 2003"),
    }
    first = table["Turbo-fan", "before 1994"]
    assert (first["flights"], first["aircraft"]) == (23_570, 418)
    assert first["mean_delay"] == pytest.approx(2.87, abs=0.005)
    assert first["sd_delay"] == pytest.approx(47.41, abs=0.005)


@pytest.mark.parametrize(
    ("coalition", "mich", "expected"),
    [(1, 6, 10), (0, 6, 12), (0, None, 13)],
)
def test_pay_shows(pay: dict[str, dict[str, Path]], coalition: int, mich: int | None, expected: int) -> None:
    rules = [Rule(5, 3, coalition)] + ([Rule(mich, 2, coalition)] if mich is not None else [])
    table = oracle.pay(pay, rules)
    assert len(table) == 18
    assert oracle.shown(table) == expected
