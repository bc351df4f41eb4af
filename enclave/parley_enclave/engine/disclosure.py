"""The rules for one value of an output: which cells may show it (SPEC, "Disclosure").

A value is judged on the rows that contribute to it. It passes when it passes every member's rules, each of which must
still hold after the rows of any coalition of parties are taken away, since parties invent units and collude (REVIEW G2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from parley_protocol.agreement.model import Rules

Counts = NDArray[np.int64]

MIN_UNITS: Final = "min_units"
MIN_PARTIES: Final = "min_parties"
ORDER: Final = (MIN_UNITS, MIN_PARTIES)
"""A hidden value counts for the first of these that it fails (dis-8); an empty cell fails the first (dis-7)."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the rules look at, for the rows that contribute to one value, by cell (dis-1).

    `units` [cells]: distinct units. `party_units` [cells, parties]: distinct units of each party. `shared` [m, cells,
    parties]: at m - 1, the units of each party that exactly m parties have in the cell; m up to the greatest coalition.
    """

    units: Counts
    party_units: Counts
    shared: Counts


def depth(rules: Sequence[Rules], parties: int) -> int:
    """How many m `Evidence.shared` needs."""
    return min(parties, max((each.coalition or 0 for each in rules), default=0))


def hidden_by(evidence: Evidence, rules: Sequence[Rules]) -> NDArray[np.int8]:
    """For each cell 0 where the value may be shown, else 1 + the place in ORDER of the first rule that it fails."""
    parties = np.count_nonzero(evidence.party_units, axis=1)
    few_units = np.zeros(len(evidence.units), np.bool_)
    few_parties = few_units.copy()
    for each in rules:  # dis-2
        few_units |= evidence.units < each.min_units
        if each.coalition is None:  # dis-6
            few_units |= ((evidence.party_units > 0) & (evidence.party_units < each.min_units)).any(axis=1)
            few_parties |= parties < each.min_parties
        else:
            few_units |= _left_below(evidence, each.coalition, each.min_units)  # dis-4, dis-5
            few_parties |= parties - each.coalition < each.min_parties  # dis-3
    return np.where(few_units, 1, np.where(few_parties, 2, 0)).astype(np.int8)


def _left_below(evidence: Evidence, coalition: int, least: int) -> NDArray[np.bool_]:
    """Where fewer than `least` units may be left without the rows of some `coalition` parties.

    A unit is lost when all its m parties are in the coalition; each of them is charged 1/m of it, so the largest shares
    of `coalition` parties together are at least what they can take away: exactly that for one party, an upper bound for
    more. Shares are whole numbers of 1/lcm(1..coalition).
    """
    taken = min(coalition, evidence.party_units.shape[1], len(evidence.shared))
    if taken == 0:
        return np.zeros(len(evidence.units), np.bool_)
    whole = math.lcm(*range(1, taken + 1))
    # Beyond 64 bits, Python's integers: still exact, and only for coalitions of dozens.
    exact: Any = np.int64 if int(evidence.units.max(initial=0)) * whole < 2**62 // max(1, taken) else object
    shares: Any = sum(evidence.shared[m - 1].astype(exact) * (whole // m) for m in range(1, taken + 1))
    largest = np.sort(shares, axis=1)[:, -taken:].sum(axis=1)
    below: NDArray[np.bool_] = (evidence.units.astype(exact) * whole - largest < least * whole).astype(np.bool_)
    return below
