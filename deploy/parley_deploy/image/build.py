"""The build of an image, from locked inputs to the file and what it is measured to be.

    ramdisk 0  boot         /init, the kernel's modules, Python and its libraries      in PCR0 and PCR1
    ramdisk 1  application  /app: parley_protocol, parley_enclave, their wheels        in PCR0 and PCR2

No ramdisk is compressed, since what compressors write differs from version to version. Byte code is made by the image's
own Python, once, so that an enclave neither spends its start on that nor writes any.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from parley_deploy.debian import unpack
from parley_deploy.image import contents, cpio, eif, kernel, sandbox
from parley_deploy.image.errors import ImageError
from parley_deploy.image.lock import Lock
from parley_deploy.measure import installed
from parley_protocol.measurement import Image, measure, measurements_json

IMAGE: Final = "parley.eif"
MEASUREMENTS: Final = "measurements.json"
MANIFEST: Final = "manifest.txt"
APPLICATION: Final = "app"
INTERPRETER: Final = f"/usr/bin/{contents.PYTHON}"
CMDLINE: Final = (
    # AWS's own for x86_64, without `nomodules`, since the drivers of this kernel are modules.
    "reboot=k panic=30 pci=off console=ttyS0 i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd random.trust_cpu=on "
    # The hypervisor keeps the processor's counter: no slower clock may take its place.
    "tsc=reliable"
)
BUILT: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""Stands in the metadata: the image has no date, so that it is the same tomorrow."""
_FOLDERS: Final = ("dev", "proc", "run", "sys", "tmp", "usr/bin", "usr/lib", "usr/lib64")
_LINKS: Final = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64"}
_COMPILE: Final = (INTERPRETER, "-sSBP", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash")
_NOT_FOR_ENCLAVES: Final = ("parley_protocol/v1/coordinator_pb2*", "parley_enclave/init.py")
_TRY: Final = """
import importlib, pkgutil, parley_enclave, parley_protocol
for package in (parley_enclave, parley_protocol):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files that an image is made of: `debs` by the names of the lock, and the wheels."""

    lock: Lock
    debs: dict[str, Path]
    wheels: Sequence[Path]


def build(inputs: Inputs, out: Path, work: Path, *, signer: eif.Signer | None = None, say: Say = print) -> Image:
    """Builds into the folder `out`: the image, its measurements, and a manifest of its files. `work` is emptied first.

    What stood in `out` stays until the new files are whole. ImageError says which input or step failed.
    """
    shutil.rmtree(work, ignore_errors=True)
    root = work / "root"
    root.mkdir(parents=True)
    say("kernel: modules, virtio_mmio rebuilt")
    vmlinuz, modules = kernel.extract(inputs.lock, inputs.debs, work)
    say("Python and libraries")
    _runtime(root, [inputs.debs[name] for name in contents.RUNTIME])
    say("wheels, parley_protocol, parley_enclave")
    application = root / APPLICATION
    for wheel in inputs.wheels:
        _wheel(application, wheel)
    for package in contents.APPLICATION:
        _package(application, package)
    say("byte code")
    _byte_code(root)
    _boot(root, modules)
    say("ramdisks")
    names = cpio.names(root)
    mine = [name for name in names if name.split("/")[0] == APPLICATION]
    others = [name for name in names if name.split("/")[0] != APPLICATION]
    ramdisks = [_ramdisk(root, part, work / f"ramdisk{number}") for number, part in enumerate((others, mine))]
    say("image")
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        file = stack.enter_context(replaced(out / IMAGE))
        parts = [eif.Part.whole(stack.enter_context(path.open("rb"))) for path in (vmlinuz, *ramdisks)]
        eif.write(
            file,
            kernel=parts[0],
            cmdline=CMDLINE.encode("ascii"),
            metadata=_metadata(inputs.lock.release),
            ramdisks=parts[1:],
            signer=signer,
        )
        file.seek(0)
        image = measure(file)
        (out / MANIFEST).write_text("".join(_manifest(root, names)), encoding="utf-8")
        (out / MEASUREMENTS).write_text(measurements_json(image.pcrs), encoding="utf-8")
    shutil.rmtree(work)
    return image


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when it is whole, and is gone when it is not."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w+b") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _metadata(release: str) -> bytes:
    version = importlib.metadata.version("parley")
    return eif.metadata(
        "parley",
        version,
        built=BUILT,
        tool="parley_deploy.image",
        tool_version=version,
        system=f"Debian {contents.SUITE}",
        kernel_version=release,
    )


