"""Debian packages without installing anything: apt with a configuration of its own, and an unpacker in Python.

The mirror is the one of this host's own apt sources, or what PARLEY_DEBIAN_MIRROR says. apt checks the signature of every
list with the Debian archive keyring and the digest of every package with those lists; nothing of the host's apt is
changed, and no package's scripts run.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final

MIRROR_VARIABLE: Final = "PARLEY_DEBIAN_MIRROR"
"""The environment variable that names another mirror than the host's sources do."""
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SOURCES: Final = Path("/etc/apt")
SECONDS: Final = 900
"""How long one call of apt may take, downloads included."""
TRIES: Final = 3
MEMBER_BYTES: Final = 1 << 30
"""Most that one file of a package may hold."""

_FIELD: Final = re.compile(r"([A-Za-z-]+):[ \t]*(.*)")
_PLANNED: Final = re.compile(r"Inst (?P<name>[a-z0-9][a-z0-9+.-]+) (?:\[[^]]*\] )?\((?P<version>\S+) ")
_PLACE: Final = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})")
_AR_MAGIC: Final = b"!<arch>\n"
_AR_HEADER: Final = 60


class DebianError(Exception):
    """The archive, a package or this host is not as it must be."""


class Archive:
    """Suites of the Debian archive (component main, one architecture), with lists and packages kept in `cache`.

    Several processes may share a cache. Every method raises DebianError, with what apt said.
    """

    def __init__(self, cache: Path, suites: Sequence[str], architecture: str = "amd64") -> None:
        self._cache = cache.resolve()
        self._suites = tuple(suites)
        self._architecture = architecture
        self.debs: Final = self._cache / "debs"
        """The folder of the packages that were downloaded; it is there."""
        self.debs.mkdir(parents=True, exist_ok=True)
        self._lock = self._cache / "lock"

    def update(self) -> None:
        """Fetches the package lists of the suites and checks their signatures."""
        with self._exclusive():
            self._configure()
            self._apt("update", "--error-on=any")

    def depends(self, names: Iterable[str]) -> dict[str, str]:
        """The packages `names` and all that they need, nothing being there yet, each with its version.

        A name may say a version (`name=version`) or a suite (`name/suite`), as for apt.
        """
        with self._exclusive():
            self._configure()
            said = self._apt("--simulate", "install", "--no-install-recommends", *names)
        planned = {found["name"]: found["version"] for line in said.splitlines() if (found := _PLANNED.match(line))}
        if not planned:
            raise DebianError(f"apt plans nothing for {' '.join(names)}")
        return planned

    def download(self, packages: Mapping[str, str | None]) -> dict[str, Path]:
        """Each package's file: of the version given, or for None of the one that apt prefers."""
        if not packages:
            return {}
        wanted = {name: name if version is None else f"{name}={version}" for name, version in packages.items()}
        with self._exclusive():
            self._configure()
            places = self._places(wanted)
            missing = [name for name, place in places.items() if not _is(self.debs / place["file"], place["sha256"])]
            if missing:
                with tempfile.TemporaryDirectory(dir=self._cache, prefix="download-") as folder:
                    self._apt("download", *(wanted[name] for name in missing), folder=Path(folder))
                    for name in missing:
                        fetched = Path(folder) / places[name]["file"]
                        if not _is(fetched, places[name]["sha256"]):
                            raise DebianError(f"{name}: what was downloaded is not what the signed list says")
                        fetched.replace(self.debs / fetched.name)
            return {name: self.debs / place["file"] for name, place in places.items()}

    def _places(self, wanted: Mapping[str, str]) -> dict[str, re.Match[str]]:
        said = self._apt("download", "--print-uris", *wanted.values())
        found = {
            place["file"].split("_", 1)[0]: place
            for line in said.splitlines()
            if (place := _PLACE.fullmatch(line.strip()))
        }
        for name in wanted:
            if name not in found:
                raise DebianError(f"{name}: apt does not say where it is, with a SHA-256 digest")
        return {name: found[name] for name in wanted}

    def _configure(self) -> None:
        """Writes apt's configuration: all state inside the cache, no hooks; proxies and the like as on the host."""
        if shutil.which("apt-get") is None:
            raise DebianError("this host has no apt-get: packages are fetched with apt")
        if not KEYRING.is_file():
            raise DebianError(f"{KEYRING} is missing: install the package debian-archive-keyring")
        for folder in ("lists/partial", "archives/partial"):
            (self._cache / folder).mkdir(parents=True, exist_ok=True)
        (self._cache / "status").touch()
        (self._cache / "debian.sources").write_text(
            f"Types: deb\nURIs: {mirror()}\nSuites: {' '.join(self._suites)}\nComponents: main\n"
            f"Architectures: {self._architecture}\nSigned-By: {KEYRING}\n",
            encoding="utf-8",
        )
        environment = {**os.environ, "LC_ALL": "C"}
        command = ["apt-config", "dump", "Acquire", "--format", '%F "%v";%n']
        acquire = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
        if acquire.returncode != 0:
            raise DebianError(f"apt-config: {acquire.stderr.strip()}")
        own = {
            "Dir::Etc::Main": "/dev/null",
            "Dir::Etc::Parts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::Etc::SourceList": str(self._cache / "debian.sources"),
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": str(self._cache / "lists"),
            "Dir::State::Status": str(self._cache / "status"),
            "Dir::State::Extended_States": str(self._cache / "extended_states"),
            "Dir::Cache": str(self._cache),
            "APT::Architecture": self._architecture,
            "APT::Architectures": self._architecture,
            "APT::Install-Recommends": "false",
            "APT::Get::AllowUnauthenticated": "false",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": str(TRIES),
            # Whose files these are is the caller's matter: apt's own user may not reach the folder.
            "APT::Sandbox::User": "",
        }
        text = acquire.stdout + "".join(f'{key} "{value}";\n' for key, value in own.items())
        (self._cache / "apt.conf").write_text(text, encoding="utf-8")

    def _apt(self, *arguments: str, folder: Path | None = None) -> str:
        environment = {**os.environ, "LC_ALL": "C", "APT_CONFIG": str(self._cache / "apt.conf")}
        try:
            done = subprocess.run(
                ["apt-get", "-q", "-y", *arguments],
                cwd=folder or self._cache,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DebianError(f"apt-get {arguments[0]} took longer than {SECONDS} seconds") from None
        if done.returncode != 0:
            raise DebianError(f"apt-get {' '.join(arguments)}: {(done.stderr or done.stdout).strip()[-1000:]}")
        return done.stdout

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._cache.mkdir(parents=True, exist_ok=True)
        with self._lock.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def mirror() -> str:
    """Where the Debian archive is: PARLEY_DEBIAN_MIRROR, or the first source of this host that carries its main suites."""
    named = os.environ.get(MIRROR_VARIABLE)
    if named:
        return named
    release = _release()
    files = [SOURCES / "sources.list", *sorted((SOURCES / "sources.list.d").glob("*"))]
    for path in files:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for uri, suites, components, signed_by in _stanzas(text) if path.suffix == ".sources" else _lines(text):
            debian = not signed_by or Path(signed_by).name.startswith("debian-archive-")
            if debian and "main" in components and release & set(suites):
                return uri
    raise DebianError(f"no apt source of this host carries Debian: say where its archive is in {MIRROR_VARIABLE}")


def _release() -> set[str]:
    """The names that the main suite of a Debian host may have in its sources; none where the host is no Debian."""
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    facts = {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}
    if facts.get("ID") != "debian":
        return set()
    names = {"stable", "oldstable", "testing", "unstable", "sid"}
    return names | {facts["VERSION_CODENAME"]} if facts.get("VERSION_CODENAME") else names


def _stanzas(text: str) -> Iterator[tuple[str, list[str], list[str], str]]:
    """The sources of a file in the form of deb822: URI, suites, components, keyring."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        fields = {found[1].lower(): found[2].strip() for line in lines if (found := _FIELD.fullmatch(line))}
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes") != "no" and fields.get("uris"):
            suites, components = fields.get("suites", "").split(), fields.get("components", "").split()
            for uri in fields["uris"].split():
                yield uri, suites, components, fields.get("signed-by", "")


def _lines(text: str) -> Iterator[tuple[str, list[str], list[str], str]]:
    """The sources of a file with one in a line: deb [options] uri suite components."""
    for line in text.splitlines():
        found = re.fullmatch(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]*).*", line)
        if found:
            options = dict(word.partition("=")[::2] for word in (found[1] or "").split())
            yield found[2], [found[3]], found[4].split(), options.get("signed-by", "")


def _is(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def unpack(deb: Path, into: Path) -> None:
    """Unpacks the files of a package below `into`: contents, permission bits and links, owned by the caller.

    What a former package left is replaced; a folder that stands as a symbolic link inside `into` stays one.
    DebianError: not a Debian package, compressed in a way that is not known, or a path that leads out of `into`.
    """
    into.mkdir(parents=True, exist_ok=True)
    root = into.resolve()
    try:
        with deb.open("rb") as file, tarfile.open(fileobj=_data(deb, file), mode="r|") as archive:
            folders = [(target, member.mode) for member in archive if (target := _write(deb, archive, member, root))]
    except (tarfile.TarError, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise DebianError(f"{deb.name}: broken: {error}") from None
    for target, mode in reversed(folders):
        target.chmod(mode & 0o777)


def _data(deb: Path, file: IO[bytes]) -> IO[bytes] | gzip.GzipFile:
    """The member data.tar of a package, decompressed."""
    end = os.fstat(file.fileno()).st_size
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise DebianError(f"{deb.name}: not a Debian package")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
        name = header[:16].decode("ascii", "replace").rstrip(" /")
        size = int(header[48:58]) if header[48:58].strip().isdigit() and header[58:] == b"`\n" else -1
        start = file.tell()
        if size < 0 or start + size > end:
            raise DebianError(f"{deb.name}: broken: a member without its bytes")
        if name.startswith("data.tar"):
            content = io.BytesIO(file.read(size))
            match name.removeprefix("data.tar"):
                case ".xz":
                    return lzma.open(content)
                case ".gz":
                    return gzip.open(content)
                case "":
                    return content
            raise DebianError(f"{deb.name}: {name}: only xz, gz and plain are known")
        file.seek(start + size + size % 2)
    raise DebianError(f"{deb.name}: no member data.tar")


def _write(deb: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> Path | None:
    """Writes one member; for a folder its path, as its mode is set when all is in it."""
    target = _inside(deb, member.name, root)
    if target == root:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        if target.is_symlink() and target.resolve().is_relative_to(root) and target.is_dir():
            return None
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            target.unlink()
        target.mkdir(exist_ok=True)
        return target
    if target.is_dir() and not target.is_symlink():
        raise DebianError(f"{deb.name}: {member.name}: stands where another package has a folder")
    target.unlink(missing_ok=True)
    if member.issym():
        target.symlink_to(member.linkname)
    elif member.islnk():
        source = _inside(deb, member.linkname, root)
        if source.is_symlink() or not source.is_file():
            raise DebianError(f"{deb.name}: {member.name}: a link to what is not there")
        target.hardlink_to(source)
    elif member.isreg():
        if member.size > MEMBER_BYTES:
            raise DebianError(f"{deb.name}: {member.name}: more than {MEMBER_BYTES} bytes")
        content = archive.extractfile(member)
        assert content is not None
        with target.open("xb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        target.chmod(member.mode & 0o777)
    else:
        raise DebianError(f"{deb.name}: {member.name}: neither a file, a folder nor a link")
    return None


def _inside(deb: Path, name: str, root: Path) -> Path:
    """Where a member goes. Its folders may be symbolic links, as /lib is, that stay below `root`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DebianError(f"{deb.name}: {name}: leads out of the folder")
    target = root / path
    if target != root and not target.parent.resolve().is_relative_to(root):
        raise DebianError(f"{deb.name}: {name}: leads out of the folder through a symbolic link")
    return target
