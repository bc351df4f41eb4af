"""`parley keygen` and `parley contact`: one's own key, and the keys of others whose fingerprints one has compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from parley.cli.app import command, make_app
from parley.cli.console import Console, plural
from parley.cli.exits import Exit, Failure
from parley.cli.options import PASSPHRASE, JsonOption, KeyOption, YesOption, member, passphrase


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app, "keygen")(keygen)
    contacts = make_app("Keys of other members. A key counts once you have compared its fingerprint with its owner.")
    command(contacts, "add")(add)
    command(contacts, "confirm")(confirm)
    command(contacts, "list")(list_)
    app.add_typer(contacts, name="contact")


def keygen(
    name: Annotated[str, typer.Argument(help="Your name in agreements; also the name of the files.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where the files go.")] = Path(),
    protect: Annotated[
        bool, typer.Option("--passphrase", help=f"Ask for a passphrase (or take {PASSPHRASE}).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make your private key and the public one that the others need."""
    from parley import Member

    out = Console(as_json)
    made = Member.generate(name, folder, passphrase=_new_passphrase() if protect else None)
    out.text(f"{name}.key  private, readable by you alone; keep a copy where you keep passwords")
    out.text(f"{name}.pub  give this to the others and read them the fingerprint:  {made.fingerprint}")
    out.result(
        name=name, private=str(folder / f"{name}.key"), public=str(folder / f"{name}.pub"), fingerprint=made.fingerprint
    )


def _new_passphrase() -> str:
    given = passphrase()
    if sys.stdin.isatty() and typer.prompt("Again", hide_input=True, err=True) != given:
        raise Failure("the two passphrases differ", Exit.USAGE, "passphrase")
    return given


def add(
    files: Annotated[list[Path], typer.Argument(help="Public key files, as `parley keygen` writes them.")],
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put public keys into your contacts, not yet confirmed. Yours is left out."""
    from parley_protocol.identity import PublicIdentity, load_public

    out = Console(as_json)
    me = member(key)
    keys: dict[str, PublicIdentity] = {}
    for path in files:
        if path.stem in keys:
            raise Failure(f"{path}: a second file for {path.stem}")
        keys[path.stem] = load_public(path.read_bytes())
    for contact in me.contacts.put_all(keys):
        out.line(
            contact.name, f"{contact.fingerprint}  {'confirmed' if contact.confirmed else 'compare it with its owner'}"
        )
        out.result(name=contact.name, fingerprint=contact.fingerprint, confirmed=contact.confirmed)


def confirm(
    name: Annotated[str | None, typer.Argument(help="The contact.")] = None,
    fingerprint: Annotated[str | None, typer.Argument(help="Its fingerprint, as its owner read it to you.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A list of your own: a name and a fingerprint on each line.")
    ] = None,
    key: KeyOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say that you compared a fingerprint with its owner.

    By voice or on paper: whoever carried the key to you can have carried another one.
    """
    out = Console(as_json)
    me = member(key)
    if source is not None:
        if name is not None:
            raise Failure("give a name and fingerprint, or --from, not both")
        pairs = _read_list(source)
    elif name is None:
        raise Failure("give a name and the fingerprint that you were told, or --from LIST")
    elif fingerprint is not None:
        pairs = [(name, fingerprint)]
    else:
        shown = me.contacts.get(name).fingerprint
        if not out.confirm(f"{name}  {shown}\nHave you compared this fingerprint with {name}?", yes):
            raise Failure(f"{name} is not confirmed", Exit.REFUSED, "state")
        pairs = [(name, shown)]
    # One's own name may stand in a list that all members share.
    found = me.contacts.confirm_all({who: told for who, told in pairs if who != me.name})
    out.line("confirmed", plural(len(found), "contact"))
    out.result(confirmed=[contact.name for contact in found])


def _read_list(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2:
            raise Failure(f"{path.name}:{number}: not a name and a fingerprint", Exit.DATA, "data")
        pairs.append((words[0], words[1]))
    return pairs


def list_(key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Show your contacts and which of them are confirmed."""
    out = Console(as_json)
    contacts = member(key).contacts.list()
    out.columns(
        [(item.name, item.fingerprint, "confirmed" if item.confirmed else "not confirmed") for item in contacts]
    )
    if not contacts:
        out.text("no contacts yet: parley contact add FILE.pub")
    for item in contacts:
        out.result(name=item.name, fingerprint=item.fingerprint, confirmed=item.confirmed)
