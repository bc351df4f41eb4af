"""From what people write to an agreement: a plain tree of maps, lists and texts, as YAML gives it when nothing in it is
guessed (`NO`, `012` and `1e5` are texts until the schema says what they are).

Where the tree names a file, `read` gives its content; a byte string may stand there instead of the name, which is how the
canonical form comes through the same checks. All problems are collected, each with its path and line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from itertools import pairwise
from typing import Final, NoReturn, TypeAlias, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from parley_protocol import limits
from parley_protocol.agreement import expression, semantics
from parley_protocol.agreement.expression import ExpressionError, Scope, nearest
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.agreement.model import (
    LANGUAGE,
    Agreement,
    Consent,
    Function,
    Grouping,
    Join,
    JoinKind,
    Measurement,
    Normalise,
    Output,
    OutputKind,
    Platform,
    Rules,
    Session,
    Unit,
    Value,
)
from parley_protocol.agreement.names import RESERVED_MEMBERS, identifier_problem, name_problem, text_problem
from parley_protocol.agreement.schema import (
    NULL_LABEL,
    NUMERIC,
    RANGED,
    Column,
    ColumnRef,
    ColumnType,
    Physical,
    Table,
    physical,
    text_of,
    widest,
)
from parley_protocol.errors import AgreementError, MalformedError, Problem
from parley_protocol.identity import PublicIdentity, load_public

Tree: TypeAlias = "str | bytes | Sequence[Tree] | Mapping[str, Tree]"
"""What people write. Scalars are text; bytes stand for the content of a file."""
Read: TypeAlias = Callable[[str], bytes]
"""The content of a file by its name in the agreement; OSError where it cannot be read."""

DEFAULT_QUORUM: Final = "all"
DEFAULT_DEADLINE_MS: Final = 14 * 86_400_000
DEFAULT_COUNTERSIGN_WITHIN_MS: Final = 86_400_000
DEFAULT_MAX_RELEASES: Final = 1
DEFAULT_COALITION: Final = 1

_HASH: Final = re.compile(r"[0-9a-f]{96}")
_WHOLE: Final = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_DURATION: Final = re.compile(r"([1-9][0-9]{0,11}) (millisecond|second|minute|hour|day|week)s?")
_DURATION_UNITS: Final = {
    "millisecond": 1,
    "second": 1000,
    "minute": 60_000,
    "hour": 3_600_000,
    "day": 86_400_000,
    "week": 7 * 86_400_000,
}
_MEASURE: Final = re.compile(r"([A-Za-z_]+)(?:\(([^()]*)\))?")
_PCRS: Final = ("PCR0", "PCR1", "PCR2", "PCR8")
_T = TypeVar("_T")
_E = TypeVar("_E", bound=StrEnum)


def build(
    tree: Tree,
    read: Read,
    lines: Mapping[str, int] | None = None,
    *,
    measured: Read | None = None,
    most: int = limits.AGREEMENT_PROBLEMS,
) -> Agreement:
    """The agreement that `tree` describes; AgreementError with all problems, but no more than `most`.

    `lines`: path of a field -> its line (1..). `measured`: what nitro-cli prints of the file that a measurement names, for
    those who can measure an image themselves (MalformedError where it is a bad one); otherwise `read` gives just that.
    """
    builder = _Builder(read, measured or read, lines or {}, most)
    try:
        agreement = builder.agreement(_Node("", tree))
    except (_BadError, _EnoughError):
        raise AgreementError(builder.problems) from None
    if builder.problems:
        raise AgreementError(builder.problems)
    return agreement


class _BadError(Exception):
    """A part that cannot be built; the problem is on the list already."""


class _EnoughError(Exception):
    """As many problems as anybody reads: hostile input must not be able to ask for more work."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A place in the tree."""

    path: str
    value: Tree = field(repr=False)

    def at(self, key: str, value: Tree) -> _Node:
        return _Node(f"{self.path}.{key}" if self.path else key, value)


