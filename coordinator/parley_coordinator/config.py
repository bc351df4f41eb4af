"""The configuration of a coordinator: one frozen object, from one TOML file. Relative paths start at the file's folder."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from parley_protocol import limits
from parley_protocol.framing import ENCLAVE_PORT

FILE: Final = "coordinator.toml"
LEVELS: Final = ("debug", "info", "warning", "error")
KINDS: Final = ("local", "qemu", "nitro")
ACCELS: Final = ("auto", "kvm", "tcg")
ADDRESSINGS: Final = ("auto", "path", "virtual")
S3_SCHEME: Final = "s3://"
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_ACCOUNT: Final = re.compile(r"[0-9]{12}")
_ROLE: Final = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[\w+=,.@/-]{1,512}")
_SESSION_NAME: Final = re.compile(r"[\w+=,.@-]{2,64}")
_URL: Final = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,253}/?")


class ConfigError(Exception):
    """A configuration that cannot be: the message names the field."""


@dataclass(frozen=True, slots=True)
class Local:
    """The launchers `local` and `qemu`. `command` gets `--dir DIR --agreement-hint HEX` behind it and returns when
    DIR/enclave.sock answers. `folder` holds one folder for each enclave; the path of a socket in it must stay below 108
    bytes. `image` is the EIF that the command boots, and None where it runs what is installed; `section` is the field's
    place in the file."""

    command: tuple[str, ...]
    folder: Path
    start_s: float = 60.0
    image: Path | None = None
    section: str = "launcher.local"


@dataclass(frozen=True, slots=True)
class Nitro:
    """The launcher `nitro`: enclaves of one image by nitro-cli.

    `command` is nitro-cli; `name` begins the names of this coordinator's enclaves; `folder` holds one file for each. A
    launch has `attempts`, `pause_s` apart, of `start_s` each; every other call of nitro-cli has `call_s`.
    """

    image: Path
    folder: Path
    memory_mib: int = 2048
    cpus: int = 2
    command: tuple[str, ...] = ("nitro-cli",)
    debug: bool = False
    name: str = "parley"
    port: int = ENCLAVE_PORT
    attempts: int = 3
    pause_s: float = 5.0
    start_s: float = 240.0
    call_s: float = 30.0


@dataclass(frozen=True, slots=True)
class S3:
    """A bucket for the blobs. `prefix` begins the names of all objects; `kms_key` encrypts them under that key of AWS KMS;
    `endpoint_url` names another service that speaks S3. Empty texts leave a choice to boto3."""

    bucket: str
    prefix: str = ""
    region: str = ""
    profile: str = ""
    endpoint_url: str = ""
    addressing: str = "auto"
    kms_key: str = field(default="", repr=False)
    part_bytes: int = 8 << 20
    cache_bytes: int = 256 << 20


@dataclass(frozen=True, slots=True)
class Keep:
    """Seconds for which what is no longer needed is kept: tables after the last release and bundles after theirs (0: for
    ever), and what was left of writing; and how often that is looked at."""

    uploads_s: float = 30 * 86400.0
    bundles_s: float = 0.0
    parts_s: float = 7 * 86400.0
    every_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Quotas:
    """What one member key may take: bytes of uploads, uploads of one table, agreements put, watch streams and calls at a
    time."""

    bytes_per_member: int = 256 << 30
    uploads_per_table: int = 64
    agreements_per_member: int = 1000
    watches_per_member: int = 32
    calls_per_member: int = 256


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that the enclave may take for one operation, and how often it is asked for its phase; and those that a caller
    may take to connect, to send a request, and between two messages of an upload."""

    short_s: float = 30.0
    join_s: float = 6 * 3600.0
    compute_s: float = 24 * 3600.0
    status_s: float = 1.0
    handshake_s: float = 10.0
    request_s: float = 30.0
    idle_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """Several coordinators over one store. A session's lease lasts `lease_s` and is prolonged three times in it; a session
    whose enclave no coordinator reaches is given up `abandon_s` after its lease. `address` is where this coordinator takes
    calls that others pass on: empty, its own."""

    lease_s: float = 10.0
    abandon_s: float = 600.0
    address: str = ""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Where metrics are told (address:port) and traces sent (the URL of a collector); empty: nowhere."""

    metrics: str = ""
    otlp: str = ""


@dataclass(frozen=True, slots=True)
class KmsAccount:
    """How the keys of one account are asked for: by an assumed `role`, with its `external_id` where the account's owner wants
    one, or the `profile` of a configuration file; by neither with what the machine has. `endpoint` in place of AWS's."""

    role: str = ""
    external_id: str = ""
    profile: str = ""
    endpoint: str = ""


