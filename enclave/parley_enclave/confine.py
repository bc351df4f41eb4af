"""What a process of the enclave gives up for good before it meets anything that others made.

The main process can be looked into by nobody. A worker, under its own uid, moreover starts no process, opens no connection
and looks into no other, so that one that a table has taken over is gone with its end, and its memory with it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from pathlib import Path
from typing import Final

from parley_protocol import limits

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER = 2


def undumpable() -> None:
    """No core, no ptrace, no /proc/PID/mem: not even for processes of the same uid."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def confine_worker() -> None:
    """Takes from this process, which has one thread yet, all that a worker does not need; OSError where that fails."""
    os.umask(0o077)
    Path("/proc/self/oom_score_adj").write_text(str(limits.WORKER_OOM_SCORE), "ascii")
    for kind, bound in (
        (resource.RLIMIT_AS, limits.WORKER_ADDRESS_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, limits.WORKER_FILES),
        (resource.RLIMIT_NPROC, limits.WORKERS * limits.WORKER_THREADS),
    ):
        resource.setrlimit(kind, (bound, bound))
    undumpable()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _filter(os.uname().machine)


_REFUSED: Final = {
    # name: x86_64, aarch64; the latter has no fork and vfork
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
}
_CLONE, _CLONE3, _TGKILL = (56, 220), (435, 435), (234, 131)
_CLONE_THREAD = 0x10000
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables, and AUDIT_ARCH_*."""
_X32 = 0x40000000
"""Numbers from here on are those of x86_64's second table of system calls."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in struct seccomp_data; both machines are little-endian."""


def program(machine: str, pid: int) -> bytes:
    """The filter of system calls of a process: what is refused, with EPERM, in BPF. OSError for an unknown machine."""
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {machine}")
    column, architecture = _MACHINES[machine]
    refused = [numbers[column] for numbers in _REFUSED.values()]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        # The library then takes clone, whose flags can be read here.
        (_EQUAL, 0, 1, _CLONE3[column]),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    for number in refused:
        if number is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    code += [
        # abort() signals the process itself.
        (_EQUAL, 0, 3, _TGKILL[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 5, 0, pid),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        # A thread may be made, a process may not.
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter(machine: str) -> None:
    code = program(machine, os.getpid())
    passed = _Program(len(code) // 8, code)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(passed))


def _prctl(option: int, first: int, second: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(word) for word in (first, second, 0, 0)]
    if libc.prctl(option, *words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")
