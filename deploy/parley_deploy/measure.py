"""What a simulated enclave is measured to be: the code of its image tree, in registers that mean what the real ones do.

    PCR0  everything        PCR1  lock file and parley_protocol        PCR2  parley_enclave

Each is ext(x) = SHA-384(48 zero bytes ‖ SHA-384(x)), as of an EIF; x is the sequence, in the order of names, of the
deterministic CBOR of [name, content] of every `*.py` file and of the lock file. So any changed line of code is another
enclave, which an agreement must name before anybody seals anything to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Final

from parley_protocol.attestation.document import extended
from parley_protocol.encoding import encode, sha384
from parley_protocol.errors import StateError

LOCK: Final = "requirements.lock"
"""The hash-locked requirements of the enclave, at the top of an image tree."""


def measure_tree(protocol_dir: Path, enclave_dir: Path, lock_file: Path) -> dict[int, bytes]:
    """PCR0, 1 and 2 of an enclave that runs this code."""
    lock = encode([LOCK, lock_file.read_bytes()])
    protocol = b"".join(_sources("parley_protocol", protocol_dir))
    enclave = b"".join(_sources("parley_enclave", enclave_dir))
    parts = {0: lock + protocol + enclave, 1: lock + protocol, 2: enclave}
    return {index: extended(sha384(part)) for index, part in parts.items()}


def image_measurements(tree: Path | None = None) -> dict[int, bytes]:
    """PCR0, 1 and 2 of the image tree `tree`, or of what is installed where that is None."""
    if tree is not None:
        return measure_tree(tree / "parley_protocol", tree / "parley_enclave", tree / LOCK)
    with resources.as_file(resources.files("parley_deploy") / "image" / LOCK) as lock:
        return measure_tree(installed("parley_protocol"), installed("parley_enclave"), lock)


def _sources(package: str, folder: Path) -> Iterable[bytes]:
    files = {f"{package}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.py")}
    if not files:
        raise StateError(f"{folder}: no code to measure")
    return [encode([name, files[name].read_bytes()]) for name in sorted(files)]


def installed(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise StateError(f"{package} is not installed")
    return Path(found.submodule_search_locations[0])
