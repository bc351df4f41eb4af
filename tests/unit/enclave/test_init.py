"""PID 1: its steps over a folder that stands for the root and calls that stand for the kernel, then in real namespaces."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parley_enclave import init
from parley_enclave.init import Boot, InitError
from parley_protocol import framing, limits

ANSWER = b"\xa1\x69GetRandom\xa1\x66random"
SEED = bytes(range(256))


class Machine:
    """Notes what is asked of the kernel; answers as a Nitro enclave's would."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.did: list[tuple[object, ...]] = []
        self.seeds: list[bytes] = []
        self.answer = ANSWER + b"\x59\x01\x00" + SEED
        self.parent: Callable[[socket.socket], object] = lambda theirs: theirs.sendall(theirs.recv(16))
        self.refusals: list[OSError] = []

    def mount(self, source: str, target: Path, kind: str, flags: int, data: str) -> None:
        self.did.append(("mount", source, str(target.relative_to(self.root)), kind, flags, data))

    def load_module(self, module: Path, parameters: str) -> None:
        self.did.append(("load", module.name, parameters, module.read_bytes()))

    def ioctl(self, device: Path, request: int, argument: bytearray) -> None:
        self.did.append(("ioctl", str(device.relative_to(self.root)), request))
        if device.name == "nsm":
            from_, size, to, room = struct.unpack("=QQQQ", argument)
            assert ctypes.string_at(from_, size) == b"\x69GetRandom" and room == 0x3000
            ctypes.memmove(to, self.answer, min(room, len(self.answer)))
            argument[:] = struct.pack("=QQQQ", from_, size, to, len(self.answer))
        elif request == 0x40085203:
            self.seeds.append(bytes(argument))

    def own(self, path: Path, mode: int) -> None:
        self.did.append(("own", str(path.relative_to(self.root)), mode))

    def connect(self, cid: int, port: int, seconds: float) -> socket.socket:
        if self.refusals:
            raise self.refusals.pop()
        self.did.append(("connect", cid, port))
        ours, theirs = socket.socketpair()
        ours.settimeout(5)

        def answer() -> None:
            with theirs:
                self.parent(theirs)

        threading.Thread(target=answer).start()
        return ours

    def prctl(self, option: int, value: int) -> int:
        self.did.append(("prctl", option, value))
        return 0

    def reboot(self) -> None:
        self.did.append(("reboot",))


FILES = {
    "proc/cmdline": "reboot=k panic=30 virtio_mmio.device=4K@0xd0000000:5 virtio-mmio.device=4K@0xd0001000:6 random.trust_cpu=on\n",
    "proc/sys/kernel/modules_disabled": "0\n",
    "proc/sys/kernel/kptr_restrict": "0\n",
    "proc/sys/kernel/yama/ptrace_scope": "1\n",
    "proc/sys/kernel/cap_last_cap": "40\n",
    "modules/list": "vsock.ko\nvirtio-mmio.ko\nnsm.ko\n",
    "modules/vsock.ko": "1",
    "modules/virtio-mmio.ko": "2",
    "modules/nsm.ko": "3",
    "sys/class/misc/hw_random/rng_current": "nsm-hwrng\n",
    "sys/devices/system/clocksource/clocksource0/current_clocksource": "kvm-clock\n",
}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(tmp_path)


