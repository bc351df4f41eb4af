"""The parent instance's files: the systemd unit, the user, and the script of the first boot, which is run for real with
stand-ins for the programs that would change this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from parley_coordinator import __main__ as coordinator
from parley_coordinator import migrations, store
from parley_coordinator.config import defaults
from parley_coordinator.models import REVISION, Operator
from support import postgres
from support.postgres import Cluster

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
UNIT = DEPLOY / "systemd" / "parley-coordinator.service"
SETUP = DEPLOY / "terraform" / "modules" / "bootstrap" / "setup.sh"
EXPOSURE = 25
"""systemd's own score of how much a service could do, in tenths: 96 is a service without any care."""


# systemd


def settings(text: str) -> dict[str, list[str]]:
    """The assignments of a unit by name, in order."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            found.setdefault(name, []).append(value)
    return found


def weaknesses(text: str) -> list[str]:
    """What is wrong with the coordinator's unit, in words."""
    unit, config = settings(text), defaults(Path())

    def is_(name: str, *values: str) -> bool:
        return unit.get(name) == list(values)

    rules = {
        "root, or a user that does not stay": is_("User", "parley") and "DynamicUser" not in unit,
        "no access to the enclaves' device": is_("SupplementaryGroups", "ne"),
        "the device is hidden": "PrivateDevices" not in unit
        and set(unit.get("DeviceAllow", ())) == {"/dev/nitro_enclaves rw", "/dev/vsock rw"}
        and is_("DevicePolicy", "closed"),
        "no vsock": "AF_VSOCK" in " ".join(unit.get("RestrictAddressFamilies", ())).split(),
        "it can gain privileges": is_("NoNewPrivileges", "yes") and is_("CapabilityBoundingSet", ""),
        "it can write anywhere": is_("ProtectSystem", "strict") and is_("StateDirectory", "parley"),
        "nitro-cli cannot write its log": is_("ReadWritePaths", "-/run/nitro_enclaves -/var/log/nitro_enclaves"),
        "a stop kills the enclaves": is_("KillMode", "process"),
        "a stop does not wait for running calls": is_("KillSignal", "SIGTERM")
        and float(unit["TimeoutStopSec"][0]) > config.grace_s + 5,
        "it does not start again": is_("Restart", "on-failure"),
        "it does not wait for the allocator": all(
            "nitro-enclaves-allocator.service" in unit.get(name, [""])[0].split()
            and "network-online.target" in unit[name][0].split()
            for name in ("After", "Wants")
        ),
        "it may start before its volume": is_("RequiresMountsFor", "/var/lib/parley"),
        "too few files": int(unit.get("LimitNOFILE", ["0"])[0]) >= 2 * config.rpcs,
        "others read its files": is_("UMask", "0077") and is_("StateDirectoryMode", "0700") and is_("LimitCORE", "0"),
        "a doctor's finding stops it, or tables that do not fit do not": [
            each.split()[:2] for each in unit.get("ExecStartPre", [])
        ]
        == [["/opt/parley/bin/parley-coordinator", "migrate"], ["-/opt/parley/bin/parley-coordinator", "doctor"]],
        "it gives up while its database is away": is_("StartLimitIntervalSec", "0"),
        "a migration is cut off": float(unit.get("TimeoutStartSec", ["90"])[0]) >= 10 * store.BUSY_S,
    }
    return [weakness for weakness, holds in rules.items() if not holds]


def test_the_unit_is_as_it_should_be() -> None:
    assert weaknesses(UNIT.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new", "weakness"),
    [
        ("User=parley", "DynamicUser=yes", "a user that does not stay"),
        ("SupplementaryGroups=ne\n", "", "no access"),
        ("NoNewPrivileges=yes", "NoNewPrivileges=no", "gain privileges"),
        ("DevicePolicy=closed", "PrivateDevices=yes", "the device is hidden"),
        ("DeviceAllow=/dev/vsock rw", "DeviceAllow=/dev/mem rw", "the device is hidden"),
        (" AF_VSOCK", "", "no vsock"),
        ("ProtectSystem=strict", "ProtectSystem=full", "write anywhere"),
        ("KillMode=process\n", "", "kills the enclaves"),
        ("TimeoutStopSec=60", "TimeoutStopSec=10", "does not wait for running calls"),
        ("ExecStartPre=-", "ExecStartPre=", "doctor's finding"),
        ("parley-coordinator migrate", "parley-coordinator digest", "tables that do not fit"),
        ("StartLimitIntervalSec=0", "StartLimitIntervalSec=300", "gives up"),
        ("TimeoutStartSec=600\n", "", "cut off"),
        ("After=network-online.target nitro-enclaves-allocator.service", "After=network.target", "the allocator"),
        ("UMask=0077", "UMask=0022", "others read"),
        ("LimitNOFILE=65536", "LimitNOFILE=1024", "too few files"),
    ],
)
def test_a_weak_unit_is_seen(old: str, new: str, weakness: str) -> None:
    text = UNIT.read_text("utf-8")
    assert old in text
    assert any(weakness in line for line in weaknesses(text.replace(old, new)))


