"""The coordinator as one file for a machine that asks no package index: its wheel and every wheel that it needs.

    python -m parley_deploy.bundle [--output build/coordinator.tar]

Wheels come from `coordinator.lock` by their hashes, for Python 3.11 on x86_64 (Amazon Linux 2023); Parley's own is built from this
checkout. The same checkout makes the same bytes. Prints what `sha384sum` would: whoever installs it compares that.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

LOCK: Final = Path(__file__).with_name("coordinator.lock")
PYTHON: Final = "3.11"
PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")
EPOCH: Final = 315532800
"""1980-01-01: the first moment that a wheel, a ZIP file, can hold."""


class BundleError(Exception):
    """A bundle that could not be made; the message says at which step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the bundle; 1 with a line on standard error where that fails."""
    options = _parser().parse_args(arguments)
    source = Path(__file__).resolve().parents[2]
    if not (source / "pyproject.toml").is_file():
        print("bundle: no checkout of Parley: an installed package cannot build its own wheel", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            collect(source, Path(folder))
            options.output.parent.mkdir(parents=True, exist_ok=True)
            pack(Path(folder), options.output)
    except (BundleError, OSError) as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    print(f"{hashlib.sha384(options.output.read_bytes()).hexdigest()}  {options.output}")
    return 0


def collect(source: Path, folder: Path) -> None:
    """Parley's wheel and the locked ones, in `folder`."""
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    fetch = ["download", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--python-version", PYTHON]
    fetch += [word for platform in PLATFORMS for word in ("--platform", platform)]
    fetch += ["--dest", str(folder), "--requirement", str(LOCK)]
    for step in (build, fetch):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *step],
            env=os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode != 0:
            raise BundleError(f"pip {step[0]} failed (exit code {done.returncode})")


def pack(folder: Path, output: Path) -> None:
    """The wheels of `folder` in a tar file whose bytes depend on them alone: names in order, one owner, one time."""
    wheels = sorted(folder.iterdir(), key=lambda path: path.name)
    if strangers := [path.name for path in wheels if path.suffix != ".whl"]:
        raise BundleError(f"{strangers[0]}: not a wheel")
    if not any(path.name.startswith("parley-") for path in wheels):
        raise BundleError("Parley's own wheel is missing")
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as bundle:
        for path in wheels:
            entry = tarfile.TarInfo(path.name)
            entry.size, entry.mtime, entry.mode = path.stat().st_size, EPOCH, 0o644
            with path.open("rb") as file:
                bundle.addfile(entry, file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parley_deploy.bundle", description="Pack the coordinator's wheels."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/coordinator.tar"), help="file to write (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
