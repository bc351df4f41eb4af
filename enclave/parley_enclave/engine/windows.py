"""Windows of a scan: for a run of keys, the rows of every table, sorted by key, with every unit whole (SPEC, "Computation").

Memory holds the groups that touch a window and no more. While a window is worked on, the frames of the next are pulled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parley_enclave.engine.frames import Keys, Progress, Pull, Reader, Values, starts
from parley_enclave.engine.planning import Input, Plan, TablePlan
from parley_protocol import limits
from parley_protocol.agreement.schema import Column
from parley_protocol.table import KEY_PAD

Positions = NDArray[np.int64]


class Rows:
    """Rows of one table in a window, sorted by key, parties in the agreement's order within a unit."""

    def __init__(self, keys: Keys, parties: NDArray[Any], columns: Mapping[int, Values]) -> None:
        """`parties`: the number of each row's party among the table's uploads; `columns` by number, without the key."""
        self.keys = keys
        self.parties = parties
        self.columns = columns

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def starts(self) -> NDArray[np.bool_]:
        """Whether a row is the first of its unit."""
        return starts(self.keys)

    @cached_property
    def unique(self) -> bool:
        """Whether every unit has one row."""
        return bool(self.starts.all())


class Lookup:
    """A joined table in a window: one row for each unit that one party alone brings, and a last row of nulls (eng-7)."""

    def __init__(self, rows: Rows, columns: Mapping[int, Column]) -> None:
        first = rows.starts
        # A unit that two parties bring is ambiguous, and so is not matched at all.
        alone = first & np.append(first[1:], True) if len(first) else first
        kept = slice(None) if bool(alone.all()) else np.flatnonzero(alone)
        self._keys = np.append(rows.keys[kept], np.uint64(KEY_PAD))
        self._columns = {
            number: np.append(rows.columns[number][kept], np.array(column.null_value, column.dtype))
            for number, column in columns.items()
        }

    @property
    def none(self) -> int:
        """The position of the row of nulls."""
        return len(self._keys) - 1

    def column(self, number: int) -> Values:
        """Values of a column by position."""
        return self._columns[number]

    def find(self, rows: Rows) -> Positions:
        """The position of each row's unit here; `none` where it has none."""
        if rows.unique:
            return self._find(rows.keys)
        first = np.flatnonzero(rows.starts)
        counts = np.diff(np.append(first, len(rows)))
        return np.repeat(self._find(rows.keys[first]), counts)

    def _find(self, units: Keys) -> Positions:
        places = np.searchsorted(self._keys[:-1], units)
        places[self._keys[places] != units] = self.none
        return places


@dataclass(slots=True)
class Window:
    """The rows of all tables between two keys. Lookups and their positions are made once for all outputs."""

    tables: Mapping[str, Rows] = field(repr=False)
    plans: Mapping[str, TablePlan] = field(repr=False)
    _lookups: dict[str, Lookup] = field(default_factory=dict, repr=False)
    _found: dict[tuple[str, str], Positions] = field(default_factory=dict, repr=False)

    def lookup(self, table: str) -> Lookup:
        """The joined table."""
        if table not in self._lookups:
            plan = self.plans[table]
            columns = {number: plan.table.columns[number - 1] for number in plan.columns[1:]}
            self._lookups[table] = Lookup(self.tables[table], columns)
        return self._lookups[table]

    def positions(self, table: str, joined: str) -> Positions:
        """Where the units of the rows of `table` stand in the lookup of `joined`."""
        if (table, joined) not in self._found:
            self._found[table, joined] = self.lookup(joined).find(self.tables[table])
        return self._found[table, joined]


class _Cursor:
    """One upload in a range: the groups that are open, and how far their rows are used."""

    def __init__(self, reader: Reader, part: Input, columns: Sequence[int], low: np.uint64) -> None:
        self._reader = reader
        self._index = part.index
        self._columns = columns
        self._low = low
        self._open = self._pulled = int(np.searchsorted(part.index.last, low, side="right"))
        self._values: list[Values] | None = None
        self._at = 0
        self._pending: tuple[range, list[memoryview]] = (range(0), [])

    def pull(self, high: np.uint64) -> tuple[range, list[memoryview]]:
        """Pulls the groups that have a key to `high` and were not pulled yet."""
        stop = max(self._pulled, int(np.searchsorted(self._index.first, high, side="right")))
        groups = range(self._pulled, stop)
        self._pulled = stop
        return groups, self._reader.pull(groups, self._columns)

    def open(self, pulled: tuple[range, list[memoryview]]) -> None:
        """Opens what `pull` gave, behind the rows that are not used yet."""
        groups, frames = pulled
        if not groups:
            return
        kept = [np.empty(0, np.uint8)] * len(self._columns)
        first = self._values is None
        if self._values is not None:
            kept = [values[self._at :] for values in self._values]
        self._values = self._reader.open(groups, self._columns, frames, kept)
        self._at = int(np.searchsorted(self._values[0], self._low, side="right")) if first else 0

    def take(self, high: np.uint64) -> list[Values]:
        """The rows to `high` that are not used yet, one array for each column; views of the buffers."""
        if self._values is None:
            return []
        end = self._at + int(np.searchsorted(self._values[0][self._at :], high, side="right"))
        taken = [values[self._at : end] for values in self._values]
        self._at = end
        return taken if len(taken[0]) else []


