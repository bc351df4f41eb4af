"""Load on a coordinator process: members in a few processes, each with its own key and connection; watchers; uploads of any
size; and callers who are slow on purpose.

Members speak through the client library's transport, and every statement is a real one. What the many watchers hold are
plain streams, since a client of the library has one. Nothing leaves this machine.
"""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import os
import resource
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self, cast

import grpc
from sqlalchemy import func, select

from parley.transport import Transport
from parley_coordinator import store as db
from parley_coordinator import tls
from parley_coordinator.agreements import Agreements
from parley_coordinator.callers import METADATA_KEY
from parley_coordinator.config import Quotas
from parley_coordinator.models import BundleRow, EventRow, JoinRow, Operator, SessionRow
from parley_coordinator.server import SERVICE
from parley_coordinator.store import Store
from parley_deploy.nsm import LocalRoot, image_measurements
from parley_deploy.pki import system_now_ms
from parley_protocol import limits
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.model import Agreement, Measurement
from parley_protocol.agreement.signed import sign
from parley_protocol.bundle import verify_bundle
from parley_protocol.claims import verify_offer, verify_roster
from parley_protocol.identity import PrivateIdentity, dump_private, load_private
from parley_protocol.table import Layout, bucket
from parley_protocol.transcript import GENESIS, Caller, Start, Upload, UploadHeader
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1.coordinator_pb2_grpc import CoordinatorStub
from support.coordinator import Client, Coordinator, now_ms
from support.enclave import Party, Simulation, agreement_of, identities, rows_of, until

PROCESSES = 4
"""Processes that the members share."""
PATIENCE_S = 300.0
TABLE_ROWS = 1000
NOISE_BYTES = 16 << 20
MARKS = 16
"""Parts of an upload whose times are noted."""


