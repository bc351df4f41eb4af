"""A proxy before what speaks HTTP, a bucket or KMS: it refuses, cuts, holds, and answers in their stead as they do under load.

Requests go on with the headers that they came with, since the signature covers the host's name, too.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import urlsplit

FAULTS: Final = ("refused", "cut", "throttled", "failed", "bare", "held", "asked", "answered")
"""A request finds nobody; it takes effect, and its answer ends in the middle; it is answered that there are too many of them,
or that there was an error within, or by a balancer that found nobody; it goes on after `seconds`. The last two do nothing to
it, but call `act` before it goes on, or before its answer does; with `drop` that is all."""
ANSWER_S: Final = 60.0
_KMS: Final = "TrentService."
_ERRORS: Final = {
    ("kms", "throttled"): (400, "ThrottlingException"),
    ("kms", "failed"): (500, "KMSInternalException"),
    ("s3", "throttled"): (503, "SlowDown"),
    ("s3", "failed"): (500, "InternalError"),
}


@dataclass
class FrontRule:
    """What happens to the next `count` requests of an operation (of any where it is empty): of KMS its own name, of a bucket
    the method of HTTP."""

    fault: str
    operation: str = ""
    count: int = 1
    seconds: float = 0.0
    drop: bool = False
    act: Callable[[], object] = lambda: None

    @property
    def struck(self) -> bool:
        """Whether nothing more happens by it."""
        return not self.count

    def __str__(self) -> str:
        return f"{self.fault} {self.operation or 'requests'}, {self.count} more"


class Front:
    """The proxy at `url`. `kind`: s3 or kms; `target`: the URL of what is behind it now. `saw` gets (operation, when it came by
    the monotonic clock, request, status, answer) of what was answered from there."""

    def __init__(self, kind: str, target: Callable[[], str]) -> None:
        self.kind = kind
        self.target = target
        self.saw: Callable[[str, float, bytes, int, bytes], None] = lambda *_: None
        self.away = False
        """Whether nobody is there for anybody."""
        self.rules: list[FrontRule] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name=f"front-{kind}", daemon=True).start()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def arm(self, rule: FrontRule) -> None:
        """A rule stands until it has struck as often as it says."""
        with self._lock:
            self.rules.append(rule)

    def strike(self, operation: str) -> FrontRule | None:
        """The rule that strikes a request."""
        with self._lock:
            for rule in self.rules:
                if rule.count and rule.operation in ("", operation):
                    rule.count -= 1
                    return rule
        return None

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, front: Front) -> None:
        self.front = front
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that were killed break connections, too."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 120
    server: _Server

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._run
        raise AttributeError(name)

    def _run(self) -> None:
        front = self.server.front
        came = time.monotonic()
        if front.away:
            self._reset()
            return
        operation = self.headers.get("X-Amz-Target", "").removeprefix(_KMS) or str(self.command)
        rule = front.strike(operation)
        fault = "" if rule is None else rule.fault
        if fault == "refused":
            self._reset()
            return
        assert "Transfer-Encoding" not in self.headers, "requests here have a length"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if rule is not None and fault in ("throttled", "failed", "bare"):
            self._instead(fault)
            return
        if rule is not None and fault == "held":
            time.sleep(rule.seconds)
        if rule is not None and fault == "asked":
            rule.act()
            if rule.drop:
                self._reset()
                return
        try:
            answer, data = self._forward(body)
        except OSError:
            # What is behind is down, or was killed over it.
            self._reset()
            return
        front.saw(operation, came, body, answer.status, data)
        if rule is not None and fault == "answered":
            rule.act()
            if rule.drop:
                self._reset()
                return
        self._answer(answer, data, cut=fault == "cut")

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        address = urlsplit(self.server.front.target())
        assert address.hostname is not None
        behind = http.client.HTTPConnection(address.hostname, address.port, timeout=ANSWER_S)
        try:
            behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    behind.putheader(name, value)
            behind.endheaders(body or None)
            answer = behind.getresponse()
            return answer, answer.read()
        except http.client.HTTPException as error:
            raise ConnectionResetError(str(error)) from error
        finally:
            behind.close()

    def _answer(self, answer: http.client.HTTPResponse, data: bytes, *, cut: bool) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        if cut and not data:
            self._reset()
            return
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._reset()

    def _instead(self, fault: str) -> None:
        kind = self.server.front.kind
        if fault == "bare":
            status, media, body = 503, "text/html", b"<html><body>503 Service Temporarily Unavailable</body></html>"
        else:
            status, code = _ERRORS[kind, fault]
            media, body = "application/x-amz-json-1.1", json.dumps({"__type": code, "message": "later"}).encode()
            if kind == "s3":
                media = "application/xml"
                body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>later</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        # Nothing that is on its way arrives any more: the other side sees a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Nothing."""
