"""What a seed gives: how many releases there are to be, and what goes wrong when."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

NAMES: Final = ("ann", "bob", "cyd", "dan")
PARTIES: Final = NAMES[:3]
"""They bring tables; ann opens and starts. dan is the analyst."""
CONSENT_MS: Final = 6000
"""How long a roster stands."""
Argument = str | float | int


@dataclass(frozen=True)
class Step:
    """One thing that happens: when `after` more calls of members have ended, and `pause_s` later."""

    after: int
    pause_s: float
    op: str
    arguments: tuple[Argument, ...] = ()
    number: int = 0
    """Its place in the plan of its seed."""

    def __str__(self) -> str:
        said = " ".join(
            f"{argument:.1f}" if isinstance(argument, float) else str(argument) for argument in self.arguments
        )
        return f"{self.op} {said}".rstrip() + f" (after {self.after} calls and {self.pause_s:.2f} s)"


_METHODS: Final = (
    *("OpenSession", "Attest", "Upload", "GetUpload", "PutJoin", "PutJoin", "Start", "GetRoster"),
    *("PutCountersignature", "PutCountersignature", "GetBundle", "GetChain", "GetSession", "Inbox"),
)
_OPS: Final = ("load", "begin", "attest", "join", "join", "start", "countersign", "countersign", "stored", "status")


def _call(dice: random.Random) -> tuple[Argument, ...]:
    method = dice.choice(_METHODS)
    return method, PARTIES[0] if method in ("OpenSession", "Start") else dice.choice(PARTIES)


def _short(dice: random.Random) -> float:
    return round(dice.uniform(0.2, 2.0), 1)


def _name(dice: random.Random) -> tuple[Argument, ...]:
    return (dice.choice(PARTIES),)


def _pause(dice: random.Random) -> tuple[Argument, ...]:
    return (round(dice.uniform(0, 0.5), 2),)


def _clock(dice: random.Random) -> int:
    return dice.choice((-86_400_000, -600_000, -20_000, 20_000, 600_000, 86_400_000))


_KINDS: Final[dict[str, tuple[int, Callable[[random.Random], tuple[Argument, ...]]]]] = {
    "kill-coordinator": (5, _pause),
    "kill-enclave": (5, lambda _dice: ()),
    "kill-worker": (3, lambda _dice: ()),
    "kill-module": (1, lambda _dice: ()),
    "kill-machine": (3, _pause),
    "kill-member": (4, lambda dice: (dice.choice(NAMES),)),
    "lost-request": (4, _call),
    "lost-response": (6, _call),
    "late-call": (3, lambda dice: (*_call(dice), _short(dice))),
    "late-signature": (2, lambda dice: (dice.choice(PARTIES), CONSENT_MS / 1000 + _short(dice))),
    "repeated-call": (4, lambda dice: (*_call(dice), round(dice.uniform(0, 4), 1))),
    "duplicate-upload": (3, lambda dice: (dice.choice(PARTIES), round(dice.uniform(0, 1), 1))),
    "broken-upload": (3, lambda _dice: ("bob",)),
    "cut": (2, lambda _dice: ()),
    "enclave-lost-request": (3, lambda dice: (dice.choice(_OPS),)),
    "enclave-lost-response": (4, lambda dice: (dice.choice(_OPS),)),
    "enclave-late": (2, lambda dice: (dice.choice(_OPS), _short(dice))),
    "enclave-pulls-break": (2, lambda dice: (dice.randrange(3),)),
    "changed-file": (3, lambda dice: (dice.choice(("bob", "cyd")),)),
    "slow-disk": (2, lambda dice: (round(dice.uniform(0.05, 0.4), 2), _short(dice))),
    "full-disk": (2, lambda dice: (_short(dice),)),
    "full-disk-of-member": (2, lambda dice: (dice.choice(NAMES), dice.choice((1, 500, 4000, 60_000)), _short(dice))),
    "clock": (2, lambda dice: (_clock(dice), _short(dice))),
    "clock-of-member": (2, lambda dice: (dice.choice(NAMES), _clock(dice), _short(dice))),
    "other-machine": (2, _pause),
    "clone": (3, lambda dice: (",".join(dice.sample(PARTIES, dice.randint(1, 3))), round(dice.uniform(0.5, 6), 1))),
}
"""Kinds of steps: how often they are drawn, and what they are drawn with."""


@dataclass(frozen=True)
class Plan:
    """The steps of a seed."""

    seed: int
    rounds: int
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, seed: int) -> Plan:
        """The same plan for the same seed, on every machine."""
        dice = random.Random(seed)
        rounds = dice.choice((1, 1, 1, 2))
        kinds = list(_KINDS)
        weights = [_KINDS[kind][0] for kind in kinds]
        steps = []
        for number in range(1, dice.randint(3, 7) + 1):
            (kind,) = dice.choices(kinds, weights)
            # Also before the first call: the enclave starts then, which takes a third of a session's time.
            after = dice.choice((0, dice.randint(0, 6), dice.randint(0, 25)))
            steps.append(Step(after, round(dice.uniform(0, 0.3), 2), kind, _KINDS[kind][1](dice), number))
        return cls(seed, rounds, tuple(steps))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that `to_json` wrote: it stays what it is when plans are drawn in another way."""
        tree = json.loads(text)
        steps = [
            Step(after, pause_s, op, tuple(arguments), number)
            for number, after, pause_s, op, arguments in tree["steps"]
        ]
        return cls(tree["seed"], tree["rounds"], tuple(steps))

    def to_json(self) -> str:
        """One line."""
        steps = [[step.number, step.after, step.pause_s, step.op, list(step.arguments)] for step in self.steps]
        return json.dumps({"seed": self.seed, "rounds": self.rounds, "steps": steps})

    def only(self, numbers: Collection[int]) -> Plan:
        """The same with some of the steps."""
        return replace(self, steps=tuple(step for step in self.steps if step.number in numbers))

    def without(self, number: int) -> Plan:
        """The same without one step."""
        return replace(self, steps=tuple(step for step in self.steps if step.number != number))

    @property
    def numbers(self) -> str:
        """The numbers of its steps: 1,3,4."""
        return ",".join(str(step.number) for step in self.steps)

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.rounds} release{'s' * (self.rounds > 1)}"]
        return "\n".join([*lines, *(f"  {step.number}. {step}" for step in self.steps)])