@dataclass(frozen=True, slots=True)
class KmsConfig:
    """How KMS is asked. Endpoints in place of AWS's: of a VPC, or of an emulator. `session` names the sessions of assumed
    roles in the accounts' logs. A call has `attempts`, with a pause that grows and is random, up to 20 s."""

    endpoint: str = ""
    sts_endpoint: str = ""
    session: str = "parley-coordinator"
    connect_s: float = 5.0
    read_s: float = 10.0
    attempts: int = 4
    accounts: Mapping[str, KmsAccount] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Config:
    """All that a coordinator needs to start. Times in seconds, sizes in bytes."""

    folder: Path
    certificate: Path
    key: Path = field(repr=False)
    database: str
    blobs: Path
    s3: S3 | None
    local: Local
    qemu: Local
    nitro: Nitro
    launcher: str = "local"
    listen: str = "127.0.0.1:7443"
    enclaves: int = limits.ENCLAVES
    node: str = ""
    cluster: Cluster = Cluster()
    keep: Keep = Keep()
    quotas: Quotas = Quotas()
    deadlines: Deadlines = Deadlines()
    kms: KmsConfig = KmsConfig()
    grace_s: float = 10.0
    rpcs: int = 4096
    connections: int = 2048
    telemetry: Telemetry = Telemetry()
    reflection: bool = True
    log_level: str = "info"

    @property
    def launcher_folder(self) -> Path:
        """The folder of the launcher's enclaves."""
        return {"local": self.local.folder, "qemu": self.qemu.folder, "nitro": self.nitro.folder}[self.launcher]

    @property
    def address_file(self) -> Path:
        """Where a running coordinator writes the address that it listens at, for those who started it at port 0."""
        return self.folder / "address"


def defaults(folder: Path) -> Config:
    """The configuration of a folder without a file."""
    return from_tree({}, folder)


