"""Sessions whose processes are killed: a stage that is set once and copied for each trial, members who go on by
themselves as a patient user would, and the moments at which something dies.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pandas as pd

from parley import Connection, Member, Release
from parley.session import Session, SessionStatus
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import RefusedError, UnavailableError
from support.client import frame_of, members
from support.coordinator import Coordinator
from support.enclave import until
from support.member import LIMIT_S, PATIENCE_S, Ledger, Outcome, Told, Wire

NAMES: Final = ("ann", "bob", "cyd", "dan")
PARTIES: Final = NAMES[:3]
"""They bring tables; ann opens and starts. dan is the analyst."""
ROWS: Final = {"ann": 900, "bob": 45_000, "cyd": 900}
"""bob's sealed table has more than one message of an upload."""

MEMBER_STEPS: Final = 30
"""Steps that the members of a run tell, all together, without the last fetches."""


# The stage


class Stage:
    """A coordinator's folder with an agreement that all signed, and members whose tables stand sealed in their spools with
    nothing sent. Trials run on copies: equal uploads make equal records, whatever dies meanwhile.
    """

    def __init__(self, folder: Path, **session: Any) -> None:
        self.folder = folder
        made_in = folder / "made"
        made_in.mkdir()
        with members(made_in, NAMES, analysts=["dan"], **session) as made:
            self.agreement: Agreement = made.agreement
            made.sign()
            made.coordinator.stop()
            shutil.copytree(made.coordinator.folder, folder / "c")
            made.coordinator.start()
            opened = made.connect("ann").open(made.agreement)
            for number, name in enumerate(PARTIES):
                path = made.csv(name, frame_of(number, ROWS[name], people=2000))
                made.connect(name).session(opened.id).seal({"visits": path})
            for name in NAMES:
                shutil.copytree(made_in / name, folder / name)
        # The rest of `made` is the root that certifies simulated enclaves, which all trials share.

    def frame(self, name: str) -> pd.DataFrame:
        """A party's table."""
        return pd.read_csv(self.folder / name / "visits.csv", dtype={"amount": str})


class Copied(Coordinator):
    """A copy of a stage's coordinator, always at the same port: clients find it again."""

    def __init__(self, stage: Stage, folder: Path, blobs: Path | None = None) -> None:
        shutil.copytree(stage.folder / "c", folder)
        self.folder = folder
        self.process = None
        self.address = ""
        self.clients = []
        self.database = f"sqlite:///{folder / 'coordinator.db'}"
        self.enclaves_folder = folder / "e"
        self.tree = None
        file = folder / "coordinator.toml"
        text = file.read_text().replace('"127.0.0.1:0"', f'"127.0.0.1:{_port()}"')
        # The configuration names the first coordinator's own places.
        text = text.replace(str(stage.folder / "made" / "c"), str(folder))
        if blobs is not None:
            text = text.replace('blobs = "blobs"', f'blobs = "{blobs}"')
        file.write_text(text)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What the coordinator's database holds."""
        with sqlite3.connect(f"file:{self.folder / 'coordinator.db'}?mode=ro", uri=True, timeout=30) as connection:
            found = connection.execute(query).fetchall()
        connection.close()
        return found

    @property
    def faults(self) -> list[str]:
        """Lines of its log that say that the program itself is wrong."""
        lines = (line for line in self.log.splitlines() if line.startswith("{"))
        return [line for line in lines if json.loads(line).get("level") not in ("debug", "info", "warning")]


