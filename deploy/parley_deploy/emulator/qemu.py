"""A QEMU that can run an enclave image: of this machine, or Debian's own, unpacked into a folder.

    python -m parley_deploy.emulator.qemu [--dir DIR]

Needed is qemu-system-x86_64 with `vhost-user-vsock-pci` and `vhost-user-test-device-pci`, which came with 11.1. Where PATH
has none, Debian's is fetched with the libraries that it needs, checked by apt, and run through the dynamic loader that
belongs to them: nothing is installed. A call that finds the folder complete does nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from parley_deploy.debian import Archive, DebianError, unpack

PROGRAM: Final = "qemu-system-x86_64"
OLDEST: Final = (11, 1)
DEVICES: Final = ("vhost-user-vsock-pci", "vhost-user-test-device-pci")
SUITE: Final = "trixie"
PACKAGES: Final = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
"""Of the suite's backports, in one version; what they need comes from the suite."""
FOLDER_VARIABLE: Final = "PARLEY_QEMU_DIR"
SECONDS: Final = 60
_MARKER: Final = "ready.json"
_UNUSED: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale")


class QemuError(Exception):
    """There is no QEMU that can run an image: the message says what to do."""


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU: the start of its command, and its version."""

    command: tuple[str, ...]
    version: str


def default_folder() -> Path:
    """Where Debian's QEMU is kept: PARLEY_QEMU_DIR, or a folder in the user's cache."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parley" / "qemu"


def find(folder: Path | None = None) -> Qemu:
    """The QEMU of PATH where it will do, else the one in `folder`; QemuError where there is neither."""
    folder = folder or default_folder()
    refused = "not on PATH"
    on_path = shutil.which(PROGRAM)
    if on_path is not None:
        try:
            return _examine((on_path,))
        except QemuError as error:
            refused = str(error)
    if not (folder / _MARKER).is_file():
        raise QemuError(
            f"no {PROGRAM} of {'.'.join(map(str, OLDEST))} or later ({refused}; none in {folder}): "
            "get one with python -m parley_deploy.emulator.qemu"
        )
    return Qemu(_unpacked(folder / "tree"), json.loads((folder / _MARKER).read_text(encoding="utf-8"))["version"])


def get(folder: Path | None = None) -> Qemu:
    """As `find`, but fetches Debian's QEMU into `folder` where nothing else is there. QemuError, DebianError."""
    folder = (folder or default_folder()).resolve()
    try:
        return find(folder)
    except QemuError:
        if platform.machine() != "x86_64":
            raise
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _MARKER).is_file():
            return find(folder)
        shutil.rmtree(folder / "tree", ignore_errors=True)
        archive = Archive(folder / "packages", (SUITE, f"{SUITE}-backports"))
        archive.update()
        versions = archive.depends(f"{name}/{SUITE}-backports" for name in PACKAGES)
        for deb in archive.download(versions).values():
            unpack(deb, folder / "tree")
        for name in _UNUSED:
            shutil.rmtree(folder / "tree" / name, ignore_errors=True)
        found = _examine(_unpacked(folder / "tree"))
        shutil.rmtree(folder / "packages")
        # The marker comes last: without it the next call begins anew.
        marker = folder / f"{_MARKER}.new"
        marker.write_text(
            json.dumps({"version": found.version, "packages": versions}, indent=2) + "\n", encoding="utf-8"
        )
        marker.replace(folder / _MARKER)
        return found


def _unpacked(tree: Path) -> tuple[str, ...]:
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    data = [argument for name in ("qemu", "seabios") for argument in ("-L", str(tree / "usr/share" / name))]
    loader = (str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries))
    return (*loader, str(tree / "usr/bin" / PROGRAM), *data)


def _examine(command: tuple[str, ...]) -> Qemu:
    """The QEMU of a command, if it is new enough and has the devices; QemuError."""
    said = _ask(command, "--version").strip()
    version = re.search(r"version (\d+)\.(\d+)\S*", said)
    if version is None or (int(version[1]), int(version[2])) < OLDEST:
        raise QemuError(f"{command[0]} is {said.splitlines()[0] if said else 'silent'}")
    devices = _ask(command, "-device", "help")
    for device in DEVICES:
        if f'"{device}"' not in devices:
            raise QemuError(f"{command[0]} has no {device}")
    return Qemu(command, version[0].removeprefix("version "))


def _ask(command: tuple[str, ...], *arguments: str) -> str:
    try:
        done = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QemuError(f"{command[0]} does not run: {error}") from None
    if done.returncode != 0:
        raise QemuError(f"{command[0]} does not run: {done.stderr.strip()[-500:]}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Gets a QEMU and prints what runs it; 1 with a line on standard error where that is not possible."""
    parser = argparse.ArgumentParser(prog="python -m parley_deploy.emulator.qemu", description="Get a QEMU for images.")
    parser.add_argument("--dir", type=Path, default=None, help=f"where to keep Debian's; default: {default_folder()}")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        found = get(options.dir)
    except (QemuError, DebianError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"QEMU {found.version}, after {time.monotonic() - begin:.1f} s: {' '.join(found.command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
