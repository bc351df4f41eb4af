"""Where a plan is played: one or two machines with coordinators, their enclaves, four members, and the wires between them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from parley import Member
from parley_protocol.agreement.model import Agreement
from parley_protocol.transcript import GENESIS, RecordBody
from support.client import frame_of, members
from support.simulation.actor import Nursery, Task
from support.simulation.calls import Calls, Observed, Rule
from support.simulation.invariants import Invariants
from support.simulation.link import LinkRule, Links
from support.simulation.node import Node
from support.simulation.plan import CONSENT_MS, NAMES, PARTIES, Plan, Step

ROWS: Final = {"ann": 900, "bob": 45_000, "cyd": 900}
"""bob's sealed table has more than one message of an upload."""
VERSIONS: Final = 2
"""Of each party's file; all of them stand sealed in its spool, so that equal inputs make equal records in all plays."""
IDLE_S: Final = 3.0
"""A step whose calls do not come is taken anyway."""
PATIENCE_S: Final = 90.0
"""How long a play may take to its end when nothing goes wrong any more."""
Versions = tuple[int, ...]


class Stage:
    """What all plays begin with: an agreement that all signed, and members whose tables stand sealed with nothing sent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nursery = Nursery()
        self.uploads: dict[str, list[bytes]] = {name: [] for name in PARTIES}
        """Party to the uploads of its versions."""
        made_in = folder / "made"
        made_in.mkdir(parents=True)
        with members(made_in, NAMES, analysts=["dan"], countersign_within_ms=CONSENT_MS, max_releases=16) as made:
            self.agreement: Agreement = made.agreement
            made.sign()
            made.coordinator.stop()
            shutil.copytree(made.coordinator.folder, folder / "c", ignore=lambda _at, _names: ("e",))
            made.coordinator.start()
            opened = made.connect("ann").open(made.agreement)
            for number, name in enumerate(PARTIES):
                for version in range(VERSIONS):
                    path = made.csv(name, frame_of(number + 10 * version, ROWS[name], people=2000))
                    (sealed,) = made.connect(name).session(opened.id).seal({"visits": path})
                    self.uploads[name].append(sealed.upload)
                    path.rename(path.with_name(f"visits.{version}.csv"))
            for name in NAMES:
                shutil.copytree(made_in / name, folder / name)
            tree = made.coordinator.tree
        # The rest of `made` is the root that certifies simulated enclaves, and the tree that they run.
        module = ["-m", "parley_deploy.enclave", "--root", str(made_in / "c" / "root"), "--workers", "2"]
        self.command = [sys.executable, *module, "--tree", str(tree)]
        self._oracles: dict[Versions, Oracle] = {}

    def oracle(self, versions: Versions) -> Oracle:
        """What a session in which nothing fails releases of these versions of the parties' files."""
        if versions not in self._oracles:
            folder = self.folder / f"calm-{'-'.join(map(str, versions))}"
            with Theatre(self, folder) as theatre:
                for name, version in zip(PARTIES, versions, strict=True):
                    theatre.bring(name, version)
                theatre.begin()
                theatre.finish(calm=True)
                (released,) = [line for line in theatre.log("dan") if line[0] == "released"]
            body = RecordBody.from_bytes(bytes.fromhex(released[2]))
            assert (body.sequence, body.charged, body.previous) == (1, 1, GENESIS)
            self._oracles[versions] = Oracle(body, released[3])
            shutil.rmtree(folder)
        return self._oracles[versions]

    def close(self) -> None:
        """No more plays."""
        self.nursery.close()


@dataclass(frozen=True)
class Oracle:
    """What a session releases in which nothing fails: record body, and [output, salt, plaintext], in hex digits, of each."""

    body: RecordBody
    plaintexts: list[list[str]]


@dataclass
class _Later:
    at: float
    work: Callable[[], None]
    what: str


