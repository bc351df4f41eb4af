"""The gRPC service: from messages to the parts that do the work, and from errors to statuses.

The event loop never blocks: work runs in threads, long work (opening, joins, the start) in threads of its own, so that
waiting for an enclave delays nobody else. Streams that wait for events hold no thread.
"""

# ruff: noqa: N802  # methods are named as in the proto

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from parley_coordinator import log, status, telemetry
from parley_coordinator import store as db
from parley_coordinator.agreements import Agreements, AgreementView
from parley_coordinator.callers import METADATA_KEY, Callers
from parley_coordinator.clock import Clock
from parley_coordinator.config import Quotas
from parley_coordinator.events import Bell, Events, Tail, event_of, messages
from parley_coordinator.guard import CURRENT, Guard
from parley_coordinator.inbox import Inbox
from parley_coordinator.kms_joins import KmsJoins
from parley_coordinator.leases import ElsewhereError
from parley_coordinator.models import UploadRow
from parley_coordinator.peers import PASSED_ON, PeerError, Peers
from parley_coordinator.releases import Releases
from parley_coordinator.sessions import Sessions, SessionView
from parley_coordinator.store import Store
from parley_coordinator.uploads import Uploads, UploadView, Writing
from parley_protocol import limits
from parley_protocol.errors import MalformedError, ParleyError, RefusedError, UnavailableError
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1.coordinator_pb2_grpc import CoordinatorServicer

_T = TypeVar("_T")
_Context = grpc.aio.ServicerContext[Any, Any]
_Opened = tuple[AbstractContextManager[Writing], Writing]

WATCH_S = 30.0
"""A stream looks for events at least so often, also when no bell rang: other processes write to the store too."""
BURST_S = 0.05
"""How long a stream lets events gather after a bell."""
RETRY_S = 0.5
"""When events are read again, after that failed."""
WAITING = 2
"""Messages of one upload that wait for the disk: memory of a stream."""
WRITING = 8
"""Chunks of all uploads that go to the disk at a time, half of the threads for it: each stream takes its turn, and what waits
stays with its client. Without turns the streams that are under way leave no time to take a new call."""
TURN_S = 0.25
"""How long a turn is: a blob store that does not answer one upload stops no other."""
PATIENCE_S = 0.25
"""How soon an upload's stream notices that another one has taken over."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the service calls."""

    store: Store
    callers: Callers
    agreements: Agreements
    uploads: Uploads
    sessions: Sessions
    kms_joins: KmsJoins
    releases: Releases
    inbox: Inbox
    events: Events
    peers: Peers
    quotas: Quotas
    clock: Clock


