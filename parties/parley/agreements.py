"""Agreements as files: YAML that people write, and `.parley` files that hold the signed form.

YAML is read as version 1.2 with every scalar as text: what `NO`, `012` and `1e5` are, the schema says. Anchors, aliases, tags
and merge keys are refused, since what is signed should stand where it is read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from parley_protocol import limits
from parley_protocol.agreement.model import Agreement, Grouping, Output, Rules
from parley_protocol.agreement.schema import RANGED, Column, ColumnType, Table
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.agreement.source import Read, Tree, build
from parley_protocol.errors import AgreementError, Problem
from parley_protocol.measurement import MAGIC, measure, measurements_json

YAML_BYTES: Final = 1 << 20
"""An agreement that people read; domains of a category that are longer stand in a values_file."""
_DEPTH: Final = 16
_SHOWN_VALUES: Final = 20


def load_source(path: str | Path) -> Agreement:
    """The agreement in a YAML file; the files that it names are read relative to it.

    AgreementError with every problem, its field and line; OSError where the file itself cannot be read.
    """
    path = Path(path)
    return parse_source(_limited(path, YAML_BYTES), reader(path.parent), measured(path.parent))


def parse_source(data: bytes, read: Read, measured: Read | None = None) -> Agreement:
    """The agreement that YAML bytes describe; `read` gives the files that they name, `measured` the measurements in JSON of
    those that may be images."""
    tree, lines = parse_yaml(data)
    return build(tree, read, lines, measured=measured)


def reader(folder: Path) -> Read:
    """Reads the files that an agreement in `folder` names."""
    return lambda name: _limited(folder / name, limits.REFERENCED_FILE_BYTES)


def measured(folder: Path) -> Read:
    """Reads the measurements that an agreement in `folder` names: an image is measured, of any size; else it is their JSON."""

    def read(name: str) -> bytes:
        with (folder / name).open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                file.seek(0)
                return measurements_json(measure(file).pcrs).encode()
        return reader(folder)(name)

    return read


def load_signed(path: str | Path) -> SignedAgreement:
    """The agreement and its signatures in a `.parley` file, nothing of it verified; MalformedError, OSError."""
    return SignedAgreement.from_bytes(_limited(Path(path), limits.SIGNED_AGREEMENT_BYTES))


def save_signed(path: str | Path, signed: SignedAgreement) -> None:
    """Writes a `.parley` file, whole or not at all."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(signed.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _limited(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise AgreementError([Problem(path.name, None, f"has more than {most} bytes")])
    return data


# YAML


def parse_yaml(data: bytes) -> tuple[Tree, dict[str, int]]:
    """The tree of a YAML document with all scalars as text, and the line (1..) of each path.

    AgreementError where it is no YAML, has a key twice, or an anchor, an alias, a tag or a merge key.
    """
    # Imported here: ruamel.yaml takes a tenth of a second, which `parley --help` need not wait for.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _refused(line, "is not a text in UTF-8") from None
    try:
        return _Reader(YAML(typ="safe", pure=True).parse(text)).document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _refused(
            None if mark is None else mark.line + 1, f"is not YAML: {error.problem or error.context}"
        ) from None
    except YAMLError as error:
        raise _refused(None, f"is not YAML: {str(error).splitlines()[0]}") from None


def _refused(line: int | None, message: str, path: str = "") -> AgreementError:
    return AgreementError([Problem(path or "agreement", line, message)])


