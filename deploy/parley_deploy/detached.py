"""A command that leaves a process behind: it returns when that process is ready, and the process then goes on alone.

What it leaves has a folder: `lock`, which one process at a time holds, `log`, and the sockets and pid files of its own,
which are gone when it has ended. The command returns 0 also when the folder's process was ready before.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final

ENCLAVE: Final = "enclave.sock"
"""The socket that answers when the process is ready."""
FILES: Final = (ENCLAVE, "nsm.sock", "enclave.pid", "nsm.pid")
SOCKET_PATH_BYTES: Final = 107
"""Longest path of a Unix socket on Linux."""
REASON_BYTES: Final = 2000
"""Most that the command says of why there is nothing ready."""
_PR_SET_PDEATHSIG: Final = 1


class StartError(Exception):
    """What was to be started cannot run: the message says why, to whoever called and in the log."""


class Running:
    """The process that was left behind, from the inside."""

    def __init__(self, folder: Path, log: IO[str], tell: int) -> None:
        self.folder: Final = folder
        self._log = log
        self._tell = tell

    def say(self, text: str) -> None:
        """A line of the log."""
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}", file=self._log, flush=True)

    def ready(self) -> None:
        """Lets the command return 0."""
        self.answer("ready")

    def answer(self, word: str) -> None:
        """The one word or reason that the command waits for; any further one is dropped."""
        if self._tell >= 0:
            try:
                os.write(self._tell, word.encode()[:REASON_BYTES])
            except BrokenPipeError:
                self.say("whoever called did not wait")
            os.close(self._tell)
            self._tell = -1


def leave(folder: Path, serve: Callable[[Running], int], seconds: float, files: Sequence[str] = FILES) -> int:
    """Runs `serve` in a process of its own; 0 when it is ready, 1 with a line on standard error otherwise.

    `serve` returns when all has ended, and raises StartError for what cannot run. SIGTERM raises SystemExit in it.
    `files` of the folder are removed before and after.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    longest = max((folder / name for name in files if name.endswith(".sock")), key=lambda path: len(os.fsencode(path)))
    if len(os.fsencode(longest)) > SOCKET_PATH_BYTES:
        print(f"{longest}: longer than the path of a socket may be ({SOCKET_PATH_BYTES} bytes)", file=sys.stderr)
        return 1
    if listens(folder / ENCLAVE):
        return 0
    ready, tell = os.pipe()
    if os.fork() == 0:
        os.close(ready)
        code = 1
        try:
            code = _detached(folder, serve, tell, seconds, files)
        except SystemExit:
            code = 0
        except BaseException as error:  # noqa: BLE001  # the parent waits for a word, and the log keeps it
            print(f"the enclave did not start: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(tell)
    with os.fdopen(ready, "rb") as answer:
        said = answer.read()
    if said == b"ready":
        return 0
    reason = said.decode(errors="replace")
    print(f"the enclave did not start{': ' + reason if reason else ''}; see {folder / 'log'}", file=sys.stderr)
    return 1


def _detached(folder: Path, serve: Callable[[Running], int], tell: int, seconds: float, files: Sequence[str]) -> int:
    os.setsid()
    running = Running(folder, _redirect(folder / "log"), tell)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Another call is ahead: its enclave is this one's too.
        started = wait(folder / ENCLAVE, lambda: _held(folder / "lock"), seconds)
        running.answer("ready" if started else "another call's enclave does not answer")
        return 0 if started else 1
    # SIGTERM ends all in order, whatever of it there is by then.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        return serve(running)
    except StartError as error:
        running.say(f"the enclave did not start: {error}")
        running.answer(str(error))
        return 1
    finally:
        for name in files:
            (folder / name).unlink(missing_ok=True)


def _held(path: Path) -> bool:
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _redirect(path: Path) -> IO[str]:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for extra in (null, log):
        os.close(extra)
    return os.fdopen(1, "w", buffering=1, closefd=False)


def listens(path: Path) -> bool:
    """Whether a process accepts connections at a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def wait(path: Path, alive: Callable[[], bool], seconds: float) -> bool:
    """Whether a socket answers within some seconds, as long as there is somebody `alive` to make it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and alive():
        if listens(path):
            return True
        time.sleep(0.02)
    return listens(path)


def die_with_parent() -> Callable[[], None] | None:
    """What a child calls before its program starts, so that the kernel kills it when this process is gone."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