class Service(CoordinatorServicer):
    """The methods of coordinator.proto. Pools of threads: `quick` for the store, `watching` for its events, `disk` for blobs,
    `long` for what an enclave answers at once, `joins` for what it takes its time for."""

    def __init__(
        self,
        parts: Parts,
        bell: Bell,
        guard: Guard,
        *,
        idle_s: float,
        quick: Executor,
        disk: Executor,
        long: Executor,
        joins: Executor,
        watching: Executor,
    ) -> None:
        self._parts = parts
        self._bell = bell
        self._guard = guard
        self._idle_s = idle_s
        self._quick = quick
        self._disk = disk
        self._long = long
        self._joins = joins
        self._watches: Counter[bytes] = Counter()
        self._stopping = asyncio.Event()
        # Those who wait for a turn get it in the order in which they came.
        self._turns = asyncio.Semaphore(WRITING)
        self._watching = watching
        self._tail: Tail | None = None
        self._following: asyncio.Future[None] | None = None

    def stop(self) -> None:
        """Ends the streams that wait for events; called in the loop."""
        self._stopping.set()
        self._bell.ring()
        if self._following is not None:
            self._told.ring()

    async def close(self) -> None:
        """Waits until nothing reads events any more; after `stop`."""
        if self._following is not None:
            await self._following

    # Agreements

    async def PutAgreement(self, request: pb.PutAgreementRequest, context: _Context) -> pb.AgreementState:
        return await self._call(
            context,
            "PutAgreement",
            self._quick,
            lambda key: _agreement(self._parts.agreements.put(key, request.canonical)),
        )

    async def PutSignature(self, request: pb.PutSignatureRequest, context: _Context) -> pb.AgreementState:
        return await self._call(
            context,
            "PutSignature",
            self._quick,
            lambda key: _agreement(self._parts.agreements.sign(key, request.agreement, request.member, request.cose)),
        )

    async def GetAgreement(self, request: pb.GetAgreementRequest, context: _Context) -> pb.AgreementState:
        def get(key: bytes) -> pb.AgreementState:
            match request.WhichOneof("which"):
                case "digest":
                    return _agreement(self._parts.agreements.get(key, request.digest))
                case "series":
                    return _agreement(self._parts.agreements.newest(key, request.series))
            raise MalformedError("GetAgreementRequest: neither digest nor series")

        return await self._call(context, "GetAgreement", self._quick, get)

    # Inbox and events

    async def Inbox(self, request: pb.InboxRequest, context: _Context) -> pb.InboxReply:  # noqa: ARG002
        def inbox(key: bytes) -> pb.InboxReply:
            return pb.InboxReply(
                items=[
                    pb.InboxItem(
                        kind=item.kind,
                        agreement=item.agreement,
                        session=item.session,
                        table=item.table,
                        due_ms=item.due_ms,
                        member=item.member,
                        since_ms=item.since_ms,
                    )
                    for item in self._parts.inbox.items(key)
                ]
            )

        return await self._call(context, "Inbox", self._quick, inbox)

    async def Watch(self, request: pb.WatchRequest, context: _Context) -> AsyncIterator[pb.Event]:
        key = self._caller()
        if self._watches[key] >= self._parts.quotas.watches_per_member:
            await _abort(context, RefusedError("quota", "this key watches in as many streams as it may"))
        self._watches[key] += 1
        if self._following is None:
            self._told = Bell(asyncio.get_running_loop())
            self._following = asyncio.ensure_future(self._follow(self._told))
        rung = self._told.subscribe()
        number = request.after
        try:
            await self._run(context, self._watching, self._parts.events.check, key, request.session)
            while not self._stopping.is_set():
                rung.clear()
                tail = self._tail
                if tail is None or number < tail.first - 1:
                    after = self._parts.events.after
                    rows = await self._run(context, self._watching, after, key, number, request.session)
                    for message in messages([event_of(row) for row in rows], several=request.several):
                        yield message
                    if rows or tail is None:
                        if rows:
                            number = rows[-1].number
                        else:
                            await _within(rung, WATCH_S)
                        continue
                    # There are none between the number and the tail.
                    number = tail.first - 1
                upto = tail.last
                for message in messages(tail.after(key, number, request.session), several=request.several):
                    yield message
                number = max(number, upto)
                if tail.last == upto:
                    await _within(rung, WATCH_S)
            await _abort(context, _stopping())
        finally:
            self._told.unsubscribe(rung)
            self._watches[key] -= 1
            if not self._watches[key]:
                del self._watches[key]

    async def _follow(self, told: Bell) -> None:
        """Reads what has happened, once for all streams that wait for it."""
        rung = self._bell.subscribe()
        events = self._parts.events
        while not self._stopping.is_set():
            rung.clear()
            try:
                if self._tail is None:
                    self._tail = Tail(await self._in(self._watching, events.newest))
                happened = await self._in(self._watching, events.since, self._tail.last)
            except UnavailableError as error:
                log.warning("events-wait", code=error.code)
                await asyncio.sleep(RETRY_S)
                continue
            except Exception:  # noqa: BLE001  # it must go on: without it no stream hears of anything
                log.fault("events-failed")
                await asyncio.sleep(RETRY_S)
                continue
            self._tail.add(happened)
            told.wake()
            if not happened:
                await _within(rung, WATCH_S)
                # Events come in bursts, as many parties join: one query finds all of a burst.
                await asyncio.sleep(BURST_S)

    # Uploads

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadRequest], context: _Context) -> pb.UploadState:
        key = self._caller()
        try:
            first = await self._guard.first(request_iterator)
            if first.WhichOneof("part") != "begin":
                raise MalformedError("UploadRequest: the first message is not begin")
            row = await self._in(self._quick, self._parts.uploads.begin, key, first.begin.cose)
            if row.complete_ms is not None:
                return _upload(UploadView(row.stored, row.size, complete=True))
            opening = asyncio.ensure_future(self._in(self._long, self._open, row))
            try:
                manager, writing = await asyncio.shield(opening)
            except asyncio.CancelledError:
                # The client is gone, and no thread can be told: what it opens is closed in order.
                leaving = asyncio.ensure_future(self._leave(opening))
                leaving.add_done_callback(_told)
                raise
            before = writing.position
            try:
                if before < writing.size:
                    await self._receive(request_iterator, writing)
            finally:
                # Also when the client is gone: what has arrived is stored, and need not be sent again.
                finishing = self._once(self._disk, self._finish, manager, writing)
                finishing.add_done_callback(_told)
                state = await asyncio.shield(finishing)
            CURRENT.get().size = state.stored - before
            telemetry.observe("parley_upload_bytes", state.stored - before)
            return _upload(state)
        except ParleyError as error:
            await _abort(context, error)
        except Exception:  # noqa: BLE001  # the caller gets a code; what it was stands in the log
            log.fault("rpc-failed", method="Upload", caller=log.who(key))
            await _abort(context, RefusedError("internal"))

    async def _receive(self, requests: AsyncIterator[pb.UploadRequest], writing: Writing) -> None:
        # Few messages wait here: behind them the client waits, held by HTTP/2's flow control.
        waiting: asyncio.Queue[pb.UploadRequest | None] = asyncio.Queue(maxsize=WAITING)
        reading = asyncio.ensure_future(_read(requests, waiting))
        syncing: asyncio.Future[UploadView] | None = None
        try:
            while (request := await self._next(waiting, reading, writing)) is not None:
                if request.WhichOneof("part") != "chunk":
                    raise MalformedError("UploadRequest: not a chunk after the first message")
                await self._write(writing, request.chunk)
                if writing.unsynced >= limits.SYNC_BYTES and (syncing is None or syncing.done()):
                    if syncing is not None:
                        syncing.result()
                    syncing = asyncio.ensure_future(self._in(self._disk, functools.partial(writing.sync, whole=False)))
                    syncing.add_done_callback(_told)
                elif writing.unsynced >= 2 * limits.SYNC_BYTES and syncing is not None:
                    # One part goes to the disk while the next one arrives; a third has to wait.
                    await syncing
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            if syncing is not None:
                await asyncio.shield(asyncio.wait([syncing]))
        if syncing is not None:
            syncing.result()

    async def _write(self, writing: Writing, chunk: pb.Chunk) -> None:
        step: asyncio.Future[None] | None = None
        try:
            async with self._turns:
                step = asyncio.ensure_future(self._in(self._disk, writing.write, chunk.offset, chunk.data))
                await asyncio.wait([step], timeout=TURN_S)
            await asyncio.shield(step)
        finally:
            if step is not None:
                # Also when the client is gone: no blob is closed while a thread writes to it.
                await asyncio.shield(asyncio.wait([step]))

    async def _next(
        self, waiting: asyncio.Queue[pb.UploadRequest | None], reading: asyncio.Future[None], writing: Writing
    ) -> pb.UploadRequest | None:
        end = time.monotonic() + self._idle_s
        while True:
            if time.monotonic() > end:
                raise UnavailableError("nothing more of the upload has arrived for a long time; what did is stored")
            if writing.superseded.is_set():
                raise RefusedError("busy", "another stream has taken over this upload")
            if self._stopping.is_set():
                raise _stopping()
            if not waiting.empty():
                return waiting.get_nowait()
            if reading.done():
                reading.result()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    return await waiting.get()

    def _open(self, row: UploadRow) -> _Opened:
        manager = self._parts.uploads.writing(row)
        return manager, manager.__enter__()

    async def _leave(self, opening: asyncio.Future[_Opened]) -> UploadView:
        return await self._once(self._disk, self._finish, *await opening)

    @staticmethod
    def _finish(manager: AbstractContextManager[Writing], writing: Writing) -> UploadView:
        try:
            return writing.sync()
        finally:
            manager.__exit__(None, None, None)

    async def GetUpload(self, request: pb.UploadRef, context: _Context) -> pb.UploadState:
        return await self._call(
            context, "GetUpload", self._quick, lambda key: _upload(self._parts.uploads.get(key, request.upload))
        )

    # Sessions

    async def OpenSession(self, request: pb.OpenSessionRequest, context: _Context) -> pb.SessionState:
        return await self._call(
            context,
            "OpenSession",
            self._long,
            lambda key: _session(self._parts.sessions.open(key, request.request_id, request.agreement)),
            passed_on=(request, pb.SessionState),
        )

    async def GetSession(self, request: pb.SessionRef, context: _Context) -> pb.SessionState:
        return await self._call(
            context, "GetSession", self._quick, lambda key: _session(self._parts.sessions.get(key, request.session))
        )

    async def Attest(self, request: pb.AttestRequest, context: _Context) -> pb.AttestReply:
        def attest(key: bytes) -> pb.AttestReply:
            offer, document = self._parts.sessions.attest(key, request.session, request.nonce)
            return pb.AttestReply(offer=offer, document=document)

        return await self._call(context, "Attest", self._long, attest, passed_on=(request, pb.AttestReply))

    async def PutJoin(self, request: pb.PutJoinRequest, context: _Context) -> pb.JoinReply:
        def join(key: bytes) -> pb.JoinReply:
            receipt, code = self._parts.sessions.join(key, request.session, request.cose)
            return pb.JoinReply(receipt=receipt, code=code)

        return await self._call(context, "PutJoin", self._joins, join, passed_on=(request, pb.JoinReply))

    async def PutKmsJoin(self, request: pb.PutKmsJoinRequest, context: _Context) -> pb.KmsJoinState:
        def put(key: bytes) -> pb.KmsJoinState:
            join, number = self._parts.kms_joins.put(key, request.cose)
            return pb.KmsJoinState(join=join, number=number)

        return await self._call(context, "PutKmsJoin", self._quick, put)

    async def Start(self, request: pb.StartRequest, context: _Context) -> pb.RosterReply:
        return await self._call(
            context,
            "Start",
            self._long,
            lambda key: _roster(self._parts.sessions.start(key, request.session, request.cose)),
            passed_on=(request, pb.RosterReply),
        )

    async def GetRoster(self, request: pb.SessionRef, context: _Context) -> pb.RosterReply:
        return await self._call(
            context, "GetRoster", self._quick, lambda key: _roster(self._parts.sessions.roster(key, request.session))
        )

    async def PutCountersignature(self, request: pb.PutCountersignatureRequest, context: _Context) -> pb.SessionState:
        return await self._call(
            context,
            "PutCountersignature",
            self._long,
            lambda key: _session(self._parts.sessions.countersign(key, request.session, request.cose, request)),
            passed_on=(request, pb.SessionState),
        )

    async def Refuse(self, request: pb.RefuseRequest, context: _Context) -> pb.SessionState:
        return await self._call(
            context,
            "Refuse",
            self._long,
            lambda key: _session(self._parts.sessions.refuse(key, request.session, request.cose)),
            passed_on=(request, pb.SessionState),
        )

    # Releases

    async def GetBundle(self, request: pb.GetBundleRequest, context: _Context) -> AsyncIterator[pb.Chunk]:
        key = self._caller()
        bundle = await self._run(context, self._disk, self._parts.releases.bundle, key, request.session)
        try:
            if request.offset > bundle.size:
                await _abort(context, RefusedError("too-large", f"the bundle has {bundle.size} bytes and no more"))
            offset = request.offset
            while offset < bundle.size:
                data = await self._run(context, self._disk, bundle.reader.read, offset, limits.CHUNK_BYTES)
                if not data:
                    await _abort(
                        context, RefusedError("internal", "the coordinator's store has lost bytes of the bundle")
                    )
                yield pb.Chunk(offset=offset, data=data)
                offset += len(data)
            await self._run(context, self._quick, self._parts.releases.fetched, bundle)
        finally:
            bundle.reader.close()
        CURRENT.get().size = bundle.size - request.offset
        telemetry.observe("parley_bundle_bytes", bundle.size - request.offset)

    async def GetChain(self, request: pb.GetChainRequest, context: _Context) -> AsyncIterator[pb.SignedStatement]:
        key = self._caller()
        records = await self._run(context, self._quick, self._parts.releases.chain, key, request.series, request.after)
        for cose, document in records:
            yield pb.SignedStatement(cose=cose, document=document)

    # How a call runs

    async def _call(
        self,
        context: _Context,
        method: str,
        pool: Executor,
        work: Callable[[bytes], _T],
        passed_on: tuple[Message, type[_T]] | None = None,
    ) -> _T:
        """`passed_on`: request and kind of answer of a call that only the coordinator can answer that serves the session."""
        key = self._caller()
        try:
            try:
                result = await self._in(pool, work, key)
            except ElsewhereError as elsewhere:
                if passed_on is None:
                    raise
                result = await self._pass_on(context, method, elsewhere, *passed_on)
        except PeerError as error:
            CURRENT.get().code = error.reason
            await context.abort(error.code, error.message, ((status.DETAILS_KEY, error.details),))
            raise AssertionError("abort raises") from error
        except ParleyError as error:
            await _abort(context, error)
        except Exception:  # noqa: BLE001  # the caller gets a code; what it was stands in the log
            log.fault("rpc-failed", method=method, caller=log.who(key))
            await _abort(context, RefusedError("internal"))
        return result

    async def _pass_on(
        self, context: _Context, method: str, elsewhere: ElsewhereError, request: Message, reply: type[_T]
    ) -> _T:
        metadata = dict(context.invocation_metadata() or ())
        if PASSED_ON in metadata:
            # The lease changed hands meanwhile; the caller's next attempt finds its new holder.
            raise elsewhere
        caller = metadata[METADATA_KEY]
        assert isinstance(caller, bytes)
        kind: Any = reply
        answer: _T = await self._parts.peers.call(
            elsewhere.address, method, request, kind, caller, context.time_remaining()
        )
        log.debug("passed-on", method=method, to=elsewhere.address)
        return answer

    async def _run(self, context: _Context, pool: Executor, work: Callable[..., _T], *arguments: object) -> _T:
        """The same within a stream."""
        try:
            return await self._in(pool, work, *arguments)
        except ParleyError as error:
            await _abort(context, error)
        except Exception:  # noqa: BLE001  # the caller gets a code; what it was stands in the log
            log.fault("rpc-failed", method=work.__name__)
            await _abort(context, RefusedError("internal"))

    @staticmethod
    def _caller() -> bytes:
        """Who calls, as the guard has found."""
        return CURRENT.get().key

    async def admit(self, context: _Context) -> bytes:
        """Who calls: crd-1, crd-2 and cal-*; strangers get PERMISSION_DENIED and nothing else (crd-3)."""
        if self._stopping.is_set():
            await _abort(context, _stopping())
        try:
            metadata = [(str(name), value) for name, value in context.invocation_metadata() or ()]
            key = self._parts.callers.key(metadata, now_ms=self._parts.clock())
        except ParleyError as error:
            log.info("unauthenticated", code=error.code)
            await _abort(context, error, authenticating=True)
        if not await self._run(context, self._quick, self._known, key):
            log.info("stranger", caller=log.who(key))
            await _abort(context, RefusedError("stranger"))
        return key

    def _known(self, key: bytes) -> bool:
        with self._parts.store.read() as session:
            return db.is_known(session, key)

    async def _in(self, pool: Executor, work: Callable[..., _T], *arguments: object) -> _T:
        # All work may be done again that a conflict of transactions undid: every call may be repeated as it is.
        return await self._once(pool, db.retried, work, *arguments)

    @staticmethod
    def _once(pool: Executor, work: Callable[..., _T], *arguments: object) -> asyncio.Future[_T]:
        return asyncio.get_running_loop().run_in_executor(pool, contextvars.copy_context().run, work, *arguments)


