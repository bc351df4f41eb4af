"""The specification, the code and the tests name the same steps; every defence in THREATS.md names a test that exists."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from support.roles import ROLES

# Every section of the specification that has numbered steps.
PREFIXES = (
    "enc", "frm", "stm", "att", "idn", "agr", "lin", "off", "upl", "tab", "out", "join", "rcp", "sta", "ros", "cos", "ref", "rec",
    "chn", "bun", "cal", "adm", "ses", "eng", "dis", "crd", "eif", "kms", "pol",
)  # fmt: skip
_ANY = "|".join(PREFIXES)
_DEFINED = re.compile(r"\*\*([a-z]{3,4}-\d+)\*\*")
_IN_CODE = re.compile(rf"(?<![\w-])((?:{_ANY})-\d+)(?![\w-])")
_IN_TEST = re.compile(rf"^ *(?:async )?def test_({_ANY})_(\d+)(?=[_(])", re.MULTILINE)
_NAMED = re.compile(r"`(test_\w+)`")
_TEST = re.compile(r"^ *(?:async )?def (test_\w+)\(", re.MULTILINE)


def _python(folder: Path) -> str:
    return "\n".join(file.read_text("utf-8") for file in sorted(folder.rglob("*.py")) if "_pb2" not in file.name)


@pytest.fixture(scope="module")
def specified(repository: Path) -> list[str]:
    return _DEFINED.findall((repository / "protos/SPEC.md").read_text("utf-8"))


@pytest.fixture(scope="module")
def in_code(repository: Path) -> set[str]:
    return {step for package, root in ROLES.items() for step in _IN_CODE.findall(_python(repository / root / package))}


@pytest.fixture(scope="module")
def in_tests(repository: Path) -> set[str]:
    return {f"{prefix}-{number}" for prefix, number in _IN_TEST.findall(_python(repository / "tests"))}


def _sorted(steps: set[str]) -> list[str]:
    return sorted(steps, key=lambda step: (step.partition("-")[0], int(step.partition("-")[2])))


def test_each_step_is_specified_once_under_a_known_prefix(specified: list[str]) -> None:
    assert specified
    assert not [step for step, count in Counter(specified).items() if count > 1]
    assert {step.partition("-")[0] for step in specified} <= set(PREFIXES)


def test_steps_are_numbered_without_gaps(specified: list[str]) -> None:
    for prefix in {step.partition("-")[0] for step in specified}:
        numbers = sorted(int(step.partition("-")[2]) for step in specified if step.startswith(f"{prefix}-"))
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] in (0, 1), prefix


def test_every_specified_step_is_in_the_code(specified: list[str], in_code: set[str]) -> None:
    assert not _sorted(set(specified) - in_code)


def test_every_step_in_the_code_is_specified(specified: list[str], in_code: set[str]) -> None:
    assert not _sorted(in_code - set(specified))


def test_every_specified_step_has_a_test_of_its_name(specified: list[str], in_tests: set[str]) -> None:
    assert not _sorted(set(specified) - in_tests)


def test_every_test_named_by_a_step_names_a_specified_one(specified: list[str], in_tests: set[str]) -> None:
    assert not _sorted(in_tests - set(specified))


def _rows(text: str) -> list[list[str]]:
    """Rows of every table whose header ends with `test`, as cells."""
    rows: list[list[str]] = []
    wanted = False
    for line in text.splitlines():
        if not line.startswith("|"):
            wanted = False
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[-1] == "test":
            wanted = True
        elif wanted and set(cells[-1]) != {"-"}:
            rows.append(cells)
    return rows


def test_every_defence_names_tests_that_exist(repository: Path) -> None:
    rows = _rows((repository / "protos/THREATS.md").read_text("utf-8"))
    assert len(rows) > 20
    existing = set(_TEST.findall(_python(repository / "tests")))
    nameless = [row[1] for row in rows if not _NAMED.findall(row[-1])]
    missing = sorted({name for row in rows for name in _NAMED.findall(row[-1])} - existing)
    assert not nameless
    assert not missing


def test_steps_named_in_threats_are_specified(repository: Path, specified: list[str]) -> None:
    text = (repository / "protos/THREATS.md").read_text("utf-8")
    sections = {step.partition("-")[0] for step in specified}
    assert set(_IN_CODE.findall(text)) <= set(specified)
    assert set(re.findall(rf"\b({_ANY})-\*", text)) <= sections
