"""`parley agreement`: draft, check, read, sign, and exchange agreements through the coordinator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parley.cli.app import command, make_app
from parley.cli.console import Console, plural, short
from parley.cli.exits import Exit, Failure
from parley.cli.options import (
    CertOption,
    JsonOption,
    KeyOption,
    ToOption,
    YesOption,
    bytes_of,
    connect,
    find_agreement,
    member,
    read_agreement,
)
from parley.cli.summary import lines

if TYPE_CHECKING:
    from parley import Member
    from parley_protocol.agreement.lint import Note
    from parley_protocol.agreement.model import Agreement

Reference = Annotated[
    str, typer.Argument(help="Title, start of the digest, or file of an agreement.", metavar="AGREEMENT")
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = make_app("Who, what, which image, which outputs, which rules: drafted, checked, signed.")
    command(group, "new")(new)
    command(group, "check")(check)
    command(group, "show")(show)
    command(group, "diff")(diff)
    command(group, "put")(put)
    command(group, "get")(get)
    command(group, "sign")(sign)
    app.add_typer(group, name="agreement")


TEMPLATE = """\
# {title}: say in a line what is computed and what nobody can see.
parley: 1                            # version of this language
version: 1                           # an amendment has 2 and `replaces: <digest of version 1>`
title: {title}
purpose: Mean amount by region.
expires: 2027-12-31                  # end of that day, UTC

{platform}

members:                             # name: public key file of `parley keygen`
  north: keys/north.pub
  south: keys/south.pub
  west: keys/west.pub
  east: keys/east.pub
  analyst: keys/analyst.pub

groups:                              # names for lists of members, usable wherever a member is
  parties: [north, south, west, east]

unit: {{name: person, normalise: exact}}   # whom the rules protect; exact | casefold | email | phone | digits

tables:
  orders:
    from: parties                    # the union of one upload from each
    key: customer                    # the column with the unit's identifier; rows without it enter no output
    rows_per_unit: 100               # at most, in one upload
    columns:
      amount: {{type: decimal, scale: 2, in: EUR, min: 0, max: 100000, null: true}}
      region: {{type: category, values: [north, south, west, east]}}

outputs:
  amount_by_region:
    kind: aggregate
    from: orders
    by: {{region: region}}
    values:
      orders: count                  # rows
      people: units                  # distinct units
      mean_amount: mean(amount)
    to: [parties, analyst]           # the same for all of them

rules:
  everyone: {{min_units: 10, min_parties: 3, coalition: 1}}

session:
  start: analyst                     # who may close the inputs and ask for the roster
  quorum: all                        # or a number of parties; the rest may be absent after the deadline
  deadline: 14 days
  max_releases: 4
  consent: roster                    # every included party countersigns it
"""


SIMULATED = """\
platform: simulated                  # simulated | nitro
root: simulated-root.pem             # only with simulated; nitro uses the roots in the verifier
measurements: [measurements.json]    # an image, or what `parley measure --json` or nitro-cli prints of one"""
NITRO = """\
platform: nitro                      # simulated, with `root: its certificate`, for an image in the emulator
measurements:                        # each with `until: 2027-01-31` where another is to take its place
{images}"""


