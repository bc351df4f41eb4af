"""Sessions of real members with the image itself: its kernel, its init, its /dev/nsm, its vsock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest

from emulation.machines import Emulator, image_members, machine, measurement_of
from parley import RefusedError, Release
from parley.session import Session
from parley_deploy.image import eif
from parley_deploy.nsm import LocalRoot
from parley_protocol.agreement.model import Measurement
from parley_protocol.attestation.document import extended
from parley_protocol.measurement import Kind, measure
from parley_protocol.v1 import enclave_pb2 as pb
from support.client import Members, frame_of, members
from support.enclave import Host, Simulation, agreement_of, identities, signed

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]
NAMES = ("ann", "bob", "cyd")
OPTIONS: dict[str, Any] = {"analysts": ["cyd"], "start": ("ann", "cyd")}
FRAMES = {"ann": frame_of(1, rows=5000, people=400), "bob": frame_of(2, rows=3000, people=300)}


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="pe-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def measured(image: Path) -> Measurement:
    """The image's registers as `parley measure` prints them."""
    command = [sys.executable, "-m", "parley.cli", "measure", "--json", str(image)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(said)["Measurements"]
    pcr0, pcr1, pcr2 = (bytes.fromhex(found[f"PCR{index}"]) for index in (0, 1, 2))
    made = Measurement(pcr0, pcr1, pcr2)
    assert made == measurement_of(image)
    return made


def together(*work: Callable[[], object]) -> None:
    """Runs each in a thread; the first error is raised."""
    errors: list[BaseException] = []

    def one(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=one, args=(call,)) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def played(made: Members, session: Session) -> Release:
    """From the uploads to the release."""
    for name, frame in FRAMES.items():
        made.connect(name).session(session.id).submit({"visits": frame})
    session.start()
    together(*(made.connect(name).session(session.id).wait for name in FRAMES))
    return made.connect("cyd").session(session.id).release()


def test_a_session_in_the_image_gives_what_the_simulated_enclave_gives(
    emulator: Emulator, image: Path, measured: Measurement, short: Path, figures: dict[str, float]
) -> None:
    with image_members(emulator, short / "q", image, NAMES, measured, **OPTIONS) as made:
        made.sign()
        begin = time.monotonic()
        session = made.connect("ann").open(made.agreement)
        figures["session: open, the image's boot included (s)"] = time.monotonic() - begin
        offer = made.connect("bob").session(session.id).verify()
        pcrs = offer.enclave.pcrs
        assert offer.enclave.simulated
        assert (pcrs[0], pcrs[1], pcrs[2]) == (measured.pcr0, measured.pcr1, measured.pcr2)
        # A document shows the registers that are locked: the hypervisor's, and the agreement's.
        assert pcrs[16] == extended(made.agreement.digest)
        assert sorted(pcrs) == list(range(17))
        begin = time.monotonic()
        release = played(made, session)
        figures["session: submit, start, compute, release (s)"] = time.monotonic() - begin
    with members(short / "l", NAMES, **OPTIONS) as local:
        local.sign()
        session = local.connect("ann").open(local.agreement)
        begin = time.monotonic()
        simulated = played(local, session)
        figures["session: the same, simulated enclave (s)"] = time.monotonic() - begin
    rows = release["by_site"].rows
    # Another series has other pseudonyms, so that its floats are added in another order.
    for ours, theirs in zip(rows, simulated["by_site"].rows, strict=True):
        assert {**ours, "mean_score": 0} == {**theirs, "mean_score": 0}
        assert ours["mean_score"] == pytest.approx(theirs["mean_score"], rel=1e-12)
    whole = pd.concat(FRAMES.values()).reset_index(drop=True)
    whole["cents"] = (whole["amount"].astype(float) * 100).round().astype(int)
    found = {row["site"]: row for row in rows}
    assert set(found) == set(whole["site"])
    for site, part in whole.groupby("site"):
        assert (found[site]["rows"], found[site]["people"]) == (len(part), part["id"].nunique())
        assert found[site]["total"] == Decimal(int(part["cents"].sum())) / 100
        assert found[site]["mean_score"] == pytest.approx(part["score"].mean(), rel=1e-9)


def test_a_guest_that_is_killed_loses_its_session_and_the_next_one_needs_only_joins(
    emulator: Emulator, image: Path, measured: Measurement, short: Path
) -> None:
    with image_members(emulator, short, image, NAMES, measured, **OPTIONS) as made:
        made.sign()
        first = made.connect("ann").open(made.agreement)
        for name, frame in FRAMES.items():
            made.connect(name).session(first.id).submit({"visits": frame})
        os.kill(made.coordinator.enclave_pid(), signal.SIGKILL)
        end = time.monotonic() + 60
        while made.connect("ann").session(first.id).status().phase != "lost":
            assert time.monotonic() < end, "the session is not lost"
            time.sleep(0.2)
        second = made.connect("ann").open(made.agreement)
        assert second.id != first.id
        for name in FRAMES:
            made.connect(name).session(second.id).join()
        second.start()
        together(*(made.connect(name).session(second.id).wait for name in FRAMES))
        assert made.connect("cyd").session(second.id).release().sequence == 1


def test_a_bit_flipped_in_the_file_is_refused_before_anything_runs(
    emulator: Emulator, image: Path, measured: Measurement, short: Path
) -> None:
    with image.open("rb") as file:
        places = [section.offset + section.size // 2 for section in measure(file).sections]
    copy = short / "flipped.eif"
    shutil.copy(image, copy)
    (short / "root").mkdir()
    with copy.open("r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
            file.flush()
            done = emulator.start(short / "m", copy, short / "root")
            assert done.returncode == 1
            assert "CRC" in done.stderr
            assert not list((short / "m").glob("*.sock"))
            file.seek(place)
            file.write(bytes([byte]))


def test_a_changed_image_with_a_right_crc_is_another_enclave(
    emulator: Emulator, image: Path, measured: Measurement, short: Path
) -> None:
    changed = short / "changed.eif"
    with image.open("rb") as file, changed.open("w+b") as out:
        found = measure(file)
        parts = {kind: [eif.Part(file, s.offset, s.size) for s in found.sections if s.kind is kind] for kind in Kind}
        metadata = b"".join(parts[Kind.METADATA][0].chunks())
        eif.write(
            out,
            kernel=parts[Kind.KERNEL][0],
            cmdline=found.cmdline + b" quiet",
            metadata=metadata,
            ramdisks=parts[Kind.RAMDISK],
        )
    with image_members(emulator, short / "q", changed, NAMES, measured, **OPTIONS) as made:
        made.sign()
        with pytest.raises(RefusedError, match="does not accept the image"):
            made.connect("ann").open(made.agreement)
    # A coordinator that does not look, or lies: the enclave itself refuses the agreement.
    with machine(emulator, short / "m", changed):
        root = LocalRoot.load(short / "m" / "root")
        simulation = cast("Simulation", SimpleNamespace(root=root, measurement=measured))
        everybody = identities(NAMES)
        agreement = agreement_of(simulation, everybody)
        host = Host(short / "m" / "enclave.sock")
        assert host.refused(load=pb.Load(agreements=[signed(agreement, everybody)])) == "attestation"
