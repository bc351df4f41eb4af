"""A parent instance that is played: its folder, its nitro-cli (`support/nitro_cli.py`), and images to boot on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from parley_protocol import measurement
from parley_protocol.agreement.model import Measurement
from parley_protocol.framing import ENCLAVE_PORT
from support.nitro_cli import alive

STAND_IN = Path(__file__).with_name("nitro_cli.py")
_METADATA = (
    b'{"ImageName":"tiny","ImageVersion":"1","BuildMetadata":{"BuildTime":"","BuildTool":"","BuildToolVersion":"",'
    b'"OperatingSystem":"","KernelVersion":""},"DockerInfo":{},"CustomMetadata":null}'
)


def tiny_image(path: Path, kernel: bytes = b"kernel", size: int = 64) -> Measurement:
    """Writes an EIF of two ramdisks that is right in form and cannot boot; what it is measured to be."""
    parts = [
        (measurement.Kind.KERNEL, kernel),
        (measurement.Kind.CMDLINE, b"quiet"),
        (measurement.Kind.METADATA, _METADATA),
        (measurement.Kind.RAMDISK, b"boot"),
        (measurement.Kind.RAMDISK, b"a" * size),
    ]
    body = b"".join(measurement.SECTION.pack(kind, 0, len(data)) + data for kind, data in parts)
    offsets, sizes, at = [0] * 32, [0] * 32, measurement.HEADER.size
    for number, (_, data) in enumerate(parts):
        offsets[number], sizes[number] = at, len(data)
        at += measurement.SECTION.size + len(data)
    fields = (measurement.MAGIC, 4, 0, 1 << 30, 2, 0, len(parts), *offsets, *sizes, 0)
    crc = zlib.crc32(body, zlib.crc32(measurement.HEADER.pack(*fields, 0)[: measurement.CRC_OFFSET]))
    path.write_bytes(measurement.HEADER.pack(*fields, crc) + body)
    with path.open("rb") as file:
        pcrs = measurement.measure(file).pcrs
    return Measurement(pcrs[0], pcrs[1], pcrs[2])


def address(host: Path, cid: int, port: int) -> str:
    """Where the vsock port of an enclave on a played parent is."""
    assert port == ENCLAVE_PORT
    return f"unix:{host}/{cid}/enclave.sock"


class NitroHost:
    """A played parent; `set` changes what it does next (`nitro_cli.Host`)."""

    def __init__(self, folder: Path, *, memory_mib: int = 1024, cpus: int = 4, enclave: str = "listener") -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._write({"memory_mib": memory_mib, "cpus": cpus, "enclave": enclave})

    @property
    def command(self) -> tuple[str, ...]:
        """Its nitro-cli."""
        return (sys.executable, str(STAND_IN), "--host", str(self.folder))

    def address(self, cid: int, port: int) -> str:
        """Where a played enclave's vsock port is."""
        return address(self.folder, cid, port)

    def set(self, **fields: Any) -> None:
        """Changes fields of host.json."""
        self._write({**json.loads((self.folder / "host.json").read_text()), **fields})

    def calls(self, command: str) -> list[dict[str, Any]]:
        """Arguments of the calls of a command so far."""
        if not (self.folder / "calls").exists():
            return []
        made = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [call for call in made if call["command"] == command]

    def described(self) -> list[dict[str, Any]]:
        """What was described of enclaves whose process has not been found dead."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*/described.json"))]

    def running(self) -> list[str]:
        """Names of the enclaves whose process runs."""
        return [one["EnclaveName"] for one in self.described() if alive(one["ProcessID"])]

    def kill(self, name: str) -> None:
        """Ends an enclave as its own fault would, behind nitro-cli's back."""
        (pid,) = [one["ProcessID"] for one in self.described() if one["EnclaveName"] == name]
        os.kill(pid, signal.SIGKILL)

    def foreign(self) -> str:
        """An enclave that somebody else started; its name."""

        image = self.folder / "foreign.eif"
        image.write_bytes(b"")
        arguments = ["run-enclave", "--eif-path", str(image), "--memory", "128", "--cpu-count", "2"]
        subprocess.run([*self.command, *arguments, "--enclave-name", "somebody"], check=True, capture_output=True)
        return "somebody"

    def terminate(self, name: str) -> None:
        """Ends an enclave with nitro-cli, as the operator may at any time."""
        (found,) = [one["EnclaveID"] for one in self.described() if one["EnclaveName"] == name]
        subprocess.run([*self.command, "terminate-enclave", "--enclave-id", found], check=True, capture_output=True)

    def end(self) -> None:
        """Ends all that runs."""
        for one in self.described():
            try:
                os.kill(one["ProcessID"], signal.SIGTERM)
            except ProcessLookupError:
                continue

    def _write(self, played: dict[str, Any]) -> None:
        (self.folder / "host.json").write_text(json.dumps(played))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
