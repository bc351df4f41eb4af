"""The server, and how it is started and left running.

DIR holds `accounts.json`, `keys.json` (the state, whole after every change), `endpoint` (the URL), `pid` and `log`. A
server that is started again in the same DIR has the same keys and, where port 0 was asked for, the same port.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from parley_deploy.kms.errors import KmsError
from parley_deploy.kms.service import Service
from parley_deploy.kms.tokens import TokenService

BODY_BYTES: Final = 1 << 20
START_SECONDS: Final = 60
"""How long it may take to answer: it imports moto, and makes what moto makes for each key."""
CONTENT_TYPE: Final = "application/x-amz-json-1.1"
ENDPOINT: Final = "endpoint"
_TARGET: Final = "TrentService."


class StartError(Exception):
    """The emulator did not start: the message says why."""


class Server(ThreadingHTTPServer):
    """An HTTP server that answers for a service."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], service: Service, tokens: TokenService) -> None:
        self.service: Final = service
        self.tokens: Final = tokens
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """Where clients find it: the `endpoint_url` of boto3."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Server

    def do_POST(self) -> None:  # the name is the base class's
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > BODY_BYTES:
            self.close_connection = True
            self._send(413, CONTENT_TYPE, b"{}")
            return
        body = self.rfile.read(int(length))
        headers = {name.lower(): value for name, value in self.headers.items()}
        target = headers.get("x-amz-target", "")
        if not target and headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            status, answer = self.server.tokens.answer(headers, body)
            self._send(status, "text/xml", answer)
            return
        try:
            if not target.startswith(_TARGET):
                raise KmsError("UnknownOperationException")
            found = self.server.service.answer(target.removeprefix(_TARGET), headers, body)
            status, answer = 200, json.dumps(found).encode()
            word = "ok"
        except KmsError as error:
            status, answer, word = error.status, json.dumps(error.body()).encode(), f"{error.code}: {error.message}"
        self.log_message("%s %s", target.removeprefix(_TARGET), word)
        self._send(status, CONTENT_TYPE, answer)

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Nothing: the operation and its outcome are logged, which say more."""


def run(folder: Path, listen: str, service: Service, tokens: TokenService) -> int:
    """Serves in this process until SIGTERM; 0. StartError where another serves the folder or the address is taken."""
    lock = (folder / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartError(f"{folder}: another emulator serves it") from None
    host, port = _address(folder, listen)
    try:
        server = Server((host, port), service, tokens)
    except OSError as error:
        raise StartError(f"{listen}: {error.strerror}") from None
    (folder / "pid").write_text(f"{os.getpid()}\n")
    (folder / ENDPOINT).write_text(f"{server.url}\n")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    print(f"KMS, emulated, at {server.url}", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        (folder / "pid").unlink(missing_ok=True)
        lock.close()
    return 0


def _address(folder: Path, listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise StartError(f"{listen}: not HOST:PORT")
    before = folder / ENDPOINT
    if port == "0" and before.exists():
        # Clients know it by its address.
        return host, urlsplit(before.read_text().strip()).port or 0
    return host, int(port)


def serving(folder: Path) -> str | None:
    """The URL of the emulator that serves a folder now; None where none does."""
    try:
        with (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        if (folder / "pid").exists() and (folder / ENDPOINT).exists():
            return (folder / ENDPOINT).read_text().strip()
    return None


def start(folder: Path, root: Path, *options: str) -> str:
    """Leaves an emulator running and gives its URL; the one that runs already where one does. StartError.

    `root`: folder of the local root. `options`: more of the command line, such as "--form", "octets".
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (url := serving(folder)) is not None:
        return url
    (folder / "pid").unlink(missing_ok=True)
    command = [sys.executable, "-m", "parley_deploy.kms", "--dir", str(folder), "--root", str(root.resolve())]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--foreground", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if (url := serving(folder)) is not None:
            return url
        time.sleep(0.02)
    process.kill()
    process.wait()
    lines = (folder / "log").read_text("utf-8", errors="replace").splitlines()
    raise StartError(f"the emulated KMS did not start: {lines[-1] if lines else 'it said nothing'}")


def stop(folder: Path, *, signal_: int = signal.SIGTERM) -> None:
    """Ends the emulator of a folder, if one runs, and waits until it is gone. `signal_`: how, SIGKILL included."""
    if serving(folder) is None:
        return
    pid = int((folder / "pid").read_text())
    os.kill(pid, signal_)
    end = time.monotonic() + START_SECONDS
    while serving(folder) is not None:
        if time.monotonic() > end:
            raise TimeoutError(f"the emulated KMS with pid {pid} does not end")
        time.sleep(0.02)
