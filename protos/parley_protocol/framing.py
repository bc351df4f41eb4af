"""Framing of the enclave's channel, without any I/O.

A frame is u32 BE length of the message, u32 BE length of the payload, the message (a protobuf) and the payload (raw
bytes, which thus need neither be copied into a protobuf nor parsed). The other side is never trusted: both lengths are
checked against limits before anything is allocated. A stream that has broken once stays broken.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from parley_protocol import limits
from parley_protocol.errors import MalformedError

Buffer = bytes | bytearray | memoryview

ENCLAVE_PORT: Final = 5005
"""The vsock port at which the enclave of an image listens."""
HEARTBEAT_PORT: Final = 9000
"""The vsock port of the parent at which nitro-cli awaits the heartbeat of an image that has booted."""
HEARTBEAT: Final = b"\xb7"
"""The heartbeat: one byte from the image, which the parent returns as it is."""
HEADER_BYTES: Final = 8
_HEADER: Final = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Frame:
    """One message of the channel and the raw payload beside it."""

    message: bytes
    payload: bytes = field(default=b"", repr=False)


def header(
    data: Buffer, *, limit_message: int = limits.MESSAGE_BYTES, limit_payload: int = limits.PAYLOAD_BYTES
) -> tuple[int, int]:
    """The lengths of message and payload in the 8 bytes `data`; MalformedError beyond the limits (frm-1, frm-2)."""
    if len(data) != HEADER_BYTES:
        raise MalformedError("the header of a frame has 8 bytes")
    message, payload = _HEADER.unpack(data)
    if message > limit_message:  # frm-1
        raise MalformedError(f"the message of a frame is longer than {limit_message} bytes")
    if payload > limit_payload:  # frm-2
        raise MalformedError(f"the payload of a frame is longer than {limit_payload} bytes")
    return message, payload


def buffers(message: bytes, payload: Iterable[Buffer] = ()) -> list[Buffer]:
    """A frame as a list of buffers for `sendmsg`, whose payload is the pieces one after the other, not copied."""
    pieces: list[Buffer] = [piece.cast("B") if isinstance(piece, memoryview) else piece for piece in payload]
    length = sum(map(len, pieces))
    if len(message) >> 32 or length >> 32:
        raise MalformedError("a frame's length does not fit 32 bits")
    return [_HEADER.pack(len(message), length) + message, *(piece for piece in pieces if len(piece))]


def pack(message: bytes, payload: Buffer = b"") -> bytes:
    """A frame as bytes."""
    return b"".join(buffers(message, (payload,)))


class FrameReader:
    """Frames out of a stream that arrives in pieces of any size."""

    __slots__ = ("_broken", "_buffer", "_lengths", "_limit_message", "_limit_payload")

    def __init__(self, limit_message: int = limits.MESSAGE_BYTES, limit_payload: int = limits.PAYLOAD_BYTES) -> None:
        self._limit_message = limit_message
        self._limit_payload = limit_payload
        self._buffer = bytearray()
        self._lengths: tuple[int, int] | None = None
        self._broken = False

    def feed(self, data: Buffer) -> list[Frame]:
        """The frames that `data` completes; MalformedError as soon as a header is beyond the limits, and ever after."""
        if self._broken:
            raise MalformedError("the stream is broken")
        self._buffer += data
        frames: list[Frame] = []
        while frame := self._next():
            frames.append(frame)
        return frames

    def close(self) -> None:
        """The stream has ended; MalformedError in the middle of a frame (frm-3)."""
        if self._broken or self._buffer or self._lengths:  # frm-3
            raise MalformedError("the stream ended within a frame")

    def _next(self) -> Frame | None:
        if self._lengths is None:
            if len(self._buffer) < HEADER_BYTES:
                return None
            try:
                self._lengths = header(
                    self._buffer[:HEADER_BYTES], limit_message=self._limit_message, limit_payload=self._limit_payload
                )
            except MalformedError:
                self._broken = True
                self._buffer.clear()
                raise
            del self._buffer[:HEADER_BYTES]
        message, payload = self._lengths
        if len(self._buffer) < message + payload:
            return None
        with memoryview(self._buffer) as view:
            frame = Frame(bytes(view[:message]), bytes(view[message : message + payload]))
        del self._buffer[: message + payload]
        self._lengths = None
        return frame
