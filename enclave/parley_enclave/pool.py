"""Workers: processes that open, check and scan what parties sealed, so that the process with the keys never does.

Each worker is a subprocess behind a socket pair. A task goes to a free worker together with one of the host's Serve
connections; when either is lost the task is repeated on others, a bounded number of times.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import parley_enclave
import parley_protocol
from parley_enclave import exchange
from parley_protocol import limits
from parley_protocol.encoding import Encodable, Value
from parley_protocol.errors import CODES, MalformedError, ParleyError, RefusedError, UnavailableError

Parts = tuple[bytes, ...]

_UID_MAX = 2**32 - 2
"""The greatest uid: the next one means none."""


class WorkerError(ParleyError):
    """A fault of the program in a worker. `place` is the error's type and line of code, never its text or a value."""

    place: str

    def __init__(self, place: str) -> None:
        super().__init__("a worker failed", code="internal")
        self.place = place


@dataclass(frozen=True, slots=True)
class Context:
    """What several tasks share; sent to a worker once. `name` tells one from another."""

    name: bytes
    fields: list[Encodable] = field(repr=False)
    parts: Parts = field(repr=False)


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work: fields and parts as `worker` reads them, and who is told of the progress in percent."""

    fields: list[Encodable] = field(repr=False)
    parts: Parts = field(default=(), repr=False)
    context: Context | None = None
    progress: Callable[[int], None] | None = None


@dataclass(slots=True)
class _Queued:
    task: Task
    future: Future[Parts]
    generation: int


class _WorkerLostError(Exception):
    """The worker is gone or talks nonsense."""


class _ServeLostError(Exception):
    """The worker says that the Serve connection is lost."""


class _Worker:
    """One subprocess and the main process's end of its socket pair."""

    def __init__(self, uid: int | None = None) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._context: bytes | None = None
        command = [sys.executable, "-P", "-s", "-m", "parley_enclave.worker", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command if uid is None else [*command, "confined"],
                pass_fds=[theirs.fileno()],
                user=uid,
                group=uid,
                extra_groups=None if uid is None else [],
                cwd=None if uid is None else "/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # A traceback's text may hold values; the place of a failure comes back as a parcel.
                stderr=subprocess.DEVNULL,
                env=_environment(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, task: Task, serve: socket.socket) -> Parts:
        try:
            if task.context is not None and task.context.name != self._context:
                exchange.send(self._control, ["context", *task.context.fields], task.context.parts)
                self._context = task.context.name
            exchange.send(self._control, task.fields, task.parts, fds=[serve.fileno()])
            while True:
                answer = exchange.receive(self._control)
                if answer.fields[:1] != ["progress"]:
                    return _outcome(answer.fields, answer.parts)
                percent = answer.fields[1] if len(answer.fields) == 2 else None
                if task.progress is not None and type(percent) is int:
                    task.progress(max(0, min(100, percent)))
        except (OSError, EOFError, MalformedError) as error:
            raise _WorkerLostError from error

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._control.close()


def _outcome(fields: list[Value], parts: Parts) -> Parts:
    match fields:
        case ["done"]:
            return parts
        case ["refused", str(code)] if code in CODES:
            raise RefusedError(code)
        case ["unserved"]:
            raise _ServeLostError
        case ["failed", str(place)]:
            raise WorkerError(place[:200])
    raise _WorkerLostError


_KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "NPY_DISABLE_CPU_FEATURES", "OPENBLAS_CORETYPE")
"""The last two fix in an image which instructions numpy and BLAS choose; see `init`."""


def _environment() -> dict[str, str]:
    """Nothing of the main process's environment but where the code lies; one thread, so that sums are repeatable."""
    roots = dict.fromkeys(str(Path(package.__path__[0]).parent) for package in (parley_enclave, parley_protocol))
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([*roots, *inherited])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


