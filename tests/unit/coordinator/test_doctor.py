"""The doctor: every check on a machine that is well, and on one where just this is wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from sqlalchemy import Connection, text

from parley_coordinator import config as configuration
from parley_coordinator import doctor, doctor_host, doctor_store, doctor_system, migrations, tls
from parley_coordinator import store as db
from parley_coordinator.__main__ import main
from parley_coordinator.config import Config
from parley_coordinator.doctor_system import Check, System, Verdict
from parley_coordinator.models import REVISION
from parley_coordinator.store import Store
from parley_protocol import measurement
from support import postgres, s3
from support.nitro_host import NitroHost, tiny_image

NOW = datetime(2027, 1, 15, 12, tzinfo=UTC)
OK, WARN, FAIL, SKIP = Verdict.OK, Verdict.WARN, Verdict.FAIL, Verdict.SKIP


class Parent:
    """A Nitro parent in a folder, well in all its parts, and a coordinator that is configured for it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "machine"
        self.write("/sys/class/dmi/id/sys_vendor", "Amazon EC2\n")
        self.write("/sys/class/dmi/id/product_name", "m6i.2xlarge\n")
        self.write("/sys/module/nitro_enclaves/parameters/ne_cpus", "2-5,8-11\n")
        self.write("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list", "0,4\n")
        for node in ("node0", "node1"):
            self.pages(node, "2048", 4096 if node == "node0" else 0)
            self.pages(node, "1048576", 0)
        self.write("/etc/nitro_enclaves/allocator.yaml", "---\n# memory\nmemory_mib: 8192\ncpu_count: 8\n")
        for name in ("/dev/nitro_enclaves", "/dev/vsock", "/dev/kvm"):
            self.write(name, "")
        for name in ("/run/nitro_enclaves", "/var/log/nitro_enclaves"):
            (self.root / name.lstrip("/")).mkdir(parents=True)
        self.system = System(
            root=self.root,
            now=lambda: NOW,
            machine="x86_64",
            which=lambda name: f"/usr/bin/{name}",
            synchronised=lambda: True,
            local_cid=lambda device: 3,
            environ={"HOME": str(folder / "home")},
            user=os.geteuid(),
            files=65536,
            free=lambda folder: 64 << 30,
        )
        place = folder / "c"
        tls.make(place / "tls.crt", place / "tls.key", ["relay.example.org"], NOW)
        place.chmod(0o700)
        tiny_image(place / "parley.eif")
        tree = {
            "launcher": {"kind": "nitro", "nitro": {"command": ["echo", "Nitro CLI 1.5.0"]}},
            "listen": "127.0.0.1:0",
        }
        self.config = configuration.from_tree(tree, place)

    def write(self, name: str, text: str) -> None:
        """A file of the machine."""
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def remove(self, name: str) -> None:
        """Without it."""
        path = self.root / name.lstrip("/")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def pages(self, node: str, size: str, total: int, free: int | None = None) -> None:
        """Huge pages of a node."""
        place = f"/sys/devices/system/node/{node}/hugepages/hugepages-{size}kB"
        self.write(f"{place}/nr_hugepages", f"{total}\n")
        self.write(f"{place}/free_hugepages", f"{total if free is None else free}\n")

    def nitro(self, **changed: Any) -> Config:
        """The configuration with another launcher.nitro."""
        return replace(self.config, nitro=replace(self.config.nitro, **changed))


@pytest.fixture
def parent(tmp_path: Path) -> Parent:
    return Parent(tmp_path)


