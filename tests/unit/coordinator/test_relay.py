"""The channel to the enclave: operations with deadlines, and Pulls answered from blobs."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from parley_coordinator import relay
from parley_coordinator.blobs import BlobReader, Directory
from parley_protocol import framing, limits
from parley_protocol.errors import MalformedError, RefusedError, UnavailableError
from parley_protocol.v1 import enclave_pb2 as pb
from support.enclave import receive, until

Script = Callable[[socket.socket], None]


class Scripted:
    """A listener that plays an enclave's side by a script for each connection."""

    def __init__(self, path: Path, script: Script) -> None:
        self.address = f"unix:{path}"
        self._script = script
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._play, args=(connection,), daemon=True).start()

    def _play(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._script(connection)
            except (OSError, EOFError):
                return

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[[Script], Scripted]]:
    made: list[Scripted] = []

    def start(script: Script) -> Scripted:
        made.append(Scripted(tmp_path / f"{len(made)}.sock", script))
        return made[-1]

    yield start
    for scripted in made:
        scripted.close()


def answers(*found: pb.Answer) -> Script:
    def script(connection: socket.socket) -> None:
        receive(connection)
        for answer in found:
            connection.sendall(framing.pack(answer.SerializeToString()))

    return script


STATUS = pb.Ask(status=pb.Status())


def test_an_answer_comes_after_its_progress(play: Callable[[Script], Scripted]) -> None:
    steps = [pb.Answer(progress=pb.Progress(percent=percent)) for percent in (5, 50, 900)]
    enclave = play(answers(*steps, pb.Answer(state=pb.State(phase="open"))))
    seen: list[int] = []
    assert relay.Channel(enclave.address).ask(STATUS, 5, seen.append).state.phase == "open"
    assert seen == [5, 50, 100]


def test_a_failure_is_its_code_and_an_unknown_one_is_internal(play: Callable[[Script], Scripted]) -> None:
    for sent, code in (("order", "order"), ("new-code", "internal")):
        enclave = play(answers(pb.Answer(failed=pb.Failed(code=sent))))
        with pytest.raises(RefusedError) as caught:
            relay.Channel(enclave.address).ask(STATUS, 5)
        assert caught.value.code == code


def test_a_deadline_passes_and_a_broken_channel_is_unavailable(play: Callable[[Script], Scripted]) -> None:
    def wait(connection: socket.socket) -> None:
        threading.Event().wait(5)

    slow = play(wait)
    closing = play(lambda connection: None)
    for enclave in (slow, closing):
        with pytest.raises(UnavailableError) as caught:
            relay.Channel(enclave.address).ask(STATUS, 0.2)
        assert not isinstance(caught.value, relay.GoneError)


def test_nothing_that_listens_is_gone(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "left.sock"))
    left.close()
    for name in ("none.sock", "left.sock"):
        with pytest.raises(relay.GoneError):
            relay.Channel(f"unix:{tmp_path / name}").ask(STATUS, 1)


