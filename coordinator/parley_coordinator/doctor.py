"""`parley-coordinator doctor`: looks at all that a coordinator needs, and says what to do. It changes nothing."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import socket
import ssl
import stat
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from parley_coordinator import tls
from parley_coordinator.config import Config, ConfigError
from parley_coordinator.doctor_host import SOON, host
from parley_coordinator.doctor_kms import kms
from parley_coordinator.doctor_store import UNANSWERED, bucket, database, rows
from parley_coordinator.doctor_system import Check, System, Verdict, fail, ok, skip, warn

LIBRARIES: Final = ("grpcio", "protobuf", "sqlalchemy", "alembic", "cryptography")
YEARS: Final = range(2026, 2100)
"""A clock outside of these is not set."""
FREE_BYTES: Final = 1 << 30
"""With less the next upload may fail."""
ROOM_BYTES: Final = 4 << 30
"""With less nobody should begin, whatever is stored so far."""
FILES: Final = 1024
"""Open files beside those of the calls: tables that enclaves read, the database, the log."""
_PROBE_S: Final = 3.0
_UPLOADS: Final = (
    "SELECT coalesce(sum(CASE WHEN complete_ms IS NULL THEN size - stored ELSE 0 END), 0), coalesce(max(size), 0)"
    " FROM uploads"
)


def examine(config: Config, system: System) -> list[Check]:
    """All checks, in the order in which an operator would mend things."""
    return [
        versions(),
        clock(system),
        *host(config, system),
        *storage(config),
        *(() if config.s3 else (space(config, system),)),
        database(config),
        *kms(config, system),
        key(config, system),
        certificate(config, system),
        listen(config),
        limits(config, system),
    ]


def report(checks: Sequence[Check], *, as_json: bool) -> str:
    """The report, one line for each check and one for what to do; or one JSON object."""
    failed = sum(check.verdict is Verdict.FAIL for check in checks)
    if as_json:
        listed = [
            {"name": check.name, "verdict": str(check.verdict), "found": check.found, "do": check.do}
            for check in checks
        ]
        return json.dumps({"checks": listed, "failed": failed}, ensure_ascii=False, indent=2)
    return "\n".join([line for check in checks for line in _lines(check)])


def _lines(check: Check) -> Iterator[str]:
    yield f"{check.verdict:<5} {check.name:<15} {check.found}"
    if check.do:
        yield f"{'':<21} -> {check.do}"


def versions() -> Check:
    """Python and the libraries."""
    found = [f"python {platform.python_version()}"]
    for name in ("parley", *LIBRARIES):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            return fail("versions", f"{name} is not installed", "pip install '.[coordinator]' in a checkout")
    return ok("versions", ", ".join(found))


def clock(system: System) -> Check:
    """The clock: callers' statements are valid for minutes."""
    now = system.now()
    said = f"{now:%Y-%m-%dT%H:%M:%SZ}"
    if now.year not in YEARS:
        return fail("clock", f"{said}: it is not set", "set the clock, and start an NTP client such as chrony")
    kept = system.synchronised()
    if kept is None:
        # A unit with ProtectClock may not ask the kernel.
        if not system.path("/run/systemd/timesync/synchronized").exists():
            return skip("clock", f"{said}; the kernel does not tell this process whether NTP keeps it")
        kept = True
    if not kept:
        return warn("clock", f"{said}, not synchronised", "start an NTP client such as chrony")
    return ok("clock", f"{said}, synchronised")


def storage(config: Config) -> list[Check]:
    """The folders: written, synced, private; or the bucket."""
    checks: list[Check] = []
    folders = dict.fromkeys((config.folder, config.blobs) if config.s3 is None else (config.folder,))
    for folder in folders:
        name = "blobs" if folder == config.blobs else "folder"
        checks += [_writable(name, folder), *_private(name, folder)]
    if config.s3 is not None:
        checks += bucket(config.s3)
    return checks


def space(config: Config, system: System) -> Check:
    """Room for the uploads that are begun, and for one more of the largest table: whoever replaces it uploads it anew."""
    free = system.free(_there(config.blobs))
    try:
        [(missing, largest)] = rows(config, _UPLOADS)
    except UNANSWERED:
        # None has been made yet; where it is there and cannot be read, the next check says why.
        missing, largest = 0, 0
    said = f"{_size(free)} free; uploads that are begun lack {_size(missing)}, the largest one has {_size(largest)}"
    do = "make room, or give the store a larger disk"
    if free < FREE_BYTES:
        return fail("space", said, do)
    return warn("space", said, do) if free < max(ROOM_BYTES, missing + largest) else ok("space", said)


