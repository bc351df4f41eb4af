"""Releases: a bundle, verified, and the outputs in it that a member can open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from parley.clock import now_ms
from parley.images import AcceptedImage, seen_image
from parley_protocol.bundle import OpenedOutput, VerifiedBundle, open_output, verify_bundle
from parley_protocol.output import DECIMAL_TYPE, LABEL_TYPE, OutputTable
from parley_protocol.transcript import SealedOutput, output_info

if TYPE_CHECKING:
    import pyarrow as pa

    from parley.member import Member


@dataclass(frozen=True, slots=True)
class Output:
    """One output, opened and checked against the commitment in the record. Hidden values are None; nothing is left out."""

    table: OutputTable = field(repr=False)
    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of its columns, those that it is grouped by first."""
        return tuple(column.name for column in self.table.columns)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping for each combination of labels; decimals as Decimal."""
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self._cells(), strict=True)]

    @property
    def shown(self) -> int:
        """Rows in which a value is shown."""
        values = [column.cells for column in self.table.columns if column.type != LABEL_TYPE]
        return sum(any(cell is not None for cell in row) for row in zip(*values, strict=True))

    @property
    def hidden(self) -> Mapping[str, int]:
        """How many values each rule hides; an empty cell counts as one with too few units."""
        return {reason.rule: reason.values for reason in self.table.reasons}

    def to_arrow(self) -> pa.Table:
        """An Arrow table; hidden values and null labels are null."""
        import pyarrow as pa

        return pa.table(dict(zip(self.columns, (pa.array(cells) for cells in self._cells()), strict=True)))

    def to_pandas(self) -> Any:
        """A pandas frame (pandas must be installed)."""
        return self.to_arrow().to_pandas()

    def _cells(self) -> list[list[Any]]:
        return [
            [Decimal(cell) if column.type == DECIMAL_TYPE and isinstance(cell, str) else cell for cell in column.cells]
            for column in self.table.columns
        ]


class Release(Mapping[str, Output]):
    """A verified release. As a mapping: the outputs that are open to its reader, by name."""

    def __init__(
        self, data: bytes, verified: VerifiedBundle, outputs: Mapping[str, tuple[bytes, bytes, OutputTable]]
    ) -> None:
        self.data = data
        self.verified = verified
        self._opened = {name: OpenedOutput(name, salt, plain) for name, (salt, plain, _) in outputs.items()}
        self.outputs: Mapping[str, Output] = MappingProxyType(
            {name: Output(table, name) for name, (_, _, table) in outputs.items()}
        )

    @classmethod
    def read(cls, data: bytes, member: Member | None = None, *, at_ms: int | None = None) -> Release:
        """The release in a bundle, verified offline; `member` opens what is sealed to it, everybody what stands open.

        MalformedError; VerificationError with the step that does not hold.
        """
        verified = verify_bundle(data, now_ms=now_ms() if at_ms is None else at_ms)
        outputs = {
            item.output: (item.salt, item.plaintext, verified.tables[item.output]) for item in verified.bundle.opened
        }
        if member is not None:
            outputs |= _opened(verified, member)
        return cls(data, verified, outputs)

    def __getitem__(self, name: str) -> Output:
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def __repr__(self) -> str:
        return f"Release({self.verified.agreement.title}, record {self.sequence}, {', '.join(self) or 'nothing open'})"

    @property
    def simulated(self) -> bool:
        """Whether no hardware protected anything."""
        return self.verified.simulated

    @property
    def session(self) -> bytes:
        """The session that made it."""
        return self.verified.record.record.session

    @property
    def sequence(self) -> int:
        """Its number in the series, from 1."""
        return self.verified.record.record.body.sequence

    @property
    def image(self) -> AcceptedImage:
        """Which of the agreement's images made it."""
        return seen_image(self.verified.agreement, self.verified.record.document)

    def opened_bundle(self) -> bytes:
        """The bundle with the outputs that are open here standing open in it, for readers who hold no recipient's key."""
        return replace(self.verified.bundle, opened=tuple(self._opened.values())).to_bytes()

    def explain(self) -> str:
        """What was computed on, what is shown and what is hidden, for people."""
        agreement, record = self.verified.agreement, self.verified.record.record
        body = record.body
        lines = [
            f"{agreement.title}, version {agreement.version}, record {body.sequence} of its series",
            f"platform   {'SIMULATED: no hardware protected anything' if self.simulated else str(agreement.platform)}",
            f"image      {self.image}",
            f"inputs     {', '.join(item.party for item in body.inputs)}",
        ]
        if body.absentees:
            lines.append(f"absent     {', '.join(f'{item.party} ({item.reason})' for item in body.absentees)}")
        lines.append(
            f"signed by  {', '.join(self.verified.countersigned) or 'nobody: the agreement has standing consent'}"
        )
        for output in agreement.outputs.values():
            found = self.outputs.get(output.name)
            if found is None:
                lines.append(f"{output.name}: sealed to {', '.join(output.recipients)}")
                continue
            lines.append(f"{output.name}: {found.shown} of {found.table.rows} combinations are shown")
            lines += [f"  {values} values hidden by {rule}" for rule, values in found.hidden.items()]
        return "\n".join(lines)


def _opened(verified: VerifiedBundle, member: Member) -> dict[str, tuple[bytes, bytes, OutputTable]]:
    name = next((n for n, public in verified.agreement.members.items() if public == member.public), None)
    found = {}
    head = verified.record.record.head
    for item in verified.bundle.sealed_to(name) if name is not None else ():
        assert name is not None
        inner = SealedOutput.from_bytes(member.identity.open(item.sealed, output_info(head, item.output, name)))
        table = open_output(verified.record, item.output, inner.salt, inner.plaintext)
        found[item.output] = (inner.salt, inner.plaintext, table)
    return found