async def _read(requests: AsyncIterator[pb.UploadRequest], waiting: asyncio.Queue[pb.UploadRequest | None]) -> None:
    async for request in requests:
        await waiting.put(request)
    await waiting.put(None)


def _told(storing: asyncio.Future[UploadView]) -> None:
    """Logs why what arrived of an upload could not be stored: its client may be gone, and then nobody else asks."""
    if storing.cancelled() or (error := storing.exception()) is None:
        return
    if isinstance(error, ParleyError):
        log.info("upload-not-stored", code=error.code)
        return
    try:
        raise error
    except Exception:  # noqa: BLE001  # it is logged with its frames
        log.fault("upload-not-stored")


async def abort(context: _Context, error: ParleyError) -> None:
    """Ends a call with an error."""
    await _abort(context, error)


async def _abort(context: _Context, error: ParleyError, *, authenticating: bool = False) -> NoReturn:
    if (call := CURRENT.get(None)) is not None:
        call.code = error.code
    code, message, details = status.of(error, authenticating=authenticating)
    await context.abort(code, message, ((status.DETAILS_KEY, details),))
    raise AssertionError("abort raises")


async def _within(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def _stopping() -> ParleyError:
    return UnavailableError("the coordinator is stopping", retry_after_ms=5000)


def _agreement(view: AgreementView) -> pb.AgreementState:
    return pb.AgreementState(
        canonical=view.canonical, signatures=view.signatures, missing=view.missing, session=view.session
    )


def _upload(view: UploadView) -> pb.UploadState:
    return pb.UploadState(stored=view.stored, size=view.size, complete=view.complete)


def _session(view: SessionView) -> pb.SessionState:
    return pb.SessionState(
        session=view.session,
        agreement=view.agreement,
        phase=view.phase,
        parties=[
            pb.PartyState(party=party, phase=phase, code=view.refused.get(party, "") if phase == "refused" else "")
            for party, phase in view.parties
        ],
        code=view.code,
        deadline_ms=view.deadline_ms,
        percent=view.percent,
    )


def _roster(roster: tuple[bytes, tuple[str, ...]]) -> pb.RosterReply:
    return pb.RosterReply(cose=roster[0], missing=roster[1])
