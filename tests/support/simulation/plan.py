"""What a seed gives: the world that is played in, how many releases there are to be, and what goes wrong when."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

NAMES: Final = ("ann", "bob", "cyd", "dan")
PARTIES: Final = NAMES[:3]
"""They bring tables; ann opens and starts. dan is the analyst."""
KMS_PARTY: Final = "bob"
"""Who keeps its keys under KMS, where anybody does."""
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


_KMS_METHODS: Final = (*_METHODS, "PutKmsJoin", "PutKmsJoin")
_KMS_OPS: Final = (*_OPS, "recipient", "recipient", "kms_join", "kms_join")
_PLACES: Final = ("alone", "pair", "apart")


@dataclass(frozen=True)
class World:
    """Where a plan is played. `place`: `alone`, one coordinator over SQLite and a folder; or two over one PostgreSQL and one
    bucket, as a `pair` on one machine or `apart` on two. `kms`: one party joins by KMS. `standing`: nobody signs rosters."""

    place: str = "alone"
    kms: bool = False
    standing: bool = False

    @classmethod
    def of(cls, seed: int) -> Self:
        """The world of a seed: dice of its own, so that the steps of a plan are what they are whatever worlds there are."""
        dice = random.Random(f"world {seed}")
        return cls(dice.choice(("alone", "pair", "pair", "apart")), dice.random() < 0.5, dice.random() < 0.3)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From what `str` gives; ValueError where it is none."""
        place, *more = text.split()
        if place not in _PLACES or not set(more) <= {"kms", "standing"}:
            raise ValueError(f"{text!r} is no world: {', '.join(_PLACES)}; with kms, standing, both or neither")
        return cls(place, "kms" in more, "standing" in more)

    @property
    def shared(self) -> bool:
        """Whether several coordinators share a store."""
        return self.place != "alone"

    def __str__(self) -> str:
        return " ".join([self.place, *["kms"] * self.kms, *["standing"] * self.standing])


Draw = Callable[[random.Random], tuple[Argument, ...]]


def _call(methods: Sequence[str]) -> Draw:
    def draw(dice: random.Random) -> tuple[Argument, ...]:
        method = dice.choice(methods)
        if method == "PutKmsJoin":
            return method, KMS_PARTY
        return method, PARTIES[0] if method in ("OpenSession", "Start") else dice.choice(PARTIES)

    return draw


def _short(dice: random.Random) -> float:
    return round(dice.uniform(0.2, 2.0), 1)


def _pause(dice: random.Random) -> tuple[Argument, ...]:
    return (round(dice.uniform(0, 0.5), 2),)


def _clock(dice: random.Random) -> int:
    return dice.choice((-86_400_000, -600_000, -20_000, 20_000, 600_000, 86_400_000))


def _long(dice: random.Random) -> float:
    """Longer than a lease, more often than not."""
    return round(dice.uniform(0.5, 5.0), 1)


Kinds = dict[str, tuple[int, Draw]]
"""Kinds of steps: how often they are drawn, and what they are drawn with."""


def _everywhere(methods: Sequence[str], ops: Sequence[str]) -> Kinds:
    call = _call(methods)
    return {
        "kill-coordinator": (5, _pause),
        "kill-enclave": (5, lambda _dice: ()),
        "kill-worker": (3, lambda _dice: ()),
        "kill-module": (1, lambda _dice: ()),
        "kill-machine": (3, _pause),
        "kill-member": (4, lambda dice: (dice.choice(NAMES),)),
        "lost-request": (4, call),
        "lost-response": (6, call),
        "late-call": (3, lambda dice: (*call(dice), _short(dice))),
        "late-signature": (2, lambda dice: (dice.choice(PARTIES), CONSENT_MS / 1000 + _short(dice))),
        "repeated-call": (4, lambda dice: (*call(dice), round(dice.uniform(0, 4), 1))),
        "duplicate-upload": (3, lambda dice: (dice.choice(PARTIES), round(dice.uniform(0, 1), 1))),
        "broken-upload": (3, lambda _dice: ("bob",)),
        "cut": (2, lambda _dice: ()),
        "enclave-lost-request": (3, lambda dice: (dice.choice(ops),)),
        "enclave-lost-response": (4, lambda dice: (dice.choice(ops),)),
        "enclave-late": (2, lambda dice: (dice.choice(ops), _short(dice))),
        "enclave-pulls-break": (2, lambda dice: (dice.randrange(3),)),
        "changed-file": (3, lambda dice: (dice.choice(("bob", "cyd")),)),
        "slow-disk": (2, lambda dice: (round(dice.uniform(0.05, 0.4), 2), _short(dice))),
        "full-disk": (2, lambda dice: (_short(dice),)),
        "full-disk-of-member": (
            2,
            lambda dice: (dice.choice(NAMES), dice.choice((1, 500, 4000, 60_000)), _short(dice)),
        ),
        "clock": (2, lambda dice: (_clock(dice), _short(dice))),
        "clock-of-member": (2, lambda dice: (dice.choice(NAMES), _clock(dice), _short(dice))),
        "other-machine": (2, _pause),
        "clone": (3, lambda dice: (",".join(dice.sample(PARTIES, dice.randint(1, 3))), round(dice.uniform(0.5, 6), 1))),
    }