class _Builder:
    def __init__(self, read: Read, measured: Read, lines: Mapping[str, int], most: int) -> None:
        self.read = read
        self.read_measured = measured
        self.most = most
        self.lines = lines
        self.problems: list[Problem] = []
        self.members: dict[str, PublicIdentity] = {}
        self.groups: dict[str, tuple[str, ...]] = {}

    # Problems

    def report(self, path: str, message: str) -> None:
        place = path
        while place and place not in self.lines:
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        problem = Problem(path or "agreement", self.lines.get(place), message)
        if problem not in self.problems:
            self.problems.append(problem)
        if len(self.problems) >= self.most:
            raise _EnoughError

    def bad(self, node: _Node, message: str) -> NoReturn:
        self.report(node.path, message)
        raise _BadError

    @contextmanager
    def part(self) -> Iterator[None]:
        """A part whose problems do not keep the next parts from being read."""
        with suppress(_BadError):
            yield

    def attempt(self, make: Callable[[], _T]) -> _T | None:
        try:
            return make()
        except _BadError:
            return None

    def judge(self, found: semantics.Found) -> None:
        for path, message in found:
            self.report(path, message)

    # Shapes

    def mapping(self, node: _Node, most: int = limits.MEMBERS) -> dict[str, _Node]:
        if not isinstance(node.value, Mapping):
            self.bad(node, f"is {_shape(node.value)}, not a map of names to values")
        if len(node.value) > most:
            self.bad(node, f"has {len(node.value)} entries, more than {most}")
        result: dict[str, _Node] = {}
        for key, value in node.value.items():
            if not isinstance(key, str):
                self.bad(node, "has a key that is not text")
            result[key] = node.at(key, value)
        return result

    def fields(self, node: _Node, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, _Node]:
        """The fields of a map with these keys and no others; all problems of the keys are reported at once."""
        found = self.mapping(node)
        known = (*required, *optional)
        complete = True
        for key, item in found.items():
            if key not in known:
                self.report(item.path, f"unknown key{nearest(key, known) or ': allowed are ' + ', '.join(known)}")
                complete = False
        for key in required:
            if key not in found:
                self.report(f"{node.path}.{key}" if node.path else key, "is missing")
                complete = False
        if not complete and not set(required) <= set(found):
            raise _BadError
        return {key: item for key, item in found.items() if key in known}

    def items(self, node: _Node) -> list[_Node]:
        if not isinstance(node.value, list | tuple):
            self.bad(node, f"is {_shape(node.value)}, not a list")
        return [_Node(f"{node.path}[{number}]", value) for number, value in enumerate(node.value)]

    def one_or_more(self, node: _Node) -> list[_Node]:
        return [node] if isinstance(node.value, str | bytes) else self.items(node)

    def text(self, node: _Node) -> str:
        if type(node.value) is not str:
            self.bad(node, f"is {_shape(node.value)}, not a text")
        return node.value

    def named(self, node: _Node, problem: Callable[[str], str | None] = text_problem) -> str:
        text = self.text(node)
        wrong = problem(text)
        if wrong is not None:
            self.bad(node, wrong)
        return text

    def keys(self, nodes: Mapping[str, _Node], problem: Callable[[str], str | None]) -> Iterator[tuple[str, _Node]]:
        """The items of a map whose keys are names; those with a bad name are reported and left out."""
        for key, node in nodes.items():
            wrong = problem(key)
            if wrong is None:
                yield key, node
            else:
                self.report(node.path, f"the name {wrong}")

    def whole(self, node: _Node, low: int, high: int) -> int:
        text = self.text(node)
        if not _WHOLE.fullmatch(text) or text == "-0":
            self.bad(node, f"{_quoted(text)} is not a whole number")
        number = int(text)
        if not low <= number <= high:
            self.bad(node, f"{number} is not {low} to {high}")
        return number

    def truth(self, node: _Node) -> bool:
        text = self.text(node)
        if text not in ("true", "false"):
            self.bad(node, f"{_quoted(text)} is neither true nor false")
        return text == "true"

    def choice(self, node: _Node, kind: type[_E]) -> _E:
        text = self.text(node)
        names = [str(item) for item in kind]
        if text not in names:
            self.bad(node, f"{_quoted(text)} is none of {', '.join(names)}{nearest(text, names)}")
        return kind(text)

    def day(self, node: _Node) -> date:
        text = self.text(node)
        try:
            number = physical(ColumnType.DATE, text)
        except ValueError as error:
            self.bad(node, f"{_quoted(text)} {error}")
        day = date.fromisoformat(text_of(ColumnType.DATE, number))
        if not 2000 <= day.year <= 9998:
            self.bad(node, f"{_quoted(text)} is not a day of the years 2000 to 9998")
        return day

    def duration(self, node: _Node) -> int:
        text = self.text(node)
        found = _DURATION.fullmatch(text)
        if found is None:
            self.bad(node, f"{_quoted(text)} is not a duration such as '14 days', '2 hours' or '30 seconds'")
        milliseconds = int(found[1]) * _DURATION_UNITS[found[2]]
        if not 1000 <= milliseconds <= limits.DURATION_MS:
            self.bad(node, f"{text} is not within 1 second and {limits.DURATION_MS // 86_400_000} days")
        return milliseconds

    def hash(self, node: _Node) -> bytes:
        if type(node.value) is bytes and len(node.value) == 48:
            return node.value
        text = self.text(node)
        if not _HASH.fullmatch(text):
            self.bad(node, "is not a digest: 96 hexadecimal digits in lower case")
        return bytes.fromhex(text)

    def file(self, node: _Node, name: str, read: Read | None = None) -> bytes:
        try:
            data = (read or self.read)(name)
        except MalformedError as error:
            self.bad(node, f"{_quoted(name)}: {error.message}")
        except OSError as error:
            self.bad(node, f"{_quoted(name)} cannot be read: {error.strerror or 'no such file'}")
        if len(data) > limits.REFERENCED_FILE_BYTES:
            self.bad(node, f"{_quoted(name)} has more than {limits.REFERENCED_FILE_BYTES} bytes")
        return data

    # Members

    def member_names(self, node: _Node) -> tuple[str, ...]:
        """A member, a group, or a list of them: the members, each once, in the agreement's order."""
        chosen: set[str] = set()
        complete = True
        for item in self.one_or_more(node):
            name = self.attempt(lambda item=item: self.text(item))  # type: ignore[misc]
            if name is None:
                complete = False
                continue
            if name not in self.members and name not in self.groups:
                self.report(
                    item.path, f"no member or group {_quoted(name)}{nearest(name, [*self.members, *self.groups])}"
                )
                complete = False
                continue
            for member in self.groups.get(name, (name,)):
                if member in chosen:
                    self.report(item.path, f"{member} is there twice")
                    complete = False
                chosen.add(member)
        if not complete:
            raise _BadError
        return tuple(member for member in self.members if member in chosen)

    def read_members(self, node: _Node) -> None:
        complete = True
        for name, item in self.keys(self.mapping(node), name_problem):
            if name in RESERVED_MEMBERS:
                self.report(item.path, "is a word of the language: name the member otherwise")
                continue
            identity = self.attempt(lambda item=item: self.identity(item))  # type: ignore[misc]
            if identity is None:
                complete = False
            else:
                self.members[name] = identity
        if not complete:
            # References to members whose key is not there would be reported as unknown members.
            raise _BadError
        self.judge(semantics.of_members(self.members))

    def identity(self, node: _Node) -> PublicIdentity:
        try:
            if type(node.value) is bytes:
                return PublicIdentity.from_bytes(node.value)
            name = self.text(node)
            return load_public(self.file(node, name))
        except MalformedError as error:
            self.bad(node, f"is not the file of a public identity: {error.message}")

    def read_groups(self, node: _Node) -> None:
        complete = True
        for name, item in self.keys(self.mapping(node), name_problem):
            if name in RESERVED_MEMBERS or name in self.members:
                taken = "a member" if name in self.members else "a word of the language"
                self.report(item.path, f"is the name of {taken}")
                continue
            chosen: list[str] = []
            for entry in self.attempt(lambda item=item: self.one_or_more(item)) or ():  # type: ignore[misc]
                member = entry.value
                if type(member) is not str or member not in self.members:
                    hint = nearest(member, self.members) if type(member) is str else ""
                    self.report(entry.path, f"no member {_quoted(str(member))}{hint}")
                    complete = False
                elif member in chosen:
                    self.report(entry.path, f"{member} is there twice")
                else:
                    chosen.append(member)
            if not chosen:
                self.report(item.path, "is empty")
            self.groups[name] = tuple(member for member in self.members if member in chosen)
        if not complete:
            raise _BadError

    # Platform

    def root(self, node: _Node) -> bytes:
        if type(node.value) is bytes:
            if len(node.value) != 32:
                self.bad(node, "is not a SHA-256")
            return node.value
        data = self.file(node, self.text(node))
        try:
            certificate = x509.load_pem_x509_certificate(data)
        except ValueError:
            self.bad(node, "is not a certificate in PEM")
        return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()

    def measurements(self, node: _Node) -> tuple[Measurement, ...]:
        return tuple(self.measurement(item) for item in self.one_or_more(node))

    def measurement(self, node: _Node) -> Measurement:
        if isinstance(node.value, str):
            return self.registers(node, self.measured(node, node.value), None)
        if isinstance(node.value, bytes):
            self.bad(node, "is a byte string, not a file or a map")
        found = self.mapping(node)
        until = self.day(found["until"]) if "until" in found else None
        if "file" in found:
            self.fields(node, ("file",), ("until",))
            return self.registers(node, self.measured(node, self.text(found["file"])), until)
        self.fields(node, _PCRS[:3], ("PCR8", "until"))
        return self.registers(node, {key: item.value for key, item in found.items() if key != "until"}, until)

    def measured(self, node: _Node, name: str) -> dict[str, object]:
        try:
            value = json.loads(self.file(node, name, self.read_measured).decode())
        except (ValueError, RecursionError):
            self.bad(node, f"{_quoted(name)} is neither an image nor JSON")
        if isinstance(value, dict) and isinstance(value.get("Measurements"), dict):
            value = value["Measurements"]
        if not isinstance(value, dict):
            self.bad(node, f"{_quoted(name)} holds no measurements")
        return {key: item for key, item in value.items() if key in _PCRS}

    def registers(self, node: _Node, found: Mapping[str, object], until: date | None) -> Measurement:
        values: dict[str, bytes] = {}
        for name, item in found.items():
            if name not in _PCRS:
                continue
            if isinstance(item, bytes) and len(item) == limits.PCR_BYTES:
                values[name] = item
            elif isinstance(item, str) and _HASH.fullmatch(item.lower()):
                values[name] = bytes.fromhex(item)
            else:
                self.bad(node, f"{name} is not 96 hexadecimal digits")
        missing = [name for name in _PCRS[:3] if name not in values]
        if missing:
            self.bad(node, f"{missing[0]} is missing: PCR0, PCR1 and PCR2 fix an image only together")
        return Measurement(values["PCR0"], values["PCR1"], values["PCR2"], values.get("PCR8"), until)

    # Tables

    def tables(self, node: _Node) -> dict[str, Table]:
        made = {
            name: self.attempt(lambda name=name, item=item: self.table(name, item))  # type: ignore[misc]
            for name, item in self.keys(self.mapping(node, limits.TABLES), identifier_problem)
        }
        if not made:
            self.bad(node, "none: there is no party")
        return self.complete(made)

    def complete(self, made: Mapping[str, _T | None]) -> dict[str, _T]:
        complete = {name: item for name, item in made.items() if item is not None}
        if len(complete) != len(made):
            raise _BadError
        return complete

    def table(self, name: str, node: _Node) -> Table:
        found = self.fields(node, ("from", "key", "rows_per_unit", "columns"))
        parties = self.attempt(lambda: self.member_names(found["from"]))
        key = self.attempt(lambda: self.named(found["key"]))
        rows = self.attempt(lambda: self.whole(found["rows_per_unit"], 1, limits.ROWS_PER_UNIT))
        columns = self.attempt(lambda: self.columns(found["columns"], key))
        if parties is None or key is None or rows is None or columns is None:
            raise _BadError
        return Table(name, parties, key, rows, tuple(columns.values()))

    def columns(self, node: _Node, key: str | None) -> dict[str, Column]:
        made: dict[str, Column | None] = {}
        for name, item in self.keys(self.mapping(node, limits.COLUMNS), identifier_problem):
            if name == key:
                self.report(item.path, "is the key, which stands in every table by itself")
                continue
            made[name] = self.attempt(lambda name=name, item=item: self.column(name, item))  # type: ignore[misc]
        return self.complete(made)

    def column(self, name: str, node: _Node) -> Column:
        found = self.fields(node, ("type",), ("min", "max", "null", "scale", "in", "values", "values_file"))
        kind = self.choice(found["type"], ColumnType)
        allowed = ["type", "null"]
        if kind in RANGED:
            allowed += ["min", "max"]
        if kind in NUMERIC:
            allowed.append("in")
        if kind is ColumnType.DECIMAL:
            allowed.append("scale")
        if kind is ColumnType.CATEGORY:
            allowed += ["values", "values_file"]
        wrong = [item for key, item in found.items() if key not in allowed]
        for item in wrong:
            self.report(item.path, f"a {kind} has no such property")
        null = self.truth(found["null"]) if "null" in found else False
        scale = self.whole(found["scale"], 0, limits.DECIMAL_SCALE) if "scale" in found else 0
        unit = self.named(found["in"]) if "in" in found else None
        values = self.domain(node, found) if kind is ColumnType.CATEGORY else ()
        low, high = self.bounds(node, found, kind, scale) if kind in RANGED else (None, None)
        if wrong:
            raise _BadError
        return Column(name, kind, null, low, high, scale, unit, values)

    def bounds(
        self, node: _Node, found: Mapping[str, _Node], kind: ColumnType, scale: int
    ) -> tuple[Physical, Physical]:
        if kind is ColumnType.FLOAT:
            for key in ("min", "max"):
                if key not in found:
                    self.report(f"{node.path}.{key}", "is missing: a float needs its range")
            if not {"min", "max"} <= set(found):
                raise _BadError
            low = high = 0.0
        else:
            low, high = widest(kind)
        if "min" in found:
            low = self.bound(found["min"], kind, scale)
        if "max" in found:
            high = self.bound(found["max"], kind, scale)
        if high < low:
            texts = [
                self.text(found[key]) if key in found else text_of(kind, value, scale)
                for key, value in (("min", low), ("max", high))
            ]
            self.bad(found.get("max", found.get("min", node)), f"{texts[1]} is below min ({texts[0]})")
        return low, high

    def bound(self, node: _Node, kind: ColumnType, scale: int) -> Physical:
        text = self.text(node)
        try:
            return physical(kind, text, scale)
        except ValueError as error:
            self.bad(node, f"{_quoted(text)} {error}")

    def domain(self, node: _Node, found: Mapping[str, _Node]) -> tuple[str, ...]:
        if ("values" in found) is ("values_file" in found):
            self.bad(node, "a category needs its values, or a values_file with one in each line, not both")
        if "values" in found:
            entries = [(item, self.text(item)) for item in self.items(found["values"])]
        else:
            place = found["values_file"]
            try:
                text = self.file(place, self.text(place)).decode("utf-8-sig")
            except UnicodeDecodeError:
                self.bad(place, "is not a text in UTF-8")
            entries = [(place, line) for line in text.splitlines() if line.strip()]
            found = {"values": place}
        if not entries:
            self.bad(found["values"], "none: a category has at least one value")
        if len(entries) > limits.CATEGORY_VALUES:
            self.bad(found["values"], f"more than {limits.CATEGORY_VALUES} values")
        seen: set[str] = set()
        complete = True
        for item, value in entries:
            wrong = text_problem(value)
            if value == NULL_LABEL:
                wrong = "is how nulls are shown: write null: true instead"
            if value in seen:
                wrong = "is there twice"
            if wrong is not None:
                self.report(item.path, f"{_quoted(value)} {wrong}")
                complete = False
            seen.add(value)
        if not complete:
            raise _BadError
        return tuple(value for _, value in entries)

    # Outputs

    def outputs(self, node: _Node, tables: Mapping[str, Table]) -> dict[str, Output]:
        made = {
            name: self.attempt(lambda name=name, item=item: self.output(name, item, tables))  # type: ignore[misc]
            for name, item in self.keys(self.mapping(node, limits.OUTPUTS), name_problem)
        }
        return self.complete(made)

    def output(self, name: str, node: _Node, tables: Mapping[str, Table]) -> Output:
        found = self.fields(node, ("from", "values", "to"), ("kind", "join", "where", "by"))
        kind = self.choice(found["kind"], OutputKind) if "kind" in found else OutputKind.AGGREGATE
        recipients = self.attempt(lambda: self.member_names(found["to"]))
        table = self.table_name(found["from"], self.text(found["from"]), tables)
        joins = self.joins(found["join"], tables) if "join" in found else ()
        left = {join.table for join in joins if join.kind is JoinKind.LEFT}
        scope = Scope([(table, False), *((tables[join.table], join.table in left) for join in joins)])
        where = self.attempt(lambda: self.where(found["where"], scope)) if "where" in found else None
        known = frozenset[ColumnRef]() if where is None else where.never_null
        by = self.attempt(lambda: self.by(found["by"], scope, known)) if "by" in found else {}
        values = self.attempt(lambda: self.values(found["values"], scope))
        if recipients is None or by is None or values is None or (where is None and "where" in found):
            raise _BadError
        for both in set(by) & set(values):
            self.bad(found["values"].at(both, ""), "is the name of a `by` column of this output")
        return Output(name, kind, table.name, joins, where, tuple(by.values()), tuple(values.values()), recipients)

    def table_name(self, node: _Node, name: str, tables: Mapping[str, Table]) -> Table:
        if name not in tables:
            self.bad(node, f"no table {_quoted(name)}{nearest(name, tables)}")
        return tables[name]

    def joins(self, node: _Node, tables: Mapping[str, Table]) -> tuple[Join, ...]:
        return tuple(
            Join(self.table_name(item, name, tables).name, self.choice(item, JoinKind))
            for name, item in self.mapping(node).items()
        )

    def where(self, node: _Node, scope: Scope) -> expression.Expression:
        text = " ".join(self.text(node).split())
        wrong = text_problem(text, 4 * limits.EXPRESSION_CHARACTERS)
        if wrong is not None:
            self.bad(node, wrong)
        try:
            return expression.parse(text, scope)
        except ExpressionError as error:
            self.bad(node, f"{error.message}, at character {error.offset + 1} of {_quoted(text)}")

    def by(self, node: _Node, scope: Scope, known: frozenset[ColumnRef]) -> dict[str, Grouping]:
        return self.complete(
            {
                name: self.attempt(lambda name=name, item=item: self.grouping(name, item, scope, known))  # type: ignore[misc]
                for name, item in self.keys(self.mapping(node, limits.BY_COLUMNS), name_problem)
            }
        )

    def grouping(self, name: str, node: _Node, scope: Scope, known: frozenset[ColumnRef]) -> Grouping:
        """`known`: columns that the output's `where` lets through only where they are not null."""
        if isinstance(node.value, str):
            ref = self.column_ref(node, node.value, scope)
            column = ref.column
            if column.type is ColumnType.BOOL:
                labels: tuple[str, ...] = ("false", "true")
            elif column.type is ColumnType.CATEGORY:
                labels = column.values
            else:
                self.bad(node, f"{ref.text} is a {column.type}: write {{bin: {node.value}, edges: [...]}}")
            return Grouping(name, ref, (), (*labels, *((None,) if ref.nullable and ref not in known else ())))
        found = self.fields(node, ("bin", "edges"), ("labels",))
        ref = self.column_ref(found["bin"], self.text(found["bin"]), scope)
        column = ref.column
        if column.type not in RANGED:
            self.bad(found["bin"], f"{ref.text} is a {column.type}, which has no bins: name the column alone")
        edges = self.edges(found["edges"], column)
        labels = self.labels(found["labels"], len(edges) + 1) if "labels" in found else bin_labels(column, edges)
        return Grouping(name, ref, edges, (*labels, *((None,) if ref.nullable and ref not in known else ())))

    def edges(self, node: _Node, column: Column) -> tuple[Physical, ...]:
        edges: list[Physical] = []
        items = self.items(node)
        if not 1 <= len(items) <= limits.BIN_EDGES:
            self.bad(node, f"{len(items)} edges are not 1 to {limits.BIN_EDGES}")
        assert column.low is not None and column.high is not None
        for item in items:
            edge = self.bound(item, column.type, column.scale)
            if edges and edge <= edges[-1]:
                self.bad(item, f"{self.text(item)} is not above the edge before it")
            if not column.low < edge <= column.high:
                low, high = column.text_of(column.low), column.text_of(column.high)
                self.bad(item, f"{self.text(item)} leaves a bin empty: {column.name} is {low} to {high}")
            edges.append(edge)
        return tuple(edges)

    def labels(self, node: _Node, count: int) -> tuple[str, ...]:
        items = self.items(node)
        if len(items) != count:
            self.bad(node, f"{len(items)} labels for {count} bins")
        labels = tuple(self.named(item) for item in items)
        if len(set(labels)) != count or NULL_LABEL in labels:
            self.bad(node, f"a label is there twice, or is {NULL_LABEL}")
        return labels

    def values(self, node: _Node, scope: Scope) -> dict[str, Value]:
        return self.complete(
            {
                name: self.attempt(lambda name=name, item=item: self.measure(name, item, scope))  # type: ignore[misc]
                for name, item in self.keys(self.mapping(node, limits.COLUMNS), name_problem)
            }
        )

    def measure(self, name: str, node: _Node, scope: Scope) -> Value:
        text = self.text(node)
        found = _MEASURE.fullmatch(text.replace(" ", ""))
        functions = [str(function) for function in Function]
        if found is None:
            self.bad(node, f"{_quoted(text)} is not count, units or a function of a column such as mean(x)")
        if found[1] not in functions:
            self.bad(node, f"no function {_quoted(found[1])}{nearest(found[1], functions)}: {', '.join(functions)}")
        function, column = Function(found[1]), found[2]
        if column is None:
            if function not in (Function.COUNT, Function.UNITS):
                self.bad(node, f"{function} needs a column: {function}(x)")
            return Value(name, function)
        if function is Function.UNITS:
            self.bad(node, "units takes no column: it counts distinct units")
        ref = self.column_ref(node, column, scope)
        if function is not Function.COUNT and ref.column.type not in NUMERIC:
            self.bad(node, f"{ref.text} is a {ref.column.type}, which has no {function}")
        return Value(name, function, ref)

    def column_ref(self, node: _Node, text: str, scope: Scope) -> ColumnRef:
        try:
            return scope.resolve_text(text)
        except KeyError as error:
            self.bad(node, str(error.args[0]))

    # Rules and session

    def rules(self, node: _Node) -> tuple[Rules, ...]:
        found = self.mapping(node)
        if "everyone" not in found:
            self.bad(node, "everyone is missing: the rules that hold for all")
        everyone = self.rule(found["everyone"], None)
        special: dict[str, Rules] = {}
        complete = True
        for name, item in found.items():
            if name == "everyone":
                continue
            if name not in self.members and name not in self.groups:
                self.report(
                    item.path, f"no member or group {_quoted(name)}{nearest(name, [*self.members, *self.groups])}"
                )
                complete = False
                continue
            for member in self.groups.get(name, (name,)):
                if member in special:
                    self.report(item.path, f"{member} has rules already")
                rule = self.attempt(lambda item=item, member=member: self.rule(item, member, everyone))  # type: ignore[misc]
                if rule is None:
                    complete = False
                    break
                special[member] = rule
        if not complete:
            raise _BadError
        return (everyone, *(special[member] for member in self.members if member in special))

    def rule(self, node: _Node, member: str | None, base: Rules | None = None) -> Rules:
        required = ("min_units", "min_parties") if base is None else ()
        optional = ("coalition",) if base is None else ("min_units", "min_parties", "coalition")
        found = self.fields(node, required, optional)
        if not found:
            self.bad(node, "asks nothing")
        coalition: int | None = DEFAULT_COALITION if base is None else base.coalition
        if "coalition" in found:
            text = self.text(found["coalition"])
            coalition = None if text == "all" else self.whole(found["coalition"], 0, limits.MEMBERS)
        units = self.whole(found["min_units"], 0, limits.INT_BOUND) if "min_units" in found else None
        parties = self.whole(found["min_parties"], 0, limits.MEMBERS) if "min_parties" in found else None
        if units is None:
            units = base.min_units if base is not None else 0
        if parties is None:
            parties = base.min_parties if base is not None else 0
        return Rules(member, units, parties, coalition)

    def session(self, node: _Node, parties: int) -> Session:
        found = self.fields(node, ("start",), ("quorum", "deadline", "countersign_within", "max_releases", "consent"))
        quorum = self.text(found["quorum"]) if "quorum" in found else DEFAULT_QUORUM
        return Session(
            start=self.member_names(found["start"]),
            quorum=parties if quorum == "all" else self.whole(found["quorum"], 0, limits.MEMBERS),
            deadline_ms=self.duration(found["deadline"]) if "deadline" in found else DEFAULT_DEADLINE_MS,
            countersign_within_ms=(
                self.duration(found["countersign_within"])
                if "countersign_within" in found
                else DEFAULT_COUNTERSIGN_WITHIN_MS
            ),
            max_releases=(
                self.whole(found["max_releases"], 1, limits.RELEASES)
                if "max_releases" in found
                else DEFAULT_MAX_RELEASES
            ),
            consent=self.choice(found["consent"], Consent) if "consent" in found else Consent.ROSTER,
        )

    def kms(self, node: _Node) -> dict[str, KeyArn]:
        found: dict[str, KeyArn] = {}
        complete = True
        for name, item in self.mapping(node).items():
            if name not in self.members:
                self.report(item.path, f"no member {_quoted(name)}{nearest(name, self.members)}")
                complete = False
                continue
            key = self.attempt(lambda item=item: self.key_arn(item))  # type: ignore[misc]
            if key is None:
                complete = False
            else:
                found[name] = key
        if not complete:
            raise _BadError
        return {name: found[name] for name in self.members if name in found}

    def key_arn(self, node: _Node) -> KeyArn:
        text = self.text(node)
        try:
            return KeyArn.parse(text)
        except ValueError as error:
            self.bad(node, f"{text if len(text) <= 120 else text[:117] + '...'} {error}")

    def unit(self, node: _Node) -> Unit:
        found = self.fields(node, ("name",), ("normalise",))
        normalise = self.choice(found["normalise"], Normalise) if "normalise" in found else Normalise.EXACT
        return Unit(self.named(found["name"], name_problem), normalise)

    # The whole

    def agreement(self, node: _Node) -> Agreement:
        required = (
            "parley",
            "version",
            "title",
            "purpose",
            "expires",
            "platform",
            "measurements",
            "members",
            "unit",
            "tables",
            "outputs",
            "rules",
            "session",
        )
        found = self.optional_fields(node, required, ("replaces", "series", "root", "groups", "kms"))
        with self.part():
            if "parley" in found and self.text(found["parley"]) != str(LANGUAGE):
                self.bad(found["parley"], f"this program knows version {LANGUAGE} of the language")
        version = self.get(found, "version", lambda item: self.whole(item, 1, limits.VERSIONS))
        replaces = self.get(found, "replaces", self.hash)
        series = self.get(found, "series", self.hash)
        if version == 2 and series is None and "series" not in found:
            series = replaces
        if version is not None and all(
            name not in found or value is not None for name, value in (("replaces", replaces), ("series", series))
        ):
            self.judge(semantics.of_versions(version, replaces, series))
        title = self.get(found, "title", lambda item: self.named(item, name_problem))
        purpose = self.get(found, "purpose", self.purpose)
        expires = self.get(found, "expires", self.day)
        platform = self.get(found, "platform", lambda item: self.choice(item, Platform))
        root = self.get(found, "root", self.root)
        measurements = self.get(found, "measurements", self.measurements)
        if platform is not None and measurements is not None and (root is not None or "root" not in found):
            self.judge(semantics.of_platform(str(platform), root, measurements))
        unit = self.get(found, "unit", self.unit)
        session = rules = tables = outputs = None
        kms: dict[str, KeyArn] | None = {}
        with self.part():
            if "members" in found:
                self.read_members(found["members"])
                if "groups" in found:
                    self.read_groups(found["groups"])
                tables = self.get(found, "tables", self.tables)
                rules = self.get(found, "rules", self.rules)
                parties = len({party for table in (tables or {}).values() for party in table.parties})
                session = self.get(found, "session", lambda item: self.session(item, parties))
                if session is not None:
                    self.judge(semantics.of_session(session, parties))
                if "kms" in found:
                    kms = self.get(found, "kms", self.kms)
                    if kms is not None and tables is not None:
                        self.judge(semantics.of_kms(kms, tables))
                if tables is not None:
                    known = tables
                    outputs = self.get(found, "outputs", lambda item: self.outputs(item, known))
                if tables is not None and outputs is not None:
                    self.judge(semantics.of_tables(tables, outputs))
                    self.judge(semantics.of_outputs(outputs, tables))
                if rules is not None:
                    self.judge(semantics.of_rules(rules, outputs or {}, tables or {}))
        if (
            self.problems
            or version is None
            or title is None
            or purpose is None
            or expires is None
            or platform is None
            or measurements is None
            or unit is None
            or tables is None
            or outputs is None
            or rules is None
            or session is None
            or kms is None
        ):
            raise _BadError
        return Agreement(
            version=version,
            series_digest=series,
            replaces=replaces,
            title=title,
            purpose=purpose,
            expires=expires,
            platform=platform,
            root_sha256=root,
            measurements=measurements,
            members=self.members,
            groups=self.groups,
            unit=unit,
            tables=tables,
            outputs=outputs,
            rules=rules,
            session=session,
            kms=kms,
        )

    def optional_fields(self, node: _Node, required: Sequence[str], optional: Sequence[str]) -> dict[str, _Node]:
        """`fields`, but what is there is read even where something is missing."""
        found = self.mapping(node)
        with self.part():
            self.fields(node, required, optional)
        return {key: item for key, item in found.items() if key in (*required, *optional)}

    def get(self, found: Mapping[str, _Node], name: str, make: Callable[[_Node], _T]) -> _T | None:
        return self.attempt(lambda: make(found[name])) if name in found else None

    def purpose(self, node: _Node) -> str:
        text = " ".join(self.text(node).split())
        wrong = text_problem(text, limits.TEXT_BYTES)
        if wrong is not None:
            self.bad(node, wrong)
        return text


def bin_labels(column: Column, edges: Sequence[Physical]) -> tuple[str, ...]:
    """What bins are called where the author says nothing: "before 1994", "1994 to 2003", "2004 and later" for whole numbers
    and days, "below 1.5", "1.5 to below 3", "3 and above" for what has no next value."""
    texts = [column.text_of(edge) for edge in edges]
    if column.type in (ColumnType.INT, ColumnType.DATE):
        middle = [
            first if after - 1 == edge else f"{first} to {column.text_of(after - 1)}"
            for first, edge, after in zip(texts, edges, edges[1:], strict=False)
        ]
        return (f"before {texts[0]}", *middle, f"{texts[-1]} and later")
    middle = [f"{first} to below {second}" for first, second in pairwise(texts)]
    return (f"below {texts[0]}", *middle, f"{texts[-1]} and above")


def _shape(value: object) -> str:
    if isinstance(value, str):
        return "a text"
    if isinstance(value, Mapping):
        return "a map"
    if isinstance(value, bytes):
        return "a byte string"
    if isinstance(value, Sequence):
        return "a list"
    return "empty" if value is None else "of an unknown type"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