def windows(plan: Plan, number: int, guard_key: bytes, pull: Pull, progress: Progress) -> Iterator[Window]:
    """The windows of range `number`; FrameError where a frame is missing or not the admitted one."""
    first, stop = plan.cuts[number], plan.cuts[number + 1]
    cursors = {
        name: [
            _Cursor(_reader(part, table, guard_key, pull), part, table.columns, plan.bounds[first])
            for part in table.inputs
        ]
        for name, table in plan.tables.items()
    }
    everything = [cursor for each in cursors.values() for cursor in each]

    def pull_all(high: np.uint64) -> list[tuple[range, list[memoryview]]]:
        return [cursor.pull(high) for cursor in everything]

    with ThreadPoolExecutor(1) as ahead:
        coming: Future[list[tuple[range, list[memoryview]]]] = ahead.submit(pull_all, plan.bounds[first + 1])
        for window in range(first, stop):
            pulled = coming.result()
            if window + 1 < stop:
                coming = ahead.submit(pull_all, plan.bounds[window + 2])
            for cursor, frames in zip(everything, pulled, strict=True):
                cursor.open(frames)
            del pulled
            high = plan.bounds[window + 1]
            taken = {name: [cursor.take(high) for cursor in each] for name, each in cursors.items()}
            for part in _cut(taken):
                yield Window({name: _merge(part[name], plan.tables[name]) for name in part}, plan.tables)
            del taken
            progress((window + 1 - first) * 100 // (stop - first))
    if number == plan.ranges - 1:
        _check_padding(plan, guard_key, pull)


def _reader(part: Input, table: TablePlan, guard_key: bytes, pull: Pull) -> Reader:
    return Reader(part.source, part.admitted, table.table.columns, guard_key, pull)


def _check_padding(plan: Plan, guard_key: bytes, pull: Pull) -> None:
    """Groups that hold padding alone are pulled like the others, a few at a time, so that none is left out (eng-1)."""
    for table in plan.tables.values():
        for part in table.inputs:
            layout = part.source.layout
            step = max(1, limits.ADMISSION_BYTES // layout.group_bytes)
            reader = _reader(part, table, guard_key, pull)
            for start in range(len(part.index.last), layout.groups, step):
                groups = range(start, min(start + step, layout.groups))
                reader.check(groups, table.columns, reader.pull(groups, table.columns))


Taken = dict[str, list[list[Values]]]
"""For each table and each of its uploads, the columns of the rows that were taken; no columns where there are no rows."""


def _cut(taken: Taken) -> Iterator[Taken]:
    """The window, or parts of it where it has far more rows than was aimed at; no unit is split (eng-3)."""
    while (
        total := sum(len(columns[0]) for each in taken.values() for columns in each if columns)
    ) > 2 * limits.WINDOW_ROWS:
        keys = [columns[0] for each in taken.values() for columns in each if columns]
        # A key of each upload near the wanted share of its rows; the greatest that leaves the part short enough.
        found = sorted(int(own[(len(own) - 1) * limits.WINDOW_ROWS // total]) for own in keys)
        bound = np.uint64(found[0])
        for candidate in found[1:]:
            if (
                sum(int(np.searchsorted(own, np.uint64(candidate), side="right")) for own in keys)
                > 2 * limits.WINDOW_ROWS
            ):
                break
            bound = np.uint64(candidate)
        ends = {
            name: [int(np.searchsorted(columns[0], bound, side="right")) if columns else 0 for columns in each]
            for name, each in taken.items()
        }
        yield {
            name: [
                [values[:end] for values in columns] if end else []
                for columns, end in zip(each, ends[name], strict=True)
            ]
            for name, each in taken.items()
        }
        taken = {
            name: [
                [values[end:] for values in columns] if columns and end < len(columns[0]) else []
                for columns, end in zip(each, ends[name], strict=True)
            ]
            for name, each in taken.items()
        }
    if total:
        yield taken


def _merge(slices: Sequence[Sequence[Values]], plan: TablePlan) -> Rows:
    """One table's rows from those of its uploads, each sorted by key (eng-6)."""
    some = [(number, columns) for number, columns in enumerate(slices) if columns]
    kind = np.uint8 if len(slices) <= 256 else np.uint16
    if not some:
        dtypes = {number: plan.table.columns[number - 1].dtype for number in plan.columns[1:]}
        empty = {number: np.empty(0, dtype) for number, dtype in dtypes.items()}
        return Rows(np.empty(0, np.uint64), np.empty(0, kind), empty)
    counts = [len(columns[0]) for _, columns in some]
    parties = np.repeat(np.array([number for number, _ in some], kind), counts)
    if len(some) == 1:
        keys, *others = some[0][1]
        return Rows(keys, parties, dict(zip(plan.columns[1:], others, strict=True)))
    keys = np.concatenate([columns[0] for _, columns in some])
    # Stable: parties keep their order within a unit. It finds the runs that are sorted already.
    order = np.argsort(keys, kind="stable")
    columns = {
        number: np.concatenate([each[place] for _, each in some])[order]
        for place, number in enumerate(plan.columns[1:], 1)
    }
    return Rows(keys[order], parties[order], columns)
