"""PID 1 of the image: makes the machine ready, proves that it is an enclave, starts the one process, and reaps.

It stands in the boot ramdisk as /init, alone: nothing but the standard library is imported. `STEPS` is what it does, in
order. Whatever goes wrong is said on the console as `parley-init: STEP: what`, and the machine ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import socket
import stat
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

PROGRAM: Final = "/usr/bin/python3.13"
ARGUMENTS: Final = ("-P", "-s", "-B", "-m", "parley_enclave", "--listen", "vsock:5005", "--nsm", "dev:/dev/nsm")
"""Not -I: the application stands in PYTHONPATH, and the environment is this one."""
ENVIRONMENT: Final = {
    "HOME": "/",
    "LANG": "C.UTF-8",
    "PATH": "/usr/bin",
    "PYTHONPATH": "/app",
    "PYTHONUNBUFFERED": "1",
}
DISPATCH: Final = {
    "x86_64": {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR", "OPENBLAS_CORETYPE": "Haswell"},
    "aarch64": {"NPY_DISABLE_CPU_FEATURES": "ASIMDFHM SVE", "OPENBLAS_CORETYPE": "NEOVERSEN1"},
}
"""Which instructions numpy and BLAS choose: those that every host of enclaves has, so that the same tables give the same
bytes on all of them. What is switched off and not there is no error."""
WORKER_UID: Final = 1000
WORKERS: Final = 64
"""parley_protocol.limits.WORKERS."""

CLOCKS: Final = {"x86_64": ("kvm-clock", "tsc"), "aarch64": ("arch_sys_counter",)}
"""Clocks that the host cannot turn: the time of a session is an NSM document's plus one of these."""
GENERATOR: Final = "nsm-hwrng"
SEED_BYTES: Final = 32
"""What the kernel's pool holds; the module gives up to 256 in one answer."""
HEARTBEAT: Final = (3, 9000, b"\xb7")
"""The parent's CID, nitro-cli's port, and the byte that goes both ways."""
WAIT_SECONDS: Final = 30.0
"""Devices and clocks appear a while after their drivers; in an emulator it takes seconds."""
HEARTBEAT_SECONDS: Final = 60.0
PAUSE_SECONDS: Final = 0.05
DRAIN_SECONDS: Final = 1.0
"""For the console to print the last line."""

FILES: Final = 1024
"""RLIMIT_NOFILE: 128 connections of the host, 64 workers, and twice as many Serve connections."""
PROCESSES: Final = 1024
"""RLIMIT_NPROC: 64 workers and their threads."""
OOM_SCORE: Final = -1000
"""Where memory runs out a worker goes, whose task is repeated, never the process with the keys."""

_NOSUID, _NODEV, _NOEXEC, _RDONLY, _REMOUNT, _NOATIME, _BIND = 2, 4, 8, 1, 32, 1024, 4096
_NSM_RAW = 0xC0200A00
_NSM_RESPONSE_BYTES = 0x3000
_RND_ADD_ENTROPY, _RND_RESEED = 0x40085203, 0x5207
_PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 24, 28, 38
_SECUREBITS = 1 << 5 | 1 << 6 | 1 << 7
"""No capability is kept over a change of uid, and none becomes ambient; locked."""
KEPT_CAPABILITIES: Final = (5, 6, 7)
"""CAP_KILL, CAP_SETGID, CAP_SETUID: to start workers under their uid, and to end them."""
_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}
_RB_AUTOBOOT = 0x01234567


class InitError(Exception):
    """A step that cannot be done, or a machine that is not what it must be."""


class Kernel(Protocol):
    """The system calls that have no place in a test's process. All raise OSError."""

    def mount(self, source: str, target: Path, kind: str, flags: int, data: str) -> None:
        """mount(2)."""

    def load_module(self, module: Path, parameters: str) -> None:
        """finit_module(2)."""

    def ioctl(self, device: Path, request: int, argument: bytearray) -> None:
        """ioctl(2) on a device that is opened for it; what the kernel writes is in `argument`."""

    def own(self, path: Path, mode: int) -> None:
        """Gives a file to uid and gid 0."""

    def connect(self, cid: int, port: int, seconds: float) -> socket.socket:
        """A connection over vsock."""

    def prctl(self, option: int, value: int) -> int:
        """prctl(2)."""

    def reboot(self) -> None:
        """Ends the machine."""


