"""`parley fetch`, `show`, `verify`, `receipts`: what a session released, and what proves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parley.cli import tables
from parley.cli.app import command
from parley.cli.console import Console, plural, session_name, short, size, when
from parley.cli.exits import Exit, Failure
from parley.cli.images import image_facts
from parley.cli.options import (
    AGREEMENTS,
    CertOption,
    JsonOption,
    KeyOption,
    ToOption,
    connect,
    find_session,
    member,
    names_agreement,
    read_agreement,
)
from parley.cli.summary import party_word, several

if TYPE_CHECKING:
    from parley import Member, Release

BundleArgument = Annotated[Path, typer.Argument(help="A bundle, as `parley fetch` writes it.", metavar="BUNDLE")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app, "fetch")(fetch)
    command(app, "show")(show)
    command(app, "verify")(verify)
    command(app, "receipts")(receipts)


def fetch(
    session: Annotated[
        str,
        typer.Argument(help="Start of the session's id, or an agreement: its newest release.", metavar="SESSION"),
    ],
    opened: Annotated[
        bool, typer.Option("--open", help="Write a bundle that stands open, so that a stranger can read and verify it.")
    ] = False,
    path: Annotated[Path | None, typer.Option("--out", help="Default: TITLE-SESSION.bundle.")] = None,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a release, verify it, and keep it as one file."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        found = find_session(session, connection, released=True)
        ending = ".open.bundle" if opened else ".bundle"
        file = path or Path(f"{found.agreement.title}-{found.id.hex()[:4]}{ending}")
        with out.progress() as bars:
            release = found.fetch(file, bars.update, opened=opened)
    state = "open for everybody who has the file" if opened else "sealed to its recipients"
    out.line("verified", f"record {release.sequence} of the series; {plural(len(release), 'output')} for you")
    out.line("image", str(release.image))
    out.line("bundle", f"{file}, {size(file.stat().st_size)}, {state}")
    out.result(
        session=found.id.hex(),
        file=str(file),
        sequence=release.sequence,
        outputs=list(release),
        opened=opened,
        simulated=release.simulated,
        **image_facts(release.image),
    )


def show(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A bundle; or the start of a session's id, or an agreement: its newest release that you fetched; the"
            " newest of all where left out."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", help="Only this output.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: every combination, hidden values empty.")] = False,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the outputs of a release that you can open, and what is hidden."""
    out = Console(as_json)
    release = _release(source, key)
    agreement = release.verified.agreement
    if not len(release):
        raise Failure(
            "nothing in this bundle is open to you: its outputs are sealed to others", Exit.REFUSED, "not-a-member"
        )
    if output is not None and output not in release:
        raise Failure(f"{output}: no such output; there are: {', '.join(release)}")
    mark = "SIMULATED" if release.simulated else ""
    for number, name in enumerate([output] if output is not None else list(release)):
        table = release[name].table
        if as_json:
            out.result(**tables.as_json(table), simulated=release.simulated, agreement=agreement.digest.hex())
        elif as_csv:
            typer.echo(tables.as_csv(table), nl=False)
        else:
            if number:
                out.text()
            for line in tables.render(table, mark, several(agreement.unit.name), party_word(agreement)):
                out.text(line)


def _release(source: str | None, key: Path | None) -> Release:
    from parley import Release

    path = None if source is None else Path(source)
    if path is not None and path.is_file() and path.suffix not in AGREEMENTS:
        return Release.read(path.read_bytes(), _reader(key))
    me = member(key)
    kept = me.state.releases()
    if source is None:
        if not kept:
            raise Failure("no release was fetched yet: parley fetch SESSION", Exit.UNAVAILABLE, "phase")
        folder = me.state.folder / "releases"
        session = max(kept, key=lambda found: (folder / f"{found.hex()}.bundle").stat().st_mtime_ns)
    else:
        digits = source.replace("-", "").lower()
        matching = [found for found in kept if digits and found.hex().startswith(digits)]
        if len(matching) > 1:
            raise Failure(
                f"{source}: {len(matching)} sessions begin so; give more digits", Exit.USAGE, "unknown-session"
            )
        session = matching[0] if matching else _newest(source, me, kept)
    data = me.state.release(session)
    assert data is not None
    return Release.read(data, me)


