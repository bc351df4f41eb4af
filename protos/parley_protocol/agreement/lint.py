"""What is allowed and worth knowing before signing: notes, and warnings where the agreement protects less than it seems to."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from parley_protocol.agreement.model import Agreement, Consent, Output, Platform, Rules, effective
from parley_protocol.measurement import EMPTY_PCR


class Level(StrEnum):
    """How much a note matters."""

    NOTE = "note"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Note:
    """One remark: `path` of the field that it is about."""

    level: Level
    path: str
    message: str

    def __str__(self) -> str:
        return self.message


def lint(agreement: Agreement, now_ms: int | None = None) -> tuple[Note, ...]:
    """All remarks, warnings first. `now_ms`: the reader's clock, for what has expired."""
    found = [
        *_members(agreement),
        *_platform(agreement, now_ms),
        *_tables(agreement),
        *_rules(agreement),
        *_session(agreement),
        *_kms(agreement),
    ]
    return tuple(sorted(found, key=lambda note: note.level is Level.NOTE))


def needs(output: Output, rules: Rules, unit: str) -> str:
    """What a value of `output` needs to be shown, in words: "10 aircraft and 4 parties (3, whichever one is taken away)"."""
    parties = _parties(rules.parties_needed)
    if rules.coalition is None:
        return f"{rules.min_units} {unit} and {parties}, each with no {unit} of its own or at least {rules.min_units}"
    if rules.coalition == 0:
        return f"{rules.min_units} {unit} and {parties} that bring {output.table}"
    taken = "one is" if rules.coalition == 1 else f"{rules.coalition} are"
    return f"{rules.min_units} {unit} and {parties} ({rules.min_parties}, whichever {taken} taken away)"


def _parties(count: int) -> str:
    return "1 party" if count == 1 else f"{count} parties"


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    if len(names) > 5:
        return f"{', '.join(names[:4])} and {len(names) - 4} others"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _members(agreement: Agreement) -> Iterator[Note]:
    parties, recipients, start = set(agreement.parties), set(agreement.recipients), set(agreement.session.start)
    idle = [name for name in agreement.members if name not in parties | recipients | start]
    if idle:
        one = len(idle) == 1
        text = (
            f"{_listed(idle)} {'has' if one else 'have'} no role: {'it signs' if one else 'they sign'} and get nothing"
        )
        yield Note(Level.WARNING, "members", text.replace("signs and get", "signs and gets"))
    empty = [name for name in agreement.parties if name not in recipients]
    if empty:
        yield Note(Level.NOTE, "outputs", f"{_listed(empty)} {'receives' if len(empty) == 1 else 'receive'} no output")
    seen: dict[str, str] = {}
    for name in agreement.members:
        alike = unicodedata.normalize("NFKC", name).casefold()
        if alike in seen:
            yield Note(Level.WARNING, f"members.{name}", f"{name} reads like {seen[alike]}")
        seen.setdefault(alike, name)


def _platform(agreement: Agreement, now_ms: int | None) -> Iterator[Note]:
    if agreement.platform is Platform.SIMULATED:
        yield Note(Level.WARNING, "platform", "simulated: no hardware protects the data")
    if now_ms is not None and now_ms >= agreement.expires_ms:
        yield Note(Level.WARNING, "expires", f"expired at the end of {agreement.expires.isoformat()}")
    for number, measurement in enumerate(agreement.measurements):
        path = f"measurements[{number}]"
        if measurement.pcr2 == EMPTY_PCR:
            yield Note(Level.NOTE, path, "the image has one ramdisk, so its PCR2 says nothing")
        if measurement.until is None or measurement.until_ms is None:
            continue
        if now_ms is not None and now_ms >= measurement.until_ms:
            yield Note(Level.WARNING, path, f"the image was accepted until {measurement.until.isoformat()}")
        elif measurement.until < agreement.expires:
            day = measurement.until.isoformat()
            yield Note(Level.NOTE, path, f"the image is accepted until {day}, before the agreement expires")


