"""Launchers: how an enclave comes to be. One enclave serves one agreement; it outlives the coordinator that launched it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from parley_coordinator import log, relay
from parley_coordinator.clock import now_ms
from parley_coordinator.config import ConfigError, Local
from parley_coordinator.images import Images, Wanted
from parley_coordinator.node import exclusive, held, is_held
from parley_protocol.errors import UnavailableError

SOCKET_PATH_BYTES: Final = 107
"""Longest path of a Unix socket on Linux."""
STARTING_FILE: Final = "starting"
"""In the folder of an enclave, locked as long as a coordinator starts it."""
RETRY_MS: Final = 30_000
"""When to ask again, where an enclave did not start or none is free."""
STOP_S: Final = 5.0
LOCK_S: Final = 60.0
"""How long another coordinator may look at the folder, and end what is there."""
_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class EnclaveHandle:
    """A running enclave: the launcher's name for it, the digest of its agreement, and where it listens."""

    id: str
    agreement: bytes
    address: str


def no_capacity(most: int) -> UnavailableError:
    """All enclaves that may run at a time do."""
    return UnavailableError(
        f"all {most} enclaves of this coordinator are in use", code="no-capacity", retry_after_ms=RETRY_MS
    )


@contextmanager
def writing() -> Iterator[None]:
    """What the disk says to a launcher as UnavailableError: a full one has room again when the operator has looked."""
    try:
        yield
    except OSError as error:
        log.warning("launcher-disk", error=errno.errorcode.get(error.errno or 0, type(error).__name__))
        raise UnavailableError(
            "the coordinator cannot note its enclaves on its disk", retry_after_ms=RETRY_MS
        ) from error


class Launcher(Protocol):
    """Starts, finds and stops enclaves."""

    def launch(self, wanted: Wanted) -> EnclaveHandle:
        """A new enclave that listens. UnavailableError: `no-capacity` with the time to wait, or it did not start;
        RefusedError "attestation": no enclave that this launcher can start is one that the agreement accepts."""

    def find(self) -> list[EnclaveHandle]:
        """The enclaves that are alive, those of a former coordinator included; UnavailableError where that is not known."""

    def room(self) -> bool:
        """Whether a launch would find a place now; UnavailableError where that is not known."""

    def alive(self, handle: EnclaveHandle) -> bool:
        """False where it is certain that an enclave has ended."""

    def stop(self, handle: EnclaveHandle, unless: Callable[[], bool] = lambda: False) -> None:
        """Ends an enclave and frees its place; nothing where it has ended, nor where `unless` is true: it is asked while no
        coordinator of this machine looks for enclaves, so whoever finds this one later finds it ended."""

    def close(self) -> None:
        """Ends launches that are under way, with UnavailableError; enclaves live on."""


