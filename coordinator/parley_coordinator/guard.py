"""What stands before every method: who calls is known before anything is received, a request arrives in time, no caller has
too many calls under way (crd-23). And what is told of a call when it has ended.

gRPC itself waits for a request as long as it takes, and a connection may begin calls without sending any.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import grpc

from parley_coordinator import log, telemetry
from parley_protocol.errors import MalformedError, ParleyError, UnavailableError

_Context = grpc.aio.ServicerContext[Any, Any]
Admit = Callable[[_Context], Awaitable[bytes]]
"""Who calls; aborts where nobody does who may."""
Abort = Callable[[_Context, ParleyError], Awaitable[Any]]

OPEN_CALLS: Final = 256
"""Calls of the services for which nobody has to prove a key: health and reflection."""
RETRY_MS: Final = 1000


@dataclass(slots=True)
class Call:
    """A call under way: who makes it, the code that it ends with, and the bytes that it moved."""

    method: str
    key: bytes = b""
    code: str = telemetry.OK
    size: int = -1


CURRENT: Final[contextvars.ContextVar[Call]] = contextvars.ContextVar("call")


class Guard(grpc.aio.ServerInterceptor):
    """Wraps all methods of `service`, a full name; those of other services, which are open to all, are only counted."""

    def __init__(self, service: str, *, request_s: float, calls_per_member: int) -> None:
        self._prefix = f"/{service}/"
        self._request_s = request_s
        self._most = calls_per_member
        self._open = 0
        self._running: Counter[bytes] = Counter()
        self._admit: Admit | None = None
        self._abort: Abort | None = None

    def protect(self, admit: Admit, abort: Abort) -> None:
        """Says how callers are known, and how errors are told; before the server starts."""
        self._admit, self._abort = admit, abort

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler of a method, behind this guard."""
        found: Any = await continuation(handler_call_details)
        if found is None:
            # gRPC tells the caller that there is no such method.
            return cast("grpc.RpcMethodHandler[Any, Any]", None)
        ours = handler_call_details.method.startswith(self._prefix)
        # A label of the metrics: only names that are there may become one.
        method = handler_call_details.method.rpartition("/")[2] if ours else ""
        if found.response_streaming:
            wrapped = self._streams(found, method)
            return grpc.stream_stream_rpc_method_handler(wrapped, found.request_deserializer, found.response_serializer)
        return grpc.stream_unary_rpc_method_handler(
            self._answers(found, method), found.request_deserializer, found.response_serializer
        )

    def _answers(self, found: Any, method: str) -> Callable[[AsyncIterator[Any], _Context], Awaitable[Any]]:
        async def behave(requests: AsyncIterator[Any], context: _Context) -> Any:
            async with _Around(self, method, context):
                if found.request_streaming:
                    return await found.stream_unary(requests, context)
                return await found.unary_unary(await self._request(requests, context), context)

        return behave

    def _streams(self, found: Any, method: str) -> Callable[[AsyncIterator[Any], _Context], AsyncIterator[Any]]:
        async def behave(requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
            async with _Around(self, method, context):
                if found.request_streaming:
                    answers = found.stream_stream(requests, context)
                else:
                    answers = found.unary_stream(await self._request(requests, context), context)
                if hasattr(answers, "__aiter__"):
                    async for answer in answers:
                        yield answer
                else:
                    # Methods of other services write by themselves.
                    await answers

        return behave

    async def _request(self, requests: AsyncIterator[Any], context: _Context) -> Any:
        try:
            return await self.first(requests)
        except ParleyError as error:
            await self.abort(context, error)
            raise

    async def first(self, requests: AsyncIterator[Any]) -> Any:
        """The one request of a call, or the first; UnavailableError where it does not come in time."""
        try:
            async with asyncio.timeout(self._request_s):
                request = await anext(aiter(requests), None)
        except TimeoutError as error:
            raise UnavailableError("the request did not arrive in time") from error
        if request is None:
            raise MalformedError("the call has no request")
        return request

    async def abort(self, context: _Context, error: ParleyError) -> None:
        """Ends a call with an error."""
        assert self._abort is not None
        await self._abort(context, error)

    async def enter(self, call: Call, context: _Context) -> None:
        """Lets a call in, or aborts it."""
        if not call.method:
            if self._open >= OPEN_CALLS:
                await self.abort(context, UnavailableError("too many calls", code="busy", retry_after_ms=RETRY_MS))
            self._open += 1
            return
        assert self._admit is not None
        key = await self._admit(context)
        if self._running[key] >= self._most:
            await self.abort(
                context,
                UnavailableError(
                    "this key has as many calls under way as it may", code="busy", retry_after_ms=RETRY_MS
                ),
            )
        call.key = key
        self._running[key] += 1
        telemetry.change("parley_calls_running", 1, method=call.method)

    def leave(self, call: Call) -> None:
        """The end of a call that was let in."""
        if not call.method:
            self._open -= 1
            return
        self._running[call.key] -= 1
        if not self._running[call.key]:
            del self._running[call.key]
        telemetry.change("parley_calls_running", -1, method=call.method)


class _Around:
    """What happens before and after a call."""

    def __init__(self, guard: Guard, method: str, context: _Context) -> None:
        self._guard = guard
        self._context = context
        self._call = Call(method)
        self._inside = False
        self._started = time.monotonic()
        self._span = telemetry.span("call", rpc_system="grpc", rpc_method=method)

    async def __aenter__(self) -> None:
        CURRENT.set(self._call)
        self._telling = self._span.__enter__()
        try:
            await self._guard.enter(self._call, self._context)
        except BaseException:
            self._end()
            raise
        self._inside = True

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._call.code == telemetry.OK:
            # The caller has gone, or the call was ended in a way of which nothing is told.
            self._call.code = "unavailable"
        self._guard.leave(self._call)
        self._end()

    def _end(self) -> None:
        call, seconds = self._call, time.monotonic() - self._started
        self._telling.set("parley.code", call.code)
        if call.size >= 0:
            self._telling.set("parley.size", log.coarse(call.size))
        self._span.__exit__(None, None, None)
        if not call.method:
            return
        telemetry.count("parley_calls_total", method=call.method, code=call.code)
        telemetry.observe("parley_call_seconds", seconds, method=call.method)
        fields: dict[str, log.Field] = {} if call.size < 0 else {"size": log.coarse(call.size)}
        if call.code != telemetry.OK:
            fields["code"] = call.code
        log.info("rpc", method=call.method, caller=log.who(call.key or None), ms=int(seconds * 1000), **fields)
