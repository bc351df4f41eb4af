"""The output kind `aggregate`: cells of declared values, and in each counts, distinct units, sums, means and variances.

Counts, units and sums of whole numbers and decimals are exact (eng-10). Floats: each window in two passes (its mean, then deviations
from it), windows and ranges merged by Chan, Golub and LeVeque's formula, sums with Neumaier's compensation (eng-11).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from parley_enclave.engine import disclosure
from parley_enclave.engine.checks import is_null
from parley_enclave.engine.expression import holds
from parley_enclave.engine.frames import starts
from parley_enclave.engine.partial import State
from parley_protocol.agreement.model import Agreement, Function, Grouping, JoinKind, Output, Value, effective
from parley_protocol.agreement.schema import BOOL_NULL, ColumnRef, ColumnType
from parley_protocol.output import (
    COUNT_TYPE,
    DECIMAL_TYPE,
    FLOAT_TYPE,
    LABEL_TYPE,
    Cell,
    OutputColumn,
    OutputTable,
    Reason,
)

if TYPE_CHECKING:
    from parley_enclave.engine.windows import Window

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]

_LIMB: Final = 32
_MASK: Final = np.uint64((1 << _LIMB) - 1)
_SUM_LIMBS: Final = 4
_SQUARE_LIMBS: Final = 6
_EXACT_ROWS: Final = 1 << 20
"""Limbs below 2^32 of so many rows add up exactly in a float64."""
_FEW_EDGES: Final = 8
_MASKS: Final = 12
"""With 17 bits of cell and 10 of party, 24 are left for the units of a window."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """A column with a sum, mean or variance. `basis`: the number of its contributing rows among the bases."""

    ref: ColumnRef
    basis: int
    squares: bool

    @property
    def exact(self) -> bool:
        """Whether its sums are of whole numbers."""
        return self.ref.column.type is not ColumnType.FLOAT

    @property
    def low(self) -> int:
        """What is taken off each whole number, so that none is negative; it is added again at the end."""
        return int(self.ref.column.low or 0)


@dataclass(frozen=True, slots=True)
class _Selection:
    """The rows of a window that an output looks at, sorted by key. `first`: whether a row is the first of its unit;
    `unique`: whether all are; `codes`: cell and party in one number; `column`: the values of a column for these rows."""

    cells: Codes = field(repr=False)
    codes: Codes = field(repr=False)
    first: NDArray[np.bool_] = field(repr=False)
    unique: bool
    column: Callable[[ColumnRef], NDArray[Any]] = field(repr=False)


class _Holdings:
    """Which party has which unit in which cell, where a unit may have several rows: sorted numbers of unit, cell and party,
    and for each in which of some masks of rows it stands. One sort serves all masks."""

    def __init__(self, selection: _Selection, code_bits: int, masks: Sequence[NDArray[np.bool_]]) -> None:
        """At most _MASKS masks."""
        numbers = np.cumsum(selection.first, dtype=np.int64)
        numbers <<= code_bits
        numbers |= selection.codes
        numbers <<= len(masks)
        for place, mask in enumerate(masks):
            numbers |= np.left_shift(mask, place, dtype=np.int64)
        # Sorted by unit and by party, and so sorted as a whole wherever a unit has one cell.
        if bool((numbers[1:] < numbers[:-1]).any()):
            numbers.sort()
        holdings = numbers >> len(masks)
        first = np.flatnonzero(starts(holdings))
        self._holdings = holdings[first]
        self._inside = np.bitwise_or.reduceat(numbers, first) if masks else numbers

    def of(self, place: int | None) -> Codes:
        """Those with a row in the mask at `place`, or all."""
        return self._holdings if place is None else self._holdings[(self._inside >> place) & 1 == 1]


class Aggregate:
    """One aggregate of an agreement. A *basis* is a set of contributing rows: all rows, or those where a column is not null."""

    def __init__(self, agreement: Agreement, output: Output, uploads: int) -> None:
        """`uploads`: how many parties' uploads of the output's own table are in the scan."""
        self._agreement = agreement.digest
        self._output = output
        self._rules = effective(agreement)
        self._parties = uploads
        self._party_bits = max(0, uploads - 1).bit_length()
        self._cells = output.rows
        self._cell_bits = max(0, self._cells - 1).bit_length()
        self._depth = disclosure.depth(self._rules, uploads)
        self._levels = self._depth + 1
        bases: dict[ColumnRef | None, int] = {}
        for value in output.values:
            bases.setdefault(_basis(value), len(bases))
        self._bases = bases
        self._measured = tuple(
            _Measured(
                ref,
                bases[ref if ref.nullable else None],
                any(each.ref == ref and each.function in (Function.VARIANCE, Function.STD) for each in output.values),
            )
            for ref in dict.fromkeys(
                value.ref for value in output.values if value.ref is not None and value.function is not Function.COUNT
            )
        )
        self._codings = _codings(output.by)

    @property
    def state_bytes(self) -> int:
        """Size of a state."""
        counts = len(self._bases) * self._cells * (1 + (2 * self._levels << self._party_bits))
        return 8 * (counts + len(self._measured) * self._cells * (_SUM_LIMBS + _SQUARE_LIMBS))

    def zero(self) -> State:
        """Per basis: `rows` by cell; `held` by cell, party, level and whether it is counted for the unit: for each party of
        each unit in each cell, the level is how many parties the unit has there, 0 beyond the greatest coalition, and the
        first of the parties stands for the unit. Per measured column: sum and deviations by cell."""
        state: State = {}
        for basis in self._bases.values():
            state[f"rows.{basis}"] = np.zeros(self._cells, np.int64)
            state[f"held.{basis}"] = np.zeros((self._cells, 1 << self._party_bits, self._levels, 2), np.int64)
        for number, measured in enumerate(self._measured):
            if measured.exact:
                state[f"sum.{number}"] = np.zeros((_SUM_LIMBS, self._cells), np.int64)
                if measured.squares:
                    state[f"squares.{number}"] = np.zeros((_SQUARE_LIMBS, self._cells), np.int64)
            else:
                state[f"sum.{number}"] = np.zeros((2, self._cells), np.float64)
                if measured.squares:
                    state[f"deviations.{number}"] = np.zeros(self._cells, np.float64)
        return state

    # Rows to state

    def update(self, state: State, window: Window) -> None:
        """Adds the rows of a window; every unit is whole in one window."""
        selection = self._select(window)
        if not len(selection.cells):
            return
        for bases, masks in self._masked(selection):
            chosen = [mask for mask in masks if mask is not None]
            holdings = None if selection.unique else _Holdings(selection, self._cell_bits + self._party_bits, chosen)
            place = 0
            for basis, mask in zip(bases, masks, strict=True):
                if mask is None:
                    codes = selection.codes if holdings is None else holdings.of(None)
                    self._add(state, basis, selection, slice(None), codes)
                else:
                    codes = selection.codes[mask] if holdings is None else holdings.of(place)
                    self._add(state, basis, selection, mask, codes)
                    place += 1

    def _masked(self, selection: _Selection) -> Iterator[tuple[Sequence[int], Sequence[NDArray[np.bool_] | None]]]:
        """The bases, some at a time, and their rows among those selected (None: all of them)."""
        bases = list(self._bases.items())
        for start in range(0, len(bases), _MASKS):
            part = bases[start : start + _MASKS]
            masks: list[NDArray[np.bool_] | None] = []
            for ref, _ in part:
                mask = None if ref is None else np.logical_not(is_null(ref.column, selection.column(ref)))
                masks.append(None if mask is None or bool(mask.all()) else mask)
            yield [basis for _, basis in part], masks

    def _select(self, window: Window) -> _Selection:
        output = self._output
        rows = window.tables[output.table]
        positions = {join.table: window.positions(output.table, join.table) for join in output.joins}
        kept: NDArray[np.bool_] | None = None
        for join in output.joins:
            if join.kind is JoinKind.INNER:
                matched = positions[join.table] != window.lookup(join.table).none
                kept = matched if kept is None else kept & matched

        def every(ref: ColumnRef) -> NDArray[Any]:
            if ref.table == output.table:
                return rows.columns[ref.number]
            return window.lookup(ref.table).column(ref.number)[positions[ref.table]]

        if output.where is not None:
            true = holds(output.where, every, len(rows))
            kept = true if kept is None else kept & true
        for grouping in output.by:
            if grouping.ref.nullable and not _has_null(grouping):
                # The agreement gives null no cell, since its condition keeps none; one that came would be in no cell.
                valued = np.logical_not(is_null(grouping.ref.column, every(grouping.ref)))
                kept = valued if kept is None else kept & valued
        keys, parties = rows.keys, rows.parties
        chosen = None if kept is None or bool(kept.all()) else np.flatnonzero(kept)
        if chosen is not None:
            keys, parties = keys[chosen], parties[chosen]
            positions = {table: found[chosen] for table, found in positions.items()}
        made: dict[ColumnRef, NDArray[Any]] = {}

        def column(ref: ColumnRef) -> NDArray[Any]:
            if ref not in made:
                values = every(ref)
                made[ref] = values[chosen] if chosen is not None and ref.table == output.table else values
            return made[ref]

        def joined(ref: ColumnRef) -> NDArray[Any]:
            return window.lookup(ref.table).column(ref.number)

        cells: Codes | None = None
        for table, codings in self._codings.items():
            code = _code(codings, column) if table == output.table else _code(codings, joined)[positions[table]]
            cells = code if cells is None else cells + code
        if cells is None:
            cells = np.zeros(len(keys), np.int64)
        first = rows.starts if chosen is None else starts(keys)
        return _Selection(
            cells=cells,
            codes=(cells << self._party_bits) | parties,
            first=first,
            unique=rows.unique or bool(first.all()),
            column=column,
        )

    def _add(
        self, state: State, basis: int, selection: _Selection, mask: NDArray[np.bool_] | slice, held: Codes
    ) -> None:
        """Adds the rows in `mask`, and what of it is held by whom: codes, or numbers of holdings."""
        cells = selection.cells[mask]
        rows = np.bincount(cells, minlength=self._cells)
        for number, measured in enumerate(self._measured):
            if measured.basis == basis:
                # Before the rows are added: it needs to know how many came before.
                self._measure(state, number, cells, selection.column(measured.ref)[mask], rows)
        state[f"rows.{basis}"] += rows
        if selection.unique:
            places = held * (2 * self._levels) + (2 * min(1, self._depth) + 1)
        else:
            first = starts(held >> self._party_bits)
            places = held & ((1 << (self._cell_bits + self._party_bits)) - 1)
            places *= 2 * self._levels
            places += first
            if self._depth == 1:
                alone = first.copy()
                alone[:-1] &= first[1:]
                places += np.left_shift(alone, 1, dtype=np.int64)
            elif self._depth:
                sharing = np.diff(np.append(np.flatnonzero(first), len(held)))
                levels = np.where(sharing <= self._depth, 2 * sharing, 0)
                places += np.repeat(levels, sharing)
        _add_each(state[f"held.{basis}"].reshape(-1), places)

    def _measure(self, state: State, number: int, cells: Codes, values: NDArray[Any], rows: Codes) -> None:
        measured = self._measured[number]
        if measured.exact:
            for start in range(0, len(cells), _EXACT_ROWS):
                part = slice(start, start + _EXACT_ROWS)
                self._measure_exact(state, number, cells[part], values[part])
            return
        mean = self._sums(cells, values) / np.maximum(rows, 1)
        gone = values - mean[cells]
        # What the first pass lost to rounding, which is then also what keeps `mean` from being the mean.
        lost = self._sums(cells, gone)
        sums = mean * rows + lost
        if measured.squares:
            squares = self._sums(cells, gone * gone) - lost * lost / np.maximum(rows, 1)
            # Rounding may leave less than nothing where all values are equal.
            deviations = np.maximum(squares, 0.0)
            before = state[f"rows.{measured.basis}"]
            total = state[f"sum.{number}"].sum(axis=0)
            _add_deviations(state[f"deviations.{number}"], before, total, deviations, rows, sums)
        _add_float(state[f"sum.{number}"], sums)

    def _measure_exact(self, state: State, number: int, cells: Codes, values: NDArray[Any]) -> None:
        measured = self._measured[number]
        span = int(measured.ref.column.high or 0) - measured.low
        # Modulo 2^64, where the difference is not negative and fits.
        offset = values.astype(np.int64, copy=False).view(np.uint64) - np.uint64(measured.low % (1 << 64))
        low, high = offset & _MASK, offset >> np.uint64(_LIMB)
        wide = span >> _LIMB > 0
        sums = state[f"sum.{number}"]
        sums[0] += self._limbs(cells, low)
        if wide:
            sums[1] += self._limbs(cells, high)
        _carry(sums)
        if not measured.squares:
            return
        squares = state[f"squares.{number}"]
        products = [(low * low, 0, 1), (low * high, 1, 2), (high * high, 2, 1)] if wide else [(low * low, 0, 1)]
        for product, place, times in products:
            squares[place] += times * self._limbs(cells, product & _MASK)
            if span * span >> _LIMB:
                squares[place + 1] += times * self._limbs(cells, product >> np.uint64(_LIMB))
        _carry(squares)

    def _sums(self, cells: Codes, weights: NDArray[Any]) -> Floats:
        sums: Any = np.bincount(cells, weights=weights, minlength=self._cells)
        return np.asarray(sums, np.float64)

    def _limbs(self, cells: Codes, limbs: NDArray[np.uint64]) -> Codes:
        """Exact sums by cell of numbers below 2^32."""
        return self._sums(cells, limbs).astype(np.int64)

    # States to one state

    def merge(self, state: State, other: State) -> None:
        """Adds the state of the next key range."""
        for number, measured in enumerate(self._measured):
            sums, added = state[f"sum.{number}"], other[f"sum.{number}"]
            if measured.exact:
                sums += added
                _carry(sums)
                if measured.squares:
                    state[f"squares.{number}"] += other[f"squares.{number}"]
                    _carry(state[f"squares.{number}"])
                continue
            if measured.squares:
                name, rows = f"deviations.{number}", f"rows.{measured.basis}"
                _add_deviations(state[name], state[rows], sums.sum(axis=0), other[name], other[rows], added.sum(axis=0))
            _add_float(sums, added[0])
            sums[1] += added[1]
        for basis in self._bases.values():
            for kind in ("rows", "held"):
                state[f"{kind}.{basis}"] += other[f"{kind}.{basis}"]

    # State to output

    def finish(self, state: State) -> OutputTable:
        """The output, its rules applied (eng-13, dis-7, dis-8)."""
        hidden = {basis: self._hidden(state, basis) for basis in self._bases.values()}
        columns = self._labels()
        reasons = dict.fromkeys(disclosure.ORDER, 0)
        for value in self._output.values:
            verdict = hidden[self._bases[_basis(value)]]
            for place, rule in enumerate(disclosure.ORDER, 1):
                reasons[rule] += int(np.count_nonzero(verdict == place))
            shown: list[Cell] = [None] * self._cells
            for cell in np.flatnonzero(verdict == 0).tolist():
                shown[cell] = self._shown(state, value, cell)
            columns.append(OutputColumn(value.name, _TYPES[value.type], tuple(shown)))
        return OutputTable(
            agreement=self._agreement,
            name=self._output.name,
            kind=str(self._output.kind),
            columns=tuple(columns),
            rows=self._cells,
            reasons=tuple(Reason(rule, values) for rule, values in sorted(reasons.items()) if values),
        )

    def _hidden(self, state: State, basis: int) -> NDArray[np.int8]:
        held = state[f"held.{basis}"][:, : max(1, self._parties)]
        evidence = disclosure.Evidence(
            units=held[:, :, :, 1].sum(axis=(1, 2)),
            party_units=held.sum(axis=(2, 3)),
            shared=held[:, :, 1:].sum(axis=3).transpose(2, 0, 1),
        )
        return disclosure.hidden_by(evidence, self._rules)

    def _labels(self) -> list[OutputColumn]:
        columns = []
        inner, outer = self._cells, 1
        for grouping in self._output.by:
            inner //= grouping.size
            cells = tuple(label for _ in range(outer) for label in grouping.labels for _ in range(inner))
            columns.append(OutputColumn(grouping.name, LABEL_TYPE, cells))
            outer *= grouping.size
        return columns

    def _shown(self, state: State, value: Value, cell: int) -> Cell:
        """One value; its cell has two units at least, and so two rows."""
        rows = int(state[f"rows.{self._bases[_basis(value)]}"][cell])
        if value.function is Function.COUNT:
            return rows
        if value.function is Function.UNITS:
            return int(state[f"held.{self._bases[_basis(value)]}"][cell, :, :, 1].sum())
        number = next(number for number, measured in enumerate(self._measured) if measured.ref == value.ref)
        measured = self._measured[number]
        if measured.exact:
            return _exact_value(value, measured, state, number, cell, rows)
        if value.function is Function.SUM:
            return float(state[f"sum.{number}"][:, cell].sum())
        if value.function is Function.MEAN:
            return float(state[f"sum.{number}"][:, cell].sum()) / rows
        variance = float(state[f"deviations.{number}"][cell]) / (rows - 1)
        return variance if value.function is Function.VARIANCE else math.sqrt(variance)


_TYPES: Final = {"count": COUNT_TYPE, "decimal": DECIMAL_TYPE, "float": FLOAT_TYPE}


def _exact_value(value: Value, measured: _Measured, state: State, number: int, cell: int, rows: int) -> Cell:
    """A sum as decimal text; a mean or variance as the float nearest to the exact number."""
    scale = measured.ref.column.scale
    offsets = _whole(state[f"sum.{number}"][:, cell])
    total = offsets + rows * measured.low
    if value.function is Function.SUM:
        return decimal_text(total, scale)
    if value.function is Function.MEAN:
        return float(Fraction(total, rows * 10**scale))
    squares = _whole(state[f"squares.{number}"][:, cell])
    variance = Fraction(rows * squares - offsets * offsets, rows * (rows - 1) * 10 ** (2 * scale))
    return float(variance) if value.function is Function.VARIANCE else math.sqrt(variance)


def decimal_text(scaled: int, scale: int) -> str:
    """scaled / 10^scale with `scale` digits after the point, exactly."""
    digits = str(abs(scaled)).rjust(scale + 1, "0")
    whole, part = (digits[:-scale], "." + digits[-scale:]) if scale else (digits, "")
    return ("-" if scaled < 0 else "") + whole + part


def _basis(value: Value) -> ColumnRef | None:
    return value.ref if value.ref is not None and value.ref.nullable else None


def _whole(limbs: Codes) -> int:
    return sum(limb << (_LIMB * place) for place, limb in enumerate(limbs.tolist()))


def _carry(limbs: Codes) -> None:
    """Brings every limb but the last below 2^32."""
    for place in range(len(limbs) - 1):
        limbs[place + 1] += limbs[place] >> _LIMB
        limbs[place] &= int(_MASK)


def _add_each(counts: Codes, codes: Codes) -> None:
    """Adds one at each code."""
    if len(counts) <= 4 * len(codes):
        counts += np.bincount(codes, minlength=len(counts))
    else:
        np.add.at(counts, codes, 1)


def _add_float(sums: Floats, added: Floats) -> None:
    """Neumaier's step: sums[0] is the sum, sums[1] what it has lost."""
    total = sums[0] + added
    larger = np.abs(sums[0]) >= np.abs(added)
    sums[1] += np.where(larger, (sums[0] - total) + added, (added - total) + sums[0])
    sums[0] = total


