"""The tree of the image: the protocol, the enclave, and one hash-locked list of packages in an otherwise empty environment."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LOCK = ROOT / "deploy/parley_deploy/image/requirements.lock"
PACKAGES = (ROOT / "protos/parley_protocol", ROOT / "enclave/parley_enclave")
LEFT_OUT = ("__pycache__", "*.pyc")


@dataclass(frozen=True, slots=True)
class ImageTree:
    """An interpreter that sees the locked packages only, and the folder that holds the two import packages."""

    python: Path
    pythonpath: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a program with `python -c`, with nothing of this process's environment, in the tree's own folder."""
        return subprocess.run(
            [str(self.python), "-c", program, *arguments],
            env=self.environment,
            cwd=self.pythonpath,
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of a process in the image."""
        return {"PYTHONPATH": str(self.pythonpath), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def locked_interpreter(cache: Path = ROOT / ".cache") -> Path:
    """An environment with the image's locked packages and nothing else, not even pip; made once per lock and Python."""
    name = f"{sys.implementation.cache_tag}-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]}"
    folder = cache / "image" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        ready = folder / "ready"
        if not ready.exists():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=False, symlinks=True)
            pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "--disable-pip-version-check"]
            install = ["install", "--quiet", "--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(LOCK)]
            subprocess.run([*pip, *install], check=True)
            ready.touch()
    return folder / "bin/python"


def make_image_tree(folder: Path) -> ImageTree:
    """Copies the two packages of the image and its lock into `folder` and pairs them with the locked interpreter."""
    for package in PACKAGES:
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.copy(LOCK, folder / LOCK.name)
    return ImageTree(locked_interpreter(), folder)
