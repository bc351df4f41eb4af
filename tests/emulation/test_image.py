"""The image as it was built: again elsewhere it is the same file, it holds nothing else, and no bit of it may differ."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parley_protocol.errors import MalformedError
from parley_protocol.measurement import Kind, measure

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGE = Path(os.environ.get("PARLEY_IMAGE", ROOT / "build/image/parley.eif"))
SOURCES = ("protos", "enclave", "coordinator", "parties", "deploy")


def test_built_again_in_another_folder_by_another_user_mask_it_is_the_same_file(tmp_path: Path) -> None:
    for name in SOURCES:
        tracked = subprocess.run(["git", "ls-files", "-z", name], cwd=ROOT, capture_output=True, check=True).stdout
        for file in tracked.decode().split("\0"):
            if file and (ROOT / file).is_file():
                target = tmp_path / "clone" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((ROOT / file).read_bytes())
                os.utime(target, (1, 1))
    environment = {**os.environ, "TZ": "Pacific/Auckland", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    environment["PYTHONPATH"] = os.pathsep.join(str(tmp_path / "clone" / name) for name in SOURCES)
    # What was fetched is taken over, and unpacked and compiled anew.
    command = [sys.executable, "-m", "parley_deploy.image", "build"]
    command += ["--cache", str(ROOT / ".cache/image"), "--out", str(tmp_path / "out")]
    subprocess.run(command, cwd=tmp_path, env=environment, umask=0o077, check=True)
    assert (tmp_path / "out/parley.eif").read_bytes() == IMAGE.read_bytes()
    assert (tmp_path / "out/manifest.txt").read_bytes() == IMAGE.with_name("manifest.txt").read_bytes()


def test_no_program_but_python_is_in_it() -> None:
    lines = [line.split() for line in IMAGE.with_name("manifest.txt").read_text().splitlines()]
    programs = {path for _, mode, _, _, path in lines if mode == "100755"}
    assert {path for path in programs if "/lib" not in path} == {"/usr/bin/python3.13", "/init"}
    paths = [path for *_, path in lines]
    forbidden = re.compile(
        r"/(?:sh|bash|dash|busybox|apt|dpkg|pip|ensurepip|_ssl|ssl|grpc|boto3|parley_deploy|parley_coordinator)(?:[./]|$)"
    )
    assert [path for path in paths if forbidden.search(path)] == []
    assert not any(path.startswith("/parley") or "/parties/" in path for path in paths)


def test_a_flipped_bit_anywhere_is_refused_or_measured(tmp_path: Path) -> None:
    with IMAGE.open("rb") as file:
        honest = measure(file)
    copy = tmp_path / "flipped.eif"
    copy.write_bytes(IMAGE.read_bytes())
    picks = random.Random(3)
    places = [picks.randrange(548), *(section.offset + picks.randrange(section.size) for section in honest.sections)]
    assert {section.kind for section in honest.sections} == {Kind.KERNEL, Kind.CMDLINE, Kind.METADATA, Kind.RAMDISK}
    for place in places:
        with copy.open("r+b") as file:
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1 << picks.randrange(8)]))
            file.flush()
            file.seek(0)
            with pytest.raises(MalformedError):
                measure(file)
            file.seek(place)
            file.write(bytes([byte]))


def test_the_page_lists_what_is_in_it() -> None:
    page = (ROOT / "deploy/image/README.md").read_text()
    rows = re.findall(r"^\| ([01]) \| `(/\S+)` \| (\d+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 12
    files = [line.split() for line in IMAGE.with_name("manifest.txt").read_text().splitlines()]
    for ramdisk, folder, count, size in rows:
        # Wheels put what belongs to them beside their package: numpy.libs, numpy-2.4.6.dist-info, pydantic_core.
        of = [line for line in files if line[0] == ramdisk and re.match(rf"{re.escape(folder)}(?:[/._-]|$)", line[4])]
        assert len(of) == pytest.approx(int(count), rel=0.05), folder
        assert sum(int(line[2]) for line in of) == pytest.approx(int(size.replace(",", "")), rel=0.05), folder
