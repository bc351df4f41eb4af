"""The configuration: what is left out has a default, what is wrong is named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from parley_coordinator import config
from parley_coordinator.config import ConfigError
from parley_protocol.framing import ENCLAVE_PORT


def test_the_template_is_the_default(tmp_path: Path) -> None:
    tree = tomllib.loads(config.TEMPLATE.format(listen="127.0.0.1:7443"))
    assert config.from_tree(tree, tmp_path) == config.defaults(tmp_path)


def test_every_commented_line_of_the_template_is_a_field_with_its_default(tmp_path: Path) -> None:
    lines = [
        line[2:] if line.startswith("# ") and " = " in line.split("#")[1] else line
        for line in config.TEMPLATE.splitlines()
    ]
    text = "\n".join(line for line in lines if not line.startswith(("command", "workers")))
    tree = tomllib.loads(text.format(listen="127.0.0.1:7443"))
    assert config.from_tree(tree, tmp_path) == config.defaults(tmp_path)


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[tls]\nkey = "k"\n[store]\nblobs = "b"\ndatabase = "d"\n[launcher.local]\nfolder = "e"\n')
    found = config.load(path)
    assert (found.key, found.blobs, found.local.folder) == (tmp_path / "k", tmp_path / "b", tmp_path / "e")
    assert found.database == f"sqlite:///{tmp_path / 'd'}"


@pytest.mark.parametrize(
    ("place", "bucket", "prefix"),
    [("s3://parley", "parley", ""), ("s3://parley/a/b", "parley", "a/b/"), ("s3://parley/a/", "parley", "a/")],
)
def test_blobs_in_a_bucket(tmp_path: Path, place: str, bucket: str, prefix: str) -> None:
    found = config.from_tree({"store": {"blobs": place, "s3": {"region": "r"}, "keep": {"uploads_s": 0}}}, tmp_path)
    assert found.s3 is not None
    assert (found.s3.bucket, found.s3.prefix, found.s3.region, found.keep.uploads_s) == (bucket, prefix, "r", 0)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("lisen = 'x'", "lisen: no such field"),
        ("listen = 1", "listen: not a text"),
        ("tls = 1", "tls: not a table"),
        ("[quota]\nbytes_per_member = 0", "quota.bytes_per_member: not a whole number from 1"),
        ("[quota]\nbytes_per_member = true", "quota.bytes_per_member"),
        ("[deadline]\nstatus_s = 0", "deadline.status_s"),
        ("[store]\nblobs = 's3://X'", "store.blobs: 'X' is no name of a bucket"),
        ("[store]\nblobs = 'gs://bucket/x'", "store.blobs: neither a folder nor s3://BUCKET/PREFIX"),
        ("[store.s3]\npart_mib = 4", "store.s3.part_mib: not a whole number from 5"),
        ("[store.s3]\naddressing = 'x'", "store.s3.addressing: 'x' is none of: auto, path, virtual"),
        ("[store.keep]\nuploads_s = -1", "store.keep.uploads_s: not a number of seconds from 0"),
        ("[store.keep]\nevery_s = 0", "store.keep.every_s: not a number of seconds above 0"),
        ("[cluster]\nlease_s = 0", "cluster.lease_s"),
        ("[telemetry]\nmetric = ''", "telemetry.metric: no such field"),
        ("[log]\nlevel = 'loud'", "log.level: 'loud' is none of"),
        ("[launcher]\nkind = 'cloud'", "launcher.kind: 'cloud' is none of: local, qemu, nitro"),
        ("[launcher.qemu]\naccel = 'hax'", "launcher.qemu.accel: 'hax' is none of: auto, kvm, tcg"),
        ("[launcher.qemu]\nmemory = 5", "launcher.qemu.memory: no such field"),
        ("[launcher.qemu]\ncommand = ['x']\ncpus = 2", "launcher.qemu.cpus: no such field"),
        ("[launcher.nitro]\nmemory_mib = 63", "launcher.nitro.memory_mib: not a whole number from 64"),
        ("[launcher.nitro]\ncpus = 0", "launcher.nitro.cpus: not a whole number from 1"),
        ("[launcher.nitro]\ncpus = 2.0", "launcher.nitro.cpus"),
        ("[launcher.nitro]\ndebug = 'no'", "launcher.nitro.debug: neither true nor false"),
        ("[launcher.nitro]\nname = 'Parley_1'", "launcher.nitro.name: 'Parley_1' does not match"),
        ("[launcher.nitro]\nattempts = 0", "launcher.nitro.attempts"),
        ("[launcher.nitro]\nimage = ''", "launcher.nitro.image: not a text"),
        ("[launcher.nitro]\nroot = 'r'", "launcher.nitro.root: no such field"),
        ("[launcher.local]\ncommand = 'x'", "launcher.local.command: not a list"),
        ("[kms]\nendpoint = 'kms'", "kms.endpoint: 'kms' does not match"),
        ("[kms]\nattempts = 0", "kms.attempts: not a whole number from 1"),
        ("[kms]\nread_s = 0", "kms.read_s: not a number of seconds"),
        ("[kms]\nsession = 'a b'", "kms.session: 'a b' does not match"),
        ("[kms.account]\n1 = 2", "kms.account.1: not a table"),
        ("[kms.account.1]", "kms.account.1: not the 12 digits of an account"),
        ("[kms.account.111122223333]\nrole = 'parley'", "kms.account.111122223333.role: 'parley' does not match"),
        ("[kms.account.111122223333]\nrolle = ''", "kms.account.111122223333.rolle: no such field"),
        (
            "[kms.account.111122223333]\nrole = 'arn:aws:iam::111122223333:role/p'\nprofile = 'p'",
            "kms.account.111122223333.profile: either a role or a profile",
        ),
        (
            "[kms.account.111122223333]\nexternal_id = 'e'",
            "kms.account.111122223333.external_id: goes with a role",
        ),
        ("reflection = 'yes'", "reflection: neither true nor false"),
        ("a = [", "c.toml"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        config.load(path)


def test_no_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        config.load(tmp_path / "none.toml")


def test_the_emulator_is_told_its_image_and_its_root(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[launcher]\nkind = 'qemu'\n[launcher.qemu]\nimage = 'i.eif'\ncpus = 3\naccel = 'tcg'\n")
    found = config.load(path)
    command = list(found.qemu.command)
    assert found.launcher == "qemu" and found.qemu.image == tmp_path / "i.eif"
    assert command[1:3] == ["-m", "parley_deploy.emulator"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options == {
        "--image": str(tmp_path / "i.eif"),
        "--root": str(tmp_path / "root"),
        "--memory-mib": "2048",
        "--cpus": "3",
        "--accel": "tcg",
    }


def test_the_port_of_an_enclave_is_the_images(tmp_path: Path) -> None:
    assert config.defaults(tmp_path).nitro.port == ENCLAVE_PORT


def test_the_page_of_the_operator_has_every_field(tmp_path: Path, repository: Path) -> None:
    template = config.TEMPLATE.format(listen="127.0.0.1:7443")
    fields, section = set(), ""
    for line in template.splitlines()[2:]:
        if header := re.match(r"\[([a-z0-9.]+)\]", line):
            section = header[1] + "."
        elif name := re.match(r"(?:# )?([a-z_]+) = ", line):
            fields.add(section + name[1])
    page = (repository / "coordinator/README.md").read_text()
    table = page.split("## Configuration")[1].split("\n## ")[0]
    told = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([a-z0-9_.]+)`", line.split("|")[1])
    }
    assert told == fields