def _tables(agreement: Agreement) -> Iterator[Note]:
    read = {(ref.table, ref.column.name) for output in agreement.outputs.values() for ref in output.refs}
    for table in agreement.tables.values():
        for column in table.columns:
            if (table.name, column.name) not in read:
                text = f"{table.name}.{column.name} is read by no output: nobody should bring it"
                yield Note(Level.WARNING, f"tables.{table.name}.columns.{column.name}", text)


def _rules(agreement: Agreement) -> Iterator[Note]:
    rules = effective(agreement)
    for output in agreement.outputs.values():
        for rule in rules:
            whose = "" if rule.member is None else f", by the rules of {rule.member}"
            text = f"{output.name}: a value needs {needs(output, rule, agreement.unit.name)} behind it{whose}"
            yield Note(Level.NOTE, f"outputs.{output.name}", text)
    for rule in rules:
        if rule.coalition == 0:
            text = "coalition 0: a party can take its own rows away and see what fewer than the rule's parties have"
            yield Note(Level.WARNING, f"rules.{rule.member or 'everyone'}.coalition", text)
    everyone = agreement.rules[0]
    for rule in agreement.rules[1:]:
        asks = [
            name
            for name, own, common in (
                ("min_units", rule.min_units, everyone.min_units),
                ("min_parties", rule.min_parties, everyone.min_parties),
                ("coalition", _strength(rule), _strength(everyone)),
            )
            if own > common
        ]
        if not asks:
            text = f"the rules of {rule.member} ask no more than everyone's: they change nothing"
            yield Note(Level.NOTE, f"rules.{rule.member}", text)


def _strength(rule: Rules) -> int:
    # `all` is stronger than any number of parties.
    return 1 << 30 if rule.coalition is None else rule.coalition


def _session(agreement: Agreement) -> Iterator[Note]:
    quorum, parties = agreement.session.quorum, len(agreement.parties)
    if quorum < parties:
        shared = 2 * quorum - parties
        colluding = max(_strength(rule) for rule in agreement.rules)
        text = f"two rosters of {quorum} of {parties} parties may have only {max(shared, 0)} in common"
        # F2, F3: a party in both rosters is what keeps two releases over nearly the same inputs from being compared.
        level = Level.WARNING if shared <= colluding else Level.NOTE
        yield Note(level, "session.quorum", f"{text}: what one shows and the other does not is the difference")
        for output in agreement.outputs.values():
            present = len(agreement.tables[output.table].parties) - (parties - quorum)
            needed = max(rule.parties_needed for rule in agreement.rules)
            if present < needed:
                text = (
                    f"with only the quorum, {output.name} may stay empty: it needs {_parties(needed)} of {output.table}"
                )
                yield Note(Level.WARNING, "session.quorum", text)
    if agreement.session.consent is Consent.STANDING:
        text = (
            "standing consent: the host chooses which parties take part in each run, and nobody is asked;"
            " when it calls a session lost that is not, there is a release that max_releases does not count"
        )
        yield Note(Level.WARNING, "session.consent", text)


def _kms(agreement: Agreement) -> Iterator[Note]:
    for name, key in agreement.kms.items():
        path = f"kms.{name}"
        text = (
            f"joins of {name} by KMS are neither forward secret nor post-quantum: whoever records them and later gets at"
            f" {key.account}'s key, at an accepted image that has a hole, or at a quantum computer, opens its tables"
        )
        yield Note(Level.WARNING, path, text)
        text = (
            f"{name} can revoke by the policy of its key until an enclave has got the keys of a session;"
            " what was released stays released"
        )
        yield Note(Level.NOTE, path, text)
        if agreement.session.consent is Consent.STANDING:
            text = (
                f"standing consent and a KMS key: {name} is needed for no run, and the host may use any tables that {name}"
                " has joined by KMS under this version, old ones too"
            )
            yield Note(Level.WARNING, path, text)
    if agreement.kms:
        for number, measurement in enumerate(agreement.measurements):
            if measurement.until is None:
                text = "no `until`: an image in which a hole is found goes on to get keys until each key's policy is changed"
                yield Note(Level.NOTE, f"measurements[{number}]", text)
