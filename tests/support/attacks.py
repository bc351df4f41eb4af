"""An attack: what is tried, with which error the honest side answers, and which checks stand in the way.

One list of them serves two tests: each attack is refused as it says, and succeeds once the checks that it names are taken
out, so that neither test can pass for another reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from parley_protocol import bundle, chain, claims
from parley_protocol.agreement import signed
from parley_protocol.attestation import chain as certificates
from parley_protocol.attestation import verify as attestation
from parley_protocol.errors import MalformedError, ParleyError, RefusedError, VerificationError
from support.mutants import without

CHECKERS: tuple[ModuleType, ...] = (claims, chain, bundle, attestation, certificates, signed)
"""Where a client's checks stand."""


@dataclass(frozen=True)
class Attack:
    """`act` is given what the test has set up; it returns what the honest side accepted, or raises its error.

    `step` refuses it; `others` would refuse it next, in this order, so that the attack succeeds without all of them.
    """

    name: str
    step: str
    act: Callable[[Any], object]
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def refusal(act: Callable[[], object]) -> str:
    """The step of the error that `act` raises, or its code where it has no step; fails when nothing is refused."""
    with pytest.raises(ParleyError) as caught:
        act()
    return told(caught.value)


def told(error: ParleyError) -> str:
    """What an error says to a program: the step that refused, else the code."""
    if isinstance(error, VerificationError):
        return error.step
    assert isinstance(error, (MalformedError, RefusedError)) or error.code, error
    return error.code


def check_refused(attack: Attack, stage: Any) -> None:
    """The attack fails at its step."""
    assert refusal(lambda: attack.act(stage)) == attack.step


def check_can_fail(attack: Attack, stage: Any) -> None:
    """Without its check the attack meets the next one, and without all of them it succeeds."""
    with ExitStack() as stack:
        for step, following in zip((attack.step, *attack.others), (*attack.others, None), strict=True):
            stack.enter_context(without(step, *CHECKERS))
            if following is not None:
                assert refusal(lambda: attack.act(stage)) == following
        assert attack.act(stage) is not None
