"""One member in a process of its own, on a wire that tells each step: `python -m support.member TASK`.

It kills itself at the step that the task names. Imports are few: it is started often.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from parley.connection import Connection
from parley.member import Member
from parley.release import Release
from parley.session import Session
from parley.transport import Progress, Transport
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.model import Agreement
from parley_protocol.bundle import Bundle
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import RefusedError
from parley_protocol.transcript import RecordBody, Upload
from parley_protocol.v1 import coordinator_pb2 as pb

LIMIT_S: Final = 120.0
"""Nothing in a trial takes longer, on a machine that is busy."""
PATIENCE_S: Final = 30.0

Told = Callable[[str], None]


# What was sent


class Ledger:
    """The bytes of uploads that clients sent and that the coordinator acknowledged. None may be sent after that (§8)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._acknowledged: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.twice: list[str] = []

    def acknowledge(self, upload: str, stored: int) -> None:
        """The coordinator told that it has the first bytes."""
        with self._lock:
            self._acknowledged[upload] = max(self._acknowledged[upload], stored)

    def send(self, upload: str, offset: int, length: int) -> None:
        """A client sends a chunk."""
        with self._lock:
            self.sent[upload] += length
            if offset < self._acknowledged[upload]:
                self.twice.append(
                    f"{upload[:8]}: bytes from {offset}, of which {self._acknowledged[upload]} were stored"
                )


class Wire(Transport):
    """A client's wire that tells each step, and enters what it sends in a ledger."""

    def __init__(
        self,
        address: str,
        member: Member,
        certificate: str,
        told: Told,
        ledger: Ledger,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._told = told
        self._ledger = ledger
        self.chunks = 0
        """Where not 0: the next upload stream ends after so many chunks, as when a connection breaks."""
        super().__init__(address, member.identity, certificate, patience_s=patience_s)

    def open_session(self, request: bytes, agreement: bytes) -> pb.SessionState:
        state = super().open_session(request, agreement)
        self._told("opened")
        return state

    def upload(self, digest: bytes, cose: bytes, blob: Path, progress: Progress | None = None) -> None:
        self._told("uploading")
        super().upload(digest, cose, blob, progress)
        self._ledger.acknowledge(digest.hex(), blob.stat().st_size)
        self._told("uploaded")

    def _uploaded(self, digest: bytes) -> pb.UploadState | None:
        state = super()._uploaded(digest)
        if state is not None:
            self._ledger.acknowledge(digest.hex(), state.stored)
        return state

    def _chunks(  # type: ignore[override]  # static there
        self, cose: bytes, blob: Path, stored: int, progress: Progress | None
    ) -> Iterator[pb.UploadRequest]:
        upload = Upload.from_bytes(payload_unverified(cose)).digest.hex()
        left, self.chunks = self.chunks, 0
        if stored:
            self._told("resuming")
        for request in Transport._chunks(cose, blob, stored, progress):
            if request.WhichOneof("part") == "chunk":
                self._ledger.send(upload, request.chunk.offset, len(request.chunk.data))
            yield request
            if request.WhichOneof("part") == "chunk":
                self._told("chunk")
                left -= 1
                if left == 0:
                    return

    def put_join(self, session: bytes, cose: bytes) -> pb.JoinReply:
        self._told("joining")
        reply = super().put_join(session, cose)
        self._told("joined")
        return reply

    def start(self, session: bytes, cose: bytes) -> pb.RosterReply:
        self._told("starting")
        return super().start(session, cose)

    def put_countersignature(
        self, session: bytes, cose: bytes, former: list[tuple[bytes, bytes, bytes]]
    ) -> pb.SessionState:
        self._told("signing")
        state = super().put_countersignature(session, cose, former)
        self._told("signed")
        return state

    def bundle(self, session: bytes, progress: Progress | None = None) -> bytes:
        def fetching(step: str, done: int, total: int) -> None:
            self._told("fetching")
            if progress is not None:
                progress(step, done, total)

        data = super().bundle(session, fetching)
        self._told("fetched")
        return data


@dataclass(frozen=True)
class Outcome:
    """What a release says: its record's body, and per output the plaintext. Equal for equal runs, byte for byte."""

    body: bytes
    plaintexts: tuple[tuple[str, bytes, bytes], ...]

    @classmethod
    def of(cls, release: Release) -> Outcome:
        """The outcome of a verified release that this member opened."""
        opened = Bundle.from_bytes(release.opened_bundle()).opened
        assert opened
        body = release.verified.record.record.body.to_bytes()
        return cls(body, tuple((item.output, item.salt, item.plaintext) for item in opened))

    @property
    def record(self) -> RecordBody:
        """The record's body."""
        return RecordBody.from_bytes(self.body)


class _Spoken(Ledger):
    def acknowledge(self, upload: str, stored: int) -> None:
        _say("stored", upload, stored)

    def send(self, upload: str, offset: int, length: int) -> None:
        _say("sent", upload, offset, length)


def _say(*parts: object) -> None:
    print(*parts, flush=True)


def main(arguments: Sequence[str]) -> int:
    """One member: joins the live session of the agreement, signs, waits, fetches. Exit code 1 after an error that it tells."""
    task = json.loads(arguments[0])
    if task["ahead_s"]:
        real, ahead = time.time_ns, int(task["ahead_s"] * 1e9)
        time.time_ns = lambda: real() + ahead
    if task["file_bytes"]:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_bytes"], task["file_bytes"]))

    def reached(step: str) -> None:
        _say("reached", step)
        if step == task["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    member = Member.load(task["key"], reached=reached)
    agreement = parse(bytes.fromhex(task["agreement"]))
    certificate = Path(task["certificate"]).read_text()
    try:
        wire = Wire(task["address"], member, certificate, reached, _Spoken(), patience_s=task["patience_s"])
        with Connection(member, wire) as connection:
            session = _session(connection, agreement)
            if session.status().phase != "released":
                session.submit({"visits": task["csv"]}, lambda step, _done, _total: reached(f"progress-{step}"))
            if task["until_step"] == "release":
                session.wait(timeout_s=LIMIT_S / 2)
                release = session.release()
                _say("released", release.sequence, Outcome.of(release).body.hex())
    except Exception as error:
        _say("error", type(error).__name__, getattr(error, "code", "-"), str(error).replace("\n", " "))
        return 1
    return 0


def _session(connection: Connection, agreement: Agreement) -> Session:
    """The live session, or the one that this member joined last: it may have been released meanwhile."""
    try:
        return connection.session(agreement)
    except RefusedError as error:
        joined = connection.member.state.sessions()
        if error.code != "unknown-session" or not joined:
            raise
        (last,) = joined
        return connection.session(last.session)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
