"""The inputs of the image, each with its version and SHA-256: Debian packages in `packages.lock`, wheels in `wheels.lock`.

Neither file says where a package comes from. A package is accepted by its digest alone, from a mirror, from the package
index of pip, or from a folder that somebody hands over.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from parley_deploy.debian import Archive, DebianError
from parley_deploy.image import contents
from parley_deploy.image.errors import ImageError

PACKAGES: Final = "packages.lock"
WHEELS: Final = "wheels.lock"
REQUIREMENTS: Final = "requirements.lock"
_PYTHON_VERSION: Final = contents.PYTHON.removeprefix("python")
_PLATFORMS: Final = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64")
_PIP_SECONDS: Final = 900
_RELEASE: Final = re.compile(r"linux-image-(\d[a-z0-9.+~]*)-amd64")
_WHEEL: Final = re.compile(
    r"(?P<name>[A-Za-z0-9_.-]+)==(?P<version>\S+) \\\n\s+--hash=sha256:(?P<sha256>[0-9a-f]{64})\n?"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package of one version."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Lock:
    """All packages of an image, by name, and the release of its kernel, such as 6.12.117+deb13."""

    release: str
    packages: Mapping[str, Package]

    @classmethod
    def load(cls, path: Path) -> Self:
        """The lock in a file; ImageError names what is wrong with it."""
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
            release = tree.pop("kernel")
            packages = {name: Package(name, item["version"], item["sha256"]) for name, item in tree.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ImageError(f"{path}: not a lock of packages: {error}") from error
        lock = cls(release, packages)
        if missing := sorted(set(lock.wanted()) - set(packages)):
            raise ImageError(f"{path}: {missing[0]} is missing; `make image-lock` makes the file anew")
        return lock

    def text(self) -> str:
        """The file's text."""
        lines = [
            "# The Debian packages that the image is made of and with. `make image-lock` takes the newest of the suite.",
            f'kernel = "{self.release}"',
        ]
        for name, package in sorted(self.packages.items()):
            lines += ["", f'["{name}"]', f'version = "{package.version}"', f'sha256 = "{package.sha256}"']
        return "\n".join(lines) + "\n"

    @property
    def image(self) -> str:
        """The package of the kernel."""
        return f"linux-image-{self.release}-amd64"

    @property
    def headers(self) -> tuple[str, ...]:
        """The packages that modules are compiled with."""
        release = self.release
        return (f"linux-headers-{release}-amd64", f"linux-headers-{release}-common", f"linux-kbuild-{release}")

    def wanted(self) -> list[str]:
        """The names of all packages that an image needs."""
        named = (*contents.RUNTIME, *contents.TOOLS, self.image, *self.headers, contents.KERNEL_SOURCE)
        return sorted(set(named))

    def fetch(self, archive: Archive, folders: Iterable[Path]) -> dict[str, Path]:
        """The file of every package: from one of `folders` that has one of the right digest, else from the archive.

        ImageError names the first package that is nowhere to be had, or is another one.
        """
        digests = {package.sha256: package.name for package in self.packages.values()}
        found: dict[str, Path] = {}
        for folder in folders:
            found = _by_digest(folder, digests) | found
        missing = {name: self.packages[name].version for name in self.wanted() if name not in found}
        try:
            if missing:
                archive.update()
                found |= archive.download(missing)
        except DebianError as error:
            raise ImageError(
                f"{error}. The suite {contents.SUITE} may have moved on: hand over the packages of this lock with --packages, "
                "name a mirror that still has them in PARLEY_DEBIAN_MIRROR, or move the image on with `make image-lock`"
            ) from error
        for name, path in found.items():
            if _sha256(path) != self.packages[name].sha256:
                raise ImageError(f"{name}: {path.name} is not the package of the lock (SHA-256)")
        return found


def newest(archive: Archive) -> Lock:
    """A lock of the newest packages of the suite."""
    archive.update()
    needed = archive.depends([contents.KERNEL_META])
    releases = [found[1] for name in needed if (found := _RELEASE.fullmatch(name))]
    if len(releases) != 1:
        raise ImageError(f"{contents.KERNEL_META} depends on {len(releases)} kernels")
    wanted = Lock(releases[0], {}).wanted()
    files = archive.download(dict.fromkeys(wanted))
    return Lock(releases[0], {name: Package(name, _version(path), _sha256(path)) for name, path in files.items()})


def fetch_wheels(lock: Path, into: Path) -> list[Path]:
    """The wheels of `wheels.lock` in the folder `into`, in the order of their names; exactly those, by digest."""
    digests = wheel_digests(lock)
    present = _by_digest(into, digests) if into.is_dir() else {}
    if len(present) < len(digests):
        into.mkdir(parents=True, exist_ok=True)
        _pip_download(lock, into)
        present = _by_digest(into, digests)
    if missing := sorted(set(digests.values()) - set(present)):
        raise ImageError(f"{missing[0]}: pip brought no wheel with the digest of {lock.name}")
    return [present[name] for name in sorted(present)]


def wheel_digests(lock: Path) -> dict[str, str]:
    """SHA-256 to name of each wheel that a lock names; ImageError where the file has anything else."""
    try:
        text = lock.read_text(encoding="utf-8")
    except OSError as error:
        raise ImageError(f"{lock}: {error.strerror}") from error
    lines = "".join(line for line in text.splitlines(keepends=True) if line.strip() and not line.startswith("#"))
    if not lines or _WHEEL.sub("", lines).strip():
        raise ImageError(f"{lock}: not a lock of wheels")
    return {found["sha256"]: found["name"] for found in _WHEEL.finditer(lines)}


def newest_wheels(requirements: Path) -> str:
    """The text of `wheels.lock`: of each requirement the one wheel that pip chooses for the image's Python."""
    with tempfile.TemporaryDirectory(prefix="parley-wheels-") as folder:
        _pip_download(requirements, Path(folder))
        lines = [
            "# The wheels of the image, one of each package. `make image-lock` chooses them from requirements.lock."
        ]
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name.lower()):
            name, version, *_ = path.name.split("-")
            lines += [f"{name}=={version} \\", f"    --hash=sha256:{_sha256(path)}"]
    return "\n".join(lines) + "\n"


def _pip_download(requirements: Path, into: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--require-hashes",
        "--no-deps",
    ]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", _PYTHON_VERSION]
    command += ["--abi", f"cp{_PYTHON_VERSION.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    command += ["--dest", str(into), "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ImageError(f"pip download took longer than {_PIP_SECONDS} seconds") from None
    if done.returncode != 0:
        raise ImageError(f"pip download: {done.stderr.strip()[-1000:]}")


def _by_digest(folder: Path, wanted: Mapping[str, str]) -> dict[str, Path]:
    files: Iterable[Path] = sorted(path for path in folder.iterdir() if path.suffix in (".deb", ".whl"))
    return {wanted[digest]: path for path in files if (digest := _sha256(path)) in wanted}


def _version(path: Path) -> str:
    # apt names files NAME_VERSION_ARCHITECTURE.deb, with the colon of an epoch as %3a.
    return path.name.split("_")[1].replace("%3a", ":")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