class Linux:
    """The kernel below."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def mount(self, source: str, target: Path, kind: str, flags: int, data: str) -> None:
        arguments = (source.encode(), bytes(target), kind.encode(), ctypes.c_ulong(flags), data.encode())
        self._checked(self._libc.mount(*arguments), str(target))

    def load_module(self, module: Path, parameters: str) -> None:
        number = _FINIT_MODULE[os.uname().machine]
        with module.open("rb") as file:
            arguments = (ctypes.c_long(number), file.fileno(), parameters.encode(), 0)
            self._checked(self._libc.syscall(*arguments), module.name)

    def ioctl(self, device: Path, request: int, argument: bytearray) -> None:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, request, argument)
        finally:
            os.close(descriptor)

    def own(self, path: Path, mode: int) -> None:
        os.chown(path, 0, 0)
        path.chmod(mode)

    def connect(self, cid: int, port: int, seconds: float) -> socket.socket:
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            connection.settimeout(seconds)
            connection.connect((cid, port))
        except OSError:
            connection.close()
            raise
        return connection

    def prctl(self, option: int, value: int) -> int:
        zero = ctypes.c_ulong(0)
        return self._checked(self._libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), f"prctl {option}")

    def reboot(self) -> None:
        os.sync()
        self._checked(self._libc.reboot(_RB_AUTOBOOT), "reboot")

    @staticmethod
    def _checked(result: int, what: str) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), what)
        return result


@dataclass(slots=True)
class Boot:
    """What the steps work on: the root of the file system, the kernel, and the clock that they wait by."""

    root: Path
    kernel: Kernel
    machine: str = field(default_factory=lambda: os.uname().machine)
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    program: str = PROGRAM
    arguments: tuple[str, ...] = ARGUMENTS
    environment: Mapping[str, str] = field(default_factory=lambda: ENVIRONMENT)

    def read(self, path: str) -> str:
        """The text of a small file, without the newline at its end."""
        return (self.root / path).read_text("ascii").strip()

    def wait(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        """Returns when `holds` does; InitError with `what` after too long."""
        until = self.monotonic() + seconds
        while not holds():
            if self.monotonic() >= until:
                raise InitError(what)
            self.sleep(PAUSE_SECONDS)


def say(line: str) -> None:
    """One line on the console."""
    os.write(2, f"parley-init: {line}\n".encode())


_PRIVATE = _NOSUID | _NODEV | _NOEXEC
_MOUNTS = (
    # A worker sees no process but its own.
    ("proc", "proc", _PRIVATE, "hidepid=2"),
    ("sysfs", "sys", _PRIVATE, ""),
    # What a worker reads, the next one does not see.
    ("devtmpfs", "dev", _NOSUID | _NOEXEC | _NOATIME, "mode=0755"),
    # Root's alone: a worker could leave names there, which no size bounds.
    ("tmpfs", "run", _PRIVATE | _NOATIME, "mode=0700,size=1m,nr_inodes=64"),
    ("tmpfs", "tmp", _PRIVATE | _NOATIME, "mode=0700,size=1m,nr_inodes=64"),
)


def mount(boot: Boot) -> None:
    """The file systems of the kernel, and two small ones in memory."""
    for kind, place, flags, data in _MOUNTS:
        target = boot.root / place
        target.mkdir(exist_ok=True)
        boot.kernel.mount(kind, target, kind, flags, data)


def console(boot: Boot) -> None:
    """The console is standard input, output and error."""
    descriptor = os.open(boot.root / "dev/console", os.O_RDWR | os.O_NOCTTY)
    for standard in (0, 1, 2):
        os.dup2(descriptor, standard)
    if descriptor > 2:
        os.close(descriptor)


def parameters(command_line: str, module: str) -> str:
    """The parameters that the kernel's command line gives a module, as modprobe would pass them."""
    given: list[str] = []
    for word in command_line.split():
        name, dot, parameter = word.partition(".")
        if dot and name.replace("-", "_") == module.replace("-", "_"):
            given.append(parameter)
    return " ".join(given)


