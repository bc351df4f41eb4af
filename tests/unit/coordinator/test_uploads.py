"""Uploads: resumed at any byte, bounded, one stream at a time, and `stored` only when it is on the disk."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.orm import Session

from parley_coordinator import s3
from parley_coordinator.blobs import BlobStore, BlobWriter, Directory, upload_name
from parley_coordinator.config import Quotas
from parley_coordinator.guard import CURRENT, Call, Guard
from parley_coordinator.models import EventRow, UploadRow
from parley_coordinator.service import Service
from parley_coordinator.store import ConflictError
from parley_coordinator.uploads import UploadView
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import MalformedError, ParleyError, RefusedError
from parley_protocol.transcript import Upload
from parley_protocol.v1 import coordinator_pb2 as pb
from support import s3 as bucket
from support.desk import MEMBERS, STRANGER, Desk, key, make_agreement
from support.enclave import Sealed


@pytest.fixture
def desk(tmp_path: Path, database: str) -> Iterator[Desk]:
    made = Desk(tmp_path, database=database)
    yield made
    made.store.close()


@pytest.fixture
def agreement(desk: Desk) -> Agreement:
    made = make_agreement()
    desk.sign(made)
    return made


@pytest.fixture
def sealed(desk: Desk, agreement: Agreement) -> Sealed:
    return desk.sealed(agreement, "bob")


def stored(desk: Desk, sealed: Sealed) -> bytes:
    with desk.store.read() as session:
        row = session.query(UploadRow).filter_by(digest=sealed.upload.digest).one()
    return desk.blobs.reader(upload_name(row.number)).read(0, 1 << 30)


@pytest.mark.parametrize("seed", range(8))
def test_crd_9_an_upload_is_resumed_at_arbitrary_offsets(desk: Desk, sealed: Sealed, seed: int) -> None:
    numbers = random.Random(seed)
    size, at = len(sealed.blob), 0
    while at < size:
        end = min(size, at + numbers.randrange(1, size // 3))
        overlap = numbers.randrange(0, min(at, 5000) + 1)
        view = desk.upload(sealed, "bob", at - overlap, end)
        assert (view.stored, view.size, view.complete) == (end, size, end == size)
        assert desk.uploads.get(key("bob"), sealed.upload.digest) == view
        at = end
    assert stored(desk, sealed) == sealed.blob


def test_crd_9_what_is_not_synced_is_not_told(desk: Desk, sealed: Sealed) -> None:
    row = desk.uploads.begin(key("bob"), sealed.cose)
    with desk.uploads.writing(row) as writing:
        writing.write(0, sealed.blob[:1000])
        writing.sync()
        writing.write(1000, sealed.blob[1000:2000])
        assert desk.uploads.get(key("bob"), sealed.upload.digest).stored == 1000
        assert writing.unsynced == 1000
    with desk.uploads.writing(row) as writing:
        assert writing.position == 1000


def test_crd_9_a_gap_too_much_and_too_large(desk: Desk, sealed: Sealed) -> None:
    size = len(sealed.blob)
    row = desk.uploads.begin(key("bob"), sealed.cose)
    wrong = [
        (1, b"x", "incomplete"),
        (size, b"x", "too-large"),
        (0, bytes(limits.CHUNK_BYTES + 1), "too-large"),
        (2**63, b"x", "too-large"),
        (0, b"", "malformed"),
    ]
    with desk.uploads.writing(row) as writing:
        for offset, data, code in wrong:
            with pytest.raises(ParleyError) as caught:
                writing.write(offset, data)
            assert caught.value.code == code
        assert writing.position == 0


def test_crd_9_a_conflict_of_transactions_undoes_only_the_note(
    desk: Desk, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = desk.uploads.begin(key("bob"), sealed.cose)
    write, conflicts = desk.store.write, iter((True, True, False))

    @contextmanager
    def often_undone() -> Iterator[Session]:
        with write() as session:
            yield session
            if next(conflicts):
                raise ConflictError("another transaction was faster")

    with desk.uploads.writing(row) as writing:
        writing.write(0, sealed.blob)
        with monkeypatch.context() as patched:
            patched.setattr(desk.store, "write", often_undone)
            assert writing.sync().complete
        assert next(conflicts, None) is None
    assert stored(desk, sealed) == sealed.blob


def test_crd_9_a_later_stream_takes_over(desk: Desk, sealed: Sealed) -> None:
    row = desk.uploads.begin(key("bob"), sealed.cose)
    positions: list[int] = []

    def second() -> None:
        with desk.uploads.writing(row) as writing:
            positions.append(writing.position)

    with desk.uploads.writing(row) as first:
        first.write(0, sealed.blob[:500])
        first.sync()
        thread = threading.Thread(target=second)
        thread.start()
        assert first.superseded.wait(5)
        with pytest.raises(RefusedError) as caught:
            first.write(500, b"x")
        assert caught.value.code == "busy"
    thread.join()
    assert positions == [500]


def test_crd_9_a_stream_that_does_not_end_keeps_the_later_one_out(desk: Desk, sealed: Sealed) -> None:
    row = desk.uploads.begin(key("bob"), sealed.cose)
    with desk.uploads.writing(row), pytest.raises(RefusedError) as caught, desk.uploads.writing(row):
        raise AssertionError("two streams write one upload")
    assert caught.value.code == "busy"


class Stuck(Directory):
    """A blob store in which one blob's first call hangs: `opened`, `written` or `synced`."""

    def __init__(self, folder: Path, call: str) -> None:
        super().__init__(folder)
        self._call = call
        self.name = ""
        self.calls: list[str] = []
        self.hangs = threading.Event()
        self.free = threading.Event()

    def hang(self, call: str, name: str) -> None:
        """Hangs where it is to."""
        self.calls.append(call)
        if (call, name) == (self._call, self.name):
            self.hangs.set()
            assert self.free.wait(60)

    def writer(self, name: str, stored: int, size: int = 0, state: str = "") -> BlobWriter:
        self.hang("opened", name)
        return _StuckWriter(self, name, super().writer(name, stored, size, state))