def test_the_unit_runs_commands_that_exist() -> None:
    unit = settings(UNIT.read_text("utf-8"))
    for line in (*unit["ExecStartPre"], *unit["ExecStart"]):
        program, *arguments = line.removeprefix("-").split()
        assert program == "/opt/parley/bin/parley-coordinator"
        options = coordinator._parser().parse_args(arguments)
        assert options.dir == Path("/var/lib/parley")


def systemd(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs one of systemd's tools; skips where it is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program.upper()} IS NOT ON THIS MACHINE: systemd does not judge the files")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists here."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text("utf-8").replace("/opt/parley/bin/parley-coordinator", "/bin/true"), "utf-8")
    return path


def test_systemd_reads_the_backup(tmp_path: Path) -> None:
    for name in ("parley-backup.service", "parley-backup.timer"):
        text = (DEPLOY / "systemd" / name).read_text("utf-8")
        (tmp_path / name).write_text(text.replace("/usr/local/sbin/parley-backup", "/bin/true"), "utf-8")
    judged = systemd("systemd-analyze", "verify", *(str(path) for path in tmp_path.iterdir()))
    assert (judged.returncode, judged.stdout + judged.stderr) == (0, "")
    exposed = systemd(
        "systemd-analyze",
        "security",
        "--offline=yes",
        f"--threshold={EXPOSURE}",
        "--no-pager",
        str(tmp_path / "parley-backup.service"),
    )
    assert exposed.returncode == 0, exposed.stdout[-200:]


def test_systemd_reads_the_unit(unit: Path) -> None:
    judged = systemd("systemd-analyze", "verify", str(unit))
    assert (judged.returncode, judged.stdout + judged.stderr) == (0, "")
    unit.write_text(unit.read_text("utf-8").replace("ProtectSystem=", "ProtectSytem="), "utf-8")
    assert "ProtectSytem" in systemd("systemd-analyze", "verify", str(unit)).stderr


def test_systemd_finds_little_exposed(unit: Path) -> None:
    arguments = ("security", "--offline=yes", f"--threshold={EXPOSURE}", "--no-pager")
    judged = systemd("systemd-analyze", *arguments, str(unit))
    assert judged.returncode == 0, judged.stdout[-200:]
    text = unit.read_text("utf-8")
    unit.write_text(text.replace("CapabilityBoundingSet=\n", "").replace("NoNewPrivileges=yes", ""), "utf-8")
    assert systemd("systemd-analyze", *arguments, str(unit)).returncode != 0


def test_systemd_makes_the_user(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    made = systemd("systemd-sysusers", f"--root={tmp_path}", str(DEPLOY / "systemd" / "parley.sysusers"))
    assert made.returncode == 0, made.stderr
    [user] = [line for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith("parley:")]
    assert user.split(":")[5:] == ["/var/lib/parley", "/usr/sbin/nologin"]
    [group] = [line for line in (tmp_path / "etc/group").read_text().splitlines() if line.startswith("ne:")]
    assert group.split(":")[3] == "parley"


# The first boot

RECORD = 'echo "$(basename "$0") $*" >>"$LOG"\n'
STANDINS = {
    "systemd-sysusers": RECORD,
    "systemctl": RECORD,
    "mount": RECORD,
    "mkfs.xfs": RECORD,
    "chown": RECORD,
    "mountpoint": RECORD + "exit 1\n",
    "blkid": RECORD + 'exit "${BLKID:-2}"\n',
    # aws s3 cp --only-show-errors --region R s3://BUCKET/KEY TARGET
    "aws": RECORD + '[ "$1 $2 $4" = "s3 cp --region" ] && cp "$STORE/${6#s3://bucket/}" "$7"\n',
    # runuser -u parley -- COMMAND
    "runuser": RECORD + '[ "$1 $2 $3" = "-u parley --" ] && shift 3 && exec "$@"\n',
    # install -o parley -g parley -m MODE FROM TO, and install -D -m MODE FROM TO
    "install": RECORD
    + 'while [ $# -gt 2 ]; do [ "$1" = -m ] && mode=$2; shift; done; mkdir -p "$(dirname "$2")"; cp "$1" "$2"; chmod "$mode" "$2"\n',
    # python3.11 -m venv --clear FOLDER
    "python3.11": RECORD
    + '[ "$1 $2 $3" = "-m venv --clear" ] && rm -rf "$4" && mkdir -p "$4/bin" && cp "$BIN/pip" "$4/bin/python"\n',
    # FOLDER/bin/python -m pip install --no-index …: what the bundle's wheels would install
    "pip": RECORD + '[ "$1 $2 $3" = "-m pip install" ] && cp "$BIN/init" "$(dirname "$0")/parley-coordinator"\n',
    # parley-coordinator init --dir DIR --listen ADDRESS --name NAME
    "init": RECORD
    + '[ "$1 $2" = "init --dir" ] && mkdir -p "$3" && echo "kind = local" >"$3/coordinator.toml"'
    + ' && echo "key $RANDOM$RANDOM" | tee "$3/tls.key" >"$3/tls.crt"\n',
}


@dataclass
class Parent:
    """A machine in a folder, the bucket's objects in another, and what was called."""

    root: Path
    store: Path
    log: Path
    environment: dict[str, str]
    keep: sqlite3.Connection = field(init=False)

    def boot(self, **extra: str) -> subprocess.CompletedProcess[str]:
        """Runs the script; the log holds the calls of this run."""
        self.log.write_text("")
        return subprocess.run(
            ["bash", str(SETUP)], env=self.environment | extra, capture_output=True, text=True, check=False
        )

    def called(self, start: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(start)]


@pytest.fixture
def parent(tmp_path: Path) -> Parent:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STANDINS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}")
        (programs / name).chmod(0o755)
    store, root, device = tmp_path / "store", tmp_path / "root", tmp_path / "device"
    for folder in (store / "artefacts", root / "etc/parley", root / "etc/nitro_enclaves"):
        folder.mkdir(parents=True)
    device.write_text("not a device")
    (root / "etc/fstab").write_text("# none\n")
    (root / "etc/parley/coordinator.toml").write_text('[launcher]\nkind = "nitro"\n')
    (root / "etc/parley/allocator.yaml").write_text("---\nmemory_mib: 2048\ncpu_count: 2\n")
    (root / "etc/nitro_enclaves/allocator.yaml").write_text("---\nmemory_mib: 512\ncpu_count: 2\n")
    (store / "artefacts/image").write_bytes(b"an image")
    with tarfile.open(store / "artefacts/bundle", "w") as bundle:
        bundle.add(root / "etc/fstab", "parley-0.1.0-py3-none-any.whl")
    digests = {
        name: hashlib.sha384((store / f"artefacts/{name}").read_bytes()).hexdigest() for name in ("image", "bundle")
    }
    (root / "etc/parley/setup.env").write_text(
        f"REGION=eu-central-1\nBUCKET=bucket\nHOST_NAME=parley.example.org\nDEVICE={device}\n"
        f"IMAGE_KEY=artefacts/image\nIMAGE_SHA384={digests['image']}\n"
        f"BUNDLE_KEY=artefacts/bundle\nBUNDLE_SHA384={digests['bundle']}\n"
    )
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "ROOT": str(root),
        "STORE": str(store),
        "LOG": str(tmp_path / "log"),
        "BIN": str(programs),
    }
    return Parent(root, store, tmp_path / "log", environment)


