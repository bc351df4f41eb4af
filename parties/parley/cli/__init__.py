"""The command line of Parley."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The entry point `parley`."""
    from parley.cli.app import run

    sys.exit(run())
