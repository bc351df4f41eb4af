"""The coordinator's bundle: the same wheels make the same bytes, and the lock file covers what the coordinator imports."""

from __future__ import annotations

import os
import re
import tarfile
import tomllib
from pathlib import Path

import pytest

from parley_deploy import bundle
from parley_deploy.bundle import BundleError, pack

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("parley-0.1.0-py3-none-any.whl", "cbor2-6.3.0-cp311-cp311-x.whl"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


def test_the_same_wheels_make_the_same_bytes(wheels: Path, tmp_path: Path) -> None:
    pack(wheels, tmp_path / "one.tar")
    for path in wheels.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    pack(wheels, tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as made:
        assert made.getnames() == sorted(path.name for path in wheels.iterdir())
        assert {(each.uid, each.gid, each.mode, each.mtime) for each in made} == {(0, 0, 0o644, bundle.EPOCH)}


def test_what_is_no_wheel_is_refused(wheels: Path, tmp_path: Path) -> None:
    (wheels / "six-1.16.0.tar.gz").write_bytes(b"a source distribution would be built on the parent")
    with pytest.raises(BundleError, match=r"six-1\.16\.0\.tar\.gz: not a wheel"):
        pack(wheels, tmp_path / "bundle.tar")


def test_a_bundle_without_parley_is_refused(wheels: Path, tmp_path: Path) -> None:
    (wheels / "parley-0.1.0-py3-none-any.whl").unlink()
    with pytest.raises(BundleError, match="own wheel is missing"):
        pack(wheels, tmp_path / "bundle.tar")


def test_the_lock_is_that_of_the_main_one() -> None:
    def locked(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
        found = {}
        for block in re.split(r"\n(?=\S)", path.read_text("utf-8")):
            if name := re.match(r"([a-z0-9-]+)==(\S+)", block):
                found[name[1]] = (name[2], frozenset(re.findall(r"sha256:[0-9a-f]{64}", block)))
        return found

    mine, main = locked(bundle.LOCK), locked(ROOT / "requirements.lock")
    assert len(mine) > 10
    assert {name: main.get(name) for name in mine} == mine
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    wanted = {re.match(r"[A-Za-z0-9-]+", each)[0] for each in extras["coordinator"]}  # type: ignore[index]
    assert wanted <= mine.keys()


def test_a_failing_pip_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundle.sys, "executable", "/bin/false")
    assert bundle.main(["--output", str(tmp_path / "bundle.tar")]) == 1
    assert capfd.readouterr().err == "bundle: pip wheel failed (exit code 1)\n"
    assert not (tmp_path / "bundle.tar").exists()
