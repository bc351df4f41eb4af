"""The builder of images: ramdisks that depend on their files alone, inputs that are taken by digest, and what stays outside."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from parley_deploy.debian import Archive
from parley_deploy.image import __main__ as command_line
from parley_deploy.image import build, contents, cpio, eif, sandbox
from parley_deploy.image.__main__ import main
from parley_deploy.image.errors import ImageError
from parley_deploy.image.lock import PACKAGES, REQUIREMENTS, WHEELS, Lock, Package, fetch_wheels, wheel_digests
from parley_protocol.measurement import measure

HERE = Path(build.__file__).parent


@dataclass
class Entry:
    mode: int
    owner: tuple[int, int]
    time: int
    data: bytes


def entries(archive: bytes) -> Iterator[tuple[str, Entry]]:
    """The entries of a newc archive, by the kernel's description of the form."""
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) // 4 * 4
        data = archive[start : start + fields[6]]
        at = (start + fields[6] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert len(archive) % 512 == 0
            assert not archive[at:].strip(b"\0")
            return
        yield name, Entry(fields[1], (fields[2], fields[3]), fields[5], data)


def packed(folder: Path, names: list[str] | None = None) -> bytes:
    out = io.BytesIO()
    cpio.pack(folder, cpio.names(folder) if names is None else names, out)
    return out.getvalue()


def small_tree(folder: Path, seed: int) -> Path:
    """Always the same files, made in an order and with times that depend on `seed`."""
    files = {"init": b"#!/x\n", "a/b": b"1", "a-b": b"22", "a/c/d": b"333", "empty": b""}
    order = list(files)
    random.Random(seed).shuffle(order)
    for name in order:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
        os.utime(path, (seed, seed))
        path.chmod(0o700 if name == "init" else 0o600 + 0o044 * (seed % 2))
    (folder / "link").symlink_to("a/b")
    return folder


def test_a_ramdisk_depends_on_names_contents_and_what_is_executable(tmp_path: Path) -> None:
    first, second = packed(small_tree(tmp_path / "one", 1)), packed(small_tree(tmp_path / "other", 2))
    assert first == second
    found = dict(entries(first))
    assert list(found) == ["a", "a/b", "a/c", "a/c/d", "a-b", "empty", "init", "link"]
    assert {entry.owner for entry in found.values()} == {(0, 0)}
    assert {entry.time for entry in found.values()} == {0}
    assert (found["init"].mode, found["a/b"].mode, found["a"].mode) == (0o100755, 0o100644, 0o40755)
    assert (found["link"].mode, found["link"].data) == (0o120777, b"a/b")
    assert found["a/c/d"].data == b"333"


def test_a_part_of_a_folder_comes_with_the_folders_above_it(tmp_path: Path) -> None:
    assert [name for name, _ in entries(packed(small_tree(tmp_path, 1), ["a/c/d"]))] == ["a", "a/c", "a/c/d"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: neither a file"):
        packed(tmp_path)


def test_a_small_image_is_the_same_twice_and_measures_its_ramdisks(tmp_path: Path) -> None:
    images = []
    for seed, name in ((1, "one"), (2, "other")):
        tree = small_tree(tmp_path / name, seed)
        ramdisks = [packed(tree, ["init", "link"]), packed(tree, ["a/b"])]
        parts = [eif.Part.whole(io.BytesIO(part)) for part in (b"kernel", *ramdisks)]
        metadata = eif.metadata(
            "small", "1", built=build.BUILT, tool="t", tool_version="1", system="s", kernel_version="k"
        )
        out = io.BytesIO()
        eif.write(out, kernel=parts[0], cmdline=build.CMDLINE.encode(), metadata=metadata, ramdisks=parts[1:])
        images.append(out.getvalue())
    assert images[0] == images[1]
    (tmp_path / "one/a/b").write_bytes(b"2")
    changed = packed(tmp_path / "one", ["a/b"])
    flipped = images[0].replace(packed(tmp_path / "other", ["a/b"]), changed)
    assert len(flipped) == len(images[0])
    assert flipped != images[0]
    with pytest.raises(Exception, match="CRC"):
        measure(io.BytesIO(flipped))


# The lock


def test_every_package_is_locked_and_nothing_says_where_it_is() -> None:
    lock = Lock.load(HERE / PACKAGES)
    assert sorted(lock.packages) == lock.wanted()
    for package in lock.packages.values():
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
    assert "://" not in (HERE / PACKAGES).read_text() + (HERE / WHEELS).read_text()
    assert Lock.load(HERE / PACKAGES).text() == (HERE / PACKAGES).read_text()


def test_every_wheel_is_one_of_the_requirements_of_the_enclave() -> None:
    requirements = (HERE / REQUIREMENTS).read_text()
    names = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", requirements, re.MULTILINE))
    wheels = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (HERE / WHEELS).read_text(), re.MULTILINE))
    assert {name.replace("_", "-"): version for name, version in wheels.items()} == names
    for digest in wheel_digests(HERE / WHEELS):
        assert f"sha256:{digest}" in requirements


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a lock"),
        ('kernel = "6.1"\n', "is missing"),
        ('kernel = "6.1"\n[libc6]\nversion = "1"\n', "not a lock"),
        ("kernel =", "not a lock"),
    ],
)
def test_a_lock_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / PACKAGES).write_text(text)
    with pytest.raises(ImageError, match=said):
        Lock.load(tmp_path / PACKAGES)
    with pytest.raises(ImageError, match=PACKAGES):
        Lock.load(tmp_path / "none" / PACKAGES)


