"""An EIF on QEMU's machine `nitro-enclave`, with this process as its parent instance; and images made from another one."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from parley_deploy.emulator.loop import READ, Loop
from parley_deploy.emulator.nitro_machine import NitroMachine
from parley_deploy.emulator.vhost import GuestError
from parley_deploy.emulator.vsock import VsockDevice
from parley_deploy.image import cpio, eif
from parley_protocol.framing import ENCLAVE_PORT, HEARTBEAT, HEARTBEAT_PORT
from parley_protocol.measurement import Kind, measure

BOOT_SECONDS = 300.0
"""From the start of QEMU to an enclave that answers; ten seconds on an idle machine."""
END_SECONDS = 30.0


class Guest:
    """A machine that runs from `with` to the end of it. Connections to `path` reach the guest's port of the enclave."""

    def __init__(self, folder: Path, machine: NitroMachine, image: Path, **options: Any) -> None:
        self.path = folder / "enclave.sock"
        self.heartbeat_seconds: float | None = None
        """When the guest's heartbeat was answered, counted from the start of QEMU."""
        self.failures: list[GuestError] = []
        """What the guest did against the rules of its vsock device."""
        self._console = folder / "console"
        self._vsock = folder / "vsock.sock"
        self._command = machine.command(image, self._vsock, **options)
        self._heartbeat = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._loop = Loop()
        self._thread = threading.Thread(target=self._loop.run, daemon=True)

    @property
    def console(self) -> str:
        """What the guest wrote to its console."""
        return self._console.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        self._device = VsockDevice(self._loop, self._vsock, self._dialled, self.failures.append)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._loop.add(self._listener, READ, lambda _: self._device.connect(self._listener.accept()[0], ENCLAVE_PORT))
        # A pipe whose other end is closed wakes the loop to end it.
        self._woken, self._waker = socket.socketpair()
        self._loop.add(self._woken, READ, lambda _: self._loop.stop())
        self._thread.start()
        self._started = time.monotonic()
        try:
            with self._console.open("wb") as console:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
                )
            self._wait_for_heartbeat()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _wait_for_heartbeat(self) -> None:
        assert self._process is not None
        until = time.monotonic() + BOOT_SECONDS
        while not self._heartbeat.wait(0.05):
            assert not self.failures
            assert self._process.poll() is None, f"QEMU ended without a heartbeat:\n{self.console[-4000:]}"
            assert time.monotonic() < until, f"no heartbeat:\n{self.console[-4000:]}"

    def _dialled(self, port: int) -> socket.socket | None:
        """The parent's end of what the guest dials: the heartbeat, and nothing else."""
        if port != HEARTBEAT_PORT:
            return None
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._answer_heartbeat, args=(ours,), daemon=True).start()
        return theirs

    def _answer_heartbeat(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(BOOT_SECONDS)
            if connection.recv(1) == HEARTBEAT:
                connection.sendall(HEARTBEAT)
                self.heartbeat_seconds = time.monotonic() - self._started
                self._heartbeat.set()

    def _end(self) -> None:
        # QEMU first: it complains of a device that goes before it.
        if self._process is not None:
            self._process.kill()
            self._process.wait(END_SECONDS)
        self._waker.close()
        self._thread.join(END_SECONDS)
        assert not self._thread.is_alive()
        self._listener.close()
        self._woken.close()
        self._device.close()
        self._loop.close()


def refusal(machine: NitroMachine, image: Path) -> str:
    """What QEMU says before it ends, of an image that it does not start: there is no vsock to start one with."""
    command = machine.command(image, None, module_id="i-0-enc0")
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=END_SECONDS,
        check=False,
    )
    assert done.returncode != 0
    return done.stdout.decode("utf-8", "replace")


def bridge_image(image: Path, work: Path, signer: eif.Signer) -> Path:
    """An image with the kernel, command line and ramdisks of `image`, whose enclave is `module_bridge`, and a signature.

    What is replaced stands in a third ramdisk, which the kernel unpacks over the others.
    """
    program = work / "overlay" / "app" / "parley_enclave" / "__main__.py"
    # Python takes byte code as it is, as the image says it may; where that is none it reads the source.
    stale = program.parent / "__pycache__" / "__main__.cpython-313.pyc"
    stale.parent.mkdir(parents=True)
    stale.touch()
    program.write_bytes((Path(__file__).parent / "module_bridge.py").read_bytes())
    overlay, made = work / "overlay.cpio", work / "bridge.eif"
    with overlay.open("w+b") as ramdisk:
        cpio.pack(work / "overlay", cpio.names(work / "overlay"), ramdisk)
        with image.open("rb") as file, made.open("w+b") as out:
            found = measure(file)
            parts = {
                kind: [eif.Part(file, s.offset, s.size) for s in found.sections if s.kind is kind] for kind in Kind
            }
            eif.write(
                out,
                kernel=parts[Kind.KERNEL][0],
                cmdline=found.cmdline,
                metadata=b"".join(parts[Kind.METADATA][0].chunks()),
                ramdisks=[*parts[Kind.RAMDISK], eif.Part.whole(ramdisk)],
                signer=signer,
            )
    return made
