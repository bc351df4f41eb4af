"""Checks of the machine that enclaves run on: a Nitro parent with its allocator, nitro-cli and image, or an emulator's host."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from parley_coordinator.config import Config, Local, Nitro
from parley_coordinator.doctor_system import Check, System, fail, ok, skip, warn
from parley_coordinator.nitro import entries
from parley_coordinator.nitro_cli import NitroCli, NitroError
from parley_protocol import measurement
from parley_protocol.errors import MalformedError

EIF_RATIO: Final = 4
"""Memory of an enclave to the size of its image: nitro-cli refuses less (E26)."""
PARENT_CID: Final = 3
QEMU: Final = "qemu-system-x86_64"
"""What the emulator runs, on every machine."""
SOON: Final = timedelta(days=30)
"""What ends before this is told."""
_DRIVER: Final = "/sys/module/nitro_enclaves"
_ALLOCATOR: Final = "/etc/nitro_enclaves/allocator.yaml"
_RESTART: Final = "systemctl restart nitro-enclaves-allocator.service while no enclave runs"
_INSTALL: Final = "install aws-nitro-enclaves-cli, and start nitro-enclaves-allocator.service"
_BURSTABLE: Final = re.compile(r"t[0-9][a-z]*\.")


def host(config: Config, system: System) -> list[Check]:
    """All checks for the kind of launcher."""
    if config.launcher == "nitro":
        return [*nitro_host(config.nitro, config.enclaves, system), *image(config.nitro.image, "nitro", config, system)]
    if config.launcher == "qemu":
        return [*emulator(config.qemu, system), *image(config.qemu.image, "qemu", config, system)]
    return [simulation(config.local)]


def nitro_host(config: Nitro, enclaves: int, system: System) -> list[Check]:
    """A parent instance, and whether it has room for the enclaves that the configuration wants."""
    return [
        instance(system),
        driver(system),
        device(system),
        folders(system),
        allocator(config, enclaves, system),
        huge_pages(config, system),
        cpus(config, system),
        nitro_cli(config),
        vsock(system),
        owner(config, system),
    ]


def instance(system: System) -> Check:
    """An EC2 instance of a kind that can have enclaves."""
    vendor = system.read("/sys/class/dmi/id/sys_vendor")
    kind = system.read("/sys/class/dmi/id/product_name") or "unknown"
    if vendor != "Amazon EC2":
        do = "run on a Nitro-based EC2 instance with EnclaveOptions enabled, or use another launcher.kind"
        return fail("instance", f"not a Nitro-based EC2 instance: its vendor is {vendor or 'unknown'}", do)
    if kind.endswith(".metal") or ".metal-" in kind or _BURSTABLE.match(kind):
        return fail(
            "instance", f"{kind} cannot have enclaves", "use an instance that is neither bare metal nor burstable"
        )
    return ok("instance", kind)


def driver(system: System) -> Check:
    """The kernel module."""
    if not system.path(_DRIVER).is_dir():
        return fail(
            "driver", "the kernel module nitro_enclaves is not loaded", f"modprobe nitro_enclaves; else {_INSTALL}"
        )
    return ok("driver", "nitro_enclaves is loaded")


def device(system: System) -> Check:
    """/dev/nitro_enclaves: only where the instance was started with enclaves enabled."""
    path = system.path("/dev/nitro_enclaves")
    if not path.exists():
        do = "stop the instance, enable enclaves for it (EnclaveOptions), and start it"
        return fail("device", "/dev/nitro_enclaves is not there", do)
    if not system.usable(path):
        do = "add the coordinator's user to the group ne, and start the coordinator again"
        return fail("device", "/dev/nitro_enclaves may not be used by this user", do)
    return ok("device", "/dev/nitro_enclaves may be used")


def folders(system: System) -> Check:
    """Where nitro-cli keeps sockets and its log."""
    for name in ("/run/nitro_enclaves", "/var/log/nitro_enclaves"):
        path = system.path(name)
        if not path.is_dir():
            return fail("nitro-folders", f"{name} is not there", _INSTALL)
        if not system.access(path, os.W_OK | os.X_OK):
            return fail("nitro-folders", f"{name} may not be written by this user", "add the user to the group ne")
    return ok("nitro-folders", "/run/nitro_enclaves and /var/log/nitro_enclaves may be written")


def read_allocator(text: str) -> dict[str, str]:
    """allocator.yaml as its service reads it: `key: value` lines behind `---`; ValueError names the line."""
    found: dict[str, str] = {}
    begun = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            continue
        if not begun or line.strip() == "---":
            begun = begun or line.strip() == "---"
            continue
        key, colon, value = line.partition(":")
        if key.strip() not in ("memory_mib", "cpu_count", "cpu_pool") or not colon or not value.strip():
            raise ValueError(f"line {number}: not memory_mib, cpu_count or cpu_pool with a value")
        found[key.strip()] = value.strip().strip('"')
    if "memory_mib" not in found:
        raise ValueError("no memory_mib" if begun else "no line `---`, behind which alone it is read")
    if ("cpu_count" in found) == ("cpu_pool" in found):
        raise ValueError("not one of cpu_count and cpu_pool")
    if not found["memory_mib"].isdecimal() or not found.get("cpu_count", "1").isdecimal():
        raise ValueError("memory_mib or cpu_count is no whole number")
    return found


def cpu_list(text: str) -> list[int]:
    """The CPUs in a list such as `1-3,7`; ValueError where it is none."""
    found: list[int] = []
    for part in text.replace("\n", ",").split(","):
        if part.strip():
            first, dash, last = part.partition("-")
            found += range(int(first), int(last if dash else first) + 1)
    return found


def allocator(config: Nitro, enclaves: int, system: System) -> Check:
    """What is reserved for enclaves by configuration, against what the configuration of the coordinator asks for."""
    text = system.read(_ALLOCATOR)
    if text is None:
        return fail("allocator", f"{_ALLOCATOR} is not there", _INSTALL)
    try:
        found = read_allocator(text)
        count = int(found["cpu_count"]) if "cpu_count" in found else len(cpu_list(found["cpu_pool"]))
    except ValueError as error:
        return fail("allocator", f"{_ALLOCATOR}: {error}", f"correct it, and {_RESTART}")
    memory = int(found["memory_mib"])
    room = min(memory // config.memory_mib, count // config.cpus)
    said = f"{memory} MiB and {count} CPUs: room for {room} of {enclaves} enclaves of {config.memory_mib} MiB, {config.cpus} CPUs"
    do = (
        f"set memory_mib to {enclaves * config.memory_mib} and cpu_count to {enclaves * config.cpus} in {_ALLOCATOR} and"
        f" {_RESTART}; or lower launcher.enclaves, launcher.nitro.memory_mib or launcher.nitro.cpus"
    )
    if room < 1:
        return fail("allocator", said, do)
    return warn("allocator", said, do) if room < enclaves else ok("allocator", said)


def huge_pages(config: Nitro, system: System) -> Check:
    """What the kernel has really set aside: an enclave's memory is huge pages of one NUMA node."""
    nodes: dict[str, tuple[int, int]] = {}
    for pages in sorted(system.path("/sys/devices/system/node").glob("node[0-9]*/hugepages/hugepages-*kB")):
        size = int(pages.name.removeprefix("hugepages-").removesuffix("kB"))
        counts = [int((pages / name).read_text()) for name in ("nr_hugepages", "free_hugepages")]
        total, free = nodes.get(pages.parts[-3], (0, 0))
        nodes[pages.parts[-3]] = (total + counts[0] * size // 1024, free + counts[1] * size // 1024)
    if not nodes:
        return fail("huge-pages", "the kernel has none", f"set memory_mib in {_ALLOCATOR}, and {_RESTART}")
    said = ", ".join(f"{node}: {total} MiB, {free} MiB free" for node, (total, free) in nodes.items())
    most = max(total for total, _ in nodes.values())
    if most < config.memory_mib:
        do = f"{_RESTART}, soon after a start of the machine, when its memory is not yet in pieces"
        return fail("huge-pages", f"{said}; an enclave takes {config.memory_mib} MiB of one node", do)
    if max(free for _, free in nodes.values()) < config.memory_mib:
        return warn("huge-pages", said, "nothing if enclaves run; the next one finds no memory until one of them ends")
    return ok("huge-pages", said)


def cpus(config: Nitro, system: System) -> Check:
    """The pool of CPUs, and whole cores."""
    pool = system.read(f"{_DRIVER}/parameters/ne_cpus")
    try:
        count = len(cpu_list(pool or ""))
        threads = len(cpu_list(system.read("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list") or "0"))
    except ValueError:
        return fail("cpus", "the pool of CPUs cannot be read", f"correct {_ALLOCATOR}, and {_RESTART}")
    said = f"a pool of {count}, {threads} to a core; an enclave takes {config.cpus}"
    if count < config.cpus:
        return fail("cpus", said, f"raise cpu_count in {_ALLOCATOR}, and {_RESTART}")
    if config.cpus % threads:
        return fail("cpus", said, f"set launcher.nitro.cpus to a multiple of {threads}: enclaves take whole cores")
    return ok("cpus", said)


def nitro_cli(config: Nitro) -> Check:
    """nitro-cli runs."""
    try:
        said = NitroCli(config.command, config.call_s, threading.Event()).version()
    except NitroError as error:
        return fail("nitro-cli", error.said.strip()[:200] or "it does not run", error.row.do)
    return ok("nitro-cli", said[:200])


def vsock(system: System) -> Check:
    """The way to the enclaves: a parent is CID 3."""
    if not system.path("/dev/vsock").exists():
        return fail("vsock", "/dev/vsock is not there", "modprobe vsock vmw_vsock_virtio_transport")
    cid = system.local_cid(system.path("/dev/vsock"))
    if cid is None:
        return warn("vsock", "/dev/vsock does not tell its CID to this user", "run doctor as root to see it")
    if cid != PARENT_CID:
        return fail("vsock", f"CID {cid}; a parent instance has {PARENT_CID}", "run on a Nitro parent instance")
    return ok("vsock", f"CID {cid}")


def owner(config: Nitro, system: System) -> Check:
    """This user is the one whose enclaves they are: nitro-cli lets nobody but their owner and root end them."""
    sockets = [
        system.path(f"/run/nitro_enclaves/{entry.id.rpartition('-enc')[2]}.sock")
        for entry in entries(config.folder).values()
        if entry.id
    ]
    found = {system.owner(path) for path in (config.folder, *sockets)} - {None}
    owners = ", ".join(sorted(_user(number) for number in found if number is not None))
    if system.user and found - {system.user}:
        said = f"launcher.nitro.folder and its enclaves belong to {owners}; this is {_user(system.user)}"
        do = f"run the coordinator, and this, as {owners}: nitro-cli lets only an enclave's owner and root end it"
        return fail("owner", said, do)
    return ok(
        "owner", f"the enclaves belong to {owners}" if owners else f"enclaves will belong to {_user(system.user)}"
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def image(path: Path | None, kind: str, config: Config, system: System) -> list[Check]:
    """The image: whole, for this machine, with registers that mean something, and not too large for its enclave."""
    field = f"launcher.{kind}.image"
    if path is None:
        return [skip("image", "no image")]
    try:
        with path.open("rb") as file:
            found = measurement.measure(file)
    except OSError as error:
        do = f"build it (make image) or copy it there, and name it in {field}"
        return [fail("image", f"{path}: {error.strerror}", do)]
    except MalformedError as error:
        return [fail("image", f"{path}: {error.message}", "copy or build it anew")]
    registers = " ".join(f"PCR{number}={value.hex()}" for number, value in sorted(found.pcrs.items()))
    checks = [ok("image", f"{path}, {found.size} bytes; {registers}")]
    machine = _architecture(system.machine) if kind == "nitro" else measurement.Architecture.X86_64
    if found.architecture != machine:
        said = f"for {found.architecture}; enclaves here are {machine}"
        checks.append(fail("image-machine", said, f"build the image for {machine}"))
    if found.pcrs[2] == measurement.EMPTY_PCR:
        do = "build it with the application in a ramdisk of its own, as parley_deploy.image does"
        checks.append(warn("image-parts", "one ramdisk: PCR2 tells nothing", do))
    if found.certificate is not None:
        checks.append(_signature(found.certificate, system))
    if kind == "nitro":
        least = -(-EIF_RATIO * found.size // (1 << 20))
        said = f"launcher.nitro.memory_mib is {config.nitro.memory_mib}, the image needs {least}"
        enough = config.nitro.memory_mib >= least
        checks.append(ok("memory", said) if enough else fail("memory", said, f"set it to at least {least}"))
        if config.nitro.debug:
            checks.append(
                warn("debug", "enclaves start in debug mode: they prove nothing", "set launcher.nitro.debug to false")
            )
    return checks


def _architecture(machine: str) -> str:
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine.lower(), machine.lower())


def _signature(certificate: measurement.SigningCertificate, system: System) -> Check:
    ends = datetime.fromtimestamp(certificate.not_after_ms / 1000, UTC)
    begins = datetime.fromtimestamp(certificate.not_before_ms / 1000, UTC)
    said = f"signed by {certificate.subject}, valid until {ends:%Y-%m-%d}"
    do = "sign the image with a new certificate; PCR8 changes, and with it agreements that name it"
    now = system.now()
    if not begins <= now <= ends:
        return fail("image-signature", f"{said}: nitro-cli starts no image whose certificate is not valid", do)
    return warn("image-signature", said, do) if ends - now < SOON else ok("image-signature", said)


def emulator(config: Local, system: System) -> list[Check]:
    """What the emulator needs."""
    return [qemu(config, system), kvm(system), simulation(config)]


def qemu(config: Local, system: System) -> Check:
    """A QEMU in PATH, or the one that the emulator keeps in a folder."""
    found = system.which(QEMU)
    if found is not None:
        return ok("qemu", found)
    named = _after(config.command, "--qemu") or system.environ.get("PARLEY_QEMU_DIR")
    cache = system.environ.get("XDG_CACHE_HOME") or f"{system.environ.get('HOME', '')}/.cache"
    folder = Path(named or f"{cache}/parley/qemu")
    if (folder / "ready.json").is_file():
        return ok("qemu", str(folder))
    said = f"{QEMU} is neither in PATH nor in {folder}"
    return fail("qemu", said, "get one with `python -m parley_deploy.emulator.qemu`")


def kvm(system: System) -> Check:
    """Whether the processor helps."""
    if system.usable(system.path("/dev/kvm")):
        return ok("kvm", "/dev/kvm may be used")
    do = "add the user to the group kvm, where the machine has /dev/kvm"
    return warn("kvm", "/dev/kvm may not be used: enclaves are slow", do)


def simulation(config: Local) -> Check:
    """What the simulated enclave needs."""
    command = _command(config)
    return command if command.do else _root(config)


def _command(config: Local) -> Check:
    module = _after(config.command, "-m")
    if config.command[0] == sys.executable and module is not None:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return fail("launcher", f"{package} is not installed", "pip install '.[deploy]' in a checkout")
    return ok("launcher", " ".join(config.command))


def _root(config: Local) -> Check:
    root = _after(config.command, "--root")
    if root is None:
        return skip("root", "the command names no local root")
    if not (Path(root) / "root.pem").is_file():
        do = "make one with `parley local up`, or copy the root that the agreements name"
        return fail("root", f"{root}/root.pem is not there", do)
    return ok("root", f"{root}: what it certifies protects nothing")


def _after(command: Sequence[str], option: str) -> str | None:
    return command[command.index(option) + 1] if option in command[:-1] else None