# What is measured


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of all lies."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def resident(pid: int, field_name: str = "VmRSS") -> int:
    """Bytes that a process has in memory, or had at most (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field_name} of {pid}")


@dataclass
class Peak:
    """The greatest memory of a process while a block runs, and that at its beginning."""

    before: int
    most: int = 0


@contextmanager
def memory(pid: int, of: Callable[[int], int] = resident) -> Iterator[Peak]:
    """Looks at a process's memory 20 times a second."""
    found = Peak(of(pid))
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            found.most = max(found.most, of(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


@contextmanager
def asking(transport: Transport, session: bytes = b"", pause_s: float = 0.05) -> Iterator[list[float]]:
    """Seconds that a member's inbox, and the status of a session, take while a block runs. An error ends the block's test."""
    took: list[float] = []
    failed: list[BaseException] = []
    ended = threading.Event()

    def ask() -> None:
        try:
            while not ended.wait(pause_s):
                begun = time.perf_counter()
                transport.inbox()
                took.append(time.perf_counter() - begun)
                if session:
                    begun = time.perf_counter()
                    transport.get_session(session)
                    took.append(time.perf_counter() - begun)
        except BaseException as error:  # told to the thread that asked for it
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield took
    finally:
        ended.set()
        thread.join()
    if failed:
        raise failed[0]
    assert took


# The stage


class Stage:
    """A coordinator with an agreement of many parties. The first member is the operator's, opens and starts."""

    def __init__(
        self,
        folder: Path,
        parties: int,
        *,
        toml: str = "",
        deadline: str = "",
        database: str | None = None,
        blobs: str = "blobs",
    ) -> None:
        root = folder / "root"
        root.mkdir(parents=True)
        LocalRoot.create(system_now_ms()).save(root)
        command = [sys.executable, "-m", "parley_deploy.enclave", "--root", str(root), "--workers", "1"]
        self.coordinator = Coordinator(folder, command, toml, database=database, blobs=blobs)
        path = folder / "coordinator.toml"
        path.write_text(path.read_text().replace("[deadline]\n", f"[deadline]\n{deadline}"))
        measured = image_measurements(None)
        self.simulation = cast(
            "Simulation",
            SimpleNamespace(root=LocalRoot.load(root), measurement=Measurement(measured[0], measured[1], measured[2])),
        )
        self.members = identities([f"p{number:04}" for number in range(parties)])
        self.agreement = agreement_of(self.simulation, self.members)
        self.first = self.agreement.session.start[0]
        self.coordinator.operators(self.members[self.first])

    def __enter__(self) -> Self:
        self.coordinator.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.coordinator.__exit__(kind, error, trace)

    @property
    def pid(self) -> int:
        """The coordinator's process."""
        assert self.coordinator.process is not None
        return self.coordinator.process.pid

    def transport(self, name: str | None = None) -> Transport:
        """A member's connection."""
        return Transport(
            self.coordinator.address,
            self.members[name or self.first],
            self.coordinator.certificate.decode(),
            patience_s=PATIENCE_S,
        )

    def start(self) -> None:
        """Starts the coordinator and puts the agreement."""
        self.coordinator.start()
        transport = self.transport()
        transport.put_agreement(self.agreement.canonical)
        transport.close()

    def crowd(self, names: Sequence[str] | None = None, processes: int = PROCESSES) -> Crowd:
        """Processes with these members, all when none is named."""
        return Crowd(self, list(self.members) if names is None else names, processes)


def noise(path: Path, size: int) -> None:
    """A file of random bytes, as sealed frames are; large ones repeat the first 16 MiB."""
    block = os.urandom(min(NOISE_BYTES, size))
    with path.open("wb") as file:
        for at in range(0, size, len(block)):
            file.write(block[: size - at])


def rows_for(agreement: Agreement, size: int) -> tuple[int, int]:
    """The least number of whole groups whose sealed table has `size` bytes, as rows; and the bytes that it has."""
    rows = 1 << 14
    while (found := table_bytes(agreement, rows)) < size:
        rows += max(1 << 14, (size - found) // (found // rows + 1))
    return rows, found


def table_bytes(agreement: Agreement, rows: int) -> int:
    """The bytes of a sealed table of so many rows."""
    return Layout.of(header_of(agreement, "x", rows), agreement.tables["visits"].widths).size


def header_of(agreement: Agreement, party: str, rows: int) -> UploadHeader:
    """The header of a fresh upload of a party."""
    groups, group_rows = bucket(rows)
    digest = agreement.tables["visits"].schema_digest
    return UploadHeader(agreement.digest, party, "visits", digest, groups, group_rows, os.urandom(16), bytes(48))


# Members


@dataclass
class Told:
    """What one member did: seconds on the machine's monotonic clock, which all processes share, and what went wrong."""

    name: str
    begun: float
    ended: float = 0.0
    error: str = ""
    marks: list[float] = field(default_factory=list)
    """When each part of an upload had left."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.begun


class Crowd:
    """Members in processes of their own; `all` lets each of them do one thing, all at once."""

    def __init__(self, stage: Stage, names: Sequence[str], processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        pin = stage.coordinator.certificate.decode()
        for number in range(min(processes, len(names))):
            keys = {
                name: dump_private(stage.members[name], random=os.urandom)
                for name in names[number :: min(processes, len(names))]
            }
            ours, theirs = context.Pipe()
            arguments = (theirs, stage.coordinator.address, pin, stage.agreement.canonical, keys)
            process = context.Process(target=_crew, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def all(self, deed: str, *arguments: object) -> list[Told]:
        """Lets every member do it; fails where one could not."""
        for pipe in self._pipes:
            pipe.send((deed, arguments))
        told = [one for pipe in self._pipes for one in pipe.recv()]
        wrong = [f"{one.name}: {one.error}" for one in told if one.error]
        assert not wrong, f"{deed}: {len(wrong)} of {len(told)} failed: {wrong[:3]}"
        return told

    def stream(self, blob: Path, rows: int) -> list[Told]:
        """Uploads a file by every member, all from the same moment on."""
        self.all("connect")
        return self.all("stream", blob, rows, time.monotonic() + 0.5)

    def peak(self) -> int:
        """The greatest memory that one of the processes has had."""
        return max(resident(process.pid or 0, "VmHWM") for process in self._processes)

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(30)
            assert process.exitcode == 0, f"a process of members ended with {process.exitcode}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        for process in self._processes:
            process.kill()


def _crew(pipe: Connection, address: str, pin: str, canonical: bytes, keys: Mapping[str, bytes]) -> None:
    """A process of members: takes orders until the other end closes."""
    agreement = parse(canonical)
    seats = [_Seat(name, load_private(key), agreement, address, pin) for name, key in keys.items()]
    with ThreadPoolExecutor(len(seats)) as pool:
        while True:
            try:
                deed, arguments = pipe.recv()
            except EOFError:
                break
            pipe.send(list(pool.map(lambda seat, deed=deed, arguments=arguments: seat.do(deed, arguments), seats)))
    for seat in seats:
        seat.close()


class _Seat:
    """One member at its machine."""

    def __init__(self, name: str, identity: PrivateIdentity, agreement: Agreement, address: str, pin: str) -> None:
        self._name = name
        self._identity = identity
        self._agreement = agreement
        self._where = address, pin
        self._transport: Transport | None = None
        self._party: Party | None = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def do(self, deed: str, arguments: Sequence[Any]) -> Told:
        told = Told(self._name, time.monotonic())
        try:
            if self._transport is None:
                self._transport = Transport(self._where[0], self._identity, self._where[1], patience_s=PATIENCE_S)
            getattr(self, f"_{deed}")(self._transport, told, *arguments)
        except Exception as error:  # told to the process that ordered it
            told.error = f"{type(error).__name__}: {error}"
        told.ended = time.monotonic()
        return told

    def _connect(self, transport: Transport, _told: Told) -> None:
        transport.inbox()

    def _sign(self, transport: Transport, _told: Told) -> None:
        cose = sign(self._agreement, self._name, self._identity)
        transport.put_signature(self._agreement.digest, self._name, cose)

    def _upload(self, transport: Transport, _told: Told) -> None:
        seed = int(self._name[1:])
        self._party = Party(self._agreement, self._name, self._identity, {"visits": rows_of(seed, TABLE_ROWS)})
        (sealed,) = self._party.sealed
        with tempfile.NamedTemporaryFile(prefix="parley-load-") as file:
            file.write(sealed.blob)
            file.flush()
            transport.upload(sealed.upload.digest, sealed.cose, Path(file.name))

    def _stream(self, transport: Transport, told: Told, blob: Path, rows: int, at: float) -> None:
        """Uploads a file as a fresh table of so many rows, from a moment on."""
        upload = Upload(header_of(self._agreement, self._name, rows).to_bytes(), os.urandom(48))

        def progress(_: str, done: int, size: int) -> None:
            while done * MARKS >= size * (len(told.marks) + 1):
                told.marks.append(time.monotonic())

        cose = self._identity.sign(upload.to_bytes())
        time.sleep(max(0.0, at - time.monotonic()))
        told.begun = time.monotonic()
        transport.upload(upload.digest, cose, blob, progress)

    def _join(self, transport: Transport, _told: Told, session: bytes) -> None:
        assert self._party is not None
        nonce = os.urandom(32)
        reply = transport.attest(session, nonce)
        offer = verify_offer(self._agreement, reply.offer, reply.document, nonce=nonce, head=GENESIS, now_ms=now_ms())
        self._offer = offer
        answer = transport.put_join(session, self._party.joining(offer).cose)
        assert answer.receipt, answer.code

    def _countersign(self, transport: Transport, _told: Told, session: bytes) -> None:
        assert self._party is not None
        roster = verify_roster(transport.get_roster(session).cose, self._offer.offer, self._agreement)
        transport.put_countersignature(session, self._party.consent(self._offer, roster).cose, [])

    def _fetch(self, transport: Transport, _told: Told, session: bytes) -> None:
        verify_bundle(transport.bundle(session), now_ms=now_ms())


def opened(stage: Stage) -> bytes:
    """Opens a session; its id."""
    transport = stage.transport()
    session: bytes = transport.open_session(os.urandom(16), stage.agreement.digest).session
    transport.close()
    return session


def started(stage: Stage, session: bytes) -> None:
    """Closes the inputs."""
    transport = stage.transport()
    nonce = os.urandom(32)
    reply = transport.attest(session, nonce)
    offer = verify_offer(stage.agreement, reply.offer, reply.document, nonce=nonce, head=GENESIS, now_ms=now_ms())
    cose = stage.members[stage.first].sign(Start(offer.digest, stage.first).to_bytes())
    transport.start(session, cose)
    transport.close()


def released(stage: Stage, session: bytes, seconds: float = 300.0) -> None:
    """Waits until a session is released."""
    transport = stage.transport()
    try:
        until(lambda: transport.get_session(session).phase in ("released", "lost"), seconds)
        state = transport.get_session(session)
        assert state.phase == "released", state.code
    finally:
        transport.close()


# Fairness


def least_share(told: Sequence[Told], done: float) -> float:
    """How much of the slowest upload had left when a share of all were done, as a share."""
    moment = quantile([one.ended for one in told], done)
    return min(sum(mark <= moment for mark in one.marks) for one in told) / MARKS


def spread(told: Sequence[Told]) -> float:
    """The slowest upload's time over the fastest one's."""
    return max(one.seconds for one in told) / min(one.seconds for one in told)


# Watchers


@dataclass
class Watched:
    """What all watchers together saw: streams, events, those that came out of order, seconds from event to watcher."""

    streams: int = 0
    events: int = 0
    disorder: int = 0
    behind: int = 0
    """Streams that did not see the last event."""
    errors: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


class Watchers:
    """Streams of events in one process, over one connection for each key. `stop(number)` waits until all saw that event."""

    def __init__(self, stage: Stage, names: Sequence[str], streams: int, after: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        keys = {name: dump_private(stage.members[name], random=os.urandom) for name in names}
        arguments = (theirs, stage.coordinator.address, stage.coordinator.certificate, keys, streams, after)
        self._process = context.Process(target=_watchers, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.recv() == "ready"

    def stop(self, number: int, seconds: float = 300.0) -> Watched:
        """Waits for the event with this number, and ends."""
        self._pipe.send((number, seconds))
        found: Watched = self._pipe.recv()
        self._process.join(60)
        return found

    def kill(self) -> None:
        """Ends at once."""
        self._process.kill()
        self._process.join()


def _watchers(
    pipe: Connection, address: str, certificate: bytes, keys: Mapping[str, bytes], streams: int, after: int
) -> None:
    asyncio.run(
        _watch(pipe, address, certificate, {name: load_private(key) for name, key in keys.items()}, streams, after)
    )


async def _watch(
    pipe: Connection,
    address: str,
    certificate: bytes,
    members: Mapping[str, PrivateIdentity],
    streams: int,
    after: int,
) -> None:
    found = Watched(streams)
    last = [after] * streams
    channels: dict[str, grpc.aio.Channel] = {}
    server = tls.server_digest(certificate)
    stopping = False

    async def watch(number: int, name: str) -> None:
        channel = channels.get(name)
        if channel is None:
            # An own connection: gRPC lets channels with the same options share one.
            options = [("parley.member", name)]
            credentials = grpc.ssl_channel_credentials(certificate)
            channel = channels[name] = grpc.aio.secure_channel(address, credentials, options)
        metadata = ((METADATA_KEY, caller(members[name], server)),)
        try:
            stub: Any = CoordinatorStub(channel)
            async for message in stub.Watch(pb.WatchRequest(after=after, several=True), metadata=metadata):
                for event in (message, *message.more):
                    if last[number] > after:
                        found.waits.append(time.time() - event.at_ms / 1000)
                    found.disorder += event.number <= last[number]
                    last[number] = event.number
                    found.events += 1
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            if not stopping:
                found.errors.append(f"{name}: {error.code()}: {error.details()}")

    names = list(members)
    tasks = [asyncio.ensure_future(watch(number, names[number % len(names)])) for number in range(streams)]
    while min(last) <= after and not found.errors:  # noqa: ASYNC110  # an event would be set half a million times
        await asyncio.sleep(0.05)
    pipe.send("ready" if not found.errors else found.errors[0])
    loop = asyncio.get_running_loop()
    number, seconds = await loop.run_in_executor(None, pipe.recv)
    end = time.monotonic() + seconds
    while min(last) < number and not found.errors and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    stopping = True
    found.behind = sum(seen < number for seen in last)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for channel in channels.values():
        await channel.close()
    pipe.send(found)


def caller(identity: PrivateIdentity, server: bytes) -> bytes:
    """A signed caller statement."""
    return identity.sign(Caller(identity.public.signing, server, now_ms() + limits.CALLER_AGE_MS - 1000).to_bytes())


def last_event(database: str) -> int:
    """The number of the newest event in a store."""
    store = Store(database)
    with store.read() as session:
        number = session.scalar(select(func.max(EventRow.number))) or 0
    store.close()
    return number


# Sessions in the store


def fill(stage: Stage, members: Mapping[str, PrivateIdentity], sessions: int) -> list[bytes]:
    """Puts sessions that have ended into the store of a coordinator that does not run, each of a series of its own that all
    `members` signed: two of three released and not fetched, the others lost. Their ids."""
    store = Store(stage.coordinator.database)
    agreements = Agreements(store, Quotas(), system_now_ms)
    first = next(iter(members))
    key = members[first].public.signing
    base = agreement_of(stage.simulation, members)
    found = []
    with store.write() as session:
        if session.get(Operator, key) is None:
            session.add(Operator(key=key, label=first, added_ms=0))
    for number in range(sessions):
        agreement = replace(base, title=f"visits-{number}")
        agreements.put(key, agreement.canonical)
        for name, identity in members.items():
            cose = sign(agreement, name, identity)
            agreements.sign(identity.public.signing, agreement.digest, name, cose)
        released = number % 3 != 0
        identifier = os.urandom(16)
        with store.write() as session:
            now = system_now_ms()
            row = SessionRow(
                session=identifier,
                agreement=agreement.digest,
                series=agreement.series,
                begin=os.urandom(16),
                phase="released" if released else "lost",
                code="" if released else "lost",
                offer=os.urandom(1400),
                document=os.urandom(5000),
                start=None,
                roster=None,
                opened_ms=now,
                ended_ms=now,
                stored_told=True,
            )
            session.add(row)
            session.flush()
            for name in members:
                db.happened(session, "joined", agreement.digest, now, of=identifier, member=name)
                join = JoinRow(number=row.number, digest=os.urandom(48), party=name, cose=b"", at_ms=now)
                join.receipt = os.urandom(400)
                session.add(join)
            if released:
                session.add(BundleRow(number=row.number, size=1, at_ms=now))
            db.happened(session, row.phase, agreement.digest, now, of=identifier)
        found.append(identifier)
    store.close()
    return found


def latencies(work: Callable[[], object], times: int) -> list[float]:
    """Seconds of each of several calls."""
    took = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter() - begun)
    return took


def replayed(transport: Transport, number: int) -> int:
    """Reads all events up to a number; how many there were."""
    count = 0
    for event in transport.events(0, b"", 60.0):
        count += 1
        if event.number >= number:
            break
    return count


# Callers who are slow on purpose


@dataclass
class Slow:
    """Connections that were held, and how long each of them lived: those that were not cut off have infinity."""

    silent: list[float] = field(default_factory=list)
    half: list[float] = field(default_factory=list)
    dribbling: list[float] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        """All of them."""
        return [*self.silent, *self.half, *self.dribbling]


_HELLO = bytes.fromhex("1603010200010001fc0303")
"""How a TLS client begins: a record of 512 bytes, of which the rest never comes."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7


def slowly(stage: Stage, silent: int, half: int, dribbling: int, seconds: float) -> Slow:
    """Holds connections that say nothing, that never end their handshake, and calls of a member that send a byte a second,
    until they are cut off."""
    return asyncio.run(_slowly(stage, silent, half, dribbling, seconds))


async def _slowly(stage: Stage, silent: int, half: int, dribbling: int, seconds: float) -> Slow:
    host, port = stage.coordinator.address.rsplit(":", 1)
    names = list(stage.members)
    server = tls.server_digest(stage.coordinator.certificate)

    async def held(work: Any) -> float:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                await work
        except (OSError, asyncio.IncompleteReadError):
            pass
        except TimeoutError:
            return float("inf")
        return time.monotonic() - begun

    kinds = [
        *(_hold(host, int(port), b"") for _ in range(silent)),
        *(_hold(host, int(port), _HELLO) for _ in range(half)),
        *(
            _dribble(stage, host, int(port), caller(stage.members[names[number % len(names)]], server), number)
            for number in range(dribbling)
        ),
    ]
    lived = await asyncio.gather(*(held(kind) for kind in kinds))
    await asyncio.sleep(0.1)  # transports close behind the tasks
    return Slow(lived[:silent], lived[silent : silent + half], lived[silent + half :])


async def _hold(host: str, port: int, first: bytes) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(first)
        sending = asyncio.ensure_future(_each_second(writer)) if first else None
        try:
            while await reader.read(1 << 16):
                pass
        finally:
            if sending is not None:
                sending.cancel()
    finally:
        writer.transport.abort()


async def _each_second(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(1)
        writer.write(b"\0")


async def _dribble(stage: Stage, host: str, port: int, statement: bytes, number: int) -> None:
    """One call over HTTP/2 written by hand: its message of 1 MB comes a byte a second. Returns when the call has ended."""
    context = ssl.create_default_context(cadata=stage.coordinator.certificate.decode())
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    method = ("PutAgreement", "Inbox", "Upload")[number % 3]
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": f"/{SERVICE}/{method}",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        METADATA_KEY: base64.b64encode(statement).decode(),
    }
    block = b"".join(b"\x10" + _text(name) + _text(value) for name, value in headers.items())
    writer.write(_PREFACE + _frame(_HEADERS, 4, 1, block) + _frame(_DATA, 0, 1, b"\0" + (1 << 20).to_bytes(4, "big")))
    sending = asyncio.ensure_future(_bytes(writer))
    try:
        while True:
            head = await reader.readexactly(9)
            body = await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags = head[3], head[4]
            if kind in (_SETTINGS, _PING) and not flags & 1:
                writer.write(_frame(kind, 1, 0, body if kind == _PING else b""))
            ended = kind in (_RESET, _GOAWAY) or (kind in (_HEADERS, _DATA) and flags & 1)
            if ended:
                return
    finally:
        sending.cancel()
        writer.transport.abort()


async def _bytes(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(1)
        writer.write(_frame(_DATA, 0, 1, b"\0"))


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


def _text(text: str) -> bytes:
    """A text as HPACK writes it without Huffman's code."""
    data = text.encode()
    if len(data) < 127:
        return bytes((len(data),)) + data
    rest, length = len(data) - 127, bytearray((127,))
    while rest >= 128:
        length.append(rest & 127 | 128)
        rest >>= 7
    length.append(rest)
    return bytes(length) + data


def oversized(stage: Stage, times: int) -> list[str]:
    """The statuses that answer messages which are too large for the wire, twice, and for an upload."""
    client = Client(stage.coordinator.address, stage.coordinator.certificate, stage.members[stage.first])
    upload = Upload(header_of(stage.agreement, stage.first, 1 << 22).to_bytes(), os.urandom(48))
    begin = pb.UploadRequest(begin=pb.UploadBegin(cose=client.identity.sign(upload.to_bytes())))
    chunk = pb.UploadRequest(chunk=pb.Chunk(offset=0, data=bytes(limits.CHUNK_BYTES + 1)))
    tries: list[Callable[[], object]] = [
        lambda: client.call("PutAgreement", pb.PutAgreementRequest(canonical=bytes(limits.RPC_BYTES + 1))),
        lambda: client.call("PutJoin", pb.PutJoinRequest(session=bytes(16), cose=bytes(64 << 20))),
        lambda: client.send(begin, chunk),
    ]
    found = []
    for attempt in tries * times:
        try:
            attempt()
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            found.append(error.code().name)
        else:
            found.append("taken")
    client.close()
    return found


def own_peak() -> int:
    """The greatest memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def median_ms(took: Sequence[float]) -> float:
    """The median of seconds, in milliseconds."""
    return statistics.median(took) * 1000
