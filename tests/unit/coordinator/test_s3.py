"""Blobs in a bucket, over HTTP: resumed at any byte, checked, read ahead, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from parley_coordinator import s3
from parley_coordinator.blobs import bundle_name, upload_name
from parley_coordinator.config import S3
from parley_coordinator.s3 import BLOCK, Bucket, MissingError
from parley_protocol.errors import UnavailableError
from support import s3 as support

MIB = 1 << 20
NAME = upload_name(0x2A)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with support.server() as made:
        yield made


@pytest.fixture
def config(url: str) -> S3:
    return support.bucket(url)


@pytest.fixture
def bucket(config: S3) -> Iterator[Bucket]:
    made = Bucket(config)
    yield made
    made.close()


class Requests:
    """The requests of a client, and what is done to them."""

    def __init__(self, bucket: Bucket) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        events = bucket.client.meta.events
        events.register("before-parameter-build.s3", self._see)

    def _see(self, params: dict[str, Any], model: Any, **_: object) -> None:
        self.seen.append((model.name, dict(params)))

    def names(self) -> list[str]:
        """Operations in order."""
        return [name for name, _ in self.seen]


def objects(bucket: Bucket, config: S3) -> list[str]:
    listed = bucket.client.list_objects_v2(Bucket=config.bucket).get("Contents", [])
    return sorted(found["Key"].removeprefix(config.prefix) for found in listed)


def uploads(bucket: Bucket, config: S3) -> int:
    return len(bucket.client.list_multipart_uploads(Bucket=config.bucket).get("Uploads", []))


def whole(bucket: Bucket, size: int) -> bytes:
    reader = bucket.reader(NAME)
    assert reader.size == size
    return reader.read(0, size + 99)


@pytest.mark.parametrize("size", [1, 5 * MIB, 8 * MIB, 8 * MIB + 1, 20 * MIB])
def test_a_blob_is_written_at_once(bucket: Bucket, config: S3, size: int) -> None:
    data = random.Random(size).randbytes(size)
    writer = bucket.writer(NAME, 0, size)
    for at in range(0, size, MIB):
        writer.write(data[at : at + MIB])
    assert (writer.sync(), writer.position) == (size, size)
    writer.close()
    assert whole(bucket, size) == data
    assert objects(bucket, config) == [NAME]
    assert uploads(bucket, config) == 0


@pytest.mark.parametrize("seed", range(4))
def test_an_upload_is_resumed_at_arbitrary_bytes_by_other_coordinators(config: S3, seed: int) -> None:
    """Each turn is another process's: what the store of state holds is all it has."""
    numbers = random.Random(seed)
    size = numbers.randrange(1, 40) * MIB + numbers.randrange(MIB)
    data = numbers.randbytes(size)
    stored, state, turns = 0, "", 0
    while stored < size:
        bucket = Bucket(config)
        writer = bucket.writer(NAME, stored, size, state)
        assert writer.position == stored
        end = min(size, stored + numbers.randrange(1, 15 * MIB))
        at = stored
        while at < end:
            piece = min(end - at, numbers.randrange(1, 2 * MIB))
            writer.write(data[at : at + piece])
            at += piece
            if numbers.random() < 0.2:
                stored, state = writer.sync(whole=False), writer.state
        if numbers.random() < 0.5 or at == size:
            stored, state = writer.sync(), writer.state
            assert stored == end
        # Otherwise it was killed: what was not noted is sent again.
        writer.close()
        bucket.close()
        turns += 1
        assert turns < 500
    bucket = Bucket(config)
    assert hashlib.sha256(whole(bucket, size)).digest() == hashlib.sha256(data).digest()
    assert objects(bucket, config) == [NAME]
    bucket.close()


def test_killed_between_the_last_byte_and_its_note(bucket: Bucket) -> None:
    for size in (3 * MIB, 12 * MIB):
        data = os.urandom(size)
        writer = bucket.writer(NAME, 0, size)
        writer.write(data[:-MIB])
        stored, state = writer.sync(), writer.state
        writer.write(data[-MIB:])
        assert writer.sync() == size
        again = bucket.writer(NAME, stored, size, state)
        assert again.position == size
        assert again.sync() == size
        assert whole(bucket, size) == data
        bucket.delete(NAME, again.state)


