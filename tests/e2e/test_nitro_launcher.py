"""Whole sessions through the launcher `nitro`: a coordinator process, a stand-in for nitro-cli, and real enclaves behind it.

The stand-in boots a simulated enclave in place of the image. So the agreement accepts two images: the one that the launcher
measures and hands to nitro-cli, and the code that really runs and attests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import grpc
import pytest

from parley_deploy.nsm import LocalRoot, image_measurements
from parley_deploy.pki import system_now_ms
from parley_protocol.agreement.model import Measurement
from parley_protocol.bundle import verify_bundle
from parley_protocol.v1 import coordinator_pb2 as pb
from support import image_tree, nitro_coordinator
from support.coordinator import Coordinator, Play, error_info, now_ms, refused
from support.enclave import Party, Simulation, agreement_of, identities, rows_of, until
from support.nitro_host import NitroHost, tiny_image

pytestmark = pytest.mark.e2e

NAMES = ("ann", "bob", "cyd")


class NitroCoordinator(Coordinator):
    """A coordinator whose enclaves run on a played parent."""

    def __init__(self, folder: Path, host: NitroHost, image: Path, extra: str = "") -> None:
        command = ", ".join(json.dumps(part) for part in host.command)
        toml = f"[launcher]\nkind = 'nitro'\n{extra}\n[launcher.nitro]\nimage = '{image}'\nmemory_mib = 256\n"
        super().__init__(folder, ["none"], f"{toml}command = [{command}]\nattempts = 2\npause_s = 0.1\n")
        self.host = host

    def start(self) -> Self:
        (self.folder / "address").unlink(missing_ok=True)
        program = [sys.executable, nitro_coordinator.__file__, str(self.folder), str(self.host.folder)]
        with (self.folder / "log").open("ab") as log:
            self.process = process = subprocess.Popen(program, stdin=subprocess.DEVNULL, stderr=log)
        until(lambda: (self.folder / "address").exists() or process.poll() is not None)
        assert process.poll() is None, self.log
        self.address = (self.folder / "address").read_text().strip()
        return self

    def events(self, event: str) -> list[dict[str, Any]]:
        """Lines of its log."""
        return [line for line in map(json.loads, self.log.splitlines()) if line["event"] == event]


class Stage:
    """A played parent with a coordinator on it, an image, and the members of an agreement."""

    def __init__(self, folder: Path) -> None:
        root = folder / "root"
        root.mkdir()
        LocalRoot.create(system_now_ms()).save(root)
        self.root = LocalRoot.load(root)
        # The code as it stands now: what is edited while the tests run changes neither measurement nor enclave.
        tree = folder / "tree"
        for package in image_tree.PACKAGES:
            shutil.copytree(package, tree / package.name, ignore=shutil.ignore_patterns(*image_tree.LEFT_OUT))
        shutil.copy(image_tree.LOCK, tree)
        measured = image_measurements(tree)
        self.simulated = Measurement(measured[0], measured[1], measured[2])
        self.image = folder / "parley.eif"
        self.measured = tiny_image(self.image)
        self.host = NitroHost(folder / "host", enclave="simulated")
        self.host.set(arguments=["--root", str(root), "--workers", "1", "--tree", str(tree)])
        self.coordinator = NitroCoordinator(folder / "c", self.host, self.image)

    def play(self, *measurements: Measurement) -> Play:
        """ann and bob bring tables, cyd is the analyst; signed, uploaded, and the coordinator running."""
        accepted = measurements or (self.measured, self.simulated)
        simulation = cast("Simulation", SimpleNamespace(root=self.root, measurement=accepted[0]))
        members = identities(NAMES)
        agreement = replace(agreement_of(simulation, members, analysts=["cyd"]), measurements=accepted)
        parties = {
            name: Party(agreement, name, members[name], {"visits": rows_of(number, 2000)})
            for number, name in enumerate(agreement.parties)
        }
        self.coordinator.operators(members["ann"])
        self.coordinator.start()
        made = Play(self.coordinator, agreement, members, parties)
        made.sign()
        made.upload()
        return made


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    with made.host, made.coordinator:
        yield made


def release(made: Play) -> None:
    """From an open session to its verified bundle."""
    offer = made.offer("cyd")
    made.join(offer)
    made.countersign(offer, made.start(offer))
    made.wait("released")
    verified = verify_bundle(made.client("cyd").bundle(made.session), now_ms=now_ms())
    assert verified.record.record.body.sequence == 1


def test_a_session_from_agreement_to_bundle(stage: Stage) -> None:
    made = stage.play()
    made.open()
    (name,) = stage.host.running()
    assert name.startswith(f"parley-{made.agreement.digest.hex()[:8]}-")
    (call,) = stage.host.calls("run-enclave")
    assert (call["eif_path"], call["memory"], call["debug_mode"]) == (str(stage.image), 256, False)
    release(made)
    # What it was for is done: with its memory go the session's keys.
    until(lambda: stage.host.running() == [])
    assert len(stage.host.calls("terminate-enclave")) == 1
    assert stage.coordinator.stop() == 0


def test_a_coordinator_that_was_killed_finds_its_enclave_again(stage: Stage) -> None:
    made = stage.play()
    made.open()
    made.join(made.offer(), "ann")
    before = stage.host.running()
    stage.coordinator.kill()
    stage.coordinator.start()
    assert made.state().phase == "open" and stage.host.running() == before
    release(made)
    assert len(stage.host.calls("run-enclave")) == 1


@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_an_enclave_that_ends_behind_its_back_loses_the_session_and_no_table(stage: Stage, how: str) -> None:
    made = stage.play()
    made.open()
    made.join(made.offer())
    lost = made.session
    (name,) = stage.host.running()
    (stage.host.terminate if how == "terminated" else stage.host.kill)(name)
    assert made.wait("lost").code == "lost"
    assert made.open().session not in (lost, b"")
    assert [made.client(member).waiting() for member in NAMES] == [["JOIN"], ["JOIN"], []]
    release(made)


def test_an_image_that_the_agreement_does_not_accept_is_told_before_it_is_started(stage: Stage) -> None:
    made = stage.play(stage.simulated)
    with pytest.raises(grpc.RpcError) as caught:
        made.open()
    assert isinstance(caught.value, grpc.Call)
    info = error_info(caught.value)
    assert (info.reason, info.metadata["who"], info.metadata["retry"]) == ("attestation", "operator", "false")
    assert "parley.eif" in (caught.value.details() or "")
    assert stage.host.calls("run-enclave") == []


def test_memory_that_is_in_use_is_no_capacity_and_keeps_the_request(stage: Stage) -> None:
    stage.host.set(memory_mib=300)
    foreign = stage.host.foreign()
    made = stage.play()
    request = os.urandom(16)
    with refused("no-capacity"):
        made.open(request)
    stage.host.terminate(foreign)
    assert made.open(request).phase == "open"


def test_an_image_that_does_not_boot_is_unavailable_and_the_log_says_what_to_do(stage: Stage) -> None:
    stage.host.set(next=["E36", "dies"])
    made = stage.play()
    request = os.urandom(16)
    with refused("unavailable"):
        made.open(request)
    (given_up,) = stage.coordinator.events("launch-given-up")
    assert given_up["code"] == "E36" and "nitro-cli console" in given_up["do"]
    assert [failed["code"] for failed in stage.coordinator.events("launch-failed")] == ["E36", "E36"]
    assert made.open(request).phase == "open"


def test_sessions_are_not_given_up_where_nitro_cli_does_not_tell(stage: Stage) -> None:
    made = stage.play()
    made.open()
    stage.coordinator.kill()
    stage.host.set(describe="garbage")
    program = [sys.executable, nitro_coordinator.__file__, str(stage.coordinator.folder), str(stage.host.folder)]
    failed = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert failed.returncode != 0 and "nitro-cli does not tell which enclaves run" in failed.stderr
    stage.host.set(describe="")
    stage.coordinator.start()
    assert made.state().phase == "open"
    made.client("ann").call("GetSession", pb.SessionRef(session=made.session))
    release(made)
