"""The agreement: who, what, which image, which outputs to whom, under which rules.

Agreements are made by `source.build` (from what people write) and `canonical.parse` (from what members signed), both with
all checks of `semantics`. All names are resolved: groups into members, columns into references, bounds into values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from parley_protocol.agreement import expression
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.agreement.schema import Column, ColumnRef, ColumnType, Physical, Table
from parley_protocol.encoding import Encodable, encode, sha384
from parley_protocol.identity import PublicIdentity

__all__ = [
    "LABEL",
    "LANGUAGE",
    "Agreement",
    "Column",
    "ColumnRef",
    "ColumnType",
    "Consent",
    "Function",
    "Grouping",
    "Join",
    "JoinKind",
    "KeyArn",
    "Measurement",
    "Normalise",
    "Output",
    "OutputKind",
    "Platform",
    "Rules",
    "Session",
    "Table",
    "Unit",
    "Value",
    "effective",
    "end_of_day_ms",
]

LABEL: Final = "parley/1/agreement"
LANGUAGE: Final = 1
"""The version of the language that `parley: 1` names."""


class Platform(StrEnum):
    """Who vouches for the enclave: AWS's root, or a root made on the spot that protects nothing."""

    SIMULATED = "simulated"
    NITRO = "nitro"


class Normalise(StrEnum):
    """What is done to an identifier before it is hashed to a unit key."""

    EXACT = "exact"
    CASEFOLD = "casefold"
    EMAIL = "email"
    PHONE = "phone"
    DIGITS = "digits"


class Consent(StrEnum):
    """Whether every included party countersigns each roster, or agreed beforehand."""

    ROSTER = "roster"
    STANDING = "standing"


class JoinKind(StrEnum):
    """Rows of `from` without a row in the joined table: dropped, or kept with nulls."""

    INNER = "inner"
    LEFT = "left"


class OutputKind(StrEnum):
    """Kinds of outputs; each is one file of the enclave."""

    AGGREGATE = "aggregate"


class Function(StrEnum):
    """Measures of an aggregate. VARIANCE and STD are of the sample (n - 1)."""

    COUNT = "count"
    UNITS = "units"
    SUM = "sum"
    MEAN = "mean"
    VARIANCE = "variance"
    STD = "std"


def end_of_day_ms(day: date) -> int:
    """The first millisecond (UTC, since the epoch) after `day`."""
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return (start - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1) + 86_400_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """One accepted image: PCR0, 1 and 2 together (48 bytes each), PCR8 where its signer matters, until the end of a day."""

    pcr0: bytes
    pcr1: bytes
    pcr2: bytes
    pcr8: bytes | None = None
    until: date | None = None

    @property
    def until_ms(self) -> int | None:
        """The first millisecond at which it is no longer accepted."""
        return None if self.until is None else end_of_day_ms(self.until)

    def to_value(self) -> Encodable:
        """Its part of the canonical form."""
        form: dict[str, Encodable] = {"PCR0": self.pcr0, "PCR1": self.pcr1, "PCR2": self.pcr2}
        if self.pcr8 is not None:
            form["PCR8"] = self.pcr8
        if self.until is not None:
            form["until"] = self.until.isoformat()
        return form


@dataclass(frozen=True, slots=True)
class Unit:
    """Whom the rules protect, and how identifiers are normalised."""

    name: str
    normalise: Normalise = Normalise.EXACT


@dataclass(frozen=True, slots=True)
class Join:
    """A table joined on the unit's key; it has one row per unit and one party."""

    table: str
    kind: JoinKind


