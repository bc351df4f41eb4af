"""`parley backup` and `parley restore`: the key with its state, as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parley.cli.app import command
from parley.cli.console import Console, size
from parley.cli.options import JsonOption, KeyOption, key_path


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app, "backup")(backup)
    command(app, "restore")(restore)
