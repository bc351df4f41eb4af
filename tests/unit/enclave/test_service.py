"""The operations on the wire: what a refusal and a fault look like, and that nothing ends the service."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley_enclave.channel import Connection
from parley_enclave.enclave import Status
from parley_enclave.phases import Phase
from parley_enclave.service import Service
from parley_protocol import framing
from parley_protocol.errors import RefusedError, UnavailableError, VerificationError
from parley_protocol.v1 import enclave_pb2 as pb
from support.enclave import receive


class Stub:
    """An enclave whose attest does what a test says."""

    def __init__(self, attest: Any = None) -> None:
        self._attest = attest

    def attest(self, _session: bytes, _nonce: bytes) -> bytes:
        if isinstance(self._attest, Exception):
            raise self._attest
        return b"document"

    def status(self) -> Status:
        return Status(Phase.OPEN, missing=("amber",))


class NoPool:
    """A pool that keeps what it is offered."""

    def __init__(self) -> None:
        self.offered: list[socket.socket] = []

    def offer(self, serve: socket.socket) -> None:
        self.offered.append(serve)


def exchange(service: Service, data: bytes) -> pb.Answer | None:
    """The answer to raw bytes, or None where the service closes without one."""
    theirs, ours = socket.socketpair()
    with theirs:
        connection = Connection(ours)

        def handle() -> None:
            service.handle(connection)
            connection.close()

        thread = threading.Thread(target=handle)
        thread.start()
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            return pb.Answer.FromString(receive(theirs)[0])
        except EOFError:
            return None
        finally:
            thread.join()


def service(enclave: Any, lines: list[str] | None = None) -> Service:
    pool: Any = NoPool()
    return Service(enclave, pool, log=(lines if lines is not None else []).append)


ATTEST = framing.pack(pb.Ask(attest=pb.Attest(session=bytes(16), nonce=bytes(32))).SerializeToString())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RefusedError("quorum"), "quorum"),
        (VerificationError("ros-1", "text", code="signature"), "signature"),
        (UnavailableError("text"), "unavailable"),
        (ZeroDivisionError("secret value"), "internal"),
        (MemoryError(), "internal"),
    ],
)
def test_errors_become_codes_and_nothing_else(error: Exception, code: str) -> None:
    lines: list[str] = []
    answer = exchange(service(Stub(error), lines), ATTEST)
    assert answer == pb.Answer(failed=pb.Failed(code=code))
    assert "secret" not in "".join(lines)


def test_an_answer_and_the_state() -> None:
    made = service(Stub())
    assert exchange(made, ATTEST) == pb.Answer(attested=pb.Attested(document=b"document"))
    asked = framing.pack(pb.Ask(status=pb.Status()).SerializeToString())
    assert exchange(made, asked) == pb.Answer(state=pb.State(phase="open", missing=["amber"]))


@pytest.mark.parametrize("ask", [pb.Ask(), pb.Ask(frames=pb.Frames())])
def test_an_ask_without_an_operation_of_the_host_is_malformed(ask: pb.Ask) -> None:
    assert exchange(service(Stub()), framing.pack(ask.SerializeToString())) == pb.Answer(
        failed=pb.Failed(code="malformed")
    )


@given(st.binary(max_size=200))
def test_any_bytes_are_answered_malformed_or_by_closing(data: bytes) -> None:
    for raw in (data, framing.pack(data)):
        answer = exchange(service(Stub()), raw)
        assert answer is None or answer.WhichOneof("op") in ("failed", "state", "attested")


def test_a_serve_connection_goes_to_the_pool() -> None:
    pool = NoPool()
    stub, taken = Stub(), pool
    made = Service(stub, taken, log=print)  # type: ignore[arg-type]
    theirs, ours = socket.socketpair()
    with theirs:
        theirs.sendall(framing.pack(pb.Ask(serve=pb.Serve()).SerializeToString()))
        connection = Connection(ours)
        made.handle(connection)
        connection.close()
        (serve,) = pool.offered
        with serve:
            serve.sendall(b"pull")
            assert theirs.recv(4) == b"pull"


def test_a_host_that_is_gone_ends_nothing() -> None:
    theirs, ours = socket.socketpair()
    theirs.sendall(ATTEST)
    theirs.close()
    service(Stub()).handle(Connection(ours))
    ours.close()
    assert os.getpid()
