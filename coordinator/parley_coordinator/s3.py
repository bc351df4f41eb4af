"""Blobs in S3, or in what speaks like it: the one module that does.

A blob that grows is a multipart upload whose parts carry their SHA-256, so that nothing is acknowledged that arrived
otherwise. What is less than a part can be is kept as an object of its own, its tail, until more comes. An upload that was
interrupted so often that its part numbers would run out is completed as it is, and goes on as another one whose first parts
are copies of it, made within S3. Blobs are read in blocks, a few ahead of whoever reads on, through one bounded cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

from parley_coordinator import log, telemetry
from parley_coordinator.blobs import BlobReader, BlobWriter, check_name, is_name
from parley_coordinator.config import S3
from parley_protocol.errors import UnavailableError

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

LEAST_PART: Final = 5 << 20
"""S3's: every part but the last has at least so many bytes."""
PARTS: Final = 10_000
"""S3's: part numbers of one upload."""
AIM_PARTS: Final = 8_000
"""Parts of the largest blobs; the other numbers are for interruptions."""
COPIED: Final = 512 << 20
"""What one part copies of an upload that goes on as another one: a request which S3 answers well within READ_S, and so much
that one interruption in hundreds needs copies. Those of the largest blobs have COPIED_PARTS parts each, so that they are few."""
COPIED_PARTS: Final = 8
MOST_PART: Final = 5 << 30
"""S3's: bytes of a part."""
GAP: Final = 32
"""Part numbers that a writer may use beyond those that the store of state knows of; whoever comes after it leaves them out, for it
may still be sending. A stream has fewer parts of LEAST_PART between two looks at what is stored, 2 * SYNC_BYTES each."""
BLOCK: Final = 2 << 20
"""What is read at a time: a window of a table has several frames of 128 KiB beside each other."""
AHEAD: Final = 3
"""Blocks that are fetched before they are asked for, where a reader goes on."""
FETCHES: Final = 16
"""Blocks that are fetched at a time."""
ATTEMPTS: Final = 5
"""How often one request is made; the pauses between grow, with jitter."""
CONNECT_S: Final = 5
READ_S: Final = 60
CONNECTIONS: Final = 96
RETRY_MS: Final = 5000
_MISSING: Final = ("404", "NoSuchKey", "NoSuchUpload", "NotFound")


class MissingError(FileNotFoundError):
    """No such object or multipart upload."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a blob is: its multipart upload, its parts as runs of numbers (first, last, bytes), the bytes of its tail and
    their SHA-256, and the first part number that no writer has used or may use."""

    upload: str = ""
    runs: tuple[tuple[int, int, int], ...] = ()
    tail: int = 0
    digest: str = ""
    floor: int = 1

    @property
    def parts_bytes(self) -> int:
        """Bytes in parts."""
        return sum(run[2] for run in self.runs)

    def dump(self) -> str:
        """As text."""
        return json.dumps([self.upload, self.runs, self.tail, self.digest, self.floor], separators=(",", ":"))

    @classmethod
    def load(cls, text: str) -> Progress:
        """From text; OSError where it is none."""
        if not text:
            return cls()
        try:
            upload, runs, tail, digest, floor = json.loads(text)
            if isinstance(floor, bool):
                # Kept without a floor, and whether its writer had ended.
                floor = (runs[-1][1] if runs else 0) + 1 + GAP
            return cls(
                str(upload), tuple((int(a), int(b), int(c)) for a, b, c in runs), int(tail), str(digest), int(floor)
            )
        except (ValueError, TypeError) as error:
            raise OSError("the state of the blob is none of S3") from error


