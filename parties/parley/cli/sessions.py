"""`parley inbox`, `open`, `attest`, `submit`, `join`, `start`, `roster`, `status`, `watch`: one run of one enclave."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parley.cli.app import command, make_app
from parley.cli.console import Console, ago, plural, session_name, short, size, when
from parley.cli.exits import Exit, Failure
from parley.cli.images import image_facts, say
from parley.cli.options import (
    CertOption,
    JsonOption,
    KeyOption,
    ToOption,
    YesOption,
    bytes_of,
    connect,
    find_agreement,
    find_session,
)

if TYPE_CHECKING:
    from parley import Connection, InboxItem, SealedTable, Session, SessionStatus, Standing
    from parley.kms import Key
    from parley_protocol.agreement.model import Agreement
    from parley_protocol.claims import VerifiedOffer

SessionArgument = Annotated[
    str,
    typer.Argument(help="Start of the session's id, or the agreement whose live session is meant.", metavar="SESSION"),
]
AgreementArgument = Annotated[
    str, typer.Argument(help="Title, start of the digest, or file of an agreement.", metavar="AGREEMENT")
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app, "inbox")(inbox)
    command(app, "open")(open_)
    command(app, "attest")(attest)
    command(app, "submit")(submit)
    command(app, "join")(join)
    command(app, "start")(start)
    roster = make_app("The list of exactly what will be computed on, which every included party countersigns.")
    command(roster, "show")(roster_show)
    command(roster, "sign")(roster_sign)
    command(roster, "refuse")(roster_refuse)
    app.add_typer(roster, name="roster")
    command(app, "status")(status)
    command(app, "watch")(watch)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# What waits


def inbox(key: KeyOption = None, to: ToOption = None, cert: CertOption = None, as_json: JsonOption = False) -> None:
    """Show what waits for you: to sign, upload, join, start, countersign, fetch."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        items = connection.inbox()
        rows = []
        for item in items:
            agreement = connection.agreement(item.agreement).agreement
            rows.append(_inbox_row(item, agreement))
            out.result(
                kind=item.kind,
                title=agreement.title,
                version=agreement.version,
                agreement=item.agreement.hex(),
                session=item.session.hex() or None,
                table=item.table or None,
                member=item.member,
                since_ms=item.since_ms or None,
                due_ms=item.due_ms or None,
            )
    out.columns(rows)
    if not items:
        out.text("nothing waits for you")


_MEANING = {
    "sign": "read it and sign it",
    "upload": "bring your tables",
    "join": "join again; your tables are with the coordinator",
    "start": "the inputs can be closed",
    "countersign": "look at the roster and sign it",
    "fetch": "the release is there",
}


def _inbox_row(item: InboxItem, agreement: Agreement) -> tuple[str, str, str, str]:
    what = f"{agreement.title}, version {agreement.version}"
    if item.session:
        what = f"{session_name(item.session)}  {agreement.title}"
    if item.table:
        what += f": {item.table}"
    timing = ago(item.since_ms, _now_ms()) if item.since_ms else ""
    if item.due_ms:
        timing += f"{', ' if timing else ''}until {when(item.due_ms)}"
    return item.kind, what, _MEANING.get(item.kind, ""), timing