class _StuckWriter:
    def __init__(self, store: Stuck, name: str, writer: BlobWriter) -> None:
        self._store = store
        self._name = name
        self._writer = writer

    @property
    def position(self) -> int:
        return self._writer.position

    @property
    def state(self) -> str:
        return self._writer.state

    def write(self, data: bytes) -> None:
        self._store.hang("written", self._name)
        self._writer.write(data)

    def sync(self, *, whole: bool = True) -> int:
        self._store.hang("synced", self._name)
        return self._writer.sync(whole=whole)

    def close(self) -> None:
        self._writer.close()


@pytest.mark.parametrize("call", ["opened", "written", "synced"])
def test_crd_9_an_upload_whose_store_does_not_answer_stops_no_other(tmp_path: Path, database: str, call: str) -> None:
    blobs = Stuck(tmp_path / "blobs", call)
    desk = Desk(tmp_path, database=database, blobs=blobs)
    agreement = make_agreement()
    desk.sign(agreement)
    stuck, other = desk.sealed(agreement, "bob"), desk.sealed(agreement, "ann")
    row = desk.uploads.begin(key("ann"), other.cose)
    with ThreadPoolExecutor(2) as pool, desk.uploads.writing(row) as writing:
        writing.write(0, other.blob[:1000])
        try:
            blobs.name = upload_name(desk.uploads.begin(key("bob"), stuck.cose).number)
            hanging = pool.submit(desk.upload, stuck, "bob")
            assert blobs.hangs.wait(10)
            writing.write(1000, other.blob[1000:2000])
            assert pool.submit(writing.sync).result(10).stored == 2000
            new = desk.sealed(agreement, "ann")
            assert pool.submit(desk.upload, new, "ann").result(10).complete
            assert not hanging.done()
        finally:
            blobs.free.set()
        assert hanging.result(10).complete
    desk.store.close()


def test_crd_9_a_stream_whose_blob_is_being_opened_is_taken_over_from(tmp_path: Path, database: str) -> None:
    blobs = Stuck(tmp_path / "blobs", "opened")
    desk = Desk(tmp_path, database=database, blobs=blobs)
    agreement = make_agreement()
    desk.sign(agreement)
    sealed = desk.sealed(agreement, "bob")
    row = desk.uploads.begin(key("bob"), sealed.cose)
    blobs.name = upload_name(row.number)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(desk.upload, sealed, "bob")
        assert blobs.hangs.wait(10)
        try:
            with pytest.raises(RefusedError) as caught, desk.uploads.writing(row):
                raise AssertionError("two streams write one upload")
            assert caught.value.code == "busy"
        finally:
            blobs.free.set()
        with pytest.raises(RefusedError, match="another stream has taken over"):
            first.result(10)
    assert desk.upload(sealed, "bob").complete
    desk.store.close()


def upload_of(service: Service, *requests: pb.UploadRequest) -> asyncio.Task[pb.UploadState]:
    """A call of bob's whose client sends no more, and does not say so."""

    async def arriving() -> AsyncIterator[pb.UploadRequest]:
        for request in requests:
            yield request
        await asyncio.Event().wait()

    context: Any = None
    CURRENT.set(Call("Upload", key("bob")))
    return asyncio.ensure_future(service.Upload(arriving(), context))


