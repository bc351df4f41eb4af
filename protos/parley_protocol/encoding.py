"""Deterministic CBOR: RFC 8949 section 4.2.1, and nothing that could be written in two ways.

One value has one encoding and one encoding has one value, so digests and signatures may be taken over bytes and
statements compared by bytes. The codec is written out here because no library refuses all that must be refused: floats,
tags, indefinite lengths, integers and lengths that are not minimal, duplicate or unsorted keys, trailing bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from parley_protocol import limits
from parley_protocol.errors import MalformedError

Value: TypeAlias = "int | bytes | str | bool | list[Value] | dict[str, Value] | dict[int, Value] | None"
"""What can be encoded: integers from -2^63 to 2^64-1, bytes, text, booleans, null, lists, and maps whose keys are all
text or all non-negative integers."""

Encodable: TypeAlias = (
    "int | bytes | str | bool | Sequence[Encodable] | Mapping[str, Encodable] | Mapping[int, Encodable] | None"
)
"""`Value` for the type checker where it is only read; at run time lists and maps are `list` and `dict` and no other."""

_UINT, _NINT, _BYTES, _TEXT, _ARRAY, _MAP = range(6)
_FALSE, _TRUE, _NULL = 0xF4, 0xF5, 0xF6


def sha384(data: bytes | bytearray | memoryview) -> bytes:
    """SHA-384 of `data`: 48 bytes, the digest of every statement."""
    return hashlib.sha384(data).digest()


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """The digest by which statements are named: SHA-384."""
    return sha384(data)


def encode(value: Encodable) -> bytes:
    """The one encoding of `value` (enc-1); MalformedError where it has a type or a size that cannot be encoded."""
    out = bytearray()
    _write(out, value, limits.CBOR_DEPTH)
    return bytes(out)


def decode(data: bytes | bytearray | memoryview, *, limit: int = limits.CBOR_BYTES, foreign: bool = False) -> Value:
    """The value that `data` encodes, all of it; MalformedError for anything that `encode` would not have written (enc-2).

    `limit` is the greatest length of `data`. `foreign` is for what an NSM writes: it accepts maps whose keys are in any
    order and maps of indefinite length (a quarter of the known documents have one). All other rules stay.
    """
    if len(data) > limit:  # enc-6
        raise MalformedError(f"more than {limit} bytes")
    reader = _Reader(bytes(data), foreign)
    value = reader.value(limits.CBOR_DEPTH)
    if reader.position != len(reader.data):  # enc-6
        raise MalformedError("trailing bytes")
    return value


def _head(out: bytearray, major: int, argument: int) -> None:
    if argument < 24:
        out.append(major << 5 | argument)
    elif argument < 1 << 8:
        out += struct.pack(">BB", major << 5 | 24, argument)
    elif argument < 1 << 16:
        out += struct.pack(">BH", major << 5 | 25, argument)
    elif argument < 1 << 32:
        out += struct.pack(">BI", major << 5 | 26, argument)
    else:
        out += struct.pack(">BQ", major << 5 | 27, argument)


def _write(out: bytearray, value: object, depth: int) -> None:
    # Exact types: a subclass may print one value and hold another (numpy's scalars, enumerations).
    kind = type(value)
    if kind is int:
        assert isinstance(value, int)
        if not limits.CBOR_INT_MIN <= value <= limits.CBOR_INT_MAX:
            raise MalformedError("integer out of range")
        _head(out, _NINT, -1 - value) if value < 0 else _head(out, _UINT, value)
    elif kind is bytes:
        assert isinstance(value, bytes)
        _head(out, _BYTES, len(value))
        out += value
    elif kind is str:
        assert isinstance(value, str)
        out += _text(value)
    elif value is None:
        out.append(_NULL)
    elif kind is bool:
        out.append(_TRUE if value else _FALSE)
    elif kind is list:
        assert isinstance(value, list)
        _head(out, _ARRAY, len(value))
        for item in value:
            _write(out, item, _deeper(depth))
    elif kind is dict:
        assert isinstance(value, dict)
        _head(out, _MAP, len(value))
        for encoded, item in _sorted(value):
            out += encoded
            _write(out, item, _deeper(depth))
    else:
        raise MalformedError(f"a {kind.__name__} cannot be encoded")


def _sorted(value: dict[object, object]) -> list[tuple[bytes, object]]:
    if len({type(key) for key in value}) > 1:
        raise MalformedError("keys of a map are of different types")
    return sorted(((_key(key), item) for key, item in value.items()), key=lambda entry: entry[0])


def _key(key: object) -> bytes:
    if type(key) is str:
        return _text(key)
    if type(key) is int and 0 <= key <= limits.CBOR_INT_MAX:
        out = bytearray()
        _head(out, _UINT, key)
        return bytes(out)
    raise MalformedError("a key of a map is neither text nor a non-negative integer")


def _text(value: str) -> bytes:
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise MalformedError("text holds a lone surrogate") from None
    out = bytearray()
    _head(out, _TEXT, len(data))
    out += data
    return bytes(out)


def _deeper(depth: int) -> int:
    if depth == 0:  # enc-7
        raise MalformedError(f"nested deeper than {limits.CBOR_DEPTH}")
    return depth - 1


class _Reader:
    """A position in bytes. Lengths are checked against what is left before anything is allocated."""

    __slots__ = ("data", "foreign", "position")

    def __init__(self, data: bytes, foreign: bool) -> None:
        self.data = data
        self.position = 0
        self.foreign = foreign

    def value(self, depth: int) -> Value:
        initial = self._initial()
        major, info = initial >> 5, initial & 31
        if major == _UINT:
            return self._argument(info)
        if major == _NINT:
            number = -1 - self._argument(info)
            if number < limits.CBOR_INT_MIN:
                raise MalformedError("integer out of range")
            return number
        if major == _BYTES:
            return self._take(self._argument(info))
        if major == _TEXT:
            return self._text(info)
        if major == _ARRAY:
            count = self._count(info, 1)
            depth = _deeper(depth) if count else depth
            return [self.value(depth) for _ in range(count)]
        if major == _MAP:
            return self._map(info, depth)
        if initial == _FALSE:
            return False
        if initial == _TRUE:
            return True
        if initial == _NULL:
            return None
        # enc-3
        raise MalformedError("a tag" if major == 6 else "a float or another simple value")

    def _map(self, info: int, depth: int) -> Value:
        # An indefinite map ends by its break, or by the end of the data, whichever comes first.
        count = len(self.data) if info == 31 and self.foreign else self._count(info, 2)
        depth = _deeper(depth) if count else depth
        result: dict[str | int, Value] = {}
        kind: type | None = None
        previous = b""
        for _ in range(count):
            start = self.position
            if info == 31 and self.data[start : start + 1] == b"\xff":
                self.position += 1
                break
            initial = self._initial()
            major = initial >> 5
            if major == _TEXT:
                key: str | int = self._text(initial & 31)
            elif major == _UINT:
                key = self._argument(initial & 31)
            else:
                raise MalformedError("a key of a map is neither text nor a non-negative integer")
            if kind is not None and type(key) is not kind:  # enc-5
                raise MalformedError("keys of a map are of different types")
            kind = type(key)
            if key in result:
                raise MalformedError("duplicate key")
            encoded = self.data[start : self.position]
            if not self.foreign and encoded < previous:
                raise MalformedError("keys are not sorted")
            previous = encoded
            result[key] = self.value(depth)
        return result  # type: ignore[return-value]  # all keys are of one type, which the loop has checked

    def _text(self, info: int) -> str:
        try:
            return self._take(self._argument(info)).decode()
        except UnicodeDecodeError:
            raise MalformedError("text is not UTF-8") from None

    def _count(self, info: int, least: int) -> int:
        count = self._argument(info)
        if count * least > len(self.data) - self.position:
            raise MalformedError("truncated")
        return count

    def _argument(self, info: int) -> int:
        if info < 24:
            return info
        if info > 27:
            raise MalformedError("indefinite length or reserved value")
        width = 1 << (info - 24)
        argument = int.from_bytes(self._take(width), "big")
        # enc-4
        if argument < (24 if width == 1 else 1 << (width * 4)):
            raise MalformedError("integer or length is not minimal")
        return argument

    def _initial(self) -> int:
        try:
            initial = self.data[self.position]
        except IndexError:
            raise MalformedError("truncated") from None
        self.position += 1
        return initial

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise MalformedError("truncated")
        taken = self.data[self.position : end]
        self.position = end
        return taken