def test_a_first_boot_makes_a_coordinator(parent: Parent) -> None:
    done = parent.boot()
    assert done.returncode == 0, done.stderr
    data, program = parent.root / "var/lib/parley", parent.root / "opt/parley"
    assert sorted(path.name for path in data.iterdir()) == ["coordinator.toml", "tls.crt", "tls.key"]
    assert (data / "coordinator.toml").read_text() == '[launcher]\nkind = "nitro"\n'
    assert (data / "coordinator.toml").stat().st_mode & 0o777 == 0o600
    assert (program / "parley.eif").read_bytes() == b"an image"
    assert (program / "bin/parley-coordinator").resolve() == (program / "venv/bin/parley-coordinator").resolve()
    assert (parent.root / "etc/nitro_enclaves/allocator.yaml").read_text() == "---\nmemory_mib: 2048\ncpu_count: 2\n"
    assert len(parent.called("mkfs.xfs -q -L parley")) == 1
    assert parent.called("parley-coordinator init")[0].endswith("--listen 0.0.0.0:7443 --name parley.example.org")
    [installed] = parent.called("python -m pip")
    assert "--no-index" in installed and installed.endswith("/opt/parley/wheels/parley-0.1.0-py3-none-any.whl")
    assert parent.called("systemctl enable") == [
        "systemctl enable --now nitro-enclaves-allocator.service",
        "systemctl enable --now parley-coordinator.service",
        "systemctl enable --now parley-backup.timer",
    ]
    assert (parent.root / "etc/fstab").read_text().count("LABEL=parley /var/lib/parley xfs ") == 1


