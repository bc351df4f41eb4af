"""The rules against counting by hand: exact for one party taken away, never too few for more."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parley_enclave.engine.disclosure import Evidence, depth, hidden_by
from parley_protocol.agreement.model import Rules

Cell = dict[int, set[int]]
"""Units by number, each with the parties that have rows of it."""


def evidence(cells: list[Cell], parties: int, deep: int) -> Evidence:
    units = np.array([len(cell) for cell in cells], np.int64)
    party_units = np.zeros((len(cells), parties), np.int64)
    shared = np.zeros((deep, len(cells), parties), np.int64)
    for number, cell in enumerate(cells):
        for having in cell.values():
            for party in having:
                party_units[number, party] += 1
                if len(having) <= deep:
                    shared[len(having) - 1, number, party] += 1
    return Evidence(units, party_units, shared)


def verdict(cell: Cell, rules: list[Rules], parties: int) -> str:
    found = hidden_by(evidence([cell], parties, depth(rules, parties)), rules)[0]
    return ("shown", "min_units", "min_parties")[found]


def by_hand(cell: Cell, rule: Rules, parties: int) -> str:
    """The rule as DESIGN states it: every coalition is taken away and what is left is counted."""
    contributing = sorted({party for having in cell.values() for party in having})
    if rule.coalition is None:
        own = [sum(party in having for having in cell.values()) for party in contributing]
        if len(cell) < rule.min_units or any(count < rule.min_units for count in own):
            return "min_units"
        return "shown" if len(contributing) >= rule.min_parties else "min_parties"
    left = [
        sum(bool(having - set(gone)) for having in cell.values())
        for gone in combinations(range(parties), min(rule.coalition, parties))
    ]
    if min([len(cell), *left]) < rule.min_units:
        return "min_units"
    return "shown" if len(contributing) - rule.coalition >= rule.min_parties else "min_parties"


CELLS = st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=30).map(lambda having: dict(enumerate(having)))
LIMITS = st.tuples(st.integers(2, 12), st.integers(1, 4))


@given(cell=CELLS, bounds=LIMITS, coalition=st.sampled_from([0, 1]))
def test_dis_4_nobody_and_one_party_exactly(cell: Cell, bounds: tuple[int, int], coalition: int) -> None:
    rule = Rules(None, *bounds, coalition)
    assert verdict(cell, [rule], 5) == by_hand(cell, rule, 5)


@given(cell=CELLS, bounds=LIMITS)
def test_dis_6_all_exactly(cell: Cell, bounds: tuple[int, int]) -> None:
    rule = Rules(None, *bounds, None)
    assert verdict(cell, [rule], 5) == by_hand(cell, rule, 5)


@pytest.mark.parametrize(("parties", "coalition"), [(3, 0), (4, 1), (5, 1), (5, 3), (5, 4)])
def test_dis_3_parties_left(parties: int, coalition: int) -> None:
    cell = {number: {number % parties} for number in range(100)}
    assert verdict(cell, [Rules(None, 2, parties - coalition, coalition)], 5) == "shown"
    assert verdict(cell, [Rules(None, 2, parties - coalition + 1, coalition)], 5) == "min_parties"


@given(cell=CELLS, bounds=LIMITS, coalition=st.integers(2, 7))
@example(cell={0: {0, 1}, 1: {0, 1}, 2: {2}}, bounds=(2, 1), coalition=2)
def test_dis_5_two_and_more_hide_at_least_what_must_be_hidden(
    cell: Cell, bounds: tuple[int, int], coalition: int
) -> None:
    rule = Rules(None, *bounds, coalition)
    if by_hand(cell, rule, 5) != "shown":
        assert verdict(cell, [rule], 5) != "shown"


def test_dis_5_is_exact_where_no_unit_is_shared() -> None:
    cell = {number: {number % 5} for number in range(25)}
    assert verdict(cell, [Rules(None, 15, 3, 2)], 5) == "shown"
    assert verdict(cell, [Rules(None, 16, 3, 2)], 5) == "min_units"


def test_dis_5_charges_a_shared_unit_in_parts() -> None:
    # Parties 0 and 1 share 12 units and so lose them together; five others have two units each.
    cell = {number: {0, 1} for number in range(12)} | {12 + number: {2 + number % 5} for number in range(10)}
    assert verdict(cell, [Rules(None, 10, 1, 2)], 7) == "shown"
    assert verdict(cell, [Rules(None, 11, 1, 2)], 7) == "min_units"


def test_dis_2_every_members_rules() -> None:
    cell = {number: {number % 5} for number in range(25)}
    common = Rules(None, 5, 2, 1)
    assert verdict(cell, [common], 5) == "shown"
    assert verdict(cell, [common, Rules("amber", 21, 2, 1)], 5) == "min_units"
    assert verdict(cell, [common, Rules("amber", 5, 5, 1)], 5) == "min_parties"
    # The first rule that fails, whoever asks for it.
    assert verdict(cell, [Rules(None, 5, 5, 1), Rules("amber", 26, 1, 0)], 5) == "min_units"


def test_dis_7_an_empty_cell_fails_min_units() -> None:
    for coalition in (0, 1, 3, None):
        assert verdict({}, [Rules(None, 2, 1, coalition)], 5) == "min_units"


def test_g2_invented_units_of_one_party_do_not_help() -> None:
    cell: Cell = {0: {0}, 1: {1}} | {2 + number: {2} for number in range(1000)}
    assert verdict(cell, [Rules(None, 10, 2, 0)], 3) == "shown"
    assert verdict(cell, [Rules(None, 10, 2, 1)], 3) == "min_units"
    assert verdict(cell, [Rules(None, 10, 2, None)], 3) == "min_units"


@pytest.mark.parametrize("coalition", [13, 40, 100])
def test_great_coalitions_stay_exact(coalition: int) -> None:
    units = {number: {number % 150} for number in range(300)}
    left = 300 - 2 * coalition
    assert verdict(units, [Rules(None, left, 1, coalition)], 150) == "shown"
    assert verdict(units, [Rules(None, left + 1, 1, coalition)], 150) == "min_units"