def open_(
    agreement: AgreementArgument,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Open a session of an agreement that all members signed, or find the live one."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        found = find_agreement(agreement, key, to, cert, connection=connection, fresh=True).agreement()
        session = connection.open(found)
        state = session.status()
    out.line("session", f"{session_name(session.id)}; inputs until {when(state.deadline_ms)}")
    out.result(session=session.id.hex(), agreement=found.digest.hex(), phase=state.phase, deadline_ms=state.deadline_ms)


# The enclave


def attest(
    session: SessionArgument,
    trust_head: Annotated[
        str | None,
        typer.Option("--trust-head", help="Head of the chain, from another member, where your state is lost."),
    ] = None,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the session's enclave for a fresh document and verify it. Nothing is sent to it but a nonce."""
    from parley.images import seen_image

    out = Console(as_json)
    with connect(key, to, cert) as connection:
        offer = _verified(find_session(session, connection), out, trust_head)
    enclave, image = offer.enclave, seen_image(offer.agreement, offer.enclave)
    for index, value in sorted(enclave.pcrs.items()):
        if index in (0, 1, 2, 16):
            out.line(f"PCR{index}", value.hex())
    out.line("module", enclave.module_id)
    out.result(
        session=offer.offer.session.hex(),
        agreement=offer.agreement.digest.hex(),
        offer=offer.digest.hex(),
        head=offer.offer.head.hex(),
        pcrs={str(index): value.hex() for index, value in sorted(enclave.pcrs.items())},
        module_id=enclave.module_id,
        timestamp_ms=enclave.timestamp_ms,
        simulated=enclave.simulated,
        **image_facts(image),
    )


def _verified(session: Session, out: Console, trust_head: str | None) -> VerifiedOffer:
    from parley.images import seen_image

    offer = session.verify(trust_head=None if trust_head is None else bytes_of(trust_head))
    enclave = offer.enclave
    head = "genesis" if not any(offer.offer.head) else short(offer.offer.head)
    age = max(0, _now_ms() - enclave.timestamp_ms) // 1000
    root = "SIMULATED root" if enclave.simulated else "AWS Nitro root"
    out.line(
        "enclave",
        f"verified: image {short(enclave.measurement.pcr0)}, this agreement, head {head}, document {age} s old, {root}",
    )
    say(out, seen_image(offer.agreement, enclave))
    return offer


def _say_image(session: Session, out: Console) -> None:
    image = session.image
    if image is not None:
        say(out, image)


def _image_facts(session: Session) -> dict[str, Any]:
    image = session.image
    return {} if image is None else image_facts(image)


# Bringing tables


def submit(
    agreement: AgreementArgument,
    tables: Annotated[
        list[str], typer.Argument(help="TABLE=FILE for each table that you bring.", metavar="TABLE=FILE...")
    ],
    sign: Annotated[
        bool, typer.Option("--sign/--no-sign", help="Countersign the roster by itself when no party is absent.")
    ] = True,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for the release, and sign the roster meanwhile.")
    ] = True,
    trust_head: Annotated[
        str | None,
        typer.Option("--trust-head", help="Head of the chain, from another member, where your state is lost."),
    ] = None,
    kms_key: Annotated[
        str | None,
        typer.Option("--kms-key", help="ARN of your KMS key: the agreement's, which is used where it names one."),
    ] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="Profile of your AWS configuration.")] = None,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the enclave, then check, seal and upload your tables, join, and wait for the result.

    CSV, Parquet and Arrow files. An error in a file ends it before anything is sent. Stopped, the same line goes on.
    Where the agreement names a KMS key of yours, its policy is checked first, and sessions join without you: no
    session has to be open yet.
    """
    from parley import Session, Standing

    out = Console(as_json)
    files = _files(tables)
    head = None if trust_head is None else bytes_of(trust_head)
    with connect(key, to, cert) as connection:
        brings = _session_or_standing(agreement, connection)
        session = brings if isinstance(brings, Session) else None
        own_key = _kms_key(brings, kms_key, profile)
        if session is not None:
            _verified(session, out, trust_head)
        if own_key is not None:
            brings.check_kms_key(own_key)
            out.line("kms key", f"{own_key.arn}: its policy and grants are as agreed")
        with out.progress() as bars:
            if isinstance(brings, Standing):
                sealed = brings.seal(files, bars.update, trust_head=head, kms_key=own_key)
            else:
                sealed = brings.seal(files, bars.update)
        _say_tables(brings.agreement, sealed, out)
        with out.progress() as bars:
            brings.upload(sealed, bars.update)
        out.line("upload", f"{size(sum(table.size for table in sealed))}, sealed")
        with out.progress() as bars:
            if session is not None and own_key is None:
                receipt = session.join(sealed, bars.update).digest
                out.line("receipt", short(receipt))
                facts: dict[str, Any] = {"receipt": receipt.hex(), **_image_facts(session)}
            else:
                stands = brings.join_by_kms(sealed, bars.update, kms_key=own_key)
                out.line("join", f"{short(stands.digest)}: stands for every session under your KMS key")
                facts = {"join": stands.digest.hex(), "kms_key": brings.agreement.kms[brings.name].text}
        out.result(
            step="joined",
            session=None if session is None else session.id.hex(),
            **facts,
            tables={
                table.table: {
                    "rows": table.rows,
                    "units": table.units,
                    "dropped": table.dropped,
                    "size": table.size,
                    "upload": table.upload.hex(),
                }
                for table in sealed
            },
        )
        if session is None:
            _say_standing(brings.agreement, out)
        elif wait:
            _wait(session, out, sign=sign)
        else:
            out.line("next", f"parley submit again, or parley roster sign {session_name(session.id)} when all are in")


def _session_or_standing(text: str, connection: Connection) -> Session | Standing:
    """The session that is meant. Where none is open: what a caller whose KMS key the agreement names does without."""
    from parley_protocol.errors import RefusedError

    try:
        return find_session(text, connection)
    except RefusedError as error:
        if error.code != "unknown-session":
            raise
        try:
            found = find_agreement(text, None, None, None, connection=connection).agreement()
        except Failure:
            raise error from None  # a session was named by its id
        if connection.member.name_in(found) not in found.kms:
            raise
        return connection.standing(found)


def _kms_key(brings: Session | Standing, given: str | None, profile: str | None) -> Key | None:
    """The caller's KMS key, reached with a profile where one is named; None where the agreement names none."""
    agreed = brings.agreement.kms.get(brings.name)
    if agreed is None or profile is None or given not in (None, agreed.text):
        return brings.kms_key(given)
    from parley.kms import Key

    return brings.kms_key(Key.connect(agreed.text, profile=profile))


