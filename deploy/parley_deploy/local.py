"""`parley local`: a coordinator with simulated enclaves on this machine, for trying things out.

A folder holds everything: the local root and its certificate, the measurements of the installed enclave, the coordinator's
configuration, state and TLS certificate. The same folder comes up again with the same keys.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

START_SECONDS: Final = 30
"""How long a coordinator may take to answer."""
STOP_SECONDS: Final = 15
"""How long it may take to end after SIGTERM, its grace for running calls included."""


class StackError(Exception):
    """The local stack cannot be made, started or stopped: the message says what to look at."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A local coordinator in a folder."""

    folder: Path

    @property
    def root(self) -> Path:
        """The folder of the local root."""
        return self.folder / "root"

    @property
    def root_certificate(self) -> Path:
        """The root's certificate: what `root:` of an agreement names."""
        return self.folder / "simulated-root.pem"

    @property
    def measurements(self) -> Path:
        """The measurements of the installed enclave: what `measurements:` of an agreement names."""
        return self.folder / "measurements.json"

    @property
    def certificate(self) -> Path:
        """The coordinator's TLS certificate: what `--cert` of the client names."""
        return self.folder / "tls.crt"

    @property
    def address(self) -> str:
        """Where the running coordinator listens; StackError where none runs."""
        try:
            return (self.folder / "address").read_text().strip()
        except FileNotFoundError:
            raise StackError(f"{self.folder}: no coordinator runs here") from None

    @property
    def pid(self) -> int | None:
        """The coordinator's process, where it runs."""
        try:
            pid = int((self.folder / "coordinator.pid").read_text())
            os.kill(pid, 0)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return None
        return pid

    @property
    def environment(self) -> dict[str, str]:
        """What members' commands need to find the coordinator without options, once it runs."""
        return {"PARLEY_CERT": str(self.certificate)}