def service_of(desk: Desk, pool: ThreadPoolExecutor) -> Service:
    parts: Any = SimpleNamespace(uploads=desk.uploads)
    bell: Any = None
    guard = Guard("parley.v1.Coordinator", request_s=30, calls_per_member=9)
    return Service(parts, bell, guard, idle_s=30, quick=pool, disk=pool, long=pool, joins=pool, watching=pool)


async def came(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 30)


def test_crd_9_a_stream_that_waited_for_the_last_byte_is_answered_at_once(tmp_path: Path, database: str) -> None:
    blobs = Stuck(tmp_path / "blobs", "synced")
    desk = Desk(tmp_path, database=database, blobs=blobs)
    desk.uploads._handover_s = 30
    agreement = make_agreement()
    desk.sign(agreement)
    sealed = desk.sealed(agreement, "bob")
    number = desk.uploads.begin(key("bob"), sealed.cose).number
    blobs.name = upload_name(number)

    async def run(pool: ThreadPoolExecutor) -> pb.UploadState:
        first = pool.submit(desk.upload, sealed, "bob")
        await came(blobs.hangs)
        before = desk.uploads._turns[number]
        second = upload_of(service_of(desk, pool), pb.UploadRequest(begin=pb.UploadBegin(cose=sealed.cose)))
        await came(before.superseded)
        blobs.free.set()
        async with asyncio.timeout(20):
            state = await second
        assert first.result(10).complete
        return state

    with ThreadPoolExecutor(4) as pool:
        state = asyncio.run(run(pool))
    assert (state.stored, state.size, state.complete) == (len(sealed.blob), len(sealed.blob), True)
    assert blobs.calls.count("opened") == 1
    assert stored(desk, sealed) == sealed.blob
    desk.store.close()


def test_crd_9_a_stream_whose_client_goes_while_its_blob_is_opened_ends_in_order(tmp_path: Path, database: str) -> None:
    blobs = Stuck(tmp_path / "blobs", "opened")
    desk = Desk(tmp_path, database=database, blobs=blobs)
    agreement = make_agreement()
    desk.sign(agreement)
    sealed = desk.sealed(agreement, "bob")
    number = desk.uploads.begin(key("bob"), sealed.cose).number
    blobs.name = upload_name(number)

    async def run(pool: ThreadPoolExecutor) -> None:
        call = upload_of(service_of(desk, pool), pb.UploadRequest(begin=pb.UploadBegin(cose=sealed.cose)))
        await came(blobs.hangs)
        turn = desk.uploads._turns[number]
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        blobs.free.set()
        await came(turn.ended)

    with ThreadPoolExecutor(4) as pool:
        asyncio.run(run(pool))
    assert blobs.calls == ["opened", "synced"]
    assert desk.upload(sealed, "bob").complete
    desk.store.close()


@pytest.fixture(scope="module")
def bucket_url() -> Iterator[str]:
    with bucket.server() as url:
        yield url


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_crd_9_a_complete_upload_is_not_written_again(
    tmp_path: Path, database: str, bucket_url: str, kind: str
) -> None:
    made: BlobStore = Directory(tmp_path / "blobs") if kind == "directory" else s3.Bucket(bucket.bucket(bucket_url))
    desk = Desk(tmp_path, database=database, blobs=made)
    agreement = make_agreement()
    desk.sign(agreement)
    sealed = desk.sealed(agreement, "bob")
    seen_before = desk.uploads.begin(key("bob"), sealed.cose)
    whole = UploadView(len(sealed.blob), len(sealed.blob), complete=True)
    assert desk.upload(sealed, "bob") == whole
    with desk.uploads.writing(seen_before) as late:
        assert late.position == late.size
        late.write(0, sealed.blob[:1000])
        assert late.sync() == whole
    assert stored(desk, sealed) == sealed.blob
    desk.store.close()
    made.close()


