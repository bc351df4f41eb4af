"""A session against the enclave of the image tree: two import packages, the locked requirements, and nothing else.

The launcher starts it as it starts any local enclave, and measures the tree: an agreement that names other measurements
is refused by the enclave itself.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from parley_deploy import enclave
from parley_deploy.measure import image_measurements
from parley_protocol.agreement.model import Measurement
from parley_protocol.v1 import enclave_pb2 as pb
from support.enclave import Run, Simulation, agreement_of, identities, released, rows_of, signed, until
from support.image_tree import LOCK, ImageTree


class Launched(Simulation):
    """An enclave that the launcher runs from an image tree, under a root in its folder."""

    def __init__(self, folder: Path, tree: ImageTree) -> None:
        super().__init__(folder)
        self.tree = tree
        root = folder / "root"
        root.mkdir()
        self.root.save(root)
        registers = image_measurements(tree.pythonpath)
        self.measurement = Measurement(registers[0], registers[1], registers[2])

    def boot(self) -> Launched:
        arguments = ["--dir", str(self.folder), "--root", str(self.folder / "root"), "--workers", "2"]
        assert enclave.main([*arguments, "--tree", str(self.tree.pythonpath), "--python", str(self.tree.python)]) == 0
        return self

    def end(self) -> None:
        if (self.folder / "nsm.pid").exists():
            os.kill(int((self.folder / "nsm.pid").read_text()), signal.SIGTERM)
            until(lambda: not (self.folder / "nsm.pid").exists())


@pytest.fixture
def launched(tmp_path: Path, image_tree: ImageTree) -> Iterator[Launched]:
    copy = tmp_path / "tree"
    shutil.copytree(image_tree.pythonpath, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(LOCK, copy / "requirements.lock")
    with Launched(tmp_path, ImageTree(image_tree.python, copy)) as simulation:
        yield simulation


def test_a_session_runs_in_the_image_tree(launched: Launched) -> None:
    members = identities(["north", "south", "west", "analyst"])
    agreement = agreement_of(launched, members, analysts=["analyst"], start=("analyst",))
    rows = {name: {"visits": rows_of(number, 900)} for number, name in enumerate(agreement.parties)}
    run = Run(launched, agreement, members, rows)
    try:
        run.load()
        offer = run.offer()
        run.join(offer)
        roster, _ = run.start(offer)
        release = released(run.countersign(offer, roster))
        tables = run.open(release, "analyst")
        assert tables["by_site"].rows == 3
        counts = next(column for column in tables["by_site"].columns if column.name == "rows")
        assert sum(cell for cell in counts.cells if isinstance(cell, int)) == 2700
    finally:
        run.close()


def test_what_runs_is_the_tree_and_not_what_is_installed(launched: Launched) -> None:
    pid = int((launched.folder / "enclave.pid").read_text())
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert f"PYTHONPATH={launched.tree.pythonpath}".encode() in environment
    assert os.readlink(f"/proc/{pid}/exe") == os.path.realpath(launched.tree.python)
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "grpc" not in maps and "duckdb" not in maps


def test_an_agreement_on_another_image_is_refused(launched: Launched) -> None:
    members = identities(["north", "south", "west"])
    launched.measurement = Measurement(bytes([1]) * 48, launched.measurement.pcr1, launched.measurement.pcr2)
    agreement = agreement_of(launched, members)
    rows = {name: {"visits": rows_of(number, 100)} for number, name in enumerate(agreement.parties)}
    run = Run(launched, agreement, members, rows)
    try:
        assert run.host.refused(load=pb.Load(agreements=[signed(agreement, members)])) == "attestation"
    finally:
        run.close()
