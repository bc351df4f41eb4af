"""Many uploads at once: each stream writes in its turn, and one that its blob store keeps waiting stops no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from parley_coordinator import service as module
from parley_coordinator.service import Service
from parley_protocol.v1 import coordinator_pb2 as pb


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4 * module.WRITING) as pool:
        yield pool


def made(disk: ThreadPoolExecutor) -> Service:
    nothing: Any = None
    return Service(nothing, nothing, nothing, idle_s=30, quick=disk, disk=disk, long=disk, joins=disk, watching=disk)


class Upload:
    """An upload whose chunks are written by `work`."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def write(self, _offset: int, _data: bytes) -> None:
        self._work()


def write(service: Service, work: Callable[[], object]) -> asyncio.Task[None]:
    upload: Any = Upload(work)
    return asyncio.ensure_future(service._write(upload, pb.Chunk(offset=0, data=b"x")))


def test_streams_write_in_turns_and_who_came_first_is_first(
    disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN_S", 60.0)
    lock = threading.Lock()
    running, most = 0, 0
    order: list[int] = []

    def work(number: int) -> None:
        nonlocal running, most
        with lock:
            order.append(number)
            running += 1
            most = max(most, running)
        threading.Event().wait(0.002)
        with lock:
            running -= 1

    async def run() -> None:
        service = made(disk)
        await asyncio.gather(*(write(service, lambda number=number: work(number)) for number in range(64)))

    asyncio.run(run())
    assert most <= module.WRITING
    # Those of one turn may overtake one another, and no others.
    assert max(abs(at - number) for at, number in enumerate(order)) <= module.WRITING


def test_uploads_whose_store_does_not_answer_stop_no_other(
    disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN_S", 0.01)
    free = threading.Event()

    async def run() -> None:
        service = made(disk)
        hanging = [write(service, free.wait) for _ in range(2 * module.WRITING)]
        try:
            async with asyncio.timeout(30):
                await write(service, lambda: None)
            assert not any(one.done() for one in hanging)
        finally:
            free.set()
        await asyncio.gather(*hanging)

    asyncio.run(run())


@pytest.mark.parametrize("turn_s", [0.0, 60.0])
def test_a_stream_that_is_cut_off_ends_after_what_it_writes(
    disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, turn_s: float
) -> None:
    monkeypatch.setattr(module, "TURN_S", turn_s)
    begun, free, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert free.wait(30)
        ended.set()

    async def run() -> None:
        writing = write(made(disk), work)
        while not begun.is_set():  # noqa: ASYNC110  # set in a thread
            await asyncio.sleep(0.01)
        writing.cancel()
        await asyncio.sleep(0.05)
        assert not writing.done(), "the blob would be closed under the thread that writes to it"
        free.set()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert ended.is_set()

    asyncio.run(run())


def test_what_goes_wrong_with_a_chunk_is_told(disk: ThreadPoolExecutor) -> None:
    def broken() -> None:
        raise OSError("no space")

    async def run() -> None:
        service = made(disk)
        for _ in range(3 * module.WRITING):
            with pytest.raises(OSError, match="no space"):
                await write(service, broken)

    asyncio.run(run())
