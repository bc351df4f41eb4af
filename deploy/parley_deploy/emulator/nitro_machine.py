"""QEMU's machine `nitro-enclave`, built from Debian's source package, since no package of Debian's has it.

    python -m parley_deploy.emulator.nitro_machine --dir DIR

The machine takes an EIF file as it is, and is somebody else's reading of the format: it checks the CRC, computes the
registers, and shows the kernel the devices of a genuine enclave, without ACPI and PCI. Its security module signs nothing, so
no verifier believes it: sessions run on the machine of `parley_deploy.emulator`, judgements on this one.

The source is what Debian's archive has for `SUITE` that day, checked by apt; old versions leave the archive, so none is
pinned. It is compiled with the host's compiler and libraries and stands in DIR/qemu; a second call finds it there, and
calls at the same time wait for one another. The packages that compiling needs are installed where the caller is root.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from parley_deploy.debian import KEYRING, Archive, DebianError, mirror, unpack
from parley_deploy.emulator import tsc

SUITE: Final = "trixie"
PACKAGES: Final = (
    "dpkg-dev",
    "gcc",
    "libc6-dev",
    "libcbor-dev",
    "libfdt-dev",
    "libglib2.0-dev",
    "libgnutls28-dev",
    "make",
    "ninja-build",
    "pkg-config",
    "xz-utils",
    "zlib1g-dev",
)
"""Debian packages that compiling needs, under names that bookworm and trixie share."""
FIRMWARE: Final = ("qboot.rom", "linuxboot_dma.bin")
"""What the machine boots through; of Debian's package qemu-system-data, since its source package has no built ones."""
DEVICES: Final = "CONFIG_NITRO_ENCLAVE=y\n"
CONFIGURE: Final = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=nitro",
    "--enable-system",
    "--enable-tcg",
    "--enable-vhost-user",
    "--enable-libcbor",
    "--enable-gnutls",
    "--enable-fdt=system",
    "--enable-trace-backends=nop",
    "--disable-debug-info",
    "--disable-docs",
    "--disable-download",
    "--disable-install-blobs",
    "--disable-werror",
)
"""One machine and nothing that it does not need: 1,300 files to compile in place of 3,000."""
SECONDS: Final = 3600
"""How long one step may take; compiling takes four minutes of two idle cores."""
_TAIL: Final = 2000


class BuildError(Exception):
    """The machine cannot be built here; the message says what is missing or where the log is."""


@dataclass(frozen=True, slots=True)
class NitroMachine:
    """A built QEMU: its program, its firmware, and the version of Debian's source package."""

    program: Path
    firmware: Path
    version: str

    def command(
        self,
        image: Path,
        vsock: Path | None,
        *,
        module_id: str,
        parent_id: str | None = None,
        parent_role: str | None = None,
        memory_mib: int = 1024,
        cpus: int = 1,
    ) -> list[str]:
        """The command that boots an EIF file, console on standard output; it ends when the enclave does.

        `vsock`: where a vhost-user vsock device listens; without one the machine only reads the file and then ends.
        `module_id`, `parent_id`, `parent_role`: what the security module says of itself, and PCR4 and PCR3.
        """
        machine = {"vsock": "vsock", "id": module_id, "parent-id": parent_id, "parent-role": parent_role}
        options = ",".join(f"{name}={_quoted(value)}" for name, value in machine.items() if value is not None)
        device = "null,id=vsock" if vsock is None else f"socket,id=vsock,path={_quoted(str(vsock))}"
        command = [str(self.program), "-L", str(self.firmware), "-M", f"nitro-enclave,{options}"]
        # Virtio 1, which QEMU's virtio-mmio is not unless told to.
        command += ["-global", "virtio-mmio.force-legacy=false"]
        # TCG, also where there is KVM: a judge that is the same on every machine.
        command += ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus), "-m", f"{memory_mib}M"]
        # Stands after the command line of the image, and is not measured. A busy host gives a guest too few ticks for its
        # check of the timer; under Amazon's hypervisor, a KVM, kernels leave it out by themselves.
        append = f"tsc_early_khz={tsc.khz()} no_timer_check"
        command += ["-kernel", str(image), "-append", append, "-chardev", device]
        return [*command, "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]


def _quoted(value: str) -> str:
    # In an option of QEMU a comma ends the value unless it is doubled.
    return value.replace(",", ",,")


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the machine in a folder where it is not there yet, and prints its program; 1 with a line where it cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m parley_deploy.emulator.nitro_machine", description="Build QEMU's machine nitro-enclave."
    )
    parser.add_argument("--dir", type=Path, required=True, help="where it is built and stays")
    options = parser.parse_args(arguments)
    try:
        machine = build(options.dir)
    except (BuildError, DebianError, OSError) as error:
        print(f"qemu: {error}", file=sys.stderr)
        return 1
    print(f"{machine.program} (QEMU {machine.version})")
    return 0