class Theatre:
    """One play."""

    def __init__(
        self,
        stage: Stage,
        folder: Path,
        *,
        rounds: int = 1,
        patience_s: float = 4.0,
        say: Callable[[str], None] = print,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stage = stage
        self.folder = folder
        self.rounds = rounds
        self.patience_s = patience_s
        self.say = say
        self.agreement = stage.agreement
        for name in NAMES:
            shutil.copytree(stage.folder / name, folder / name)
        for name in PARTIES:
            self.bring(name, 0)
        names = {public.signing: name for name, public in self.agreement.members.items()}
        source = stage.folder / "c"
        self.links = Links(folder / "links")
        self.calls = Calls(source / "tls.crt", source / "tls.key", names)
        self.node = Node("a", source, folder / "a", self.links.control, stage.command)
        self.nodes = [self.node]
        """All machines that there ever were."""
        self.invariants = Invariants(self)
        self.calls.observe = self.invariants.observe
        self.links.saw = self.invariants.saw
        self.actors: dict[str, int] = {}
        self._options: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
        self._later: list[_Later] = []
        self.changed: set[str] = set()
        self.forked = False
        self._ended = False
        self.dying: dict[str, Path] = {}
        """Members that kill themselves at the steps in a file, and are started again."""

    def __enter__(self) -> Self:
        self.calls.start()
        self.node.start()
        self.calls.default = self.node.address
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True  # what a wire still does to a process starts none again
        for name in NAMES:
            self.end_member(name)
        self.calls.close()
        for node in self.nodes:
            node.kill()
            node.end_enclaves()
        self.links.close()

    # Members

    def member(self, name: str) -> Member:
        """A member, loaded from its files as they are now."""
        return Member.load(self.folder / name / f"{name}.key")

    @property
    def by_hand(self) -> Path:
        """The file that tells users that inputs have changed with their knowledge."""
        return self.folder / "by-hand"

    def log(self, name: str) -> list[list[Any]]:
        """What a member met, oldest first."""
        path = self.folder / f"{name}.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def start_member(self, name: str) -> None:
        """A member's process."""
        task = Task(
            name=name,
            key=str(self.folder / name / f"{name}.key"),
            address=self.calls.address,
            certificate=str(self.stage.folder / "c" / "tls.crt"),
            agreement=self.agreement.canonical.hex(),
            csv=str(self.folder / name / "visits.csv"),
            log=str(self.folder / f"{name}.log"),
            by_hand=str(self.by_hand),
            rounds=self.rounds,
            opens=name == PARTIES[0],
            patience_s=self.patience_s,
            dies=str(self.dying.get(name, "")),
            **self._options[name],
        )
        self.actors[name] = self.stage.nursery.bear(task)

    def alive(self, name: str) -> bool:
        """Whether its process runs."""
        try:
            os.kill(self.actors[name], 0)
        except ProcessLookupError:
            return False
        return True

    def done(self, name: str) -> bool:
        """Whether it holds all releases."""
        log = self.log(name)
        return bool(log) and log[-1][0] == "done"

    @property
    def over(self) -> bool:
        """Whether all members hold all releases."""
        return all(self.done(name) for name in NAMES)

    def end_member(self, name: str) -> None:
        """kill -9, for good."""
        if name in self.actors and self.alive(name):
            os.kill(self.actors[name], signal.SIGKILL)
            while self.alive(name):
                time.sleep(0.005)

    def _restart_member(self, name: str, **options: Any) -> None:
        self.end_member(name)
        self._options[name] = options
        if not self.done(name):
            self.start_member(name)

    def dies_at(self, name: str, *steps: str) -> Path:
        """Lets a member kill itself at each of some steps, one after the other; the file of those that are left."""
        path = self.folder / f"{name}.dies"
        path.write_text("\n".join(steps))
        self.dying[name] = path
        return path

    def bring(self, name: str, version: int) -> None:
        """Puts a version of a party's file where its user finds it."""
        folder = self.folder / name
        part = folder / "visits.part"
        shutil.copy(folder / f"visits.{version}.csv", part)
        part.replace(folder / "visits.csv")

    # A play

    def play(self, plan: Plan) -> None:
        """Plays a plan to its end; AssertionError names the invariant that does not hold."""
        self.begin()
        for step in plan.steps:
            self._wait(step)
            self.say(f"  {step.number}. {step}{'' if self._take(step) else ': nothing there'}")
            self.invariants.check(f"after step {step.number}, {step.op}")
        self.finish()

    def begin(self) -> None:
        """All members begin."""
        for name in NAMES:
            self.start_member(name)

    def finish(self, *, calm: bool = False) -> None:
        """Nothing more goes wrong than what stands already: all members must get to their end. `calm`: nothing went wrong."""
        end = time.monotonic() + PATIENCE_S
        while not self.over:
            self._tend()
            for name in NAMES:
                if name in self.dying and not self.alive(name) and not self.done(name):
                    self.start_member(name)
                elif not self.alive(name) and not self.done(name):
                    self.invariants.check("at the end")
                    raise AssertionError(
                        f"ends: {name}'s process is gone before its releases are here: {self.log(name)[-1:]}"
                    )
            if time.monotonic() > end:
                self.invariants.check("at the end")
                waiting = {name: self.log(name)[-3:] for name in NAMES if not self.done(name)}
                phases = self.node.rows("SELECT number, phase, code FROM sessions")
                raise AssertionError(f"ends: no release within {PATIENCE_S:.0f} s: {waiting}; sessions {phases}")
            time.sleep(0.05)
        missed = [str(rule) for rule in self.calls.rules if not rule.struck]
        missed += [str(rule) for rule in self.links.rules if not rule.struck]
        if missed:
            self.say(f"  not met: {', '.join(missed)}")
        while self._later:
            self._tend()
        self.invariants.check("at the end")
        if not calm:
            self.invariants.check_end()

    def _wait(self, step: Step) -> None:
        goal = self.calls.count + step.after
        end = time.monotonic() + IDLE_S
        while self.calls.count < goal and time.monotonic() < end and not self.over:
            self._tend()
            time.sleep(0.005)
        end = time.monotonic() + step.pause_s
        while time.monotonic() < end:
            self._tend()
            time.sleep(0.005)

    def _tend(self) -> None:
        now = time.monotonic()
        due = [later for later in self._later if later.at <= now]
        self._later = [later for later in self._later if later.at > now]
        for later in due:
            later.work()

    def _after(self, seconds: float, what: str, work: Callable[[], None]) -> None:
        self._later.append(_Later(time.monotonic() + seconds, work, what))

    def all_consent(self) -> bool:
        """Whether all parties' consents to the roster that stands are stored."""
        query = (
            "SELECT count(*) FROM countersignatures JOIN sessions USING (roster)"
            " WHERE phase IN ('rostered', 'computing')"
        )
        return self.node.rows(query) == [(len(PARTIES),)]

    # Steps

    def _take(self, step: Step) -> bool:
        """Does what a step says; whether there was anything to do it to."""
        name = step.op.replace("-", "_")
        work = getattr(self, name, None) or getattr(self, "_" + name)
        return bool(work(*step.arguments))

    def _start_node(self, node: Node) -> None:
        if self._ended:
            return
        node.start()
        if node is self.node:
            self.calls.default = node.address
        for name, address in self.calls.routes.items():
            if address in node.addresses:
                self.calls.routes[name] = node.address

    def kill_coordinator(self, pause_s: float) -> bool:
        """kill -9, and a new start after a pause."""
        self.node.kill()
        time.sleep(pause_s)
        self._start_node(self.node)
        return True

    def kill_enclave(self) -> bool:
        """kill -9."""
        return _kill(self.node.enclave())

    def kill_worker(self) -> bool:
        """kill -9 of one of the enclave's."""
        workers = self.node.workers()
        return bool(workers) and _kill(workers[-1])

    def kill_module(self) -> bool:
        """kill -9 of the security module: the enclave ends with it."""
        return _kill(self.node.nsm())

    def kill_machine(self, pause_s: float) -> bool:
        """Power cut: coordinator and enclave; the coordinator starts again."""
        self.node.kill()
        self.node.end_enclaves()
        time.sleep(pause_s)
        self._start_node(self.node)
        return True

    def kill_member(self, name: str) -> bool:
        """kill -9; its user starts it again."""
        if not self.alive(name):
            return False
        self._restart_member(name, **self._options[name])
        return True

    def _lost_request(self, method: str, member: str) -> bool:
        self.calls.arm(Rule("lost-request", method, member))
        return True

    def _lost_response(self, method: str, member: str) -> bool:
        self.calls.arm(Rule("lost-response", method, member))
        return True

    def _late_call(self, method: str, member: str, seconds: float) -> bool:
        self.calls.arm(Rule("held", method, member, seconds))
        return True

    def _late_signature(self, member: str, seconds: float) -> bool:
        return self._late_call("PutCountersignature", member, seconds)

    def _repeated_call(self, method: str, member: str, seconds: float) -> bool:
        self.calls.arm(Rule("twice", method, member, seconds))
        return True

    def _duplicate_upload(self, member: str, seconds: float) -> bool:
        return self._repeated_call("Upload", member, seconds)

    def _broken_upload(self, member: str) -> bool:
        self.calls.arm(Rule("broken", "Upload", member))
        return True

    def _cut(self) -> bool:
        self.calls.cut()
        return True

    def _enclave_lost_request(self, op: str) -> bool:
        self.links.arm(LinkRule("lost-request", op))
        return True

    def _enclave_lost_response(self, op: str) -> bool:
        self.links.arm(LinkRule("lost-response", op))
        return True

    def _enclave_late(self, op: str, seconds: float) -> bool:
        self.links.arm(LinkRule("held", op, seconds))
        return True

    def _enclave_pulls_break(self, pulls: int) -> bool:
        self.links.arm(LinkRule("broken", "pull", skip=pulls))
        return True

    def changed_file(self, name: str) -> bool:
        """A user puts another version of its file in place, and starts again."""
        if name in self.changed or self.done(name):
            return False
        self.end_member(name)
        self.changed.add(name)
        self.by_hand.touch()
        self.bring(name, 1)
        self.start_member(name)
        return True

    def _slow_disk(self, sync_s: float, seconds: float) -> bool:
        node = self.node
        node.hinder(disk_s=sync_s)
        self._after(seconds, "the disk is fast again", node.hinder)
        return True

    def _full_disk(self, seconds: float) -> bool:
        node = self.node
        node.fill_disk(full=True)
        self._after(seconds, "the disk has room again", lambda: node.fill_disk(full=False))
        return True

    def _full_disk_of_member(self, name: str, most: int, seconds: float) -> bool:
        if self.done(name):
            return False
        self._restart_member(name, file_bytes=most)
        self._after(seconds, "a member's disk has room again", lambda: self._restart_member(name))
        return True

    def _clock(self, ahead_ms: int, seconds: float) -> bool:
        node = self.node
        node.hinder(clock_ms=ahead_ms)
        self._after(seconds, "the clock is right again", node.hinder)
        return True

    def _clock_of_member(self, name: str, ahead_ms: int, seconds: float) -> bool:
        if self.done(name):
            return False
        self._restart_member(name, ahead_s=ahead_ms / 1000)
        self._after(seconds, "a member's clock is right again", lambda: self._restart_member(name))
        return True

    def _other_machine(self, pause_s: float) -> bool:
        """The machine dies with its enclaves; its disk goes on in another one."""
        before = self.node
        before.kill()
        before.end_enclaves()
        time.sleep(pause_s)
        self._take_over(before)
        return True

    def _take_over(self, before: Node) -> None:
        label = chr(ord("a") + len(self.nodes))
        self.node = Node(label, before.folder, self.folder / label, self.links.control, self.stage.command)
        self.nodes.append(self.node)
        self.invariants.continues(before, self.node)
        self._start_node(self.node)

    def _clone(self, victims: str, seconds: float) -> bool:
        """The host takes a copy of its store to a second machine, which launches an enclave of its own; some members are
        led there, and led back when it ends."""
        if self.forked:
            return False
        self.forked = True
        honest, label = self.node, chr(ord("a") + len(self.nodes))
        taken = self.folder / f"{label}.taken"
        honest.snapshot(taken)
        second = Node(label, taken, self.folder / label, self.links.control, self.stage.command)
        self.nodes.append(second)
        self.invariants.forks(honest, second)
        second.start()
        for name in victims.split(","):
            self.calls.routes[name] = second.address

        def end() -> None:
            # The honest one may have gone to another machine meanwhile.
            survivor, other = (second, self.node) if _longer(second, self.node) else (self.node, second)
            self.node = survivor
            self.calls.default = survivor.address
            self.calls.routes.clear()
            other.kill()
            other.end_enclaves()

        self._after(seconds, "the clone is gone", end)
        return True


def _longer(one: Node, other: Node) -> bool:
    count = "SELECT count(*) FROM records"
    return bool(one.rows(count) > other.rows(count))


def _kill(pid: int | None) -> bool:
    if pid is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def observed_by(calls: Calls) -> list[Observed]:
    """All calls from now on."""
    seen: list[Observed] = []
    before = calls.observe

    def observe(observed: Observed) -> None:
        seen.append(observed)
        before(observed)

    calls.observe = observe
    return seen
