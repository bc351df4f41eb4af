"""Debian packages: where the archive is, what apt is told, and what a package may unpack to."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from parley_deploy import debian
from parley_deploy.debian import Archive, DebianError, mirror, unpack


def member(name: str, content: bytes) -> bytes:
    """One file of an ar archive."""
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}".encode() + b"`\n"
    return header + content + b"\n" * (len(content) % 2)


def deb(path: Path, *entries: tuple[tarfile.TarInfo, bytes], suffix: str = ".xz") -> Path:
    """A package with these members."""
    packed = io.BytesIO()
    modes = {".xz": "w:xz", ".gz": "w:gz", "": "w:"}
    with tarfile.open(fileobj=packed, mode=modes.get(suffix, "w:")) as archive:  # type: ignore[call-overload]
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (f"data.tar{suffix}", packed.getvalue())]
    path.write_bytes(b"!<arch>\n" + b"".join(member(name, content) for name, content in parts))
    return path


def entry(name: str, content: bytes = b"", mode: int = 0o644, kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    """A member of data.tar."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.type, info.linkname = len(content), mode, kind, link
    return info, content


def folder(name: str, mode: int = 0o755) -> tuple:
    return entry(name, mode=mode, kind=tarfile.DIRTYPE)


def link(name: str, to: str) -> tuple:
    return entry(name, kind=tarfile.SYMTYPE, link=to)


# Unpacking


@pytest.mark.parametrize("suffix", [".xz", ".gz", ""])
def test_contents_modes_and_links_are_kept(tmp_path: Path, suffix: str) -> None:
    package = deb(
        tmp_path / "p.deb",
        folder("./"),
        folder("./usr/"),
        folder("./usr/bin/", mode=0o750),
        entry("./usr/bin/tool", b"program", mode=0o4755),
        entry("./usr/bin/other", kind=tarfile.LNKTYPE, link="./usr/bin/tool"),
        link("./usr/bin/name", "tool"),
        link("./usr/outside", "/etc/passwd"),
        suffix=suffix,
    )
    into = tmp_path / "tree"
    unpack(package, into)
    tool = into / "usr/bin/tool"
    assert tool.read_bytes() == b"program"
    # No bit that gives rights: nothing here is installed.
    assert stat.S_IMODE(tool.stat().st_mode) == 0o755
    assert stat.S_IMODE((into / "usr/bin").stat().st_mode) == 0o750
    assert (into / "usr/bin/other").samefile(tool)
    assert os.readlink(into / "usr/bin/name") == "tool"
    assert os.readlink(into / "usr/outside") == "/etc/passwd"


def test_a_folder_may_be_a_link_within_and_files_are_replaced(tmp_path: Path) -> None:
    into = tmp_path / "tree"
    unpack(deb(tmp_path / "a.deb", folder("./usr"), folder("./usr/lib"), link("./lib", "usr/lib")), into)
    unpack(deb(tmp_path / "b.deb", folder("./lib"), entry("./lib/a.so", b"old")), into)
    unpack(deb(tmp_path / "c.deb", entry("./usr/lib/a.so", b"new")), into)
    assert (into / "lib").is_symlink()
    assert (into / "lib/a.so").read_bytes() == b"new"


def test_a_link_of_a_former_package_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"whole")
    into = tmp_path / "tree"
    unpack(deb(tmp_path / "a.deb", link("./file", str(tmp_path / "victim"))), into)
    unpack(deb(tmp_path / "b.deb", entry("./file", b"mine")), into)
    assert (tmp_path / "victim").read_bytes() == b"whole"
    assert (into / "file").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "entries",
    [
        [entry("../out", b"x")],
        [entry("/out", b"x")],
        [entry("a/../../out", b"x")],
        [link("./out", ".."), entry("./out/file", b"x")],
        [link("./out", "/tmp"), folder("./out/folder")],
        [entry("./hard", kind=tarfile.LNKTYPE, link="../../out")],
    ],
)
def test_paths_that_lead_out_are_refused(tmp_path: Path, entries: list[tuple]) -> None:
    (tmp_path / "out").write_bytes(b"whole")
    with pytest.raises(DebianError, match="leads out of the folder"):
        unpack(deb(tmp_path / "p.deb", *entries), tmp_path / "tree")
    assert (tmp_path / "out").read_bytes() == b"whole"
    assert not (tmp_path / "file").exists() and not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry("./device", kind=tarfile.CHRTYPE)], "neither a file"),
        ([entry("./pipe", kind=tarfile.FIFOTYPE)], "neither a file"),
        ([entry("./hard", kind=tarfile.LNKTYPE, link="./none")], "what is not there"),
        ([link("./to", "x"), entry("./hard", kind=tarfile.LNKTYPE, link="./to")], "what is not there"),
        ([folder("./a"), entry("./a", b"x")], "another package has a folder"),
    ],
)
def test_members_that_are_no_files_are_refused(tmp_path: Path, entries: list[tuple], words: str) -> None:
    with pytest.raises(DebianError, match=words):
        unpack(deb(tmp_path / "p.deb", *entries), tmp_path / "tree")


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    whole = deb(tmp_path / "p.deb", entry("./a", b"x" * 5000)).read_bytes()
    broken = {
        "not a Debian package": b"PK\3\4" + whole,
        "without its bytes": whole[:-1],
        "no member data.tar": whole[: 8 + 60 + 4],
        "broken": whole.replace(b"\xfd7zXZ", b"\xfd7zXY"),
    }
    for words, content in broken.items():
        (tmp_path / "q.deb").write_bytes(content)
        with pytest.raises(DebianError, match=words):
            unpack(tmp_path / "q.deb", tmp_path / "tree")
    with pytest.raises(DebianError, match="only xz, gz and plain"):
        unpack(deb(tmp_path / "z.deb", suffix=".zst"), tmp_path / "tree")


