"""Options that several commands take, and how each finds its value when it is not given."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from parley.cli.exits import Exit, Failure

if TYPE_CHECKING:
    from parley import Connection, Member, Session, SignedAgreement
    from parley_protocol.agreement.model import Agreement

_HEX: Final = re.compile(r"[0-9a-f]{4,96}")

KeyOption = Annotated[
    Path | None,
    typer.Option("--key", envvar="PARLEY_KEY", help="Your private key file. Default: the only *.key in this folder."),
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", envvar="PARLEY_COORDINATOR", help="The coordinator, host:port. Default: the last one used."),
]
CertOption = Annotated[
    Path | None,
    typer.Option("--cert", envvar="PARLEY_CERT", help="Its TLS certificate or CA. Default: the last one used."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one value per line.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Answer the question with yes.")]

PASSPHRASE: Final = "PARLEY_PASSPHRASE"  # a name, not a passphrase
"""Name of the environment variable with the passphrase of a private key."""
BACKUP_PASSPHRASE: Final = "PARLEY_BACKUP_PASSPHRASE"
"""The same for a backup."""


def key_path(key: Path | None) -> Path:
    """The caller's private key file; Failure where it is not clear which."""
    if key is not None:
        if not key.is_file():
            raise Failure(f"{key}: no such key file")
        return key
    found = sorted(Path().glob("*.key"))
    if not found:
        raise Failure(
            "no *.key in this folder: name yours with --key or PARLEY_KEY, or make one with: parley keygen NAME"
        )
    if len(found) > 1:
        raise Failure(
            f"several keys in this folder ({', '.join(map(str, found))}): name yours with --key or PARLEY_KEY"
        )
    return found[0]


AGREEMENTS: Final = (".yaml", ".yml", ".parley")
"""Endings of files that hold an agreement."""


def passphrase() -> str:
    """The passphrase from the environment, or asked for on a terminal."""
    given = os.environ.get(PASSPHRASE)
    if given is None and sys.stdin.isatty():
        given = typer.prompt("Passphrase", hide_input=True, err=True)
    if given is None:
        raise Failure(f"the key has a passphrase: set {PASSPHRASE}, or use a terminal", Exit.USAGE, "passphrase")
    return given


def member(key: Path | None) -> Member:
    """The caller."""
    from parley import Member

    return Member.load(key_path(key), passphrase=passphrase)


def connect(key: Path | None, to: str | None, cert: Path | None) -> Connection:
    """A connection to the coordinator as the caller."""
    import parley

    return parley.connect(to, member(key), cert=cert)


def bytes_of(text: str) -> bytes:
    """The bytes of a digest written in hex."""
    try:
        found = bytes.fromhex(text.replace("-", ""))
    except ValueError:
        raise Failure(f"{text}: not a digest in hex") from None
    if len(found) != 48:
        raise Failure(f"{text}: a digest has 96 hex digits")
    return found


def read_agreement(path: Path) -> SignedAgreement:
    """An agreement of a file: YAML, then without signatures, or .parley."""
    from parley.agreements import load_signed, load_source
    from parley_protocol.agreement.signed import SignedAgreement

    if path.suffix in (".yaml", ".yml"):
        return SignedAgreement(load_source(path).canonical)
    return load_signed(path)


def find_agreement(
    text: str,
    key: Path | None,
    to: str | None,
    cert: Path | None,
    *,
    connection: Connection | None = None,
    fresh: bool = False,
) -> SignedAgreement:
    """The agreement that `text` names: a file, or the title or start of the digest of one that the caller keeps or that
    waits at the coordinator. `fresh`: with the signatures that the coordinator has by now."""
    path = Path(text)
    if path.suffix in AGREEMENTS and path.is_file():
        signed = read_agreement(path)
        if not fresh:
            return signed
        text = signed.digest.hex()
    if connection is not None:
        return _find_agreement(text, connection.member, connection, fresh=fresh)
    me = member(key)
    kept = [signed for signed in me.state.agreements() if names_agreement(text, signed.agreement())]
    if kept and not fresh:
        return newest(text, kept)
    with connect(key, to, cert) as made:
        return _find_agreement(text, me, made, fresh=fresh)