def modules(boot: Boot) -> None:
    """Loads the files of /modules that /modules/list names, in its order."""
    command_line = boot.read("proc/cmdline")
    for name in boot.read("modules/list").splitlines():
        if "/" in name or not name.endswith(".ko"):
            raise InitError(f"modules/list: {name!r} is no name of a module")
        boot.kernel.load_module(boot.root / "modules" / name, parameters(command_line, name.removesuffix(".ko")))


_REQUIRED: Final = {
    "kernel/modules_disabled": "1",
    "kernel/yama/ptrace_scope": "3",
}
"""What is said of an image rests on these two."""
_SETTINGS: Final = {
    "kernel/kexec_load_disabled": "1",
    "kernel/kptr_restrict": "2",
    "kernel/dmesg_restrict": "1",
    "kernel/sysrq": "0",
    "kernel/perf_event_paranoid": "3",
    "kernel/unprivileged_bpf_disabled": "1",
    "fs/suid_dumpable": "0",
    "user/max_user_namespaces": "0",
}
"""A kernel without the feature has nothing to close."""


def settings(boot: Boot) -> None:
    """Closes what an enclave does not need; most of it cannot be opened again."""
    for name, value in (_REQUIRED | _SETTINGS).items():
        place = boot.root / "proc/sys" / name
        if not place.exists():
            if name in _REQUIRED:
                raise InitError(f"the kernel has no {name}")
            continue
        place.write_text(value, "ascii")
        if place.read_text("ascii").strip() != value:
            raise InitError(f"{name} is not {value}")


def device(boot: Boot) -> None:
    """/dev/nsm is there, and nobody's but root's: the driver makes it everybody's."""
    nsm = boot.root / "dev/nsm"
    boot.wait(nsm.exists, WAIT_SECONDS, "there is no /dev/nsm")
    if not stat.S_ISCHR(nsm.lstat().st_mode):
        raise InitError("/dev/nsm is no device")
    boot.kernel.own(nsm, 0o600)


def generator(boot: Boot) -> None:
    """The kernel's random bytes come from the module."""
    current = "sys/class/misc/hw_random/rng_current"
    boot.wait(lambda: boot.read(current) == GENERATOR, WAIT_SECONDS, f"rng_current is not {GENERATOR}")


def random_bytes(answer: bytes) -> bytes:
    """The bytes of an NSM's answer {"GetRandom": {"random": bytes}}; InitError for any other."""
    start = b"\xa1\x69GetRandom\xa1\x66random"
    if answer.startswith(start + b"\x58"):
        length, data = answer[len(start) + 1 : len(start) + 2], answer[len(start) + 2 :]
    elif answer.startswith(start + b"\x59"):
        length, data = answer[len(start) + 1 : len(start) + 3], answer[len(start) + 3 :]
    else:
        raise InitError("the NSM gives no random bytes")
    if len(data) != int.from_bytes(length, "big") or len(data) < SEED_BYTES:
        raise InitError("the NSM gives too few random bytes")
    return data


def entropy(boot: Boot) -> None:
    """The kernel's pool is seeded by the module, credited, and used from now on."""
    request = ctypes.create_string_buffer(b"\x69GetRandom", 10)
    response = ctypes.create_string_buffer(_NSM_RESPONSE_BYTES)
    raw = bytearray(struct.pack("=QQQQ", ctypes.addressof(request), 10, ctypes.addressof(response), len(response)))
    boot.kernel.ioctl(boot.root / "dev/nsm", _NSM_RAW, raw)
    length = struct.unpack("=QQQQ", raw)[3]
    if length > len(response):
        raise InitError("the NSM's answer is too long")
    seed = random_bytes(response.raw[:length])
    pool = bytearray(struct.pack("=ii", 8 * len(seed), len(seed)) + seed)
    boot.kernel.ioctl(boot.root / "dev/random", _RND_ADD_ENTROPY, pool)
    boot.kernel.ioctl(boot.root / "dev/random", _RND_RESEED, bytearray())
    os.getrandom(1, os.GRND_NONBLOCK)