# The archive


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The apt sources of a Debian host, empty at first."""
    monkeypatch.setattr(debian, "SOURCES", tmp_path / "apt")
    monkeypatch.setattr(debian, "_release", lambda: {"stable", "bookworm"})
    monkeypatch.delenv(debian.MIRROR_VARIABLE, raising=False)
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    return tmp_path / "apt"


STANZAS = """# a comment
Types: deb
URIs: http://vendor.test/debian
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/vendor.gpg

Types: deb-src
URIs: http://sources.test/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://off.test/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb
URIs: http://security.test/debian-security
Suites: bookworm-security
Components: main

Types: deb deb-src
# in the middle
URIs: http://archive.test/debian http://second.test/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def test_the_mirror_is_that_of_the_host_s_sources(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DebianError, match=debian.MIRROR_VARIABLE):
        mirror()
    (host / "sources.list.d/debian.sources").write_text(STANZAS)
    (host / "sources.list.d/saved.sources.save").write_text(STANZAS.replace("archive", "saved"))
    assert mirror() == "http://archive.test/debian"
    (host / "sources.list").write_text(
        "# deb http://no.test/debian bookworm main\n"
        "deb [signed-by=/usr/share/keyrings/vendor.gpg] http://vendor.test/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://old.test/debian stable main # x\n"
    )
    assert mirror() == "http://old.test/debian"
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://named.test/debian")
    assert mirror() == "http://named.test/debian"


def test_a_host_without_apt_or_without_the_keyring_is_told_so(
    tmp_path: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://named.test/debian")
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        with pytest.raises(DebianError, match="no apt-get"):
            Archive(tmp_path / "c", ["trixie"]).update()
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "none.gpg")
    monkeypatch.setattr(debian.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(DebianError, match="none.gpg is missing"):
        Archive(tmp_path / "c", ["trixie"]).update()


needs_apt = pytest.mark.skipif(
    debian.shutil.which("apt-get") is None or debian.shutil.which("dpkg-deb") is None or not debian.KEYRING.is_file(),
    reason="this host has no apt, dpkg-deb or Debian keyring",
)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """An archive in a folder, which nobody signed: its lists are put where apt would put them."""
    pool = tmp_path / "mirror"
    pool.mkdir()
    stanzas = []
    for name, depends in (("app", "lib (>= 2)"), ("lib", ""), ("stranger", "")):
        control = tmp_path / name / "DEBIAN"
        control.mkdir(parents=True)
        text = f"Package: {name}\nVersion: 2-1\nArchitecture: amd64\nMaintainer: T <t@t.test>\nDescription: x\n"
        text += f"Depends: {depends}\n" if depends else ""
        (control / "control").write_text(text)
        (tmp_path / name / f"{name}.txt").write_text(name)
        package = pool / f"{name}.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-b", str(tmp_path / name), str(package)],
            check=True,
            capture_output=True,
        )
        digest = hashlib.sha256(package.read_bytes()).hexdigest()
        stanzas.append(f"{text}Filename: {name}.deb\nSize: {package.stat().st_size}\nSHA256: {digest}\n")
    monkeypatch.setenv(debian.MIRROR_VARIABLE, f"file:{pool}")
    lists = tmp_path / "cache/lists"
    lists.mkdir(parents=True)
    escaped = str(pool).replace("_", "%5f").replace("/", "_")
    stem = f"{escaped}_dists_trixie"
    (lists / f"{stem}_main_binary-amd64_Packages").write_text("\n".join(stanzas))
    return Archive(tmp_path / "cache", ["trixie"])


@needs_apt
def test_what_a_package_needs_is_planned_with_nothing_installed(archive: Archive) -> None:
    assert archive.depends(["app"]) == {"lib": "2-1", "app": "2-1"}
    with pytest.raises(DebianError, match="nosuch"):
        archive.depends(["nosuch"])


@needs_apt
def test_an_archive_without_a_signature_is_refused(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(DebianError, match="apt-get update"):
        archive.update()
    with pytest.raises(DebianError, match="authenticated"):
        archive.download({"app": None})
    assert not list((tmp_path / "cache/debs").iterdir())
