"""`parley demo`: whole joint computations on real data, on one machine, with every step that a real one has.

Each member is a process of its own that runs the real command line in a folder of its own; the coordinator is a process,
the simulated enclave another, without a network. Members share nothing but what real members exchange: public key files,
fingerprints that they read to each other, and the coordinator.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Final

import typer

from parley_deploy import data, local

COMMAND_SECONDS: Final = 300
"""Longest a command of a demo may take; a machine that is busy needs a tenth of it."""
OPERATOR: Final = "operator"
START_SECONDS: Final = 60
"""How long the process that forks the members may take to import the client."""


@dataclass(frozen=True, slots=True)
class Demo:
    """One demo: its agreement, its data, and whose screen is shown."""

    name: str
    summary: str
    title: str
    starter: str
    party: str
    file: str


DEMOS: Final = {
    "flights": Demo(
        "flights",
        "16 real carriers and the aircraft registry: delay by engine and year built (336,776 flights)",
        "flights-by-engine",
        "analyst",
        "AA",
        "flights.yaml",
    ),
    "pay": Demo(
        "pay",
        "nine real universities: salaries by year, rank and sex (262 professors)",
        "big9-pay",
        "illinois",
        "wisc",
        "pay.yaml",
    ),
    "kms": Demo(
        "kms",
        "the same, with two universities that keep their keys in their own KMS: one is away, the other revokes",
        "big9-pay-standing",
        "illinois",
        "mich",
        "kms.yaml",
    ),
}


class DemoError(Exception):
    """A command of the demo did not end as it must."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended: its exit code and its lines."""

    code: int
    out: tuple[str, ...]
    err: tuple[str, ...]

    def json(self) -> list[dict[str, object]]:
        """The values of a command that ran with --json."""
        return [json.loads(line) for line in self.out]


class Nursery:
    """The process that forks the members' processes: `parley_deploy.member`."""

    def __init__(self, folder: Path) -> None:
        path = folder / "members.sock"
        # Neither the settings nor the AWS account of whoever runs the demo are a member's.
        own = {name: text for name, text in os.environ.items() if not name.startswith(("PARLEY_", "AWS_"))}
        environment = {**own, "OPENBLAS_NUM_THREADS": "1"}
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(START_SECONDS)
            self._process = subprocess.Popen([sys.executable, "-m", "parley_deploy.member", str(path)], env=environment)
            try:
                self._asking, _ = listener.accept()
            except TimeoutError:
                self._process.kill()
                raise DemoError("the members' processes do not start") from None
            finally:
                path.unlink()
        self._lock = threading.Lock()

    def fork(self, folder: Path, environment: Mapping[str, str]) -> tuple[int, IO[str], IO[str]]:
        """A new member's process: its id, its commands and its answers."""
        commands, ours = os.pipe()
        theirs, answers = os.pipe()
        request = json.dumps({"folder": str(folder), "environment": dict(environment)}).encode()
        with self._lock:
            socket.send_fds(self._asking, [request], [commands, answers])
            pid = int(self._asking.recv(64) or b"0")
        os.close(commands)
        os.close(answers)
        if not pid:
            raise DemoError("the members' processes have ended")
        return pid, os.fdopen(ours, "w", encoding="utf-8"), os.fdopen(theirs, encoding="utf-8")

    def close(self) -> None:
        """Ends the process; its members end when they are closed."""
        self._asking.close()
        self._process.wait()