def _say_tables(agreement: Agreement, sealed: list[SealedTable], out: Console) -> None:
    from parley.cli.summary import several

    for table in sealed:
        text = f"{table.table}: {plural(table.rows, 'row')}, {table.units:,} {several(agreement.unit.name)}"
        if table.dropped:
            key_name = agreement.tables[table.table].key
            text += f"; {plural(table.dropped, 'row')} without {key_name} will not be used"
        out.line("table", text)


def _say_standing(agreement: Agreement, out: Console) -> None:
    from parley_protocol.claims import needs_countersignatures

    out.line("session", "none is open; the next one joins without you")
    if needs_countersignatures(agreement):
        out.line("next", f"parley roster sign {agreement.title}, when parley inbox says so")


def _files(tables: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in tables:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise Failure(f"{text}: not TABLE=FILE")
        if name in found:
            raise Failure(f"{name}: named twice")
        if not Path(path).is_file():
            raise Failure(f"{path}: no such file", Exit.USAGE, "file")
        found[name] = Path(path)
    return found


def _wait(session: Session, out: Console, *, sign: bool) -> None:
    """Waits for the release and says what changes meanwhile."""
    from parley_protocol.errors import StateError

    said: set[str] = set()

    def tell(step: str, label: str, text: str, **values: object) -> None:
        if step not in said:
            said.add(step)
            out.line(label, text)
            out.result(step=step, session=session.id.hex(), **values)

    def seen(status: SessionStatus) -> None:
        if status.phase == "open":
            missing = [party for party, phase in status.parties if phase not in ("joined", "countersigned")]
            if missing:
                by_itself = "signs the roster by itself when all are in" if sign else "does not sign the roster"
                tell(
                    "waiting",
                    "waiting",
                    f"for {_names(missing)}; {by_itself}.  Ctrl-C is safe: run the same line again.",
                )
            else:
                tell(
                    "all-in",
                    "waiting",
                    f"all parties are in; for the start by {_names(list(session.agreement.session.start))}",
                )
        elif status.phase in ("rostered", "computing", "released"):
            mine = dict(status.parties).get(session.name)
            if status.phase != "rostered" or mine == "countersigned":
                tell(
                    "signed",
                    "roster",
                    f"{_included(session, status)}; countersigned" if mine else _included(session, status),
                )
        if status.phase == "released":
            tell("released", "released", f"parley fetch {session_name(session.id)}")

    while True:
        try:
            with out.progress() as bars:
                session.wait(bars.update, sign=sign, seen=seen)
            return
        except StateError as error:
            # A roster that this client does not sign by itself: whoever runs it decides.
            if error.code != "roster" or not sign:
                raise
            out.line("roster", error.message)
            if not out.confirm("Sign it?", yes=False):
                raise Failure(
                    f"the roster is not signed; look at it: parley roster show {session_name(session.id)}",
                    Exit.REFUSED,
                    "roster",
                ) from None
            session.countersign(by_hand=True)


def _included(session: Session, status: SessionStatus) -> str:
    absent = [party for party, phase in status.parties if phase in ("absent", "uploaded")]
    number = plural(len(session.agreement.parties) - len(absent), "party", "parties")
    return f"{number}, {'no absentee' if not absent else 'without ' + _names(absent)}"


def _names(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} others"


def join(
    session: SessionArgument,
    sign: Annotated[
        bool, typer.Option("--sign/--no-sign", help="Countersign the roster by itself when no party is absent.")
    ] = True,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for the release, and sign the roster meanwhile.")
    ] = True,
    trust_head: Annotated[
        str | None,
        typer.Option("--trust-head", help="Head of the chain, from another member, where your state is lost."),
    ] = None,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Join a session with the tables that you uploaded before."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        found = find_session(session, connection)
        _verified(found, out, trust_head)
        receipt = found.join()
        out.line("receipt", short(receipt.digest))
        out.result(step="joined", session=found.id.hex(), receipt=receipt.digest.hex(), **_image_facts(found))
        if wait:
            _wait(found, out, sign=sign)


# The roster


def start(
    session: SessionArgument,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for the countersignatures and the result.")
    ] = True,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Close the inputs and ask for the roster. For members named in the agreement's session.start."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        found = find_session(session, connection)
        roster = found.start()
        _say_image(found, out)
        absent = [absentee.party for absentee in roster.absentees]
        number = plural(len(roster.included), "party", "parties")
        out.line("roster", f"{number}, {'no absentee' if not absent else 'without ' + _names(absent)}")
        out.result(
            step="rostered", session=found.id.hex(), roster=roster.digest.hex(), absent=absent, **_image_facts(found)
        )
        if not wait:
            return
        with out.progress() as bars:
            # Signing is the business of this member's own `submit` or `roster sign`.
            status = found.wait(bars.update, sign=False)
        outputs, members = found.agreement.outputs, found.agreement.recipients
        signed = sum(phase == "countersigned" for _, phase in status.parties)
        out.line("signed", f"{signed} of {len(roster.included)} countersigned")
        out.line("computed", f"{plural(len(outputs), 'output')} for {plural(len(members), 'recipient')}")
        out.result(step="released", session=found.id.hex(), outputs=list(outputs))


def roster_show(
    session: SessionArgument,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the roster: what will be computed on, and why it would not be signed by itself."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        found = find_session(session, connection)
        roster = found.roster()
        if roster is None:
            raise Failure("no roster stands", Exit.UNAVAILABLE, "phase")
        phases = dict(found.status().parties)
        reasons = found.check_roster(roster) if roster.entry(found.name) is not None else ()
    out.line("roster", f"{short(roster.digest)}, to be signed until {when(roster.expires_at)}")
    out.columns(
        [
            (entry.party, ", ".join(short(upload) for upload in entry.uploads), phases.get(entry.party, ""))
            for entry in roster.included
        ]
    )
    for absentee in roster.absentees:
        out.line("absent", f"{absentee.party}: {absentee.reason}")
    for reason in reasons:
        out.line("note", reason)
    out.result(
        session=found.id.hex(),
        roster=roster.digest.hex(),
        expires_ms=roster.expires_at,
        included={entry.party: [upload.hex() for upload in entry.uploads] for entry in roster.included},
        absent={absentee.party: absentee.reason for absentee in roster.absentees},
        signed=[party for party, phase in phases.items() if phase == "countersigned"],
        notes=list(reasons),
    )


def roster_sign(
    session: SessionArgument,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Countersign the roster by hand: the only consent that can lead to a release."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        found = find_session(session, connection)
        roster = found.roster()
        if roster is None:
            raise Failure("no roster stands", Exit.UNAVAILABLE, "phase")
        for reason in found.check_roster(roster):
            out.line("note", reason)
        if not out.confirm(f"Sign the roster {short(roster.digest)} as {found.name}?", yes):
            raise Failure("not signed", Exit.REFUSED, "roster")
        status = found.countersign(by_hand=True)
    out.line("signed", short(roster.digest))
    out.result(session=found.id.hex(), roster=roster.digest.hex(), phase=status.phase)


def roster_refuse(
    session: SessionArgument,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Refuse the roster: it ends for everybody, and the refusal names you."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        found = find_session(session, connection)
        if not out.confirm(f"Refuse the roster as {found.name}? All see that it was you.", yes):
            raise Failure("not refused", Exit.REFUSED, "roster")
        status = found.refuse()
    out.line("refused", session_name(found.id))
    out.result(session=found.id.hex(), phase=status.phase)


# Where it stands


def status(
    session: SessionArgument,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a session's phase and parties, as the coordinator tells them."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        found = find_session(session, connection)
        state = found.status()
    out.line("session", f"{session_name(found.id)}  {found.agreement.title}, version {found.agreement.version}")
    percent = f", {state.percent} %" if state.phase == "computing" else ""
    code = f" ({state.code})" if state.code else ""
    out.line("phase", f"{state.phase}{percent}{code}")
    if state.phase in ("launching", "open"):
        out.line("until", when(state.deadline_ms))
    out.columns([(f"  {party}", _phase(state, party, phase)) for party, phase in state.parties])
    _say_image(found, out)
    out.result(
        session=found.id.hex(),
        agreement=found.agreement.digest.hex(),
        title=found.agreement.title,
        phase=state.phase,
        code=state.code or None,
        percent=state.percent,
        deadline_ms=state.deadline_ms,
        parties=dict(state.parties),
        refused=dict(state.refused),
        **_image_facts(found),
    )


def _phase(state: SessionStatus, party: str, phase: str) -> str:
    code = state.refused.get(party)
    return phase if code is None else f"{phase} ({code})"


def watch(
    session: Annotated[
        str | None, typer.Argument(help="Start of the session's id, or an agreement; all where left out.")
    ] = None,
    after: Annotated[int, typer.Option(help="Number of the last event that you have seen.", min=0)] = 0,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print events as they happen, until Ctrl-C."""
    out = Console(as_json)
    with connect(key, to, cert) as connection:
        wanted = None if session is None else find_session(session, connection).id
        for event in connection.watch(wanted, after):
            name = session_name(event.session) if event.session else short(event.agreement)
            what = " ".join(part for part in (event.kind, event.member, event.table, event.code) if part)
            percent = f" {event.percent} %" if event.kind == "progress" else ""
            out.text(f"{event.number:>6}  {when(event.at_ms)}  {name}  {what}{percent}")
            out.result(
                number=event.number,
                at_ms=event.at_ms,
                agreement=event.agreement.hex(),
                session=event.session.hex() or None,
                kind=event.kind,
                member=event.member or None,
                table=event.table or None,
                code=event.code or None,
                percent=event.percent,
            )