_SHARED: Final[Kinds] = {
    "kill-node": (8, lambda dice: (dice.choice(("holder", "holder", "other", "both")), _long(dice))),
    "pause-node": (8, lambda dice: (dice.choice(("holder", "holder", "holder", "other")), _long(dice))),
    "twin": (4, lambda dice: (dice.choice(("holder", "other")), _long(dice))),
    "switch": (4, lambda dice: (dice.choice(NAMES),)),
    "kill-database": (4, lambda dice: (dice.choice(("immediate", "kill")), _short(dice))),
    "cut-database": (5, lambda _dice: ()),
    "bucket-error": (
        8,
        lambda dice: (dice.choice(("refused", "cut", "throttled", "failed", "held")), dice.randint(1, 8)),
    ),
    "bucket-away": (3, lambda dice: (_short(dice),)),
}
_KMS: Final[Kinds] = {
    "kill-kms": (6, lambda dice: (_short(dice),)),
    "kms-error": (
        8,
        lambda dice: (
            dice.choice(("coordinator", "coordinator", "party")),
            dice.choice(("refused", "cut", "throttled", "failed", "bare", "held")),
            dice.randint(1, 4),
        ),
    ),
    "kms-away": (3, lambda dice: (dice.choice(("coordinator", "party")), _short(dice))),
    "revoke-key": (5, lambda dice: (_long(dice),)),
    "member-away": (4, lambda dice: (KMS_PARTY, round(dice.uniform(1, 8), 1))),
}


def kinds_of(world: World) -> Kinds:
    """What may go wrong in a world."""
    kinds = _everywhere(_KMS_METHODS, _KMS_OPS) if world.kms else _everywhere(_METHODS, _OPS)
    if world.shared:
        # A store that several coordinators have is on no machine that could be copied with it.
        del kinds["clone"]
        kinds |= _SHARED
    if world.kms:
        kinds |= _KMS
    return kinds


@dataclass(frozen=True)
class Plan:
    """The steps of a seed."""

    seed: int
    rounds: int
    steps: tuple[Step, ...]
    world: World = World()

    @classmethod
    def of(cls, seed: int, world: World | None = None) -> Plan:
        """The same plan for the same seed, on every machine. `world`: in place of the seed's own."""
        dice = random.Random(seed)
        world = World.of(seed) if world is None else world
        rounds = dice.choice((1, 1, 1, 2))
        drawn = kinds_of(world)
        kinds = list(drawn)
        weights = [drawn[kind][0] for kind in kinds]
        steps = []
        for number in range(1, dice.randint(3, 7) + 1):
            (kind,) = dice.choices(kinds, weights)
            # Also before the first call: the enclave starts then, which takes a third of a session's time.
            after = dice.choice((0, dice.randint(0, 6), dice.randint(0, 25)))
            steps.append(Step(after, round(dice.uniform(0, 0.3), 2), kind, drawn[kind][1](dice), number))
        return cls(seed, rounds, tuple(steps), world)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that `to_json` wrote: it stays what it is when plans are drawn in another way."""
        tree = json.loads(text)
        steps = [
            Step(after, pause_s, op, tuple(arguments), number)
            for number, after, pause_s, op, arguments in tree["steps"]
        ]
        return cls(tree["seed"], tree["rounds"], tuple(steps), World.parse(tree.get("world", "alone")))

    def to_json(self) -> str:
        """One line."""
        steps = [[step.number, step.after, step.pause_s, step.op, list(step.arguments)] for step in self.steps]
        return json.dumps({"seed": self.seed, "world": str(self.world), "rounds": self.rounds, "steps": steps})

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
        lines = [f"seed {self.seed}, {self.world}: {self.rounds} release{'s' * (self.rounds > 1)}"]
        return "\n".join([*lines, *(f"  {step.number}. {step}" for step in self.steps)])