class Member:
    """A member's process. Commands run one after the other, each as a future of how it ended."""

    def __init__(self, nursery: Nursery, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.folder = folder
        self.environment = environment
        folder.mkdir(parents=True, exist_ok=True)
        self._pid, self._commands, self._answers = nursery.fork(folder, environment)
        self._turn = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._closed = False

    def run(self, *arguments: str, listen: Callable[[str], None] | None = None) -> Future[Ended]:
        """Begins a command; `listen` gets each of its lines as it comes."""
        return self._turn.submit(self._run, arguments, listen)

    def _run(self, arguments: Sequence[str], listen: Callable[[str], None] | None) -> Ended:
        self._commands.write(json.dumps(arguments) + "\n")
        self._commands.flush()
        lines: dict[str, list[str]] = {"out": [], "err": []}
        for text in self._answers:
            message = json.loads(text)
            if "exit" in message:
                return Ended(message["exit"], tuple(lines["out"]), tuple(lines["err"]))
            ((stream, line),) = message.items()
            lines[stream].append(line)
            if listen is not None:
                listen(line)
        raise DemoError(f"{self.name}: the process ended during: parley {shlex.join(arguments)}")

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, whatever it does; nothing where it has ended."""
        if self._closed:
            return
        self._closed = True
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        # Its end closes its answers, and with them the thread that may wait for one.
        self._turn.shutdown(wait=True, cancel_futures=True)
        with suppress(BrokenPipeError):
            self._commands.close()
        self._answers.close()


class Screen:
    """What the reader of the demo sees: commands of single members with their output."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._member = ""

    def command(self, member: str, arguments: Sequence[str]) -> None:
        """A prompt with a command."""
        self._member = member
        self.line(f"\n{member}$ parley {shlex.join(arguments)}")

    def line(self, text: str) -> None:
        """One line of output."""
        with self._lock:
            self._say(text)

    def line_of(self, member: str, text: str) -> None:
        """A line of a member's command that goes on while others type: then it stands aside, under the member's name."""
        self.line(text if member == self._member else f"    {member}: {text}")

    def remark(self, text: str) -> None:
        """A line of the demo itself."""
        self.line(f"  -- {text}")


@dataclass(frozen=True, slots=True)
class Played:
    """What a demo leaves: the folders of its members and operator, the session, and how long it took."""

    folder: Path
    session: str
    bundle: Path
    opened: Path
    seconds: float

    def member(self, name: str) -> Path:
        """A member's folder, with its key and state."""
        return self.folder / "members" / name


class Play:
    """One run of a demo. Every step is a command line of a member; its failure ends the run."""

    def __init__(self, demo: Demo, folder: Path, coalition: int | None, say: Callable[[str], None]) -> None:
        self.demo = demo
        self.folder = folder
        self.coalition = coalition
        self.screen = Screen(say)
        self.members: dict[str, Member] = {}
        self.files: dict[str, dict[str, Path]] = {}
        # More variables of the environments of members and of OPERATOR.
        self.environments: dict[str, Mapping[str, str]] = {}
        self.closing = ExitStack()
        self.stack = local.Stack(folder / "operator")

    def run(self) -> Played:
        """The whole demo; DemoError where a command does not end as it must."""
        begun = time.monotonic()
        with ExitStack() as closing:
            stack = local.Stack.made(self.folder / "operator", listen=f"127.0.0.1:{local.free_port()}")
            closing.callback(stack.stop)
            self.stack, self.closing = stack, closing
            self.prepare()
            self.nursery = Nursery(self.folder)
            closing.callback(self.nursery.close)
            # The operator's work and the members' own go on side by side.
            operator = closing.enter_context(ThreadPoolExecutor(1, thread_name_prefix="operator"))
            running = operator.submit(stack.start, self.environments.get(OPERATOR))
            names = agreement_members(self.demo)
            for name in names:
                environment = {**stack.environment, **self.environments.get(name, {})}
                self.members[name] = Member(self.nursery, name, self.folder / "members" / name, environment)
                closing.callback(self.members[name].close)
            split = data.split_flights if self.demo.name == "flights" else data.split_pay
            self.files = split(self.folder / "members")
            self.screen.remark(f"{len(names)} members, each a process with a folder of its own; {self.demo.summary}")
            fingerprints = self._keys()
            allowed = operator.submit(stack.allow, [self.folder / "keys" / f"{self.demo.starter}.pub"])
            self._contacts(fingerprints)
            running.result(COMMAND_SECONDS)
            allowed.result(COMMAND_SECONDS)
            self._agreement(stack)
            session = self._session()
            bundle, opened = self._release(session)
            self.afterwards()
        return Played(self.folder, session, bundle, opened, time.monotonic() - begun)

    # What a demo may add

    def prepare(self) -> None:
        """Before the coordinator starts."""

    def text(self) -> str:
        """The agreement as YAML."""
        return agreement_text(self.demo, self.coalition)

    def afterwards(self) -> None:
        """After the release was verified."""

    # Steps

    def _keys(self) -> dict[str, str]:
        results = self.everyone(lambda name: ["keygen", name], shown=self.demo.starter)
        exchanged = self.folder / "keys"
        exchanged.mkdir(exist_ok=True)
        for member in self.members.values():
            shutil.copy(member.folder / f"{member.name}.pub", exchanged)
        return {name: ended.out[-1].split()[-1] for name, ended in results.items()}

    def _contacts(self, fingerprints: Mapping[str, str]) -> None:
        keys = [os.path.join("..", "..", "keys", f"{name}.pub") for name in self.members]
        for member in self.members.values():
            # What the others read out, as this member wrote it down.
            heard = "".join(f"{name}  {text}\n" for name, text in fingerprints.items() if name != member.name)
            (member.folder / "heard.txt").write_text(heard)
        self.everyone(lambda name: ["contact", "add", *keys])
        self.everyone(lambda name: ["contact", "confirm", "--from", "heard.txt"], shown=self.demo.party)

    def _agreement(self, stack: local.Stack) -> None:
        starter = self.members[self.demo.starter]
        (starter.folder / self.demo.file).write_text(self.text(), "utf-8")
        shutil.copytree(self.folder / "keys", starter.folder / "keys")
        for path in (stack.root_certificate, stack.measurements):
            shutil.copy(path, starter.folder)
        self.one(starter.name, ["agreement", "check", self.demo.file])
        self.one(starter.name, ["agreement", "put", self.demo.file])
        self.one(self.demo.party, ["inbox"])
        self.everyone(lambda name: ["agreement", "sign", self.demo.title, "--yes"], shown=self.demo.party)

    def _session(self) -> str:
        demo = self.demo
        self.one(demo.starter, ["open", demo.title])
        session = str(self.one(demo.starter, ["status", demo.title, "--json"], shown=False).json()[0]["session"])
        received = {name: threading.Event() for name in self.files}
        submitted: dict[str, Future[Ended]] = {}
        for name, tables in self.files.items():
            arguments = ["submit", demo.title, *(f"{table}={path.name}" for table, path in tables.items())]
            if name == demo.party:
                self.screen.command(name, arguments)
            submitted[name] = self.members[name].run(*arguments, listen=self._listener(name, received[name]))
        self.screen.remark(f"the other {len(submitted) - 1} parties submit alike")
        while not all(event.wait(0.05) for event in received.values()):
            for name, future in submitted.items():
                if future.done() and not received[name].is_set():
                    self._ended(name, ["submit", demo.title], future)
                    raise DemoError(f"{name}: submit ended without a receipt")
        if demo.starter in self.files:
            # This member's own `submit` is still waiting: a second window.
            starter = self.members[demo.starter]
            with Member(self.nursery, demo.starter, starter.folder, starter.environment) as window:
                self.one(demo.starter, ["start", session], window=window)
        else:
            self.one(demo.starter, ["inbox"])
            self.one(demo.starter, ["start", session])
        for name, future in submitted.items():
            self._ended(name, ["submit", demo.title], future)
        return session

    def _listener(self, name: str, received: threading.Event) -> Callable[[str], None]:
        def listen(line: str) -> None:
            if name == self.demo.party:
                self.screen.line_of(name, line)
            if line.startswith("receipt"):
                received.set()

        return listen

    def _release(self, session: str) -> tuple[Path, Path]:
        demo = self.demo
        reader = self.members[demo.party]
        bundle = f"{demo.title}-{session[:4]}.bundle"
        opened = f"{demo.title}-{session[:4]}.open.bundle"
        self.everyone(lambda name: ["fetch", session, "--out", bundle], shown=demo.party, only=self._recipients())
        self.one(demo.party, ["show", bundle])
        self.one(demo.party, ["fetch", session, "--open", "--out", opened])
        auditor = self.folder / "auditor"
        auditor.mkdir(exist_ok=True)
        for name in (bundle, opened):
            shutil.copy(reader.folder / name, auditor)
        with Member(self.nursery, "auditor", auditor, {}) as window:
            self.one("auditor", ["verify", bundle], window=window)
            self.one("auditor", ["verify", opened], window=window)
        return auditor / bundle, auditor / opened

    def _recipients(self) -> list[str]:
        return [name for name in self.members if name != "registry"]

    # Commands

    def one(
        self, name: str, arguments: Sequence[str], *, shown: bool = True, window: Member | None = None, code: int = 0
    ) -> Ended:
        """Runs one member's command to its end, by default on the screen. `code`: the exit code that it must have."""
        if shown:
            self.screen.command(name, arguments)
        member = self.members[name] if window is None else window
        future = member.run(*arguments, listen=self.screen.line if shown else None)
        return self._ended(name, arguments, future, code)

    def everyone(
        self, arguments: Callable[[str], list[str]], *, shown: str | None = None, only: Iterable[str] | None = None
    ) -> dict[str, Ended]:
        """Runs a command of every member at once; the screen shows one of them."""
        lines = {name: arguments(name) for name in (self.members if only is None else only)}
        running = {name: self.members[name].run(*line) for name, line in lines.items()}
        ended = {name: self._ended(name, lines[name], future) for name, future in running.items()}
        if shown is not None:
            self.screen.command(shown, lines[shown])
            for line in ended[shown].out:
                self.screen.line(line)
            self.screen.remark(f"the other {len(lines) - 1} alike")
        return ended

    @staticmethod
    def _ended(name: str, arguments: Sequence[str], future: Future[Ended], code: int = 0) -> Ended:
        ended = future.result(COMMAND_SECONDS)
        if ended.code != code:
            said = "\n".join([*ended.out, *ended.err])
            raise DemoError(f"{name}: parley {shlex.join(arguments)} ended with exit code {ended.code}\n{said}")
        return ended


def agreement_text(demo: Demo, coalition: int | None = None) -> str:
    """The demo's agreement as YAML, with another `coalition` where one is asked for."""
    text = (Path(__file__).parent / "agreements" / demo.file).read_text("utf-8")
    if coalition is None:
        return text
    changed = re.sub(r"coalition: \d+", f"coalition: {coalition}", text)
    if "coalition:" not in text:
        raise DemoError(f"{demo.file} states no coalition")
    return changed


def agreement_members(demo: Demo) -> list[str]:
    """The names of the demo's members, in the agreement's order."""
    return re.findall(r"^  (\w+): keys/\1\.pub", agreement_text(demo), flags=re.MULTILINE)


def play(name: str, folder: Path, *, coalition: int | None = None, say: Callable[[str], None] = print) -> Played:
    """Runs the demo `name` in `folder`, which must be empty; DemoError."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DemoError(f"{folder}: not empty")
    return _kind(name)(DEMOS[name], folder, coalition, say).run()


def _kind(name: str) -> type[Play]:
    if name != "kms":
        return Play
    from parley_deploy.demo_kms import KmsPlay

    return KmsPlay


def _run(name: str, keep: Path | None, coalition: int | None) -> None:
    with ExitStack() as closing:
        folder = (
            keep if keep is not None else Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="parley-")))
        )
        try:
            played = play(name, folder, coalition=coalition, say=typer.echo)
        except (DemoError, local.StackError, data.MissingData) as error:
            typer.echo(f"demo    failed: {error}", err=True)
            raise typer.Exit(1) from None
        typer.echo(
            f"\ndemo    {name}: done in {played.seconds:.1f} s. SIMULATED: no hardware protected anything in this run."
        )
        if keep is not None:
            typer.echo(f"kept    {keep}: members/NAME, operator, auditor")


KeepOption = Annotated[Path | None, typer.Option("--keep", help="Leave all files in this empty or new folder.")]
CoalitionOption = Annotated[
    int | None,
    typer.Option("--coalition", min=0, max=8, help="Rules hold without any so many parties; the agreement says 1."),
]

app = typer.Typer(
    help="Whole computations on real data, on this machine.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_list(wanted: bool) -> None:
    if wanted:
        for demo in DEMOS.values():
            typer.echo(f"{demo.name:<10}{demo.summary}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    _list: Annotated[bool, typer.Option("--list", callback=_print_list, is_eager=True, help="List the demos.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def flights(keep: KeepOption = None, coalition: CoalitionOption = None) -> None:
    """Delay by engine and year built: 16 carriers and the aircraft registry."""
    _run("flights", keep, coalition)


@app.command()
def pay(keep: KeepOption = None, coalition: CoalitionOption = None) -> None:
    """Salary by year, rank and sex: nine universities."""
    _run("pay", keep, coalition)


@app.command()
def kms(keep: KeepOption = None, coalition: CoalitionOption = None) -> None:
    """The same with standing consent and keys in KMS: one university is away all the time, another revokes."""
    _run("kms", keep, coalition)
