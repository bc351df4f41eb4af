"""No file of the project names a package registry, a path of somebody's machine, or a private key."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

# Written in pieces, so that this file passes its own test.
_FORBIDDEN = {
    "the address of a package registry": "|".join(
        (r"pypi\." + "org", "python" + r"hosted\.org", "npm" + r"js\.(?:org|com)", r"registry\." + "npm", r"crates\." + "io",
         r"proxy\.golang\." + "org", r"(?:deb|snapshot)\." + r"debian\.org", "--(?:extra-)?index" + "-url")
    ),
    "a path of one machine": r"(?<![\w.$~{}-])/(?:" + "|".join(("wo" + "rk", "ro" + "ot", "ho" + r"me/\w+", "Us" + r"ers/\w+", "fa" + "rm")) + r")/",
    "a private key": "-----BEGIN " + "(?:[A-Z]+ )*PRIVATE KEY-----\n[A-Za-z0-9+/]{40}",
}  # fmt: skip
# The option that keeps addresses out of the locks, and paths inside the image.
_ALLOWED = ("--no-emit-index-url",)


def tracked(repository: Path) -> list[Path]:
    """Files under version control, or all of a tree that has none (an unpacked source distribution)."""
    run = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, check=False)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    return [repository / name.decode() for name in run.stdout.split(b"\0") if name]


@pytest.mark.parametrize("what", _FORBIDDEN)
def test_no_tracked_file_names(repository: Path, what: str) -> None:
    pattern = re.compile(_FORBIDDEN[what])
    found = []
    files = tracked(repository)
    assert files
    for file in files:
        if not file.is_file():
            continue
        text = file.read_bytes().decode("utf-8", errors="replace")
        for allowed in _ALLOWED:
            text = text.replace(allowed, "")
        found += [f"{file.relative_to(repository)}: {match[0]!r}" for match in pattern.finditer(text)]
    assert not found


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("the address of a package registry", "https://files.python" + "hosted.org/x"),
        ("a path of one machine", "open('/wo" + "rk/main/x')"),
        ("a private key", "-----BEGIN " + "PRIVATE KEY-----\n" + "A" * 64),
    ],
)
def test_the_patterns_match(what: str, text: str) -> None:
    assert re.search(_FORBIDDEN[what], text)