def _newest(text: str, me: Member, kept: list[bytes]) -> bytes:
    """The session of the newest release that was fetched of an agreement, which `text` names as for `fetch`."""
    from parley_protocol.bundle import Bundle
    from parley_protocol.cose import payload_unverified
    from parley_protocol.transcript import Record

    if Path(text).suffix in AGREEMENTS and Path(text).is_file():
        text = read_agreement(Path(text)).digest.hex()
    found: dict[bytes, list[tuple[int, bytes]]] = {}
    for session in kept:
        data = me.state.release(session)
        assert data is not None
        bundle = Bundle.from_bytes(data)  # only to choose: what is shown is verified
        agreement = bundle.lineage[-1].signed.agreement()
        if names_agreement(text, agreement):
            sequence = Record.from_bytes(payload_unverified(bundle.record)).body.sequence
            found.setdefault(agreement.series, []).append((sequence, session))
    if not found and any(names_agreement(text, signed.agreement()) for signed in me.state.agreements()):
        raise Failure(f"{text}: no release of it was fetched yet: parley fetch {text}", Exit.UNAVAILABLE, "phase")
    if not found:
        raise Failure(
            f"{text}: neither a bundle, nor a session or an agreement of which a release was fetched",
            Exit.USAGE,
            "unknown-session",
        )
    if len(found) > 1:
        raise Failure(f"{text}: several agreements: name one by the start of its digest", Exit.USAGE)
    [releases] = found.values()
    return max(releases)[1]


def _reader(key: Path | None) -> Member | None:
    """The caller, where a key is named or there is exactly one here: a bundle that stands open needs none."""
    if key is None and len(sorted(Path().glob("*.key"))) != 1:
        return None
    return member(key)


def verify(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Verify a bundle offline, all of it, and say what it proves. Needs no key and no coordinator."""
    from parley import Release

    out = Console(as_json)
    release = Release.read(bundle.read_bytes())
    verified = release.verified
    agreement, record = verified.agreement, verified.record.record
    document = verified.record.document
    members = len(agreement.members)
    if release.simulated:
        assert agreement.root_sha256 is not None
        out.line(
            "platform", f"   SIMULATED, root {agreement.root_sha256.hex()[:4]}...{agreement.root_sha256.hex()[-2:]}"
        )
    else:
        out.line("platform", "   AWS Nitro")
    versions = "" if agreement.version == 1 else f", version {agreement.version}, with all versions before it"
    out.line("agreement", f"   {agreement.title}: {members} of {members} signatures{versions}")
    included = len(verified.roster.included)
    absent = [absentee.party for absentee in verified.roster.absentees]
    if str(agreement.session.consent) == "roster":
        out.line("roster", f"   {len(verified.countersigned)} of {included} countersignatures{_without(absent)}")
    else:
        out.line(
            "roster",
            f"   {plural(included, 'party', 'parties')}; STANDING consent, nobody countersigned{_without(absent)}",
        )
    uploads = sum(len(item.uploads) for item in record.body.inputs)
    out.line(
        "record",
        f"   {record.body.sequence} of this series, {plural(uploads, 'upload')}, "
        f"image {short(document.pcrs[0])}, agreement in PCR16, {when(document.timestamp_ms)}",
    )
    out.line("image", f"   {release.image}")
    for name, agreed in agreement.outputs.items():
        found = release.outputs.get(name)
        who = plural(len(agreed.recipients), "recipient")
        if found is None:
            text = (
                f"{name}: sealed for {who}; commitment present, not opened (needs a recipient's key, or fetch --open)"
            )
        else:
            text = (
                f"{name}: stands open and fits its commitment; {found.shown} of {found.table.rows} combinations shown"
            )
        out.line("output", f"   {text}")
    if release.simulated:
        out.text("valid, and simulated: it shows that the software agrees, not that hardware protected anything")
    else:
        out.text("valid")
    out.result(
        valid=True,
        simulated=release.simulated,
        agreement=agreement.digest.hex(),
        series=agreement.series.hex(),
        version=agreement.version,
        sequence=record.body.sequence,
        head=record.head.hex(),
        session=record.session.hex(),
        countersigned=list(verified.countersigned),
        absent=absent,
        pcrs={str(index): value.hex() for index, value in sorted(document.pcrs.items())},
        timestamp_ms=document.timestamp_ms,
        **image_facts(release.image),
        opened=list(release),
        sealed=[name for name in agreement.outputs if name not in release],
    )


def _without(absent: list[str]) -> str:
    return f"; absent: {', '.join(absent)}" if absent else ""


def receipts(key: KeyOption = None, as_json: JsonOption = False) -> None:
    """List what enclaves acknowledged to you."""
    out = Console(as_json)
    kept = member(key).state.receipts()
    rows = []
    for item in kept:
        receipt = item.receipt
        uploads = ", ".join(short(upload) for upload in receipt.uploads)
        rows.append(
            (short(receipt.digest), session_name(item.session), when(receipt.admitted_at), f"uploads {uploads}")
        )
        out.result(
            receipt=receipt.digest.hex(),
            session=item.session.hex(),
            party=receipt.party,
            admitted_at=receipt.admitted_at,
            uploads=[upload.hex() for upload in receipt.uploads],
            cose=item.cose.hex(),
        )
    out.columns(rows)
    if not kept:
        out.text("no receipts yet")
