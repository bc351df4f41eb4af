"""`parley --help` answers at once: nothing heavy is loaded before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "duckdb",
    "numpy",
    "grpc",
    "pyarrow",
    "pandas",
    "polars",
    "parley_deploy",
    "parley_enclave",
    "parley_coordinator",
)

_PROGRAM = """
import sys
from parley.cli import main
sys.argv = ["parley", *sys.argv[1:]]
try:
    main()
finally:
    print("LOADED", *sorted(sys.modules), file=sys.stderr)
"""


def loaded_by(*arguments: str) -> tuple[str, set[str]]:
    """What `parley ARGUMENTS` prints, and the top-level names of the modules that it has loaded."""
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("LOADED ")]
    assert run.returncode == 0 and lines, run.stderr
    return run.stdout, {name.partition(".")[0] for name in lines[-1].split()[1:]}


@pytest.mark.parametrize("arguments", [("--help",), ("agreement", "--help"), ("submit", "--help")], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    output, loaded = loaded_by(*arguments)
    assert "Usage" in output
    assert "typer" in loaded
    assert not loaded.intersection(HEAVY)


def test_plain_import_is_light() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import parley, sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not {name.partition(".")[0] for name in run.stdout.split()}.intersection({*HEAVY, "typer", "rich"})
