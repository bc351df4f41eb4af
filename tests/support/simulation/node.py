"""Coordinators of a simulation: real processes on folders that are copied from one machine to another, or taken twice."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Self

from support.coordinator import Coordinator
from support.enclave import until
from support.simulation import hindered, launch
from support.simulation.stores import Folder, Shared, Store

LEFT_BEHIND: Final = ("e", "address", "hinder.json", "coordinator.toml", "log")
"""What does not go with a store to another machine: enclaves above all."""
HOLDER: Final = "holder"
"""The file with the name of a folder's coordinator, which no other one of its store may have."""


class Node(Coordinator):
    """A coordinator on a machine of its own, or beside another one (`enclaves`: the folder of what is launched there).

    Its store is in its folder, or `shared`. `twin`: it has the name of the one that `source` is the folder of. `toml` is added
    to its configuration, `environment` to what it is started with.
    """

    def __init__(
        self,
        label: str,
        source: Path,
        folder: Path,
        control: Path,
        command: Sequence[str],
        *,
        shared: Shared | None = None,
        twin: bool = False,
        enclaves: Path | None = None,
        toml: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.label = label
        self.folder = folder
        self.store: Store = shared or Folder(label, folder)
        self.database = f"sqlite:///{folder / 'coordinator.db'}" if shared is None else shared.database
        self.enclaves_folder = enclaves or folder / "e"
        self.process = None
        self.address = ""
        self.clients = []
        self.addresses: set[str] = set()
        """All that it ever listened at."""
        self._environment = {**os.environ, **(environment or {})}
        left = set(LEFT_BEHIND)
        if shared is not None:
            left |= {"coordinator.db", "coordinator.db-wal", "coordinator.db-shm", "blobs"} | (
                set() if twin else {HOLDER}
            )
        shutil.copytree(source, folder, ignore=lambda at, names: left if Path(at) == source else ())
        listed = ", ".join(json.dumps(part) for part in (sys.executable, launch.__file__, str(control), *command))
        lease = "lease_s = 1.5" if shared is None else "lease_s = 2.0"
        (folder / "coordinator.toml").write_text(
            'listen = "127.0.0.1:0"\ngrace_s = 2.0\n'
            f'[launcher.local]\ncommand = [{listed}]\nfolder = "{self.enclaves_folder}"\n'
            "[deadline]\nstatus_s = 0.2\nshort_s = 8.0\n"
            f"[cluster]\n{lease}\nabandon_s = 0.5\n"
            f"{'' if shared is None else shared.toml()}{toml}"
        )
        self.hinder()

    def hinder(self, disk_s: float = 0.0, clock_ms: int = 0) -> None:
        """How slow its disk is, and how far its clock is ahead."""
        part = self.folder / "hinder.part"
        part.write_text(json.dumps({"disk_s": disk_s, "clock_ms": clock_ms}))
        part.replace(self.folder / "hinder.json")

    def start(self) -> Self:
        (self.folder / "address").unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, hindered.__file__, str(self.folder / "hinder.json"), "run", "--dir", str(self.folder)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self._environment,
        )
        # Through a pipe, as to a journal: so that it can be read what it said while its disk was full.
        threading.Thread(target=_copy, args=(self.process.stderr, self.folder / "log"), daemon=True).start()
        process = self.process
        until(lambda: (self.folder / "address").exists() or process.poll() is not None)
        if process.poll() == -signal.SIGKILL:
            return self  # it was killed again before it listened; whoever did that starts it
        assert process.poll() is None, self.log
        self.address = (self.folder / "address").read_text().strip()
        self.addresses.add(self.address)
        return self

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    def fill_disk(self, *, full: bool) -> None:
        """Lets the kernel refuse, or take again, whatever it writes into files."""
        if self.alive:
            assert self.process is not None
            most = 0 if full else resource.RLIM_INFINITY
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    def snapshot(self, folder: Path) -> None:
        """Its disk at one moment, as a power cut would leave it."""
        assert self.process is None or self.process.poll() is None
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)
        try:
            shutil.copytree(self.folder, folder, ignore=lambda at, _names: ("e",) if Path(at) == self.folder else ())
        finally:
            if self.process is not None:
                self.process.send_signal(signal.SIGCONT)

    def enclave(self) -> int | None:
        """The process of its enclave, if there is one now."""
        return self._pid("enclave.pid")

    def nsm(self) -> int | None:
        """The process of its enclave's module."""
        return self._pid("nsm.pid")

    def workers(self) -> list[int]:
        """Its enclave's worker processes."""
        enclave = self.enclave()
        if enclave is None:
            return []
        found: set[int] = set()
        for file in Path(f"/proc/{enclave}/task").glob("*/children"):
            try:
                found |= {int(pid) for pid in file.read_text().split()}
            except OSError:
                continue
        return sorted(found)

    def _pid(self, name: str) -> int | None:
        for folder in self.enclaves():
            try:
                pid = int((folder / name).read_text())
                os.kill(pid, 0)
            except (OSError, ValueError):
                continue
            return pid
        return None

    def end_enclaves(self) -> None:
        super().end_enclaves()
        end = time.monotonic() + 5
        while self.enclave() is not None and time.monotonic() < end:
            time.sleep(0.02)

    def pause(self) -> bool:
        """SIGSTOP; whether it runs."""
        if not self.alive:
            return False
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        return True

    def go_on(self) -> None:
        """SIGCONT, where it still lives."""
        if self.alive:
            assert self.process is not None
            self.process.send_signal(signal.SIGCONT)

    @property
    def name(self) -> str:
        """What it calls itself in its store; empty where it never ran."""
        path = self.folder / HOLDER
        return path.read_text().strip() if path.exists() else ""

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """What its database holds."""
        return self.store.rows(query, *values)

    @property
    def faults(self) -> list[str]:
        """Lines of its log that say that the program itself is wrong, or that are no lines of a log."""
        found = []
        for line in self.log.splitlines() if (self.folder / "log").exists() else ():
            try:
                if json.loads(line)["level"] not in ("debug", "info", "warning"):
                    found.append(line)
            except (ValueError, KeyError, TypeError):
                found.append(line)
        return found


def _copy(lines: IO[bytes], path: Path) -> None:
    with lines, path.open("ab", buffering=0) as log:
        for line in lines:
            log.write(line)
