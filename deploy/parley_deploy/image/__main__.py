"""`python -m parley_deploy.image [build|lock|sign]`: builds the enclave image, moves its inputs on, signs one.

`make image` and `make image-lock` call it. Building needs the network only for what is not in the cache.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from parley_deploy.debian import Archive, DebianError
from parley_deploy.image import contents, eif
from parley_deploy.image.build import IMAGE, MEASUREMENTS, Inputs, build, replaced
from parley_deploy.image.errors import ImageError
from parley_deploy.image.lock import PACKAGES, REQUIREMENTS, WHEELS, Lock, fetch_wheels, newest, newest_wheels
from parley_deploy.measure import installed
from parley_deploy.pki import system_now_ms
from parley_protocol.errors import MalformedError
from parley_protocol.measurement import Image, measure, measurements_json

HERE: Final = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. 0 when it did its work; 1 with a line on standard error otherwise; 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ImageError, DebianError, MalformedError, OSError) as error:
        sys.stderr.write(f"image: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parley_deploy.image", description="Build the enclave image.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser("build", help="build the image from the locked inputs")
    make.add_argument("--out", type=Path, default=Path("build/image"), help="folder of what is built")
    make.add_argument("--packages", type=Path, help="folder with .deb files, taken by digest before any is fetched")
    _signing(make, required=False)
    make.set_defaults(run=_build)
    lock = commands.add_parser("lock", help="write packages.lock and wheels.lock anew: newest packages, other PCRs")
    lock.set_defaults(run=_lock)
    sign = commands.add_parser("sign", help="sign an image: adds PCR8, leaves PCR0, 1 and 2")
    sign.add_argument("image", type=Path, help="the image to sign")
    sign.add_argument("--out", type=Path, required=True, help="the signed image")
    _signing(sign, required=True)
    sign.set_defaults(run=_sign)
    for command in (make, lock):
        command.add_argument("--cache", type=Path, default=Path(".cache/image"), help="folder of what was fetched")
    return parser


def _signing(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--signing-key", type=Path, required=required, help="private key, P-384, PEM")
    parser.add_argument("--signing-certificate", type=Path, required=required, help="its certificate, PEM")


def _build(options: argparse.Namespace) -> int:
    signer = _signer(options)
    cache: Path = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    # One build at a time in a cache: the second finds what the first has fetched.
    with (cache / "build.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        begun = time.monotonic()

        def say(text: str) -> None:
            print(f"{time.monotonic() - begun:6.1f} s  {text}", file=sys.stderr, flush=True)

        for path in changed():
            say(f"NOT AS COMMITTED: {path}: nobody else can build this image")
        lock = Lock.load(HERE / PACKAGES)
        say("packages")
        archive = _archive(cache)
        debs = lock.fetch(archive, [folder for folder in (options.packages, archive.debs) if folder])
        say("wheels")
        wheels = fetch_wheels(HERE / WHEELS, cache / "wheels")
        image = build(Inputs(lock, debs, wheels), options.out, cache / "work", signer=signer, say=say)
    say(f"{options.out / IMAGE}: {image.size:,} bytes; {options.out / MEASUREMENTS}")
    sys.stdout.write(measurements_json(image.pcrs))
    return 0


def changed() -> list[str]:
    """The files of the image's packages that are not what git has, or unknown to it; none where there is no checkout."""
    found: list[str] = []
    if shutil.which("git") is None:
        return found
    for package in contents.APPLICATION:
        command = ["git", "status", "--porcelain", "--untracked-files=all", "--", "."]
        done = subprocess.run(command, cwd=installed(package), capture_output=True, text=True, check=False)
        found += [line[3:] for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return found


def _lock(options: argparse.Namespace) -> int:
    lock = newest(_archive(options.cache.resolve()))
    wheels = newest_wheels(HERE / REQUIREMENTS)
    for name, text in ((PACKAGES, lock.text()), (WHEELS, wheels)):
        with replaced(HERE / name) as out:
            out.write(text.encode())
    return 0


def _sign(options: argparse.Namespace) -> int:
    signer = _signer(options)
    assert signer is not None
    with options.image.open("rb") as image, replaced(options.out) as out:
        eif.sign(image, out, signer)
        out.seek(0)
        signed: Image = measure(out)
    sys.stdout.write(measurements_json(signed.pcrs))
    return 0


def _signer(options: argparse.Namespace) -> eif.Signer | None:
    if options.signing_key is None and options.signing_certificate is None:
        return None
    if options.signing_key is None or options.signing_certificate is None:
        raise ImageError("--signing-key and --signing-certificate go together")
    try:
        key = load_pem_private_key(options.signing_key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ImageError(f"{options.signing_key}: not a private key in PEM without a passphrase") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ImageError(f"{options.signing_key}: not a key on a curve; images are signed with P-384")
    return eif.Signer(key, options.signing_certificate.read_bytes(), now_ms=system_now_ms())


def _archive(cache: Path) -> Archive:
    return Archive(cache / "debian", [contents.SUITE])


if __name__ == "__main__":
    sys.exit(main())