def _add_deviations(
    deviations: Floats, rows: Codes, total: Floats, added: Floats, added_rows: Codes, added_total: Floats
) -> None:
    """Chan's formula: squared deviations from the mean of two sets of rows together."""
    both = (rows > 0) & (added_rows > 0)
    n, m = np.maximum(rows, 1).astype(np.float64), np.maximum(added_rows, 1).astype(np.float64)
    apart = added_total / m - total / n
    deviations += added + np.where(both, apart * apart * (n * m / (n + m)), 0.0)


@dataclass(frozen=True, slots=True)
class _Coding:
    """How a `by` column becomes its part of the number of the cell: its index times `stride`."""

    grouping: Grouping
    stride: int
    table: Codes | None = field(repr=False)
    """By code, where the column is a category or a bool."""


def _has_null(grouping: Grouping) -> bool:
    """Whether null has a value of its own, the last."""
    return grouping.labels[-1] is None


def _codings(by: Sequence[Grouping]) -> dict[str, list[_Coding]]:
    """By the table that the columns are of. The last `by` column runs fastest."""
    found: dict[str, list[_Coding]] = {}
    stride = 1
    for grouping in reversed(by):
        column = grouping.ref.column
        null = grouping.size - 1 if _has_null(grouping) else 0
        table = None
        if column.type is ColumnType.CATEGORY:
            table = np.array([null, *range(len(column.values))], np.int64) * stride
        elif column.type is ColumnType.BOOL:
            table = np.zeros(BOOL_NULL + 1, np.int64)
            table[1], table[BOOL_NULL] = stride, null * stride
        found.setdefault(grouping.ref.table, []).append(_Coding(grouping, stride, table))
        stride *= grouping.size
    return found


def _code(codings: Sequence[_Coding], column: Callable[[ColumnRef], NDArray[Any]]) -> Codes:
    """The parts of several `by` columns of one table, added (eng-9)."""
    total: Codes | None = None
    for coding in codings:
        grouping = coding.grouping
        values = column(grouping.ref)
        if coding.table is not None:
            part = coding.table[values]
        else:
            part = _bin(values, grouping.edges)
            if _has_null(grouping):
                part[is_null(grouping.ref.column, values)] = grouping.size - 1
            part *= coding.stride
        total = part if total is None else total + part
    assert total is not None
    return total


def _bin(values: NDArray[Any], edges: Sequence[int | float]) -> Codes:
    """How many edges are not above each value."""
    if len(edges) > _FEW_EDGES:
        found: Codes = np.searchsorted(np.array(edges, values.dtype), values, side="right").astype(np.int64, copy=False)
        return found
    total = np.zeros(len(values), np.int64)
    for edge in edges:
        total += values >= edge
    return total