def load(path: Path) -> Config:
    """The configuration in a TOML file; ConfigError names the field that is wrong."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return from_tree(tree, path.resolve().parent)


def from_tree(tree: Mapping[str, Any], folder: Path) -> Config:
    """The configuration in the plain tree of a TOML file; ConfigError for unknown fields and wrong values."""
    folder = folder.resolve()
    top = _Section(tree, "")
    tls, store, launcher = top.section("tls"), top.section("store"), top.section("launcher")
    local, qemu, nitro = launcher.section("local"), launcher.section("qemu"), launcher.section("nitro")
    quota, deadlines, log = top.section("quota"), top.section("deadline"), top.section("log")
    kms = top.section("kms")
    telemetry = top.section("telemetry")
    bucket, keep, cluster = store.section("s3"), store.section("keep"), top.section("cluster")
    place = store.text("blobs", "blobs")
    standard = Quotas(), Deadlines(), Keep(), Cluster()
    config = Config(
        folder=folder,
        listen=top.text("listen", "127.0.0.1:7443"),
        reflection=top.boolean("reflection", default=True),
        grace_s=top.seconds("grace_s", 10.0),
        rpcs=top.integer("rpcs", 4096, 16),
        connections=top.integer("connections", 2048, 1),
        telemetry=Telemetry(telemetry.text("metrics", "", empty=True), telemetry.text("otlp", "", empty=True)),
        certificate=folder / tls.text("certificate", "tls.crt"),
        key=folder / tls.text("key", "tls.key"),
        database=_database(store.text("database", "coordinator.db"), folder),
        blobs=folder / place,
        s3=_s3(place, bucket),
        keep=Keep(
            keep.seconds("uploads_s", standard[2].uploads_s, least=0),
            keep.seconds("bundles_s", standard[2].bundles_s, least=0),
            keep.seconds("parts_s", standard[2].parts_s),
            keep.seconds("every_s", standard[2].every_s),
        ),
        enclaves=launcher.integer("enclaves", limits.ENCLAVES, 1),
        launcher=launcher.choice("kind", "local", KINDS),
        local=_local(local, folder),
        qemu=_qemu(qemu, folder),
        nitro=_nitro(nitro, folder),
        node=cluster.text("node", "", empty=True),
        cluster=Cluster(
            cluster.seconds("lease_s", standard[3].lease_s),
            cluster.seconds("abandon_s", standard[3].abandon_s),
            cluster.text("address", "", empty=True),
        ),
        quotas=Quotas(
            quota.integer("bytes_per_member", standard[0].bytes_per_member, 1),
            quota.integer("uploads_per_table", standard[0].uploads_per_table, 1),
            quota.integer("agreements_per_member", standard[0].agreements_per_member, 1),
            quota.integer("watches_per_member", standard[0].watches_per_member, 1),
            quota.integer("calls_per_member", standard[0].calls_per_member, 1),
        ),
        deadlines=Deadlines(
            deadlines.seconds("short_s", standard[1].short_s),
            deadlines.seconds("join_s", standard[1].join_s),
            deadlines.seconds("compute_s", standard[1].compute_s),
            deadlines.seconds("status_s", standard[1].status_s),
            deadlines.seconds("handshake_s", standard[1].handshake_s),
            deadlines.seconds("request_s", standard[1].request_s),
            deadlines.seconds("idle_s", standard[1].idle_s),
        ),
        kms=_kms(kms),
        log_level=log.choice("level", "info", LEVELS),
    )
    for section in (
        top,
        tls,
        store,
        bucket,
        keep,
        cluster,
        telemetry,
        launcher,
        local,
        qemu,
        nitro,
        quota,
        deadlines,
        kms,
        log,
    ):
        section.finish()
    return config


def _local(section: _Section, folder: Path) -> Local:
    command = section.texts("command", ())
    if not command:
        workers = str(section.integer("workers", os.cpu_count() or 1, 1))
        root = str(folder / section.text("root", "root"))
        command = (sys.executable, "-m", "parley_deploy.enclave", "--root", root, "--workers", workers)
    return Local(command, folder / section.text("folder", "enclaves"), section.seconds("start_s", 60.0))


def _qemu(section: _Section, folder: Path) -> Local:
    image = folder / section.text("image", "parley.eif")
    command = section.texts("command", ())
    if not command:
        root = str(folder / section.text("root", "root"))
        memory = str(section.integer("memory_mib", 2048, 64))
        cpus = str(section.integer("cpus", 2, 1))
        accel = section.choice("accel", "auto", ACCELS)
        command = (sys.executable, "-m", "parley_deploy.emulator", "--image", str(image), "--root", root)
        command += ("--memory-mib", memory, "--cpus", cpus, "--accel", accel)
    folder = folder / section.text("folder", "machines")
    return Local(command, folder, section.seconds("start_s", 300.0), image, "launcher.qemu")


def _nitro(section: _Section, folder: Path) -> Nitro:
    standard = Nitro(folder / "parley.eif", folder / "nitro")
    return Nitro(
        image=folder / section.text("image", standard.image.name),
        folder=folder / section.text("folder", standard.folder.name),
        memory_mib=section.integer("memory_mib", standard.memory_mib, 64),
        cpus=section.integer("cpus", standard.cpus, 1),
        command=section.texts("command", standard.command) or standard.command,
        debug=section.boolean("debug", default=standard.debug),
        name=section.matching("name", standard.name, _NAME),
        port=section.integer("port", standard.port, 1),
        attempts=section.integer("attempts", standard.attempts, 1),
        pause_s=section.seconds("pause_s", standard.pause_s),
        start_s=section.seconds("start_s", standard.start_s),
        call_s=section.seconds("call_s", standard.call_s),
    )


def _s3(place: str, section: _Section) -> S3 | None:
    standard = S3("")
    found = S3(
        bucket="",
        region=section.text("region", standard.region, empty=True),
        profile=section.text("profile", standard.profile, empty=True),
        endpoint_url=section.text("endpoint_url", standard.endpoint_url, empty=True),
        addressing=section.choice("addressing", standard.addressing, ADDRESSINGS),
        kms_key=section.text("kms_key", standard.kms_key, empty=True),
        part_bytes=section.integer("part_mib", standard.part_bytes >> 20, 5) << 20,
        cache_bytes=section.integer("cache_mib", standard.cache_bytes >> 20, 16) << 20,
    )
    if not place.startswith(S3_SCHEME):
        if "://" in place:
            raise ConfigError("store.blobs: neither a folder nor s3://BUCKET/PREFIX")
        return None
    bucket, _, prefix = place.removeprefix(S3_SCHEME).partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"store.blobs: {bucket!r} is no name of a bucket")
    return replace(found, bucket=bucket, prefix=prefix and prefix.rstrip("/") + "/")


def _kms(section: _Section) -> KmsConfig:
    standard = KmsConfig()
    accounts = {}
    for name, account in section.sections("account").items():
        if not _ACCOUNT.fullmatch(name):
            raise ConfigError(f"kms.account.{name}: not the 12 digits of an account")
        made = KmsAccount(
            role=account.matching("role", "", _ROLE),
            external_id=account.optional("external_id"),
            profile=account.optional("profile"),
            endpoint=account.matching("endpoint", "", _URL),
        )
        if made.role and made.profile:
            raise ConfigError(f"kms.account.{name}.profile: either a role or a profile")
        if made.external_id and not made.role:
            raise ConfigError(f"kms.account.{name}.external_id: goes with a role")
        account.finish()
        accounts[name] = made
    return KmsConfig(
        endpoint=section.matching("endpoint", "", _URL),
        sts_endpoint=section.matching("sts_endpoint", "", _URL),
        session=section.matching("session", standard.session, _SESSION_NAME),
        connect_s=section.seconds("connect_s", standard.connect_s),
        read_s=section.seconds("read_s", standard.read_s),
        attempts=section.integer("attempts", standard.attempts, 1),
        accounts=accounts,
    )


def _database(text: str, folder: Path) -> str:
    return text if "://" in text else f"sqlite:///{folder / text}"


class _Section:
    """One table of the file. What nobody asked for is a mistake of the writer, so `finish` refuses it."""

    def __init__(self, tree: object, name: str) -> None:
        if not isinstance(tree, Mapping):
            raise ConfigError(f"{name}: not a table")
        self._left = dict(tree)
        self._name = name

    def section(self, name: str) -> _Section:
        return _Section(self._left.pop(name, {}), self._field(name))

    def sections(self, name: str) -> dict[str, _Section]:
        """The tables in a table, by names that the writer chose."""
        found = self._left.pop(name, {})
        if not isinstance(found, Mapping):
            raise ConfigError(f"{self._field(name)}: not a table")
        return {key: _Section(value, f"{self._field(name)}.{key}") for key, value in found.items()}

    def optional(self, name: str) -> str:
        """A text that may be left out or empty."""
        value = self._left.pop(name, "")
        if not isinstance(value, str):
            raise ConfigError(f"{self._field(name)}: not a text")
        return value

    def text(self, name: str, default: str, *, empty: bool = False) -> str:
        value = self._left.pop(name, default)
        if not isinstance(value, str) or not (value or empty):
            raise ConfigError(f"{self._field(name)}: not a text")
        return value

    def texts(self, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self._left.pop(name, list(default))
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{self._field(name)}: not a list of texts")
        return tuple(value)

    def matching(self, name: str, default: str, pattern: re.Pattern[str]) -> str:
        value = self.text(name, default) if default else self.optional(name)
        if (value or default) and not pattern.fullmatch(value):
            raise ConfigError(f"{self._field(name)}: {value!r} does not match {pattern.pattern}")
        return value

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value not in choices:
            raise ConfigError(f"{self._field(name)}: {value!r} is none of: {', '.join(choices)}")
        return value

    def integer(self, name: str, default: int, least: int) -> int:
        value = self._left.pop(name, default)
        if type(value) is not int or value < least:
            raise ConfigError(f"{self._field(name)}: not a whole number from {least}")
        return value

    def seconds(self, name: str, default: float, least: float | None = None) -> float:
        value = self._left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < 1e9 or value == least):
            raise ConfigError(f"{self._field(name)}: not a number of seconds {'above' if least is None else 'from'} 0")
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._field(name)}: neither true nor false")
        return value

    def finish(self) -> None:
        if self._left:
            raise ConfigError(f"{self._field(min(self._left))}: no such field")

    def _field(self, name: str) -> str:
        return f"{self._name}.{name}" if self._name else name


TEMPLATE: Final = """\
# The configuration of parley-coordinator. What is left out has the value that stands here; relative paths start at this folder.

