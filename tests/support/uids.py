"""Processes under another uid: an interpreter that it may run, and what it needs to see the packages of this one."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

import parley_enclave
import parley_protocol

UID = 61234
"""A uid that nobody has."""


def search_path() -> str:
    """PYTHONPATH for an interpreter that is not this one's environment."""
    roots = [str(Path(package.__path__[0]).parent) for package in (parley_enclave, parley_protocol)]
    return os.pathsep.join([*roots, *site.getsitepackages()])


def interpreter() -> str:
    """An interpreter of this version that `UID` may run; skips the test where there is none."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: workers under another uid can only be started by root")
    system = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin:/usr/local/bin")
    for candidate in filter(None, (sys.executable, system)):
        program = [candidate, "-P", "-s", "-B", "-c", "import numpy, cryptography, cbor2, parley_enclave.worker"]
        environment = {"PYTHONPATH": search_path()}
        try:
            seen = subprocess.run(program, user=UID, group=UID, extra_groups=[], cwd="/", env=environment, check=False)
        except PermissionError:
            continue
        if seen.returncode == 0:
            return candidate
    pytest.skip("NOT TESTED: no interpreter that another user may run sees the packages of this one")
