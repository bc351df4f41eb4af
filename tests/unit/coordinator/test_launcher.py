"""The launcher `local`: detached processes, found again, bounded in number, ended with all that belongs to them."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from parley_coordinator.config import ConfigError, Local
from parley_coordinator.images import Wanted
from parley_coordinator.launcher import EnclaveHandle, LocalLauncher
from parley_protocol.errors import RefusedError, UnavailableError
from support.enclave import until
from support.nitro_host import tiny_image

# Daemonises like the real one: two forks, a listener, pid files, the folder in its command line.
SCRIPT = """
import os, socket, sys, time
folder = sys.argv[sys.argv.index("--dir") + 1]
if "--fail" in sys.argv:
    sys.exit("no module here")
if "--slow" in sys.argv:
    with open(folder + "/begun.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(folder + "/begun.part", folder + "/begun")
    while not os.path.exists(os.path.dirname(sys.argv[0]) + "/go"):
        time.sleep(0.01)
ready, tell = os.pipe()
if os.fork() == 0:
    os.setsid()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(folder + "/enclave.sock")
    listener.listen(8)
    for name in ("enclave.pid", "nsm.pid"):
        with open(folder + "/" + name, "w") as file:
            file.write(str(os.getpid()))
    os.write(tell, b"r")
    for number in (0, 1, 2):
        os.close(number)
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
"""
FIRST, SECOND = b"1" * 48, b"2" * 48


def wanted(digest: bytes) -> Wanted:
    # Where no image is configured none is compared: the enclave itself refuses the agreement.
    return Wanted(digest, True, ())


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "l.py").write_text(SCRIPT)
    return (sys.executable, str(tmp_path / "l.py"))


@pytest.fixture
def launcher(tmp_path: Path, command: tuple[str, ...]) -> Iterator[LocalLauncher]:
    made = LocalLauncher(Local(command, tmp_path / "e"), 2)
    yield made
    for handle in made.find():
        made.stop(handle)


def pid_of(tmp_path: Path, handle: EnclaveHandle) -> int:
    return int((tmp_path / "e" / handle.id / "enclave.pid").read_text())


def alive(pid: int) -> bool:
    """Whether it runs: one that has ended may wait to be reaped."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_enclaves_are_found_by_another_launcher(
    launcher: LocalLauncher, tmp_path: Path, command: tuple[str, ...]
) -> None:
    handle = launcher.launch(wanted(FIRST))
    assert handle.agreement == FIRST
    assert handle.address == f"unix:{tmp_path / 'e' / handle.id / 'enclave.sock'}"
    assert LocalLauncher(Local(command, tmp_path / "e"), 2).find() == [handle]