def test_packages_that_are_handed_over_are_taken_by_digest(tmp_path: Path) -> None:
    lock = Lock.load(HERE / PACKAGES)
    files = {name: f"package {name}".encode() for name in lock.wanted()}
    for number, data in enumerate(files.values()):
        (tmp_path / f"{number}.deb").write_bytes(data)
    own = Lock(
        lock.release, {name: Package(name, "1", hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    )
    nowhere = Archive(tmp_path / "cache", ["none"])
    found = own.fetch(nowhere, [tmp_path / "cache/debs", tmp_path])
    assert {name: path.read_bytes() for name, path in found.items()} == files


def test_a_package_that_is_not_the_locked_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lock.load(HERE / PACKAGES)
    other = tmp_path / "other.deb"
    other.write_bytes(b"another package of the same version")
    archive = Archive(tmp_path / "cache", ["none"])
    monkeypatch.setattr(archive, "update", lambda: None)
    monkeypatch.setattr(archive, "download", lambda packages: dict.fromkeys(packages, other))
    with pytest.raises(ImageError, match=r"is not the package of the lock \(SHA-256\)"):
        lock.fetch(archive, [archive.debs])


def test_a_suite_that_has_moved_on_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_DEBIAN_MIRROR", f"file://{tmp_path}/nothing")
    with pytest.raises(ImageError, match=r"--packages.*PARLEY_DEBIAN_MIRROR.*make image-lock"):
        Lock.load(HERE / PACKAGES).fetch(Archive(tmp_path / "cache", [contents.SUITE]), [])


@pytest.mark.parametrize("text", ["", "numpy==1\n", "numpy==1 \\\n    --hash=sha256:00\n", "https://x/y.whl\n"])
def test_a_lock_of_wheels_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / WHEELS).write_text(text)
    with pytest.raises(ImageError, match=WHEELS):
        wheel_digests(tmp_path / WHEELS)


def test_a_wheel_that_pip_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / WHEELS).write_text("no-such-package-of-parley==1 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(ImageError, match="pip download"):
        fetch_wheels(tmp_path / WHEELS, tmp_path / "into")


# What stays


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("usr/bin/python3.13", True),
        ("usr/bin/dash", False),
        ("usr/lib/x86_64-linux-gnu/libc.so.6", True),
        ("usr/lib/x86_64-linux-gnu/libssl.so.3", False),
        ("usr/lib/x86_64-linux-gnu/gconv/UTF-32.so", False),
        ("usr/lib/python3.13/os.py", True),
        ("usr/lib/python3.13/__pycache__/os.cpython-313.pyc", True),
        ("usr/lib/python3.13/ssl.py", False),
        ("usr/lib/python3.13/__pycache__/ssl.cpython-313.pyc", False),
        ("usr/lib/python3.13/json/__pycache__/decoder.cpython-313.pyc", True),
        ("usr/lib/python3.13/urllib/request.py", False),
        ("usr/lib/python3.13/lib-dynload/_ssl.cpython-313-x86_64-linux-gnu.so", False),
        ("usr/lib/python3.13/lib-dynload/_ctypes.cpython-313-x86_64-linux-gnu.so", True),
        ("usr/lib/python3.13/EXTERNALLY-MANAGED", False),
        ("etc/passwd", False),
    ],
)
def test_what_of_the_packages_is_in_the_image(name: str, stays: bool) -> None:
    assert contents.runtime_keeps(name) is stays


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("numpy/_core/numeric.py", True),
        ("numpy/_core/_multiarray_umath.cpython-313-x86_64-linux-gnu.so", True),
        ("numpy/_core/_multiarray_tests.cpython-313-x86_64-linux-gnu.so", False),
        ("numpy/tests/test_all.py", False),
        ("numpy/f2py/x.py", False),
        ("numpy/random/mtrand.so", False),
        ("numpy.libs/libscipy_openblas.so", True),
        ("numpy-2.dist-info/licenses/LICENSE", True),
        ("numpy-2.dist-info/METADATA", False),
        ("cryptography-50.dist-info/sboms/x.json", False),
        ("numpy/__init__.pyi", False),
        ("cffi/api.py", False),
        ("_cffi_backend.cpython-313-x86_64-linux-gnu.so", True),
    ],
)
def test_what_of_the_wheels_is_in_the_image(name: str, stays: bool) -> None:
    assert contents.wheel_keeps(name) is stays


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("parley_enclave/pool.py", True),
        ("parley_enclave/pool.py.orig", False),
        ("parley_enclave/.pool.py.swp", False),
        ("parley_enclave/__pycache__/pool.cpython-311.pyc", False),
        ("parley_enclave/init.py", False),
        ("parley_protocol/attestation/aws_nitro_root_g1.pem", True),
        ("parley_protocol/v1/enclave_pb2.py", True),
        ("parley_protocol/v1/enclave.proto", False),
        ("parley_protocol/v1/coordinator_pb2_grpc.py", False),
        ("parley_protocol/measurement.py", False),
    ],
)
def test_what_of_ours_is_in_the_image(name: str, stays: bool) -> None:
    assert contents.application_keeps(name) is stays