@pytest.mark.parametrize("size", [1, 5 * MIB, 8 * MIB, 20 * MIB])
def test_a_whole_blob_is_not_written_again(bucket: Bucket, config: S3, size: int) -> None:
    """Whoever reads it goes on."""
    data = os.urandom(size)
    writer = bucket.writer(NAME, 0, size)
    writer.write(data)
    assert writer.sync() == size
    state = writer.state
    reader = bucket.reader(NAME)
    requests = Requests(bucket)
    again = bucket.writer(NAME, size, size, bucket.reserve(state))
    assert again.position == again.sync() == size
    assert set(requests.names()) <= {"HeadObject", "ListParts"}
    assert reader.read(0, size) == data
    assert bucket.writer(NAME, size, size, again.state).position == size
    bucket.client.delete_object(Bucket=config.bucket, Key=config.prefix + NAME)
    with pytest.raises(OSError, match="no such thing"):
        bucket.writer(NAME, size, size, state)
    bucket.put_object(config.prefix + NAME, b"another")
    with pytest.raises(OSError, match="gone"):
        bucket.writer(NAME, size, size, state)


def test_a_stopped_writer_that_goes_on_spoils_nothing(bucket: Bucket) -> None:
    """Its parts have numbers of their own."""
    size = 40 * MIB
    data = os.urandom(size)
    old = bucket.writer(NAME, 0, size)
    old.write(data[: 9 * MIB])
    stored, state = old.sync(whole=False), old.state
    assert stored == 8 * MIB
    new = bucket.writer(NAME, stored, size, state)
    new.write(data[stored : 30 * MIB])
    old.write(b"x" * 20 * MIB)
    new.write(data[30 * MIB :])
    assert new.sync() == size
    assert whole(bucket, size) == data


def test_generations_that_begin_before_the_first_sync_share_no_part_numbers(bucket: Bucket, config: S3) -> None:
    """The second was stopped before it told anything, and wakes up after the third was acknowledged."""
    size = 40 * MIB
    data = os.urandom(size)
    first = bucket.writer(NAME, 0, size)
    first.write(data[: 16 * MIB])
    stored, state = first.sync(), first.state
    first.close()
    reserved = bucket.reserve(state)
    old = bucket.writer(NAME, stored, size, state)
    old.write(os.urandom(6 * MIB))
    other = Bucket(config)
    again = other.reserve(reserved)
    new = other.writer(NAME, stored, size, reserved)
    new.write(data[stored : stored + 16 * MIB])
    acknowledged, noted = new.sync(whole=False), new.state
    old.sync()
    assert s3.Progress.load(state).floor < s3.Progress.load(reserved).floor < s3.Progress.load(again).floor
    third = bucket.writer(NAME, acknowledged, size, noted)
    third.write(data[acknowledged:])
    assert third.sync() == size
    assert whole(bucket, size) == data
    other.close()


def test_a_writer_does_not_go_beyond_the_numbers_that_are_reserved(bucket: Bucket) -> None:
    size = 8000 * 5 * MIB
    part = bucket.part_bytes(size)
    bucket.part_bytes = lambda size: 5 * MIB  # type: ignore[method-assign]
    assert part > 5 * MIB
    first = bucket.writer(NAME, 0, size)
    first.write(bytes(5 * MIB))
    stored, state = first.sync(), first.state
    writer = bucket.writer(NAME, stored, size, state)
    for _ in range(s3.GAP):
        writer.write(bytes(5 * MIB))
    with pytest.raises(UnavailableError, match="not known to be stored"):
        writer.write(bytes(5 * MIB))
    sent = s3.Progress.load(state).floor + s3.GAP
    assert max(bucket.parts(bucket._key(NAME), s3.Progress.load(state).upload)) == sent - 1
    bucket.delete(NAME, state)


