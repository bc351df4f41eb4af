"""The kernel of the image: Debian's own, its modules, and one module made anew.

A genuine Nitro enclave has neither ACPI nor PCI: its devices stand on the kernel's command line
(`virtio_mmio.device=...`). Debian builds virtio_mmio without VIRTIO_MMIO_CMDLINE_DEVICES, so this one module is compiled
from Debian's kernel source with that option and nothing else changed, by the compiler that built the kernel, in a tree that
holds nothing else. It is not signed, which this kernel accepts.
"""

from __future__ import annotations

import lzma
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from parley_deploy.debian import unpack
from parley_deploy.image import contents, sandbox
from parley_deploy.image.errors import ImageError
from parley_deploy.image.lock import Lock

SOURCE_FILE: Final = "drivers/virtio/virtio_mmio.c"
REBUILT: Final = "virtio_mmio"
_KBUILD: Final = "obj-m := virtio_mmio.o\nccflags-y += -DCONFIG_VIRTIO_MMIO_CMDLINE_DEVICES\n"


def extract(lock: Lock, debs: Mapping[str, Path], work: Path) -> tuple[Path, dict[str, bytes]]:
    """The kernel's file and the content of every module by its name, in the order in which they are loaded.

    `work` is an empty folder for what is unpacked.
    """
    tree = work / "kernel"
    unpack(debs[lock.image], tree)
    release = f"{lock.release}-amd64"
    modules = {}
    for module in contents.MODULES:
        path = tree / "usr/lib/modules" / release / "kernel" / f"{module}.ko.xz"
        if not path.is_file():
            raise ImageError(f"{lock.image}: no module {module}")
        modules[path.name.removesuffix(".ko.xz")] = lzma.decompress(path.read_bytes())
    modules[REBUILT] = _virtio_mmio(lock, debs, work, release)
    return tree / "boot" / f"vmlinuz-{release}", modules


def _virtio_mmio(lock: Lock, debs: Mapping[str, Path], work: Path, release: str) -> bytes:
    tree = work / "tools"
    for name in sorted({*contents.TOOLS, *lock.headers}):
        unpack(debs[name], tree)
    for name in ("bin", "lib", "lib64", "sbin"):
        if not (tree / name).exists():
            (tree / name).symlink_to(f"usr/{name}")
    # What Debian's alternatives would set.
    for name, target in (("sh", "dash"), ("awk", "mawk")):
        link = tree / "usr/bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    (tree / "tmp").mkdir(exist_ok=True)
    build = tree / "build"
    build.mkdir()
    (build / f"{REBUILT}.c").write_bytes(_source(debs[contents.KERNEL_SOURCE], work / "source"))
    (build / "Makefile").write_text(_KBUILD, encoding="ascii")
    make = ["/usr/bin/make", "-C", f"/usr/src/linux-headers-{release}", "M=/build", "modules"]
    # Debug information for BPF needs one more program and is of no use here.
    make += [f"CC={contents.COMPILER}", f"HOSTCC={contents.COMPILER}", "CONFIG_DEBUG_INFO_BTF_MODULES="]
    sandbox.run(tree, make, {"SOURCE_DATE_EPOCH": "0", "KBUILD_BUILD_TIMESTAMP": "@0"})
    sandbox.run(tree, ["/usr/bin/strip", "--strip-debug", f"/build/{REBUILT}.ko"])
    module = (build / f"{REBUILT}.ko").read_bytes()
    shutil.rmtree(tree)
    return module


def _source(deb: Path, tree: Path) -> bytes:
    """One file out of the kernel's source: an archive in an archive in a package, unpacked into `tree` for a moment."""
    try:
        unpack(deb, tree)
        (archive,) = tree.glob("usr/src/linux-source-*.tar.xz")
        with tarfile.open(archive, mode="r|xz") as files:
            for member in files:
                if member.name.partition("/")[2] == SOURCE_FILE:
                    content = files.extractfile(member)
                    assert content is not None
                    return content.read()
    except ValueError as error:
        raise ImageError(f"{deb.name}: holds no one archive of the kernel's source") from error
    finally:
        shutil.rmtree(tree)
    raise ImageError(f"{deb.name}: no {SOURCE_FILE}")