class _Reader:
    """Builds the tree from the parser's events, so that nothing is constructed that was not looked at."""

    def __init__(self, events: Iterator[object]) -> None:
        self.events = events
        self.lines: dict[str, int] = {}

    def document(self) -> tuple[Tree, dict[str, int]]:
        from ruamel.yaml import events

        for event in self.events:
            if isinstance(event, events.DocumentStartEvent):
                break
        else:
            raise _refused(1, "is empty")
        tree = self.node(next(self.events), "", 0)
        next(self.events)  # the end of the document
        for event in self.events:
            if isinstance(event, events.DocumentStartEvent):
                raise _refused(event.start_mark.line + 1, "a second document begins: one file holds one agreement")
        return tree, self.lines

    def node(self, event: object, path: str, depth: int) -> Tree:
        from ruamel.yaml import events

        assert isinstance(event, events.NodeEvent)
        line = event.start_mark.line + 1
        if path:
            self.lines.setdefault(path, line)
        if isinstance(event, events.AliasEvent) or event.anchor is not None:
            raise _refused(line, "has an anchor or an alias: write the value where it is meant", path)
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _refused(line, f"has a tag ({str(tag)[:60]}): values are typed by the agreement alone", path)
        if depth > _DEPTH:
            raise _refused(line, f"is nested deeper than {_DEPTH}", path)
        if isinstance(event, events.ScalarEvent):
            return str(event.value)
        if isinstance(event, events.SequenceStartEvent):
            return self.sequence(path, depth)
        return self.mapping(path, depth)

    def sequence(self, path: str, depth: int) -> Tree:
        from ruamel.yaml import events

        items: list[Tree] = []
        while not isinstance(event := next(self.events), events.SequenceEndEvent):
            items.append(self.node(event, f"{path}[{len(items)}]", depth + 1))
        return items

    def mapping(self, path: str, depth: int) -> Tree:
        from ruamel.yaml import events

        found: dict[str, Tree] = {}
        while not isinstance(event := next(self.events), events.MappingEndEvent):
            assert isinstance(event, events.NodeEvent)
            line = event.start_mark.line + 1
            key = self.node(event, "", depth + 1)
            if not isinstance(key, str):
                raise _refused(line, "a key is not a text", path)
            place = f"{path}.{key}" if path else key
            if key == "<<":
                raise _refused(line, "merge keys are not read: write the values where they are meant", path)
            if key in found:
                raise _refused(line, "is there twice", place)
            self.lines[place] = line
            found[key] = self.node(next(self.events), place, depth + 1)
        return found


# For people


def show(agreement: Agreement) -> str:
    """The agreement as text in the language, defaults filled in, keys as fingerprints."""
    return "\n".join(_shown(agreement)) + "\n"


def _shown(agreement: Agreement) -> Iterator[str]:
    yield f"# digest {agreement.digest.hex()}"
    yield "parley: 1"
    yield f"version: {agreement.version}"
    if agreement.replaces is not None:
        yield f"replaces: {agreement.replaces.hex()}"
    yield f"series: {agreement.series.hex()}" if agreement.version > 1 else "# version 1: its digest names the series"
    yield f"title: {_scalar(agreement.title)}"
    yield f"purpose: {_scalar(agreement.purpose)}"
    yield f"expires: {agreement.expires.isoformat()}  # end of that day, UTC"
    yield ""
    yield f"platform: {agreement.platform}"
    if agreement.root_sha256 is not None:
        yield f"root: {agreement.root_sha256.hex()}  # SHA-256 of the certificate"
    yield "measurements:"
    for measurement in agreement.measurements:
        yield f"  - PCR0: {measurement.pcr0.hex()}"
        yield f"    PCR1: {measurement.pcr1.hex()}"
        yield f"    PCR2: {measurement.pcr2.hex()}"
        if measurement.pcr8 is not None:
            yield f"    PCR8: {measurement.pcr8.hex()}"
        if measurement.until is not None:
            yield f"    until: {measurement.until.isoformat()}"
    yield ""
    yield "members:  # name: fingerprint"
    for name, member in agreement.members.items():
        yield f"  {_scalar(name)}: {member.fingerprint}"
    if agreement.groups:
        yield "groups:"
        for name, members in agreement.groups.items():
            yield f"  {_scalar(name)}: {_list(members)}"
    yield f"unit: {{name: {_scalar(agreement.unit.name)}, normalise: {agreement.unit.normalise}}}"
    yield ""
    yield "tables:"
    for table in agreement.tables.values():
        yield from _table(agreement, table)
    yield ""
    yield "outputs:"
    for output in agreement.outputs.values():
        yield from _output(agreement, output)
    yield ""
    yield "rules:"
    for rule in agreement.rules:
        yield f"  {_scalar(rule.member or 'everyone')}: {_rule(rule)}"
    session = agreement.session
    yield ""
    yield "session:"
    yield f"  start: {_members(agreement, session.start)}"
    yield f"  quorum: {'all' if session.quorum == len(agreement.parties) else session.quorum}"
    yield f"  deadline: {duration(session.deadline_ms)}"
    yield f"  countersign_within: {duration(session.countersign_within_ms)}"
    yield f"  max_releases: {session.max_releases}"
    yield f"  consent: {session.consent}"