def test_what_git_does_not_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["init", "-q"], ["config", "user.name", "x"], ["config", "user.email", "x@example.org"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "kept.py").write_text("1")
    subprocess.run(["git", "add", "kept.py"], cwd=tmp_path, check=True)
    subprocess.run(["git", "commit", "-q", "-m", "x"], cwd=tmp_path, check=True)
    monkeypatch.setattr(command_line, "installed", lambda package: tmp_path)
    assert command_line.changed() == []
    (tmp_path / "kept.py").write_text("2")
    (tmp_path / "stray.py").write_text("3")
    assert sorted(set(command_line.changed())) == ["kept.py", "stray.py"]


def test_the_command_line_of_the_kernel_is_aws_own_with_modules_and_the_processors_clock() -> None:
    words = build.CMDLINE.split()
    assert words[:5] == ["reboot=k", "panic=30", "pci=off", "console=ttyS0", "i8042.noaux"]
    assert words[-1] == "tsc=reliable"
    assert not any(word.startswith("nomodule") for word in words)


# The sandbox


def test_a_failing_program_is_said_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"/usr/bin/nothing: ended with \d+"):
        sandbox.run(tmp_path, ["/usr/bin/nothing"])


# The command


def test_a_signature_needs_both_of_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--out", str(tmp_path), "--signing-key", str(tmp_path / "key")]) == 1
    assert "--signing-key and --signing-certificate go together" in capsys.readouterr().err


def test_what_is_no_image_is_not_signed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from parley_deploy.pki import LocalRoot, system_now_ms

    LocalRoot.create(system_now_ms()).save(tmp_path)
    (tmp_path / "x.eif").write_bytes(b"nothing")
    command = ["sign", str(tmp_path / "x.eif"), "--out", str(tmp_path / "y.eif")]
    command += ["--signing-key", str(tmp_path / "root.key"), "--signing-certificate", str(tmp_path / "root.pem")]
    assert main(command) == 1
    assert "image:" in capsys.readouterr().err
    assert not list(tmp_path.glob("y.eif*"))