def test_crd_9_copies_are_noted_before_anything_is_sent_after_them(
    tmp_path: Path, database: str, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 64 << 10
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", part)
    monkeypatch.setattr(s3, "LEAST_PART", part)
    made = s3.Bucket(replace(bucket.bucket(bucket_url), part_bytes=part))
    desk = Desk(tmp_path, database=database, blobs=made)
    agreement = make_agreement()
    desk.sign(agreement)
    sealed = desk.sealed(agreement, "bob", 20_000)
    half = len(sealed.blob) // 2
    assert not desk.upload(sealed, "bob", 0, half).complete
    row = desk.uploads.begin(key("bob"), sealed.cose)
    former = s3.Progress.load(row.state)
    with desk.store.write() as session:
        session.get_one(UploadRow, row.number).state = replace(former, floor=s3.PARTS).dump()
    copies: list[str] = []
    made.client.meta.events.register("before-parameter-build.s3.UploadPartCopy", lambda **_: copies.append("copy"))
    with desk.uploads.writing(row):
        # It is killed: nothing is told.
        assert copies
    copies.clear()
    noted = s3.Progress.load(desk.uploads.begin(key("bob"), sealed.cose).state)
    assert noted.upload not in ("", former.upload)
    assert desk.upload(sealed, "bob", half).complete
    assert copies == []
    assert stored(desk, sealed) == sealed.blob
    desk.store.close()
    made.close()


def test_crd_7_the_same_statement_is_the_same_upload(desk: Desk, sealed: Sealed) -> None:
    first = desk.uploads.begin(key("bob"), sealed.cose)
    assert desk.uploads.begin(key("bob"), sealed.cose).number == first.number
    view = desk.upload(sealed, "bob")
    assert view == UploadView(len(sealed.blob), len(sealed.blob), complete=True)
    assert desk.uploads.begin(key("bob"), sealed.cose).complete_ms is not None
    with desk.store.read() as session:
        events = session.query(EventRow).filter_by(kind="uploaded").all()
        assert [(event.member, event.table_name) for event in events] == [("bob", "visits")]


def test_crd_7_only_the_party_itself_and_only_its_own_statement(
    desk: Desk, agreement: Agreement, sealed: Sealed
) -> None:
    for caller, code in ((key("ann"), "not-a-member"), (STRANGER.public.signing, "unknown-agreement")):
        with pytest.raises(RefusedError) as caught:
            desk.uploads.begin(caller, sealed.cose)
        assert caught.value.code == code
    forged = MEMBERS["cyd"].sign(sealed.upload.to_bytes())
    with pytest.raises(ParleyError) as error:
        desk.uploads.begin(key("bob"), forged)
    assert error.value.code == "signature"
    with pytest.raises(MalformedError):
        desk.uploads.begin(key("bob"), b"garbage")
    with pytest.raises(RefusedError) as caught:
        desk.uploads.begin(key("bob"), bytes(limits.STATEMENT_BYTES + 1))
    assert caught.value.code == "too-large"
    for caller in (key("ann"), STRANGER.public.signing):
        with pytest.raises(RefusedError) as caught:
            desk.uploads.get(caller, sealed.upload.digest)
        assert caught.value.code == "unknown-upload"


def test_crd_7_not_before_all_have_signed_and_not_after_the_end(desk: Desk) -> None:
    other = make_agreement(max_releases=9)
    desk.sign(other, "ann", "bob")
    sealed = desk.sealed(other, "bob")
    with pytest.raises(RefusedError) as caught:
        desk.uploads.begin(key("bob"), sealed.cose)
    assert caught.value.code == "agreement"
    desk.sign(other)
    desk.now = other.expires_ms
    with pytest.raises(RefusedError) as caught:
        desk.uploads.begin(key("bob"), sealed.cose)
    assert caught.value.code == "expired"


def test_crd_8_the_size_follows_from_the_statement(desk: Desk, agreement: Agreement) -> None:
    for rows in (10, 3000, 40_000):
        sealed = desk.sealed(agreement, "bob", rows)
        assert desk.uploads.begin(key("bob"), sealed.cose).size == len(sealed.blob)


def test_crd_8_quotas_of_bytes_and_uploads(tmp_path: Path) -> None:
    agreement = make_agreement()
    probe = Desk(tmp_path)
    probe.sign(agreement)
    size = len(probe.sealed(agreement, "bob").blob)
    for name, quotas in (("a", Quotas(bytes_per_member=2 * size)), ("b", Quotas(uploads_per_table=2))):
        (tmp_path / name).mkdir()
        desk = Desk(tmp_path / name, quotas)
        desk.sign(agreement)
        for _ in range(2):
            desk.uploads.begin(key("bob"), desk.sealed(agreement, "bob").cose)
        with pytest.raises(RefusedError) as caught:
            desk.uploads.begin(key("bob"), desk.sealed(agreement, "bob").cose)
        assert caught.value.code == "quota"
        assert desk.upload(desk.sealed(agreement, "ann"), "ann").complete


def test_a_blob_that_lost_stored_bytes_is_told(desk: Desk, sealed: Sealed) -> None:
    desk.upload(sealed, "bob", 0, 1000)
    with desk.store.read() as session:
        number = session.query(UploadRow.number).scalar()
    desk.blobs.delete(upload_name(number))
    with pytest.raises(RefusedError) as caught:
        desk.upload(sealed, "bob", 1000)
    assert caught.value.code == "internal"


def test_the_statement_is_kept_as_it_came(desk: Desk, sealed: Sealed) -> None:
    row = desk.uploads.begin(key("bob"), sealed.cose)
    assert row.cose == sealed.cose
    assert Upload.from_bytes(sealed.upload.to_bytes()).digest == row.digest
