"""The wire between members and coordinators: a proxy that ends their TLS, passes calls on, and does to some what it is told.

It has the coordinator's key and certificate, as the host has. A call is matched by member and method; what happens to it is
decided by the rules that stand, each of which strikes once. What was answered, and what of it a member got, is observed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from parley_protocol.cose import payload_unverified
from parley_protocol.errors import MalformedError
from parley_protocol.transcript import Caller

THREADS: Final = 64
"""Each call that waits holds one: members' streams of events, joins, and what they do meanwhile."""
DETAILS: Final = "grpc-status-details-bin"
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)

FAULTS: Final = ("lost-request", "lost-response", "held", "twice", "broken", "asked", "answered")
"""A call never arrives; its answer does not come back; it arrives late, after `seconds`; it arrives once more, `seconds` after
it was answered, from nobody who waits for the answer; its connection breaks after the first message of a stream. The last two
do nothing to it, but call `act` before it is passed on, or before its answer is."""


@dataclass
class Rule:
    """What happens to the next call of a method (by `member`; by anybody where it is empty)."""

    fault: str
    method: str
    member: str = ""
    seconds: float = 0.0
    skip: int = 0
    """How many such calls go by first."""
    act: Callable[[], object] = lambda: None
    struck: bool = False

    def __str__(self) -> str:
        who = self.member or "anybody"
        late = f" {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.fault}{late} {self.method} of {who}"


@dataclass(frozen=True)
class Observed:
    """A call that ended: the requests as they were sent, the answers as the coordinator gave them, its code; whether the
    member got the answer. `code` is empty for success, else the stable one, or `unanswered` where the connection broke."""

    member: str
    method: str
    requests: tuple[bytes, ...] = field(repr=False)
    replies: tuple[bytes, ...] = field(repr=False)
    code: str
    status: str
    delivered: bool
    node: str