def test_a_second_run_keeps_keys_and_data(parent: Parent) -> None:
    assert parent.boot().returncode == 0
    data = parent.root / "var/lib/parley"
    (data / "coordinator.toml").write_text("changed by hand")
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    assert parent.boot(BLKID="0").returncode == 0
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before
    assert parent.called("mkfs") == []
    assert parent.called("parley-coordinator init") == []
    assert (parent.root / "etc/fstab").read_text().count("LABEL=parley") == 1


def test_a_coordinator_whose_database_wants_a_password_waits_for_it(parent: Parent) -> None:
    toml = '[store]\ndatabase = "postgresql://parley@host/parley"\n'
    (parent.root / "etc/parley/coordinator.toml").write_text(toml)
    done = parent.boot()
    assert done.returncode == 0 and "done, but for" in done.stderr
    assert "systemctl enable parley-coordinator.service parley-backup.timer" in parent.called("systemctl")
    assert "systemctl enable --now parley-coordinator.service" not in parent.called("systemctl")
    (parent.root / "var/lib/parley/.pgpass").write_text("*:*:*:parley:secret")
    done = parent.boot(BLKID="0")
    assert done.returncode == 0 and "the coordinator listens" in done.stderr
    assert "systemctl enable --now parley-coordinator.service" in parent.called("systemctl")


@pytest.mark.parametrize("code", ["4", "8", "1"])
def test_a_volume_that_cannot_be_read_is_not_formatted(parent: Parent, code: str) -> None:
    done = parent.boot(BLKID=code)
    assert done.returncode == 1 and f"blkid: {code}" in done.stderr
    assert parent.called("mkfs") == []


@pytest.mark.parametrize("name", ["image", "bundle"])
def test_another_artefact_is_refused(parent: Parent, name: str) -> None:
    with (parent.store / "artefacts" / name).open("ab") as file:
        file.write(b"!")
    done = parent.boot()
    assert done.returncode == 1
    assert f"artefacts/{name}: SHA-384 is" in done.stderr
    assert not list((parent.root / "opt/parley").glob("*.part"))
    assert not (parent.root / "opt/parley/parley.eif").exists()
    assert parent.called("systemctl enable") == []


@pytest.mark.parametrize("step", ["systemd-sysusers", "mount", "python3.11", "init", "systemctl"])
def test_a_step_that_fails_ends_it(parent: Parent, step: str, tmp_path: Path) -> None:
    (tmp_path / "bin" / step).write_text("#!/bin/bash\nexit 1\n")
    assert parent.boot().returncode != 0
    assert parent.called("systemctl enable --now parley-coordinator") == []


def test_a_first_run_cut_off_is_done_again(parent: Parent, tmp_path: Path) -> None:
    standin = tmp_path / "bin" / "install"
    works = standin.read_text()
    standin.write_text("#!/bin/bash\nexit 1\n")
    assert parent.boot().returncode != 0
    data = parent.root / "var/lib/parley"
    assert not (data / "coordinator.toml").exists()
    standin.write_text(works)
    assert parent.boot(BLKID="0").returncode == 0
    assert (data / "coordinator.toml").read_text() == '[launcher]\nkind = "nitro"\n'
    assert (data / "tls.key").read_text() == (data / "tls.crt").read_text(), "of one run"


def test_the_stand_ins_take_nothing_for_granted(parent: Parent) -> None:
    """A call of another form fails in the stand-in, so the script cannot drift away from what is tried here."""
    for command in (["aws", "s3", "mv"], ["runuser", "-u", "root", "--", "true"], ["python3.11", "-m", "venv", "x"]):
        environment = parent.environment
        called = subprocess.run(
            [shutil.which(command[0], path=environment["PATH"]) or "", *command[1:]], env=environment, check=False
        )
        assert called.returncode != 0, command


# The backup


