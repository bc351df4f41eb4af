"""The emulated KMS is nothing that a production path could import: no code of one asks for it, and what it needs is not there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

NEEDED = ("moto", "flask", "werkzeug")
PRODUCTION = "allocator bundle debian emulator enclave image local measure member nsm pki".split()
"""Modules of `parley_deploy` that build, measure, start or look after what runs."""

_PROGRAM = """
import importlib, pkgutil, sys

blocked, names = set(sys.argv[1].split()), sys.argv[2].split()

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in blocked or name.startswith(tuple(f"{one}." for one in blocked)):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for name in names:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        # Alembic alone runs its own file.
        if not found.name.endswith((".__main__", ".migrations.env")):
            importlib.import_module(found.name)
print("imported")
"""


def run(blocked: list[str], names: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _PROGRAM, " ".join(blocked), " ".join(names)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_production_imports_without_it() -> None:
    roles = ["parley_protocol", "parley", "parley_enclave", "parley_coordinator"]
    found = run(["parley_deploy.kms", *NEEDED], [*roles, *(f"parley_deploy.{name}" for name in PRODUCTION)])
    assert found.stdout == "imported\n", found.stderr


@pytest.mark.parametrize("name", ["parley_deploy.kms", "parley_deploy.demo_kms"])
def test_the_blocker_blocks(name: str) -> None:
    found = run(list(NEEDED) if name == "parley_deploy.kms" else ["parley_deploy.kms"], [name])
    assert "is blocked" in found.stderr and found.stdout == ""


@pytest.mark.parametrize("lock", ["coordinator.lock", "image/requirements.lock", "image/wheels.lock"])
def test_no_lock_of_what_runs_in_production_has_what_it_needs(repository: Path, lock: str) -> None:
    text = (repository / "deploy/parley_deploy" / lock).read_text("utf-8").lower()
    assert "cryptography" in text, "it is a lock of packages"
    assert not [name for name in NEEDED if re.search(rf"(?m)^\W*{name}\b", text)]
