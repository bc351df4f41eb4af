"""QEMU's machine nitro-enclave: what is found in a folder, what cannot be built, and its command line."""

from __future__ import annotations

import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parley_deploy.emulator import nitro_machine, tsc
from parley_deploy.emulator.nitro_machine import NitroMachine, find, main

X86 = platform.machine() == "x86_64"


def _built(folder: Path, *, recipe: str, machines: str) -> None:
    """A folder as a build leaves it, with a program that only names its machines."""
    place = folder / "qemu"
    place.mkdir(parents=True)
    program = place / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\nprintf 'Supported machines are:\\n{machines} x\\n'\n")
    program.chmod(0o755)
    (place / "about.json").write_text(json.dumps({"recipe": recipe, "version": "10.0"}))


def test_what_this_recipe_built_is_found(tmp_path: Path) -> None:
    _built(tmp_path, recipe=nitro_machine._recipe(), machines="nitro-enclave")
    assert find(tmp_path) == NitroMachine(tmp_path / "qemu" / "qemu-system-x86_64", tmp_path / "qemu", "10.0")


@pytest.mark.parametrize("case", ["nothing", "another recipe", "another machine", "no program", "no JSON"])
def test_anything_else_is_not(tmp_path: Path, case: str) -> None:
    if case != "nothing":
        _built(
            tmp_path,
            recipe="0" * 64 if case == "another recipe" else nitro_machine._recipe(),
            machines="microvm" if case == "another machine" else "nitro-enclave",
        )
    if case == "no program":
        (tmp_path / "qemu" / "qemu-system-x86_64").unlink()
    if case == "no JSON":
        (tmp_path / "qemu" / "about.json").write_text('{"recipe"')
    assert find(tmp_path) is None


def test_a_built_machine_is_not_built_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _built(tmp_path, recipe=nitro_machine._recipe(), machines="nitro-enclave")
    assert main(["--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'qemu' / 'qemu-system-x86_64'} (QEMU 10.0)\n"
    assert not (tmp_path / "log").exists()


@pytest.mark.skipif(not X86, reason="the machine is for x86_64")
def test_calls_at_the_same_time_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def run(self: nitro_machine._Build) -> None:
        built.append(self._folder)
        time.sleep(0.3)
        _built(self._folder, recipe=nitro_machine._recipe(), machines="nitro-enclave")

    monkeypatch.setattr(nitro_machine._Build, "run", run)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: nitro_machine.build(tmp_path), range(4)))
    assert built == [tmp_path]
    assert {machine.version for machine in found} == {"10.0"}


@pytest.mark.skipif(not X86, reason="the machine is for x86_64")
def test_missing_packages_are_named_where_the_caller_may_not_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    query = tmp_path / "bin" / "dpkg-query"
    query.parent.mkdir()
    present = "".join(f"{name} installed\\n" for name in nitro_machine.PACKAGES if name != "ninja-build")
    query.write_text(f"#!/bin/sh\nprintf '{present}ninja-build config-files\\n'\n")
    query.chmod(0o755)
    monkeypatch.setenv("PATH", f"{query.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["--dir", str(tmp_path / "made")]) == 1
    assert capsys.readouterr().err == "qemu: missing packages: apt-get install ninja-build\n"
    assert find(tmp_path / "made") is None


@pytest.mark.skipif(not X86, reason="the machine is for x86_64")
def test_a_step_that_fails_shows_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with (tmp_path / "log").open("wb") as log:
        build = nitro_machine._Build(tmp_path, log.fileno())
        with pytest.raises(nitro_machine.BuildError, match=r"(?s)sh failed; see .*/log\nno compiler$"):
            build._run(["sh", "-c", "echo no compiler >&2; exit 3"], work)
        with pytest.raises(nitro_machine.BuildError, match="^no-such-program is not installed$"):
            build._run(["no-such-program"], work)


@pytest.mark.skipif(not X86, reason="the machine is for x86_64")
def test_the_command_names_image_and_parent_and_quotes_commas() -> None:
    machine = NitroMachine(Path("/q/qemu"), Path("/q"), "10.0")
    options = {"module_id": "i-1-enc2", "parent_id": "i-1", "parent_role": "arn:a,b"}
    command = machine.command(Path("/x.eif"), Path("/a,b/vsock"), memory_mib=512, cpus=2, **options)
    assert command[:5] == [
        "/q/qemu",
        "-L",
        "/q",
        "-M",
        "nitro-enclave,vsock=vsock,id=i-1-enc2,parent-id=i-1,parent-role=arn:a,,b",
    ]
    assert command[command.index("-kernel") + 1] == "/x.eif"
    assert command[command.index("-chardev") + 1] == "socket,id=vsock,path=/a,,b/vsock"
    assert command[command.index("-smp") + 1] == "2"
    assert command[command.index("-m") + 1] == "512M"
    assert "parent-id" not in machine.command(Path("/x.eif"), None, module_id="i-1-enc2")[4]


@pytest.mark.skipif(not X86, reason="x86_64 has the counter")
def test_the_counters_rate_is_the_same_twice() -> None:
    first, second = tsc.khz(), tsc.khz()
    assert 500_000 < first < 10_000_000
    assert abs(first - second) < first / 1000


def test_another_machine_has_no_such_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(OSError, match="aarch64 has no timestamp counter"):
        tsc.khz()
