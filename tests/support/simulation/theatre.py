"""Where a plan is played: machines with coordinators, their enclaves and what is behind them, four members, and the wires
between them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from parley import Member
from parley_deploy.nsm import LocalRoot
from parley_deploy.pki import system_now_ms
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.agreement.model import Agreement, Consent
from parley_protocol.transcript import GENESIS, RecordBody
from support.aws import PRINCIPALS, Aws, aws
from support.client import frame_of, members
from support.simulation.actor import Nursery, Task
from support.simulation.calls import Calls, Observed, Rule
from support.simulation.front import Front, FrontRule
from support.simulation.invariants import Invariants
from support.simulation.link import LinkRule, Links
from support.simulation.node import Node
from support.simulation.plan import CONSENT_MS, KMS_PARTY, NAMES, PARTIES, Plan, Step, World
from support.simulation.services import PartyKms, Services
from support.simulation.stores import Shared, Store, copied

ROWS: Final = {"ann": 900, "bob": 45_000, "cyd": 900}
"""bob's sealed table has more than one message of an upload."""
VERSIONS: Final = 2
"""Of each party's file; all of them stand sealed in its spool, so that equal inputs make equal records in all plays."""
IDLE_S: Final = 3.0
"""A step whose calls do not come is taken anyway."""
PATIENCE_S: Final = 150.0
"""How long a play may take to its end when nothing goes wrong any more."""
GLANCE_S: Final = 0.3
"""How often it is looked at who serves which session, beside the checks after steps."""
Versions = tuple[int, ...]


class Stage:
    """What all plays begin with: an agreement that all signed, and members whose tables stand sealed with nothing sent."""

    def __init__(
        self,
        folder: Path,
        *,
        kms: bool = False,
        standing: bool = False,
        nursery: Nursery | None = None,
        services: Services | None = None,
    ) -> None:
        self.folder = folder
        self._own = ExitStack()
        self.nursery = nursery or Nursery()
        self.services = services or Services()
        if nursery is None:
            self._own.callback(self.nursery.close)
        if services is None:
            self._own.callback(self.services.close)
        self.kms = kms
        self.key: KeyArn | None = None
        """Of the party that keeps its keys under KMS."""
        self.uploads: dict[str, list[bytes]] = {name: [] for name in PARTIES}
        """Party to the uploads of its versions."""
        self._template = ""
        made_in = folder / "made"
        self.root = made_in / "c" / "root"
        self.root.mkdir(parents=True)
        LocalRoot.create(system_now_ms()).save(self.root)
        with ExitStack() as stack:
            # What is left of it: accounts and keys.
            cloud = stack.enter_context(aws(folder / "kms", self.root)) if kms else None
            self._make(made_in, cloud, Consent.STANDING if standing else Consent.ROSTER)
        # The rest of `made` is the root that certifies simulated enclaves, and the tree that they run.
        module = ["-m", "parley_deploy.enclave", "--root", str(self.root), "--workers", "2"]
        self.command = [sys.executable, *module, "--tree", str(made_in / "tree")]
        self._oracles: dict[Versions, Oracle] = {}

    def _make(self, made_in: Path, cloud: Aws | None, consent: Consent) -> None:
        self.key = cloud.make_key() if cloud is not None else None
        session: dict[str, Any] = {"countersign_within_ms": CONSENT_MS, "max_releases": 16, "consent": consent}
        kms = {KMS_PARTY: self.key} if self.key is not None else {}
        with members(made_in, NAMES, analysts=["dan"], kms=kms, **session) as made:
            self.agreement: Agreement = made.agreement
            made.sign()
            if cloud is not None and self.key is not None:
                cloud.agree(self.key, made.agreement)
                made.members[KMS_PARTY].state.remember_principals(self.key.text, PRINCIPALS)
            made.coordinator.stop()
            shutil.copytree(made.coordinator.folder, self.folder / "c", ignore=lambda _at, _names: ("e",))
            made.coordinator.start()
            opened = made.connect("ann").open(made.agreement)
            for number, name in enumerate(PARTIES):
                for version in range(VERSIONS):
                    path = made.csv(name, frame_of(number + 10 * version, ROWS[name], people=2000))
                    (sealed,) = made.connect(name).session(opened.id).seal({"visits": path})
                    self.uploads[name].append(sealed.upload)
                    path.rename(path.with_name(f"visits.{version}.csv"))
            for name in NAMES:
                shutil.copytree(made_in / name, self.folder / name)

    def shared(self) -> Shared:
        """A new store for several coordinators, with what the agreement's signing has left."""
        cluster = self.services.cluster
        self._template = self._template or copied(cluster, self.folder / "c" / "coordinator.db")
        return Shared(cluster, self._template, self.services.s3)

    def oracle(self, versions: Versions) -> Oracle:
        """What a session in which nothing fails releases of these versions of the parties' files."""
        if versions not in self._oracles:
            folder = self.folder / f"calm-{'-'.join(map(str, versions))}"
            with Theatre(self, folder, World(kms=self.kms)) as theatre:
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
        self._own.close()