@dataclass(frozen=True, slots=True)
class Grouping:
    """One `by` column. Without `edges` the values are a category's (code c at index c - 1) or false, true; with them the
    index is the number of edges that are not above the value. `labels` are all values in order; the last is None when the
    column may be null in the rows that `where` keeps, and stands for that."""

    name: str
    ref: ColumnRef
    edges: tuple[Physical, ...]
    labels: tuple[str | None, ...] = field(repr=False)

    @property
    def size(self) -> int:
        """How many values it has, null included."""
        return len(self.labels)

    @property
    def null_index(self) -> int | None:
        """The index of null among the values; None where no kept row has it."""
        return len(self.labels) - 1 if self.labels[-1] is None else None

    def to_value(self) -> Encodable:
        """Its part of the canonical form."""
        form: dict[str, Encodable] = {"name": self.name, "column": self.ref.text}
        if self.edges:
            form["edges"] = [self.ref.column.text_of(edge) for edge in self.edges]
            form["labels"] = [label for label in self.labels if label is not None]
        return form


@dataclass(frozen=True, slots=True)
class Value:
    """One measure: `ref` is None for `count` of rows and for `units`."""

    name: str
    function: Function
    ref: ColumnRef | None = None

    @property
    def type(self) -> str:
        """The type of its column in the output: count, decimal (an exact sum, with the column's scale) or float."""
        if self.function in (Function.COUNT, Function.UNITS):
            return "count"
        exact = self.ref is not None and self.ref.column.type is not ColumnType.FLOAT
        return "decimal" if self.function is Function.SUM and exact else "float"

    @property
    def text(self) -> str:
        """As the canonical form writes it."""
        return str(self.function) if self.ref is None else f"{self.function}({self.ref.text})"


@dataclass(frozen=True, slots=True)
class Output:
    """A named computation: `table` is its `from`, `recipients` are in the members' order and all get the same."""

    name: str
    kind: OutputKind
    table: str
    joins: tuple[Join, ...]
    where: expression.Expression | None
    by: tuple[Grouping, ...]
    values: tuple[Value, ...]
    recipients: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Rows of the output: every combination of the values of `by`, the last one running fastest."""
        return math.prod(grouping.size for grouping in self.by)

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables it reads, its own first."""
        return (self.table, *(join.table for join in self.joins))

    @property
    def refs(self) -> tuple[ColumnRef, ...]:
        """The columns it reads, each once."""
        found: dict[ColumnRef, None] = {}
        for ref in self._refs():
            found[ref] = None
        return tuple(found)

    def _refs(self) -> Iterator[ColumnRef]:
        yield from (grouping.ref for grouping in self.by)
        yield from (value.ref for value in self.values if value.ref is not None)
        if self.where is not None:
            yield from self.where.refs

    def to_value(self) -> Encodable:
        """Its part of the canonical form."""
        form: dict[str, Encodable] = {
            "name": self.name,
            "kind": str(self.kind),
            "from": self.table,
            "join": [[join.table, str(join.kind)] for join in self.joins],
            "by": [grouping.to_value() for grouping in self.by],
            "values": [[value.name, value.text] for value in self.values],
            "to": list(self.recipients),
        }
        if self.where is not None:
            form["where"] = self.where.text
        return form


@dataclass(frozen=True, slots=True)
class Rules:
    """What a value needs to be shown: `member` demands it (None: everyone). `min_units` distinct units and `min_parties`
    contributing parties of the output's own table, still so without the rows of any `coalition` of these parties;
    `coalition` None is `all`: each contributing party has no unit of its own or at least `min_units`."""

    member: str | None
    min_units: int
    min_parties: int
    coalition: int | None = 1

    @property
    def parties_needed(self) -> int:
        """How many parties must contribute before anything can be shown."""
        return self.min_parties + (self.coalition or 0)

    def to_value(self) -> Encodable:
        """Its part of the canonical form."""
        coalition = "all" if self.coalition is None else self.coalition
        return {"min_units": self.min_units, "min_parties": self.min_parties, "coalition": coalition}


