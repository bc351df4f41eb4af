"""A worker that a table has taken over, in the image itself: its kernel, its file systems, its Python and C library."""

from __future__ import annotations

import errno
import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emulation.machines import Emulator, machine, overlay
from support import taken_over

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

Asked = Callable[[bytes], Any]


@pytest.fixture(scope="module")
def ask(emulator: Emulator, image: Path) -> Iterator[Asked]:
    """What the machine answers to one byte; see taken_over."""
    with tempfile.TemporaryDirectory(prefix="pc-") as name:
        folder = Path(name)
        made = overlay(image, folder, Path(taken_over.__file__))

        def ask(what: bytes) -> Any:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(300)
                connection.connect(str(folder / "m" / "enclave.sock"))
                connection.sendall(what)
                with connection.makefile("rb") as stream:
                    said = stream.read()
            return json.loads(said)

        with machine(emulator, folder / "m", made):
            yield ask


def test_a_worker_in_the_image_reads_nothing_of_others_starts_nothing_and_leaves_nothing(ask: Asked) -> None:
    outcome = ask(b"c")
    assert outcome.pop("seen") is True, "it sees its own process alone"
    for name, expected in {
        "thread": "done",
        "signal to itself": "done",
        "umask": 0o077,
        "core": [0, 0],
        "allocate": "memory",
        "secret": errno.EACCES,
        "memory of the parent": errno.ENOENT,
        "memory of a sibling": errno.ENOENT,
    }.items():
        assert outcome.pop(name) == expected, name
    assert len(outcome) > 40
    assert {name: number for name, number in outcome.items() if number not in (errno.EPERM, errno.ENOSYS)} == {}
    assert ask(b"m")["sibling"] is None, "the sibling lives"


def test_without_the_filter_the_image_itself_refuses_files_and_ptrace(ask: Asked) -> None:
    outcome = ask(b"f")
    for name in ("fork", "segment", "key", "owner", "bounds of a sibling", "signal to a sibling"):
        assert outcome[name] == "done", f"{name}: the probe can succeed"
    for name in ("file", "empty file", "unnamed file", "symbolic link", "folder", "pipe with a name", "secret"):
        assert outcome[name] == errno.EACCES, name
    assert outcome["ptrace"] == errno.EPERM
    assert outcome["memory of a sibling"] == errno.ENOENT


def test_the_workers_uid_may_write_devices_that_keep_nothing_and_no_file(ask: Asked) -> None:
    assert set(ask(b"w")) <= {
        f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "vsock")
    }


def test_no_module_can_be_loaded_and_no_process_be_traced(ask: Asked) -> None:
    said = ask(b"m")
    assert (said["kernel/modules_disabled"], said["kernel/yama/ptrace_scope"]) == ("1", "3")
