"""What the parent instance must set aside for its enclaves: prints `/etc/nitro_enclaves/allocator.yaml` for an image.

    python -m parley_deploy.allocator IMAGE [--enclaves N] [--cpus N] [--memory MIB] [--page MIB] [--threads-per-core N]

An enclave's memory holds the image, a kernel, one main process and a worker for each CPU; the bounds in
`parley_protocol.limits` say how large the last two may become. So a computation that the engine accepts fits. And the
memory is never below four times the image, which nitro-cli demands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from parley_protocol import limits, measurement
from parley_protocol.errors import MalformedError

MIB: Final = 1 << 20
IMAGE_RATIO: Final = 4
"""nitro-cli refuses to run an image in less than this many times its size."""
IMAGE_COPIES: Final = 2
"""Of an image whose ramdisks are not compressed: as loaded, and its files as the kernel unpacks them into memory."""
LEAST_MIB: Final = 64
"""The smallest enclave that the driver makes."""
PAGES_MIB: Final = (2, 1024)
"""Sizes of huge pages on x86_64; an enclave's memory is made of whole ones."""
SYSTEM_BYTES: Final = 64 * MIB
"""Kernel, its tables for the memory, vsock buffers."""
PROCESS_BYTES: Final = 64 * MIB
"""A Python process with numpy, cryptography and Parley's code, before it has any data."""
MAIN_BYTES: Final = (
    PROCESS_BYTES
    + limits.PARTIALS_BYTES  # the states of all ranges
    + limits.STATE_BYTES  # the state that is being merged into them
    + limits.RELEASE_BYTES  # the sealed outputs, until the host has stored them
    + limits.SIGNED_AGREEMENT_BYTES
    + limits.MESSAGE_BYTES
)
INDEX_COLUMNS: Final = 16
INDEX_BYTES: Final = limits.GROUPS * (16 * INDEX_COLUMNS + 24)
"""First and last key of each group and a 16-byte tag of each frame, for a table of the greatest size with 16 columns."""
WORKER_BYTES: Final = PROCESS_BYTES + limits.WINDOW_BYTES + limits.STATE_BYTES + limits.PAYLOAD_BYTES + INDEX_BYTES


class SizeError(ValueError):
    """A reservation that cannot be: the message names the option."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one parent sets aside: for `enclaves` enclaves of `cpus` CPUs and `memory_mib` MiB each."""

    image_bytes: int
    enclaves: int
    cpus: int
    memory_mib: int
    page_mib: int

    @property
    def total_mib(self) -> int:
        return self.memory_mib * self.enclaves

    @property
    def total_cpus(self) -> int:
        return self.cpus * self.enclaves


