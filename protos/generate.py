"""Generates the Python code of `parley_protocol/v1/*.proto`; with `--check` only says whether what is checked in is stale.

The import path of a generated module is the path of its `.proto` file under `protos/`, so nothing is rewritten.
The versions of the compiler and of the stub generator are pinned: gRPC 1.80 writes code that runs on protobuf 6 and 7.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from grpc_tools import _protoc_compiler, protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = "parley_protocol/v1"
PINS = {"grpcio-tools": "1.80.0", "mypy-protobuf": "5.1.0"}
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def wrong_tools() -> list[str]:
    """A message for each tool whose installed version is not the pinned one."""
    found = {tool: version(tool) for tool in PINS}
    return [f"{tool} {found[tool]} is installed, {pin} is needed" for tool, pin in PINS.items() if found[tool] != pin]


def generate() -> dict[str, bytes]:
    """Generated files by name, made in a folder of their own.

    Raises:
        SystemExit: the compiler refuses a `.proto` file; it has printed why.
    """
    sources = sorted((ROOT / PACKAGE).glob("*.proto"))
    if not sources:
        raise SystemExit(f"no .proto file in {ROOT / PACKAGE}")
    plugins = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={Path(protoc.__file__).parent / '_proto'}",
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--python_out={folder}",
            f"--grpc_python_out={folder}",
            f"--mypy_out=quiet:{folder}",
            f"--mypy_grpc_out=quiet:{folder}",
            *(f"{PACKAGE}/{source.name}" for source in sources),
        ]
        status = _protoc_compiler.run_main([argument.encode() for argument in arguments])
        if status != 0:
            raise SystemExit(status)
        with_service = {f"{s.stem}_pb2_grpc" for s in sources if "\nservice " in s.read_text("utf-8")}
        made = {}
        for file in sorted((Path(folder) / PACKAGE).iterdir()):
            # The gRPC plug-in writes a file even where there is no service; it would only import grpc for nothing.
            if file.stem.endswith("_pb2_grpc") and file.stem not in with_service:
                continue
            made[file.name] = file.read_bytes()
        return made


def checked_in() -> dict[str, bytes]:
    """Generated files by name, as they stand in the tree."""
    return {file.name: file.read_bytes() for pattern in GENERATED for file in (ROOT / PACKAGE).glob(pattern)}


def stale(made: dict[str, bytes], present: dict[str, bytes]) -> list[str]:
    """Names of files that differ, are missing, or have no `.proto` any more."""
    return sorted(name for name in made.keys() | present.keys() if made.get(name) != present.get(name))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate the protobuf code of parley_protocol.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the code is stale")
    options = parser.parse_args(arguments)
    problems = wrong_tools()
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 2
    made, present = generate(), checked_in()
    names = stale(made, present)
    if options.check:
        for name in names:
            print(f"{PACKAGE}/{name} is stale: run make protos", file=sys.stderr)
        return 1 if names else 0
    for name in names:
        target = ROOT / PACKAGE / name
        if name in made:
            target.write_bytes(made[name])
            print(f"wrote {PACKAGE}/{name}")
        else:
            target.unlink()
            print(f"removed {PACKAGE}/{name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
