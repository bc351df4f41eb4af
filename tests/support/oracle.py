"""Recomputes the demo outputs with pandas, from the parties' plaintext files and from the rules as DESIGN §7 states them.

It shares no code with the engine: rules are applied by removing each coalition's rows from the plaintext and counting again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import pandas as pd

Key = tuple[str | None, ...]
Values = dict[str, float | int | None]


@dataclass(frozen=True)
class Rule:
    """One member's rule. `coalition`: so many parties may be taken away and both bounds still hold."""

    min_units: int
    min_parties: int
    coalition: int


@dataclass(frozen=True)
class Measure:
    """A value of the output: a function of the contributing rows, and the column that must not be null (None: all rows)."""

    name: str
    column: str | None
    compute: Callable[[pd.DataFrame], float | int]


def read(path: Path, text: Iterable[str] = ()) -> pd.DataFrame:
    """A party's file; the columns in `text` as text."""
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_csv(path, dtype=dict.fromkeys(text, "string"))


def passes(rows: pd.DataFrame, rule: Rule) -> bool:
    """Whether a value with these contributing rows (columns unit and party) may be shown under a rule."""
    parties = sorted(rows["party"].unique())
    if len(parties) - min(rule.coalition, len(parties)) < rule.min_parties:
        return False
    for gone in combinations(parties, min(rule.coalition, len(parties))):
        if rows.loc[~rows["party"].isin(gone), "unit"].nunique() < rule.min_units:
            return False
    return True


def cells(
    rows: pd.DataFrame, by: dict[str, Sequence[str | None]], measures: Sequence[Measure], rules: Sequence[Rule]
) -> dict[Key, Values]:
    """Every combination of the declared values of `by`, with None for each hidden value."""
    rows = rows[rows["unit"].notna()]
    result: dict[Key, Values] = {}
    for key in product(*by.values()):
        inside = rows
        for column, value in zip(by, key, strict=True):
            inside = inside[inside[column].isna() if value is None else inside[column] == value]
        values: Values = {}
        for measure in measures:
            used = inside if measure.column is None else inside[inside[measure.column].notna()]
            values[measure.name] = measure.compute(used) if all(passes(used, rule) for rule in rules) else None
        result[key] = values
    return result


def shown(table: dict[Key, Values]) -> int:
    """Combinations of which at least one value is shown."""
    return sum(any(value is not None for value in values.values()) for values in table.values())


ENGINES = ("4 Cycle", "Reciprocating", "Turbo-fan", "Turbo-jet", "Turbo-prop", "Turbo-shaft")
BUILT = ("before 1994", "1994 to 2003", "2004 and later", None)


def flights(files: dict[str, dict[str, Path]], rules: Sequence[Rule]) -> dict[Key, Values]:
    """delay_by_engine of flights.yaml, from the files of `split_flights`: (engine, built) -> values."""
    parts = [
        read(tables["flights"]).assign(party=party)[["party", "tailnum", "arr_delay"]]
        for party, tables in files.items()
        if "flights" in tables
    ]
    planes = read(files["registry"]["planes"])[["tailnum", "engine", "year"]]
    rows = (
        pd.concat(parts, ignore_index=True).merge(planes, on="tailnum", how="inner").rename(columns={"tailnum": "unit"})
    )
    edges = [float("-inf"), 1994, 2004, float("inf")]
    rows["built"] = pd.cut(rows["year"], edges, right=False, labels=list(BUILT[:3])).astype(object)
    measures = [
        Measure("flights", None, len),
        Measure("aircraft", None, lambda used: int(used["unit"].nunique())),
        Measure("mean_delay", "arr_delay", lambda used: float(used["arr_delay"].mean())),
        Measure("sd_delay", "arr_delay", lambda used: float(used["arr_delay"].std(ddof=1))),
    ]
    return cells(rows, {"engine": ENGINES, "built": BUILT}, measures, rules)


YEARS = ("92", "95", "99")
RANKS = ("assistant", "associate", "full")
SEXES = ("f", "m")


def pay(files: dict[str, dict[str, Path]], rules: Sequence[Rule]) -> dict[Key, Values]:
    """salary of pay.yaml, from the files of `split_pay`: (year, rank, sex) -> values."""
    parts = [read(tables["staff"], ("id", "year")).assign(party=party) for party, tables in files.items()]
    rows = pd.concat(parts, ignore_index=True).rename(columns={"id": "unit"})
    rows = rows[rows["rank"].notna() & rows["sex"].notna()]
    measures = [
        Measure("people", None, lambda used: int(used["unit"].nunique())),
        Measure("salaries", "salary", len),
        Measure("mean_salary", "salary", lambda used: float(used["salary"].mean())),
        Measure("sd_salary", "salary", lambda used: float(used["salary"].std(ddof=1))),
    ]
    return cells(rows, {"year": YEARS, "rank": RANKS, "sex": SEXES}, measures, rules)
