"""The command of the launcher `local`: a simulated NSM and an enclave, detached, the enclave in a network of its own.

    python -m parley_deploy.enclave --dir DIR --root ROOT [--workers N] [--tree TREE] [--python EXE]

Two processes outlive the caller: the NSM (this program, detached) and the enclave, its child. DIR then holds
`enclave.sock` and `nsm.sock`, `enclave.pid` and `nsm.pid`, and `log`. Both end together: the NSM ends when the enclave
does, and the kernel kills the enclave when the NSM is gone. The call returns 0 when the enclave answers at its socket,
also when it did so before. An enclave's memory is its only state: a new one in the same DIR knows nothing of the last.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final

from parley_deploy.nsm import LocalRoot, SimulatedNsm, image_measurements, serve

START_SECONDS: Final = 30
"""How long an enclave may take to listen: it imports numpy on a machine that may be busy."""
SOCKET_PATH_BYTES: Final = 107
"""Longest path of a Unix socket on Linux."""
_PR_SET_PDEATHSIG: Final = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the pair and waits until the enclave listens; 0 when it does, 1 with a line on standard error otherwise."""
    options = _parser().parse_args(arguments)
    folder: Path = options.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    enclave_socket = folder / "enclave.sock"
    if len(os.fsencode(enclave_socket)) > SOCKET_PATH_BYTES:
        print(f"{enclave_socket}: longer than the path of a socket may be ({SOCKET_PATH_BYTES} bytes)", file=sys.stderr)
        return 1
    if listens(enclave_socket):
        return 0
    ready, tell = os.pipe()
    if os.fork() == 0:
        os.close(ready)
        code = 1
        try:
            code = _detached(options, folder, tell)
        except SystemExit:
            code = 0
        except BaseException as error:  # noqa: BLE001  # the parent waits for a word, and the log keeps it
            print(f"the enclave did not start: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(tell)
    with os.fdopen(ready, "rb") as answer:
        if answer.read() == b"ready":
            return 0
    print(f"the enclave did not start; see {folder / 'log'}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parley_deploy.enclave", description="Start a simulated enclave.")
    parser.add_argument("--dir", type=Path, required=True, help="where sockets, pid files and log stand")
    parser.add_argument("--root", type=Path, required=True, help="folder of the local root that certifies the NSM")
    parser.add_argument("--agreement-hint", default="", help="digest of the agreement, for the log only")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes of the enclave")
    parser.add_argument(
        "--tree", type=Path, default=None, help="image tree to run and measure; default: what is installed"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the enclave")
    return parser


def listens(path: Path) -> bool:
    """Whether a process accepts connections at a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _detached(options: argparse.Namespace, folder: Path, tell: int) -> int:
    os.setsid()
    log = _redirect(folder / "log")
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Another call is ahead: its enclave is this one's too.
        started = _wait(folder / "enclave.sock", lambda: True)
        os.write(tell, b"ready" if started else b"late")
        return 0 if started else 1
    # SIGTERM ends the pair in order, whatever of it there is by then.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    _say(log, f"starting for agreement {options.agreement_hint or 'not named'}")
    for name in ("enclave.sock", "nsm.sock", "enclave.pid"):
        (folder / name).unlink(missing_ok=True)
    nsm = SimulatedNsm.create(LocalRoot.load(options.root), image_measurements(options.tree))
    server = _listen(folder / "nsm.sock", nsm)
    (folder / "nsm.pid").write_text(f"{os.getpid()}\n")
    enclave = _start_enclave(options, folder, log)
    (folder / "enclave.pid").write_text(f"{enclave.pid}\n")
    try:
        if not _wait(folder / "enclave.sock", lambda: enclave.poll() is None):
            _say(log, "the enclave does not listen")
            return 1
        os.write(tell, b"ready")
        os.close(tell)
        code = enclave.wait()
        _say(log, f"the enclave ended with code {code}")
        return 0
    finally:
        enclave.kill()
        enclave.wait()
        server.close()
        for name in ("enclave.sock", "nsm.sock", "enclave.pid", "nsm.pid"):
            (folder / name).unlink(missing_ok=True)


def _redirect(path: Path) -> IO[str]:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for extra in (null, log):
        os.close(extra)
    return os.fdopen(1, "w", buffering=1, closefd=False)


def _say(log: IO[str], text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}", file=log, flush=True)


def _wait(path: Path, alive: Callable[[], bool]) -> bool:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and alive():
        if listens(path):
            return True
        time.sleep(0.02)
    return False


def network_namespace() -> list[str]:
    """The prefix of a command that runs it without any network; empty where this machine does not allow that."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    for options in (["--net"], ["--user", "--map-root-user", "--net"]):
        prefix = [unshare, *options, "--"]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return []


def _start_enclave(options: argparse.Namespace, folder: Path, log: IO[str]) -> subprocess.Popen[bytes]:
    prefix = network_namespace()
    if prefix:
        _say(log, "the enclave has a network namespace of its own, without interfaces")
    else:
        _say(log, "WARNING: THE ENCLAVE SHARES THE NETWORK OF THIS MACHINE: network namespaces are not allowed here")
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    if options.tree is not None:
        environment["PYTHONPATH"] = str(options.tree.resolve())
    elif "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    # -P: the working directory, which the host fills, is no place for modules.
    command = [options.python, "-P", "-m", "parley_enclave", "--listen", f"unix:{folder / 'enclave.sock'}"]
    command += ["--nsm", f"unix:{folder / 'nsm.sock'}", "--workers", str(options.workers)]
    # The enclave ends with this process, as a real one ends with its hypervisor.
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    return subprocess.Popen(
        [*prefix, *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=None if libc is None else lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509  # one system call
    )


def _listen(path: Path, nsm: SimulatedNsm) -> socket.socket:
    """The module behind a Unix socket, each connection in a thread; close the socket to end."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(16)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(nsm, connection), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener


if __name__ == "__main__":
    sys.exit(main())