def new(
    title: Annotated[str, typer.Argument(help="Title of the agreement; also the name of the file.")],
    images: Annotated[
        list[Path] | None, typer.Option("--image", help="An enclave image that is accepted; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a draft to start from: TITLE.yaml."""
    from parley.images import measure_file

    out = Console(as_json)
    path = Path(f"{title}.yaml")
    platform = SIMULATED
    if images:
        measured = [(image, measure_file(image)) for image in images]
        # JSON's strings are YAML's, whatever a path holds.
        listed = [
            f"  - {json.dumps(str(image), ensure_ascii=False)}  # PCR0 {short(found.pcrs[0])}"
            for image, found in measured
        ]
        platform = NITRO.format(images="\n".join(listed))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.format(title=title, platform=platform))
    except FileExistsError:
        raise Failure(f"{path} is there already", Exit.USAGE, "file") from None
    out.line(str(path), "a draft; edit it, then: parley agreement check " + str(path))
    out.result(file=str(path))


def check(
    file: Annotated[Path, typer.Argument(help="The agreement as YAML.")],
    as_json: JsonOption = False,
) -> None:
    """Read a draft and say what is wrong with it, by line and field, or its digest."""
    from parley.agreements import load_source
    from parley_protocol.errors import AgreementError

    out = Console(as_json)
    try:
        agreement = load_source(file)
    except AgreementError as error:
        for problem in error.problems:
            where = f"{file}:{problem.line}" if problem.line is not None else str(file)
            out.text(f"{where}  {problem.path}: {problem.message}")
            out.result(error={"line": problem.line, "field": problem.path, "message": problem.message})
        out.text(plural(len(error.problems), "error"))
        raise typer.Exit(Exit.DATA) from None
    out.text(headline(agreement))
    for note in _notes(agreement):
        out.line(note.level, note.message)
    out.result(**facts(agreement), notes=[_plain(note) for note in _notes(agreement)])


def _notes(agreement: Agreement) -> tuple[Note, ...]:
    from parley.clock import now_ms
    from parley_protocol.agreement.lint import lint

    return lint(agreement, now_ms())


def _plain(note: Note) -> dict[str, str]:
    return {"level": str(note.level), "field": note.path, "message": note.message}


def headline(agreement: Agreement) -> str:
    """One line on an agreement."""
    parts = ", ".join(
        [
            plural(len(agreement.members), "member"),
            plural(len(agreement.tables), "table"),
            plural(len(agreement.outputs), "output"),
        ]
    )
    return f"{agreement.title}, version {agreement.version}: {parts}.  Digest {short(agreement.digest)}"


def facts(agreement: Agreement) -> dict[str, object]:
    """An agreement for programs."""
    return {
        "title": agreement.title,
        "version": agreement.version,
        "digest": agreement.digest.hex(),
        "series": agreement.series.hex(),
        "members": list(agreement.members),
        "parties": list(agreement.parties),
        "outputs": list(agreement.outputs),
        "platform": str(agreement.platform),
        "expires": agreement.expires.isoformat(),
    }


def show(
    agreement: Reference,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print all of an agreement with its defaults, and what it means for you."""
    from parley.agreements import show as text

    out = Console(as_json)
    signed = find_agreement(agreement, key, to, cert)
    found = signed.agreement()
    for line in text(found).splitlines():
        out.text(line)
    out.text()
    for line in lines(found, own_name(found, key)):
        out.text(line)
    for note in _notes(found):
        out.line(note.level, note.message)
    missing = signed.missing()
    out.line("signed", f"{len(found.members) - len(missing)} of {len(found.members)}{_without(missing)}")
    out.result(**facts(found), text=text(found), missing=list(missing), notes=[_plain(note) for note in _notes(found)])


def diff(
    old: Annotated[
        str, typer.Argument(help="Title, start of the digest, or file of the agreement before.", metavar="OLD")
    ],
    new: Annotated[str, typer.Argument(help="The same of the one after, such as an amendment.", metavar="NEW")],
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print every field in which two agreements differ: what an amendment changes."""
    from parley.differences import amends, changes

    out = Console(as_json)
    before, after = (find_agreement(text, key, to, cert).agreement() for text in (old, new))
    found = changes(before, after)
    if before == after:
        out.text("the same agreement")
    elif amends(before, after):
        out.text(f"{after.title}: version {after.version} amends version {before.version}")
    else:
        out.text(
            "neither amends the other" if not amends(after, before) else "OLD amends NEW: they are the other way round"
        )
    for change in found:
        out.text(str(change))
    out.result(
        old=before.digest.hex(),
        new=after.digest.hex(),
        amends=amends(before, after),
        changes=[{"path": list(change.path), "old": change.old, "new": change.new} for change in found],
    )


def own_name(agreement: Agreement, key: Path | None) -> str | None:
    """The caller's name in an agreement, where there is one caller and it is a member."""
    from parley_protocol.errors import RefusedError

    try:
        return member(key).name_in(agreement)
    except (Failure, RefusedError):
        return None


def _without(missing: tuple[str, ...]) -> str:
    if not missing:
        return ""
    names = ", ".join(missing[:8])
    return f"; without {names}" if len(missing) <= 8 else f"; without {names} and {len(missing) - 8} others"


def put(
    file: Annotated[Path, typer.Argument(help="The agreement as YAML, or a .parley file.")],
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give an agreement to the coordinator, for the others to fetch and sign."""
    out = Console(as_json)
    signed = read_agreement(file)
    found = signed.agreement()
    with connect(key, to, cert) as connection:
        state = connection.put(found)
    mine = own_name(found, key)
    out.text(
        f"with the coordinator; {plural(len(state.missing), 'signature')} missing"
        + (f".  Yours: parley agreement sign {found.title}" if mine in state.missing else "")
    )
    out.result(**facts(found), missing=list(state.missing))


def get(
    agreement: Reference,
    path: Annotated[Path | None, typer.Option("--out", help="Default: TITLE.parley.")] = None,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch an agreement with the signatures so far into a file."""
    from parley.agreements import save_signed

    out = Console(as_json)
    signed = find_agreement(agreement, key, to, cert, fresh=True)
    found = signed.agreement()
    file = path or Path(f"{found.title}.parley")
    save_signed(file, signed)
    missing = signed.missing()
    out.text(headline(found))
    out.line(str(file), f"signed by {len(found.members) - len(missing)} of {len(found.members)}{_without(missing)}")
    out.result(**facts(found), file=str(file), missing=list(missing))


def sign(
    agreement: Reference,
    trust_head: Annotated[
        str | None,
        typer.Option("--trust-head", help="Head of the chain, from another member, where your state is lost."),
    ] = None,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read what an agreement means for you, and sign it."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        me = connection.member
        found = find_agreement(agreement, key, to, cert, connection=connection, fresh=True).agreement()
        name = me.name_in(found)
        changed = _changes(found, me)
        for number, line in enumerate(changed or ()):
            out.text(f"{'' if number else 'Changes':<15}{line}")
        for line in lines(found, name):
            out.text(line)
        for note in _notes(found):
            out.text(f"{note.level.capitalize():<15}{note.message}")
        open_ = me.contacts.unconfirmed(found)
        confirmed = len(found.members) - 1 - len(open_)
        out.text(
            f"{'Members':<15}{confirmed} confirmed in your contacts"
            + (f"; {len(open_)} not: {', '.join(f'{item.name} {item.fingerprint}' for item in open_)}" if open_ else "")
        )
        for contact in open_:
            # --yes does not answer this: what it stands for happened between people, or did not.
            if not out.confirm(f"Have you compared {contact.fingerprint} with {contact.name}?", yes=False):
                raise Failure(
                    f"not signed: the key of {contact.name} is not confirmed "
                    f"(parley contact add {contact.name}.pub; parley contact confirm {contact.name} FINGERPRINT)",
                    Exit.REFUSED,
                    "state",
                )
            me.contacts.put(contact.name, contact.public)
            me.contacts.confirm(contact.name, contact.fingerprint)
        if not out.confirm(f"Sign as {name}?", yes):
            raise Failure("not signed", Exit.REFUSED, "state")
        state = connection.sign(found, trust_head=None if trust_head is None else bytes_of(trust_head))
    done = len(found.members) - len(state.missing)
    out.text(f"signed, {done} of {len(found.members)}")
    out.result(**facts(found), member=name, signed=done, missing=list(state.missing), changes=changed)


def _changes(agreement: Agreement, me: Member) -> list[str] | None:
    """What an amendment changes in the version before it; None where there is none, or this member does not have it."""
    from parley.differences import changes

    before = [kept for kept in me.state.agreements() if kept.digest == agreement.replaces]
    return [str(change) for change in changes(before[0].agreement(), agreement)] if before else None