listen = "{listen}"             # address:port; port 0 takes a free one, which the file `address` then names
# reflection = true             # tells gRPC tools the service's methods
# grace_s = 10.0                # how long running calls may take to end after SIGTERM
# rpcs = 4096                   # calls at a time, streams included
# connections = 2048            # connections at a time

[tls]
certificate = "tls.crt"         # PEM; members pin the SHA-384 of its public key
key = "tls.key"

[store]
database = "coordinator.db"     # SQLite file, or postgresql://USER@HOST/DATABASE
blobs = "blobs"                 # folder of the ciphertext, or s3://BUCKET/PREFIX

[store.s3]                      # for blobs in a bucket
# region = ""                   # left out: what boto3 finds
# profile = ""
# endpoint_url = ""             # another service that speaks S3
# addressing = "auto"           # auto | path | virtual
# kms_key = ""                  # encrypts the objects under this key of AWS KMS
# part_mib = 8                  # an upload that is written takes memory for two parts
# cache_mib = 256               # memory of what the enclaves read

[store.keep]                    # how long what is no longer needed is kept
# uploads_s = 2592000.0         # tables after the last release of their agreement, or its end; 0: for ever
# bundles_s = 0.0               # bundles after their release; 0: for ever
# parts_s = 604800.0            # what interrupted writing left
# every_s = 3600.0              # how often that is looked at

