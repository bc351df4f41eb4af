"""A PostgreSQL of the tests' own: a cluster in a folder, at a Unix socket alone, from the packages of the distribution."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest
from sqlalchemy import create_engine, text

from parley_coordinator import migrations

USER = "postgres"
_PLACES = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt/postgresql", "/usr/local/opt/postgresql")

# Not with `user` of subprocess: that forks, which a process whose threads are in gRPC does not survive.
_BECOME = """
import os, pwd, sys
who = pwd.getpwnam(sys.argv[1])
os.setgroups([])
os.setgid(who.pw_gid)
os.setuid(who.pw_uid)
os.execv(sys.argv[2], sys.argv[2:])
"""


def programs() -> Path | None:
    """The folder with initdb and postgres, newest version first."""
    found = [path.parent for place in _PLACES for path in Path(place).glob("**/bin/initdb")]
    found += [Path(path).resolve().parent for path in (shutil.which("initdb"),) if path]
    usable = [folder for folder in found if (folder / "postgres").exists()]
    return max(usable, key=lambda folder: [int(part) for part in folder.parts if part.isdecimal()], default=None)


def install() -> Path:
    """The programs; installed by apt-get where root may. Skips, and says so, where they cannot be had."""
    there = programs()
    if there is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "postgresql"]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, check=False)
        there = programs()
    if there is None:
        pytest.skip("POSTGRESQL IS NOT HERE AND CANNOT BE INSTALLED: what only it can show is NOT tested")
    return there


class Cluster:
    """A running server; `database()` makes an empty database and gives its URL."""

    def __init__(self, folder: Path, *, fsync: bool = False) -> None:
        self._fsync = fsync
        self._bin = install()
        self._folder = folder
        self._count = 0
        self._template = ""
        self._user = USER if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        self._as = [sys.executable, "-I", "-S", "-c", _BECOME, USER] if os.geteuid() == 0 else []
        if self._as:
            shutil.chown(folder, USER, USER)
        self._run("initdb", "--pgdata", "data", "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync")
        self.start()

    def start(self) -> Self:
        """Starts the server and waits until it answers."""
        # The machine lives on when the server is killed here, so its page cache is as good as a disk.
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._folder}' -c max_connections=200"
        options += f" -c fsync={'on' if self._fsync else 'off'}"
        self._run("pg_ctl", "--pgdata", "data", "--wait", "--log", "log", "--options", options, "start")
        return self

    def stop(self, mode: str = "fast") -> None:
        """Stops it: `fast` ends connections in order, `immediate` is a crash."""
        self._run("pg_ctl", "--pgdata", "data", "--wait", "--mode", mode, "stop")

    def kill(self) -> None:
        """kill -9 of all its processes, as a power cut of its machine."""
        first = int((self._folder / "data" / "postmaster.pid").read_text().split()[0])
        pids = [first, *_children(first)]
        # Stopped first, it makes no more of them.
        os.kill(first, signal.SIGSTOP)
        for pid in {*pids, *_children(first)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while any(_alive(pid) for pid in pids):
            assert time.monotonic() < end, "PostgreSQL does not die"
            time.sleep(0.01)
        # After a power cut these numbers are nobody's; here they are, until somebody has asked how they ended.
        for name in ("data/postmaster.pid", ".s.PGSQL.5432.lock"):
            (self._folder / name).unlink(missing_ok=True)

    def database(self, template: str = "template1") -> str:
        """The URL of a new database."""
        self._count += 1
        name = f"parley{self._count}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def migrated(self) -> str:
        """The URL of a new database with the store's tables."""
        if not self._template:
            url = self.database()
            migrations.migrate(url)
            self._template = f"parley{self._count}"
        return self.database(self._template)

    def url(self, name: str) -> str:
        """The URL of a database."""
        return f"postgresql+psycopg://{self._user}@/{name}?host={self._folder}"

    def execute(self, statement: str, name: str = "postgres") -> list[tuple[object, ...]]:
        """The rows of one statement, outside of a transaction."""
        engine = create_engine(self.url(name), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                result = connection.execute(text(statement))
                return [tuple(row) for row in result] if result.returns_rows else []
        finally:
            engine.dispose()

    def _run(self, program: str, *arguments: str) -> None:
        # A server that is started would keep a pipe open.
        speaks = "start" not in arguments
        run = subprocess.run(
            [*self._as, str(self._bin / program), *arguments],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if speaks else subprocess.DEVNULL,
            stderr=subprocess.STDOUT if speaks else subprocess.DEVNULL,
            text=True,
            check=False,
            timeout=120,
        )
        log = self._folder / "log"
        said = run.stdout or (log.read_text(errors="replace")[-2000:] if log.exists() else "")
        assert run.returncode == 0, f"{program} {arguments[-1]}: {run.returncode}: {said}"


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        found |= {int(child) for child in file.read_text().split()}
    return found


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in ("Z", "X")


@contextmanager
def cluster(*, fsync: bool = False) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts. Its path is short, for its socket's sake, and open to the server's user."""
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        made = Cluster(Path(name), fsync=fsync)
        try:
            yield made
        finally:
            made.stop("immediate")