def _writable(name: str, folder: Path) -> Check:
    place = _there(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return fail(name, f"{place}: {error.strerror}", "let the coordinator's user write there")
    return ok(name, f"{folder} can be written and synced" if place == folder else f"{folder} can be made")


def _private(name: str, folder: Path) -> Iterator[Check]:
    if folder.is_dir() and folder.stat().st_mode & 0o077:
        mode = stat.S_IMODE(folder.stat().st_mode)
        yield warn(f"{name}-mode", f"{folder} has mode {mode:04o}: others may look into it", f"chmod 700 {folder}")


def key(config: Config, system: System) -> Check:
    """The one secret: a private key of this user alone, and the certificate's."""
    try:
        status = config.key.stat()
        private = load_pem_private_key(config.key.read_bytes(), None)
        public = x509.load_pem_x509_certificate(config.certificate.read_bytes()).public_key()
    except OSError as error:
        return fail("tls-key", f"{error.filename}: {error.strerror}", "make it with `parley-coordinator init`")
    except (ValueError, TypeError):
        return fail("tls-key", f"{config.key}: no private key in PEM without a passphrase", "put one there")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        return fail("tls-key", f"{config.key} has mode {mode:04o}: others may read it", f"chmod 600 {config.key}")
    if system.user and status.st_uid not in (system.user, 0):
        return fail("tls-key", f"{config.key} belongs to user {status.st_uid}", f"chown {system.user} {config.key}")
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != public.public_bytes(*form):
        return fail("tls-key", "it is not the key of tls.certificate", "put the two that belong together there")
    return ok("tls-key", f"{config.key}, mode {mode:04o}, belongs to the certificate")


def certificate(config: Config, system: System) -> Check:
    """The certificate: valid, and for the name that members use."""
    try:
        pem = config.certificate.read_bytes()
        found = x509.load_pem_x509_certificate(pem)
        digest = tls.server_digest(pem)
    except OSError as error:
        return fail("tls-certificate", f"{error.filename}: {error.strerror}", "make it with `parley-coordinator init`")
    except (ValueError, ConfigError):
        return fail("tls-certificate", f"{config.certificate}: no certificate in PEM", "put one there")
    names = _names(found)
    ends: datetime = found.not_valid_after_utc
    said = f"until {ends:%Y-%m-%d}, for {', '.join(names) or 'no name'}; digest {digest.hex()[:16]}..."
    do = "make a new certificate with the same key, which members have pinned, and give it to them"
    if not found.not_valid_before_utc <= system.now() <= ends:
        return fail("tls-certificate", f"not valid now: {said}", do)
    if not names:
        return fail("tls-certificate", said, "make one that names the host that members connect to")
    return warn("tls-certificate", said, do) if ends - system.now() < SOON else ok("tls-certificate", said)


def _names(found: x509.Certificate) -> list[str]:
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def listen(config: Config) -> Check:
    """The port is free, or this coordinator's."""
    name, _, number = config.listen.rpartition(":")
    name = name.strip("[]")
    if not name or not number.isdecimal() or int(number) > 0xFFFF:
        return fail("listen", f"{config.listen} is no address:port", "correct `listen`")
    if number == "0":
        return ok("listen", "any free port, which the file `address` names")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(name, int(number), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _held(config, name, int(number))
        do = "give `listen` an address of this machine, and a port that this user may take"
        return fail("listen", f"{config.listen}: {error.strerror}", do)
    return ok("listen", f"{config.listen} is free")


def _held(config: Config, name: str, port: int) -> Check:
    host_name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)  # noqa: S104  # asked, not bound
    try:
        pem = ssl.get_server_certificate((host_name, port), timeout=_PROBE_S)
        if tls.server_digest(pem.encode()) == tls.server_digest(config.certificate.read_bytes()):
            return ok("listen", f"{config.listen} is held by this coordinator, which runs")
    except (OSError, ValueError, ConfigError) as error:
        said = f"{config.listen} is held by another program ({type(error).__name__} when it was asked)"
    else:
        said = f"{config.listen} is held by a server with another key"
    return fail("listen", said, "end the other program, or choose another port")


def limits(config: Config, system: System) -> Check:
    """Open files: one for each connection, and some for what enclaves read."""
    needed = config.rpcs + FILES
    if system.files < 0:
        return ok("open-files", "no limit")
    said = f"{system.files} allowed; rpcs = {config.rpcs} may take {needed}"
    if system.files < needed:
        return warn("open-files", said, f"set LimitNOFILE={needed} in the unit (ulimit -n), or lower rpcs")
    return ok("open-files", said)


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _size(size: int) -> str:
    value, unit = float(size), 0
    while value >= 1024 and unit < 4:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
