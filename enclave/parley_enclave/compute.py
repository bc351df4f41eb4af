"""The computation: the plan, its ranges as tasks for the workers, and the outputs from their partial states.

The main process plans and merges; it never sees a frame. numpy is imported when the first plan is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parley_enclave.admission import Brought, Checked
from parley_enclave.pool import Context, Parts, Pool, Task
from parley_protocol.agreement.model import Agreement
from parley_protocol.encoding import Encodable
from parley_protocol.output import OutputTable
from parley_protocol.secret import Secret
from parley_protocol.table import Layout

if TYPE_CHECKING:
    from parley_enclave.engine import Plan


@dataclass(frozen=True, slots=True)
class Job(Secret):
    """A computation that fits: its plan, and what workers need for their part of it."""

    plan: Plan = field(repr=False)
    context: Context = field(repr=False)


def prepare(agreement: Agreement, inputs: Sequence[tuple[Brought, Checked]], guard_key: bytes, *, name: bytes) -> Job:
    """Plans the computation over admitted uploads; RefusedError "memory" where it does not fit. `name`: of this plan."""
    from parley_enclave.engine import Admitted, Source, plan

    sources = []
    for brought, checked in inputs:
        header = brought.upload.header
        layout = Layout.of(header, agreement.tables[header.table].widths)
        source = Source(
            party=header.party,
            table=header.table,
            header=header,
            layout=layout,
            blob=brought.blob,
            frame_key=brought.frame_key,
        )
        sources.append((source, Admitted(rows=checked.rows, index=checked.index, tags=checked.tags)))
    fields: list[Encodable] = [
        guard_key,
        [
            [
                brought.upload.header.party,
                brought.upload.header.table,
                brought.upload.header_bytes,
                brought.blob,
                brought.frame_key,
                checked.rows,
            ]
            for brought, checked in inputs
        ],
    ]
    parts: list[bytes] = [agreement.canonical]
    for _, checked in inputs:
        parts += (checked.index, checked.tags)
    return Job(plan(agreement, sources), Context(name, fields, tuple(parts)))


def run(job: Job, pool: Pool, progress: Callable[[int], None]) -> list[OutputTable]:
    """The outputs in the agreement's order; `progress` is told percents.

    RefusedError "frame" where a frame is not the admitted one; UnavailableError, WorkerError where the work was lost.
    """
    from parley_enclave.engine import finish

    ranges = job.plan.ranges
    futures = [pool.submit(Task(["scan", number], context=job.context)) for number in range(ranges)]
    try:
        partials = []
        for number, future in enumerate(futures):
            partials.append(_only(future.result()))
            progress((number + 1) * 100 // (ranges + 1))
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return finish(job.plan, partials)


def _only(parts: Parts) -> bytes:
    (partial,) = parts
    return partial