def needed_mib(image_bytes: int, cpus: int, page_mib: int = PAGES_MIB[0]) -> int:
    """Memory of one enclave with a worker for each CPU, in MiB, a whole number of pages."""
    # nitro-cli rounds the image up to whole MiB before it multiplies.
    image = -(-image_bytes // MIB)
    engine = IMAGE_COPIES * image * MIB + SYSTEM_BYTES + MAIN_BYTES + cpus * WORKER_BYTES
    least = max(LEAST_MIB, IMAGE_RATIO * image, -(-engine // MIB))
    return -(-least // page_mib) * page_mib


def reserve(
    image_bytes: int,
    *,
    enclaves: int = 1,
    cpus: int = 2,
    memory_mib: int | None = None,
    page_mib: int = PAGES_MIB[0],
    threads_per_core: int = 2,
) -> Reservation:
    """The reservation for an image of this size; SizeError where the driver or the engine would refuse it."""
    if image_bytes <= 0:
        raise SizeError("IMAGE: empty")
    if not 1 <= enclaves <= limits.ENCLAVES:
        raise SizeError(f"--enclaves: {enclaves}; a parent runs 1 to {limits.ENCLAVES}")
    if threads_per_core not in (1, 2):
        raise SizeError(f"--threads-per-core: {threads_per_core}; processors have 1 or 2")
    if not 1 <= cpus <= limits.WORKERS:
        raise SizeError(f"--cpus: {cpus}; an enclave has 1 to {limits.WORKERS}, a worker for each")
    if cpus % threads_per_core:
        raise SizeError(f"--cpus: {cpus}; enclaves get whole cores, here of {threads_per_core} CPUs")
    if page_mib not in PAGES_MIB:
        raise SizeError(f"--page: {page_mib}; huge pages have {' or '.join(map(str, PAGES_MIB))} MiB")
    least = needed_mib(image_bytes, cpus, page_mib)
    if memory_mib is None:
        memory_mib = least
    if memory_mib % page_mib:
        raise SizeError(f"--memory: {memory_mib} MiB are not whole pages of {page_mib} MiB")
    if memory_mib < least:
        raise SizeError(f"--memory: {memory_mib} MiB; this image with {cpus} workers may need {least}")
    return Reservation(image_bytes, enclaves, cpus, memory_mib, page_mib)


def allocator_yaml(reservation: Reservation) -> str:
    """The file. AWS's allocator reads it line by line: from `---` on nothing but `key: value` and lines of comment, no
    empty line, no comment behind a value."""
    one = reservation
    image = -(-one.image_bytes // MIB)
    lines = [
        "---",
        f"# Enclaves: {one.enclaves}, of {one.memory_mib} MiB and {one.cpus} CPUs each. coordinator.toml says the same:",
        f"#   [launcher]        enclaves = {one.enclaves}",
        f"#   [launcher.nitro]  memory_mib = {one.memory_mib}   cpus = {one.cpus}",
        f"# nitro-cli demands {IMAGE_RATIO} x the image: {IMAGE_RATIO * image} MiB. The engine may need, in MiB:",
        _part(IMAGE_COPIES * image, f"{IMAGE_COPIES} x the image of {image}: as loaded, and its files unpacked"),
        _part(SYSTEM_BYTES // MIB, "kernel"),
        _part(MAIN_BYTES // MIB, "main process: states of all key ranges, sealed outputs, code"),
        _part(one.cpus * WORKER_BYTES // MIB, f"{one.cpus} workers: in each a window, its state, sealed frames, code"),
        _part(one.memory_mib, f"given, in pages of {one.page_mib}"),
        "# All of it comes from one NUMA node, and can be changed only while no enclave runs.",
        f"memory_mib: {one.total_mib}",
        "# Whole cores; CPU 0 and its sibling stay with the parent.",
        f"cpu_count: {one.total_cpus}",
    ]
    return "\n".join(lines) + "\n"


def _part(mib: int, what: str) -> str:
    return f"#   {mib:6}  {what}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the file; 1 with a line on standard error for an image or a wish that cannot be."""
    options = _parser().parse_args(arguments)
    try:
        with options.image.open("rb") as file:
            size = measurement.measure(file).size
        reservation = reserve(
            size,
            enclaves=options.enclaves,
            cpus=options.cpus,
            memory_mib=options.memory,
            page_mib=options.page,
            threads_per_core=options.threads_per_core,
        )
    except (OSError, MalformedError, SizeError) as error:
        print(f"allocator: {error}", file=sys.stderr)
        return 1
    sys.stdout.write(allocator_yaml(reservation))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parley_deploy.allocator", description="Print an allocator.yaml for an enclave image."
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="enclave image file (EIF)")
    parser.add_argument("--enclaves", type=int, default=1, help="enclaves at a time (default: 1)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of one enclave, a worker for each (default: 2)")
    parser.add_argument("--memory", type=int, metavar="MIB", help="memory of one enclave (default: what it may need)")
    parser.add_argument("--page", type=int, default=PAGES_MIB[0], metavar="MIB", help="huge pages: 2 (default) or 1024")
    parser.add_argument("--threads-per-core", type=int, default=2, metavar="N", help="of the parent: 1 or 2 (default)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
