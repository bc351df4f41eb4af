"""The module as a virtio device: a driver's requests, in the shapes in which Linux and others queue them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cbor2
import pytest

from parley_deploy.emulator.loop import Loop
from parley_deploy.emulator.nsm import NsmDevice
from parley_deploy.emulator.vhost import GuestError
from parley_deploy.nsm import LocalRoot, SimulatedNsm
from parley_deploy.pki import system_now_ms
from parley_protocol import limits
from parley_protocol.attestation.document import ZERO_PCR
from parley_protocol.attestation.policy import Measurement, Policy, RootPolicy
from parley_protocol.attestation.verify import verify_live
from parley_protocol.encoding import sha384
from support.frontend import FrontEnd, served

PCRS = {index: bytes([index + 1]) * 48 for index in (0, 1, 2)}
ROOM = limits.NSM_RESPONSE_BYTES


@pytest.fixture(scope="module")
def root() -> LocalRoot:
    return LocalRoot.create(system_now_ms())


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pv-") as folder:
        yield Path(folder) / "nsm.sock"


@pytest.fixture
def front(path: Path, root: LocalRoot) -> Iterator[FrontEnd]:
    def make(loop: Loop, failed: Callable[[GuestError], None]) -> NsmDevice:
        return NsmDevice(loop, path, SimulatedNsm.create(root, PCRS), failed)

    with served(make) as failed:
        with FrontEnd(path, 1) as made:
            yield made.start()
        assert failed == []


def linux(front: FrontEnd, message: bytes, room: int = ROOM) -> bytes:
    """As Linux does: the request and the buffer in two chains, and one kick."""
    queue = front.queues[0]
    first = queue.add([message])
    second = queue.add([], [room])
    queue.kick()
    (request, nothing), (response, data) = queue.wait(2)
    assert (request, response, nothing) == (first, second, b"")
    return data


def ask(front: FrontEnd, request: object) -> Any:
    return cbor2.loads(linux(front, cbor2.dumps(request)))


def test_registers_are_read_extended_and_locked(front: FrontEnd) -> None:
    assert ask(front, "DescribeNSM")["DescribeNSM"]["locked_pcrs"] == list(range(16))
    assert ask(front, {"DescribePCR": {"index": 1}}) == {"DescribePCR": {"lock": True, "data": PCRS[1]}}
    extended = sha384(ZERO_PCR + b"agreement")
    assert ask(front, {"ExtendPCR": {"index": 16, "data": b"agreement"}}) == {"ExtendPCR": {"data": extended}}
    assert ask(front, {"LockPCR": {"index": 16}}) == "LockPCR"
    assert ask(front, {"ExtendPCR": {"index": 16, "data": b""}}) == {"Error": "ReadOnlyIndex"}
    assert ask(front, {"DescribePCR": {"index": 16}}) == {"DescribePCR": {"lock": True, "data": extended}}


def test_a_document_passes_the_verifier(front: FrontEnd, root: LocalRoot) -> None:
    agreement = sha384(b"agreement")
    ask(front, {"ExtendPCR": {"index": 16, "data": agreement}})
    ask(front, {"LockPCR": {"index": 16}})
    ask(front, {"ExtendPCR": {"index": 17, "data": b"open"}})
    fields = {"user_data": b"u" * 40, "nonce": b"n" * 32, "public_key": b"p" * 32}
    document = ask(front, {"Attestation": fields})["Attestation"]["document"]
    now = system_now_ms()
    accepted = (Measurement(PCRS[0], PCRS[1], PCRS[2]),)
    policy = Policy(
        root=RootPolicy.simulated(root.sha256),
        measurements=accepted,
        agreement=agreement,
    )
    found = verify_live(document, policy=policy, now_ms=now, **fields)
    assert sorted(found.pcrs) == list(range(17))


def test_a_reset_and_another_front_end_find_the_registers_as_they_were(
    front: FrontEnd, path: Path, root: LocalRoot
) -> None:
    ask(front, {"ExtendPCR": {"index": 16, "data": b"once"}})
    ask(front, {"LockPCR": {"index": 16}})
    before = ask(front, {"DescribePCR": {"index": 16}})
    # A request whose buffer never came is not answered after the reset.
    queue = front.queues[0]
    queue.add([cbor2.dumps("DescribeNSM")])
    queue.kick()
    assert queue.wait()[0][1] == b""
    front.stop()
    for ring in front.queues:
        ring.start()
    response = queue.add([], [ROOM])
    queue.kick()
    assert queue.wait() == [(response, b"")]
    assert ask(front, {"DescribePCR": {"index": 16}}) == before
    front.socket.close()
    with FrontEnd(path, 1) as other:
        assert ask(other.start(), {"DescribePCR": {"index": 16}}) == before


def test_request_and_buffer_in_one_chain_are_answered_too(front: FrontEnd) -> None:
    queue = front.queues[0]
    message = cbor2.dumps({"DescribePCR": {"index": 0}})
    head = queue.add([message[:3], message[3:]], [7, ROOM])
    queue.kick()
    ((found, data),) = queue.wait()
    assert found == head
    assert cbor2.loads(data) == {"DescribePCR": {"lock": True, "data": PCRS[0]}}


def test_several_requests_with_one_kick(front: FrontEnd) -> None:
    queue = front.queues[0]
    for index in range(3):
        queue.add([cbor2.dumps({"DescribePCR": {"index": index}})])
        queue.add([], [ROOM])
    queue.kick()
    answers = [cbor2.loads(data) for _, data in queue.wait(6) if data]
    assert [answer["DescribePCR"]["data"] for answer in answers] == [PCRS[0], PCRS[1], PCRS[2]]


def test_what_is_wrong_is_said_in_the_response(front: FrontEnd) -> None:
    assert cbor2.loads(linux(front, bytes(limits.NSM_REQUEST_BYTES + 1))) == {"Error": "InputTooLarge"}
    assert cbor2.loads(linux(front, bytes(1 << 16))) == {"Error": "InputTooLarge"}
    assert cbor2.loads(linux(front, b"\xff")) == {"Error": "InvalidOperation"}
    attestation = cbor2.dumps({"Attestation": {"user_data": None, "nonce": None, "public_key": None}})
    assert cbor2.loads(linux(front, attestation, room=100)) == {"Error": "BufferTooSmall"}
    assert linux(front, attestation, room=4) == b""
    assert "DescribeNSM" in ask(front, "DescribeNSM")


def test_a_buffer_without_a_request_comes_back_empty(front: FrontEnd) -> None:
    queue = front.queues[0]
    head = queue.add([], [ROOM])
    queue.kick()
    assert queue.wait() == [(head, b"")]