def find(checks: list[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def examined(parent: Parent, name: str, config: Config | None = None) -> Check:
    found = find(doctor.examine(config or parent.config, parent.system), name)
    assert bool(found.do) == (found.verdict in (WARN, FAIL)), "what is not well says what to do, and nothing else does"
    return found


def test_a_machine_that_is_well(parent: Parent) -> None:
    checks = doctor.examine(parent.config, parent.system)
    assert [check.name for check in checks if check.verdict is not OK] == []
    assert [check.name for check in checks] == [
        "versions",
        "clock",
        "instance",
        "driver",
        "device",
        "nitro-folders",
        "allocator",
        "huge-pages",
        "cpus",
        "nitro-cli",
        "vsock",
        "owner",
        "image",
        "memory",
        "folder",
        "blobs",
        "space",
        "database",
        "tls-key",
        "tls-certificate",
        "listen",
        "open-files",
    ]
    assert "room for 4 of 4 enclaves" in find(checks, "allocator").found
    with parent.config.nitro.image.open("rb") as file:
        assert f"PCR2={measurement.measure(file).pcrs[2].hex()}" in find(checks, "image").found


@pytest.mark.parametrize(
    ("name", "file", "text", "verdict", "said"),
    [
        ("instance", "/sys/class/dmi/id/sys_vendor", "QEMU", FAIL, "its vendor is QEMU"),
        ("instance", "/sys/class/dmi/id/sys_vendor", "Xen", FAIL, "not a Nitro-based"),
        ("instance", "/sys/class/dmi/id/product_name", "m5.metal", FAIL, "m5.metal cannot have enclaves"),
        ("instance", "/sys/class/dmi/id/product_name", "m7i.metal-24xl", FAIL, "cannot have enclaves"),
        ("instance", "/sys/class/dmi/id/product_name", "t3.large", FAIL, "t3.large cannot have enclaves"),
        ("instance", "/sys/class/dmi/id/product_name", "trn1.2xlarge", OK, "trn1.2xlarge"),
        ("instance", "/sys/class/dmi/id/sys_vendor", None, FAIL, "unknown"),
        ("driver", "/sys/module/nitro_enclaves", None, FAIL, "not loaded"),
        ("device", "/dev/nitro_enclaves", None, FAIL, "is not there"),
        ("nitro-folders", "/run/nitro_enclaves", None, FAIL, "/run/nitro_enclaves is not there"),
        ("nitro-folders", "/var/log/nitro_enclaves", None, FAIL, "/var/log/nitro_enclaves is not there"),
        ("allocator", "/etc/nitro_enclaves/allocator.yaml", None, FAIL, "is not there"),
        ("cpus", "/sys/module/nitro_enclaves/parameters/ne_cpus", "\n", FAIL, "a pool of 0"),
        ("cpus", "/sys/module/nitro_enclaves/parameters/ne_cpus", "x", FAIL, "cannot be read"),
        ("vsock", "/dev/vsock", None, FAIL, "is not there"),
    ],
)
def test_what_the_machine_lacks(
    parent: Parent, name: str, file: str, text: str | None, verdict: Verdict, said: str
) -> None:
    if text is None:
        parent.remove(file)
    else:
        parent.write(file, text)
    found = examined(parent, name)
    assert found.verdict is verdict and said in found.found


@pytest.mark.parametrize(
    ("text", "verdict", "said"),
    [
        ("---\nmemory_mib: 8192\ncpu_pool: 2-5,8-11\n", OK, "room for 4 of 4"),
        ("---\nmemory_mib: 4096\ncpu_count: 8\n", WARN, "room for 2 of 4"),
        ("---\nmemory_mib: 8192\ncpu_count: 2\n", WARN, "room for 1 of 4"),
        ("---\nmemory_mib: 512\ncpu_count: 2\n", FAIL, "room for 0 of 4"),
        ("memory_mib: 8192\ncpu_count: 8\n", FAIL, "no line `---`"),
        ("---\ncpu_count: 8\n", FAIL, "no memory_mib"),
        ("---\nmemory_mib: 8192\n", FAIL, "not one of cpu_count and cpu_pool"),
        ("---\nmemory_mib: 8192\ncpu_count: 8\ncpu_pool: 2-9\n", FAIL, "not one of cpu_count and cpu_pool"),
        ("---\nmemory_mib: 8 GiB\ncpu_count: 8\n", FAIL, "no whole number"),
        ("---\nmemory: 8192\n", FAIL, "line 2"),
        ("---\nmemory_mib:\n", FAIL, "line 2"),
    ],
)
def test_the_allocator_has_room_or_not(parent: Parent, text: str, verdict: Verdict, said: str) -> None:
    parent.write("/etc/nitro_enclaves/allocator.yaml", text)
    found = examined(parent, "allocator")
    assert found.verdict is verdict and said in found.found


def test_huge_pages_are_of_one_node(parent: Parent) -> None:
    for node in ("node0", "node1"):
        parent.pages(node, "2048", 800)
    found = examined(parent, "huge-pages")
    assert found.verdict is FAIL and "node0: 1600 MiB, 1600 MiB free" in found.found
    parent.pages("node1", "1048576", 1)
    assert examined(parent, "huge-pages").verdict is OK


def test_huge_pages_that_are_in_use_are_no_fault(parent: Parent) -> None:
    parent.pages("node0", "2048", 4096, 10)
    found = examined(parent, "huge-pages")
    assert found.verdict is WARN and "8192 MiB, 20 MiB free" in found.found
    parent.remove("/sys/devices/system/node")
    assert examined(parent, "huge-pages").verdict is FAIL


def test_enclaves_take_whole_cores(parent: Parent) -> None:
    found = examined(parent, "cpus", parent.nitro(cpus=3))
    assert found.verdict is FAIL and "multiple of 2" in found.do
    parent.write("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list", "0")
    assert examined(parent, "cpus", parent.nitro(cpus=3)).verdict is OK
    assert examined(parent, "cpus", parent.nitro(cpus=9)).verdict is FAIL


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("device", "dev/nitro_enclaves"),
        ("nitro-folders", "run/nitro_enclaves"),
        ("nitro-folders", "log/nitro_enclaves"),
    ],
)
def test_what_the_user_may_not_use(parent: Parent, name: str, path: str) -> None:
    parent.system = replace(parent.system, access=lambda file, mode: not str(file).endswith(path))
    found = examined(parent, name)
    assert found.verdict is FAIL and "ne" in found.do


