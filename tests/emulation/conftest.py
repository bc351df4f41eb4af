"""Tests that boot the image: they take minutes and a built image, so they run where PARLEY_QEMU=1 asks for them.

PARLEY_IMAGE names another image than build/image/parley.eif, PARLEY_ACCEL another accelerator than the emulator would take.
What was measured stands in build/qemu-figures.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulation.machines import Emulator
from parley_deploy.emulator import qemu

OWN_VARIABLE = ("test_nitro_machine.py",)
"""Files that say themselves when they run."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips all of this folder where nobody asked for it."""
    if os.environ.get("PARLEY_QEMU") == "1":
        return
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in OWN_VARIABLE:
            item.add_marker(pytest.mark.skip(reason="PARLEY_QEMU=1 is not set: make qemu-test boots the image"))


@pytest.fixture(scope="session")
def image(repository: Path) -> Path:
    """The image under test."""
    path = Path(os.environ.get("PARLEY_IMAGE") or repository / "build" / "image" / "parley.eif")
    assert path.is_file(), f"{path} is not there: make image"
    return path.resolve()


@pytest.fixture(scope="session")
def emulator(repository: Path) -> Emulator:
    """The emulator's options that all tests share; its QEMU is fetched where there is none."""
    folder = repository / ".cache" / "qemu"
    qemu.get(folder)
    return Emulator(folder, os.environ.get("PARLEY_ACCEL", "auto"))


@pytest.fixture(scope="session")
def figures(repository: Path) -> Iterator[dict[str, float]]:
    """What the tests measure: printed, and kept as a file."""
    found: dict[str, float] = {}
    yield found
    if found:
        found = {what: float(f"{value:.3g}") for what, value in sorted(found.items())}
        for what, value in found.items():
            print(f"{what}: {value}")
        path = repository / "build" / "qemu-figures.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