def test_nobody_finds_an_enclave_that_may_be_ended(
    launcher: LocalLauncher, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """It is asked whether the enclave is used after all, and ended, while no coordinator looks."""
    other = LocalLauncher(Local(command, tmp_path / "e"), 2)
    handle = launcher.launch(wanted(FIRST))
    launcher.stop(handle, unless=lambda: True)
    assert launcher.find() == [handle]
    looks: list[Future[list[EnclaveHandle]]] = []

    def unless() -> bool:
        looks.append(pool.submit(other.find))
        done, _ = wait(looks, timeout=0.3)
        assert not done, "it would find an enclave that is ended at once"
        return False

    with ThreadPoolExecutor(1) as pool:
        launcher.stop(handle, unless)
        assert looks[0].result(60) == []


def test_no_more_than_there_is_capacity_for(launcher: LocalLauncher) -> None:
    handles = [launcher.launch(wanted(FIRST)), launcher.launch(wanted(SECOND))]
    with pytest.raises(UnavailableError) as caught:
        launcher.launch(wanted(FIRST))
    assert caught.value.code == "no-capacity"
    assert caught.value.retry_after_ms is not None
    launcher.stop(handles[0])
    assert launcher.launch(wanted(FIRST)).agreement == FIRST


def test_stopping_ends_the_process_and_its_folder(launcher: LocalLauncher, tmp_path: Path) -> None:
    handle = launcher.launch(wanted(FIRST))
    pid = pid_of(tmp_path, handle)
    launcher.stop(handle)
    launcher.stop(handle)
    assert launcher.find() == []
    assert not (tmp_path / "e" / handle.id).exists()
    assert not alive(pid)


def test_who_spells_the_folder_differently_ends_the_process_too(
    launcher: LocalLauncher, tmp_path: Path, command: tuple[str, ...]
) -> None:
    handle = launcher.launch(wanted(FIRST))
    pid = pid_of(tmp_path, handle)
    (tmp_path / "b").mkdir()
    LocalLauncher(Local(command, tmp_path / "b" / ".." / "e"), 2).stop(handle)
    assert not alive(pid)
    assert not (tmp_path / "e" / handle.id).exists()


def test_a_dead_enclave_is_not_found_and_frees_its_place(launcher: LocalLauncher, tmp_path: Path) -> None:
    dead, other = launcher.launch(wanted(FIRST)), launcher.launch(wanted(SECOND))
    pid = pid_of(tmp_path, dead)
    os.kill(pid, 9)
    until(lambda: not alive(pid))
    assert launcher.find() == [other]
    assert launcher.launch(wanted(FIRST)).id != dead.id


def test_a_number_that_is_now_another_process_is_left_alone(launcher: LocalLauncher, tmp_path: Path) -> None:
    handle = launcher.launch(wanted(FIRST))
    os.kill(pid_of(tmp_path, handle), 9)
    for name in ("enclave.pid", "nsm.pid"):
        (tmp_path / "e" / handle.id / name).write_text(str(os.getpid()))
    launcher.stop(handle)
    assert not (tmp_path / "e" / handle.id).exists()


def test_what_does_not_start_is_unavailable_and_leaves_nothing(tmp_path: Path, command: tuple[str, ...]) -> None:
    commands = ((*command, "--fail"), (str(tmp_path / "none"),), (sys.executable, "-c", "pass"))
    for broken in commands:
        launcher = LocalLauncher(Local(broken, tmp_path / "e"), 2)
        with pytest.raises(UnavailableError) as caught:
            launcher.launch(wanted(FIRST))
        assert caught.value.code == "unavailable"
        assert [path for path in (tmp_path / "e").iterdir() if path.is_dir()] == []


def test_a_launch_under_way_has_a_place_and_holds_nobody_up(tmp_path: Path, command: tuple[str, ...]) -> None:
    first = LocalLauncher(Local(command, tmp_path / "e"), 2).launch(wanted(FIRST))
    launcher = LocalLauncher(Local((*command, "--slow"), tmp_path / "e", start_s=20), 2)
    with ThreadPoolExecutor(1) as pool:
        launch = pool.submit(launcher.launch, wanted(SECOND))
        until(lambda: any((tmp_path / "e").glob("*/begun")))
        assert launcher.find() == [first]
        with pytest.raises(UnavailableError) as caught:
            launcher.launch(wanted(FIRST))
        assert caught.value.code == "no-capacity"
        launcher.stop(first)
        assert launcher.find() == [] and not launch.done()
        (tmp_path / "go").touch()
        handle = launch.result()
    assert launcher.find() == [handle] and handle.agreement == SECOND
    launcher.stop(handle)


def test_closing_ends_a_launch_under_way_and_no_enclave(tmp_path: Path, command: tuple[str, ...]) -> None:
    first = LocalLauncher(Local(command, tmp_path / "e"), 4).launch(wanted(FIRST))
    launcher = LocalLauncher(Local((*command, "--slow"), tmp_path / "e", start_s=20), 4)
    with ThreadPoolExecutor(1) as pool:
        launch = pool.submit(launcher.launch, wanted(SECOND))
        until(lambda: any((tmp_path / "e").glob("*/begun")))
        (begun,) = (tmp_path / "e").glob("*/begun")
        pid = int(begun.read_text())
        assert alive(pid)
        launcher.close()
        with pytest.raises(UnavailableError, match="stopping"):
            launch.result()
    assert not begun.parent.exists() and not alive(pid)
    with pytest.raises(UnavailableError, match="stopping"):
        launcher.launch(wanted(SECOND))
    assert launcher.find() == [first]
    launcher.stop(first)


def test_a_launch_that_takes_too_long_is_ended(tmp_path: Path, command: tuple[str, ...]) -> None:
    launcher = LocalLauncher(Local((*command, "--slow"), tmp_path / "e", start_s=0.5), 4)
    with pytest.raises(UnavailableError, match="did not start"):
        launcher.launch(wanted(FIRST))
    assert [path for path in (tmp_path / "e").iterdir() if path.is_dir()] == []


def test_paths_that_no_socket_can_have_are_a_config_error(tmp_path: Path, command: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"launcher\.local\.folder"):
        LocalLauncher(Local(command, tmp_path / ("x" * 80)), 2)


def test_foreign_folders_are_no_enclaves(launcher: LocalLauncher, tmp_path: Path) -> None:
    (tmp_path / "e" / "notes").mkdir()
    assert launcher.find() == []
    assert (tmp_path / "e" / "notes").exists()


def test_an_enclave_is_alive_until_it_ends(launcher: LocalLauncher, tmp_path: Path) -> None:
    handle = launcher.launch(wanted(FIRST))
    assert launcher.alive(handle)
    os.kill(pid_of(tmp_path, handle), 9)
    until(lambda: not launcher.alive(handle))


def test_an_emulated_image_must_be_one_of_the_agreement(tmp_path: Path, command: tuple[str, ...]) -> None:
    measured = tiny_image(tmp_path / "i.eif")
    launcher = LocalLauncher(Local(command, tmp_path / "e", image=tmp_path / "i.eif", section="launcher.qemu"), 2)
    handle = launcher.launch(Wanted(FIRST, True, (measured,)))
    assert launcher.find() == [handle]
    launcher.stop(handle)
    # Another image under the same name is read anew.
    tiny_image(tmp_path / "i.eif", b"other")
    with pytest.raises(RefusedError, match=r"i\.eif") as caught:
        launcher.launch(Wanted(FIRST, True, (measured,)))
    assert caught.value.code == "attestation" and launcher.find() == []


@pytest.mark.parametrize(("content", "code"), [(None, "unavailable"), (b"#!/bin/sh", "attestation")])
def test_an_emulated_image_that_is_none_is_not_started(
    tmp_path: Path, command: tuple[str, ...], content: bytes | None, code: str
) -> None:
    if content is not None:
        (tmp_path / "i.eif").write_bytes(content)
    launcher = LocalLauncher(Local(command, tmp_path / "e", image=tmp_path / "i.eif", section="launcher.qemu"), 2)
    with pytest.raises((RefusedError, UnavailableError), match=r"i\.eif") as caught:
        launcher.launch(wanted(FIRST))
    assert caught.value.code == code and launcher.find() == []


def test_the_socket_path_of_the_emulator_is_bounded_too(tmp_path: Path, command: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"launcher\.qemu\.folder"):
        LocalLauncher(Local(command, tmp_path / ("x" * 80), section="launcher.qemu"), 2)


def test_a_full_disk_is_unavailable_and_leaves_nothing(launcher: LocalLauncher, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(UnavailableError, match="disk") as caught:
            launcher.launch(wanted(FIRST))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.retry_after_ms is not None
    assert [path for path in (tmp_path / "e").iterdir() if path.is_dir()] == []
    assert launcher.launch(wanted(FIRST)).agreement == FIRST
