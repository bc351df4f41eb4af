"""`parley backup` and `parley restore`: the key with its state, as one encrypted file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parley.cli.app import command
from parley.cli.console import Console, size
from parley.cli.options import JsonOption, KeyOption, backup_passphrase, member


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app, "backup")(backup)
    command(app, "restore")(restore)


def backup(
    file: Annotated[Path, typer.Argument(help="The backup; it must not be there yet.")],
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write your key with its state to one file under a passphrase: a key without its state refuses to join.

    Sealed tables and one-time keys are not in it: after a restore you join again.
    """
    from parley import backup as make

    out = Console(as_json)
    me = member(key)
    make(me, file, backup_passphrase(again=True))
    out.line(str(file), f"{me.name} with its state, {size(file.stat().st_size)}; use one living copy at a time")
    out.result(file=str(file), member=me.name, size=file.stat().st_size)


def restore(
    file: Annotated[Path, typer.Argument(help="A backup, as `parley backup` writes it.")],
    folder: Annotated[
        Path, typer.Option("--dir", help="Where the files go. Nothing that is there is replaced.")
    ] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Put a key with its state back."""
    from parley import restore as unpack

    out = Console(as_json)
    path = unpack(file, folder, backup_passphrase(again=False))
    out.line(str(path), "restored with its state; make sure that no other copy of it is used")
    out.result(key=str(path))