def test_nitro_cli_runs_or_not(parent: Parent, tmp_path: Path) -> None:
    host = NitroHost(tmp_path / "host")
    assert examined(parent, "nitro-cli", parent.nitro(command=host.command)).found == "Nitro CLI 1.5.0"
    found = examined(parent, "nitro-cli", parent.nitro(command=("no-such-nitro-cli",)))
    assert found.verdict is FAIL and "install nitro-cli" in found.do
    slow = (sys.executable, "-c", "import time; time.sleep(60)")
    assert examined(parent, "nitro-cli", parent.nitro(command=slow, call_s=0.5)).verdict is FAIL


@pytest.mark.parametrize(("cid", "verdict"), [(3, OK), (2, FAIL), (None, WARN)])
def test_a_parent_is_cid_3(parent: Parent, cid: int | None, verdict: Verdict) -> None:
    parent.system = replace(parent.system, local_cid=lambda device: cid)
    assert examined(parent, "vsock").verdict is verdict


def test_the_image_is_there_whole_and_small_enough(parent: Parent) -> None:
    image = parent.config.nitro.image
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    assert "CRC" in examined(parent, "image").found
    image.unlink()
    found = examined(parent, "image")
    assert found.verdict is FAIL and "launcher.nitro.image" in found.do
    tiny_image(image, size=20 << 20)
    assert examined(parent, "memory", parent.nitro(memory_mib=80)).found.endswith("the image needs 81")
    assert examined(parent, "memory", parent.nitro(memory_mib=80)).verdict is FAIL
    assert examined(parent, "memory", parent.nitro(memory_mib=81)).verdict is OK


def test_an_image_for_another_machine(parent: Parent) -> None:
    parent.system = replace(parent.system, machine="aarch64")
    assert examined(parent, "image-machine").verdict is FAIL
    # The emulator has a machine of its own.
    emulated = configuration.from_tree({"launcher": {"kind": "qemu"}}, parent.config.folder)
    assert "image-machine" not in [check.name for check in doctor.examine(emulated, parent.system)]


def test_debug_mode_is_told(parent: Parent) -> None:
    assert examined(parent, "debug", parent.nitro(debug=True)).verdict is WARN


def _image(**changed: Any) -> Callable[[Any], measurement.Image]:
    image = measurement.Image(
        pcrs={0: b"0" * 48, 1: b"1" * 48, 2: b"2" * 48},
        version=4,
        architecture=measurement.Architecture.X86_64,
        memory_bytes=1 << 30,
        cpus=2,
        size=1000,
        sections=(),
        cmdline=b"",
        metadata=None,
        certificate=None,
    )
    return lambda file: replace(image, **changed)


