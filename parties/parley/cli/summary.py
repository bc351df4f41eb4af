"""An agreement in the words of those who are about to sign it: what they bring, who sees what, what nobody promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from parley.cli.console import plural, short

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parley_protocol.agreement.model import Agreement, Grouping, Output, Rules, Value

LABEL: Final = 15
"""Columns of the label in front of a line."""


def lines(agreement: Agreement, member: str | None) -> list[str]:
    """The agreement for people, in labelled lines; `member` is the reader where it is a member."""
    rows: list[tuple[str, str]] = [("Purpose", agreement.purpose)]
    if member is not None:
        rows += _brings(agreement, member)
    for output in agreement.outputs.values():
        who = recipients(agreement, output)
        label = "All may see" if set(output.recipients) == set(agreement.members) else f"{who} may see"
        rows.append(("May see", f"{output.name}: {', '.join(_measures(output.values))}{_by(output)}"))
        rows.append(("", f"{_joined(output)}shown to {'every member' if label == 'All may see' else who}"))
        if output.where is not None:
            rows.append(("", f"only rows where {output.where.text}"))
    rows += [("" if number else "Only with", text) for number, text in enumerate(_rules(agreement))]
    rows += [("" if number else "Not promised", text) for number, text in enumerate(_limits(agreement))]
    rows.append(("Runs on", platform(agreement)))
    rows += _session(agreement)
    return [f"{label:<{LABEL}}{text}".rstrip() for label, text in rows]


def _brings(agreement: Agreement, member: str) -> list[tuple[str, str]]:
    tables = agreement.tables_of(member)
    if not tables:
        return [("You bring", "nothing")]
    rows = []
    for number, name in enumerate(tables):
        table = agreement.tables[name]
        columns = ", ".join([f"{table.key} (the {agreement.unit.name})", *(column.name for column in table.columns)])
        many = "one row" if table.rows_per_unit == 1 else f"up to {table.rows_per_unit:,} rows"
        rows.append(("" if number else "You bring", f"{name}: {columns}; {many} for each {agreement.unit.name}"))
    return rows


def recipients(agreement: Agreement, output: Output) -> str:
    """Who receives an output, by the names of groups where these cover it."""
    left = list(output.recipients)
    names = []
    for group, members in sorted(agreement.groups.items(), key=lambda item: -len(item[1])):
        if members and set(members) <= set(left):
            names.append(group)
            left = [member for member in left if member not in members]
    names += left
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])} and {len(names) - 10} others"


def _measures(values: Iterable[Value]) -> list[str]:
    texts = []
    for value in values:
        if value.ref is None:
            texts.append(value.name)
        else:
            texts.append(f"{value.function} of {value.ref.column.name}")
    return texts


def _by(output: Output) -> str:
    return f" by {' and '.join(_grouping(grouping) for grouping in output.by)}" if output.by else ""


def _grouping(grouping: Grouping) -> str:
    return grouping.name


def _joined(output: Output) -> str:
    tables = " and ".join([output.table, *(join.table for join in output.joins)])
    return f"{plural(output.rows, 'combination')} over {tables}, "


def _rules(agreement: Agreement) -> list[str]:
    units, parties = several(agreement.unit.name), party_word(agreement)
    return [f"{_asks(rules)}{_effective(rules, units, parties)}" for rules in agreement.rules]


def _asks(rules: Rules) -> str:
    return f"{rules.member} asks: " if rules.member is not None else ""


def _effective(rules: Rules, units: str, parties: str) -> str:
    if rules.coalition is None:
        return (
            f"{rules.min_units} {units} and {rules.min_parties} {parties} behind each value, "
            f"each of these with none or at least {rules.min_units} of its own"
        )
    text = f"{rules.min_units} {units} and {rules.parties_needed} {parties} behind each value"
    if rules.coalition == 1:
        return f"{text} ({rules.min_units} and {rules.min_parties}, whichever one of them is taken away)"
    if rules.coalition > 1:
        return f"{text} ({rules.min_units} and {rules.min_parties}, whichever {rules.coalition} of them are taken away)"
    return f"{text}; a party that invents {units} is not taken into account (coalition: 0)"


def _limits(agreement: Agreement) -> list[str]:
    known = min(rules.min_units for rules in agreement.rules) - 1
    most = max((len(agreement.tables[output.table].parties) for output in agreement.outputs.values()), default=0)
    texts = [
        f"who knows {known} {several(agreement.unit.name) if known > 1 else agreement.unit.name} of a cell learns a bit about a {ordinal(known + 1)}"
    ]
    if most > 1:
        texts.insert(0, f"{most - 1} colluding {party_word(agreement)} learn the share of the {ordinal(most)}")
    return texts


_IRREGULAR: Final = {"person": "people", "aircraft": "aircraft", "child": "children", "woman": "women", "man": "men"}


def several(noun: str) -> str:
    """A unit's name as a plural, in English; a name that is none yet stays as it is."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if not noun.isascii() or not noun[-1:].isalpha() or noun.endswith("s"):
        return noun
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def party_word(agreement: Agreement) -> str:
    """What the parties of the outputs' own tables are called: the group's name where one covers them, else parties."""
    for output in agreement.outputs.values():
        for group, members in agreement.groups.items():
            if set(members) == set(agreement.tables[output.table].parties):
                return group
    return "parties"


def image_name(agreement: Agreement) -> str:
    """The accepted images, each by the start and end of its PCR0, with the day on which it ends."""
    return " or ".join(
        short(measurement.pcr0) + ("" if measurement.until is None else f" (until {measurement.until.isoformat()})")
        for measurement in agreement.measurements
    )


def platform(agreement: Agreement) -> str:
    """Where it runs, the simulated platform in capitals."""
    if str(agreement.platform) == "simulated":
        return f"SIMULATED enclave {image_name(agreement)}: no hardware protects the data"
    return f"AWS Nitro enclave {image_name(agreement)}"


def _session(agreement: Agreement) -> list[tuple[str, str]]:
    from parley.agreements import duration

    session = agreement.session
    quorum = (
        "all parties"
        if session.quorum == len(agreement.parties)
        else f"{session.quorum} of {len(agreement.parties)} parties"
    )
    consent = (
        "every included party countersigns the roster"
        if str(session.consent) == "roster"
        else "STANDING consent: no party is asked again before a computation"
    )
    kms = [
        (
            "" if number else "Keys in KMS",
            f"{name}: {key}; joins without {name}, which its key policy revokes; neither forward secret nor post-quantum",
        )
        for number, (name, key) in enumerate(agreement.kms.items())
    ]
    start = ", ".join(session.start) if len(session.start) <= 3 else plural(len(session.start), "member")
    return [
        ("Session", f"{quorum}, within {duration(session.deadline_ms)}; started by {start}; {consent}"),
        (
            "",
            f"countersigned within {duration(session.countersign_within_ms)}; at most {plural(session.max_releases, 'release')}",
        ),
        *kms,
        ("Expires", f"after {agreement.expires.isoformat()}, UTC"),
    ]
