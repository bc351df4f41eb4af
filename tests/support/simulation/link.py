"""The wire between coordinators and enclaves: the host's end of each enclave's socket, which loses and holds what it is told to.

It sees what the host sees. One operation has one connection (SPEC, "Framing"); a rule strikes the next one of its kind.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from parley_protocol import framing, limits
from parley_protocol.errors import MalformedError
from parley_protocol.v1 import enclave_pb2 as pb
from support.simulation.launch import INNER

FAULTS: Final = ("lost-request", "lost-response", "held", "broken", "asked", "answered")
"""As in `calls`. The operation `pull` is each one on a Serve connection, which it may break."""
_PART: Final = 1 << 18


@dataclass
class LinkRule:
    """What happens to the next operation of a kind."""

    fault: str
    op: str
    seconds: float = 0.0
    skip: int = 0
    only: Callable[[], bool] = lambda: True
    """Whether this is one that it strikes."""
    drop: bool = False
    """Where `act` is called before an answer is passed on: whether it is not."""
    act: Callable[[], object] = lambda: None
    struck: bool = False

    def __str__(self) -> str:
        late = f" {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.fault}{late} {self.op} at the enclave"


class Links:
    """The wires of all enclaves of a theatre. `saw` gets (operation, frame, whether it is an answer) of what crosses, the frames
    of tables aside."""

    def __init__(self, control: Path) -> None:
        self.control = control
        self.rules: list[LinkRule] = []
        self.saw: Callable[[str, bytes, bool], None] = lambda _op, _frame, _answer: None
        self.closing = False
        self._lock = threading.Lock()
        self._wires: list[_Wire] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(control))
        self._listener.listen(8)
        threading.Thread(target=self._accept, name="links", daemon=True).start()

    def arm(self, rule: LinkRule) -> None:
        """A rule stands until it strikes."""
        with self._lock:
            self.rules.append(rule)

    def strike(self, op: str) -> LinkRule | None:
        """The rule that strikes an operation."""
        with self._lock:
            for rule in self.rules:
                if not rule.struck and rule.op == op and rule.only():
                    if rule.skip:
                        rule.skip -= 1
                        continue
                    rule.struck = True
                    return rule
        return None

    def close(self) -> None:
        """Ends all wires."""
        self.closing = True
        self._listener.close()
        for wire in self._wires:
            wire.close()

    def _accept(self) -> None:
        while True:
            try:
                asking, _ = self._listener.accept()
            except OSError:
                return
            with asking:
                asking.settimeout(10)
                folder = Path(asking.recv(4096).decode().strip())
                try:
                    wire = _Wire(self, folder)
                except OSError:
                    continue  # the enclave has ended meanwhile: whoever asks learns it from the broken connection
                self._wires.append(wire)
                asking.sendall(b"+")


class _Wire:
    """The host's end of one enclave's socket. It is gone when the enclave is."""

    def __init__(self, links: Links, folder: Path) -> None:
        self._links = links
        self._path = folder / "enclave.sock"
        self._real = str(folder / INNER / "enclave.sock")
        self._enclave = os.pidfd_open(int((folder / "enclave.pid").read_text()))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._path))
        self._listener.listen(128)
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._outlive, daemon=True).start()

    def close(self) -> None:
        """No connection any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _outlive(self) -> None:
        poll = select.poll()
        poll.register(self._enclave, select.POLLIN)
        while not self._links.closing and not poll.poll(1000):
            continue
        os.close(self._enclave)
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                host, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._run, args=(host,), daemon=True).start()

    def _run(self, host: socket.socket) -> None:
        with host, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as enclave, contextlib.suppress(OSError):
            with self._lock:
                self._open |= {host, enclave}
            try:
                asked = _frame(host)
                if asked is not None:
                    enclave.connect(self._real)
                    self._operate(host, enclave, asked)
            finally:
                with self._lock:
                    self._open -= {host, enclave}

    def _operate(self, host: socket.socket, enclave: socket.socket, asked: bytes) -> None:
        op = pb.Ask.FromString(asked[framing.HEADER_BYTES :]).WhichOneof("op") or ""
        rule = self._links.strike(op)
        fault = "" if rule is None else rule.fault
        if fault == "lost-request":
            return
        if rule is not None and fault == "held":
            time.sleep(rule.seconds)
        if rule is not None and fault == "asked":
            rule.act()
        self._links.saw(op, asked, False)
        enclave.sendall(asked)
        if op == "serve":
            self._serve(host, enclave)
            return
        try:
            while (answer := _frame(enclave)) is not None:
                self._links.saw(op, answer, True)
                kind = pb.Answer.FromString(answer[framing.HEADER_BYTES :]).WhichOneof("op")
                if fault == "lost-response" and kind != "progress":
                    return
                if rule is not None and fault == "answered" and kind not in ("progress", "failed"):
                    struck, rule = rule, None
                    struck.act()
                    if struck.drop:
                        return
                host.sendall(answer)
                if kind != "progress":
                    break
        finally:
            if rule is not None and fault == "answered":
                rule.struck = False  # an error is no answer, nor is the end of the enclave

    def _serve(self, host: socket.socket, enclave: socket.socket) -> None:
        threading.Thread(target=_pump, args=(host, enclave), daemon=True).start()
        while (pull := _frame(enclave)) is not None:
            again = self._links.strike("pull")
            if again is not None and again.fault == "asked":
                again.act()
            elif again is not None and again.fault == "held":
                time.sleep(again.seconds)
            elif again is not None:
                for end in (host, enclave):
                    end.shutdown(socket.SHUT_RDWR)
                return
            host.sendall(pull)
        host.shutdown(socket.SHUT_RDWR)


def _frame(connection: socket.socket) -> bytes | None:
    """One frame as it is; None where the other side ends before it is whole."""
    data = bytearray()
    wanted = framing.HEADER_BYTES
    while len(data) < wanted:
        part = connection.recv(min(wanted - len(data), _PART))
        if not part:
            return None
        data += part
        if len(data) == framing.HEADER_BYTES == wanted:
            try:
                wanted += sum(framing.header(bytes(data), limit_message=limits.BUNDLE_BYTES))
            except MalformedError:
                return None
    return bytes(data)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(_PART):
            target.sendall(part)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