class Bucket:
    """Blobs as objects of one bucket, below one prefix."""

    def __init__(self, config: S3) -> None:
        self._config = config
        self.client = client(config)
        self._fetching = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self._blocks = _Blocks(self._fetching, max(2 * (AHEAD + 1), config.cache_bytes // BLOCK))

    def reserve(self, state: str) -> str:
        progress = Progress.load(state)
        # A writer that finds no multipart upload begins one of its own.
        return (replace(progress, floor=progress.floor + GAP) if progress.upload else progress).dump()

    def writer(self, name: str, stored: int, size: int = 0, state: str = "") -> BlobWriter:
        key = self._key(name)
        progress = Progress.load(state)
        if progress.parts_bytes + progress.tail != stored:
            raise OSError(f"{name} has {progress.parts_bytes + progress.tail} bytes where {stored} were stored")
        with _away(f"read {name}"):
            return _Writer(self, key, size, progress)

    def reader(self, name: str) -> BlobReader:
        key = self._key(name)
        with _away(f"find {name}"):
            found = self.client.head_object(Bucket=self._config.bucket, Key=key)
        return _Reader(self, key, found["ETag"], found["ContentLength"])

    def put(self, name: str, pieces: Iterable[bytes]) -> int:
        whole = list(pieces)
        size = sum(map(len, whole))
        writer = self.writer(name, 0, size)
        try:
            for piece in whole:
                writer.write(piece)
            return writer.sync()
        finally:
            writer.close()

    def delete(self, name: str, state: str = "") -> None:
        key = self._key(name)
        with _away(f"delete {name}"):
            if upload := Progress.load(state).upload:
                self.abort(key, upload)
            self.client.delete_object(Bucket=self._config.bucket, Key=key)
            self.drop_tails(key)

    def sweep(self, before_ms: int, growing: Callable[[str], str | None]) -> int:
        swept = 0
        if not self._config.prefix:
            # What else is in the bucket may be others', whatever it is called.
            return swept
        with _away("list uploads"):
            for page in self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._config.bucket, Prefix=self._config.prefix
            ):
                for found in page.get("Uploads", ()):
                    if found["Initiated"].timestamp() * 1000 >= before_ms:
                        continue
                    name = found["Key"].removeprefix(self._config.prefix)
                    if not is_name(name):
                        continue
                    state = growing(name)
                    if state is None or Progress.load(state).upload != found["UploadId"]:
                        self.abort(found["Key"], found["UploadId"])
                        swept += 1
        return swept

    def close(self) -> None:
        self._fetching.shutdown(cancel_futures=True)
        self.client.close()

    # For writers and readers

    def begin(self, key: str) -> str:
        """A new multipart upload."""
        made = self.client.create_multipart_upload(
            Bucket=self._config.bucket, Key=key, ChecksumAlgorithm="SHA256", **self._sealed()
        )
        return made["UploadId"]

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> dict[str, Any]:
        """Sends one part; what is needed to name it in the end."""
        digest = _digest(data)
        sent = self.client.upload_part(
            Bucket=self._config.bucket, Key=key, UploadId=upload, PartNumber=number, Body=data, ChecksumSHA256=digest
        )
        return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": digest}

    def parts(self, key: str, upload: str) -> dict[int, tuple[int, dict[str, Any]]]:
        """The parts that are there: by number (size, what names it)."""
        found = {}
        for page in self.client.get_paginator("list_parts").paginate(
            Bucket=self._config.bucket, Key=key, UploadId=upload
        ):
            for part in page.get("Parts", ()):
                named = {"PartNumber": part["PartNumber"], "ETag": part["ETag"]}
                if "ChecksumSHA256" in part:
                    named["ChecksumSHA256"] = part["ChecksumSHA256"]
                found[part["PartNumber"]] = (part["Size"], named)
        return found

    def copy_part(self, key: str, upload: str, number: int, first: int, last: int) -> dict[str, Any]:
        """Makes a part of a range of the object that is there; what is needed to name it in the end."""
        copied = self.client.upload_part_copy(
            Bucket=self._config.bucket,
            Key=key,
            UploadId=upload,
            PartNumber=number,
            CopySource={"Bucket": self._config.bucket, "Key": key},
            CopySourceRange=f"bytes={first}-{last}",
        )["CopyPartResult"]
        named = {"PartNumber": number, "ETag": copied["ETag"]}
        if "ChecksumSHA256" in copied:
            named["ChecksumSHA256"] = copied["ChecksumSHA256"]
        return named

    def finish(self, key: str, upload: str, parts: list[dict[str, Any]]) -> None:
        """Makes an object of all parts."""
        listed: Any = {"Parts": parts}
        self.client.complete_multipart_upload(
            Bucket=self._config.bucket, Key=key, UploadId=upload, MultipartUpload=listed
        )

    def abort(self, key: str, upload: str) -> None:
        """Forgets an upload and its parts."""
        try:
            self.client.abort_multipart_upload(Bucket=self._config.bucket, Key=key, UploadId=upload)
        except ClientError as error:
            if _code(error) not in _MISSING:
                raise

    def put_object(self, key: str, data: bytes) -> None:
        """Writes a small object."""
        self.client.put_object(
            Bucket=self._config.bucket, Key=key, Body=data, ChecksumSHA256=_digest(data), **self._sealed()
        )

    def get_object(self, key: str) -> bytes:
        """Reads a small object."""
        return self.client.get_object(Bucket=self._config.bucket, Key=key)["Body"].read()

    def size_of(self, key: str) -> int:
        """The size of an object."""
        return self.client.head_object(Bucket=self._config.bucket, Key=key)["ContentLength"]

    def drop_tails(self, key: str) -> None:
        """Removes all tails of a blob."""
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self._config.bucket, Prefix=f"{key}."):
            for found in page.get("Contents", ()):
                self.client.delete_object(Bucket=self._config.bucket, Key=found["Key"])

    def block(self, key: str, etag: str, size: int, index: int, *, ahead: int) -> bytes:
        """One block of an object, and the next ones on their way; UnavailableError where the store does not answer, OSError
        where the object is not the same any more."""

        def fetch(number: int) -> Callable[[], bytes]:
            first, last = number * BLOCK, min((number + 1) * BLOCK, size) - 1
            return lambda: self._range(key, etag, first, last)

        future = self._blocks.get((key, etag, index), fetch(index))
        for number in range(index + 1, min(index + 1 + ahead, -(-size // BLOCK))):
            self._blocks.get((key, etag, number), fetch(number))
        return future.result()

    def _range(self, key: str, etag: str, first: int, last: int) -> bytes:
        with _away("read a range"):
            found = self.client.get_object(
                Bucket=self._config.bucket, Key=key, IfMatch=etag, Range=f"bytes={first}-{last}"
            )
            data = found["Body"].read()
        if len(data) != last - first + 1:
            raise OSError("the blob ended while it was read")
        return data

    def part_bytes(self, size: int) -> int:
        """How large the parts of a blob are."""
        return max(self._config.part_bytes, -(-size // AIM_PARTS))

    def _key(self, name: str) -> str:
        check_name(name)
        return self._config.prefix + name

    def _sealed(self) -> dict[str, Any]:
        if not self._config.kms_key:
            return {}
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self._config.kms_key}


def client(config: S3) -> S3Client:
    """A client for a bucket. Credentials come from the profile, or from where boto3 finds them."""
    style: Any = {"addressing_style": config.addressing}
    session = boto3.session.Session(profile_name=config.profile or None, region_name=config.region or None)
    return session.client(
        "s3",
        endpoint_url=config.endpoint_url or None,
        config=BotoConfig(
            # Exponential pauses with jitter, for throttling, broken connections and errors of the server.
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=CONNECT_S,
            read_timeout=READ_S,
            max_pool_connections=CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3=style,
        ),
    )


class _Writer:
    def __init__(self, bucket: Bucket, key: str, size: int, progress: Progress) -> None:
        self._bucket = bucket
        self._key = key
        self._size = size
        self._part_bytes = bucket.part_bytes(size)
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._upload = progress.upload
        self._runs = [list(run) for run in progress.runs]
        self._named: list[dict[str, Any]] = []
        self._next = progress.floor
        # Numbers from here on are not this writer's, as far as the store of state is known to know, and as of the last sync. What
        # nobody else knows of is its own altogether.
        self._limit = self._told = progress.floor + GAP if progress.upload else PARTS + 1
        self._noted = bool(progress.upload)
        self._finished = False
        self._progress = replace(progress, floor=self._limit) if progress.upload else progress
        if self._upload:
            self._find_parts(progress)
        elif progress.runs:
            # It was whole without a multipart upload, and nothing here could put it there again.
            if bucket.size_of(key) != size:
                raise OSError(f"{key}: what was stored of it is gone")
            self._finished = True
        if progress.tail and not self._finished:
            self._find_tail(progress)
        if self._upload and not self._finished and self._runs_out:
            if self._named:
                self._bucket.finish(self._key, self._upload, self._named)
            self._go_on_after(self._in_parts)
        self._position = progress.parts_bytes + len(self._buffer) if not self._finished else size

    def _find_parts(self, progress: Progress) -> None:
        try:
            there = self._bucket.parts(self._key, self._upload)
        except ClientError as error:
            self._find_whole(error, progress.parts_bytes)
            return
        for first, last, expected in progress.runs:
            parts = [there.get(number, (0, {})) for number in range(first, last + 1)]
            if sum(size for size, _ in parts) != expected:
                raise OSError(f"{self._key}: parts {first} to {last} have not the {expected} bytes that were stored")
            self._named += [named for _, named in parts]

    def _find_whole(self, error: ClientError, parts: int = -1) -> None:
        # It was put together, whole or because its numbers ran out, and the coordinator killed before that was noted.
        if _code(error) not in _MISSING:
            raise error
        size = self._bucket.size_of(self._key)
        if size == self._size:
            self._finished = True
        elif size == parts:
            self._go_on_after(size)
        else:
            raise OSError(f"{self._key}: what was stored of it is gone") from error

    @property
    def _runs_out(self) -> bool:
        """Whether there are too few numbers for what is missing, and for whoever comes after this writer."""
        missing = -(-(self._size - self._in_parts) // self._part_bytes)
        return self._next + missing + 2 * GAP > PARTS

    def _go_on_after(self, size: int) -> None:
        """Begins another upload with copies of the object that the one before has become. Whoever still writes to that one, or
        does the same at the same time, has no part in this; what is not gone on with is swept."""
        self._upload = self._bucket.begin(self._key)
        step = min(MOST_PART, max(COPIED, COPIED_PARTS * self._part_bytes))
        # No copy is smaller than a part may be: the last one takes what is left.
        starts = range(0, max(1, size - LEAST_PART + 1), step) if size else range(0)
        ends = [*starts[1:], size][: len(starts)]
        self._named = [
            self._bucket.copy_part(self._key, self._upload, number, start, end - 1)
            for number, (start, end) in enumerate(zip(starts, ends, strict=True), 1)
        ]
        self._runs = [[1, len(self._named), size]] if size else []
        self._next = len(self._named) + 1
        self._limit = self._told = self._next + GAP
        runs = ((1, len(self._named), size),) if size else ()
        self._progress = replace(self._progress, upload=self._upload, runs=runs, floor=self._told)

    def _find_tail(self, progress: Progress) -> None:
        try:
            tail = self._bucket.get_object(_tail(self._key, progress.parts_bytes, progress.tail))
        except ClientError as error:
            self._find_whole(error)
            return
        if len(tail) != progress.tail or _digest(tail) != progress.digest:
            raise OSError(f"{self._key}: its tail is not what was stored")
        self._buffer += tail

    @property
    def position(self) -> int:
        return self._position

    @property
    def state(self) -> str:
        return self._progress.dump()

    def write(self, data: bytes) -> None:
        with self._lock, _away("write"):
            self._buffer += data
            while len(self._buffer) >= self._part_bytes and self._size > self._part_bytes:
                self._put_part(bytes(self._buffer[: self._part_bytes]))
                del self._buffer[: self._part_bytes]
            # Told at the end alone: what broke in between is sent again.
            self._position += len(data)

    def _put_part(self, data: bytes) -> None:
        number = self._next
        if number > PARTS:
            # Whoever opens the blob next goes on with fresh ones.
            raise UnavailableError("the part numbers of this blob have run out", retry_after_ms=RETRY_MS)
        if number >= self._limit:
            raise UnavailableError("too much was written that is not known to be stored", retry_after_ms=RETRY_MS)
        if not self._upload:
            self._upload = self._bucket.begin(self._key)
        # Also one that failed is used: it may still be on its way.
        self._next += 1
        self._named.append(self._bucket.put_part(self._key, self._upload, number, data))
        if self._runs and self._runs[-1][1] == number - 1:
            self._runs[-1][1] = number
            self._runs[-1][2] += len(data)
        else:
            self._runs.append([number, number, len(data)])

    def sync(self, *, whole: bool = True) -> int:
        with self._lock, _away("write"):
            if self._position == self._size:
                self._finish()
                return self._size
            if whole and len(self._buffer) >= LEAST_PART:
                self._put_part(bytes(self._buffer))
                self._buffer.clear()
            tail, digest = 0, ""
            if whole and self._buffer:
                data = bytes(self._buffer)
                tail, digest = len(data), _digest(data)
                self._bucket.put_object(_tail(self._key, self._in_parts, tail), data)
            runs = tuple((first, last, size) for first, last, size in self._runs)
            told = self._next + GAP
            if self._upload:
                # Of the last sync it is known that it was stored: whose was not writes no more.
                self._limit = self._told if self._noted else told
                self._told, self._noted = told, True
            self._progress = Progress(self._upload, runs, tail, digest, self._next if whole else told)
            return self._in_parts + tail

    @property
    def _in_parts(self) -> int:
        return sum(run[2] for run in self._runs)

    def _finish(self) -> None:
        if self._finished:
            return
        if self._upload:
            if self._buffer:
                self._put_part(bytes(self._buffer))
                self._buffer.clear()
            self._bucket.finish(self._key, self._upload, self._named)
        else:
            self._bucket.put_object(self._key, bytes(self._buffer))
            self._buffer.clear()
        self._finished = True
        try:
            self._bucket.drop_tails(self._key)
        except (ClientError, BotoCoreError) as error:
            # They go with the blob.
            log.warning("blob-tails-left", error=type(error).__name__)
        runs = tuple((first, last, size) for first, last, size in self._runs)
        self._progress = Progress(self._upload, runs or ((0, 0, self._size),), 0, "", self._next)

    def close(self) -> None:
        self._buffer.clear()


class _Reader:
    """For one thread, as all readers; it fetches ahead once it was read on."""

    def __init__(self, bucket: Bucket, key: str, etag: str, size: int) -> None:
        self._bucket = bucket
        self._key = key
        self._etag = etag
        self._size = size
        self._last = -2

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(self._pieces(offset, min(length, max(0, self._size - offset))))

    def send(self, to: socket.socket, offset: int, length: int) -> None:
        if offset + length > self._size:
            raise OSError("the blob ended while it was sent")
        for piece in self._pieces(offset, length):
            to.sendall(piece)

    def _pieces(self, offset: int, length: int) -> Iterator[memoryview]:
        end = offset + length
        while offset < end:
            index, start = divmod(offset, BLOCK)
            onward = index in (self._last, self._last + 1)
            self._last = index
            block = self._bucket.block(self._key, self._etag, self._size, index, ahead=AHEAD if onward else 0)
            piece = memoryview(block)[start : start + end - offset]
            yield piece
            offset += len(piece)

    def close(self) -> None:
        """Nothing to free: blocks are the cache's."""


class _Blocks:
    """The blocks that were fetched or are on their way; the oldest go first."""

    def __init__(self, pool: ThreadPoolExecutor, most: int) -> None:
        self._pool = pool
        self._most = most
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, str, int], Future[bytes]] = OrderedDict()

    def get(self, name: tuple[str, str, int], fetch: Callable[[], bytes]) -> Future[bytes]:
        """The block of a name; `fetch` gets it where it is not there."""
        with self._lock:
            future = self._held.get(name)
            if future is not None and not (future.done() and (future.cancelled() or future.exception())):
                self._held.move_to_end(name)
                return future
            future = self._held[name] = self._pool.submit(fetch)
            self._held.move_to_end(name)
            while len(self._held) > self._most:
                self._held.popitem(last=False)
            return future


def _tail(key: str, start: int, length: int) -> str:
    # One name for each: what the store of state names is never written over.
    return f"{key}.tail-{start:x}-{length:x}"


def _digest(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _away(doing: str) -> Iterator[None]:
    """Errors of S3 as those that blobs have."""
    try:
        yield
    except ClientError as error:
        code = _code(error)
        if code in _MISSING:
            raise MissingError(f"S3 has no such thing: {code}") from error
        if code in ("PreconditionFailed", "412"):
            raise OSError("the blob is not the same any more") from error
        telemetry.count("parley_blob_failures_total")
        log.warning("blobs-away", doing=doing.partition(" ")[0], code=code)
        raise UnavailableError(f"the blob store of the coordinator refused: {code}", retry_after_ms=RETRY_MS) from error
    except BotoCoreError as error:
        telemetry.count("parley_blob_failures_total")
        log.warning("blobs-away", doing=doing.partition(" ")[0], error=type(error).__name__)
        raise UnavailableError("the blob store of the coordinator does not answer", retry_after_ms=RETRY_MS) from error
