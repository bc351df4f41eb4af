"""How the emulator is started and left running, found and ended; light to import.

Its folder holds `accounts.json`, `keys.json` (the state, whole after every change), `endpoint` (the URL), `pid` and `log`.
One that is started again in the same folder has the same keys and, where port 0 was asked for, the same port.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Final
from urllib.parse import urlsplit

START_SECONDS: Final = 60
"""How long it may take to answer: it imports moto, and makes what moto makes for each key."""
ENDPOINT: Final = "endpoint"


class StartError(Exception):
    """The emulator did not start: the message says why."""


def hold(folder: Path) -> IO[str]:
    """The folder's lock, which one server at a time holds; StartError where another does."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = (folder / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise StartError(f"{folder}: another emulator serves it") from None
    (folder / "pid").unlink(missing_ok=True)
    return lock


def serving(folder: Path) -> str | None:
    """The URL of the emulator that serves a folder and listens now; None where none does."""
    if not _held(folder) or not (folder / "pid").exists():
        return None
    url = (folder / ENDPOINT).read_text().strip()
    address = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        return url if probe.connect_ex((address.hostname or "", address.port or 0)) == 0 else None


def _held(folder: Path) -> bool:
    try:
        with (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def start(folder: Path, root: Path, *options: str) -> str:
    """Leaves an emulator running and gives its URL; the one that runs already where one does. StartError.

    `root`: folder of the local root. `options`: more of the command line, such as "--form", "octets".
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (url := serving(folder)) is not None:
        return url
    command = [sys.executable, "-m", "parley_deploy.kms", "--dir", str(folder), "--root", str(root.resolve())]
    with (folder / "log").open("ab") as log:
        # It returns when it holds the folder, and leaves a process that is nobody's child.
        subprocess.run([*command, "--behind", *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and _held(folder):
        if (url := serving(folder)) is not None:
            return url
        time.sleep(0.02)
    lines = (folder / "log").read_text("utf-8", errors="replace").splitlines()
    raise StartError(f"the emulated KMS did not start: {lines[-1] if lines else 'it said nothing'}")


def stop(folder: Path, *, signal_: int = signal.SIGTERM) -> None:
    """Ends the emulator of a folder, if one runs, and waits until it is gone. `signal_`: how, SIGKILL included."""
    if serving(folder) is None:
        return
    pid = int((folder / "pid").read_text())
    os.kill(pid, signal_)
    end = time.monotonic() + START_SECONDS
    while _held(folder):
        if time.monotonic() > end:
            raise TimeoutError(f"the emulated KMS with pid {pid} does not end")
        time.sleep(0.02)
