"""Enclave images in the emulator: alone, and behind a coordinator with members."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from parley import Member
from parley_deploy.image import cpio, eif
from parley_deploy.nsm import LocalRoot
from parley_deploy.pki import system_now_ms
from parley_protocol.agreement.model import Measurement, Normalise, Unit
from parley_protocol.measurement import Kind, measure
from support.client import Members
from support.coordinator import Coordinator
from support.enclave import Simulation, agreement_of, until


@dataclass(frozen=True, slots=True)
class Emulator:
    """Options of every machine: the folder of Debian's QEMU, and the accelerator."""

    qemu: Path
    accel: str

    def arguments(self, image: Path, root: Path, *more: str) -> list[str]:
        """The command of a machine, without its folder."""
        command = [sys.executable, "-m", "parley_deploy.emulator", "--image", str(image), "--root", str(root)]
        return [*command, "--qemu", str(self.qemu), "--accel", self.accel, *more]

    def start(self, folder: Path, image: Path, root: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """Runs the command."""
        command = [*self.arguments(image, root, *more), "--dir", str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)


def pid(folder: Path, name: str) -> int:
    """The process in a pid file of a machine."""
    return int((folder / f"{name}.pid").read_text())


@contextlib.contextmanager
def machine(emulator: Emulator, folder: Path, image: Path, *more: str) -> Iterator[float]:
    """A machine that runs, under a root in `folder`/root; the seconds that its start took. The folder's path is short."""
    root = folder / "root"
    if not root.exists():
        root.mkdir(parents=True)
        LocalRoot.create(system_now_ms()).save(root)
    begin = time.monotonic()
    done = emulator.start(folder, image, root, *more)
    assert done.returncode == 0, done.stderr + (folder / "log").read_text()
    try:
        yield time.monotonic() - begin
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(pid(folder, "nsm"), signal.SIGTERM)
        until(lambda: not (folder / "nsm.pid").exists())


def measurement_of(image: Path) -> Measurement:
    """What an agreement says of an image."""
    with image.open("rb") as file:
        pcrs = measure(file).pcrs
    return Measurement(pcrs[0], pcrs[1], pcrs[2], pcrs.get(8))


class ImageMembers(Members):
    """Members whose agreement names an image."""

    def __init__(
        self, folder: Path, coordinator: Coordinator, names: Sequence[str], measurement: Measurement, **options: Any
    ) -> None:
        self.folder = folder
        self.coordinator = coordinator
        self.members = {name: Member.generate(name, folder / name) for name in names}
        root = LocalRoot.load(coordinator.folder / "root")
        simulation = cast("Simulation", SimpleNamespace(root=root, measurement=measurement))
        identities = {name: member.identity for name, member in self.members.items()}
        made = agreement_of(simulation, identities, **options)
        # As support.client has it, so that sessions of both may be compared.
        self.agreement = replace(made, unit=Unit("person", Normalise.EXACT))
        coordinator.operators(identities[names[0]])
        coordinator.start()
        self.connections = []
        self.confirm()


@contextlib.contextmanager
def image_members(
    emulator: Emulator, folder: Path, image: Path, names: Sequence[str], measurement: Measurement, **options: Any
) -> Iterator[ImageMembers]:
    """Members and a running coordinator whose launcher is `qemu`."""
    own = folder / "c"
    (own / "root").mkdir(parents=True)
    LocalRoot.create(system_now_ms()).save(own / "root")
    with Coordinator(own, ()) as coordinator:
        command = ", ".join(f'"{part}"' for part in emulator.arguments(image, own / "root"))
        (own / "coordinator.toml").write_text(
            'listen = "127.0.0.1:0"\ngrace_s = 2.0\n[launcher]\nkind = "qemu"\n'
            f'[launcher.qemu]\nimage = "{image}"\ncommand = [{command}]\nfolder = "e"\n'
            "[deadline]\nstatus_s = 0.2\n"
        )
        made = ImageMembers(folder, coordinator, names, measurement, **options)
        try:
            yield made
        finally:
            made.close()


def overlay(image: Path, work: Path, program: Path, signer: eif.Signer | None = None) -> Path:
    """An image with kernel, command line and ramdisks of `image`, whose enclave is `program`.

    It stands in a third ramdisk, which the kernel unpacks over the others.
    """
    target = work / "overlay" / "app" / "parley_enclave" / "__main__.py"
    # Python takes byte code as it is, as the image says it may; where that is none it reads the source.
    stale = target.parent / "__pycache__" / "__main__.cpython-313.pyc"
    stale.parent.mkdir(parents=True)
    stale.touch()
    target.write_bytes(program.read_bytes())
    ramdisk, made = work / "overlay.cpio", work / f"{program.stem}.eif"
    with ramdisk.open("w+b") as packed, image.open("rb") as file, made.open("w+b") as out:
        cpio.pack(work / "overlay", cpio.names(work / "overlay"), packed)
        found = measure(file)
        parts = {kind: [eif.Part(file, s.offset, s.size) for s in found.sections if s.kind is kind] for kind in Kind}
        eif.write(
            out,
            kernel=parts[Kind.KERNEL][0],
            cmdline=found.cmdline,
            metadata=b"".join(parts[Kind.METADATA][0].chunks()),
            ramdisks=[*parts[Kind.RAMDISK], eif.Part.whole(packed)],
            signer=signer,
        )
    return made
