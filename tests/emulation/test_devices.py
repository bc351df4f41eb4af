"""The devices as the image's own kernel drives them: vsock streams, and the module through /dev/nsm."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import cbor2
import pytest

from emulation.machines import Emulator, machine, overlay, pid
from parley_deploy.detached import listens
from parley_deploy.nsm import LocalRoot, SimulatedNsm
from parley_protocol import limits
from parley_protocol.attestation.document import ZERO_PCR
from parley_protocol.attestation.verify import check_document
from parley_protocol.encoding import sha384
from parley_protocol.measurement import measure
from support import images
from support.coordinator import now_ms
from support.enclave import until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]
PROBE = Path(__file__).parent / "probe.py"
BULK = 32 << 20
ROUNDS = 300


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with a short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="pe-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def probe(folder: Path, image: Path) -> Path:
    """A signed image like the one under test, whose program is the probe."""
    return overlay(image, folder, PROBE, images.signer(start_ms=now_ms()))


@pytest.fixture(scope="module")
def guest(emulator: Emulator, folder: Path, probe: Path, figures: dict[str, float]) -> Iterator[Path]:
    """The socket of a machine that runs the probe."""
    with machine(emulator, folder / "m", probe, "--cpus", "2") as seconds:
        figures["boot: command to ready, 2 CPUs (s)"] = seconds
        yield folder / "m" / "enclave.sock"


def dial(path: Path, kind: bytes) -> socket.socket:
    """A connection of one kind to the probe."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(120)
    connection.connect(str(path))
    connection.sendall(kind)
    return connection


def take(connection: socket.socket, count: int) -> bytes:
    """So many bytes, fewer at the end of the stream."""
    data = bytearray()
    while len(data) < count and (part := connection.recv(min(1 << 20, count - len(data)))):
        data += part
    return bytes(data)


