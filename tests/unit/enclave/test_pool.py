"""The pool: tasks that are repeated, bounded, and never given to the wrong worker."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parley_enclave import pool as module
from parley_enclave.pool import Context, Parts, Pool, Task, WorkerError
from parley_protocol import limits
from parley_protocol.errors import RefusedError, UnavailableError

Behaviour = Callable[[Task, socket.socket], Parts]


class FakeWorker:
    """A worker that does what the test says."""

    behaviour: Behaviour = staticmethod(lambda task, serve: (b"done",))
    made = 0

    def __init__(self, uid: int | None) -> None:
        assert uid is None
        FakeWorker.made += 1
        self.pid = FakeWorker.made
        self.ended = False

    def run(self, task: Task, serve: socket.socket) -> Parts:
        return FakeWorker.behaviour(task, serve)

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setattr(module, "_Worker", FakeWorker)
    FakeWorker.made = 0
    FakeWorker.behaviour = staticmethod(lambda task, serve: (b"done",))
    made = Pool(2)
    yield made
    made.close()


def offered(pool: Pool) -> socket.socket:
    theirs, ours = socket.socketpair()
    pool.offer(ours)
    return theirs


def test_a_task_waits_for_a_connection_and_gives_it_back(fake: Pool) -> None:
    future = fake.submit(Task(["scan", 0]))
    with pytest.raises(TimeoutError):
        future.result(timeout=0.05)
    with offered(fake):
        assert future.result(timeout=5) == (b"done",)
        assert fake.submit(Task(["scan", 1])).result(timeout=5) == (b"done",)


def test_ses_11_a_lost_worker_is_replaced_and_the_task_goes_on_elsewhere(fake: Pool) -> None:
    lost = iter([True, True])

    def behaviour(_task: Task, _serve: socket.socket) -> Parts:
        if next(lost, False):
            raise module._WorkerLostError
        return (b"at last",)

    FakeWorker.behaviour = staticmethod(behaviour)
    ends = [offered(fake) for _ in range(3)]
    assert fake.submit(Task(["scan", 0])).result(timeout=5) == (b"at last",)
    assert FakeWorker.made == 4
    for end in ends[:2]:
        end.settimeout(5)
        assert end.recv(1) == b"", "a connection that a lost worker had is closed"
    for end in ends:
        end.close()


def test_ses_11_attempts_are_bounded(fake: Pool) -> None:
    tried: list[int] = []

    def behaviour(_task: Task, _serve: socket.socket) -> Parts:
        tried.append(1)
        raise module._ServeLostError

    FakeWorker.behaviour = staticmethod(behaviour)
    ends = [offered(fake) for _ in range(4)]
    stop = threading.Event()

    def again() -> None:
        while not stop.wait(0.01):
            ends.append(offered(fake))

    feeder = threading.Thread(target=again)
    feeder.start()
    with pytest.raises(UnavailableError):
        fake.submit(Task(["scan", 0])).result(timeout=10)
    stop.set()
    feeder.join()
    assert len(tried) == limits.TASK_ATTEMPTS
    for end in ends:
        end.close()


def test_no_connection_in_time_is_unavailable(fake: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parley_protocol.limits.SERVE_WAIT_MS", 50)
    with pytest.raises(UnavailableError):
        fake.submit(Task(["scan", 0])).result(timeout=5)


def test_a_connection_on_which_the_host_speaks_or_that_it_closed_is_not_used(fake: Pool) -> None:
    used: list[socket.socket] = []

    def behaviour(_task: Task, serve: socket.socket) -> Parts:
        used.append(serve)
        return ()

    FakeWorker.behaviour = staticmethod(behaviour)
    with offered(fake) as talks:
        talks.sendall(b"unasked")
        offered(fake).close()
        with offered(fake):
            fake.submit(Task(["scan", 0])).result(timeout=5)
            talks.settimeout(5)
            assert len(used) == 1
            with pytest.raises(ConnectionResetError):
                talks.recv(1)


def test_spare_connections_are_bounded(fake: Pool) -> None:
    ends = [offered(fake) for _ in range(5)]
    ends[0].settimeout(5)
    assert ends[0].recv(1) == b""
    for end in ends:
        end.close()


def test_ses_12_renewing_ends_workers_and_their_tasks(fake: Pool) -> None:
    waiting = [fake.submit(Task(["scan", number])) for number in range(4)]
    before = fake.pids
    fake.renew()
    for future in waiting:
        with pytest.raises(UnavailableError):
            future.result(timeout=5)
    assert not set(before) & set(fake.pids)
    with offered(fake):
        assert fake.submit(Task(["scan", 0])).result(timeout=5) == (b"done",)


def test_a_task_that_renewing_overtakes_never_reaches_a_new_worker(fake: Pool) -> None:
    entered, leave = threading.Event(), threading.Event()
    seen: list[str] = []

    def behaviour(task: Task, _serve: socket.socket) -> Parts:
        seen.append(str(task.fields[0]))
        if task.fields[0] == "old":
            entered.set()
            leave.wait(5)
            raise module._WorkerLostError
        return ()

    FakeWorker.behaviour = staticmethod(behaviour)
    with offered(fake), offered(fake):
        old = fake.submit(Task(["old"]))
        assert entered.wait(5)
        fake.renew()
        leave.set()
        with pytest.raises(UnavailableError):
            old.result(timeout=5)
        fake.submit(Task(["new"])).result(timeout=5)
    assert seen == ["old", "new"]


@pytest.mark.parametrize("workers", [0, -1, limits.WORKERS + 1])
def test_the_number_of_workers_is_bounded(workers: int) -> None:
    with pytest.raises(ValueError, match="workers"):
        Pool(workers)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (["refused", "order"], RefusedError),
        (["refused", "no such code"], module._WorkerLostError),
        (["unserved"], module._ServeLostError),
        (["failed", "ValueError at scan.py:7"], WorkerError),
        (["done", 1], module._WorkerLostError),
        ([], module._WorkerLostError),
    ],
)
def test_what_a_worker_answers_is_one_of_few_things(fields: list[object], error: type[Exception]) -> None:
    with pytest.raises(error):
        module._outcome(fields, ())  # type: ignore[arg-type]


def test_a_real_worker_says_where_it_failed_and_no_value() -> None:
    pool = Pool(1)
    try:
        with offered(pool):
            with pytest.raises(WorkerError) as failed:
                pool.submit(Task(["admit", "secret-value"], (b"\xff",))).result(timeout=60)
            assert failed.value.place.startswith("ValueError at worker.py:")
            assert "secret" not in failed.value.place
    finally:
        pool.close()


_HANDS_FILES_OVER = """
import socket, sys
from parley_enclave import exchange
control = socket.socket(fileno=int(sys.argv[-1]))
_, (serve,) = exchange.receive_with_files(control)
for _ in range(200):
    exchange.send(control, ["progress", 1], fds=[serve])
exchange.send(control, ["done"], fds=[serve])
exchange.receive(control)
"""


def test_a_worker_uses_up_no_files_of_the_main_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(_HANDS_FILES_OVER)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/worker.py "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    pool = Pool(1)
    told: list[int] = []
    try:
        with offered(pool):
            before = len(os.listdir("/proc/self/fd"))
            assert pool.submit(Task(["scan", 0], progress=told.append)).result(timeout=60) == ()
            assert len(told) == 200
            assert len(os.listdir("/proc/self/fd")) == before
    finally:
        pool.close()


def test_keys_in_tasks_are_not_printed() -> None:
    task = Task(["admit", b"secret"], (b"secret",), Context(b"name", [b"secret"], (b"secret",)))
    assert "secret" not in repr(task)