def _port() -> int:
    """A free port that the kernel gives to nobody by itself."""
    while True:
        port = random.randrange(12_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Trial:
    """One run on a copy of the stage. `told` hears every step of every member: (step, name)."""

    def __init__(self, stage: Stage, folder: Path, *, blobs: Path | None = None) -> None:
        self.stage = stage
        self.folder = folder
        self.agreement = stage.agreement
        self.coordinator = Copied(stage, folder / "c", blobs)
        for name in NAMES:
            shutil.copytree(stage.folder / name, folder / name)
        self.ledger = Ledger()
        self.told: Callable[[str, str], None] = lambda _step, _name: None
        self.broken_uploads = False
        """Whether bob's first upload stream breaks after a chunk."""
        self.over = threading.Event()
        self._dying = threading.Lock()
        self.session = b""
        """The session that ann opened last."""
        self._opened = threading.Condition()
        self.died: list[tuple[str, str]] = []
        """What was killed, and the phase of the session then."""

    def __enter__(self) -> Self:
        self.coordinator.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        with self._dying:
            self.coordinator.kill()
            self.coordinator.end_enclaves()

    # What dies

    def kill(self, target: str, pause_s: float = 0.0, *, between: Callable[[], object] = lambda: None) -> bool:
        """SIGKILL for `coordinator`, `enclave` or `both`; then `between`; a coordinator is started again. Whether something
        died."""
        with self._dying:
            if self.over.is_set():
                return False
            phase = self.phase
            enclave = self.enclave() if target in ("enclave", "both") else None
            if target in ("coordinator", "both"):
                self.coordinator.kill()
            if enclave is not None:
                os.kill(enclave, signal.SIGKILL)
            between()
            if target in ("coordinator", "both"):
                time.sleep(pause_s)
                self.coordinator.start()
            dead = target != "enclave" or enclave is not None
            if dead:
                self.died.append((target, phase))
            return dead

    @property
    def phase(self) -> str:
        """The phase of the newest session; empty before the first one."""
        found = self.coordinator.rows("SELECT phase FROM sessions ORDER BY number DESC LIMIT 1")
        return str(found[0][0]) if found else ""

    def enclave(self) -> int | None:
        """The process of the enclave, if there is one now."""
        for folder in self.coordinator.enclaves():
            try:
                return int((folder / "enclave.pid").read_text())
            except (OSError, ValueError):
                continue
        return None

    def workers(self) -> list[int]:
        """The enclave's worker processes."""
        enclave = self.enclave()
        assert enclave is not None
        files = Path(f"/proc/{enclave}/task").glob("*/children")
        return sorted({int(pid) for file in files for pid in file.read_text().split()})

    # Members

    def member(self, name: str) -> Member:
        """A member, loaded from its files as another process would."""
        return Member.load(self.folder / name / f"{name}.key")

    def connect(self, name: str, *, patience_s: float = PATIENCE_S) -> Connection:
        """A connection of a member, on a wire that tells."""
        member = self.member(name)
        certificate = (self.coordinator.folder / "tls.crt").read_text()
        told: Told = lambda step: self.told(step, name)  # noqa: E731
        wire = Wire(self.coordinator.address, member, certificate, told, self.ledger, patience_s=patience_s)
        if self.broken_uploads and name == "bob":
            wire.chunks = 1
        return Connection(member, wire)

    def csv(self, name: str) -> Path:
        """A party's file."""
        return self.folder / name / "visits.csv"

    def play(self, names: Sequence[str] = NAMES) -> dict[str, Release]:
        """Every member takes part until it holds the release, whatever dies; the releases."""
        releases: dict[str, Release] = {}
        errors: dict[str, BaseException] = {}

        def one(name: str) -> None:
            try:
                releases[name] = self.live(name)
            except BaseException as error:
                errors[name] = error
                self.over.set()

        threads = [threading.Thread(target=one, args=(name,), daemon=True) for name in names]
        for thread in threads:
            thread.start()
        end = time.monotonic() + LIMIT_S + PATIENCE_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        stuck = [name for name, thread in zip(names, threads, strict=True) if thread.is_alive()]
        for error in errors.values():
            if not isinstance(error, _Given):
                raise error
        assert not stuck, f"{', '.join(stuck)} still waiting"
        assert not errors
        return releases

    def live(self, name: str) -> Release:
        """One member from opening to release, as its user would run it: again and again until it is done."""
        end = time.monotonic() + LIMIT_S
        known = b""
        lost = b""
        while True:
            if self.over.is_set():
                raise _Given
            assert time.monotonic() < end, f"{name}: no release within {LIMIT_S:.0f} s"
            try:
                with self.connect(name) as connection:
                    session = connection.session(known) if known else self._find(name, connection, lost)
                    known = session.id
                    if session.status().phase != "released":
                        self._attend(name, session)
                    return session.release()
            except UnavailableError:
                continue
            except RefusedError as error:
                if error.code == "lost":
                    known, lost = b"", known
                elif error.code not in ("unknown-session", "phase"):
                    raise
                time.sleep(0.05)

    def _find(self, name: str, connection: Connection, lost: bytes) -> Session:
        if name == PARTIES[0]:
            opened = connection.open(self.agreement)
            with self._opened:
                self.session = opened.id
                self._opened.notify_all()
            return opened
        with self._opened:
            self._opened.wait_for(lambda: self.session not in (b"", lost), 1.0)
        try:
            return connection.session(self.agreement)
        except RefusedError as error:
            released = [item.session for item in connection.inbox() if item.kind == "fetch"]
            if error.code != "unknown-session" or not released:
                raise
            return connection.session(released[0])  # the others were faster

    def _attend(self, name: str, session: Session) -> None:
        if name not in PARTIES:
            session.wait()
            return
        session.submit({"visits": self.csv(name)})

        def seen(status: SessionStatus) -> None:
            phases = {phase for _, phase in status.parties}
            if name == PARTIES[0] and status.phase == "open" and phases == {"joined"}:
                session.start()

        session.wait(seen=seen)

    def check(self, releases: Mapping[str, Release], expected: Outcome) -> None:
        """Every member holds the release of a run in which nothing failed, and nobody sent a byte twice."""
        assert set(releases) == set(NAMES)
        for name, release in releases.items():
            found = Outcome.of(release)
            assert found.plaintexts == expected.plaintexts, name
            assert found.body == expected.body, (name, found.record, expected.record)
        assert self.ledger.twice == []
        assert self.coordinator.faults == []

    def start_play(self, *names: str) -> Future[dict[str, Release]]:
        """`play` of some members in a thread."""
        playing: Future[dict[str, Release]] = Future()

        def run() -> None:
            try:
                playing.set_result(self.play(names))
            except BaseException as error:
                playing.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return playing

    @property
    def lost(self) -> int:
        """How many sessions were lost."""
        ((count,),) = self.coordinator.rows(
            "SELECT count(*) FROM sessions WHERE phase = 'lost' AND session IS NOT NULL"
        )
        return int(count)


class _Given(Exception):
    """Another member failed: there is nothing to wait for."""


# The moments

STEPS: Final = (
    "opened",
    "uploading",
    "uploaded",
    "joining",
    "joined",
    "rostered",
    "countersigning",
    "computing",
    "releasing",
    "released",
    "fetching",
)
"""Session open; during the upload, after acknowledged bytes; all uploaded, none joined; a join stored and without receipt;
all receipts given; a roster and no countersignature; one countersignature of three; computing; the enclave has just
released; the release stored and the enclave not told; in the middle of a fetch."""


class Faults:
    """Kills `target` when a trial reaches each of `steps`, one after the other. What must not go on meanwhile waits.

    A dead enclave's session is lost; the next step is then one of the next session.
    """

    def __init__(self, trial: Trial, target: str, *steps: str) -> None:
        self.trial = trial
        self.target = target
        self.fired: list[str] = []
        self.missed: list[str] = []
        self.signed: set[str] = set()
        """Who has countersigned the roster that stands."""
        self._left = list(steps)
        self._asleep = False
        self._moment: _Moment | None = None
        trial.broken_uploads = "uploading" in steps
        self._next()
        trial.told = self.hear

    def hear(self, told: str, name: str) -> None:
        """A member reaches a step."""
        if told == "starting":
            self.signed.clear()
        elif told == "signed":
            self.signed.add(name)
        elif told == "opened":
            self._asleep = False
        elif told == "resuming":
            self.trial.broken_uploads = False
        while (moment := self._moment) is not None and not self._asleep:
            moment.hear(told, name)
            if moment is self._moment or self._asleep:
                break

    def kill(self, step: str, between: Callable[[], object]) -> None:
        """Now."""
        if not self.trial.kill(self.target, between=between):
            self.missed.append(f"{step}: no {self.target} to kill")
        self.fired.append(step)
        self._asleep = self.target != "coordinator"
        self._next()

    def _next(self) -> None:
        self._moment = _Moment(self, self._left.pop(0)) if self._left else None


class _Moment:
    """One step at which something is killed, once."""

    def __init__(self, faults: Faults, step: str) -> None:
        self._faults = faults
        self._trial = faults.trial
        self.step = step
        self._fired = threading.Event()
        self._lock = threading.Lock()
        self._heard: dict[str, set[str]] = defaultdict(set)
        self._begun = False
        self._ready = False

    def hear(self, told: str, name: str) -> None:
        """A member reaches a step."""
        with self._lock:
            heard = self._heard[told]
            first = not heard
            heard.add(name)
            everybody = heard >= set(PARTIES)
        match self.step, told:
            case ("opened", "opened") | ("uploading", "resuming") | ("joined", "starting") | ("fetching", "fetching"):
                if first:
                    self._fire()
            case "uploading", "joining":
                assert self._fired.wait(LIMIT_S), f"{self.step} was not reached"
            case ("uploaded", "joining") | ("rostered", "signing"):
                if everybody and self._begin():
                    self._fire()
                assert self._fired.wait(LIMIT_S), f"{self.step} was not reached"
            case "countersigning", "signing":
                assert first or self._fired.wait(LIMIT_S), f"{self.step} was not reached"
            case "countersigning", "signed":
                if self._begin():
                    self._fire()
            case "joining", "joining":
                self._meanwhile(self._while_joining)
            case (("computing" | "releasing" | "released"), "signing"):
                if heard | self._faults.signed >= set(PARTIES):
                    work = {"computing": self._while_computing, "releasing": self._when_releasing}
                    self._meanwhile(work.get(self.step, self._before_stored))

    def _begin(self) -> bool:
        with self._lock:
            begun, self._begun = self._begun, True
        return not begun

    def _fire(self, between: Callable[[], object] = lambda: None) -> None:
        self._faults.kill(self.step, between)
        self._fired.set()

    def _meanwhile(self, work: Callable[[], None]) -> None:
        """Begins `work` in a thread, once; the member goes on as soon as it is ready."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._faults.missed.append(f"{self.step}: {type(error).__name__}: {error}")
                self._fired.set()

        if self._begin():
            threading.Thread(target=run, daemon=True).start()
        until(lambda: self._ready or self._fired.is_set(), LIMIT_S)

    def _while_joining(self) -> None:
        enclave = self._trial.enclave()
        assert enclave is not None
        with _Stopped([enclave]) as standing:
            self._ready = True
            query = "SELECT count(*) FROM joins WHERE receipt IS NULL AND code = ''"
            until(lambda: self._trial.coordinator.rows(query) != [(0,)], LIMIT_S)
            self._fire(standing.go_on)

    def _while_computing(self) -> None:
        with _Stopped(self._trial.workers()) as standing:
            self._ready = True
            until(lambda: self._trial.phase == "computing", LIMIT_S)
            self._fire(standing.go_on)

    def _when_releasing(self) -> None:
        (folder,) = self._trial.coordinator.enclaves()
        self._ready = True
        end = time.monotonic() + LIMIT_S
        while "computing -> released" not in (folder / "log").read_text():
            assert time.monotonic() < end
        self._fire()

    def _before_stored(self) -> None:
        query = "SELECT count(*) FROM sessions WHERE phase = 'released' AND NOT stored_told"
        coordinator = self._trial.coordinator
        self._ready = True
        end = time.monotonic() + LIMIT_S
        while coordinator.rows(query) == [(0,)]:
            assert time.monotonic() < end
        process = coordinator.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        if coordinator.rows(query) == [(0,)]:
            self._faults.missed.append("released: the enclave was told before the kill")
        self._fire()
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)


class _Stopped:
    """Processes that stand still in a block, or until they go on."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids

    def go_on(self) -> None:
        """They run again, those that still live."""
        for pid in self._pids:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue

    def __enter__(self) -> Self:
        for pid in self._pids:
            os.kill(pid, signal.SIGSTOP)
        return self

    def __exit__(self, *_error: object) -> None:
        self.go_on()


@dataclass(frozen=True)
class Plan:
    """The kills of a seed: (after how many steps of all members together, s after that, target, s before the restart)."""

    seed: int
    kills: tuple[tuple[int, float, str, float], ...]

    @classmethod
    def of(cls, seed: int) -> Plan:
        """One or two kills at any moment: a third of them while the enclave starts, before anybody has done a step."""
        dice = random.Random(seed)

        def kill() -> tuple[int, float, str, float]:
            early = dice.random() < 1 / 3
            after, delay_s = (
                (0, dice.uniform(0, 1.5)) if early else (dice.randint(1, MEMBER_STEPS), dice.uniform(0, 0.1))
            )
            return after, delay_s, dice.choice(("coordinator", "enclave", "both")), dice.uniform(0, 0.3)

        return cls(seed, tuple(sorted(kill() for _ in range(dice.choice((1, 1, 2))))))

    def begin(self, trial: Trial) -> None:
        """Kills while the trial plays."""
        heard = threading.Semaphore(0)
        trial.told = lambda _step, _name: heard.release()

        def run() -> None:
            done = 0
            for after, delay_s, target, pause_s in self.kills:
                while done < after:
                    if heard.acquire(timeout=0.2):
                        done += 1
                    elif trial.over.is_set():
                        return
                if trial.over.wait(delay_s):
                    return
                trial.kill(target, pause_s)

        threading.Thread(target=run, daemon=True).start()


# A member in a process of its own


@dataclass(frozen=True)
class Ended:
    """How a member's process ended: its exit code, what it said, and its errors."""

    code: int
    lines: tuple[tuple[str, ...], ...]
    errors: str

    @property
    def error(self) -> tuple[str, ...]:
        """(type, code, message) of the error that it ended with."""
        (found,) = [line[1:] for line in self.lines if line[0] == "error"]
        return found


def run_member(
    trial: Trial,
    name: str,
    *,
    die_at: str = "",
    until_step: str = "release",
    ahead_s: float = 0.0,
    patience_s: float = PATIENCE_S,
    file_bytes: int = 0,
) -> Ended:
    """Runs a member as a process of its own, until `until_step` (submit, release); it kills itself at the step `die_at`.

    `ahead_s`: how far its clock is ahead. `file_bytes`: the largest file that it may write. What it sends is entered in
    the trial's ledger.
    """
    return start_member(
        trial, name, die_at=die_at, until_step=until_step, ahead_s=ahead_s, patience_s=patience_s, file_bytes=file_bytes
    ).wait()


class Running:
    """A member's process."""

    def __init__(self, trial: Trial, process: subprocess.Popen[str]) -> None:
        self._trial = trial
        self.process = process

    def wait(self) -> Ended:
        """Its end."""
        try:
            out, errors = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, errors = self.process.communicate()
            raise AssertionError(f"a member's process did not end: {out[-500:]} {errors[-2000:]}") from None
        lines = tuple(tuple(line.split(" ", 3)) for line in out.splitlines())
        for line in lines:
            match line:
                case "sent", upload, offset, length:
                    self._trial.ledger.send(upload, int(offset), int(length))
                case "stored", upload, stored:
                    self._trial.ledger.acknowledge(upload, int(stored))
        return Ended(self.process.returncode, lines, errors)


def start_member(trial: Trial, name: str, **options: Any) -> Running:
    """Starts what `run_member` runs."""
    task = {
        "key": str(trial.folder / name / f"{name}.key"),
        "address": trial.coordinator.address,
        "certificate": str(trial.coordinator.folder / "tls.crt"),
        "agreement": trial.agreement.canonical.hex(),
        "csv": str(trial.csv(name)),
        "die_at": "",
        "until_step": "release",
        "ahead_s": 0.0,
        "patience_s": PATIENCE_S,
        "file_bytes": 0,
        **options,
    }
    tests = str(Path(__file__).resolve().parent.parent)
    paths = [tests, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "support.member", json.dumps(task)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Running(trial, process)