def find(folder: Path) -> NitroMachine | None:
    """The machine that `build` made in `folder` by this recipe, and that runs here; None where there is none."""
    place = folder.resolve() / "qemu"
    try:
        about = json.loads((place / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if about.get("recipe") != _recipe():
        return None
    program = place / "qemu-system-x86_64"
    try:
        # It is linked with libraries of the host, which may have moved on.
        said = subprocess.run([str(program), "-M", "help"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    machines = [line.split()[0] for line in said.stdout.splitlines() if line.strip()]
    return NitroMachine(program, place, about["version"]) if "nitro-enclave" in machines else None


def build(folder: Path) -> NitroMachine:
    """The machine in `folder`, built there where it is not yet; BuildError or DebianError."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := find(folder):
            return found
        if (machine := os.uname().machine) != "x86_64":
            raise BuildError(f"this host is {machine}: QEMU has the machine nitro-enclave for x86_64 alone")
        with (folder / "log").open("wb") as log:
            _Build(folder, log.fileno()).run()
    made = find(folder)
    if made is None:
        raise BuildError(f"what was built has no machine nitro-enclave; see {folder / 'log'}")
    return made


def _recipe() -> str:
    """A digest of all that decides what is built, but for the version that Debian has."""
    parts = (SUITE, *PACKAGES, *FIRMWARE, DEVICES, *CONFIGURE, _lock())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _lock() -> str:
    return (resources.files("parley_deploy.emulator") / "qemu-build.lock").read_text(encoding="utf-8")


class _Build:
    """One build, step by step, each with its time on standard error and its output in the log."""

    def __init__(self, folder: Path, log: int) -> None:
        self._folder = folder
        self._log = log
        self._work = folder / "work"

    def run(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        with self._step("packages of the compiler"):
            self._install()
        with self._step("source"):
            version, source = self._source()
        with self._step("firmware"):
            firmware = self._firmware(version)
        with self._step("build system"):
            python = self._meson()
        with self._step("configure"):
            build = self._configure(source, python)
        with self._step("compile"):
            self._run(["nice", "-n", "10", "ninja", "-j", str(os.cpu_count() or 1), "qemu-system-x86_64"], build)
        made = self._work / "qemu"
        made.mkdir()
        (build / "qemu-system-x86_64").replace(made / "qemu-system-x86_64")
        for name in FIRMWARE:
            (firmware / name).replace(made / name)
        (made / "about.json").write_text(json.dumps({"recipe": _recipe(), "version": version}), encoding="utf-8")
        shutil.rmtree(self._folder / "qemu", ignore_errors=True)
        made.replace(self._folder / "qemu")
        shutil.rmtree(self._work)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        print(f"qemu: {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def _install(self) -> None:
        if shutil.which("dpkg-query") is None:
            raise BuildError("this host has no dpkg: the machine is built on Debian 12 or newer")
        command = ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *PACKAGES]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
        present = {line.removesuffix(" installed") for line in said.splitlines() if line.endswith(" installed")}
        missing = [name for name in PACKAGES if name not in present]
        if not missing:
            return
        if os.geteuid() != 0:
            raise BuildError(f"missing packages: apt-get install {' '.join(missing)}")
        environment = {"DEBIAN_FRONTEND": "noninteractive"}
        self._run(["apt-get", "-q", "update"], self._work, environment)
        self._run(["apt-get", "-q", "-y", "--no-install-recommends", "install", *missing], self._work, environment)

    def _source(self) -> tuple[str, Path]:
        """The version of the source package and its tree, with Debian's patches."""
        lists = self._work / "sources"
        for name in ("lists/partial", "cache/archives/partial"):
            (lists / name).mkdir(parents=True, exist_ok=True)
        (lists / "debian.sources").write_text(
            f"Types: deb-src\nURIs: {mirror()}\nSuites: {SUITE}\nComponents: main\nSigned-By: {KEYRING}\n",
            encoding="utf-8",
        )
        settings = {
            "Dir::Etc::SourceList": lists / "debian.sources",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": lists / "lists",
            "Dir::Cache": lists / "cache",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "APT::Get::AllowUnauthenticated": "false",
            # Apt's own user may not reach the folder.
            "APT::Sandbox::User": "",
        }
        apt = ["apt-get", "-q", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
        self._run([*apt, "update", "--error-on=any"], self._work)
        # Checks every file against the lists, whose signature the update has checked.
        self._run([*apt, "--download-only", "source", "qemu"], self._work)
        described = list(self._work.glob("qemu_*.dsc"))
        if len(described) != 1:
            raise BuildError(f"apt fetched {len(described)} source packages for qemu")
        self._run(["dpkg-source", "--extract", described[0].name, "source"], self._work)
        return described[0].stem.removeprefix("qemu_"), self._work / "source"

    def _firmware(self, version: str) -> Path:
        archive = Archive(self._work / "debian", [SUITE])
        archive.update()
        (package,) = archive.download({"qemu-system-data": None}).values()
        unpack(package, self._work / "firmware")
        firmware = self._work / "firmware" / "usr" / "share" / "qemu"
        for name in FIRMWARE:
            if not (firmware / name).is_file():
                raise BuildError(f"qemu-system-data of QEMU {version} has no {name}")
        return firmware

    def _meson(self) -> Path:
        """An interpreter with the build system that QEMU wants; Debian 12's own is too old."""
        environment = self._work / "python"
        self._run([sys.executable, "-m", "venv", str(environment)], self._work)
        python = environment / "bin" / "python3"
        lock = self._work / "qemu-build.lock"
        lock.write_text(_lock(), encoding="utf-8")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
        self._run([*pip, "--only-binary", ":all:", "--no-deps", "-r", str(lock)], self._work)
        return python

    def _configure(self, source: Path, python: Path) -> Path:
        (source / "configs" / "devices" / "x86_64-softmmu" / "nitro.mak").write_text(DEVICES, encoding="utf-8")
        build = self._work / "build"
        build.mkdir()
        self._run([str(source / "configure"), f"--python={python}", *CONFIGURE], build)
        return build

    def _run(self, command: list[str], folder: Path, more: dict[str, str] | None = None) -> None:
        environment = {**os.environ, "LC_ALL": "C", **(more or {})}
        environment.pop("PYTHONPATH", None)
        os.write(self._log, f"$ {' '.join(command)}\n".encode())
        start = os.lseek(self._log, 0, os.SEEK_END)
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                timeout=SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise BuildError(f"{command[0]} is not installed") from None
        except subprocess.TimeoutExpired:
            raise BuildError(f"{Path(command[0]).name} took longer than {SECONDS} seconds") from None
        if done.returncode != 0:
            log = self._folder / "log"
            with log.open("rb") as file:
                file.seek(max(start, log.stat().st_size - _TAIL))
                said = file.read().decode("utf-8", "replace").strip()
            raise BuildError(f"{Path(command[0]).name} failed; see {log}\n{said}")


if __name__ == "__main__":
    sys.exit(main())
