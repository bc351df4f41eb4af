"""The two halves of a computation: one task for each key range, and the outputs from what the tasks leave."""

from __future__ import annotations

from collections.abc import Sequence

from parley_enclave.engine import partial
from parley_enclave.engine.frames import Progress, Pull
from parley_enclave.engine.partial import State
from parley_enclave.engine.planning import Plan
from parley_enclave.engine.windows import windows
from parley_protocol.output import OutputTable


def scan(plan: Plan, number: int, guard_key: bytes, pull: Pull, progress: Progress) -> bytes:
    """The partial state of range `number` for all outputs, in one pass over the columns that any of them reads.

    FrameError where a frame is missing or not the admitted one. `pull` is called by one other thread, never by two at once.
    """
    states = [output.zero() for output in plan.outputs]
    for window in windows(plan, number, guard_key, pull, progress):
        for output, state in zip(plan.outputs, states, strict=True):
            output.update(state, window)
    return partial.dump(_joined(states), plan.agreement.digest, number)


def finish(plan: Plan, partials: Sequence[bytes]) -> list[OutputTable]:
    """The outputs in the agreement's order, from the partial state of each range in order; MalformedError."""
    if len(partials) != plan.ranges:
        raise ValueError("partials: not one for each range")
    states = [output.zero() for output in plan.outputs]
    like = _joined(states)
    for number, data in enumerate(partials):
        loaded = partial.load(data, like, plan.agreement.digest, number)
        for place, (output, state) in enumerate(zip(plan.outputs, states, strict=True)):
            output.merge(state, {name: loaded[_name(place, name)] for name in state})
    return [output.finish(state) for output, state in zip(plan.outputs, states, strict=True)]


def _joined(states: Sequence[State]) -> State:
    return {_name(place, name): array for place, state in enumerate(states) for name, array in state.items()}


def _name(place: int, name: str) -> str:
    return f"{place}.{name}"
