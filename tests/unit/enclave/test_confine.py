"""What a worker under another uid cannot do: tried by one, as root, with real processes."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parley_enclave import confine
from parley_enclave.pool import Pool, Task, WorkerError
from parley_protocol import limits
from support import taken_over
from support.uids import UID, interpreter, search_path


@pytest.fixture(scope="module")
def python() -> str:
    return interpreter()


_PROBE = Path(taken_over.__file__)
_UNHARMED = {"thread": "done", "signal to itself": "done", "umask": 0o077, "core": [0, 0]}
"""What a worker keeps, and what is set for it."""
_BY_ANOTHER = {
    "secret": errno.EACCES,
    "memory of the parent": errno.EACCES,
    "memory of a sibling": errno.EACCES,
    "allocate": "memory",
}
"""What the kernel refuses a worker without the filter."""


@pytest.fixture
def sibling(python: str) -> Iterator[int]:
    """A process under the workers' uid, confined as they are."""
    program = [python, "-P", "-s", "-B", str(_PROBE), "sibling"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, **_as_worker())
    assert process.stdout is not None
    with process.stdout as ready:
        assert ready.read(1) == b"x"
        yield process.pid
        assert process.poll() is None, "the sibling was ended"
        process.kill()
        process.wait()


def _as_worker() -> dict[str, Any]:
    return {"user": UID, "group": UID, "extra_groups": [], "cwd": "/", "env": {"PYTHONPATH": search_path()}}


def _probe(python: str, secret: Path, sibling: int, *words: str) -> dict[str, object]:
    arguments = [python, "-P", "-s", "-B", str(_PROBE), str(secret), str(os.getpid()), str(sibling), *words]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            arguments, stdin=theirs.fileno(), capture_output=True, text=True, check=False, **_as_worker()
        )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, object] = json.loads(done.stdout)
    return outcome


def test_a_worker_reads_nothing_of_others_starts_nothing_and_leaves_nothing(
    python: str, sibling: int, tmp_path: Path
) -> None:
    secret = tmp_path / "nsm"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o055)
    outcome = _probe(python, secret, sibling)
    del outcome["seen"]
    for name, expected in (_UNHARMED | _BY_ANOTHER).items():
        assert outcome.pop(name) == expected, name
    assert len(outcome) > 40
    assert {name: number for name, number in outcome.items() if number not in (errno.EPERM, errno.ENOSYS)} == {}


def test_without_confinement_most_of_that_would_be_done(python: str, sibling: int, tmp_path: Path) -> None:
    """The probe can succeed, so the test above can fail."""
    outcome = _probe(python, tmp_path / "none", sibling, "free")
    assert {name for name, became in outcome.items() if became == "done"} >= {
        *("fork", "spawn", "unix", "pair", "file handed over", "file in memory", "watch", "dumpable again"),
        *("signal to a sibling", "signal to a thread of a sibling", "pidfd", "owner", "owner, extended"),
        *("owner of a socket", "signal of an owner", "bounds of a sibling", "bounds for a sibling"),
        *("processors of a sibling", "priority of a sibling", "priority of a sibling's input"),
        *("segment", "semaphores", "messages", "file", "empty file", "unnamed file", "symbolic link", "folder"),
        *("pipe with a name", "device written", "own file written"),
    }


def test_a_pool_under_another_uid_works_and_ends_its_workers(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setenv("PYTHONPATH", search_path())
    pool = Pool(1, UID)
    try:
        theirs, ours = socket.socketpair()
        pool.offer(ours)
        with theirs, pytest.raises(WorkerError) as failed:
            pool.submit(Task(["admit", "secret-value"], (b"\xff",))).result(timeout=60)
        assert failed.value.place.startswith("ValueError at worker.py:")
        pool.renew()
        (pid,) = pool.pids
        confined = threading.Event()
        for _ in range(600):
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
                if "\t" in line
            )
            if status["Seccomp"] == "2":
                confined.set()
                break
            threading.Event().wait(0.05)
        assert confined.is_set()
        assert status["Uid"].split() == status["Gid"].split() == [str(UID)] * 4
        assert status["Groups"].split() == []
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        score = int(Path(f"/proc/{pid}/oom_score_adj").read_text("ascii"))
        assert score == limits.WORKER_OOM_SCORE
        pool.renew()
        assert not Path(f"/proc/{pid}").exists()
    finally:
        pool.close()


@pytest.mark.parametrize("uid", [0, -1, 2**32 - 1])
def test_a_worker_uid_is_that_of_a_user_without_rights(uid: int) -> None:
    with pytest.raises(ValueError, match="worker uid"):
        Pool(1, uid)


def test_only_root_has_workers_under_another_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="only root"):
        Pool(1, UID)


# The filter, run by an interpreter of its few instructions: for the machine that this one is not, too.

_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
_X86, _ARM = 0xC000003E, 0xC00000B7