def _runtime(root: Path, debs: Iterable[Path]) -> None:
    for folder in _FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, target in _LINKS.items():
        (root / name).symlink_to(target)
    for deb in debs:
        unpack(deb, root)


def _trim(root: Path) -> None:
    """Removes what is of the packages and not of the image, and the folders that are empty then."""
    for name in sorted(cpio.names(root), reverse=True):
        path = root / name
        if name.split("/")[0] == APPLICATION or name in _FOLDERS or name in _LINKS:
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif not contents.runtime_keeps(name):
            path.unlink()


def _wheel(application: Path, wheel: Path) -> None:
    """Unpacks what an installer would put on sys.path."""
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.infolist(), key=lambda member: member.filename):
            name = member.filename
            if member.is_dir() or not contents.wheel_keeps(name):
                continue
            parts = PurePosixPath(name).parts
            if PurePosixPath(name).is_absolute() or ".." in parts:
                raise ImageError(f"{wheel.name}: {name}: leads out of the folder")
            if parts[0].endswith(".data"):
                if parts[1] not in ("purelib", "platlib"):
                    raise ImageError(f"{wheel.name}: {name}: of a kind that the image has no place for")
                parts = parts[2:]
            target = application.joinpath(*parts)
            if target.exists():
                raise ImageError(f"{wheel.name}: {name}: another wheel has this file")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))


def _package(application: Path, package: str) -> None:
    source = installed(package)
    for path in sorted(source.rglob("*")):
        name = f"{package}/{path.relative_to(source).as_posix()}"
        if path.is_file() and contents.application_keeps(name):
            target = application / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


def _byte_code(root: Path) -> None:
    """Byte code of all that is kept: made with all of Python, tried with what the image keeps of it."""
    sandbox.run(root, [*_COMPILE, f"/usr/lib/{contents.PYTHON}", f"/{APPLICATION}"], {"PYTHONHASHSEED": "0"})
    _trim(root)
    sandbox.run(
        root,
        [INTERPRETER, "-sSBP", "-c", _TRY],
        {"PYTHONPATH": f"/{APPLICATION}", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
    )


def _boot(root: Path, modules: dict[str, bytes]) -> None:
    folder = root / "modules"
    folder.mkdir()
    for name, module in modules.items():
        (folder / f"{name}.ko").write_bytes(module)
    (folder / "list").write_text("".join(f"{name}.ko\n" for name in modules), encoding="ascii")
    init = root / "init"
    source = (installed("parley_enclave") / "init.py").read_text(encoding="utf-8")
    init.write_text(f"#!{INTERPRETER} -IBS\n{source}", encoding="utf-8")
    init.chmod(0o755)


def _ramdisk(root: Path, names: Iterable[str], path: Path) -> Path:
    with path.open("wb") as out:
        cpio.pack(root, names, out)
    return path


def _manifest(root: Path, names: Iterable[str]) -> Iterable[str]:
    """A line for each file: ramdisk, mode, size, SHA-256, path."""
    for name in names:
        path = root / name
        kind = cpio.mode(path)
        if kind == cpio.FOLDER:
            continue
        data = path.readlink().as_posix().encode() if kind == cpio.LINK else path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        yield f"{int(name.split('/')[0] == APPLICATION)} {kind:06o} {len(data):>9} {digest} /{name}\n"