def clock(boot: Boot) -> None:
    """The kernel's clock is one that the host does not turn."""
    if boot.machine not in CLOCKS:
        raise InitError(f"no clock is known for {boot.machine}")
    allowed = CLOCKS[boot.machine]
    current = "sys/devices/system/clocksource/clocksource0/current_clocksource"
    boot.wait(lambda: boot.read(current) in allowed, WAIT_SECONDS, f"the clock source is not {' or '.join(allowed)}")


def seal(boot: Boot) -> None:
    """Nothing is written any more but /run and /tmp."""
    knobs = boot.root / "proc/sys"
    boot.kernel.mount(str(knobs), knobs, "", _BIND, "")
    for folder in (knobs, boot.root / "sys"):
        boot.kernel.mount("", folder, "", _REMOUNT | _BIND | _RDONLY | _PRIVATE, "")
    boot.kernel.mount("", boot.root, "", _REMOUNT | _RDONLY, "")


def heartbeat(boot: Boot) -> None:
    """Tells the parent that the enclave has started."""
    cid, port, byte = HEARTBEAT
    with _dial(boot, cid, port) as connection:
        connection.sendall(byte)
        if connection.recv(1) != byte:
            raise InitError("the parent does not answer the heartbeat")


def _dial(boot: Boot, cid: int, port: int) -> socket.socket:
    until = boot.monotonic() + HEARTBEAT_SECONDS
    while True:
        try:
            return boot.kernel.connect(cid, port, HEARTBEAT_SECONDS)
        except OSError as error:
            # The driver's device comes when it comes.
            if boot.monotonic() >= until:
                raise InitError(f"no connection to CID {cid} port {port}: {error.strerror or error}") from error
        boot.sleep(PAUSE_SECONDS)


def command(boot: Boot, workers: int) -> list[str]:
    """The one process, with as many workers as there are processors."""
    return [boot.program, *boot.arguments, "--workers", str(workers), "--worker-uid", str(WORKER_UID)]


def confine(boot: Boot) -> None:
    """Leaves this process, and what it becomes, three capabilities and bounded resources."""
    for kind, bound in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_NPROC, PROCESSES),
    ):
        resource.setrlimit(kind, (bound, bound))
    (boot.root / "proc/self/oom_score_adj").write_text(str(OOM_SCORE), "ascii")
    boot.kernel.prctl(_PR_SET_SECUREBITS, _SECUREBITS)
    boot.kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(int(boot.read("proc/sys/kernel/cap_last_cap")) + 1):
        if capability not in KEPT_CAPABILITIES:
            boot.kernel.prctl(_PR_CAPBSET_DROP, capability)


def run(boot: Boot) -> None:
    """Starts the one process and buries what dies; InitError when it is the process itself."""
    argv = command(boot, min(len(os.sched_getaffinity(0)), WORKERS))
    environment = {**boot.environment, **DISPATCH.get(boot.machine, {})}
    main = os.fork()
    if main == 0:
        try:
            os.setsid()
            os.chdir("/")
            confine(boot)
            os.execve(argv[0], argv, environment)  # noqa: S606  # there is no shell
        except BaseException as error:  # noqa: BLE001  # this child must never go on as a second PID 1
            say(f"exec: {error}")
        finally:
            os._exit(127)
    say(f"started {' '.join(argv)}")
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == main:
            raise InitError(f"the enclave ended with code {os.waitstatus_to_exitcode(status)}")


STEPS: Final[tuple[Callable[[Boot], None], ...]] = (
    mount,
    console,
    modules,
    settings,
    device,
    generator,
    entropy,
    clock,
    seal,
    heartbeat,
    run,
)


def boot_through(boot: Boot, steps: tuple[Callable[[Boot], None], ...] = STEPS) -> None:
    """All steps in order; the machine ends with the first that fails, and in any case."""
    name = "init"
    try:
        for step in steps:
            name = step.__name__
            step(boot)
    except Exception as error:  # noqa: BLE001  # said, whatever it is: nobody else is there to say it
        say(f"{name}: {error or type(error).__name__}")
    finally:
        boot.sleep(DRAIN_SECONDS)
        boot.kernel.reboot()


if __name__ == "__main__":
    boot_through(Boot(Path("/"), Linux()))
