"""What is built from the tree holds the whole of the five packages and nothing of the tests."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from support.roles import ROLES

_BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    run = subprocess.run(
        [sys.executable, "-c", _BUILD, str(folder)], cwd=repository, capture_output=True, text=True, check=True
    )
    return zipfile.ZipFile(folder / run.stdout.splitlines()[-1])


def test_every_file_of_every_package_is_in_the_wheel(repository: Path, wheel: zipfile.ZipFile) -> None:
    expected = {
        file.relative_to(repository / root).as_posix()
        for package, root in ROLES.items()
        for file in (repository / root / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    present = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {f"{package}/py.typed" for package in ROLES} <= present
    assert present == expected


def test_scripts_and_commands_exist(wheel: zipfile.ZipFile) -> None:
    parser = ConfigParser(delimiters=("=",))
    parser.read_string(wheel.read(next(n for n in wheel.namelist() if n.endswith("/entry_points.txt"))).decode())
    points = [EntryPoint(name, value, group) for group in parser.sections() for name, value in parser[group].items()]
    assert {point.name for point in points} == {"parley", "parley-coordinator", "demo", "local"}
    for point in points:
        assert point.load() is not None


def test_a_plain_install_is_the_client(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode()
    required = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")}
    plain = {requirement for requirement in required if "extra ==" not in requirement}
    assert any(requirement.startswith("duckdb") for requirement in plain)
    assert not any(requirement.startswith(("sqlalchemy", "alembic", "pandas", "grpcio-tools")) for requirement in plain)