@pytest.mark.parametrize(
    "data",
    [framing.pack(b"\xff\xff"), framing.pack(b"", b"payload"), bytes.fromhex("ffffffff00000000")],
)
def test_what_is_no_answer_is_malformed(play: Callable[[Script], Scripted], data: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(data)

    enclave = play(answer)
    with pytest.raises(MalformedError):
        relay.Channel(enclave.address).ask(STATUS, 5)


def test_closing_ends_what_is_under_way(play: Callable[[Script], Scripted]) -> None:
    asked = threading.Event()

    def silent(connection: socket.socket) -> None:
        receive(connection)
        asked.set()
        receive(connection)

    enclave = play(silent)
    channel = relay.Channel(enclave.address)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            channel.ask(STATUS, 60)
        except UnavailableError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(5)
    channel.close()
    thread.join(5)
    assert len(errors) == 1
    with pytest.raises(UnavailableError, match="stopping"):
        channel.ask(STATUS, 1)


@pytest.mark.parametrize(
    ("ranges", "lengths", "runs"),
    [
        ([(0, 10), (10, 5)], [10, 5], [(0, 15)]),
        ([(10, 5), (0, 10)], [5, 10], [(10, 5), (0, 10)]),
        ([(90, 10), (91, 10), (100, 1)], [10, 0, 0], [(90, 10)]),
        ([(0, 0), (3, 4)], [0, 4], [(3, 4)]),
        ([(2**64 - 1, 2**64 - 1)], [0], []),
        ([], [], []),
    ],
)
def test_ranges_that_are_not_there_have_length_0(
    ranges: list[tuple[int, int]], lengths: list[int], runs: list[tuple[int, int]]
) -> None:
    pull = pb.Pull(blob=1, ranges=[pb.Range(offset=offset, length=length) for offset, length in ranges])
    assert relay.plan(pull, 100) == (lengths, runs, sum(lengths))


def test_an_answer_stays_within_one_frame() -> None:
    half = limits.PAYLOAD_BYTES // 2
    pull = pb.Pull(ranges=[pb.Range(offset=0, length=half)] * 3)
    assert relay.plan(pull, 1 << 40)[0] == [half, half, 0]


def test_frames_are_served_over_as_many_connections_as_wanted(
    play: Callable[[Script], Scripted], tmp_path: Path
) -> None:
    blobs = Directory(tmp_path / "blobs")
    data = os.urandom(500_000)
    blobs.put("upload-7", [data])
    got: list[tuple[list[int], bytes]] = []

    def script(connection: socket.socket) -> None:
        message, _ = receive(connection)
        assert pb.Ask.FromString(message).WhichOneof("op") == "serve"
        for blob, ranges in ((7, [(5, 400_000), (400_005, 7), (0, 3)]), (7, [(499_999, 2)]), (8, [(0, 1)])):
            pull = pb.Pull(blob=blob, ranges=[pb.Range(offset=offset, length=length) for offset, length in ranges])
            connection.sendall(framing.pack(pb.Answer(pull=pull).SerializeToString()))
            message, payload = receive(connection)
            got.append((list(pb.Ask.FromString(message).frames.lengths), payload))
        threading.Event().wait(5)

    def resolve(number: int) -> BlobReader | None:
        return blobs.reader("upload-7") if number == 7 else None

    enclave = play(script)
    server = relay.FrameServer(enclave.address, 2, resolve)
    try:
        until(lambda: len(got) == 6, 10)
    finally:
        server.close()
    assert sorted(got) == sorted(2 * [([400_000, 7, 3], data[5:400_012] + data[:3]), ([0], b""), ([0], b"")])


def test_a_serve_connection_that_ends_is_opened_again(play: Callable[[Script], Scripted]) -> None:
    enclave = play(lambda connection: None)
    server = relay.FrameServer(enclave.address, 1, lambda number: None)
    try:
        until(lambda: enclave.connections >= 3, 10)
    finally:
        server.close()


class PlayedSocket(socket.socket):
    """A vsock whose `connect` ends as it is told: what a parent answers cannot be had on every machine."""

    ends: ClassVar[list[OSError | None]] = []
    where: ClassVar[list[object]] = []

    def connect(self, address: Any, /) -> None:
        PlayedSocket.where.append(address)
        end = PlayedSocket.ends.pop(0)
        if end is not None:
            raise end


@pytest.fixture
def vsock(monkeypatch: pytest.MonkeyPatch) -> type[PlayedSocket]:
    PlayedSocket.ends, PlayedSocket.where = [], []
    monkeypatch.setattr(relay.socket, "socket", PlayedSocket)
    return PlayedSocket


def _errno(number: int) -> OSError:
    return OSError(number, os.strerror(number))


needs_vsock = pytest.mark.skipif(not hasattr(socket, "AF_VSOCK"), reason="this system has no vsock")


@needs_vsock
def test_a_vsock_is_connected_with_time_for_an_enclave_under_load(vsock: type[PlayedSocket]) -> None:
    vsock.ends[:] = [None]
    with relay.connect("vsock:16:5005", 7.5) as connection:
        assert (connection.family, connection.type) == (socket.AF_VSOCK, socket.SOCK_STREAM)
        assert connection.gettimeout() == 7.5
        # SO_VM_SOCKETS_CONNECT_TIMEOUT: the kernel gives up after 2 seconds otherwise, whatever the socket's timeout.
        same = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, os.dup(connection.fileno()))
        with same:
            assert struct.unpack("ll", same.getsockopt(socket.AF_VSOCK, 6, 16)) == (7, 500_000)
    assert vsock.where == [(16, 5005)]


@needs_vsock
@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.ENODEV])
def test_a_vsock_where_no_machine_is_is_gone(vsock: type[PlayedSocket], number: int) -> None:
    vsock.ends[:] = [_errno(number)]
    with pytest.raises(relay.GoneError):
        relay.connect("vsock:16:5005")
    assert len(vsock.where) == 1


@needs_vsock
def test_a_vsock_that_resets_may_have_a_full_queue(vsock: type[PlayedSocket]) -> None:
    vsock.ends[:] = [_errno(errno.ECONNRESET), _errno(errno.ECONNRESET), None]
    relay.connect("vsock:16:5005").close()
    vsock.ends[:] = [_errno(errno.ECONNRESET)] * 3
    with pytest.raises(relay.GoneError):
        relay.connect("vsock:16:5005")
    assert len(vsock.where) == 6


@needs_vsock
@pytest.mark.parametrize("end", [TimeoutError("timed out"), _errno(errno.ETIMEDOUT), _errno(errno.ENOMEM)])
def test_a_vsock_that_does_not_answer_is_not_gone(vsock: type[PlayedSocket], end: OSError) -> None:
    vsock.ends[:] = [end]
    with pytest.raises(UnavailableError) as caught:
        relay.connect("vsock:16:5005")
    assert not isinstance(caught.value, relay.GoneError)


@needs_vsock
def test_the_kernels_own_answer_for_the_machine_itself() -> None:
    # Nothing listens at this port of the host, or there is no vsock device at all: both are told at once.
    with pytest.raises(UnavailableError):
        relay.connect(f"vsock:{socket.VMADDR_CID_HOST}:4294967294", 2.0)


def test_a_machine_without_vsock_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> socket.socket:
        raise _errno(errno.EAFNOSUPPORT)

    monkeypatch.setattr(relay.socket, "socket", none)
    with pytest.raises(UnavailableError, match="no such sockets"):
        relay.connect("vsock:16:5005")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp:127.0.0.1:1",
        "vsock:16",
        "vsock::5005",
        "vsock:-1:5",
        "vsock:16:5005:1",
        "vsock:4294967295:5",
        "vsock:1:99999999999",
    ],
)
def test_what_is_no_address_is_a_mistake(address: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        relay.connect(address)
