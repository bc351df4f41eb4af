"""What an agreement must fulfil beyond its form: nothing empty, nothing contradictory, nothing that could never be shown.

Each check takes the parts that it judges, so that an agreement with an error in one part is still judged in the others.
Paths are those of the language, such as `outputs.delay_by_engine.by`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from parley_protocol import limits
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.agreement.schema import Table
from parley_protocol.attestation.roots import NITRO_ROOTS
from parley_protocol.errors import AgreementError, Problem
from parley_protocol.identity import PublicIdentity
from parley_protocol.output import FRAME_BYTES, WIDEST

if TYPE_CHECKING:
    from parley_protocol.agreement.model import Agreement, Measurement, Output, Rules, Session

Found = Iterator[tuple[str, str]]
"""(path, message) of each problem."""

_ZERO_PCR: Final = bytes(limits.PCR_BYTES)


def check(agreement: Agreement) -> None:
    """AgreementError with everything that is wrong."""
    unknown = [
        (f"outputs.{name}", f"no table {table!r}")
        for name, output in agreement.outputs.items()
        for table in output.tables
        if table not in agreement.tables
    ]
    if unknown:
        raise AgreementError(Problem(path, None, message) for path, message in unknown)
    found = [
        *of_versions(agreement.version, agreement.replaces, agreement.series_digest),
        *of_platform(str(agreement.platform), agreement.root_sha256, agreement.measurements),
        *of_members(agreement.members),
        *of_tables(agreement.tables, agreement.outputs),
        *of_outputs(agreement.outputs, agreement.tables),
        *of_rules(agreement.rules, agreement.outputs, agreement.tables),
        *of_session(agreement.session, len(agreement.parties)),
        *of_kms(agreement.kms, agreement.tables),
    ]
    if found:
        raise AgreementError(Problem(path, None, message) for path, message in found)


def of_versions(version: int, replaces: bytes | None, series: bytes | None) -> Found:
    """Version 1 follows nothing; every other names what it replaces and its series."""
    if version == 1:
        if replaces is not None:
            yield "replaces", "version 1 replaces nothing"
        if series is not None:
            yield "series", "the series is the digest of version 1: it cannot name its own"
        return
    if replaces is None:
        yield "replaces", f"version {version} must name the digest of version {version - 1}"
    if series is None:
        yield "series", f"version {version} must name the digest of version 1"
    elif replaces is not None and (replaces == series) is not (version == 2):
        yield "replaces", "is the digest of version 1 in version 2 and in no other"


def of_platform(platform: str, root: bytes | None, measurements: Sequence[Measurement]) -> Found:
    """A root where the platform is simulated and nowhere else; at least one image; no debug image."""
    if platform == "nitro" and root is not None:
        yield "root", "platform nitro accepts the roots in the verifier and no other: leave it out"
    if platform == "simulated" and root is None:
        yield "root", "platform simulated needs its root"
    if platform == "simulated" and root in NITRO_ROOTS:
        yield "root", "is a root of real hardware, which cannot be called simulated"
    if not measurements:
        yield "measurements", "none: no enclave could be accepted"
    if len(measurements) > limits.MEASUREMENTS:
        yield "measurements", f"more than {limits.MEASUREMENTS}"
    for number, measurement in enumerate(measurements):
        registers = {name: getattr(measurement, name.lower()) for name in ("PCR0", "PCR1", "PCR2", "PCR8")}
        for name, value in registers.items():
            if value == _ZERO_PCR:
                yield f"measurements[{number}]", f"{name} is all zero, which every debug enclave has"
        if measurement in measurements[:number]:
            yield f"measurements[{number}]", "is there already"


def of_members(members: Mapping[str, PublicIdentity]) -> Found:
    """At least one, no key twice."""
    if not members:
        yield "members", "none"
    if len(members) > limits.MEMBERS:
        yield "members", f"more than {limits.MEMBERS}"
    holders: dict[bytes, str] = {}
    for name, member in members.items():
        for key in (member.signing, member.sealing):
            if key in holders and holders[key] != name:
                yield f"members.{name}", f"has a key of {holders[key]}"
                break
            holders[key] = name


def of_tables(tables: Mapping[str, Table], outputs: Mapping[str, Output]) -> Found:
    """At least one; parties, columns, and an output that reads it."""
    if not tables:
        yield "tables", "none: there is no party"
    if len(tables) > limits.TABLES:
        yield "tables", f"more than {limits.TABLES}"
    read = {name for output in outputs.values() for name in output.tables}
    for name, table in tables.items():
        if not table.parties:
            yield f"tables.{name}.from", "nobody"
        if len(table.columns) > limits.COLUMNS:
            yield f"tables.{name}.columns", f"more than {limits.COLUMNS}"
        if outputs and name not in read:
            yield f"tables.{name}", "is read by no output: nobody should bring it"


def of_outputs(outputs: Mapping[str, Output], tables: Mapping[str, Table]) -> Found:
    """At least one; recipients; joins on tables with one row per unit; sizes; one over a table."""
    if not outputs:
        yield "outputs", "none: nothing would be computed"
    if len(outputs) > limits.OUTPUTS:
        yield "outputs", f"more than {limits.OUTPUTS}"
    for name, output in outputs.items():
        path = f"outputs.{name}"
        if not output.recipients:
            yield f"{path}.to", "nobody: an output that nobody receives is not computed"
        if not output.values:
            yield f"{path}.values", "none"
        for join in output.joins:
            table = tables[join.table]
            if join.table == output.table:
                yield f"{path}.join.{join.table}", "is the output's own table"
            elif table.rows_per_unit != 1:
                yield (
                    f"{path}.join.{join.table}",
                    "must have rows_per_unit 1: its rows would multiply those of the output",
                )
            elif len(table.parties) != 1:
                yield f"{path}.join.{join.table}", "must come from one party: a unit could have a row of each"
        if output.rows > limits.CELLS:
            yield f"{path}.by", f"{output.rows} combinations are more than {limits.CELLS}"
        elif output.rows * (len(output.by) + len(output.values)) > limits.OUTPUT_VALUES:
            yield f"{path}.by", f"combinations times columns are more than {limits.OUTPUT_VALUES}"
        elif (most := plaintext_bytes(output)) > limits.OUTPUT_BYTES:
            # Found at signing: an enclave that found it would have computed, and been charged, for nothing.
            yield f"{path}.by", f"the output may take {most} bytes, more than {limits.OUTPUT_BYTES}: shorten its labels"
    sealed = sum(plaintext_bytes(output) * len(output.recipients) for output in outputs.values())
    if sealed > limits.RELEASE_BYTES:
        message = f"sealed to each of their recipients they may take {sealed} bytes, more than {limits.RELEASE_BYTES}"
        yield "outputs", message
    yield from _alone(outputs)
    yield from _weighed(outputs, tables)


def plaintext_bytes(output: Output) -> int:
    """What no plaintext of the output exceeds; at least `OutputTable.widest`."""
    labels = sum(
        output.rows // grouping.size * sum(len((label or "").encode()) + 5 for label in grouping.labels)
        for grouping in output.by
    )
    values = output.rows * sum(WIDEST[value.type] for value in output.values)
    columns = len(output.by) + len(output.values)
    return labels + values + (columns + 2) * 2 * limits.NAME_BYTES + FRAME_BYTES


def _alone(outputs: Mapping[str, Output]) -> Found:
    """One output over a table: rules judge each value alone, and no two outputs together."""
    first: dict[str, str] = {}
    for name, output in outputs.items():
        other = first.setdefault(output.table, name)
        if other != name:
            yield (
                f"outputs.{name}.from",
                (
                    f"{output.table} is read by outputs.{other} too: totals of one minus parts of the other would show what is"
                    " hidden. Put both into one output, or keep one of them"
                ),
            )


def _weighed(outputs: Mapping[str, Output], tables: Mapping[str, Table]) -> Found:
    """Measures of joined columns: who brings the rows decides how often a joined unit counts (G1)."""
    for name, output in outputs.items():
        most = tables[output.table].rows_per_unit
        for value in output.values:
            if most > 1 and value.ref is not None and value.ref.table != output.table and value.function in _WEIGHED:
                yield (
                    f"outputs.{name}.values.{value.name}",
                    (
                        f"{value.text} would count a unit of {value.ref.table} once for each of up to {most} rows of"
                        f" {output.table}, and a party could single it out: {output.table} must have rows_per_unit 1"
                    ),
                )


_WEIGHED: Final = ("sum", "mean", "variance", "std")


def of_rules(rules: Sequence[Rules], outputs: Mapping[str, Output], tables: Mapping[str, Table]) -> Found:
    """Bounds that protect, and that the parties of each output can meet."""
    for rule in rules:
        path = f"rules.{rule.member or 'everyone'}"
        if rule.min_units < 2:
            yield f"{path}.min_units", f"{rule.min_units} is below 2: a value of one unit is that unit's"
        if rule.min_parties < 1:
            yield f"{path}.min_parties", f"{rule.min_parties} is below 1"
        if rule.coalition is not None and rule.coalition < 0:
            yield f"{path}.coalition", f"{rule.coalition} is below 0"
        for output in outputs.values():
            parties = len(tables[output.table].parties)
            if rule.parties_needed > parties:
                needs = f"{rule.min_parties} parties"
                if rule.coalition:
                    needs += f", whichever {rule.coalition} {'is' if rule.coalition == 1 else 'are'} taken away,"
                yield (
                    f"{path}.min_parties",
                    f"{needs} are more than bring {output.table}: outputs.{output.name} stays empty",
                )
                break


def of_session(session: Session, parties: int) -> Found:
    """Somebody may start, and the quorum can be met."""
    if not session.start:
        yield "session.start", "nobody"
    if parties and not 1 <= session.quorum <= parties:
        yield "session.quorum", f"{session.quorum} is not 1 to {parties}, the number of parties"


def of_kms(kms: Mapping[str, KeyArn], tables: Mapping[str, Table]) -> Found:
    """Keys of parties, each its own: whoever holds a key could open what another party keeps under it (REVIEW E4)."""
    parties = {party for table in tables.values() for party in table.parties}
    holders: dict[KeyArn, str] = {}
    for name, key in kms.items():
        if name not in parties:
            yield f"kms.{name}", "brings no table: there is nothing that its key would hold"
        other = holders.setdefault(key, name)
        if other != name:
            yield f"kms.{name}", f"is the key of {other} too: each party keeps its content keys under its own"
