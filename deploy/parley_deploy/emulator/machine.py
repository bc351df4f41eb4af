"""The command of the launcher `qemu`: an enclave image in QEMU, with a module under the local root, detached.

    python -m parley_deploy.emulator --dir DIR --root ROOT --image X.eif [--memory-mib N] [--cpus N] [--accel tcg|kvm|auto]

Two processes outlive the caller: this program with the devices (`nsm.pid`) and QEMU, its child (`enclave.pid`). The image is
measured as it is read, and what was measured runs: kernel, ramdisks and command line go to QEMU one by one. Behind the
command line, and so not measured, stand the words that QEMU's machine needs: a PCI bus, which no real enclave has.
DIR/enclave.sock is bound when the image has sent its heartbeat and accepts connections; each connection to it becomes one of
vsock to the image's port. DIR/console.log has what the guest prints. Both processes end together.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from parley_deploy import detached
from parley_deploy.detached import Running, StartError
from parley_deploy.emulator import qemu, tsc
from parley_deploy.emulator.loop import HANGUP, READ, Loop
from parley_deploy.emulator.nsm import VIRTIO_ID, NsmDevice
from parley_deploy.emulator.vhost import GuestError
from parley_deploy.emulator.vsock import VsockDevice
from parley_deploy.nsm import LocalRoot, SimulatedNsm
from parley_protocol.errors import MalformedError
from parley_protocol.framing import ENCLAVE_PORT, HEARTBEAT, HEARTBEAT_PORT
from parley_protocol.measurement import Architecture, Image, Kind, measure

ACCELERATORS: Final = ("auto", "kvm", "tcg")
BOOT_SECONDS: Final = 300
"""How long an image may take from power on to its first connection. TCG on an idle machine takes 10 s, on a busy one 40."""
PAUSE_SECONDS: Final = 0.1
MEMORY_FACTOR: Final = 4
"""nitro-cli refuses an enclave whose memory is less than four times its image."""
CONSOLE_BYTES: Final = 4 << 20
"""Most of a guest's console that is kept: what follows is dropped."""
TAIL_BYTES: Final = 2000
BACKLOG: Final = 128
FILES: Final = (*detached.FILES, "vsock.sock", "kernel", "initrd")
UNMEASURED: Final = "pci=conf1 panic=-1"
"""Behind the image's own words, so that these win: it says `pci=off`, but here devices are on a PCI bus; and a guest that
panics ends at once."""
KVM: Final = Path("/dev/kvm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the machine and waits until the image listens; 0 when it does, 1 with a line on standard error otherwise."""
    options = _parser().parse_args(arguments)
    return detached.leave(options.dir, lambda running: _serve(options, running), BOOT_SECONDS, FILES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parley_deploy.emulator", description="Run an enclave image in QEMU."
    )
    parser.add_argument("--dir", type=Path, required=True, help="where sockets, pid files and logs stand")
    parser.add_argument("--root", type=Path, required=True, help="folder of the local root that certifies the module")
    parser.add_argument("--image", type=Path, required=True, help="the enclave image (EIF)")
    parser.add_argument("--agreement-hint", default="", help="digest of the agreement, for the log only")
    parser.add_argument(
        "--memory-mib", type=int, default=None, help="default: what the image asks for, at least 4 of it"
    )
    parser.add_argument("--cpus", type=int, default=None, help="default: what the image asks for, as many as there are")
    parser.add_argument("--accel", choices=ACCELERATORS, default="auto", help="auto: KVM where this machine has it")
    parser.add_argument(
        "--qemu", type=Path, default=None, help=f"folder of Debian's QEMU; default: {qemu.default_folder()}"
    )
    return parser


def _serve(options: argparse.Namespace, running: Running) -> int:
    running.say(f"starting for agreement {options.agreement_hint or 'not named'}")
    try:
        image, root = _unpack(options.image, running.folder), LocalRoot.load(options.root)
        command = _command(options, image, running.folder)
    except (qemu.QemuError, OSError) as error:
        raise StartError(str(error)) from error
    running.say(f"image {options.image.name}: PCR0 {image.pcrs[0].hex()}")
    (running.folder / "nsm.pid").write_text(f"{os.getpid()}\n")
    machine = Machine(running, command, SimulatedNsm.create(root, image.pcrs))
    try:
        return machine.run()
    finally:
        machine.close()


def _unpack(path: Path, folder: Path) -> Image:
    """Measures an image and writes its kernel and its ramdisks, one behind the other, into `folder`."""
    # Read once: what is measured is what runs.
    content = io.BytesIO(path.read_bytes())
    try:
        image = measure(content)
    except MalformedError as error:
        raise StartError(f"{path}: {error}") from error
    if image.architecture is not Architecture.X86_64:
        raise StartError(f"{path}: an image for {image.architecture}; only x86_64 is emulated")
    with content.getbuffer() as data:
        for kind, name in ((Kind.KERNEL, "kernel"), (Kind.RAMDISK, "initrd")):
            with (folder / name).open("wb") as file:
                for section in image.sections:
                    if section.kind is kind:
                        file.write(data[section.offset : section.offset + section.size])
    return image


def accelerator(wanted: str) -> str:
    """The accelerator: for `auto` KVM where the processor and the device are there, else TCG. StartError."""
    usable = os.access(KVM, os.R_OK | os.W_OK)
    if wanted == "kvm" and not usable:
        raise StartError(f"--accel kvm: no access to {KVM}")
    if wanted == "auto":
        # The device alone may stand for a KVM that runs only guests made for it.
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
        wanted = "kvm" if usable and {"vmx", "svm"} & set(flags) else "tcg"
    return "tcg,thread=multi" if wanted == "tcg" else wanted


def _command(options: argparse.Namespace, image: Image, folder: Path) -> list[str]:
    """QEMU's command. StartError: too little memory, no processor, a command line that is no text."""
    least = -(-MEMORY_FACTOR * image.size // (1 << 20))
    memory = options.memory_mib or max(least, image.memory_bytes >> 20)
    if memory < least:
        raise StartError(
            f"--memory-mib {memory}: the image has {image.size} bytes and needs {least} MiB, four times as much"
        )
    most = os.cpu_count() or 1
    cpus = options.cpus if options.cpus is not None else max(1, min(image.cpus, most))
    if cpus < 1:
        raise StartError(f"--cpus {cpus}: at least 1")
    try:
        line = image.cmdline.rstrip(b"\0").decode("ascii").strip()
    except UnicodeDecodeError:
        raise StartError("the image's command line is not ASCII") from None
    command = [*qemu.find(options.qemu).command]
    accel = accelerator(options.accel)
    # On a busy host the guest's own measurement of its clock can fail.
    unmeasured = UNMEASURED if accel == "kvm" else f"{UNMEASURED} tsc_early_khz={tsc.khz()} no_timer_check"
    command += ["-M", "q35,memory-backend=m", "-accel", accel, "-cpu", "max", "-smp", str(cpus)]
    command += ["-m", f"{memory}M", "-object", f"memory-backend-memfd,id=m,size={memory}M,share=on"]
    command += ["-kernel", str(folder / "kernel"), "-initrd", str(folder / "initrd"), "-append", f"{line} {unmeasured}"]
    command += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]
    command += ["-chardev", f"socket,id=vsock,path={_quoted(folder / 'vsock.sock')}"]
    command += ["-device", "vhost-user-vsock-pci,chardev=vsock"]
    command += ["-chardev", f"socket,id=nsm,path={_quoted(folder / 'nsm.sock')}"]
    command += ["-device", f"vhost-user-test-device-pci,chardev=nsm,virtio-id={VIRTIO_ID},num_vqs=1"]
    return command


def _quoted(path: Path) -> str:
    """A path in an option of QEMU, where a comma ends a value."""
    return str(path).replace(",", ",,")


class Machine:
    """QEMU, its devices, and the socket that leads to the image; all in the thread of `run`."""

    def __init__(self, running: Running, command: Sequence[str], module: SimulatedNsm) -> None:
        self._running = running
        self._loop = Loop()
        self._code = 0
        self._up = False
        self._beaten = False
        self._listener: socket.socket | None = None
        self._console = (running.folder / "console.log").open("wb", buffering=0)
        self._printed = 0
        self._tail = b""
        folder = running.folder
        self._vsock = VsockDevice(self._loop, folder / "vsock.sock", self._accept, self._broken)
        self._nsm = NsmDevice(self._loop, folder / "nsm.sock", module, self._broken)
        # The guest ends with this process, as a real one ends with its hypervisor.
        self._qemu = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=detached.die_with_parent(),  # noqa: PLW1509  # one system call
        )
        (folder / "enclave.pid").write_text(f"{self._qemu.pid}\n")
        assert self._qemu.stdout is not None
        self._output: IO[bytes] = self._qemu.stdout
        os.set_blocking(self._output.fileno(), False)
        self._loop.add(self._output, READ, self._print)
        self._alive = os.pidfd_open(self._qemu.pid)
        self._loop.add(self._alive, READ, lambda _: self._ended())
        self._loop.later(BOOT_SECONDS, self._late)

    def run(self) -> int:
        """Until the guest ends, or what it needs has failed; StartError where it never listened."""
        self._loop.run()
        return self._code

    def close(self) -> None:
        """Ends QEMU first, then its devices."""
        if self._listener is not None:
            self._listener.close()
        # Not SIGTERM: it would have QEMU ask the devices, which this thread is about to close.
        self._qemu.kill()
        self._qemu.wait()
        self._vsock.close()
        self._nsm.close()
        self._console.close()
        self._loop.close()

    # The guest's life.

    def _accept(self, port: int) -> socket.socket | None:
        """The guest connects to its parent: the heartbeat is all that is awaited."""
        if port != HEARTBEAT_PORT or self._beaten:
            self._running.say(f"the guest connects to port {port}, where nothing listens")
            return None
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._loop.add(ours, READ, lambda _: self._heartbeat(ours))
        return theirs

    def _heartbeat(self, connection: socket.socket) -> None:
        try:
            byte = connection.recv(len(HEARTBEAT))
            if byte == HEARTBEAT and not self._beaten:
                connection.send(byte)
        except OSError as error:
            self._running.say(f"the heartbeat: {error}")
            byte = b""
        if byte == HEARTBEAT:
            if not self._beaten:
                self._booted()
            return
        self._loop.drop(connection)
        connection.close()
        if byte:
            self._fail(f"the guest's heartbeat is {byte.hex()}")

    def _booted(self) -> None:
        self._beaten = True
        self._running.say("the guest has booted: heartbeat")
        # Its kernel and ramdisks are in its memory by now.
        for name in ("kernel", "initrd"):
            (self._running.folder / name).unlink(missing_ok=True)
        self._probe()

    def _probe(self) -> None:
        """Tries the enclave's port until somebody accepts."""
        ours, theirs = socket.socketpair()

        def answered(accepted: bool) -> None:
            ours.close()
            if accepted:
                self._listen()
            else:
                self._loop.later(PAUSE_SECONDS, self._probe)

        self._vsock.connect(theirs, ENCLAVE_PORT, answered)

    def _listen(self) -> None:
        path = self._running.folder / detached.ENCLAVE
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(BACKLOG)
        self._loop.add(self._listener, READ, self._forward)
        self._up = True
        self._running.say("the enclave listens")
        self._running.ready()

    def _forward(self, _: int) -> None:
        assert self._listener is not None
        connection, _peer = self._listener.accept()
        self._vsock.connect(connection, ENCLAVE_PORT)

    # Its end.

    def _print(self, what: int) -> None:
        if not self._read_console() and what & HANGUP:
            self._loop.drop(self._output)

    def _read_console(self) -> bool:
        text = self._output.read(1 << 16)
        if not text:
            return False
        self._tail = (self._tail + text)[-TAIL_BYTES:]
        self._console.write(text[: max(0, CONSOLE_BYTES - self._printed)])
        self._printed += len(text)
        return True

    def _ended(self) -> None:
        self._loop.drop(self._alive)
        os.close(self._alive)
        while self._read_console():
            pass
        self._fail(f"the guest ended, QEMU with code {self._qemu.wait()}")

    def _broken(self, error: GuestError) -> None:
        self._fail(f"the guest broke a device: {error}")

    def _late(self) -> None:
        if not self._up:
            self._fail(f"the guest does not {'listen' if self._beaten else 'boot'} within {BOOT_SECONDS} seconds")

    def _fail(self, reason: str) -> None:
        """Ends the machine: an error where it was never up."""
        tail = self._tail.decode(errors="replace").replace("\r", "").strip()
        self._running.say(f"{reason}; its console ended:\n{tail}")
        self._loop.stop()
        if not self._up:
            self._code = 1
            last = tail.splitlines()[-1] if tail else "nothing"
            self._running.answer(f"{reason}; the last line of its console: {last}")


if __name__ == "__main__":
    sys.exit(main())
