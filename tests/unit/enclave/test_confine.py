"""What a worker under another uid cannot do: tried by one, as root, with real processes."""

from __future__ import annotations

import errno
import json
import os
import socket
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
from support.uids import UID, interpreter, search_path


@pytest.fixture(scope="module")
def python() -> str:
    return interpreter()


_PROBE = """
import ctypes, json, os, socket, subprocess, sys, threading
from parley_enclave.confine import confine_worker
secret, parent, sibling = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if "free" not in sys.argv:
    confine_worker()
libc = ctypes.CDLL(None, use_errno=True)

def forked():
    if os.fork() == 0:
        os._exit(0)

def ptraced(pid):
    if libc.ptrace(16, pid, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, "ptrace")

def signalled(pid, number):
    if libc.tgkill(pid, pid, number) != 0:
        number = ctypes.get_errno()
        raise OSError(number, "tgkill")

def written():
    with open("/tmp/written-by-a-worker", "xb") as file:
        os.unlink(file.name)
        file.write(b"x")

def vforked():
    subprocess.run(["/bin/true"], check=True)

def allocated():
    "free" in sys.argv or bytearray(1 << 33)

tries = {
    "secret": lambda: open(secret, "rb"),
    "memory of the parent": lambda: open(f"/proc/{parent}/mem", "rb"),
    "memory of a sibling": lambda: open(f"/proc/{sibling}/mem", "rb"),
    "signal to the parent": lambda: os.kill(parent, 0),
    "signal to a sibling": lambda: os.kill(sibling, 0),
    "signal to a thread of a sibling": lambda: signalled(sibling, 0),
    "signal to itself": lambda: signalled(os.getpid(), 0),
    "ptrace": lambda: ptraced(sibling),
    "fork": forked,
    "spawn": vforked,
    "exec": lambda: "free" in sys.argv or os.execv("/bin/true", ["true"]),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "vsock": lambda: socket.socket(socket.AF_VSOCK),
    "write": written,
    "allocate": allocated,
    "core": lambda: (_ for _ in ()).throw(OSError(0, "")) if __import__("resource").getrlimit(4) == (0, 0) else None,
}
outcome = {}
for name, attempt in tries.items():
    try:
        attempt()
        outcome[name] = "done"
    except OSError as error:
        outcome[name] = error.errno
    except MemoryError:
        outcome[name] = "memory"
ran = []
thread = threading.Thread(target=ran.append, args=(1,))
thread.start()
thread.join()
outcome["thread"] = "done" if ran else "none"
outcome["umask"] = os.umask(0)
print(json.dumps(outcome))
"""


@pytest.fixture
def sibling(python: str) -> Iterator[int]:
    """A process under the workers' uid, confined as they are."""
    program = (
        "import sys, time; from parley_enclave.confine import confine_worker; confine_worker(); "
        "sys.stdout.write('x'); sys.stdout.flush(); time.sleep(600)"
    )
    process = subprocess.Popen([python, "-P", "-s", "-B", "-c", program], stdout=subprocess.PIPE, **_as_worker())
    assert process.stdout is not None
    with process.stdout as ready:
        assert ready.read(1) == b"x"
        yield process.pid
        process.kill()
        process.wait()


def _as_worker() -> dict[str, Any]:
    return {"user": UID, "group": UID, "extra_groups": [], "cwd": "/", "env": {"PYTHONPATH": search_path()}}


def _probe(python: str, secret: Path, sibling: int, *words: str) -> dict[str, object]:
    arguments = [python, "-P", "-s", "-B", "-c", _PROBE, str(secret), str(os.getpid()), str(sibling), *words]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, **_as_worker())
    assert done.returncode == 0, done.stderr
    outcome: dict[str, object] = json.loads(done.stdout)
    return outcome


def test_a_worker_reads_nothing_of_others_starts_nothing_and_connects_to_nothing(
    python: str, sibling: int, tmp_path: Path
) -> None:
    secret = tmp_path / "nsm"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    outcome = _probe(python, secret, sibling)
    assert outcome.pop("thread") == "done"
    assert outcome.pop("umask") == 0o077
    assert outcome.pop("signal to itself") == "done"
    assert outcome.pop("secret") == errno.EACCES
    assert outcome.pop("memory of the parent") == errno.EACCES
    assert outcome.pop("memory of a sibling") == errno.EACCES
    assert outcome.pop("write") == errno.EFBIG
    assert outcome.pop("allocate") == "memory"
    assert outcome.pop("core") == 0
    assert outcome and set(outcome.values()) == {errno.EPERM}, outcome


def test_without_confinement_most_of_that_would_be_done(python: str, sibling: int, tmp_path: Path) -> None:
    """The probe can succeed, so the test above can fail."""
    outcome = _probe(python, tmp_path / "none", sibling, "free")
    for name in ("fork", "spawn", "unix", "write", "signal to a sibling", "signal to a thread of a sibling"):
        assert outcome[name] == "done", name


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


def _judge(machine: str, architecture: int, number: int, argument: int = 0) -> int:
    data = struct.pack("<IIQQ", number, architecture, 0, argument)
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
    ("machine", "architecture", "number", "argument", "verdict"),
    [
        ("x86_64", _X86, 0, 0, _ALLOW),
        ("x86_64", _X86, 59, 0, _EPERM),
        ("x86_64", _X86, 41, 0, _EPERM),
        ("x86_64", _X86, 425, 0, _EPERM),
        ("x86_64", _X86, 56, 0x10000 | 0x100, _ALLOW),
        ("x86_64", _X86, 56, 17, _EPERM),
        ("x86_64", _X86, 435, 0, _ENOSYS),
        ("x86_64", _X86, 234, 4711, _ALLOW),
        ("x86_64", _X86, 234, 4712, _EPERM),
        ("x86_64", _X86, 200, 4711, _EPERM),
        ("aarch64", _ARM, 131, 4711, _ALLOW),
        ("aarch64", _ARM, 131, 1, _EPERM),
        ("x86_64", _X86, 0x40000000, 0, _KILL),
        ("x86_64", _X86, 0x40000000 | 59, 0, _KILL),
        ("x86_64", 0x40000003, 11, 0, _KILL),
        ("x86_64", _ARM, 0, 0, _KILL),
        ("aarch64", _ARM, 63, 0, _ALLOW),
        ("aarch64", _ARM, 221, 0, _EPERM),
        ("aarch64", _ARM, 198, 0, _EPERM),
        ("aarch64", _ARM, 220, 0x10000, _ALLOW),
        ("aarch64", _ARM, 220, 17, _EPERM),
        ("aarch64", _ARM, 435, 0, _ENOSYS),
        ("aarch64", _X86, 63, 0, _KILL),
    ],
)
def test_the_filter_of_system_calls(machine: str, architecture: int, number: int, argument: int, verdict: int) -> None:
    assert _judge(machine, architecture, number, argument) == verdict


def test_another_machine_has_no_filter_and_no_worker() -> None:
    with pytest.raises(OSError, match="riscv64"):
        confine.program("riscv64", 1)
