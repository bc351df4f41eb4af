"""Kinds of outputs, one file each: how rows become a state, states are merged, and a state becomes the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Protocol

from parley_enclave.engine.partial import State
from parley_enclave.outputs.aggregate import Aggregate
from parley_protocol.agreement.model import Agreement, Output, OutputKind
from parley_protocol.output import OutputTable

if TYPE_CHECKING:
    from parley_enclave.engine.windows import Window


class Kind(Protocol):
    """One output of an agreement as its kind computes it. States are plain arrays that are changed in place."""

    @property
    def state_bytes(self) -> int:
        """Size of a state."""

    def zero(self) -> State:
        """The state before any row."""

    def update(self, state: State, window: Window) -> None:
        """Adds the rows of a window; every unit is whole in one window."""

    def merge(self, state: State, other: State) -> None:
        """Adds the state of the next key range."""

    def finish(self, state: State) -> OutputTable:
        """The output, its rules applied."""


KINDS: Final[Mapping[OutputKind, Callable[[Agreement, Output, int], Kind]]] = {OutputKind.AGGREGATE: Aggregate}
"""By kind: (agreement, output, number of uploads of its own table) to what computes it."""
