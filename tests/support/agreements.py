"""Agreements for tests: the demos' YAML with keys, root and measurements that are the same in every run."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from parley.agreements import parse_source, parse_yaml
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.source import Tree
from parley_protocol.identity import PrivateIdentity, dump_public

REPOSITORY = Path(__file__).resolve().parents[2]
YAML = REPOSITORY / "deploy" / "parley_deploy" / "agreements"
VECTORS = REPOSITORY / "tests" / "vectors"
MEASUREMENTS = {
    "Measurements": {"HashAlgorithm": "Sha384 { ... }", "PCR0": "11" * 48, "PCR1": "22" * 48, "PCR2": "33" * 48}
}


@cache
def identity(name: str) -> PrivateIdentity:
    """The keys of a member: a function of its name, and so worth nothing outside of tests."""
    stream = hashlib.shake_256(f"parley test identity {name}".encode())
    taken = 0

    def take(count: int) -> bytes:
        nonlocal taken
        taken += count
        return stream.digest(taken)[-count:]

    return PrivateIdentity.generate(take)


def read(name: str) -> bytes:
    """The files that the demos' agreements name."""
    if name.startswith("keys/") and name.endswith(".pub"):
        return dump_public(identity(Path(name).stem).public)
    if name == "simulated-root.pem":
        return (VECTORS / "root.pem").read_bytes()
    if name == "measurements.json":
        return json.dumps(MEASUREMENTS).encode()
    raise FileNotFoundError(2, "No such file or directory", name)


def yaml_text(name: str) -> str:
    """The YAML of a demo: "flights" or "pay"."""
    return (YAML / f"{name}.yaml").read_text("utf-8")


def tree(name: str) -> dict[str, Tree]:
    """The tree of a demo's YAML, for changes."""
    found, _ = parse_yaml(yaml_text(name).encode())
    assert isinstance(found, dict)
    return found


@cache
def agreement(name: str) -> Agreement:
    """A demo's agreement."""
    return parse_source(yaml_text(name).encode(), read)