def test_an_image_of_one_ramdisk_is_told(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    pcrs = {0: b"0" * 48, 1: b"1" * 48, 2: measurement.EMPTY_PCR}
    monkeypatch.setattr(measurement, "measure", _image(pcrs=pcrs))
    assert examined(parent, "image-parts").verdict is WARN


@pytest.mark.parametrize(
    ("begins", "ends", "verdict"),
    [(-10, 90, OK), (-10, 20, WARN), (-10, -1, FAIL), (1, 90, FAIL)],
)
def test_the_signature_of_the_image_has_an_end(
    parent: Parent, monkeypatch: pytest.MonkeyPatch, begins: int, ends: int, verdict: Verdict
) -> None:
    times = [int((NOW + timedelta(days=days)).timestamp() * 1000) for days in (begins, ends)]
    certificate = measurement.SigningCertificate(b"", "CN=signer", "CN=signer", "P-384", *times)
    monkeypatch.setattr(measurement, "measure", _image(certificate=certificate))
    found = examined(parent, "image-signature")
    assert found.verdict is verdict and "CN=signer" in found.found


@pytest.mark.parametrize(
    ("now", "kept", "verdict", "said"),
    [
        (NOW, True, OK, "2027-01-15T12:00:00Z, synchronised"),
        (NOW, False, WARN, "not synchronised"),
        (NOW, None, SKIP, "does not tell"),
        (datetime(1970, 1, 1, tzinfo=UTC), True, FAIL, "it is not set"),
        (datetime(2105, 1, 1, tzinfo=UTC), True, FAIL, "it is not set"),
    ],
)
def test_the_clock(parent: Parent, now: datetime, kept: bool | None, verdict: Verdict, said: str) -> None:
    found = doctor.clock(replace(parent.system, now=lambda: now, synchronised=lambda: kept))
    assert found.verdict is verdict and said in found.found


def test_a_clock_of_which_only_systemd_tells(parent: Parent) -> None:
    parent.write("/run/systemd/timesync/synchronized", "")
    assert doctor.clock(replace(parent.system, synchronised=lambda: None)).verdict is OK


def test_the_kernel_and_the_device_are_really_asked() -> None:
    assert doctor_system.synchronised() in (True, False, None)
    cid = doctor_system.local_cid(Path("/dev/vsock"))
    assert cid is None or 0 <= cid < 2**32
    assert doctor_system.local_cid(Path("/dev/null")) is None


def test_folders_are_private_and_can_be_written(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined(parent, "blobs").found.endswith("can be made")
    parent.config.blobs.mkdir(mode=0o755)
    parent.config.blobs.chmod(0o755)
    assert examined(parent, "blobs-mode").verdict is WARN
    assert examined(parent, "folder").found.endswith("can be written and synced")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.os, "fsync", full)
    found = examined(parent, "folder")
    assert found.verdict is FAIL and "No space left" in found.found


def room(parent: Parent, free: int) -> Check:
    return doctor.space(parent.config, replace(parent.system, free=lambda folder: free))


def test_room_is_measured_where_the_blobs_are(parent: Parent) -> None:
    asked: list[Path] = []

    def free(folder: Path) -> int:
        asked.append(folder)
        return 5 << 30

    assert doctor.space(parent.config, replace(parent.system, free=free)).found.startswith("5 GiB free;")
    assert asked == [parent.config.folder], "the nearest folder that is there"
    assert doctor_system.free(parent.root) > 0


@pytest.mark.parametrize(("free", "verdict"), [(1 << 20, FAIL), (3 << 30, WARN), (5 << 30, OK)])
def test_room_to_begin(parent: Parent, free: int, verdict: Verdict) -> None:
    assert room(parent, free).verdict is verdict
    assert not (parent.config.folder / "coordinator.db").exists(), "the doctor makes nothing"


def test_room_for_what_is_begun_and_for_the_largest_table_once_more(parent: Parent) -> None:
    uploads = [(b"1", 9 << 30, 2 << 30, None), (b"2", 12 << 30, 12 << 30, 5), (b"3", 1 << 30, 0, None)]
    store = Store(parent.config.database)
    with closing(sqlite3.connect(parent.config.folder / "coordinator.db")) as connection, connection:
        # Without their agreement: a connection of its own asks for no foreign keys.
        connection.executemany(
            "INSERT INTO uploads (digest, size, stored, complete_ms, agreement, party, table_name, cose, owner, begun_ms)"
            " VALUES (?, ?, ?, ?, x'', '', '', x'', x'', 1)",
            uploads,
        )
    # Of those that are begun 7 GiB and 1 GiB are missing, and the largest has 12.
    for free, verdict in (((20 << 30) - 1, WARN), (20 << 30, OK)):
        found = room(parent, free)
        assert found.verdict is verdict
        assert "begun lack 8 GiB, the largest one has 12 GiB" in found.found
    store.close()
    assert room(parent, 20 << 30).found == found.found


def test_the_user_is_the_one_whose_enclaves_they_are(parent: Parent) -> None:
    assert examined(parent, "owner").found.startswith("enclaves will belong to ")
    folder = parent.config.nitro.folder
    folder.mkdir()
    entry = {"agreement": "ab", "begun_ms": 1, "id": "i-0-enc0aa", "cid": 16, "doomed": False}
    (folder / f"parley-00000000-{'0' * 16}.json").write_text(json.dumps(entry))
    (folder / f"parley-00000000-{'1' * 16}.json").write_text(json.dumps({**entry, "id": ""}))
    for name in ("0aa", "0bb"):
        parent.write(f"/run/nitro_enclaves/{name}.sock", "")

    def check(user: int, owners: dict[Path, int]) -> Check:
        system = replace(parent.system, user=user, owner=lambda path: owners.get(path))
        return doctor_host.owner(parent.config.nitro, system)

    ours, foreign = (parent.system.path(f"/run/nitro_enclaves/{name}.sock") for name in ("0aa", "0bb"))
    mine = {folder: 70001, ours: 70001, foreign: 70002}
    assert check(70001, mine).verdict is OK
    assert check(0, mine) == Check("owner", OK, "the enclaves belong to user 70001")
    found = check(70002, mine)
    assert found.verdict is FAIL
    assert found.found.endswith("belong to user 70001; this is user 70002")
    assert found.do.startswith("run the coordinator, and this, as user 70001:")
    # The folder was given to another user while an enclave runs.
    assert check(70001, {**mine, ours: 70003}).verdict is FAIL
    assert doctor_system.owner(folder) == os.geteuid() and doctor_system.owner(folder / "none") is None


def test_the_database_opens(parent: Parent) -> None:
    assert examined(parent, "database").found.endswith("will be made")
    Store(parent.config.database).close()
    assert "opens" in examined(parent, "database").found
    path = parent.config.folder / "coordinator.db"
    assert sorted(file.name for file in path.parent.glob("coordinator.db*")) == ["coordinator.db"]
    open_elsewhere = Store(parent.config.database)
    assert "opens" in examined(parent, "database").found
    open_elsewhere.close()
    path.write_bytes(b"no database at all" * 100)
    assert examined(parent, "database").verdict is FAIL


def test_a_database_of_before_and_one_of_after(parent: Parent) -> None:
    path = parent.config.folder / "coordinator.db"
    vector = Path(__file__).resolve().parent.parent.parent / "vectors" / "coordinator_v1.sql"
    with sqlite3.connect(path) as connection:
        connection.executescript(vector.read_text("utf-8"))
    connection.close()
    found = examined(parent, "database")
    assert (found.verdict, f"tables of revision 0001, which the start brings to {REVISION}" in found.found) == (
        OK,
        True,
    )
    Store(parent.config.database).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    found = examined(parent, "database")
    assert (found.verdict, found.do) == (FAIL, "update this program")


def test_a_postgresql(parent: Parent) -> None:
    with postgres.cluster(fsync=True) as own:
        config = replace(parent.config, database=own.database())
        found = examined(parent, "database", config)
        assert (found.verdict, found.do) == (FAIL, "parley-coordinator migrate")
        assert "no tables" in found.found
        migrations.migrate(config.database)
        found = examined(parent, "database", config)
        assert (found.verdict, f"tables of revision {REVISION}" in found.found) == (OK, True)
        own.execute("UPDATE alembic_version SET version_num = '9999'", config.database.split("/")[3].split("?")[0])
        assert examined(parent, "database", config).do == "update this program"


def test_who_looks_at_a_postgresql_is_no_coordinator(
    parent: Parent, cluster: postgres.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that `migrate` goes on beside it."""
    config, revision = replace(parent.config, database=cluster.migrated()), db.revision
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = '{}'"
    seen: list[int] = []

    def look(connection: Connection) -> str | None:
        seen.append(connection.execute(text(query.format(db.APPLICATION))).scalar_one())
        return revision(connection)

    monkeypatch.setattr(db, "revision", look)
    assert "answers" in examined(parent, "database", config).found
    assert seen == [0]
    assert doctor_store.rows(config, query.format(db.APPLICATION)) == [(0,)]


def test_a_postgresql_that_forgets(parent: Parent, cluster: postgres.Cluster) -> None:
    found = examined(parent, "database", replace(parent.config, database=cluster.migrated()))
    assert (found.verdict, found.do) == (FAIL, "set fsync = on in postgresql.conf")


def test_a_bucket(parent: Parent) -> None:
    with s3.server() as url:
        found = examined(parent, "bucket", replace(parent.config, s3=s3.bucket(url)))
        assert (found.verdict, "written, read, deleted from and listed" in found.found) == (OK, True)
        missing = replace(s3.bucket(url), bucket="parley-none")
        found = examined(parent, "bucket", replace(parent.config, s3=missing))
        assert (found.verdict, "parley-none cannot be opened" in found.found) == (FAIL, True)
        away = replace(missing, endpoint_url="http://127.0.0.1:1")
        found = examined(parent, "bucket", replace(parent.config, s3=away))
        assert (found.verdict, "EndpointConnectionError" in found.found) == (FAIL, True)


def test_a_database_by_url_keeps_its_password(parent: Parent) -> None:
    url = "postgresql+psycopg://relay:secret@127.0.0.1:1/parley?connect_timeout=2"
    found = examined(parent, "database", replace(parent.config, database=url))
    assert found.verdict is FAIL and "secret" not in found.found + found.do
    assert examined(parent, "database", replace(parent.config, database="nodb://secret@x")).verdict is FAIL


def test_the_key_is_this_users_alone(parent: Parent) -> None:
    key = parent.config.key
    key.chmod(0o640)
    assert "mode 0640" in examined(parent, "tls-key").found
    key.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(key, 4321, 4321)
    assert examined(parent, "tls-key").verdict is OK
    other = replace(parent.system, user=key.stat().st_uid + 1)
    assert "belongs to user" in doctor.key(parent.config, other).found
    second = parent.config.folder / "second"
    tls.make(second / "tls.crt", second / "tls.key", [], NOW)
    mixed = replace(parent.config, key=second / "tls.key")
    assert "not the key of tls.certificate" in examined(parent, "tls-key", mixed).found
    key.write_bytes(b"-----BEGIN NOTHING-----\n")
    assert "no private key" in examined(parent, "tls-key").found
    key.unlink()
    assert "parley-coordinator init" in examined(parent, "tls-key").do


def _certificate(path: Path, key: Path, begins: datetime, ends: datetime, *names: str) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(private.public_key())
    builder = builder.serial_number(1).not_valid_before(begins).not_valid_after(ends)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False)
    path.write_bytes(builder.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM))
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@pytest.mark.parametrize(
    ("begins", "ends", "names", "verdict", "said"),
    [
        (-1, 400, ("relay.example.org",), OK, "for relay.example.org"),
        (-1, 20, ("relay.example.org",), WARN, "until 2027-02-04"),
        (-9, -1, ("relay.example.org",), FAIL, "not valid now"),
        (1, 400, ("relay.example.org",), FAIL, "not valid now"),
        (-1, 400, (), FAIL, "for no name"),
    ],
)
def test_the_certificate_is_valid_and_has_names(
    parent: Parent, begins: int, ends: int, names: tuple[str, ...], verdict: Verdict, said: str
) -> None:
    times = [NOW + timedelta(days=days) for days in (begins, ends)]
    _certificate(parent.config.certificate, parent.config.key, times[0], times[1], *names)
    found = examined(parent, "tls-certificate")
    assert found.verdict is verdict and said in found.found


def test_a_certificate_that_is_none(parent: Parent) -> None:
    parent.config.certificate.write_text("x")
    assert examined(parent, "tls-certificate").verdict is FAIL
    parent.config.certificate.unlink()
    assert "parley-coordinator init" in examined(parent, "tls-certificate").do


@pytest.fixture
def busy() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_a_port_that_another_program_holds(parent: Parent, busy: socket.socket) -> None:
    threading.Thread(target=lambda: busy.accept()[0].close(), daemon=True).start()
    config = replace(parent.config, listen=f"127.0.0.1:{busy.getsockname()[1]}")
    found = examined(parent, "listen", config)
    assert found.verdict is FAIL and "held by another program" in found.found


@pytest.mark.parametrize("own", [True, False])
def test_a_port_that_a_coordinator_holds(parent: Parent, busy: socket.socket, own: bool) -> None:
    place = parent.config.folder if own else parent.config.folder / "other"
    if not own:
        tls.make(place / "tls.crt", place / "tls.key", [], NOW)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "tls.crt", place / "tls.key")

    def serve() -> None:
        with context.wrap_socket(busy.accept()[0], server_side=True) as connection:
            connection.recv(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    found = examined(parent, "listen", replace(parent.config, listen=f"127.0.0.1:{busy.getsockname()[1]}"))
    thread.join(timeout=30)
    said = "held by this coordinator" if own else "held by a server with another key"
    assert found.verdict is (OK if own else FAIL) and said in found.found


@pytest.mark.parametrize("text", ["127.0.0.1", ":7443", "127.0.0.1:70000", "127.0.0.1:x"])
def test_a_port_that_is_none(parent: Parent, text: str) -> None:
    found = examined(parent, "listen", replace(parent.config, listen=text))
    assert found.verdict is FAIL and "no address:port" in found.found


def test_an_address_that_is_not_of_this_machine(parent: Parent) -> None:
    assert examined(parent, "listen", replace(parent.config, listen="192.0.2.1:7443")).verdict is FAIL


@pytest.mark.parametrize(("files", "verdict"), [(1024, WARN), (5119, WARN), (5120, OK), (-1, OK)])
def test_open_files_for_all_calls(parent: Parent, files: int, verdict: Verdict) -> None:
    parent.system = replace(parent.system, files=files)
    assert examined(parent, "open-files").verdict is verdict


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("grpcio", "no-such-library"))
    found = doctor.versions()
    assert found.verdict is FAIL and "no-such-library is not installed" in found.found


def test_the_emulator_needs_qemu_and_a_root(parent: Parent, tmp_path: Path) -> None:
    tree = {"launcher": {"kind": "qemu"}}
    config = configuration.from_tree(tree, parent.config.folder)
    assert examined(parent, "qemu", config).found == "/usr/bin/qemu-system-x86_64"
    assert examined(parent, "image", config).verdict is OK
    assert examined(parent, "root", config).verdict is FAIL
    root = parent.config.folder / "root"
    root.mkdir()
    (root / "root.pem").write_text("")
    assert examined(parent, "root", config).verdict is OK
    parent.system = replace(parent.system, which=lambda name: None)
    assert "python -m parley_deploy.emulator.qemu" in examined(parent, "qemu", config).do
    kept = tmp_path / "home/.cache/parley/qemu"
    kept.mkdir(parents=True)
    (kept / "ready.json").write_text("{}")
    assert examined(parent, "qemu", config).found == str(kept)
    parent.remove("/dev/kvm")
    parent.system = replace(parent.system, access=lambda file, mode: file.exists())
    assert examined(parent, "kvm", config).verdict is WARN


def test_the_simulation_needs_its_package_and_a_root(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration.from_tree({}, parent.config.folder)
    assert examined(parent, "root", config).verdict is FAIL
    own = replace(config, local=replace(config.local, command=("my-enclave",)))
    assert examined(parent, "root", own).verdict is SKIP
    monkeypatch.setattr(doctor_host.importlib.util, "find_spec", lambda name: None)
    found = examined(parent, "launcher", config)
    assert found.verdict is FAIL and "parley_deploy is not installed" in found.found


def test_the_report_says_what_to_do_under_each_line() -> None:
    checks = [Check("a", OK, "well"), Check("b", FAIL, "not well", "mend it"), Check("c", SKIP, "not looked at")]
    assert doctor.report(checks, as_json=False).splitlines() == [
        "ok    a               well",
        "fail  b               not well",
        "                      -> mend it",
        "skip  c               not looked at",
    ]
    told = json.loads(doctor.report(checks, as_json=True))
    assert told["failed"] == 1
    assert told["checks"][1] == {"name": "b", "verdict": "fail", "found": "not well", "do": "mend it"}


def test_the_exit_code_says_whether_something_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--dir", str(tmp_path), "--listen", "127.0.0.1:0"]) == 0
    capsys.readouterr()
    assert main(["doctor", "--dir", str(tmp_path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in told["checks"] if check["verdict"] == "fail"] == ["root"]
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "root.pem").write_text("")
    assert main(["doctor", "--config", str(tmp_path / "coordinator.toml")]) == 0
    assert "-> " not in capsys.readouterr().out.split("tls-key")[1].split("\n")[0]
    assert main(["doctor", "--dir", str(tmp_path / "none")]) == 2


def test_it_changes_nothing(parent: Parent) -> None:
    Store(parent.config.database).close()
    place = parent.config.folder
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    doctor.examine(parent.config, parent.system)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == before