class Calls:
    """The proxy. `routes` says which coordinator a member reaches; `observe` hears of each call that ended."""

    def __init__(self, certificate: Path, key: Path, names: Mapping[bytes, str]) -> None:
        self._pair = (key.read_bytes(), certificate.read_bytes())
        self._names = names
        self.routes: dict[str, str] = {}
        self.default = ""
        self.observe: Callable[[Observed], None] = lambda _observed: None
        self.rules: list[Rule] = []
        self.count = 0
        """Calls that ended, event streams aside."""
        self._lock = threading.Lock()
        self._channels: dict[str, grpc.Channel] = {}
        self._server: grpc.Server | None = None
        self._closing = False
        self.port = 0

    def start(self) -> None:
        """Listens, at the same port each time."""
        self._server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix="calls"), handlers=[_Handler(self)], options=_OPTIONS
        )
        credentials = grpc.ssl_server_credentials([self._pair])
        end = time.monotonic() + 10
        while True:
            try:
                self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
                break
            except RuntimeError:
                assert time.monotonic() < end, f"port {self.port} is not free again"
                time.sleep(0.05)
        self._server.start()

    @property
    def address(self) -> str:
        """Where members find their coordinator."""
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """All connections break at once; new ones are taken at once."""
        assert self._server is not None
        self._server.stop(None).wait()
        self.start()

    def close(self) -> None:
        """Ends it."""
        self._closing = True
        if self._server is not None:
            self._server.stop(None).wait()
        for channel in self._channels.values():
            channel.close()

    def arm(self, rule: Rule) -> None:
        """A rule stands until it strikes."""
        with self._lock:
            self.rules.append(rule)

    # A call

    def run(self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Passes one call on."""
        member = self._member(context)
        rule = self._strike(method, member)
        fault = "" if rule is None else rule.fault
        seconds = 0.0 if rule is None else rule.seconds
        if fault == "lost-request":
            self._break(context)
        if rule is not None and fault == "asked":
            rule.act()
        if fault == "held":
            time.sleep(seconds)
        sent: list[bytes] = []

        def passing() -> Iterator[bytes]:
            for request in requests:
                sent.append(request)
                yield request
                if fault == "broken" and len(sent) > 1:
                    return

        target = self.routes.get(member, self.default)
        metadata = [(name, value) for name, value in context.invocation_metadata() if name == "parley-caller-bin"]
        replies: list[bytes] = []
        left = context.time_remaining()
        # A deadline of its own, a little later: whose was first is otherwise a race.
        call = self._call(target, method, passing(), metadata, None if left is None else left + 1)
        context.add_callback(lambda: call.cancel() and None)
        streams = method in ("Watch", "GetBundle", "GetChain")
        try:
            for reply in call:
                replies.append(reply)
                if streams and fault not in ("lost-response", "broken"):
                    yield reply
        except grpc.RpcError as error:
            code = _code(error)
            if rule is not None and fault == "answered":
                rule.struck = False  # an error is no answer
            delivered = fault not in ("lost-response", "broken")
            self._ended(member, method, sent, replies, code, error.code().name, delivered, target)
            if not delivered:
                self._break(context)
            context.set_trailing_metadata(_details(error))
            context.abort(error.code(), error.details() or "")
        delivered = fault not in ("lost-response", "broken")
        self._ended(member, method, sent, replies, "", "OK", delivered, target)
        if rule is not None and fault == "answered":
            rule.act()
        if fault == "twice":
            threading.Thread(
                target=self._again, args=(member, method, tuple(sent), metadata, target, seconds), daemon=True
            ).start()
        if not delivered:
            self._break(context)
        if not streams:
            yield from replies

    def _again(
        self, member: str, method: str, sent: tuple[bytes, ...], metadata: Any, target: str, seconds: float
    ) -> None:
        time.sleep(seconds)
        if self._closing:
            return
        replies: list[bytes] = []
        try:
            replies.extend(self._call(target, method, iter(sent), metadata, 30.0))
        except grpc.RpcError as error:
            self._ended(member, method, list(sent), replies, _code(error), error.code().name, False, target)
        else:
            self._ended(member, method, list(sent), replies, "", "OK", False, target)

    def _ended(
        self,
        member: str,
        method: str,
        sent: list[bytes],
        replies: list[bytes],
        code: str,
        status: str,
        delivered: bool,
        node: str,
    ) -> None:
        if self._closing:
            return
        if method != "Watch":
            with self._lock:
                self.count += 1
        self.observe(Observed(member, method, tuple(sent), tuple(replies), code, status, delivered, node))

    def _strike(self, method: str, member: str) -> Rule | None:
        with self._lock:
            for rule in self.rules:
                if not rule.struck and rule.method == method and rule.member in ("", member):
                    if rule.skip:
                        rule.skip -= 1
                        continue
                    rule.struck = True
                    return rule
        return None

    def _member(self, context: grpc.ServicerContext) -> str:
        for name, value in context.invocation_metadata():
            if name == "parley-caller-bin" and isinstance(value, bytes):
                with contextlib.suppress(MalformedError):
                    return self._names.get(Caller.from_bytes(payload_unverified(value)).member_key, "?")
        return "?"

    def _call(self, target: str, method: str, requests: Iterator[bytes], metadata: Any, timeout: float | None) -> Any:
        stub: Any = self._channel(target).stream_stream(f"/parley.v1.Coordinator/{method}")
        return stub(requests, metadata=metadata, timeout=timeout)

    def _channel(self, target: str) -> grpc.Channel:
        with self._lock:
            if target not in self._channels:
                credentials = grpc.ssl_channel_credentials(self._pair[1])
                self._channels[target] = grpc.secure_channel(target, credentials, options=_OPTIONS)
            return self._channels[target]

    @staticmethod
    def _break(context: grpc.ServicerContext) -> None:
        # What a member's library makes of a connection that breaks: this status, and no detail.
        context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = details.method.rpartition("/")[2]
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self._calls.run(method, requests, context)
        )


def _details(error: grpc.RpcError) -> tuple[tuple[str, str | bytes], ...]:
    found: Any = error.trailing_metadata() if isinstance(error, grpc.Call) else ()
    return tuple((str(name), value) for name, value in found or () if name == DETAILS)


def _code(error: grpc.RpcError) -> str:
    for _, value in _details(error):
        info = ErrorInfo()
        assert isinstance(value, bytes)
        for detail in Status.FromString(value).details:
            if detail.Unpack(info):
                return str(info.reason)
    return "unanswered"
