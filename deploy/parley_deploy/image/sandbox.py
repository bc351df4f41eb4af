"""A program of an unpacked tree, run with that tree as its whole world: no network, no other files, no environment.

So what the image's own tools make depends on nothing of the machine that builds it. Needs `unshare` and `mount` of
util-linux, and either root or user namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from parley_deploy.image.errors import ImageError

SECONDS: Final = 900
"""How long one program may take: byte code for all of the image takes a tenth of it on two busy cores."""
_TOOLS: Final = ("unshare", "mount", "chroot", "env", "sh")
# Devices are the machine's: compilers want /dev/null, Python /dev/urandom.
_ENTER: Final = 'mount --rbind /dev "$1/dev" && shift && exec env -i "$@"'


def run(tree: Path, command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs `command` (an absolute path in `tree` first) and returns what it printed; ImageError where that fails."""
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            raise ImageError(f"{tool} is not on this machine: the image is built with util-linux and coreutils")
    (tree / "dev").mkdir(exist_ok=True)
    namespaces = ["--mount", "--pid", "--net", "--fork", "--kill-child"]
    if os.geteuid() != 0:
        namespaces += ["--user", "--map-root-user"]
    variables = {"PATH": "/usr/bin", "LANG": "C.UTF-8", **(environment or {})}
    inside = [f"{name}={value}" for name, value in variables.items()]
    inside += [str(shutil.which("chroot")), str(tree), *command]
    try:
        done = subprocess.run(
            ["unshare", *namespaces, "--", "sh", "-c", _ENTER, "sh", str(tree), *inside],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ImageError(f"{command[0]}: took longer than {SECONDS} seconds") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-2000:]
        hint = "" if os.geteuid() == 0 else " (without root this needs user namespaces that may mount)"
        raise ImageError(f"{' '.join(command)}: ended with {done.returncode}{hint}: {said}")
    return done.stdout
