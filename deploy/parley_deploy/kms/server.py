"""The server: HTTP as boto3 speaks it, in front of the service."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from parley_deploy.kms.errors import KmsError
from parley_deploy.kms.process import ENDPOINT, StartError
from parley_deploy.kms.service import Service
from parley_deploy.kms.tokens import TokenService

BODY_BYTES: Final = 1 << 20
CONTENT_TYPE: Final = "application/x-amz-json-1.1"
_TARGET: Final = "TrentService."


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
        except Exception:  # noqa: BLE001  # AWS answers its own faults as well; the log says which it was
            traceback.print_exc()
            status, answer, word = 500, json.dumps(KmsError("KMSInternalException").body()).encode(), "a fault"
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
    """Serves in this process, which holds the folder, until SIGTERM; 0. StartError where the address is taken."""
    try:
        server = Server(_address(folder, listen), service, tokens)
    except OSError as error:
        raise StartError(f"{listen}: {error.strerror}") from None
    (folder / ENDPOINT).write_text(f"{server.url}\n")
    (folder / "pid").write_text(f"{os.getpid()}\n")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    print(f"KMS, emulated, at {server.url}", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        (folder / "pid").unlink(missing_ok=True)
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
