"""The generated protobuf code is what its `.proto` files say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def generator(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", repository / "protos/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_checked_in_code_is_not_stale(repository: Path) -> None:
    run = subprocess.run(
        [sys.executable, "protos/generate.py", "--check"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_stale_missing_and_superfluous_files_are_named(generator: ModuleType) -> None:
    made = {"a_pb2.py": b"1", "b_pb2.py": b"1", "c_pb2.py": b"1"}
    present = {"a_pb2.py": b"1", "b_pb2.py": b"2", "d_pb2.py": b"1"}
    assert generator.stale(made, present) == ["b_pb2.py", "c_pb2.py", "d_pb2.py"]


def test_no_service_no_grpc_file(repository: Path) -> None:
    folder = repository / "protos/parley_protocol/v1"
    with_grpc = {file.stem.removesuffix("_pb2_grpc") for file in folder.glob("*_pb2_grpc.py")}
    with_service = {file.stem for file in folder.glob("*.proto") if "\nservice " in file.read_text("utf-8")}
    assert with_grpc == with_service == {"coordinator"}


def test_import_path_is_the_path_of_the_file() -> None:
    from parley_protocol.v1 import coordinator_pb2, enclave_pb2

    assert coordinator_pb2.DESCRIPTOR.name == "parley_protocol/v1/coordinator.proto"
    assert enclave_pb2.DESCRIPTOR.name == "parley_protocol/v1/enclave.proto"
