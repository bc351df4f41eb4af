"""Canonical agreements are the recorded bytes: a change of them is a change of every digest that members signed."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from parley_protocol.agreement.canonical import parse
from parley_protocol.claims import verify_agreement_signature


@pytest.fixture(scope="module")
def generator(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("agreement_vectors", repository / "tests/vectors/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recorded_vectors_are_what_the_code_makes(generator: ModuleType) -> None:
    assert generator.main(["--check"]) == 0


@pytest.mark.parametrize("name", ["flights", "pay", "everything"])
def test_a_recorded_agreement_parses_to_its_digests(repository: Path, name: str) -> None:
    vector = json.loads((repository / "tests/vectors/agreements.json").read_text("utf-8"))[name]
    agreement = parse(base64.b64decode(vector["canonical"]))
    assert agreement.digest.hex() == vector["digest"]
    assert agreement.series.hex() == vector["series"]
    assert {name: key.fingerprint for name, key in agreement.members.items()} == vector["fingerprints"]
    assert {name: table.schema_digest.hex() for name, table in agreement.tables.items()} == vector["schemas"]
    assert {name: output.rows for name, output in agreement.outputs.items()} == vector["rows"]
    signature = vector["signature"]
    verify_agreement_signature(base64.b64decode(signature["cose"]), agreement, signature["member"])
