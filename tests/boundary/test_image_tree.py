"""What the image holds is enough for the enclave, and holds nothing else."""

from __future__ import annotations

import json
import re

import pytest

from parley_deploy.measure import image_measurements
from support.image_tree import LOCK, ImageTree

_IMPORT_ALL = """
import importlib, json, pkgutil, sys
names = []
for package in ("parley_protocol", "parley_enclave"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        # The stub of the coordinator's service lies beside the messages; it needs gRPC, which the image has not.
        if not found.name.endswith(("__main__", "_pb2_grpc")):
            importlib.import_module(found.name)
            names.append(found.name)
files = {name: module.__file__ for name, module in sys.modules.items() if getattr(module, "__file__", None)}
print(json.dumps({"names": names, "files": files}))
"""


def test_every_module_imports_from_the_tree(image_tree: ImageTree) -> None:
    run = image_tree.run(_IMPORT_ALL)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert {"parley_protocol.transcript", "parley_enclave.session"} <= set(result["names"])
    for name, file in result["files"].items():
        if name.partition(".")[0].startswith("parley"):
            assert file.startswith(str(image_tree.pythonpath))


_ABSENT = (
    "parley", "parley_coordinator", "parley_deploy", "grpc", "boto3", "duckdb", "pyarrow", "pandas", "polars", "sqlalchemy",
    "typer", "rich", "ruamel", "pip", "setuptools",
)  # fmt: skip


@pytest.mark.parametrize("name", _ABSENT)
def test_nothing_else_is_importable(image_tree: ImageTree, name: str) -> None:
    run = image_tree.run(f"import importlib.util; raise SystemExit(importlib.util.find_spec({name!r}) is not None)")
    assert run.returncode == 0, run.stderr


def test_installed_is_what_is_locked(image_tree: ImageTree) -> None:
    run = image_tree.run(
        "import importlib.metadata as m; print(*sorted(f'{d.name.lower()}=={d.version}' for d in m.distributions()))"
    )
    assert run.returncode == 0, run.stderr
    locked = re.findall(r"^([a-z0-9._-]+)==([^ \\]+)", LOCK.read_text("utf-8"), re.MULTILINE)
    assert {name.replace("_", "-") for name in run.stdout.split()} == {f"{name}=={version}" for name, version in locked}


def test_lock_is_complete_with_hashes_and_without_addresses() -> None:
    text = LOCK.read_text("utf-8")
    requirements = re.split(r"\n(?=[a-z])", text.strip())
    assert len(requirements) >= 5
    assert all("--hash=sha256:" in requirement for requirement in requirements)
    assert "://" not in text


def test_the_tree_measures_as_what_is_installed(image_tree: ImageTree) -> None:
    assert image_measurements(image_tree.pythonpath) == image_measurements(None)
