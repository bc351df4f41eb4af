"""What is measured: every line of code, every name, and the lock file, each in its register."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from parley_deploy.measure import LOCK, image_measurements, measure_tree
from parley_protocol.encoding import encode
from parley_protocol.errors import StateError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in {
        "parley_protocol/__init__.py": "",
        "parley_protocol/deep/part.py": "x = 1\n",
        "parley_enclave/__init__.py": "",
        "parley_enclave/main.py": "y = 2\n",
        LOCK: "numpy==2\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_the_registers_are_those_of_the_description(tree: Path) -> None:
    protocol = encode(["parley_protocol/__init__.py", b""]) + encode(["parley_protocol/deep/part.py", b"x = 1\n"])
    enclave = encode(["parley_enclave/__init__.py", b""]) + encode(["parley_enclave/main.py", b"y = 2\n"])
    lock = encode([LOCK, b"numpy==2\n"])

    def ext(data: bytes) -> bytes:
        return hashlib.sha384(bytes(48) + hashlib.sha384(data).digest()).digest()

    assert image_measurements(tree) == {0: ext(lock + protocol + enclave), 1: ext(lock + protocol), 2: ext(enclave)}


@pytest.mark.parametrize(
    ("name", "content", "registers"),
    [
        ("parley_protocol/deep/part.py", "x = 2\n", {0, 1}),
        ("parley_enclave/main.py", "y = 3\n", {0, 2}),
        (LOCK, "numpy==3\n", {0, 1}),
        ("parley_protocol/more.py", "", {0, 1}),
        ("parley_enclave/engine/more.py", "", {0, 2}),
        ("parley_enclave/__pycache__/main.cpython-311.pyc", "z", set()),
        ("parley_protocol/py.typed", "", set()),
    ],
)
def test_a_change_shows_in_its_registers(tree: Path, name: str, content: str, registers: set[int]) -> None:
    before = image_measurements(tree)
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text(content)
    after = image_measurements(tree)
    assert {index for index in before if before[index] != after[index]} == registers


def test_moving_a_line_between_files_shows(tree: Path) -> None:
    before = image_measurements(tree)
    (tree / "parley_protocol/__init__.py").write_text("x = 1\n")
    (tree / "parley_protocol/deep/part.py").write_text("")
    after = image_measurements(tree)
    assert before[0] != after[0] and before[1] != after[1]


def test_a_tree_without_code_is_refused(tree: Path) -> None:
    with pytest.raises(StateError, match="no code"):
        measure_tree(tree / "parley_protocol", tree / "empty", tree / LOCK)


def test_what_is_installed_is_measured_as_its_source_tree(repository: Path) -> None:
    expected = measure_tree(
        repository / "protos" / "parley_protocol",
        repository / "enclave" / "parley_enclave",
        repository / "deploy" / "parley_deploy" / "image" / LOCK,
    )
    assert image_measurements() == expected
    assert len({*expected.values()}) == 3