def _judge(machine: str, architecture: int, number: int, *arguments: int) -> int:
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", confine.program(machine, 4711)))
    place = loaded = 0
    while True:
        operation, yes, no, operand = code[place]
        place += 1
        match operation:
            case 0x20:
                (loaded,) = struct.unpack_from("<I", data, operand)
            case 0x15:
                place += yes if loaded == operand else no
            case 0x35:
                place += yes if loaded >= operand else no
            case 0x45:
                place += yes if loaded & operand else no
            case 0x06:
                return int(operand)
            case _:
                raise AssertionError(operation)


@pytest.mark.parametrize(
    ("machine", "architecture", "number", "arguments", "verdict"),
    [
        ("x86_64", _X86, 0, (), _ALLOW),
        ("x86_64", _X86, 59, (), _ENOSYS),
        ("x86_64", _X86, 41, (), _ENOSYS),
        ("x86_64", _X86, 29, (), _ENOSYS),
        ("x86_64", _X86, 46, (), _ENOSYS),
        ("x86_64", _X86, 425, (), _ENOSYS),
        ("x86_64", _X86, 9999, (), _ENOSYS),
        ("x86_64", _X86, 56, (0x10000 | 0x100,), _ALLOW),
        ("x86_64", _X86, 56, (17,), _EPERM),
        ("x86_64", _X86, 435, (), _ENOSYS),
        ("x86_64", _X86, 234, (4711,), _ALLOW),
        ("x86_64", _X86, 234, (4712,), _EPERM),
        ("x86_64", _X86, 200, (4711,), _ENOSYS),
        ("x86_64", _X86, 257, (0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY), _ALLOW),
        ("x86_64", _X86, 257, (0, 0, os.O_WRONLY), _EPERM),
        ("x86_64", _X86, 257, (0, 0, os.O_RDWR), _EPERM),
        ("x86_64", _X86, 257, (0, 0, os.O_CREAT), _EPERM),
        ("x86_64", _X86, 257, (0, 0, os.O_TRUNC), _EPERM),
        ("x86_64", _X86, 257, (0, 0, 0o20000000), _EPERM),
        ("x86_64", _X86, 72, (5, 3), _ALLOW),
        ("x86_64", _X86, 72, (5, 8, 1), _EPERM),
        ("x86_64", _X86, 16, (5, 0x5421), _ALLOW),
        ("x86_64", _X86, 16, (5, 0x8901), _EPERM),
        ("x86_64", _X86, 302, (0, 4), _ALLOW),
        ("x86_64", _X86, 302, (1, 4), _EPERM),
        ("aarch64", _ARM, 131, (4711,), _ALLOW),
        ("aarch64", _ARM, 131, (1,), _EPERM),
        ("x86_64", _X86, 0x40000000, (), _KILL),
        ("x86_64", _X86, 0x40000000 | 59, (), _KILL),
        ("x86_64", 0x40000003, 11, (), _KILL),
        ("x86_64", _ARM, 0, (), _KILL),
        ("aarch64", _ARM, 63, (), _ALLOW),
        ("aarch64", _ARM, 221, (), _ENOSYS),
        ("aarch64", _ARM, 198, (), _ENOSYS),
        ("aarch64", _ARM, 194, (), _ENOSYS),
        ("aarch64", _ARM, 220, (0x10000,), _ALLOW),
        ("aarch64", _ARM, 220, (17,), _EPERM),
        ("aarch64", _ARM, 435, (), _ENOSYS),
        ("aarch64", _ARM, 56, (0, 0, 0), _ALLOW),
        ("aarch64", _ARM, 56, (0, 0, os.O_CREAT), _EPERM),
        ("aarch64", _ARM, 25, (5, 8), _EPERM),
        ("aarch64", _ARM, 261, (7,), _EPERM),
        ("aarch64", _X86, 63, (), _KILL),
    ],
)
def test_the_filter_of_system_calls(
    machine: str, architecture: int, number: int, arguments: tuple[int, ...], verdict: int
) -> None:
    assert _judge(machine, architecture, number, *arguments) == verdict


@pytest.mark.parametrize(
    ("header", "column"),
    [("x86_64-linux-gnu/asm/unistd_64.h", 0), ("asm-generic/unistd.h", 1)],
    ids=["x86_64", "aarch64"],
)
def test_the_numbers_are_those_of_the_kernel(header: str, column: int) -> None:
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip("NOT TESTED: the kernel's headers are not here")
    theirs = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
    theirs.setdefault("newfstatat", theirs.get("fstatat", ""))
    ours = {name: numbers[column] for name, numbers in confine._ALLOWED.items()}
    ours |= {name: call[0][column] for name, call in confine._CALLS.items()}
    ours |= {"openat": confine._OPENAT[column], "clone": confine._CLONE[column], "tgkill": confine._TGKILL[column]}
    assert ours == {name: int(theirs[name]) if name in theirs else None for name in ours}


def test_another_machine_has_no_filter_and_no_worker() -> None:
    with pytest.raises(OSError, match="riscv64"):
        confine.program("riscv64", 1)