PART = 64 << 10


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, config: S3) -> S3:
    """A store of small things: parts from 64 KiB on, 120 of an upload at most, and 192 KiB of it are copied at a time."""
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", PART)
    monkeypatch.setattr(s3, "LEAST_PART", PART)
    monkeypatch.setattr(s3, "PARTS", 120)
    monkeypatch.setattr(s3, "AIM_PARTS", 40)
    monkeypatch.setattr(s3, "COPIED", 3 * PART)
    monkeypatch.setattr(s3, "COPIED_PARTS", 1)
    return replace(config, part_bytes=PART)


def test_an_upload_outlives_any_number_of_interruptions(small: S3) -> None:
    """A coordinator that is killed tells nothing more: its part numbers are used up. One part in ten times gets through."""
    size = 21 * PART + 7
    data = random.Random(1).randbytes(size)
    bucket = Bucket(small)
    requests = Requests(bucket)
    stored, state, kills = 0, "", 0
    while stored < size:
        reserved = bucket.reserve(state)
        writer = bucket.writer(NAME, stored, size, state)
        assert writer.position == stored
        state = reserved
        writer.write(data[stored : stored + PART])
        if kills % 10 == 9:
            stored, state = writer.sync(whole=False), writer.state
        writer.close()
        kills += 1
        assert kills < 500
    assert kills >= 200 and requests.names().count("UploadPartCopy") > 20
    assert whole(bucket, size) == data
    assert objects(bucket, small) == [NAME]
    bucket.close()