@dataclass(frozen=True, slots=True)
class Session:
    """How a session runs: who may close the inputs, how many parties it needs, times in milliseconds after the offer and
    after the roster, releases over all versions of the series."""

    start: tuple[str, ...]
    quorum: int
    deadline_ms: int
    countersign_within_ms: int
    max_releases: int
    consent: Consent

    def to_value(self) -> Encodable:
        """Its part of the canonical form."""
        form: dict[str, Encodable] = {
            "start": list(self.start),
            "quorum": self.quorum,
            "deadline": self.deadline_ms,
            "countersign_within": self.countersign_within_ms,
            "max_releases": self.max_releases,
            "consent": str(self.consent),
        }
        return form


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """An agreement that has passed every check; AgreementError where it would not."""

    version: int
    series_digest: bytes | None
    replaces: bytes | None
    title: str
    purpose: str
    expires: date
    platform: Platform
    root_sha256: bytes | None
    measurements: tuple[Measurement, ...]
    members: Mapping[str, PublicIdentity]
    groups: Mapping[str, tuple[str, ...]]
    unit: Unit
    tables: Mapping[str, Table]
    outputs: Mapping[str, Output]
    rules: tuple[Rules, ...]
    session: Session
    kms: Mapping[str, KeyArn] = field(default_factory=dict)
    """The KMS key of each party that keeps its content keys under one."""
    canonical: bytes = field(init=False, repr=False)
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        from parley_protocol.agreement import semantics

        for name in ("members", "groups", "tables", "outputs", "kms"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        semantics.check(self)
        object.__setattr__(self, "canonical", encode([LABEL, self.to_value()]))
        object.__setattr__(self, "digest", sha384(self.canonical))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Agreement) and other.canonical == self.canonical

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def series(self) -> bytes:
        """The digest of version 1: what names an agreement and its amendments."""
        return self.digest if self.series_digest is None else self.series_digest

    @property
    def expires_ms(self) -> int:
        """The first millisecond at which it is over: after the end of `expires`, UTC."""
        return end_of_day_ms(self.expires)

    @property
    def parties(self) -> tuple[str, ...]:
        """The members that bring tables, in the members' order."""
        bringing = {party for table in self.tables.values() for party in table.parties}
        return tuple(member for member in self.members if member in bringing)

    @property
    def recipients(self) -> tuple[str, ...]:
        """The members that receive an output, in the members' order."""
        receiving = {member for output in self.outputs.values() for member in output.recipients}
        return tuple(member for member in self.members if member in receiving)

    @property
    def quorum(self) -> int:
        """How many parties a roster needs."""
        return self.session.quorum

    def tables_of(self, party: str) -> tuple[str, ...]:
        """The names of the tables that `party` brings, sorted by name: the order of its uploads in a join."""
        return tuple(sorted(name for name, table in self.tables.items() if party in table.parties))

    def to_value(self) -> Encodable:
        """The canonical form before it is encoded: defaults filled in, groups and references resolved."""
        form: dict[str, Encodable] = {
            "parley": LANGUAGE,
            "version": self.version,
            "title": self.title,
            "purpose": self.purpose,
            "expires": self.expires.isoformat(),
            "platform": str(self.platform),
            "measurements": [measurement.to_value() for measurement in self.measurements],
            "members": [[name, member.to_bytes()] for name, member in self.members.items()],
            "groups": [[name, list(members)] for name, members in self.groups.items()],
            "unit": {"name": self.unit.name, "normalise": str(self.unit.normalise)},
            "tables": [table.to_value() for table in self.tables.values()],
            "outputs": [output.to_value() for output in self.outputs.values()],
            "rules": [[rules.member or "everyone", rules.to_value()] for rules in self.rules],
            "session": self.session.to_value(),
        }
        if self.series_digest is not None:
            form["series"] = self.series_digest
        if self.replaces is not None:
            form["replaces"] = self.replaces
        if self.root_sha256 is not None:
            form["root"] = self.root_sha256
        if self.kms:
            form["kms"] = [[name, self.kms[name].text] for name in self.members if name in self.kms]
        return form


def effective(agreement: Agreement) -> tuple[Rules, ...]:
    """The rules that a value must pass, all of them, each once: everyone's first, then those of members that ask more."""
    found: dict[tuple[int, int, int | None], Rules] = {}
    for rules in agreement.rules:
        found.setdefault((rules.min_units, rules.min_parties, rules.coalition), rules)
    return tuple(found.values())
