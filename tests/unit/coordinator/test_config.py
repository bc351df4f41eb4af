"""The configuration: what is left out has a default, what is wrong is named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from parley_coordinator import config
from parley_coordinator.config import ConfigError


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
    ("text", "field"),
    [
        ("lisen = 'x'", "lisen: no such field"),
        ("listen = 1", "listen: not a text"),
        ("tls = 1", "tls: not a table"),
        ("[quota]\nbytes_per_member = 0", "quota.bytes_per_member: not a whole number from 1"),
        ("[quota]\nbytes_per_member = true", "quota.bytes_per_member"),
        ("[deadline]\nstatus_s = 0", "deadline.status_s"),
        ("[log]\nlevel = 'loud'", "log.level: 'loud' is none of"),
        ("[launcher]\nkind = 'cloud'", "launcher.kind"),
        ("[launcher.local]\ncommand = 'x'", "launcher.local.command: not a list"),
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