class Stages:
    """The stages of all worlds, each made when the first plan is played there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nursery = Nursery()
        self._services = Services()
        self._made: dict[tuple[bool, bool], Stage] = {}

    def of(self, world: World) -> Stage:
        """The stage of a world."""
        kind = world.kms, world.standing
        if kind not in self._made:
            self._made[kind] = Stage(
                self._folder / str(len(self._made)),
                kms=world.kms,
                standing=world.standing,
                nursery=self._nursery,
                services=self._services,
            )
        return self._made[kind]

    def close(self) -> None:
        """No more plays."""
        self._nursery.close()
        self._services.close()


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
        world: World | None = None,
        *,
        rounds: int = 1,
        patience_s: float = 4.0,
        say: Callable[[str], None] = print,
    ) -> None:
        self._stack = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        self.stage = stage
        self.folder = folder
        self.world = world or World()
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
        self.nodes: list[Node] = []
        """All coordinators that there ever were."""
        self.homes: dict[str, Node] = {}
        """Where members go, of several coordinators, as long as that one is there."""
        self.actors: dict[str, int] = {}
        self._options: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
        self._later: list[_Later] = []
        self._lock = threading.Lock()
        self._glance_at = 0.0
        self.changed: set[str] = set()
        self.forked = False
        self._ended = False
        self._away: set[str] = set()
        """Members whose user has ended them, and comes back."""
        self.dying: dict[str, Path] = {}
        """Members that kill themselves at the steps in a file, and are started again."""
        self.shared: Shared | None = None
        self.kms: PartyKms | None = None

    def __enter__(self) -> Self:
        try:
            self._enter()
        except BaseException:
            self._exit()
            raise
        return self

    def _enter(self) -> None:
        # Whoever comes first goes last.
        self._stack.callback(self.links.close)
        if self.world.shared:
            self.shared = self.stage.shared()
            self._stack.callback(self.shared.close)
        if self.world.kms:
            assert self.stage.key is not None
            self.kms = PartyKms(self.folder / "kms", self.stage.root, self.stage.key, self.stage.folder / "kms")
            self._stack.callback(self.kms.close)
        self._made(self.stage.folder / "c")
        if self.world.shared:
            self._made(self.stage.folder / "c")
        self._node = self.nodes[0]
        self.homes = {name: self.nodes[number % len(self.nodes)] for number, name in enumerate(NAMES)}
        self.invariants = Invariants(self)
        self.calls.observe = self.invariants.observe
        self.links.saw = self.invariants.saw
        if self.kms is not None:
            self.kms.fronts["coordinator"].saw = self.invariants.asked
        self.calls.start()
        for node in self.nodes:
            node.start()
        self.calls.default = self.node.address
        self._lead()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit()

    def _exit(self) -> None:
        self._ended = True  # what a wire still does to a process starts none again
        for name in NAMES:
            self.end_member(name)
        self.calls.close()
        for node in self.nodes:
            node.kill()
        for node in self.nodes:
            node.end_enclaves()
        self._stack.close()

    # Coordinators

    @property
    def node(self) -> Node:
        """The coordinator that a step means: of several the one that serves the newest session, or any that runs."""
        if self.shared is None:
            return self._node
        holders = self.shared.rows("SELECT holder FROM leases ORDER BY number DESC LIMIT 1")
        running = [node for node in self.nodes if node.alive] or self.nodes[-1:]
        return next((node for node in running if (node.name,) in holders), running[0])

    @property
    def stores(self) -> list[Store]:
        """All stores that there ever were."""
        found = {id(node.store): node.store for node in self.nodes}
        return [store for store in found.values() if store.there]

    def _made(self, source: Path, *, twin: bool = False) -> Node:
        """One more coordinator, not started."""
        label = chr(ord("a") + len(self.nodes))
        node = Node(
            label,
            source,
            self.folder / label,
            self.links.control,
            self.stage.command,
            shared=self.shared,
            twin=twin,
            enclaves=self.folder / "e" if self.world.place == "pair" else None,
            toml=self.kms.toml() if self.kms is not None else "",
            environment=self.kms.environment() if self.kms is not None else None,
        )
        self.nodes.append(node)
        return node

    def _lead(self) -> None:
        """Leads members to coordinators that run, as a balancer does: each to its own one while that is there."""
        if self.shared is None:
            return
        running = [node for node in self.nodes if node.alive]
        for name, home in self.homes.items():
            if running:
                self.calls.routes[name] = (home if home.alive else running[0]).address

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
            environment=self.kms.of_party() if self.kms is not None and name == KMS_PARTY else {},
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
        if not self.done(name) and name not in self._away:
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

    def finish(self, *, calm: bool = False, patience_s: float = PATIENCE_S) -> None:
        """Nothing more goes wrong than what stands already: all members must get to their end. `calm`: nothing went wrong."""
        end = time.monotonic() + patience_s
        while not self.over:
            self._tend()
            for name in NAMES:
                if name in self._away:
                    continue
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
                raise AssertionError(f"ends: no release within {patience_s:.0f} s: {waiting}; sessions {phases}")
            time.sleep(0.05)
        missed = [str(rule) for rule in self.calls.rules if not rule.struck]
        missed += [str(rule) for rule in self.links.rules if not rule.struck]
        missed += [str(rule) for front in self._fronts() for rule in front.rules if not rule.struck]
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
        if self.shared is not None and now >= self._glance_at:
            self._glance_at = now + GLANCE_S
            self.invariants.glance()
        with self._lock:
            due = [later for later in self._later if later.at <= now]
            self._later = [later for later in self._later if later.at > now]
        for later in due:
            later.work()

    def _after(self, seconds: float, what: str, work: Callable[[], None]) -> None:
        with self._lock:  # also in the threads of wires
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
        if self._ended or node.alive:
            return
        node.start()
        if self.shared is not None:
            self._lead()
            return
        if node is self.node:
            self.calls.default = node.address
        for name, address in self.calls.routes.items():
            if address in node.addresses:
                self.calls.routes[name] = node.address

    def kill_coordinator(self, pause_s: float) -> bool:
        """kill -9, and a new start after a pause."""
        node = self.node
        node.kill()
        self._lead()
        time.sleep(pause_s)
        self._start_node(node)
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
        node = self.node
        # All coordinators of that machine.
        ended = [other for other in self.nodes if other.alive and other.enclaves_folder == node.enclaves_folder]
        for other in ended:
            other.kill()
        node.end_enclaves()
        self._lead()
        time.sleep(pause_s)
        for other in ended:
            self._start_node(other)
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
        if name not in self._away:
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
        """The machine dies with its enclaves; its disk goes on in another one. Of several coordinators one does, whose store is
        elsewhere: another one takes its place."""
        before = self.node
        before.kill()
        if self.world.place != "pair":
            before.end_enclaves()
        self._lead()
        time.sleep(pause_s)
        after = self._made(before.folder)
        if self.shared is None:
            self._node = after
            self.invariants.continues(before, after)
        else:
            self.homes = {name: after if home is before else home for name, home in self.homes.items()}
        self._start_node(after)
        return True

    def _clone(self, victims: str, seconds: float) -> bool:
        """The host takes a copy of its store to a second machine, which launches an enclave of its own; some members are
        led there, and led back when it ends."""
        if self.forked:
            return False
        self.forked = True
        honest = self.node
        taken = self.folder / f"taken-{len(self.nodes)}"
        honest.snapshot(taken)
        second = self._made(taken)
        self.invariants.forks(honest, second)
        second.start()
        for name in victims.split(","):
            self.calls.routes[name] = second.address

        def end() -> None:
            # The honest one may have gone to another machine meanwhile.
            survivor, other = (second, self.node) if _longer(second, self.node) else (self.node, second)
            self._node = survivor
            self.calls.default = survivor.address
            self.calls.routes.clear()
            other.kill()
            other.end_enclaves()

        self._after(seconds, "the clone is gone", end)
        return True

    # Several coordinators over one store

    def _which(self, which: str) -> list[Node]:
        running = [node for node in self.nodes if node.alive]
        holder = self.node
        match which:
            case "holder":
                return [holder] if holder.alive else []
            case "other":
                return [node for node in running if node is not holder][:1]
            case _:
                return running

    def kill_node(self, which: str, seconds: float) -> bool:
        """kill -9 of the coordinator that serves the session, of another one, or of both; each starts again after a while."""
        killed = self._which(which)
        for node in killed:
            node.kill()
        self._lead()
        for node in killed:
            self._after(seconds, "a coordinator starts again", lambda node=node: self._start_node(node))  # type: ignore[misc]
        return bool(killed)

    def _pause_node(self, which: str, seconds: float) -> bool:
        """It stands still, and goes on as if nothing had been; members that are led there wait."""
        paused = [node for node in self._which(which) if node.pause()]
        for node in paused:
            self._after(seconds, "a coordinator goes on", node.go_on)
        return bool(paused)

    def _twin(self, which: str, seconds: float) -> bool:
        """A second machine starts with the folder of a coordinator that still runs: both are called alike in the store."""
        found = self._which(which)
        if not found:
            return False
        second = self._made(found[0].folder, twin=True)
        self._start_node(second)
        self.homes[PARTIES[-1]] = second

        def end() -> None:
            second.kill()
            if self.world.place != "pair":
                second.end_enclaves()
            self.homes = {name: found[0] if home is second else home for name, home in self.homes.items()}
            self._lead()

        self._lead()
        self._after(seconds, "the twin is gone", end)
        return True

    def _switch(self, name: str) -> bool:
        """A member is led to another coordinator from now on."""
        others = [node for node in self.nodes if node.alive and node is not self.homes[name]]
        if not others:
            return False
        self.homes[name] = others[0]
        self._lead()
        return True

    def _kill_database(self, mode: str, pause_s: float) -> bool:
        """Its server crashes, or is killed, and starts again after a pause."""
        assert self.shared is not None
        cluster = self.shared.cluster
        if mode == "kill":
            cluster.kill()
        else:
            cluster.stop(mode)
        time.sleep(pause_s)
        cluster.start()
        return True

    def _cut_database(self) -> bool:
        assert self.shared is not None
        return self.shared.cut() > 0

    def _bucket_error(self, fault: str, count: int) -> bool:
        assert self.shared is not None
        self.shared.front.arm(FrontRule(fault, count=count, seconds=0.5))
        return True

    def _bucket_away(self, seconds: float) -> bool:
        assert self.shared is not None
        return self._nobody(self.shared.front, seconds)

    def _nobody(self, front: Front, seconds: float) -> bool:
        front.away = True

        def back() -> None:
            front.away = False

        self._after(seconds, "somebody is there again", back)
        return True

    def _fronts(self) -> list[Front]:
        kms = list(self.kms.fronts.values()) if self.kms is not None else []
        return [*kms, *([self.shared.front] if self.shared is not None else [])]

    # A party's KMS

    def kill_kms(self, pause_s: float) -> bool:
        """kill -9, and a new start after a pause."""
        assert self.kms is not None
        self.kms.kill()
        time.sleep(pause_s)
        if not self._ended:
            self.kms.start()
        return True

    def _kms_error(self, who: str, fault: str, count: int) -> bool:
        assert self.kms is not None
        self.kms.fronts[who].arm(FrontRule(fault, count=count, seconds=0.5))
        return True

    def _kms_away(self, who: str, seconds: float) -> bool:
        assert self.kms is not None
        return self._nobody(self.kms.fronts[who], seconds)

    def _revoke_key(self, seconds: float) -> bool:
        """The party takes the enclaves out of its key's policy, and lets them in again later."""
        kms = self.kms
        assert kms is not None
        if not kms.revoke():
            return False
        self.invariants.revoked(taken=True)

        def again() -> None:
            # What KMS answers while the policy changes is right either way.
            self.invariants.revoked(taken=False)
            if not kms.allow(self.agreement):
                self._after(0.5, "the key is asked again", again)

        self._after(seconds, "the key opens again", again)
        return True

    def _member_away(self, name: str, seconds: float) -> bool:
        """Its user ends it, and comes back later: a party that joins by KMS need not be there."""
        if self.done(name) or name in self._away:
            return False
        self.end_member(name)
        self._away.add(name)

        def back() -> None:
            self._away.discard(name)
            if not self.alive(name) and not self.done(name):
                self.start_member(name)

        self._after(seconds, "a member is back", back)
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
