"""The plan of a scan: which columns, which windows, which ranges (SPEC, "Computation").

All of it follows from the agreement and from the indices that admission made, never from the number of workers; so does
everything computed by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from parley_enclave.engine.frames import Admitted, Index, Keys, Source
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement, Table
from parley_protocol.errors import RefusedError
from parley_protocol.secret import Secret
from parley_protocol.table import KEY_NULL, KEY_PAD

if TYPE_CHECKING:
    from parley_enclave.outputs import Kind

_WORK_BYTES = 96
"""Memory that a row of a window takes while it is sorted and counted, beside its columns."""


@dataclass(frozen=True, slots=True)
class Input(Secret):
    """One upload in the scan."""

    source: Source
    admitted: Admitted
    index: Index


@dataclass(frozen=True, slots=True)
class TablePlan(Secret):
    """One table of the scan: its uploads in the order of the agreement's parties, the columns that any output reads (0,
    the key, first)."""

    table: Table
    inputs: tuple[Input, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan(Secret):
    """A scan of all tables for all outputs. Window w holds the keys above `bounds[w]`, to `bounds[w + 1]` inclusive; range r
    holds the windows from `cuts[r]` to `cuts[r + 1]`."""

    agreement: Agreement
    tables: Mapping[str, TablePlan]
    outputs: tuple[Kind, ...]
    bounds: Keys = field(repr=False)
    cuts: tuple[int, ...]

    @property
    def ranges(self) -> int:
        """How many tasks the scan has."""
        return len(self.cuts) - 1


def plan(agreement: Agreement, sources: Sequence[tuple[Source, Admitted]]) -> Plan:
    """The plan over admitted uploads, in any order; RefusedError memory where a window or the state would not fit."""
    # Here, because kinds of outputs are made of parts of the engine.
    from parley_enclave.outputs import KINDS

    brought = {(source.table, source.party): (source, admitted) for source, admitted in sources}
    if len(brought) != len(sources):
        raise ValueError("sources: a party brings one upload of a table")
    tables = {}
    for name in dict.fromkeys(name for output in agreement.outputs.values() for name in output.tables):
        table = agreement.tables[name]
        inputs = [
            Input(source, admitted, Index.of(admitted, source.layout))
            for party in table.parties
            if (name, party) in brought
            for source, admitted in [brought[name, party]]
        ]
        columns = {ref.number for output in agreement.outputs.values() for ref in output.refs if ref.table == name}
        tables[name] = TablePlan(table, tuple(inputs), (0, *sorted(columns)))
    outputs = tuple(
        KINDS[output.kind](agreement, output, len(tables[output.table].inputs)) for output in agreement.outputs.values()
    )
    state = sum(output.state_bytes for output in outputs)
    if state > limits.STATE_BYTES:
        raise RefusedError("memory")  # eng-5
    inputs = [each for table in tables.values() for each in table.inputs]
    bounds = _bounds(inputs)
    _fits(tables, bounds)
    return Plan(agreement, tables, outputs, bounds, _cuts(len(bounds) - 1, inputs, state))


def _bounds(inputs: Sequence[Input]) -> Keys:
    """A bound at the last key of a group wherever another WINDOW_ROWS rows have ended (eng-3)."""
    last = np.concatenate([each.index.last for each in inputs] or [np.empty(0, np.uint64)])
    rows = np.repeat(
        [each.source.layout.group_rows for each in inputs], [len(each.index.last) for each in inputs]
    ).astype(np.int64)
    order = np.argsort(last, kind="stable")
    ended = np.cumsum(rows[order])
    total = int(ended[-1]) if len(ended) else 0
    at = np.searchsorted(ended, np.arange(limits.WINDOW_ROWS, total, limits.WINDOW_ROWS))
    inner = last[order][at]
    ends = np.array([KEY_NULL, KEY_PAD - 1], np.uint64)
    return np.unique(np.concatenate((inner, ends)))


def _cuts(windows: int, inputs: Sequence[Input], state: int) -> tuple[int, ...]:
    """Where ranges begin and end (eng-4): so long that what two of them read twice is little, so few that their states of
    `state` bytes fit the process that merges them."""
    groups = sum(len(each.index.last) for each in inputs)
    wanted = min(groups // max(1, limits.RANGE_GROUPS * len(inputs)), limits.PARTIALS_BYTES // max(1, state))
    ranges = min(limits.RANGES, windows, 1 << max(0, wanted.bit_length() - 1))
    return tuple(windows * number // ranges for number in range(ranges + 1))


def _fits(tables: Mapping[str, TablePlan], bounds: Keys) -> None:
    """Estimates the greatest window: groups that touch it are buffered, and it is cut between units where it is too long (eng-5)."""
    buffered = np.zeros(len(bounds) - 1, np.int64)
    unit = 0
    width = 0
    for each in tables.values():
        widths = sum(each.inputs[0].source.layout.widths[column] for column in each.columns) if each.inputs else 0
        width = max(width, widths)
        for part in each.inputs:
            before = np.searchsorted(part.index.last, bounds[:-1], side="right")
            after = np.searchsorted(part.index.first, bounds[1:], side="right")
            buffered += np.maximum(after - before, 0) * (part.source.layout.group_rows * widths)
            unit += part.index.longest
    work = max(2 * limits.WINDOW_ROWS, unit) * (2 * width + _WORK_BYTES)
    # Twice: the sealed frames of the next window are already there.
    if 2 * int(buffered.max()) + work > limits.WINDOW_BYTES:
        raise RefusedError("memory")