@pytest.fixture
def boot(machine: Machine) -> Boot:
    """Waits by a clock that only its own pauses move."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return Boot(machine.root, machine, machine="x86_64", monotonic=lambda: now[0], sleep=sleep)


def write(boot: Boot, name: str, text: str) -> None:
    (boot.root / name).write_text(text)


def test_the_steps_and_their_order() -> None:
    names = [step.__name__ for step in init.STEPS]
    assert names == ("mount console modules settings device generator entropy clock seal heartbeat run".split())


# What is measured twice is the same


def test_its_numbers_are_those_of_the_protocol() -> None:
    """It imports nothing of Parley, so its few shared numbers are repeated."""
    assert init.HEARTBEAT == (3, framing.HEARTBEAT_PORT, b"\xb7")
    assert f"vsock:{framing.ENCLAVE_PORT}" in init.ARGUMENTS
    assert limits.WORKERS == init.WORKERS
    assert limits.NSM_RESPONSE_BYTES == init._NSM_RESPONSE_BYTES
    assert limits.CONNECTIONS + 4 * limits.WORKERS < init.FILES
    assert limits.WORKERS * limits.WORKER_THREADS < init.PROCESSES


def test_it_imports_nothing_but_the_standard_library() -> None:
    program = (
        f"import runpy, sys; runpy.run_path({init.__file__!r}, run_name='init'); "
        "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-IBS", "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"__main__", "_sysconfigdata__linux_x86_64-linux-gnu"}


# Each step


def test_mounts_are_bounded_and_run_nothing(boot: Boot, machine: Machine) -> None:
    init.mount(boot)
    nosuid, nodev, noexec, noatime = 2, 4, 8, 1024
    mounts = {entry[2]: entry for entry in machine.did}
    assert list(mounts) == ["proc", "sys", "dev", "run", "tmp"]
    for place, (_, _, _, kind, flags, data) in mounts.items():
        assert isinstance(flags, int) and flags & nosuid and flags & noexec
        assert bool(flags & nodev) == (place != "dev")
        assert (kind in ("proc", "sysfs")) == (not flags & noatime), "a read leaves a trace"
        if kind == "tmpfs":
            assert data == "mode=0700,size=1m,nr_inodes=64", "root's alone, and bounded in bytes and in names"
        assert (boot.root / str(place)).is_dir()
    assert mounts["proc"][5] == "hidepid=2"


@pytest.mark.parametrize(
    ("line", "module", "expected"),
    [
        ("", "nsm", ""),
        ("virtio_mmio.device=4K@0xd0000000:5", "virtio_mmio", "device=4K@0xd0000000:5"),
        ("a virtio_mmio.device=1@2:3 b virtio_mmio.device=4@5:6 c", "virtio_mmio", "device=1@2:3 device=4@5:6"),
        ("virtio-mmio.device=1 virtio_mmio.x", "virtio_mmio", "device=1 x"),
        ("virtio_mmio.device=1", "virtio-mmio", "device=1"),
        ("xvirtio_mmio.device=1 virtio_mmio virtio_mmio=1.5 virtio_mmio_x.device=2", "virtio_mmio", ""),
        ("nsm.a=b.c=d", "nsm", "a=b.c=d"),
    ],
)
def test_parameters_of_modules(line: str, module: str, expected: str) -> None:
    assert init.parameters(line, module) == expected


def test_modules_are_loaded_in_order_with_their_parameters(boot: Boot, machine: Machine) -> None:
    init.modules(boot)
    assert machine.did == [
        ("load", "vsock.ko", "", b"1"),
        ("load", "virtio-mmio.ko", "device=4K@0xd0000000:5 device=4K@0xd0001000:6", b"2"),
        ("load", "nsm.ko", "", b"3"),
    ]


@pytest.mark.parametrize("name", ["../nsm.ko", "/nsm.ko", "nsm", "", " nsm.ko.xz"])
def test_a_name_that_is_no_modules_is_refused(boot: Boot, name: str) -> None:
    write(boot, "modules/list", f"nsm.ko\n{name}\nvsock.ko\n")
    with pytest.raises(InitError, match="no name of a module"):
        init.modules(boot)


def test_settings_are_closed_where_the_kernel_has_them(boot: Boot) -> None:
    init.settings(boot)
    assert boot.read("proc/sys/kernel/modules_disabled") == "1"
    assert boot.read("proc/sys/kernel/kptr_restrict") == "2"
    assert boot.read("proc/sys/kernel/yama/ptrace_scope") == "3"
    assert not (boot.root / "proc/sys/kernel/kexec_load_disabled").exists()


@pytest.mark.parametrize("name", ["kernel/modules_disabled", "kernel/yama/ptrace_scope"])
def test_settings_on_which_claims_rest_are_there(boot: Boot, name: str) -> None:
    (boot.root / "proc/sys" / name).unlink()
    with pytest.raises(InitError, match=f"the kernel has no {name}"):
        init.settings(boot)


def test_a_setting_that_does_not_hold_is_an_error(boot: Boot) -> None:
    (boot.root / "proc/sys/kernel/kptr_restrict").unlink()
    (boot.root / "proc/sys/kernel/kptr_restrict").symlink_to("/dev/null")
    with pytest.raises(InitError, match="kptr_restrict is not 2"):
        init.settings(boot)


def test_the_device_becomes_roots_alone_when_it_appears(
    boot: Boot, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    nsm = boot.root / "dev/nsm"
    nsm.parent.mkdir()

    def sleep(seconds: float) -> None:
        nsm.symlink_to("/dev/null")

    boot.sleep = sleep
    with pytest.raises(InitError, match="no device"):
        init.device(boot)
    monkeypatch.setattr(Path, "lstat", Path.stat)
    init.device(boot)
    assert machine.did == [("own", "dev/nsm", 0o600)]


def test_the_wait_for_the_device_is_bounded(boot: Boot) -> None:
    with pytest.raises(InitError, match="no /dev/nsm"):
        init.device(boot)
    assert init.WAIT_SECONDS <= boot.monotonic() <= init.WAIT_SECONDS + 1


@pytest.mark.parametrize("current", ["none", "virtio_rng.0", "nsm-hwrng2", ""])
def test_another_generator_is_refused(boot: Boot, current: str) -> None:
    init.generator(boot)
    write(boot, "sys/class/misc/hw_random/rng_current", current + "\n")
    with pytest.raises(InitError, match="rng_current is not nsm-hwrng"):
        init.generator(boot)


def test_the_pool_is_seeded_credited_and_used(boot: Boot, machine: Machine) -> None:
    init.entropy(boot)
    assert machine.seeds == [struct.pack("=ii", 2048, 256) + SEED]
    assert machine.did == [
        ("ioctl", "dev/nsm", 0xC0200A00),
        ("ioctl", "dev/random", 0x40085203),
        ("ioctl", "dev/random", 0x5207),
    ]


@pytest.mark.parametrize(
    ("answer", "data"),
    [
        (ANSWER + b"\x58\x20" + SEED[:32], SEED[:32]),
        (ANSWER + b"\x58\xff" + SEED[:255], SEED[:255]),
        (ANSWER + b"\x59\x01\x00" + SEED, SEED),
    ],
)
def test_random_bytes_of_an_answer(answer: bytes, data: bytes) -> None:
    assert init.random_bytes(answer) == data


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        ANSWER,
        ANSWER + b"\x58",
        ANSWER + b"\x59\x01",
        ANSWER + b"\x40",
        ANSWER + b"\x57" + SEED[:23],
        ANSWER + b"\x58\x1f" + SEED[:31],
        ANSWER + b"\x58\x21" + SEED[:32],
        ANSWER + b"\x58\x20" + SEED[:33],
        ANSWER + b"\x5a\x00\x00\x01\x00" + SEED,
        ANSWER + b"\x5f\x58\x20" + SEED[:32] + b"\xff",
        b"\xa1\x65Error\x6dInternalError",
        b"\x69GetRandom",
        b"\xbf" + ANSWER[1:] + b"\x59\x01\x00" + SEED,
    ],
)
def test_an_answer_without_enough_random_bytes_is_refused(boot: Boot, machine: Machine, answer: bytes) -> None:
    machine.answer = answer
    with pytest.raises(InitError, match="random bytes"):
        init.entropy(boot)
    assert machine.seeds == []


def test_an_answer_that_was_cut_is_refused(boot: Boot, machine: Machine) -> None:
    machine.answer = ANSWER + b"\x59\x2f\xf0" + bytes(0x3000)
    with pytest.raises(InitError, match="too long"):
        init.entropy(boot)
    assert machine.seeds == []


@pytest.mark.parametrize(
    ("machine_name", "current", "right"),
    [
        ("x86_64", "kvm-clock", True),
        ("x86_64", "tsc", True),
        ("x86_64", "tsc-early", False),
        ("x86_64", "hpet", False),
        ("x86_64", "arch_sys_counter", False),
        ("aarch64", "arch_sys_counter", True),
        ("aarch64", "kvm-clock", False),
        ("riscv64", "tsc", False),
    ],
)
def test_a_clock_that_the_host_could_turn_is_refused(boot: Boot, machine_name: str, current: str, right: bool) -> None:
    boot.machine = machine_name
    write(boot, "sys/devices/system/clocksource/clocksource0/current_clocksource", current + "\n")
    if right:
        init.clock(boot)
        return
    with pytest.raises(InitError, match="clock"):
        init.clock(boot)


def test_sealing_makes_the_settings_and_the_root_read_only(boot: Boot, machine: Machine) -> None:
    init.seal(boot)
    assert [(entry[2], entry[4]) for entry in machine.did] == [
        ("proc/sys", 4096),
        ("proc/sys", 4096 | 32 | 1 | 2 | 4 | 8),
        ("sys", 4096 | 32 | 1 | 2 | 4 | 8),
        (".", 32 | 1),
    ]


def test_the_heartbeat_is_told_and_heard(boot: Boot, machine: Machine) -> None:
    heard: list[bytes] = []

    def parent(theirs: socket.socket) -> None:
        heard.append(theirs.recv(16))
        theirs.sendall(b"\xb7")

    machine.parent = parent
    machine.refusals = [OSError(errno.ENODEV, "no device"), OSError(errno.ECONNRESET, "reset")]
    init.heartbeat(boot)
    assert heard == [b"\xb7"]
    assert machine.did == [("connect", 3, 9000)]
    assert boot.monotonic() == pytest.approx(2 * init.PAUSE_SECONDS)


@pytest.mark.parametrize("answer", [b"", b"\xb8", b"\0\xb7"])
def test_another_answer_to_the_heartbeat_is_refused(boot: Boot, machine: Machine, answer: bytes) -> None:
    def parent(theirs: socket.socket) -> None:
        theirs.recv(16)
        theirs.sendall(answer)

    machine.parent = parent
    with pytest.raises(InitError, match="does not answer"):
        init.heartbeat(boot)


def test_the_heartbeats_retries_are_bounded(boot: Boot, machine: Machine) -> None:
    machine.refusals = [OSError(errno.ECONNRESET, "Connection reset by peer") for _ in range(10_000)]
    with pytest.raises(InitError, match="no connection to CID 3 port 9000: Connection reset by peer"):
        init.heartbeat(boot)
    assert init.HEARTBEAT_SECONDS <= boot.monotonic() <= init.HEARTBEAT_SECONDS + 1


def test_the_process_keeps_three_capabilities(boot: Boot, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (boot.root / "proc/self").mkdir()
    bounds: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr("resource.setrlimit", bounds.__setitem__)
    init.confine(boot)
    dropped = {entry[2] for entry in machine.did if entry[1] == 24}
    assert set(range(41)) - dropped == {5, 6, 7}, "CAP_KILL, CAP_SETGID, CAP_SETUID"
    assert ("prctl", 38, 1) in machine.did, "no new privileges"
    assert bounds == {4: (0, 0), 8: (0, 0), 7: (1024, 1024), 6: (1024, 1024)}
    assert boot.read("proc/self/oom_score_adj") == "-1000"


def test_the_one_process(boot: Boot) -> None:
    assert init.command(boot, 2) == (
        "/usr/bin/python3.13 -P -s -B -m parley_enclave --listen vsock:5005 --nsm dev:/dev/nsm "
        "--workers 2 --worker-uid 1000".split()
    )


# The whole


def test_a_step_that_fails_is_named_and_the_machine_ends(
    boot: Boot, machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    def first(_boot: Boot) -> None:
        machine.did.append(("first",))

    def second(_boot: Boot) -> None:
        raise InitError("it is not so")

    def third(_boot: Boot) -> None:
        pytest.fail("reached")

    init.boot_through(boot, (first, second, third))
    assert machine.did == [("first",), ("reboot",)]
    assert capfd.readouterr().err == "parley-init: second: it is not so\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "No such file", "/dev/x"), ValueError("bad"), AssertionError()]
)
def test_whatever_fails_the_machine_ends(
    boot: Boot, machine: Machine, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    def step(_boot: Boot) -> None:
        raise error

    init.boot_through(boot, (step,))
    assert machine.did == [("reboot",)]
    assert capfd.readouterr().err.startswith("parley-init: step: ")


def test_a_module_that_does_not_load_ends_the_machine(
    boot: Boot, machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    def load_module(module: Path, parameters: str) -> None:
        raise OSError(errno.ENOEXEC, "Exec format error", module.name)

    machine.load_module = load_module  # type: ignore[method-assign]
    init.boot_through(boot, (init.modules, init.settings))
    assert machine.did == [("reboot",)]
    assert "parley-init: modules: [Errno 8] Exec format error: 'vsock.ko'\n" in capfd.readouterr().err


# The real kernel: its own process, mount and PID namespaces

_AS_INIT = """
import importlib.util, os, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("init", {init!r})
init = sys.modules["init"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(init)
init.OOM_SCORE = {score}

class Kernel(init.Linux):
    # The machine is the test's: its devices are not ours to make, and it is not ours to end.
    def mount(self, source, target, kind, flags, data):
        if kind != "devtmpfs":
            super().mount(source, target, kind, flags, data)
    def reboot(self):
        os._exit(77)

# A root of its own, in memory, with the interpreter in it.
kernel, new = Kernel(), Path({new!r})
kernel.mount("", Path("/"), "", 16384 | 1 << 18, "")
kernel.mount("tmpfs", new, "tmpfs", 0, "")
for name in {shown!r}:
    place = new / name.lstrip("/")
    if Path(name).is_symlink():
        place.symlink_to(os.readlink(name))
    elif Path(name).exists():
        place.mkdir(parents=True, exist_ok=True)
        kernel.mount(name, place, "", 4096 | 16384, "")
os.chroot(new)
os.chdir("/")
boot = init.Boot(Path("/"), kernel, program={python!r}, arguments=("-IBS", "-c", {program!r}), sleep=lambda seconds: None)
init.boot_through(boot, (init.mount, init.seal, init.run))
"""

_ENCLAVE = """
import json, os, time
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
if os.fork() == 0:
    # An orphan, which PID 1 buries.
    if os.fork() == 0:
        time.sleep(0.2)
        os._exit(3)
    os._exit(0)
os.wait()
time.sleep(0.6)
def tried(path):
    try:
        open(path, "w").close()
        return "written"
    except OSError as error:
        return error.errno
written = [tried("/x"), tried("/proc/sys/kernel/core_pattern"), tried("/sys/kernel/profiling")]
os.setgroups([])
os.setgid(61234)
os.setuid(61234)
seen = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
print(json.dumps({
    "pid": os.getpid(), "parent": os.getppid(), "caps": {name: status[name].split()[0] for name in ("CapBnd", "CapPrm", "CapEff")},
    "nnp": status["NoNewPrivs"].split()[0], "seen": seen, "arguments": __import__("sys").argv,
    "environment": sorted(os.environ), "tmp": tried("/tmp/x"), "written": written,
    "after": [line.split(":")[1].split()[0] for line in open("/proc/self/status") if line.startswith("CapEff")],
    "options": {line.split()[1]: line.split()[3] for line in open("/proc/self/mounts")},
}), flush=True)
os._exit(9)
"""


@pytest.fixture
def namespaces() -> list[str]:
    unshare = shutil.which("unshare")
    prefix = [unshare or "", "--mount", "--pid", "--fork", "--ipc", "--"]
    if os.geteuid() != 0 or unshare is None or subprocess.run([*prefix, "true"], check=False).returncode != 0:
        pytest.skip("NOT TESTED: mounts, reaping and exec need root and namespaces")
    return prefix


_PYTHON = str(Path(sys.executable).resolve())
_SHOWN = ("/usr", "/lib", "/lib64", "/bin", "/dev", sys.base_prefix, str(Path(init.__file__).parent))


def _run(namespaces: list[str], new: Path, program: str, python: str = _PYTHON) -> subprocess.CompletedProcess[str]:
    # Where root may not lower the score, as in some containers, it stays.
    may_lower = int(Path("/proc/self/status").read_text("ascii").split("CapEff:")[1].split()[0], 16) >> 24 & 1
    score = init.OOM_SCORE if may_lower else int(Path("/proc/self/oom_score_adj").read_text("ascii"))
    source = _AS_INIT.format(
        init=init.__file__, python=python, program=program, score=score, new=str(new), shown=_SHOWN
    )
    command = [*namespaces, sys.executable, "-IBS", "-c", source]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_as_pid_1_it_mounts_starts_reaps_and_ends(namespaces: list[str], tmp_path: Path) -> None:
    done = _run(namespaces, tmp_path, _ENCLAVE)
    assert done.returncode == 77, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["parent"] == 1
    assert set(report["caps"].values()) == {f"{1 << 5 | 1 << 6 | 1 << 7:016x}"}, "kept: kill, setgid, setuid"
    assert report["after"] == ["0" * 16], "under the workers' uid: none"
    assert report["nnp"] == "1"
    assert report["seen"] == [report["pid"]], "no other process is seen, and no dead one is left"
    assert report["tmp"] == errno.EACCES, "root's alone"
    assert report["written"] == [errno.EROFS] * 3, "the root, the kernel's settings, and sysfs"
    for place in ("/tmp", "/run"):
        bounds = {"noexec", "nosuid", "nodev", "noatime", "mode=700", "size=1024k", "nr_inodes=64"}
        assert bounds <= set(report["options"][place].split(","))
    assert {"ro", "noexec"} <= set(report["options"]["/sys"].split(","))
    assert "hidepid=invisible" in report["options"]["/proc"]
    assert report["arguments"][1:3] == ["--workers", str(len(os.sched_getaffinity(0)))]
    allowed = {*init.ENVIRONMENT, *init.DISPATCH.get(os.uname().machine, {}), "LC_CTYPE"}
    assert set(report["environment"]) <= allowed
    assert done.stderr.splitlines()[-1] == "parley-init: run: the enclave ended with code 9"


def test_as_pid_1_what_cannot_be_started_is_said(namespaces: list[str], tmp_path: Path) -> None:
    done = _run(namespaces, tmp_path, "", python="/none")
    assert done.returncode == 77
    assert "parley-init: exec: [Errno 2] No such file or directory: '/none'\n" in done.stderr
    assert done.stderr.endswith("parley-init: run: the enclave ended with code 127\n")


def test_as_pid_1_a_process_that_is_killed_ends_the_machine(namespaces: list[str], tmp_path: Path) -> None:
    done = _run(namespaces, tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert done.returncode == 77
    assert done.stderr.endswith("parley-init: run: the enclave ended with code -9\n")


def test_the_kernel_takes_the_seed(namespaces: list[str]) -> None:
    """RNDADDENTROPY and RNDRESEEDCRNG on the real device; the module is the one thing played."""
    machine = Machine(Path("/"))

    class Kernel(init.Linux):
        def ioctl(self, device: Path, request: int, argument: bytearray) -> None:
            if device.name == "nsm":
                machine.ioctl(device, request, argument)
            else:
                super().ioctl(device, request, argument)

    init.entropy(Boot(Path("/"), Kernel()))
    with pytest.raises(OSError, match="ioctl"):
        init.Linux().ioctl(Path("/dev/null"), 0x5207, bytearray())


def test_the_kernel_refuses_a_module_that_is_none(namespaces: list[str], tmp_path: Path) -> None:
    module = tmp_path / "none.ko"
    module.write_bytes(b"not an object")
    with pytest.raises(OSError, match=r"none\.ko"):
        init.Linux().load_module(module, "a=1")


def test_no_device_of_vsock_is_an_error_of_the_connection() -> None:
    with pytest.raises(OSError) as refused:  # noqa: PT011  # which error depends on the drivers of this machine
        init.Linux().connect(4_000_000_000, 9, 0.5)
    assert refused.value.errno or isinstance(refused.value, TimeoutError)
