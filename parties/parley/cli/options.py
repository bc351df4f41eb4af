"""Options that several commands take, and how each finds its value when it is not given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from parley.cli.exits import Exit, Failure

if TYPE_CHECKING:
    pass

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

PASSPHRASE: Final = "PARLEY_PASSPHRASE"
"""Name of the environment variable with the passphrase of a private key."""


def key_path(key: Path | None) -> Path:
    """The caller's private key file; Failure where it is not clear which."""
    if key is not None:
        if not key.is_file():
            raise Failure(f"{key}: no such key file")
        return key
    found = sorted(Path().glob("*.key"))
    if not found:
        raise Failure("no *.key in this folder: name yours with --key or PARLEY_KEY, or make one with: parley keygen NAME")
    if len(found) > 1:
        raise Failure(f"several keys in this folder ({', '.join(map(str, found))}): name yours with --key or PARLEY_KEY")
    return found[0]


def passphrase() -> str | None:
    """The passphrase from the environment, or asked for on a terminal."""
    given = os.environ.get(PASSPHRASE)
    if given is None and sys.stdin.isatty():
        given = typer.prompt("Passphrase", hide_input=True, err=True)
    if given is None:
        raise Failure(f"the key has a passphrase: set {PASSPHRASE}, or use a terminal", Exit.USAGE, "passphrase")
    return given