@pytest.mark.parametrize("operation", ["CreateMultipartUpload", "UploadPartCopy"])
@pytest.mark.parametrize("tail", [0, PART // 2])
def test_killed_while_an_upload_goes_on_as_another_one(small: S3, operation: str, tail: int) -> None:
    bucket = Bucket(small)
    size = 14 * PART
    data = os.urandom(size)
    first = bucket.writer(NAME, 0, size)
    first.write(data[: 8 * PART + tail])
    stored, state = first.sync(), first.state
    assert stored == 8 * PART + tail
    state = replace(s3.Progress.load(state), floor=s3.PARTS - s3.GAP).dump()
    failing(bucket, operation, s3.ATTEMPTS)
    with pytest.raises(UnavailableError):
        bucket.writer(NAME, stored, size, state)
    late = bucket.writer(NAME, stored, size, state)
    again = bucket.writer(NAME, stored, size, state)
    again.write(data[stored : 10 * PART])
    stored, state = again.sync(), again.state
    late.write(os.urandom(3 * PART))
    last = bucket.writer(NAME, stored, size, state)
    last.write(data[stored:])
    assert last.sync() == size
    assert whole(bucket, size) == data
    assert objects(bucket, small) == [NAME]
    bucket.close()


def test_copies_serve_whoever_comes_next(small: S3) -> None:
    """A writer that was killed before its first sync has told of its copies, and one that wakes up spoils nothing."""
    bucket = Bucket(small)
    size = 14 * PART
    data = os.urandom(size)
    first = bucket.writer(NAME, 0, size)
    first.write(data[: 8 * PART + 5])
    stored, state = first.sync(), first.state
    state = replace(s3.Progress.load(state), floor=s3.PARTS - s3.GAP).dump()
    late = bucket.writer(NAME, stored, size, state)
    noted = late.state
    requests = Requests(bucket)
    again = bucket.writer(NAME, stored, size, noted)
    assert again.position == stored
    late.write(os.urandom(3 * PART))
    again.write(data[stored : 10 * PART])
    acknowledged, state = again.sync(), again.state
    last = bucket.writer(NAME, acknowledged, size, state)
    last.write(data[acknowledged:])
    assert last.sync() == size
    assert not {"UploadPartCopy", "CreateMultipartUpload"} & set(requests.names())
    assert whole(bucket, size) == data
    bucket.close()


def test_an_upload_of_which_nothing_is_stored_begins_anew(small: S3) -> None:
    bucket = Bucket(small)
    size = 6 * PART
    data = os.urandom(size)
    state = s3.Progress(bucket.begin(bucket._key(NAME)), floor=s3.PARTS).dump()
    writer = bucket.writer(NAME, 0, size, state)
    writer.write(data)
    assert writer.sync() == size
    assert whole(bucket, size) == data
    bucket.close()


def test_a_part_that_failed_keeps_its_number(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may still arrive."""
    size = 20 * MIB
    data = os.urandom(size)
    writer = bucket.writer(NAME, 0, size)
    writer.write(data[: 8 * MIB])
    with monkeypatch.context() as patched:

        def away(*_: object) -> Any:
            raise UnavailableError("cut")

        patched.setattr(bucket, "put_part", away)
        with pytest.raises(UnavailableError):
            writer.write(data[8 * MIB : 16 * MIB])
    stored, state = writer.sync(), writer.state
    assert [run[:2] for run in s3.Progress.load(state).runs] == [(1, 1), (3, 3)]
    again = bucket.writer(NAME, stored, size, state)
    again.write(data[stored:])
    assert again.sync() == size
    assert whole(bucket, size) == data


def test_a_transfer_is_checked(bucket: Bucket) -> None:
    requests = Requests(bucket)
    size = 12 * MIB
    writer = bucket.writer(NAME, 0, size)
    writer.write(os.urandom(9 * MIB))
    writer.sync()
    writer.write(os.urandom(3 * MIB))
    writer.sync()
    sent = [params for name, params in requests.seen if name in ("UploadPart", "PutObject")]
    assert len(sent) == 3
    for params in sent:
        # The library makes a file of what it is given, before or after this looks.
        body = params["Body"]
        digest = hashlib.sha256(body if isinstance(body, bytes) else body.getvalue()).digest()
        assert params["ChecksumSHA256"] == __import__("base64").b64encode(digest).decode()
    (done,) = [params for name, params in requests.seen if name == "CompleteMultipartUpload"]
    assert all(part["ChecksumSHA256"] for part in done["MultipartUpload"]["Parts"])


@pytest.mark.parametrize("what", ["tail", "part", "upload", "changed tail"])
def test_bytes_that_were_stored_and_are_gone_are_an_error(bucket: Bucket, config: S3, what: str) -> None:
    size = 30 * MIB
    writer = bucket.writer(NAME, 0, size)
    writer.write(os.urandom(17 * MIB))
    stored, state = writer.sync(), writer.state
    tail = next(key for key in objects(bucket, config) if ".tail-" in key)
    if what == "tail":
        bucket.client.delete_object(Bucket=config.bucket, Key=config.prefix + tail)
    elif what == "changed tail":
        bucket.client.put_object(Bucket=config.bucket, Key=config.prefix + tail, Body=os.urandom(MIB))
    elif what == "upload":
        bucket.abort(config.prefix + NAME, s3.Progress.load(state).upload)
    else:
        upload = s3.Progress.load(state).upload
        bucket.client.upload_part(
            Bucket=config.bucket, Key=config.prefix + NAME, UploadId=upload, PartNumber=2, Body=os.urandom(5 * MIB)
        )
    with pytest.raises(OSError, match=r"stored|no such thing") as caught:
        bucket.writer(NAME, stored, size, state)
    assert not isinstance(caught.value, UnavailableError)


def test_a_state_that_does_not_fit_is_an_error(bucket: Bucket) -> None:
    with pytest.raises(OSError, match="0 bytes where 5"):
        bucket.writer(NAME, 5, 10)
    for state in ("x", "[]", "[1,2,3,4,5]"):
        with pytest.raises(OSError, match="state"):
            bucket.writer(NAME, 0, 10, state)


def test_a_missing_blob(bucket: Bucket) -> None:
    with pytest.raises(FileNotFoundError):
        bucket.reader(NAME)
    with pytest.raises(ValueError, match="name"):
        bucket.reader("../x")


def test_a_range_goes_to_a_socket_and_ahead_of_it_blocks_are_fetched(bucket: Bucket) -> None:
    size = 9 * BLOCK + 17
    data = os.urandom(size)
    bucket.put(NAME, [data])
    requests = Requests(bucket)
    here, there = socket.socketpair()
    received = bytearray()

    def receive() -> None:
        while part := there.recv(MIB):
            received.extend(part)

    thread = threading.Thread(target=receive)
    thread.start()
    reader = bucket.reader(NAME)
    with here, there:
        # As an enclave pulls: frames of 128 KiB, one after the other.
        for at in range(0, size, 1 << 17):
            reader.send(here, at, min(1 << 17, size - at))
        here.shutdown(socket.SHUT_WR)
        thread.join()
    assert bytes(received) == data
    gets = [params for name, params in requests.seen if name == "GetObject"]
    assert len(gets) == 10
    with pytest.raises(OSError, match="ended while it was sent"):
        reader.send(here, size - 1, 2)


def test_blocks_are_fetched_before_they_are_asked_for(bucket: Bucket) -> None:
    bucket.put(NAME, [os.urandom(10 * BLOCK)])
    requests = Requests(bucket)
    reader = bucket.reader(NAME)
    reader.read(0, 10)
    assert requests.names().count("GetObject") == 1
    reader.read(10, 10)
    reader.read(BLOCK, 10)
    until = time.monotonic() + 10
    while requests.names().count("GetObject") < 1 + s3.AHEAD + 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert requests.names().count("GetObject") == 1 + s3.AHEAD + 1


def test_readers_at_the_same_place_share_a_fetch_and_memory_is_bounded(bucket: Bucket, config: S3) -> None:
    size = 24 * BLOCK
    data = os.urandom(size)
    bucket.put(NAME, [data])
    requests = Requests(bucket)
    threads = [threading.Thread(target=lambda: bucket.reader(NAME).read(5, 100)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert requests.names().count("GetObject") == 1
    assert bucket.reader(NAME).read(0, size) == data
    assert len(bucket._blocks._held) <= config.cache_bytes // BLOCK


def test_a_blob_that_changes_under_a_reader_is_an_error(bucket: Bucket, config: S3) -> None:
    bucket.put(NAME, [os.urandom(3 * BLOCK)])
    reader = bucket.reader(NAME)
    reader.read(0, 10)
    bucket.client.put_object(Bucket=config.bucket, Key=config.prefix + NAME, Body=os.urandom(3 * BLOCK))
    with pytest.raises(OSError, match="not the same"):
        reader.read(2 * BLOCK, 10)


def test_bundles_are_there_as_a_whole_or_not_at_all(bucket: Bucket, config: S3) -> None:
    name = bundle_name(bytes(16))

    def broken() -> Iterator[bytes]:
        yield os.urandom(9 * MIB)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        bucket.put(name, broken())
    with pytest.raises(FileNotFoundError):
        bucket.reader(name)
    assert bucket.put(name, [b"a" * (9 * MIB), b"b"]) == 9 * MIB + 1
    assert bucket.put(name, [b"newer"]) == 5
    assert bucket.reader(name).read(0, 99) == b"newer"


def test_deletion_leaves_nothing(bucket: Bucket, config: S3) -> None:
    size = 30 * MIB
    writer = bucket.writer(NAME, 0, size)
    writer.write(os.urandom(17 * MIB))
    writer.sync()
    assert objects(bucket, config)
    assert uploads(bucket, config) == 1
    bucket.delete(NAME, writer.state)
    assert objects(bucket, config) == []
    assert uploads(bucket, config) == 0
    bucket.delete(NAME, writer.state)
    bucket.put(NAME, [b"x"])
    bucket.put(NAME + "b", [b"another"])
    bucket.delete(NAME)
    assert objects(bucket, config) == [NAME + "b"]


def test_multiparts_that_nobody_writes_are_aborted(bucket: Bucket, config: S3) -> None:
    lost = bucket.writer(NAME, 0, 30 * MIB)
    lost.write(os.urandom(9 * MIB))
    growing = bucket.writer(upload_name(1), 0, 30 * MIB)
    growing.write(os.urandom(9 * MIB))
    growing.sync(whole=False)
    states = {upload_name(1): growing.state}
    (begun,) = {
        found["Initiated"] for found in bucket.client.list_multipart_uploads(Bucket=config.bucket).get("Uploads", [])
    }
    at_ms = int(begun.timestamp() * 1000)
    assert bucket.sweep(at_ms, states.get) == 0
    assert bucket.sweep(at_ms + 1, states.get) == 1
    assert uploads(bucket, config) == 1
    growing.write(os.urandom(21 * MIB))
    assert growing.sync() == 30 * MIB


@pytest.mark.parametrize("prefix", ["blobs/", ""])
def test_multiparts_of_others_are_left_alone(config: S3, prefix: str) -> None:
    bucket = Bucket(replace(config, prefix=prefix))
    names = ["upload-backup.tar", "backup", "upload-"] if prefix else ["upload-2a", "x"]
    for name in names:
        bucket.client.create_multipart_upload(Bucket=config.bucket, Key=prefix + name)
    asked: list[str] = []
    assert bucket.sweep(1 << 50, lambda name: asked.append(name)) == 0
    assert asked == []
    assert uploads(bucket, config) == len(names)
    bucket.close()


def test_objects_are_sealed_under_a_kms_key(url: str) -> None:
    sealed = Bucket(replace(support.bucket(url), kms_key="arn:aws:kms:us-east-1:111122223333:key/k"))
    sealed.put(NAME, [os.urandom(9 * MIB)])
    sealed.put(upload_name(1), [b"small"])
    for name in (NAME, upload_name(1)):
        found = sealed.client.head_object(Bucket=sealed._config.bucket, Key=f"blobs/{name}")
        assert (found["ServerSideEncryption"], found["SSEKMSKeyId"][-6:]) == ("aws:kms", ":key/k"[-6:])
    sealed.close()


def failing(bucket: Bucket, operation: str, times: int, status: int = 503) -> list[int]:
    """The next requests of one operation are answered with an error, as by a store under load."""
    from botocore.awsrequest import AWSResponse
    from botocore.compat import HTTPHeaders

    left = [times, 0]

    class Raw:
        def stream(self, *_: object, **__: object) -> Iterator[bytes]:
            yield b"<Error><Code>SlowDown</Code><Message>x</Message></Error>"

    def answer(request: Any, **_: object) -> Any:
        left[1] += 1
        if left[0] <= 0:
            return None
        left[0] -= 1
        return AWSResponse(request.url, status, HTTPHeaders(), Raw())

    bucket.client.meta.events.register(f"before-send.s3.{operation}", answer)
    return left


def test_a_store_under_load_is_asked_again(bucket: Bucket) -> None:
    tried = failing(bucket, "UploadPart", 2)
    data = os.urandom(9 * MIB)
    writer = bucket.writer(NAME, 0, len(data))
    writer.write(data)
    assert writer.sync() == len(data)
    assert tried[1] == 2 + 2
    assert whole(bucket, len(data)) == data


def test_a_store_that_stays_away_is_unavailable_and_loses_nothing(bucket: Bucket) -> None:
    data = os.urandom(20 * MIB)
    writer = bucket.writer(NAME, 0, len(data))
    writer.write(data[: 9 * MIB])
    stored, state = writer.sync(), writer.state
    tried = failing(bucket, "UploadPart", 99)
    with pytest.raises(UnavailableError) as caught:
        writer.write(data[9 * MIB :])
    assert caught.value.retry_after_ms == s3.RETRY_MS
    assert tried[1] == s3.ATTEMPTS
    tried[0] = 0
    again = bucket.writer(NAME, stored, len(data), state)
    again.write(data[stored:])
    assert again.sync() == len(data)
    assert whole(bucket, len(data)) == data


def test_a_reader_of_a_store_that_is_away(bucket: Bucket) -> None:
    bucket.put(NAME, [os.urandom(3 * BLOCK)])
    reader = bucket.reader(NAME)
    tried = failing(bucket, "GetObject", 99, 500)
    with pytest.raises(UnavailableError):
        reader.read(0, 10)
    tried[0] = 0
    assert len(reader.read(0, 10)) == 10


def test_no_server_is_unavailable(config: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        gone = Bucket(replace(config, endpoint_url=f"http://127.0.0.1:{held.getsockname()[1]}"))
        with pytest.raises(UnavailableError):
            gone.reader(NAME)
        gone.close()


def test_a_missing_object_is_no_fault_of_the_store() -> None:
    assert issubclass(MissingError, FileNotFoundError)
