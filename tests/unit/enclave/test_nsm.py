"""The typed module and its clock, against the simulated module and against broken ones."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parley_deploy.nsm import LocalRoot, SimulatedNsm, serve
from parley_deploy.pki import system_now_ms
from parley_enclave.device import SocketDevice, open_device
from parley_enclave.nsm import Nsm, NsmError
from parley_protocol import limits
from parley_protocol.attestation.document import extended, parse_unverified
from parley_protocol.encoding import encode
from parley_protocol.errors import UnavailableError

PCRS = {index: bytes([index + 1]) * 48 for index in range(3)}


@pytest.fixture(scope="module")
def root() -> LocalRoot:
    return LocalRoot.create(system_now_ms())


@pytest.fixture
def clock() -> list[int]:
    return [system_now_ms()]


@pytest.fixture
def simulated(root: LocalRoot, clock: list[int]) -> SimulatedNsm:
    return SimulatedNsm(root, PCRS, now_ms=lambda: clock[0], random=os.urandom)


@pytest.fixture
def ticks() -> list[int]:
    return [0]


@pytest.fixture
def nsm(simulated: SimulatedNsm, ticks: list[int]) -> Nsm:
    return Nsm(simulated, monotonic_ns=lambda: ticks[0])


class Answers:
    """A device that always answers the same."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def request(self, _message: bytes) -> bytes:
        return self.answer


def test_registers_are_extended_and_locked(nsm: Nsm) -> None:
    assert nsm.register(0).data == PCRS[0] and nsm.register(0).locked
    assert not nsm.register(16).locked
    assert nsm.extend(16, b"agreement") == extended(b"agreement") == nsm.register(16).data
    nsm.lock(16)
    assert nsm.register(16).locked
    with pytest.raises(NsmError) as refused:
        nsm.extend(16, b"another")
    assert refused.value.answer == "ReadOnlyIndex"
    assert nsm.register(16).data == extended(b"agreement")


def test_description(nsm: Nsm, simulated: SimulatedNsm) -> None:
    described = nsm.describe()
    assert described.module_id == simulated.module_id
    assert (described.max_pcrs, described.digest, described.locked) == (32, "SHA384", tuple(range(16)))


@pytest.mark.parametrize("count", [0, 1, 256, 257, 1000])
def test_random_loops_over_the_256_bytes_of_a_request(nsm: Nsm, count: int) -> None:
    assert len(nsm.random(count)) == count
    assert count < 16 or nsm.random(count) != nsm.random(count)


def test_a_document_carries_the_three_fields(nsm: Nsm) -> None:
    document = parse_unverified(nsm.attest(user_data=b"u", nonce=b"n" * 32, public_key=b"p"))
    assert (document.user_data, document.nonce, document.public_key) == (b"u", b"n" * 32, b"p")
    with pytest.raises(ValueError, match="attested field"):
        nsm.attest(user_data=bytes(limits.ATTESTED_FIELD_BYTES_MADE + 1))


def test_ses_9_time_is_the_modules_and_goes_on_by_the_monotonic_clock(
    nsm: Nsm, clock: list[int], ticks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: pytest.fail("the wall clock was read"))
    monkeypatch.setattr("time.time_ns", lambda: pytest.fail("the wall clock was read"))
    start = clock[0]
    assert nsm.now_ms() == start
    ticks[0] += 1_500_000_000
    assert nsm.now_ms() == start + 1500
    clock[0] += 1400
    nsm.attest()
    assert nsm.now_ms() == start + 1400
    ticks[0] += (limits.NSM_TIME_AGE_MS + 1) * 1_000_000
    clock[0] += 5
    assert nsm.now_ms() == start + 1405


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff",
        encode("LockPCR"),
        encode({"GetRandom": {}}),
        encode({"GetRandom": {"random": b""}}),
        encode(["GetRandom"]),
    ],
)
def test_an_answer_that_is_none_is_the_modules_fault_and_no_callers(answer: bytes) -> None:
    with pytest.raises(NsmError) as refused:
        Nsm(Answers(answer)).random(8)
    assert refused.value.code == "internal"


def test_a_document_that_cannot_be_read_is_the_modules_fault() -> None:
    with pytest.raises(NsmError, match="a document that is none") as refused:
        Nsm(Answers(encode({"Attestation": {"document": b"no document"}}))).attest()
    assert refused.value.code == "internal"


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Callable[[Callable[[socket.socket], object]], Path]]:
    listeners: list[socket.socket] = []

    def make(answer: Callable[[socket.socket], object]) -> Path:
        listener = socket.socket(socket.AF_UNIX)
        listeners.append(listener)
        path = tmp_path / "nsm.sock"
        listener.bind(str(path))
        listener.listen()

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    answer(connection)

        threading.Thread(target=accept, daemon=True).start()
        return path

    yield make
    for listener in listeners:
        listener.close()


def test_the_device_speaks_over_a_socket(
    listening: Callable[[Callable[[socket.socket], object]], Path], simulated: SimulatedNsm
) -> None:
    device = open_device(f"unix:{listening(lambda connection: serve(simulated, connection))}")
    assert Nsm(device).describe().module_id == simulated.module_id
    with pytest.raises(ValueError, match="NSM request"):
        device.request(bytes(limits.NSM_REQUEST_BYTES + 1))
    assert isinstance(device, SocketDevice)
    device.close()


@pytest.mark.parametrize("answer", [b"", b"\0\0", b"\0\0\0\5abc", (limits.NSM_RESPONSE_BYTES + 1).to_bytes(4, "big")])
def test_a_device_that_breaks_off_is_unavailable(
    listening: Callable[[Callable[[socket.socket], object]], Path], answer: bytes
) -> None:
    def broken(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(answer)

    device = open_device(f"unix:{listening(broken)}")
    for _ in range(2):
        with pytest.raises(UnavailableError):
            device.request(b"x")


def test_no_device_is_unavailable_and_no_other_address_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        open_device(f"unix:{tmp_path / 'none'}").request(b"x")
    for address in ("/dev/nsm", "unix:", "tcp:1"):
        with pytest.raises(ValueError, match="address of an NSM"):
            open_device(address)
