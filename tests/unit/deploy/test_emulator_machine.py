"""The command of the launcher `qemu` before QEMU runs: what it refuses, and which QEMU it takes. tests/emulation has the rest."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from parley_deploy.detached import StartError
from parley_deploy.emulator import machine, qemu
from parley_deploy.emulator.qemu import QemuError
from parley_deploy.image.eif import Part, write
from parley_deploy.pki import LocalRoot
from parley_protocol.measurement import Architecture
from support import images


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose sockets have short paths, with a root and a small image."""
    with tempfile.TemporaryDirectory(prefix="pl-") as name:
        LocalRoot.load_or_create(Path(name) / "root")
        (Path(name) / "image.eif").write_bytes(images.image())
        yield Path(name)


def launch(folder: Path, *more: str, image: str = "image.eif") -> subprocess.CompletedProcess[str]:
    """The command, on a machine without QEMU."""
    command = [sys.executable, "-m", "parley_deploy.emulator", "--dir", str(folder / "one")]
    command += ["--root", str(folder / "root"), "--image", str(folder / image), "--qemu", str(folder / "none")]
    environment = {**os.environ, "PATH": str(folder)}
    return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False, timeout=60)


def refused(folder: Path, words: str, *more: str, image: str = "image.eif") -> None:
    """The command fails, says why, and leaves its log only."""
    done = launch(folder, *more, image=image)
    assert done.returncode == 1
    assert words in done.stderr
    assert words in (folder / "one" / "log").read_text()
    assert {path.name for path in (folder / "one").iterdir()} == {"lock", "log"}


def test_without_a_qemu_it_says_how_to_get_one(folder: Path) -> None:
    refused(folder, "python -m parley_deploy.emulator.qemu")


def test_a_missing_root_is_an_error_that_the_log_explains(folder: Path) -> None:
    (folder / "root" / "root.pem").unlink()
    assert launch(folder).returncode == 1
    assert "no local root" in (folder / "one" / "log").read_text()


@pytest.mark.parametrize("place", [0, 100, 0x220, 600, -1])
def test_a_flipped_bit_is_refused(folder: Path, place: int) -> None:
    content = bytearray((folder / "image.eif").read_bytes())
    content[place] ^= 1
    (folder / "flipped.eif").write_bytes(content)
    refused(folder, "flipped.eif: image: ", image="flipped.eif")


def test_what_is_no_image_is_refused(folder: Path) -> None:
    refused(folder, "root.pem: image: ", image="root/root.pem")
    refused(folder, "No such file", image="none.eif")


def test_another_architecture_is_refused(folder: Path) -> None:
    out, ramdisk = io.BytesIO(), Part.whole(io.BytesIO(b"boot"))
    kernel = Part.whole(io.BytesIO(b"kernel"))
    write(out, kernel=kernel, cmdline=b"quiet", metadata=b"{}", ramdisks=[ramdisk], architecture=Architecture.AARCH64)
    (folder / "arm.eif").write_bytes(out.getvalue())
    refused(folder, "only x86_64 is emulated", image="arm.eif")


def test_less_memory_than_four_times_the_image_is_refused(folder: Path) -> None:
    (folder / "large.eif").write_bytes(images.image((b"boot", bytes(3 << 20))))
    refused(folder, "--memory-mib 12: ", "--memory-mib", "12", image="large.eif")
    refused(folder, "parley_deploy.emulator.qemu", "--memory-mib", "13", image="large.eif")


def test_no_cpu_and_a_path_too_long_are_refused(folder: Path) -> None:
    refused(folder, "--cpus 0", "--cpus", "0")
    long = ["--dir", str(folder / ("x" * 100)), "--root", str(folder), "--image", str(folder)]
    assert machine.main(long) == 1


def test_kvm_is_taken_where_processor_and_device_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "KVM", tmp_path / "none")
    assert machine.accelerator("auto") == machine.accelerator("tcg") == "tcg,thread=multi"
    with pytest.raises(StartError, match="--accel kvm"):
        machine.accelerator("kvm")
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(machine, "KVM", tmp_path / "kvm")
    assert machine.accelerator("kvm") == "kvm"
    flags = {"vmx", "svm"} & set(Path("/proc/cpuinfo").read_text().split())
    assert machine.accelerator("auto") == ("kvm" if flags else "tcg,thread=multi")


# Which QEMU


def script(folder: Path, version: str, devices: str) -> Path:
    """A QEMU that says so much of itself."""
    path = folder / qemu.PROGRAM
    path.write_text(f"#!{sys.executable}\nimport sys\nprint({devices!r} if 'help' in sys.argv else {version!r})\n")
    path.chmod(0o755)
    return path


BOTH = 'name "vhost-user-vsock-pci", bus PCI\nname "vhost-user-test-device-pci", bus PCI'


def test_the_qemu_of_path_is_taken_where_it_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = script(tmp_path, "QEMU emulator version 11.1.3 (Debian)", BOTH)
    found = qemu.find(tmp_path / "none")
    assert (found.command, found.version) == ((str(path),), "11.1.3")
    # And nothing is fetched.
    assert qemu.get(tmp_path / "none") == found
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("version", "devices", "words"),
    [
        ("QEMU emulator version 10.0.13", BOTH, "is QEMU emulator version 10.0.13"),
        ("", BOTH, "is silent"),
        ("QEMU emulator version 11.2.0", BOTH.splitlines()[0], "has no vhost-user-test-device-pci"),
    ],
)
def test_a_qemu_that_will_not_do_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, devices: str, words: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    script(tmp_path, version, devices)
    with pytest.raises(QemuError, match=words):
        qemu.find(tmp_path / "none")


def test_a_qemu_that_was_not_completed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "cache/tree").mkdir(parents=True)
    with pytest.raises(QemuError, match="get one"):
        qemu.find(tmp_path / "cache")
    (tmp_path / "cache/ready.json").write_text('{"version": "11.1.3"}')
    found = qemu.find(tmp_path / "cache")
    assert found.version == "11.1.3"
    assert found.command[0] == str(tmp_path / "cache/tree/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
