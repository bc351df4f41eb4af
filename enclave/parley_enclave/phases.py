"""The phases of an enclave, and the one table that says which operation is possible when (SPEC, "Phases").

The table is the whole truth: `Phases` refuses an operation that the table does not name, and a move that it does not allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from parley_protocol.errors import RefusedError


class Phase(Enum):
    """Where an enclave stands. `lost` ends its session, not the enclave."""

    EMPTY = "empty"
    LOADED = "loaded"
    OPEN = "open"
    ROSTERED = "rostered"
    COMPUTING = "computing"
    RELEASED = "released"
    LOST = "lost"


class Op(Enum):
    """What may happen: the operations of the host, then the three events of the enclave itself."""

    LOAD = "load"
    BEGIN = "begin"
    ATTEST = "attest"
    JOIN = "join"
    RECIPIENT = "recipient"
    KMS_JOIN = "kms_join"
    START = "start"
    COUNTERSIGN = "countersign"
    REFUSE = "refuse"
    STORED = "stored"
    LAPSE = "lapse"
    FINISH = "finish"
    FAIL = "fail"


_E, _L, _O, _R, _C, _D, _X = Phase

TABLE: Final[Mapping[Phase, Mapping[Op, frozenset[Phase]]]] = {
    phase: {op: frozenset(targets) for op, targets in row.items()}
    for phase, row in {
        _E: {Op.LOAD: {_L}},
        _L: {Op.LOAD: {_L}, Op.BEGIN: {_O}, Op.STORED: {_L}},
        _O: {
            Op.LOAD: {_O},
            Op.BEGIN: {_O},
            Op.ATTEST: {_O},
            Op.JOIN: {_O},
            Op.RECIPIENT: {_O},
            Op.KMS_JOIN: {_O},
            Op.START: {_R, _C},
        },
        _R: {
            Op.LOAD: {_R},
            Op.BEGIN: {_R},
            Op.ATTEST: {_R},
            Op.JOIN: {_R},
            Op.START: {_R},
            Op.COUNTERSIGN: {_R, _C, _X},
            Op.REFUSE: {_O},
            Op.LAPSE: {_O},
        },
        _C: {
            Op.LOAD: {_C},
            Op.BEGIN: {_C},
            Op.ATTEST: {_C},
            Op.JOIN: {_C},
            Op.START: {_C},
            Op.COUNTERSIGN: {_C},
            Op.FINISH: {_D},
            Op.FAIL: {_X},
        },
        _D: {
            Op.LOAD: {_D},
            Op.BEGIN: {_D},
            Op.ATTEST: {_D},
            Op.START: {_D},
            Op.COUNTERSIGN: {_D},
            Op.STORED: {_L},
        },
        _X: {Op.LOAD: {_X}, Op.BEGIN: {_O}},
    }.items()
}
"""For each phase the operations that are possible in it, and for each the phases in which it may leave the enclave.

An operation that is named with its own phase alone changes nothing there: it is repeated, and answered as before.
"""


class Phases:
    """The present phase. Not thread-safe: whoever owns it holds a lock."""

    def __init__(self) -> None:
        self._phase = Phase.EMPTY

    @property
    def now(self) -> Phase:
        """The present phase."""
        return self._phase

    def require(self, op: Op) -> Phase:
        """The present phase, in which `op` is possible; RefusedError "phase" where it is not (ses-1)."""
        if op not in TABLE[self._phase]:
            raise RefusedError("phase")
        return self._phase

    def move(self, op: Op, target: Phase) -> None:
        """Goes to `target` because of `op`; RefusedError "phase" where the table does not allow it."""
        if target not in TABLE[self.require(op)][op]:
            raise RefusedError("phase")
        self._phase = target