class LocalLauncher:
    """Enclaves as detached processes, one folder each: `enclave.sock`, `enclave.pid`, `nsm.pid` and `handle.json`.

    The command of the configuration makes them; `most` may run at a time. It simulates or emulates the platform, so only
    agreements that say `simulated` can be served; the enclave itself refuses the others.
    """

    def __init__(self, config: Local, most: int) -> None:
        # Coordinators that share the folder may spell it differently, and know a process by the folder in its command line.
        config = replace(config, folder=config.folder.resolve())
        self._config = config
        self._most = most
        # Held while folders are counted, made and removed; never while an enclave starts.
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._images = Images(now_ms)
        longest = len(os.fsencode(config.folder / "00000000" / "enclave.sock"))
        if longest > SOCKET_PATH_BYTES:
            raise ConfigError(
                f"{config.section}.folder: {config.folder} makes sockets' paths of {longest} bytes;"
                f" at most {SOCKET_PATH_BYTES}"
            )
        config.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def launch(self, wanted: Wanted) -> EnclaveHandle:
        if self._config.image is not None:
            self._images.check(self._config.image, f"{self._config.section}.image", wanted)
        with contextlib.ExitStack() as stack:
            return self._launch(wanted, stack)

    def _launch(self, wanted: Wanted, stack: contextlib.ExitStack) -> EnclaveHandle:
        folder = self._config.folder / secrets.token_hex(4)
        handle = EnclaveHandle(folder.name, wanted.digest, f"unix:{folder / 'enclave.sock'}")
        with self._alone():
            if not self._room():
                raise no_capacity(self._most)
            stack.enter_context(self._stopped_unless_started(handle))
            folder.mkdir(mode=0o700)
            (folder / "handle.json").write_text(json.dumps({"agreement": wanted.digest.hex()}), encoding="utf-8")
            stack.enter_context(held(folder / STARTING_FILE))
        self._start(folder, wanted.digest)
        return handle

    @contextmanager
    def _stopped_unless_started(self, handle: EnclaveHandle) -> Iterator[None]:
        try:
            with writing():
                yield
        except BaseException:
            self._stop(handle)
            raise

    def find(self) -> list[EnclaveHandle]:
        with self._alone():
            return self._look()[0]

    def room(self) -> bool:
        with self._alone():
            return self._room()

    def _room(self) -> bool:
        found, starting = self._look()
        return len(found) + starting < self._most

    def alive(self, handle: EnclaveHandle) -> bool:
        return _listens(self._config.folder / handle.id)

    def stop(self, handle: EnclaveHandle, unless: Callable[[], bool] = lambda: False) -> None:
        with self._alone():
            if not unless():
                self._stop(handle)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """In this process and, where several coordinators share the folder, among them."""
        with self._lock, exclusive(self._config.folder, LOCK_S):
            yield

    def close(self) -> None:
        self._closing.set()

    def _start(self, folder: Path, agreement: bytes) -> None:
        command = [*self._config.command, "--dir", str(folder), "--agreement-hint", agreement.hex()]
        with (folder / "launch.log").open("ab") as output:
            try:
                # A session of its own: a signal to the coordinator's terminal is none to the enclave.
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
                code = self._wait(process)
            except (OSError, subprocess.TimeoutExpired) as error:
                log.warning("launch-failed", enclave=folder.name, error=type(error).__name__)
                raise UnavailableError("the enclave did not start", retry_after_ms=RETRY_MS) from error
        if code != 0 or not _listens(folder):
            tail = (folder / "launch.log").read_text(encoding="utf-8", errors="replace")[-500:]
            log.warning("launch-failed", enclave=folder.name, code=code, said=tail)
            raise UnavailableError("the enclave did not start", retry_after_ms=RETRY_MS)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit code. It is killed where its time is over (TimeoutExpired) or the launcher closes (UnavailableError)."""
        end = time.monotonic() + self._config.start_s
        with process:
            try:
                while (code := process.poll()) is None:
                    if self._closing.wait(_POLL_S):
                        raise UnavailableError("the coordinator is stopping")
                    if time.monotonic() > end:
                        raise subprocess.TimeoutExpired(process.args, self._config.start_s)
            except BaseException:
                # What it has detached from this group has its pid files, if it is there yet; without a folder it ends.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        return code

    def _look(self) -> tuple[list[EnclaveHandle], int]:
        """The enclaves that are alive, and how many are being started: each takes a place, and what does not answer yet has
        not ended, whichever coordinator starts it."""
        found, starting = [], 0
        for folder in sorted(path for path in self._config.folder.iterdir() if path.is_dir()):
            if is_held(folder / STARTING_FILE):
                starting += 1
                continue
            try:
                agreement = bytes.fromhex(json.loads((folder / "handle.json").read_text(encoding="utf-8"))["agreement"])
            except (OSError, ValueError, KeyError, TypeError):
                log.warning("launcher-folder-unknown", folder=folder.name)
                continue
            handle = EnclaveHandle(folder.name, agreement, f"unix:{folder / 'enclave.sock'}")
            if _listens(folder):
                found.append(handle)
            else:
                self._stop(handle)
        return found, starting

    def _stop(self, handle: EnclaveHandle) -> None:
        folder = self._config.folder / handle.id
        if not folder.is_dir():
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            pids = [pid for name in ("nsm.pid", "enclave.pid") if (pid := _process(folder / name, folder)) is not None]
            for pid in pids:
                _signal(pid, sign)
            if _until(lambda: all(not _alive(pid) for pid in pids), STOP_S):  # noqa: B023  # called before the next turn
                break
        shutil.rmtree(folder, ignore_errors=True)


def _listens(folder: Path) -> bool:
    try:
        relay.connect(f"unix:{folder / 'enclave.sock'}").close()
    except relay.GoneError:
        return False
    except UnavailableError:
        # It does not answer now, as under load; only an empty socket means that it is gone.
        return True
    return True


def _process(path: Path, folder: Path) -> int | None:
    """The process in a pid file, if it is still the one that was started for `folder`: numbers are used again."""
    try:
        pid = int(path.read_text(encoding="utf-8"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(folder) in command else None


def _signal(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        log.debug("process-ended", pid=pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in ("Z", "X")


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
