"""The state of one key range of all outputs: named plain arrays with one canonical encoding (eng-12).

Bytes: u32 little-endian length of a CBOR header, the header [label, agreement digest, range, [[name, dtype, [sizes...]]...]],
then the arrays in that order, little-endian, the last index running fastest.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from parley_protocol import limits
from parley_protocol.encoding import Value, decode, encode
from parley_protocol.errors import MalformedError

State = dict[str, NDArray[Any]]
"""Arrays by name, in the order of the plan."""

_LABEL: Final = "parley/1/partial"
_LENGTH: Final = struct.Struct("<I")


def dump(state: State, agreement: bytes, number: int) -> bytes:
    """The bytes of the state of range `number`."""
    shapes: list[Value] = [[name, array.dtype.str, list(array.shape)] for name, array in state.items()]
    header = encode([_LABEL, agreement, number, shapes])
    return b"".join((_LENGTH.pack(len(header)), header, *(array.tobytes() for array in state.values())))


def load(data: bytes, like: State, agreement: bytes, number: int) -> State:
    """The state in `data`, whose arrays have the names, dtypes and shapes of `like`; MalformedError for anything else."""
    if len(data) < _LENGTH.size:
        raise MalformedError("partial: too short")
    (length,) = _LENGTH.unpack_from(data)
    header = decode(data[_LENGTH.size : _LENGTH.size + length], limit=limits.CBOR_BYTES)
    shapes: list[Value] = [[name, array.dtype.str, list(array.shape)] for name, array in like.items()]
    if header != [_LABEL, agreement, number, shapes]:
        raise MalformedError("partial: of another plan or range")
    at = _LENGTH.size + length
    if len(data) != at + sum(array.nbytes for array in like.values()):
        raise MalformedError("partial: of another size")
    state: State = {}
    for name, array in like.items():
        state[name] = np.frombuffer(data, array.dtype, array.size, at).reshape(array.shape)
        at += array.nbytes
    return state
