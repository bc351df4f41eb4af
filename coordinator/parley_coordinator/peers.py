"""Calls that another coordinator must answer, passed on as they came: the caller's own statement authenticates them there.

All coordinators of a store have one TLS key, to which that statement is bound; so a peer is whoever has this key, and is
trusted with no more than what any member could ask of it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeVar

import grpc
from cryptography import x509
from google.protobuf.message import Message

from parley_coordinator import status
from parley_coordinator.callers import METADATA_KEY
from parley_coordinator.leases import RETRY_MS
from parley_protocol import limits
from parley_protocol.errors import UnavailableError
from parley_protocol.v1 import coordinator_pb2

_T = TypeVar("_T", bound=Message)

PASSED_ON: Final = "parley-passed-on"
"""In the metadata of a call that a coordinator passed on: it goes no further."""
CONNECT_MS: Final = 5000
_SERVICE: Final = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]


class PeerError(Exception):
    """The answer of a peer that is an error, as it is to be told."""

    def __init__(self, code: grpc.StatusCode, message: str, details: bytes) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


class Peers:
    """Connections to other coordinators of the same TLS certificate (PEM)."""

    def __init__(self, certificate: bytes) -> None:
        self._credentials = grpc.ssl_channel_credentials(certificate)
        self._name = _name(certificate)
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def call(
        self, address: str, method: str, request: Message, reply: type[_T], caller: bytes, seconds: float | None
    ) -> _T:
        """A peer's answer; PeerError for its errors, UnavailableError where it does not answer."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._connect(address)
        ask = channel.unary_unary(
            f"/{_SERVICE.full_name}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        try:
            answer: _T = await ask(request, timeout=seconds, metadata=((METADATA_KEY, caller), (PASSED_ON, "1")))
            return answer
        except grpc.aio.AioRpcError as error:
            for name, value in error.trailing_metadata() or ():
                if name == status.DETAILS_KEY and isinstance(value, bytes):
                    raise PeerError(error.code(), error.details() or "", value) from error
            raise UnavailableError(
                "the coordinator that serves this session does not answer; try again", retry_after_ms=RETRY_MS
            ) from error

    def _connect(self, address: str) -> grpc.aio.Channel:
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", limits.RPC_BYTES),
            ("grpc.max_send_message_length", limits.RPC_BYTES),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", CONNECT_MS),
        ]
        if self._name:
            options.append(("grpc.ssl_target_name_override", self._name))
        return grpc.aio.secure_channel(address, self._credentials, options)

    async def close(self) -> None:
        """Ends all connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))


def _name(certificate: bytes) -> str | None:
    """A name in the certificate: the peer is known by its key, whatever its address is called."""
    try:
        names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except x509.ExtensionNotFound:
        return None
    found = names.value.get_values_for_type(x509.DNSName)
    return found[0] if found else None
