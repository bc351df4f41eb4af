"""What a process of the enclave gives up for good before it meets anything that others made.

The main process can be looked into by nobody. A worker, under the workers' uid, moreover keeps only the system calls that
its work needs: it starts no process, opens no connection, writes no file, and neither looks into, signals nor bounds another
process. It makes nothing that outlasts it, in the file system or in the kernel, so one that a table has taken over is gone
with its end. What remains between workers is what they do to the shared machine: its load, its caches, its counters.
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


_ALLOWED: Final = {
    # name: x86_64, aarch64, which lacks the older ones
    # what is open, and what names say
    "read": (0, 63),
    "readv": (19, 65),
    "pread64": (17, 67),
    "write": (1, 64),
    "writev": (20, 66),
    "close": (3, 57),
    "lseek": (8, 62),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "getdents64": (217, 61),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    # the two connections
    "poll": (7, None),
    "ppoll": (271, 73),
    "pselect6": (270, 72),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "sendto": (44, 206),
    "getsockopt": (55, 209),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "shutdown": (48, 210),
    # memory
    "brk": (12, 214),
    "mmap": (9, 222),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    # threads
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "gettid": (186, 178),
    "getpid": (39, 172),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # signals to itself
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    # time
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    # itself
    "getrandom": (318, 278),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrusage": (98, 165),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
}
"""What a worker may call, whatever the arguments: it reads, computes, waits, and talks on the two sockets that it was given.

Nothing here leaves anything with the kernel that outlasts the process or that another process sees: no name, no segment, no
queue, no key, no owner of a file's signals. sendmsg is missing too: a worker hands no file to the main process.
"""

_THREAD: Final = 0x10000
_CREATES: Final = 0o3 | 0o100 | 0o1000 | 0o20000000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, and the bit of O_TMPFILE that is its own."""
_CALLS: Final[dict[str, tuple[tuple[int, int], int, tuple[int, ...]]]] = {
    # name: numbers, argument, what it may be
    "fcntl": ((72, 25), 1, (1, 3)),  # F_GETFD, F_GETFL: not F_SETOWN, which sends signals to others
    "ioctl": ((16, 29), 1, (0x5401, 0x5421, 0x5450, 0x5451)),  # TCGETS, FIONBIO, FIONCLEX, FIOCLEX: not FIOSETOWN
    "prlimit64": ((302, 261), 0, (0,)),  # its own
}
_OPENAT, _CLONE, _TGKILL = (257, 56), (56, 220), (234, 131)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables, and AUDIT_ARCH_*."""
_X32 = 0x40000000
"""Numbers from here on are those of x86_64's second table of system calls."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data. Both machines are little-endian, and of these arguments the kernel reads the lower half."""

_Instruction = tuple[int, int, int, int]
_YES: Final[_Instruction] = (_RETURN, 0, 0, _ALLOW)
_NO: Final[_Instruction] = (_RETURN, 0, 0, _ERRNO | errno.EPERM)


def program(machine: str, pid: int) -> bytes:
    """The filter of system calls of a process, in BPF. OSError for an unknown machine.

    What is not listed is answered ENOSYS, so that a library takes another way, as from clone3, whose flags cannot be read
    here, to clone; what is listed with another argument, EPERM.
    """
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {machine}")
    column, architecture = _MACHINES[machine]
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for numbers in _ALLOWED.values():
        if (number := numbers[column]) is not None:
            code += [(_EQUAL, 0, 1, number), _YES]
    for numbers, argument, values in _CALLS.values():
        code += _where(numbers[column], argument, [line for value in values for line in ((_EQUAL, 0, 1, value), _YES)])
    code += [
        *_where(_OPENAT[column], 2, [(_ANY_BIT, 1, 0, _CREATES), _YES]),
        # A thread may be made, a process may not.
        *_where(_CLONE[column], 0, [(_ANY_BIT, 0, 1, _THREAD), _YES]),
        # abort() signals the process itself.
        *_where(_TGKILL[column], 0, [(_EQUAL, 0, 1, pid), _YES]),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _where(number: int, argument: int, allow: list[_Instruction]) -> list[_Instruction]:
    """What is asked of an argument of one call, which is refused if none of it returns."""
    return [(_EQUAL, 0, len(allow) + 2, number), (_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *allow, _NO]


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
