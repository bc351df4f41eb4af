"""The command of the launcher `local`: a simulated NSM and an enclave, detached, the enclave in a network of its own.

    python -m parley_deploy.enclave --dir DIR --root ROOT [--workers N] [--tree TREE] [--python EXE]

Two processes outlive the caller: the NSM (this program, detached) and the enclave, its child. DIR then holds
`enclave.sock` and `nsm.sock`, `enclave.pid` and `nsm.pid`, and `log`. Both end together: the NSM ends when the enclave
does, and the kernel kills the enclave when the NSM is gone. The call returns 0 when the enclave answers at its socket,
also when it did so before. An enclave's memory is its only state: a new one in the same DIR knows nothing of the last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from parley_deploy import detached
from parley_deploy.detached import Running, StartError
from parley_deploy.nsm import LocalRoot, SimulatedNsm, image_measurements, serve

START_SECONDS: Final = 30
"""How long an enclave may take to listen: it imports numpy on a machine that may be busy."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the pair and waits until the enclave listens; 0 when it does, 1 with a line on standard error otherwise."""
    options = _parser().parse_args(arguments)
    return detached.leave(options.dir, lambda running: _serve(options, running), START_SECONDS)


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


def _serve(options: argparse.Namespace, running: Running) -> int:
    folder = running.folder
    running.say(f"starting for agreement {options.agreement_hint or 'not named'}")
    nsm = SimulatedNsm.create(LocalRoot.load(options.root), image_measurements(options.tree))
    server = _listen(folder / "nsm.sock", nsm)
    (folder / "nsm.pid").write_text(f"{os.getpid()}\n")
    enclave = _start_enclave(options, running)
    (folder / "enclave.pid").write_text(f"{enclave.pid}\n")
    try:
        if not detached.wait(folder / detached.ENCLAVE, lambda: enclave.poll() is None, START_SECONDS):
            raise StartError("the enclave does not listen")
        running.ready()
        code = enclave.wait()
        running.say(f"the enclave ended with code {code}")
        return 0
    finally:
        enclave.kill()
        enclave.wait()
        server.close()


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


def _start_enclave(options: argparse.Namespace, running: Running) -> subprocess.Popen[bytes]:
    folder = running.folder
    prefix = network_namespace()
    if prefix:
        running.say("the enclave has a network namespace of its own, without interfaces")
    else:
        running.say("WARNING: THE ENCLAVE SHARES THE NETWORK OF THIS MACHINE: network namespaces are not allowed here")
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    if options.tree is not None:
        environment["PYTHONPATH"] = str(options.tree.resolve())
    elif "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    # -P: the working directory, which the host fills, is no place for modules.
    command = [options.python, "-P", "-m", "parley_enclave", "--listen", f"unix:{folder / 'enclave.sock'}"]
    command += ["--nsm", f"unix:{folder / 'nsm.sock'}", "--workers", str(options.workers)]
    # The enclave ends with this process, as a real one ends with its hypervisor.
    return subprocess.Popen(
        [*prefix, *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=detached.die_with_parent(),  # noqa: PLW1509  # one system call
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
