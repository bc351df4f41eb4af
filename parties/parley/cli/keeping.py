"""`parley backup` and `parley restore`: the key with its state, as one file."""

from __future__ import annotations

import typer

from parley.cli.app import command


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app, "backup")(backup)
    command(app, "restore")(restore)
