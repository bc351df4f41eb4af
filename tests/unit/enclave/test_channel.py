"""The listener: who may connect, how much, how long."""

from __future__ import annotations

import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parley_enclave.channel import Connection, Server, is_host, listen
from parley_protocol import framing, limits
from parley_protocol.errors import MalformedError
from parley_protocol.v1 import enclave_pb2 as pb


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Connection]]:
    theirs, ours = socket.socketpair()
    connection = Connection(ours)
    yield theirs, connection
    theirs.close()
    connection.close()


def test_vsock_is_for_the_host_alone() -> None:
    assert is_host(socket.AF_VSOCK, (3, 4242))
    for peer in [(0, 1), (1, 1), (2, 1), (4, 1), (16, 3), None, "3", (3,)]:
        assert not is_host(socket.AF_VSOCK, peer)
    assert is_host(socket.AF_UNIX, "")
    assert not is_host(socket.AF_INET, ("127.0.0.1", 3))


def test_a_unix_socket_is_for_its_owner_and_replaces_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "enclave.sock"
    listen(f"unix:{path}").close()
    with listen(f"unix:{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "address",
    [
        "",
        "unix:",
        "tcp:1",
        "vsock:",
        "vsock:x",
        "vsock:-1",
        "vsock:4294967295",
        "vsock:" + "9" * 5000,
        "vsock:\u0663",
        "/tmp/x",
    ],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="listen"):
        listen(address)


@pytest.mark.skipif(not Path("/dev/vsock").exists(), reason="this machine has no vsock")
def test_vsock_listens_by_the_same_code() -> None:
    with listen("vsock:50000") as listener:
        assert listener.family == socket.AF_VSOCK


def test_an_ask_arrives_in_any_pieces_and_nothing_is_read_beyond_it(pair: tuple[socket.socket, Connection]) -> None:
    theirs, connection = pair
    whole = framing.pack(pb.Ask(status=pb.Status()).SerializeToString()) + b"next"

    def send() -> None:
        for place in range(len(whole)):
            theirs.sendall(whole[place : place + 1])

    sender = threading.Thread(target=send)
    sender.start()
    assert connection.receive().WhichOneof("op") == "status"
    sender.join()
    with connection.detach() as rest:
        assert rest.recv(16) == b"next"


@pytest.mark.parametrize(
    "data",
    [
        framing.pack(b"\xff\xff\xff"),
        framing.pack(b"", b"payload"),
        (limits.MESSAGE_BYTES + 1).to_bytes(4, "big") + bytes(4),
    ],
)
def test_bytes_that_are_no_ask_are_malformed(pair: tuple[socket.socket, Connection], data: bytes) -> None:
    theirs, connection = pair
    theirs.sendall(data)
    with pytest.raises(MalformedError):
        connection.receive()


def test_a_host_that_is_slow_is_cut_off(
    pair: tuple[socket.socket, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, connection = pair
    monkeypatch.setattr("parley_protocol.limits.ASK_TIMEOUT_MS", 50)
    theirs.sendall(b"\0")
    with pytest.raises(OSError, match="timed out"):
        connection.receive()


def test_a_host_that_leaves_in_the_middle_is_an_end(pair: tuple[socket.socket, Connection]) -> None:
    theirs, connection = pair
    theirs.sendall(framing.pack(b"1234")[:-1])
    theirs.close()
    with pytest.raises(EOFError):
        connection.receive()


def test_connections_are_bounded_and_freed(tmp_path: Path) -> None:
    path = tmp_path / "enclave.sock"
    leave = threading.Event()
    entered: list[Connection] = []

    def handle(connection: Connection) -> None:
        entered.append(connection)
        leave.wait(10)

    with listen(f"unix:{path}") as listener:
        threading.Thread(target=Server(listener, handle, connections=2).run, daemon=True).start()
        held = [_connect(path) for _ in range(2)]
        _until(lambda: len(entered) == 2)
        with _connect(path) as third:
            third.settimeout(5)
            assert third.recv(1) == b""
        leave.set()
        for connection in held:
            connection.settimeout(5)
            assert connection.recv(1) == b""
            connection.close()
        _until(lambda: _enters(path, entered))


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def _enters(path: Path, entered: list[Connection]) -> bool:
    before = len(entered)
    _connect(path).close()
    time.sleep(0.01)
    return len(entered) > before


def _until(holds: object, seconds: float = 5) -> None:
    assert callable(holds)
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_server_outlives_a_failed_accept_and_ends_with_its_listener() -> None:
    class Listener:
        calls = 0

        def accept(self) -> tuple[socket.socket, object]:
            Listener.calls += 1
            raise OSError("too many open files")

        def fileno(self) -> int:
            return 7 if Listener.calls < 3 else -1

    listener: Any = Listener()
    Server(listener, lambda connection: None).run()
    assert Listener.calls == 3


class Accepted:
    """A connection that vsock has accepted, which tells whether anybody read or closed it."""

    family = socket.AF_VSOCK

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Vsock:
    """A listener on vsock that accepts connections from these context ids, then is closed."""

    def __init__(self, cids: list[int]) -> None:
        self._cids = cids
        self.accepted = [Accepted() for _ in cids]
        self._next = 0

    def accept(self) -> tuple[Accepted, tuple[int, int]]:
        if self._next == len(self._cids):
            raise OSError("closed")
        self._next += 1
        return self.accepted[self._next - 1], (self._cids[self._next - 1], 1024)

    def fileno(self) -> int:
        return -1


def test_whoever_is_not_the_parent_is_closed_unread_and_takes_no_place() -> None:
    served: list[Connection] = []
    listener: Any = Vsock([4, 1, 2, 0, 3, 2**32 - 1, 3])
    Server(listener, served.append, connections=2).run()
    _until(lambda: all(accepted.closed.is_set() for accepted in listener.accepted))
    # `Accepted` has no recv: a thread that read one would have failed.
    assert len(served) == 2
