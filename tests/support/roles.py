"""What each role may import, in one table, and a program that imports a whole role with everything else blocked.

import-linter reads source text; this sees what really happens, through third-party packages and `importlib` too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

ROLES = {
    "parley_protocol": "protos",
    "parley": "parties",
    "parley_enclave": "enclave",
    "parley_coordinator": "coordinator",
    "parley_deploy": "deploy",
}

# Distributions' import names with what they themselves need. `google` is protobuf and googleapis-common-protos.
_PROTOCOL = frozenset(
    [
        "google",
        "cbor2",
        "_cbor2",
        "cryptography",
        "cffi",
        "_cffi_backend",
        "pycparser",
        "pydantic",
        "pydantic_core",
        "annotated_types",
        "typing_inspection",
        "typing_extensions",
    ]
)
_GRPC = frozenset({"grpc", "grpc_status"})


@dataclass(frozen=True, slots=True)
class Role:
    """One role: its package, the roles below it, the third-party names that it may import."""

    package: str
    below: frozenset[str]
    third_party: frozenset[str]
    # Generated code of the service belongs to the two ends of the connection only.
    with_grpc: bool


TABLE = (
    Role("parley_protocol", frozenset(), _PROTOCOL, with_grpc=False),
    Role("parley_enclave", frozenset({"parley_protocol"}), _PROTOCOL | {"numpy"}, with_grpc=False),
    Role(
        "parley_coordinator",
        frozenset({"parley_protocol"}),
        _PROTOCOL
        | _GRPC
        | frozenset(
            [
                "grpc_health",
                "grpc_reflection",
                "sqlalchemy",
                "greenlet",
                "alembic",
                "mako",
                "markupsafe",
                "psycopg",
                "psycopg_binary",
                "prometheus_client",
                "boto3",
                "botocore",
                "s3transfer",
                "jmespath",
                "dateutil",
                "six",
                "urllib3",
            ]
        ),
        with_grpc=True,
    ),
    Role(
        "parley",
        frozenset({"parley_protocol"}),
        _PROTOCOL
        | _GRPC
        | frozenset(
            [
                "duckdb",
                "_duckdb",
                "_duckdb-stubs",
                "adbc_driver_duckdb",
                "pyarrow",
                "numpy",
                "typer",
                "click",
                "shellingham",
                "annotated_doc",
                "rich",
                "markdown_it",
                "mdurl",
                "pygments",
                "ruamel",
            ]
        ),
        with_grpc=True,
    ),
)

_PROGRAM = """
import importlib, importlib.util, json, pkgutil, sys, sysconfig

package, roots, allowed, skip_grpc = json.loads(sys.argv[1])
stdlib = set(sys.stdlib_module_names)
refused = []

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in stdlib or top in allowed or top.startswith(("__editable__", "_sysconfigdata_")):
            return None
        # What is not installed may be asked for in vain; what is installed would have been found.
        sys.meta_path.remove(self)
        try:
            installed = importlib.util.find_spec(top) is not None
        finally:
            sys.meta_path.insert(0, self)
        if installed:
            refused.append(name)
        raise ModuleNotFoundError(f"{name} is blocked for {package}", name=name)

sys.path[:0] = roots
sys.meta_path.insert(0, Blocker())
names = [package]
module = importlib.import_module(package)
failures = {}
for found in pkgutil.walk_packages(module.__path__, package + "."):
    names.append(found.name)
    if skip_grpc and found.name.endswith("_pb2_grpc"):
        continue
    if found.name.endswith("__main__") or ".migrations." in found.name:
        continue
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        failures[found.name] = str(error)
print(json.dumps({"names": names, "failures": failures, "refused": refused, "loaded": sorted(sys.modules)}))
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Modules found and loaded, imports that failed with their reason, and names that were asked for in vain."""

    names: tuple[str, ...]
    failures: dict[str, str]
    refused: tuple[str, ...]
    loaded: frozenset[str]


def import_alone(role: Role) -> Outcome:
    """Imports every module of a role in a fresh isolated process in which nothing else can be imported.

    Modules named `__main__` are left out: importing them may run them.
    """
    roots = [str(ROOT / ROLES[package]) for package in (role.package, *sorted(role.below))]
    allowed = sorted({role.package} | role.below | role.third_party)
    argument = json.dumps([role.package, roots, allowed, not role.with_grpc])
    run = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(_PROGRAM), argument], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    return Outcome(tuple(result["names"]), result["failures"], tuple(result["refused"]), frozenset(result["loaded"]))