class Pool:
    """`workers` workers, the tasks that wait for them, and the Serve connections that the host keeps open.

    With a `uid` the workers run under it, and its gid, and give up what `confine` says; only root may do that.
    """

    def __init__(self, workers: int, uid: int | None = None) -> None:
        if not 1 <= workers <= limits.WORKERS:
            raise ValueError(f"workers: not 1 to {limits.WORKERS}")
        if uid is not None and not 1 <= uid <= _UID_MAX:
            raise ValueError(f"worker uid: not 1 to {_UID_MAX}")
        if uid is not None and os.geteuid() != 0:
            raise ValueError("worker uid: only root starts processes under another uid")
        self._uid = uid
        self._changed = threading.Condition()
        self._queue: deque[_Queued] = deque()
        self._serves: deque[socket.socket] = deque()
        self._generation = 0
        self._closed = False
        self._workers = [_Worker(uid) for _ in range(workers)]
        self._lanes = [threading.Thread(target=self._lane, args=(number,), daemon=True) for number in range(workers)]
        for lane in self._lanes:
            lane.start()

    @property
    def size(self) -> int:
        """How many workers there are, and so how many Serve connections the host keeps open."""
        return len(self._workers)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        with self._changed:
            return [worker.pid for worker in self._workers]

    def offer(self, serve: socket.socket) -> None:
        """Takes over a Serve connection. Beyond two for each worker the oldest is closed: a new host replaces an old one."""
        with self._changed:
            self._serves.append(serve)
            dropped = self._serves.popleft() if len(self._serves) > 2 * self.size else None
            self._changed.notify_all()
        if dropped is not None:
            dropped.close()

    def submit(self, task: Task) -> Future[Parts]:
        """The parts that a worker answers, later. RefusedError with the worker's code, UnavailableError, WorkerError."""
        future: Future[Parts] = Future()
        with self._changed:
            if self._closed:
                raise UnavailableError("the workers are ended")
            self._queue.append(_Queued(task, future, self._generation))
            self._changed.notify_all()
        return future

    def renew(self) -> None:
        """Ends all workers and starts new ones, so that the memory of the old is gone; their tasks fail."""
        with self._changed:
            self._generation += 1
            waiting = list(self._queue)
            self._queue.clear()
            old, self._workers = self._workers, [_Worker(self._uid) for _ in self._workers]
        for queued in waiting:
            queued.future.set_exception(UnavailableError("the workers are renewed"))
        for worker in old:
            worker.end()

    def close(self) -> None:
        """Ends all workers and closes all connections."""
        with self._changed:
            self._closed = True
            self._generation += 1
            waiting, workers, serves = list(self._queue), list(self._workers), list(self._serves)
            self._queue.clear()
            self._serves.clear()
            self._changed.notify_all()
        for queued in waiting:
            queued.future.cancel()
        for worker in workers:
            worker.end()
        for serve in serves:
            serve.close()

    def _lane(self, number: int) -> None:
        while (queued := self._next()) is not None:
            if queued.future.set_running_or_notify_cancel():
                try:
                    queued.future.set_result(self._perform(number, queued))
                except Exception as error:  # noqa: BLE001  # whatever it is, it must not end the thread
                    queued.future.set_exception(error)

    def _next(self) -> _Queued | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            return None if self._closed else self._queue.popleft()

    def _perform(self, number: int, queued: _Queued) -> Parts:
        for _ in range(limits.TASK_ATTEMPTS):  # ses-11
            serve, worker = self._take(number, queued.generation)
            # After anything but a result the connection may stand in the middle of an answer.
            keep = False
            try:
                parts = worker.run(queued.task, serve)
                keep = True
                return parts
            except _ServeLostError:
                pass
            except _WorkerLostError:
                self._replace(number, worker)
            except WorkerError:
                self._replace(number, worker)
                raise
            finally:
                self._return_serve(serve, keep)
        raise UnavailableError("a task was lost too often")

    def _replace(self, number: int, worker: _Worker) -> None:
        worker.end()
        with self._changed:
            if self._workers[number] is worker and not self._closed:
                self._workers[number] = _Worker(self._uid)

    def _take(self, number: int, generation: int) -> tuple[socket.socket, _Worker]:
        """A Serve connection, and the lane's worker if it is still of this generation: no other may see the task's keys."""
        until = time.monotonic() + limits.SERVE_WAIT_MS / 1000
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._serves or self._generation != generation, timeout=max(0.0, until - time.monotonic())
                )
                if self._generation != generation:
                    raise UnavailableError("the workers are renewed")
                if not self._serves:
                    raise UnavailableError("the host keeps no Serve connection open")
                serve, worker = self._serves.popleft(), self._workers[number]
            if _silent(serve):
                return serve, worker
            serve.close()

    def _return_serve(self, serve: socket.socket, keep: bool) -> None:
        if not keep:
            serve.close()
            return
        with self._changed:
            # To the front: the newest connections wait, the one that works goes on.
            self._serves.appendleft(serve)
            self._changed.notify_all()


def _silent(serve: socket.socket) -> bool:
    """Whether nothing has happened on a connection on which only this side may speak."""
    poll = select.poll()
    poll.register(serve, select.POLLIN | select.POLLHUP | select.POLLERR)
    return not poll.poll(0)
