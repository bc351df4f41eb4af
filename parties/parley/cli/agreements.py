"""`parley agreement`: draft, check, read, sign, and exchange agreements through the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parley.cli.app import command, make_app
from parley.cli.console import Console, plural, short
from parley.cli.exits import Exit, Failure
from parley.cli.options import JsonOption
from parley.cli.summary import notes

if TYPE_CHECKING:
    from parley import Agreement

Reference = Annotated[str, typer.Argument(help="Title, start of the digest, or file of an agreement.", metavar="AGREEMENT")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = make_app("The signed document of who, what, which image, which outputs, which rules.")
    command(group, "new")(new)
    command(group, "check")(check)
    command(group, "show")(show)
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

platform: simulated                  # simulated | nitro
root: simulated-root.pem             # only with simulated; nitro uses the roots in the verifier
measurements: [measurements.json]    # PCR0, 1 and 2 together

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


def new(
    title: Annotated[str, typer.Argument(help="Title of the agreement; also the name of the file.")],
    as_json: JsonOption = False,
) -> None:
    """Write a draft to start from: TITLE.yaml."""
    out = Console(as_json)
    path = Path(f"{title}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.format(title=title))
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
    for note in notes(agreement):
        out.line("note", note)
    out.result(**facts(agreement), notes=notes(agreement))


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