@pytest.fixture
def running(parent: Parent) -> Iterator[Parent]:
    """A coordinator's folder with a database in use, two blobs, and Python where the script looks for it."""
    data, python = parent.root / "var/lib/parley", parent.root / "opt/parley/venv/bin/python"
    (data / "blobs").mkdir(parents=True)
    (data / "blobs/one").write_bytes(b"1")
    (data / "coordinator.toml").write_text('listen = "0.0.0.0:7443"\n')
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    database = sqlite3.connect(data / "coordinator.db")
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE event (at INTEGER)")
    database.execute("INSERT INTO event VALUES (7)")
    database.commit()
    parent.keep = database
    # cp FROM s3://…, and sync --delete FROM s3://…
    (Path(parent.environment["BIN"]) / "aws").write_text(
        f"#!/bin/bash\n{RECORD}"
        'from=${*: -2:1}; to=$STORE/${*: -1}; to=${to/s3:\\/\\/bucket\\//}; mkdir -p "$(dirname "$to")"\n'
        'case $2 in cp) cp "$from" "$to" ;; sync) rm -rf "$to"; cp -r "$from" "$to" ;; *) exit 1 ;; esac\n'
    )
    yield parent
    database.close()


def backup(parent: Parent) -> subprocess.CompletedProcess[str]:
    parent.log.write_text("")
    script = DEPLOY / "systemd" / "parley-backup"
    return subprocess.run(["bash", str(script)], env=parent.environment, capture_output=True, text=True, check=False)


def test_a_backup_holds_what_was_committed_and_the_blobs(running: Parent) -> None:
    done = backup(running)
    assert done.returncode == 0, done.stderr
    [copy] = (running.store / "backup/database").glob("*.db")
    with closing(sqlite3.connect(copy)) as copied:
        assert copied.execute("SELECT at FROM event").fetchall() == [(7,)]
    assert [path.name for path in (running.store / "backup/blobs").iterdir()] == ["one"]
    assert [line.split()[2] for line in running.called("aws")] == ["cp", "cp", "sync"], "the database comes first"
    assert not [line for line in running.called("aws") if "tls.key" in line]
    assert not list((running.root / "var/lib/parley").glob(".backup-*"))


def test_nothing_is_deleted_in_a_backup_without_a_database(running: Parent) -> None:
    (running.root / "var/lib/parley/coordinator.db").write_bytes(b"")
    done = backup(running)
    assert done.returncode == 1 and "no database" in done.stderr
    assert running.called("aws") == []


def test_a_damaged_database_ends_the_backup(running: Parent) -> None:
    running.keep.close()
    (running.root / "var/lib/parley/coordinator.db").write_bytes(b"SQLite format 3\0" + b"x" * 8000)
    for name in ("coordinator.db-wal", "coordinator.db-shm"):
        (running.root / "var/lib/parley" / name).unlink(missing_ok=True)
    assert backup(running).returncode != 0
    assert running.called("aws") == []


def test_a_backup_of_postgresql_can_be_restored(running: Parent, cluster: Cluster) -> None:
    """What was stored is there again in an empty database, and the blobs stay in their bucket."""
    url = cluster.migrated()
    opened = store.Store(url)
    with opened.write() as session:
        session.add(Operator(key=b"k" * 32, label="ann", added_ms=7))
    toml = running.root / "var/lib/parley/coordinator.toml"
    toml.write_text(f'[store]\ndatabase = "{url}"\nblobs = "s3://bucket/blobs"\n')
    running.environment["PATH"] += f":{postgres.programs()}"
    done = backup(running)
    opened.close()
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in running.called("aws")] == ["cp", "cp"]
    [copy] = (running.store / "backup/database").glob("*.dump")
    restored = cluster.database()
    command = ["pg_restore", "--exit-on-error", "--single-transaction", "--no-owner", "--dbname"]
    environment = {"PATH": running.environment["PATH"]}
    subprocess.run([*command, restored.replace("+psycopg", ""), str(copy)], env=environment, check=True)
    opened = store.Store(restored)
    with opened.read() as session:
        assert session.get_one(Operator, b"k" * 32).label == "ann"
    opened.close()
    assert migrations.migrate(restored) == (REVISION, REVISION)


def test_an_empty_or_absent_postgresql_is_no_backup(running: Parent, cluster: Cluster, tmp_path: Path) -> None:
    toml = running.root / "var/lib/parley/coordinator.toml"
    running.environment["PATH"] += f":{postgres.programs()}"
    for url, said in (
        (cluster.database(), "parley-backup: no tables in the database"),
        (f"postgresql://parley@/parley?host={tmp_path}", "pg_dump: error"),
        ("mysql://parley@host/parley", "neither a file nor postgresql"),
    ):
        toml.write_text(f'[store]\ndatabase = "{url}"\nblobs = "s3://bucket/blobs"\n')
        done = backup(running)
        assert done.returncode != 0 and said in done.stderr
        assert running.called("aws") == []
