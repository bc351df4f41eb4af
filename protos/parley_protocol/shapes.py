"""Shapes of the fields of statements: what each position of a CBOR array may hold.

A shape turns a Python value into a value of `parley_protocol.encoding` and back, and refuses all else with
`MalformedError`. Sequences become tuples, so that what was parsed is as immutable as what was built.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self

from parley_protocol import limits
from parley_protocol.encoding import Value, decode, encode, sha384
from parley_protocol.errors import MalformedError


class Shape(Protocol):
    """What one field may hold."""

    def dump(self, value: Any, where: str) -> Value:
        """The encodable form of `value`; MalformedError where it has another shape."""

    def load(self, value: Value, where: str) -> Any:
        """The field's value; MalformedError where it has another shape."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """A byte string of `least` to `most` bytes; exactly `least` where `most` is left out."""

    least: int
    most: int | None = None

    def dump(self, value: Any, where: str) -> Value:
        most = self.least if self.most is None else self.most
        if type(value) is not bytes or not self.least <= len(value) <= most:
            raise MalformedError(f"{where}: not a byte string of {self.least} to {most} bytes")
        return value

    load = dump


@dataclass(frozen=True, slots=True)
class Text:
    """A text in NFC of 1 to `most` bytes of UTF-8 without control characters: names are shown to people."""

    most: int = limits.NAME_BYTES

    def dump(self, value: Any, where: str) -> Value:
        if type(value) is not str or not 1 <= len(value.encode("utf-8", "surrogatepass")) <= self.most:
            raise MalformedError(f"{where}: not a text of 1 to {self.most} bytes")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
            raise MalformedError(f"{where}: control character in a text")
        if not unicodedata.is_normalized("NFC", value):
            raise MalformedError(f"{where}: text is not in NFC")
        return value

    load = dump


@dataclass(frozen=True, slots=True)
class Uint:
    """A whole number from `least` to `most`."""

    least: int = 0
    most: int = 2**63 - 1

    def dump(self, value: Any, where: str) -> Value:
        if type(value) is not int or not self.least <= value <= self.most:
            raise MalformedError(f"{where}: not a whole number from {self.least} to {self.most}")
        return value

    load = dump


@dataclass(frozen=True, slots=True)
class Seq:
    """A tuple of `least` to `most` items of one shape."""

    item: Shape
    least: int = 0
    most: int = limits.MEMBERS

    def dump(self, value: Any, where: str) -> Value:
        if type(value) is not tuple:
            raise MalformedError(f"{where}: not a tuple")
        return [self.item.dump(item, f"{where}[{number}]") for number, item in enumerate(self._bounded(value, where))]

    def load(self, value: Value, where: str) -> Any:
        if type(value) is not list:
            raise MalformedError(f"{where}: not an array")
        return tuple(
            self.item.load(item, f"{where}[{number}]") for number, item in enumerate(self._bounded(value, where))
        )

    def _bounded(self, value: Any, where: str) -> Any:
        if not self.least <= len(value) <= self.most:
            raise MalformedError(f"{where}: not {self.least} to {self.most} items")
        return value


@dataclass(frozen=True, slots=True)
class Row:
    """A nested array: the fields of the dataclass `kind`, in its order, by `kind.SHAPES`."""

    kind: type[Any]

    def dump(self, value: Any, where: str) -> Value:
        if type(value) is not self.kind:
            raise MalformedError(f"{where}: not a {self.kind.__name__}")
        return _dump_fields(value, where)

    def load(self, value: Value, where: str) -> Any:
        return _load_fields(self.kind, value, where)


class Statement:
    """Base of all statements: a CBOR array with the label first, then the fields in the order of the dataclass.

    `digest` is the SHA-384 of the encoding. Statements are named and compared by it, never by a COSE envelope.
    """

    __slots__ = ()
    LABEL: ClassVar[str]
    SHAPES: ClassVar[tuple[Shape, ...]]
    LIMIT: ClassVar[int] = limits.STATEMENT_BYTES

    def to_bytes(self) -> bytes:
        """The statement's bytes; MalformedError where a field has a wrong shape."""
        return encode([self.LABEL, *_dump_fields(self, type(self).__name__)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The statement in `data`; MalformedError for anything else (stm-1)."""
        value = decode(data, limit=cls.LIMIT)
        if type(value) is not list or not value or value[0] != cls.LABEL:
            raise MalformedError(f"not a statement with the label {cls.LABEL}")
        statement: Self = _load_fields(cls, value[1:], cls.__name__)
        statement.check()
        return statement

    def check(self) -> None:
        """Relations between fields that a shape cannot express; MalformedError."""

    @property
    def digest(self) -> bytes:
        """SHA-384 of the statement's bytes."""
        return sha384(self.to_bytes())


def _dump_fields(value: Any, where: str) -> list[Value]:
    return [
        shape.dump(getattr(value, field.name), f"{where}.{field.name}")
        for field, shape in zip(fields(value), value.SHAPES, strict=True)
    ]


def _load_fields(kind: type[Any], value: Value, where: str) -> Any:
    names = fields(kind)
    if type(value) is not list or len(value) != len(names):
        raise MalformedError(f"{where}: not an array of {len(names)} fields")
    return kind(
        *(shape.load(item, f"{where}.{f.name}") for f, shape, item in zip(names, kind.SHAPES, value, strict=True))
    )