class Module:
    """The guest's /dev/nsm."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def raw(self, message: bytes) -> bytes:
        """A response to any bytes."""
        self._connection.sendall(len(message).to_bytes(4, "big") + message)
        return take(self._connection, int.from_bytes(take(self._connection, 4), "big"))

    def __call__(self, request: object) -> Any:
        return cbor2.loads(self.raw(cbor2.dumps(request)))


@pytest.fixture
def module(guest: Path) -> Iterator[Module]:
    """The module of the machine."""
    with dial(guest, b"n") as connection:
        yield Module(connection)


# The module


def test_the_module_answers_through_the_kernel_as_it_does_without_one(
    module: Module, folder: Path, probe: Path
) -> None:
    with probe.open("rb") as file:
        pcrs = measure(file).pcrs
    assert set(pcrs) == {0, 1, 2, 8}
    twin = SimulatedNsm.create(LocalRoot.load(folder / "m" / "root"), pcrs)
    requests: list[object] = [{"DescribePCR": {"index": index}} for index in (*range(4), 5, 8, 15, 16, 31, 32, 1 << 16)]
    requests += [
        {"ExtendPCR": {"index": 20, "data": b"first"}},
        {"ExtendPCR": {"index": 20, "data": bytes(1000)}},
        {"ExtendPCR": {"index": 0, "data": b""}},
        {"ExtendPCR": {"index": 32, "data": b""}},
        {"ExtendPCR": {"index": 20, "data": "text"}},
        {"LockPCR": {"index": 20}},
        {"LockPCR": {"index": 20}},
        {"ExtendPCR": {"index": 20, "data": b"late"}},
        {"DescribePCR": {"index": 20}},
        {"LockPCRs": {"range": 19}},
        {"LockPCRs": {"range": 33}},
        {"DescribePCR": {"index": 18}},
        {"DescribePCR": {}},
        {"Attestation": {"user_data": bytes(limits.ATTESTED_FIELD_BYTES + 1), "nonce": None, "public_key": None}},
        {"Attestation": {"user_data": 1, "nonce": None, "public_key": None}},
        "Unknown",
        ["DescribeNSM"],
    ]
    answers = [(module(request), cbor2.loads(twin.request(cbor2.dumps(request)))) for request in requests]
    assert [ours for ours, _ in answers] == [theirs for _, theirs in answers]
    assert module.raw(b"\xff") == twin.request(b"\xff")
    assert module({"DescribePCR": {"index": 20}}) == {
        "DescribePCR": {"lock": True, "data": sha384(sha384(ZERO_PCR + b"first") + bytes(1000))}
    }
    first, second = (module("GetRandom")["GetRandom"]["random"] for _ in range(2))
    assert len(first) == len(second) == 256 and first != second


def test_its_documents_pass_the_verifier(module: Module, folder: Path, probe: Path, figures: dict[str, float]) -> None:
    root = LocalRoot.load(folder / "m" / "root")
    with probe.open("rb") as file:
        pcrs = measure(file).pcrs
    fields = {"user_data": b"u" * 512, "nonce": b"n" * 32, "public_key": b"p" * 1024}
    begin = time.monotonic()
    answer = module({"Attestation": fields})
    figures["module: one document, through vsock (ms)"] = (time.monotonic() - begin) * 1000
    found = check_document(answer["Attestation"]["document"], root_sha256=root.sha256, at_ms=now_ms())
    assert (found.user_data, found.nonce, found.public_key) == tuple(fields.values())
    assert {index: found.pcrs[index] for index in pcrs} == pcrs
    assert abs(found.timestamp_ms - now_ms()) < 60_000


# Streams


def test_many_streams_at_once_arrive_whole_and_end_in_halves(guest: Path) -> None:
    picks = random.Random(7)
    sent = 0

    def one(data: bytes) -> None:
        with dial(guest, b"e") as connection:

            def give() -> None:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)

            thread = Thread(target=give)
            thread.start()
            got = take(connection, len(data) + 1)
            thread.join()
            if got != data:
                wrong.append(len(data))

    wrong: list[int] = []
    for _ in range(5):
        threads = [
            Thread(target=one, args=(picks.randbytes(picks.choice((0, 1, 4096, 70_000, 400_000))),)) for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sent += len(threads)
    assert (sent, wrong) == (80, [])


def test_a_stream_that_the_host_does_not_read_holds_nobody_up(guest: Path) -> None:
    with dial(guest, b"g") as slow:
        slow.sendall((4 << 20).to_bytes(8, "big"))
        time.sleep(1)
        with dial(guest, b"e") as other:
            other.sendall(b"x" * 1000)
            assert take(other, 1000) == b"x" * 1000
        assert len(take(slow, 4 << 20)) == 4 << 20


def test_bulk_arrives_both_ways_and_its_rates_are_kept(guest: Path, folder: Path, figures: dict[str, float]) -> None:
    plain = folder / "plain.sock"
    local = subprocess.Popen([sys.executable, str(PROBE), "--listen", f"unix:{plain}"])
    try:
        until(lambda: listens(plain))
        for name, path in (("vsock", guest), ("Unix socket", plain)):
            for word, rate in rates(path).items():
                figures[f"{name}: {word}"] = rate
    finally:
        local.kill()
        local.wait()


def rates(path: Path) -> dict[str, float]:
    """Bulk both ways, and the round trip of 32 bytes."""
    found = {}
    begin = time.monotonic()
    with dial(path, b"s") as connection:
        connection.sendall(BULK.to_bytes(8, "big") + bytes(BULK))
        assert take(connection, 1) == b"!"
    found["to the guest (MB/s)"] = BULK / 1e6 / (time.monotonic() - begin)
    begin = time.monotonic()
    with dial(path, b"g") as connection:
        connection.sendall(BULK.to_bytes(8, "big"))
        assert len(take(connection, BULK)) == BULK
    found["from the guest (MB/s)"] = BULK / 1e6 / (time.monotonic() - begin)
    with dial(path, b"e") as connection:
        times = []
        for _ in range(ROUNDS):
            begin = time.monotonic()
            connection.sendall(b"r" * 32)
            take(connection, 32)
            times.append(time.monotonic() - begin)
    times.sort()
    found["round trip, median (ms)"] = times[ROUNDS // 2] * 1000
    found["round trip, 99 of 100 (ms)"] = times[ROUNDS * 99 // 100] * 1000
    return found


# The machine


def test_a_machine_with_one_cpu_boots_ends_in_order_and_knows_nothing_of_the_last(
    emulator: Emulator, folder: Path, image: Path, figures: dict[str, float]
) -> None:
    own = folder / "one"
    modules = set()
    for _ in range(2):
        with machine(emulator, own, image, "--cpus", "1") as seconds:
            figures["boot: command to ready, 1 CPU (s)"] = seconds
            pids = pid(own, "nsm"), pid(own, "enclave")
            again = emulator.start(own, image, own / "root")
            assert again.returncode == 0
            assert (pid(own, "nsm"), pid(own, "enclave")) == pids
            assert not (own / "kernel").exists() and not (own / "initrd").exists()
            modules.add(pids)
        assert not list(own.glob("*.sock")) and not list(own.glob("*.pid"))
        assert not any(Path(f"/proc/{number}").exists() for number in pids[1:])
    assert len(modules) == 2


@pytest.mark.parametrize("name", ["nsm", "enclave"])
def test_both_processes_end_together(emulator: Emulator, folder: Path, image: Path, name: str) -> None:
    own = folder / name
    with machine(emulator, own, image):
        numbers = [pid(own, "nsm"), pid(own, "enclave")]
        os.kill(pid(own, name), signal.SIGKILL)
        until(lambda: not any(running(number) for number in numbers))
        until(lambda: not listens(own / "enclave.sock"))
        (own / "nsm.pid").unlink(missing_ok=True)


def running(number: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_an_image_that_does_not_boot_is_reported_with_its_console(
    emulator: Emulator, folder: Path, image: Path
) -> None:
    broken = folder / "broken.py"
    broken.write_text("raise SystemExit(3)\n")
    work = folder / "b"
    work.mkdir()
    own = folder / "dead"
    (own / "root").mkdir(parents=True)
    LocalRoot.create(now_ms()).save(own / "root")
    done = emulator.start(own, overlay(image, work, broken), own / "root")
    assert done.returncode == 1
    assert "the guest ended" in done.stderr
    log = (own / "log").read_text()
    assert "parley-init: run: the enclave ended with code 3" in log
    assert not list(own.glob("*.sock")) and not list(own.glob("*.pid"))
