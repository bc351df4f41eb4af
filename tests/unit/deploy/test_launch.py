"""The command of the launcher `local`: an enclave that listens, detached, and ends with its NSM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parley_deploy import detached, enclave
from parley_deploy.pki import LocalRoot


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose sockets have short paths; whatever runs in it is ended."""
    with tempfile.TemporaryDirectory(prefix="pl-") as name:
        LocalRoot.load_or_create(Path(name) / "root")
        yield Path(name)
        for pid in pids(Path(name) / "one"):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not pids(Path(name) / "one"))


def launch(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "parley_deploy.enclave",
        "--dir",
        str(folder / "one"),
        "--root",
        str(folder / "root"),
    ]
    return subprocess.run(
        [*command, "--workers", "1"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def pids(folder: Path) -> list[int]:
    """The processes of the pid files that are alive."""
    found = []
    for path in (folder / "enclave.pid", folder / "nsm.pid"):
        if path.exists() and alive(int(path.read_text())):
            found.append(int(path.read_text()))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "not within 15 seconds"
        time.sleep(0.02)


def test_it_returns_when_the_enclave_listens_and_leaves_it_running(folder: Path) -> None:
    assert launch(folder).returncode == 0
    assert detached.listens(folder / "one" / "enclave.sock")
    assert len(pids(folder / "one")) == 2


def test_a_second_call_finds_the_first_one_s_enclave(folder: Path) -> None:
    assert launch(folder).returncode == 0
    before = pids(folder / "one")
    assert launch(folder).returncode == 0
    assert pids(folder / "one") == before


@pytest.mark.parametrize("name", ["enclave.pid", "nsm.pid"])
def test_both_end_together(folder: Path, name: str) -> None:
    assert launch(folder).returncode == 0
    both = pids(folder / "one")
    os.kill(int((folder / "one" / name).read_text()), signal.SIGKILL)
    until(lambda: not any(map(alive, both)))
    # The last thread of a killed process closes its files after the first is gone.
    until(lambda: not detached.listens(folder / "one" / "enclave.sock"))


def test_it_ends_in_order_on_sigterm_and_starts_again(folder: Path) -> None:
    assert launch(folder).returncode == 0
    both = pids(folder / "one")
    os.kill(int((folder / "one" / "nsm.pid").read_text()), signal.SIGTERM)
    until(lambda: not any(map(alive, both)))
    assert not list((folder / "one").glob("*.sock")) and not list((folder / "one").glob("*.pid"))
    assert launch(folder).returncode == 0
    assert len(pids(folder / "one")) == 2


def test_the_enclave_has_no_network(folder: Path) -> None:
    if not enclave.network_namespace():
        pytest.skip("network namespaces are not allowed on this machine")
    assert launch(folder).returncode == 0
    pid = int((folder / "one" / "enclave.pid").read_text())
    assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    interfaces = [line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]]
    assert interfaces == ["lo"]


def test_a_machine_without_namespaces_gets_a_loud_line(folder: Path) -> None:
    assert launch(folder, PATH=str(folder)).returncode == 0
    assert "WARNING: THE ENCLAVE SHARES THE NETWORK" in (folder / "one" / "log").read_text()


def test_a_missing_root_is_an_error_that_the_log_explains(folder: Path) -> None:
    (folder / "root" / "root.pem").unlink()
    done = launch(folder)
    assert done.returncode == 1
    assert "see" in done.stderr
    assert "no local root" in (folder / "one" / "log").read_text()


def test_a_path_too_long_for_a_socket_is_an_error_that_says_so(tmp_path: Path) -> None:
    assert enclave.main(["--dir", str(tmp_path / ("x" * 100)), "--root", str(tmp_path)]) == 1
