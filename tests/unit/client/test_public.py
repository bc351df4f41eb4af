"""The public face: what `import parley` gives, and that it is light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import parley
from parley.files import Agreement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.errors import VerificationError
from support.paperwire import Desk

HEAVY = ("cryptography", "duckdb", "grpc", "numpy", "pandas", "pyarrow", "rich", "ruamel", "typer")


def loaded(code: str) -> set[str]:
    """Heavy packages that a fresh process has loaded after `code`."""
    program = f"import json, sys\n{code}\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    return set(json.loads(output.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    assert loaded("import parley") == set()


def test_a_member_needs_neither_the_engine_nor_the_wire() -> None:
    assert loaded("import parley; parley.Member; parley.Release; parley.backup") <= {"cryptography"}


def test_every_public_name_is_there() -> None:
    for name in parley.__all__:
        assert getattr(parley, name) is not None
    assert set(parley.__all__) <= set(dir(parley))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = parley.nothing


def test_an_agreement_loads_only_when_all_have_signed(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.sign()
    whole = desk.wire.agreements[desk.agreement.digest]
    path = tmp_path / "visits.parley"
    parley.save_signed(path, whole)
    assert Agreement.load(path) == desk.agreement
    parley.save_signed(path, SignedAgreement(whole.canonical, dict(list(whole.signatures.items())[:2])))
    with pytest.raises(VerificationError, match="agr-7"):
        parley.Agreement.load(str(path))
