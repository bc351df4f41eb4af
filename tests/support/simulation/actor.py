"""Members as processes of their own, each of which goes on until it holds its releases, as a patient user would.

`python -m support.simulation.actor` is the nursery: it has imported everything, and forks a member for each line that it
reads (JSON, a `Task`), whose process id it answers. A member writes what it meets into its log, a JSON line each.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import boto3  # noqa: F401  # members are forked with all of it

import parley.reading
import parley.sealing  # noqa: F401
from parley import transport
from parley.connection import Connection
from parley.member import Member
from parley.session import Session, SessionStatus
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.model import Agreement
from parley_protocol.bundle import Bundle
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import ParleyError, RefusedError, StateError
from parley_protocol.transcript import Record
from support.member import Ledger, Outcome, Wire

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GLANCE_S: Final = 3.0
"""How long a member waits for one thing before it looks around again."""


@dataclass(frozen=True)
class Task:
    """What one member is to do: take part until it holds `rounds` releases.

    `opens`: it opens and starts sessions. `by_hand`: a file; where it is there, its user signs rosters with changed inputs.
    `dies`: a file with steps, one a line: it kills itself at the first of them, and takes that out. `ahead_s`: how far its clock is ahead; `file_bytes`: the largest file that it may write, 0 for any. `patience_s`: how long its
    library repeats a call. `environment`: where it finds its KMS.
    """

    name: str
    key: str
    address: str
    certificate: str
    agreement: str
    csv: str
    log: str
    by_hand: str
    rounds: int = 1
    opens: bool = False
    dies: str = ""
    ahead_s: float = 0.0
    file_bytes: int = 0
    patience_s: float = 4.0
    environment: dict[str, str] = field(default_factory=dict)


class Actor:
    """One member's life."""

    def __init__(self, task: Task, say: Callable[..., None]) -> None:
        self._task = task
        self._say = say
        self._member = Member.load(task.key, reached=self._reached)
        self._agreement: Agreement = parse(bytes.fromhex(task.agreement))
        self._party = task.name in self._agreement.parties
        self._released: dict[bytes, int] = {}
        """Session of each release that is kept to its number in the chain: two enclaves may have made one of a number."""

    def live(self) -> None:
        """Until all releases are here."""
        while True:
            try:
                wire = Wire(
                    self._task.address,
                    self._member,
                    Path(self._task.certificate).read_text(),
                    self._reached,
                    Ledger(),
                    patience_s=self._task.patience_s,
                )
                with Connection(self._member, wire) as connection:
                    while not self._once(connection):
                        time.sleep(0.1)
                    return
            except ParleyError as error:
                self._say("error", type(error).__name__, error.code, str(error))
                time.sleep(0.1)
            except OSError as error:
                # What `parley` tells its user of a full disk, with the code "file".
                if error.errno not in FULL:
                    raise
                self._say("error", type(error).__name__, "file", str(error))
                time.sleep(0.1)

    def _reached(self, step: str) -> None:
        if not self._task.dies:
            return
        path = Path(self._task.dies)
        steps = path.read_text().split()
        if steps[:1] == [step]:
            path.write_text("\n".join(steps[1:]))
            os.kill(os.getpid(), signal.SIGKILL)

    def _once(self, connection: Connection) -> bool:
        """One look around; whether all is done."""
        for found in self._fetchable(connection):
            self._fetch(connection.session(found))
        if len(set(self._released.values())) >= self._task.rounds:
            return True
        if not self._party:
            time.sleep(0.2)
            return False
        session = connection.open(self._agreement) if self._task.opens else connection.session(self._agreement)
        self._attend(session)
        return False

    def _fetchable(self, connection: Connection) -> Iterator[bytes]:
        for session in self._member.state.releases():
            if session not in self._released:
                data = self._member.state.release(session)
                assert data is not None
                record = Record.from_bytes(payload_unverified(Bundle.from_bytes(data).record))
                self._released[session] = record.body.sequence
        waiting = [item.session for item in connection.inbox() if item.kind == "fetch"]
        # The coordinator may have sent all of a bundle before this member died: then it does not wait in the inbox.
        joined = [known.session for known in self._member.state.sessions()]
        events = connection.transport.events(0, b"", 0.3) if not self._party else []
        happened = [event.session for event in events if event.kind == "released"]
        for session in dict.fromkeys([*waiting, *joined, *happened]):
            if session not in self._released:
                with suppress(RefusedError):
                    if connection.session(session).status().phase == "released":
                        yield session

    def _fetch(self, session: Session) -> None:
        release = session.release()
        self._released[session.id] = release.sequence
        outcome = Outcome.of(release)
        self._say(
            "released",
            session.id.hex(),
            outcome.body.hex(),
            [[output, salt.hex(), plain.hex()] for output, salt, plain in outcome.plaintexts],
        )

    def _attend(self, session: Session) -> None:
        session.submit({"visits": self._task.csv})

        def seen(status: SessionStatus) -> None:
            phases = {phase for _, phase in status.parties}
            if self._task.opens and status.phase == "open" and phases == {"joined"}:
                session.start()

        try:
            session.wait(timeout_s=GLANCE_S, seen=seen)
        except StateError as error:
            if error.code != "roster" or "signed by itself" not in str(error) or not Path(self._task.by_hand).exists():
                raise
            self._say("by-hand", session.id.hex())
            session.countersign(by_hand=True)


def _run(task: Task) -> int:
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if task.file_bytes:
        limit = (task.file_bytes, resource.RLIM_INFINITY)

    def say(*parts: Any) -> None:
        # The log is no file of the member's.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(log, (json.dumps(parts) + "\n").encode())
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        os.environ.update(task.environment)
        transport._LONGEST_PAUSE_S = 0.5  # type: ignore[misc]  # nobody is away for longer here
        if task.ahead_s:
            clock, ahead = time.time_ns, int(task.ahead_s * 1e9)
            time.time_ns = lambda: clock() + ahead
        Actor(task, say).live()
    except BaseException:
        say("fault", traceback.format_exc())
        return 1
    say("done")
    return 0


def main() -> int:
    """The nursery."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: the kernel forgets them
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                code = _run(Task(**json.loads(line)))
            finally:
                os._exit(code)
        print(child, flush=True)
    return 0


class Nursery:
    """The process that bears members."""

    def __init__(self) -> None:
        tests = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.simulation.actor"],
            env={**os.environ, "PYTHONPATH": tests, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def bear(self, task: Task) -> int:
        """The process id of a new member."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asdict(task)), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """No more members; those that live go on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


if __name__ == "__main__":
    sys.exit(main())