[cluster]                       # several coordinators over one PostgreSQL and one bucket, with one TLS key
# node = ""                     # the machine whose enclaves are reached; left out: a name kept in the launcher's folder
# address = ""                  # where others pass calls on to; left out: `listen`, or this machine's name
# lease_s = 10.0                # how long a session waits for another coordinator, when its own has died
# abandon_s = 600.0             # after that, for one on its own machine

[launcher]
kind = "local"                  # local: a process with a simulated NSM, which protects nothing | qemu: an image in an emulator | nitro
enclaves = 4                    # at a time; more get `no-capacity`

[launcher.local]
root = "root"                   # folder of the local root that certifies the simulated NSM
# workers = 2                   # worker processes of an enclave; left out: one for each CPU
# command = ["python", "-m", "parley_deploy.enclave", "--root", "root"]   # gets --dir and --agreement-hint behind it
# folder = "enclaves"           # one folder for each enclave, with its socket: a path of less than 108 bytes
# start_s = 60.0

[launcher.qemu]                 # for kind = "qemu"
# image = "parley.eif"
# root = "root"                 # folder of the local root that certifies the emulated NSM
# memory_mib = 2048
# cpus = 2
# accel = "auto"                # auto | kvm | tcg
# command = ["python", "-m", "parley_deploy.emulator", "--image", "parley.eif", "--root", "root"]   # instead of the five above
# folder = "machines"
# start_s = 300.0

[launcher.nitro]                # for kind = "nitro"
# image = "parley.eif"
# memory_mib = 2048             # at least 4 times the image
# cpus = 2                      # whole cores: an even number where a core has two threads
# command = ["nitro-cli"]
# debug = false                 # the host reads the console, and documents prove nothing; for simulated agreements only
# name = "parley"               # begins the names of this coordinator's enclaves
# port = 5005                   # vsock port at which the enclave listens
# folder = "nitro"              # one file for each enclave
# attempts = 3
# pause_s = 5.0                 # between two attempts
# start_s = 240.0               # for one; nitro-cli itself waits 180 s for the heartbeat of an image below 6 GiB
# call_s = 30.0                 # for every other call of nitro-cli

[quota]                         # for one member key
# bytes_per_member = 274877906944
# uploads_per_table = 64
# agreements_per_member = 1000
# watches_per_member = 32
# calls_per_member = 256        # at a time, streams included

[deadline]                      # what the enclave may take; the last three: a caller
# short_s = 30.0
# join_s = 21600.0
# compute_s = 86400.0
# status_s = 1.0
# handshake_s = 10.0            # to connect
# request_s = 30.0              # to send a request
# idle_s = 300.0                # between two messages of an upload

[telemetry]
# metrics = ""                  # address:port at which Prometheus may ask; left out: nowhere
# otlp = ""                     # http://HOST:PORT of an OpenTelemetry collector; needs the extra `telemetry`

[kms]                           # for agreements whose parties keep their keys under KMS
# endpoint = ""                 # https://... in place of AWS's: of a VPC, or of an emulator
# sts_endpoint = ""
# session = "parley-coordinator"   # names the sessions of assumed roles in the accounts' logs
# connect_s = 5.0
# read_s = 10.0
# attempts = 4                  # of one call, with pauses that grow and are random
#
# [kms.account.111122223333]    # how the keys of this account are asked for; left out: with what the machine has.
#                               # Its fields, all texts: `role` (an ARN, which is assumed) with `external_id`, or
#                               # `profile` (of AWS's configuration file); `endpoint`

[log]
level = "info"                  # debug | info | warning | error
"""
"""What `parley-coordinator init` writes."""