def _find_agreement(text: str, me: Member, connection: Connection, *, fresh: bool) -> SignedAgreement:
    kept = [signed for signed in me.state.agreements() if names_agreement(text, signed.agreement())]
    if kept and not fresh:
        return newest(text, kept)
    digests = {signed.digest for signed in kept} | {item.agreement for item in connection.inbox()}
    if _HEX.fullmatch(text) and len(text) == 96:
        digests.add(bytes.fromhex(text))
    found = [connection.agreement(digest).signed for digest in sorted(digests)]
    return newest(text, [signed for signed in found if names_agreement(text, signed.agreement())])


def names_agreement(text: str, agreement: Agreement) -> bool:
    """Whether `text` is the title of an agreement or the start of its digest."""
    return agreement.title == text or (_HEX.fullmatch(text) is not None and agreement.digest.hex().startswith(text))


def newest(text: str, found: list[SignedAgreement]) -> SignedAgreement:
    """The one that is meant: the newest version of one series; Failure where there is none, or several series."""
    if not found:
        raise Failure(f"{text}: no such agreement here or at the coordinator", Exit.USAGE, "unknown-agreement")
    if len({signed.agreement().series for signed in found}) > 1:
        names = ", ".join(sorted({signed.digest.hex()[:16] for signed in found}))
        raise Failure(f"{text}: several agreements ({names}): name one by the start of its digest", Exit.USAGE)
    return max(found, key=lambda signed: signed.agreement().version)


def find_session(text: str, connection: Connection, *, released: bool = False) -> Session:
    """The session that `text` names: the start of its id, or an agreement whose live session is meant (`released`: the
    newest that has a release)."""
    digits = text.replace("-", "").lower()
    if _HEX.fullmatch(digits):
        matching = [session for session in connection.sessions() if session.hex().startswith(digits)]
        if len(matching) == 1:
            return connection.session(matching[0])
        if len(matching) > 1:
            raise Failure(f"{text}: {len(matching)} sessions begin so; give more digits", Exit.USAGE, "unknown-session")
        if len(digits) == 32:
            return connection.session(bytes.fromhex(digits))
        opened = _opened(digits, connection)
        if opened is not None:
            return connection.session(opened)
    agreement = find_agreement(text, None, None, None, connection=connection).agreement()
    if not released:
        return connection.session(agreement)
    waiting = [item for item in connection.inbox() if item.kind == "fetch" and item.agreement == agreement.digest]
    if waiting:
        return connection.session(max(waiting, key=lambda item: item.since_ms).session)
    known = [connection.session(session) for session in connection.sessions()]
    done = [
        session
        for session in known
        if session.agreement.digest == agreement.digest and session.status().phase == "released"
    ]
    if not done:
        raise Failure(f"{agreement.title} has no release yet", Exit.UNAVAILABLE, "phase")
    if len(done) > 1:
        names = ", ".join(session.id.hex()[:8] for session in done)
        raise Failure(
            f"{agreement.title} has several releases: name the session ({names})", Exit.USAGE, "unknown-session"
        )
    return done[0]


def _opened(digits: str, connection: Connection) -> bytes | None:
    """A session that was opened under one of the caller's agreements, though nothing in it waits for the caller."""
    for signed in connection.member.state.agreements():
        live = connection.live(signed.digest)
        if live is not None and live.hex().startswith(digits):
            return live
    for event in connection.transport.events(0, b"", 2.0):
        if event.kind == "opened" and bytes(event.session).hex().startswith(digits):
            return bytes(event.session)
    return None


def backup_passphrase(*, again: bool) -> str:
    """The passphrase of a backup: from the environment, or asked for, twice where it is a new one."""
    given = os.environ.get(BACKUP_PASSPHRASE)
    if given is None and sys.stdin.isatty():
        given = typer.prompt("Passphrase of the backup", hide_input=True, confirmation_prompt=again, err=True)
    if given is None:
        raise Failure(
            f"a backup has a passphrase: set {BACKUP_PASSPHRASE}, or use a terminal", Exit.USAGE, "passphrase"
        )
    return given