def _table(agreement: Agreement, table: Table) -> Iterator[str]:
    yield f"  {table.name}:"
    yield f"    from: {_members(agreement, table.parties)}"
    yield f"    key: {_scalar(table.key)}"
    yield f"    rows_per_unit: {table.rows_per_unit}"
    yield "    columns:" if table.columns else "    columns: {}"
    for column in table.columns:
        yield f"      {column.name}: {{{', '.join(_column(column))}}}"


def _column(column: Column) -> Iterator[str]:
    yield f"type: {column.type}"
    if column.type is ColumnType.DECIMAL:
        yield f"scale: {column.scale}"
    if column.unit is not None:
        yield f"in: {_scalar(column.unit)}"
    if column.type in RANGED:
        assert column.low is not None and column.high is not None
        yield f"min: {column.text_of(column.low)}, max: {column.text_of(column.high)}"
    if column.type is ColumnType.CATEGORY:
        yield f"values: {_list(column.values)}"
    yield f"null: {'true' if column.null else 'false'}"


def _output(agreement: Agreement, output: Output) -> Iterator[str]:
    yield f"  {_scalar(output.name)}:"
    yield f"    kind: {output.kind}"
    yield f"    from: {output.table}"
    if output.joins:
        yield f"    join: {{{', '.join(f'{join.table}: {join.kind}' for join in output.joins)}}}"
    if output.where is not None:
        yield f"    where: {_scalar(output.where.text)}"
    if output.by:
        yield "    by:"
        for grouping in output.by:
            yield f"      {_scalar(grouping.name)}: {_grouping(grouping)}"
    yield f"    # {output.rows} combinations"
    yield "    values:"
    for value in output.values:
        yield f"      {_scalar(value.name)}: {value.text}"
    yield f"    to: {_members(agreement, output.recipients)}"


def _grouping(grouping: Grouping) -> str:
    if not grouping.edges:
        return grouping.ref.text
    column = grouping.ref.column
    edges = ", ".join(column.text_of(edge) for edge in grouping.edges)
    labels = _list(tuple(label for label in grouping.labels if label is not None))
    return f"{{bin: {grouping.ref.text}, edges: [{edges}], labels: {labels}}}"


def _rule(rule: Rules) -> str:
    coalition = "all" if rule.coalition is None else rule.coalition
    needed = f"  # at least {rule.parties_needed} parties" if rule.coalition else ""
    return f"{{min_units: {rule.min_units}, min_parties: {rule.min_parties}, coalition: {coalition}}}{needed}"


def _members(agreement: Agreement, members: tuple[str, ...]) -> str:
    """The members, by the names of groups where they are whole groups."""
    names: list[str] = []
    left = list(members)
    for name, group in agreement.groups.items():
        if group and set(group) <= set(left):
            names.append(name)
            left = [member for member in left if member not in group]
    names += left
    return _scalar(names[0]) if len(names) == 1 else _list(tuple(names))


def _list(texts: tuple[str, ...]) -> str:
    shown = ", ".join(_scalar(text) for text in texts[:_SHOWN_VALUES])
    return f"[{shown}]" if len(texts) <= _SHOWN_VALUES else f"[{shown}, and {len(texts) - _SHOWN_VALUES} more]"


def _scalar(text: str) -> str:
    """A text as YAML: plain where that cannot be misread."""
    plain = text.replace(" ", "").replace("-", "").replace("_", "").replace(".", "").isalnum()
    if plain and text == text.strip() and text[0] not in "-.":
        return text
    return "'" + text.replace("'", "''") + "'"


def duration(milliseconds: int) -> str:
    """A duration as the language writes it, in the largest unit that divides it: "14 days"."""
    for name, size in (("day", 86_400_000), ("hour", 3_600_000), ("minute", 60_000), ("second", 1000)):
        if milliseconds % size == 0:
            count = milliseconds // size
            return f"{count} {name}{'' if count == 1 else 's'}"
    return f"{milliseconds} milliseconds"
