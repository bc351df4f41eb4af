"""A linter for the project's Terraform: what `terraform validate` would say, without the provider that it must download.

Modules are parsed with python-hcl2. `aws_schema.json` lists the arguments, nested blocks and attributes of each resource type
that they use, as the AWS provider publishes them; a type that is not in it is a problem, so that it is looked up and added.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import hcl2

SCHEMA: Final[Mapping[str, Any]] = json.loads((Path(__file__).parent / "aws_schema.json").read_text("utf-8"))
META: Final = {"count", "for_each", "depends_on", "lifecycle", "provider"}
"""Arguments that every resource has."""
_MARKS: Final = {"__is_block__", "__comments__", "__inline_comments__"}
_NAMED: Final = re.compile(r"(?<![\w.])(var|local|module)\.(\w+)(?:\[[^\]]*\])?(?:\.(\w+))?")
_DATA: Final = re.compile(r"(?<![\w.])data\.(\w+)\.(\w+)(?:\[[^\]]*\])?(?:\.(\w+))?")
_RESOURCE: Final = re.compile(r"(?<![\w.])(aws_\w+)\.(\w+)(?:\[[^\]]*\])?(?:\.(\w+))?")

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Module:
    """The blocks of a folder of *.tf files. Resources and data are by address: `aws_vpc.this`, `data.aws_partition.this`."""

    folder: Path
    variables: Mapping[str, Body]
    locals: Mapping[str, Any]
    outputs: Mapping[str, Body]
    modules: Mapping[str, Body]
    resources: Mapping[str, Body]
    settings: Body
    providers: Mapping[str, Body]

    def of_type(self, type_: str) -> list[Body]:
        """The bodies of all resources (or `data.`…) of one type."""
        return [body for address, body in self.resources.items() if address.rpartition(".")[0] == type_]


def load(folder: Path) -> Module:
    """Parses a folder; ValueError for a name that stands twice or a kind of block that is not known here."""
    found: dict[str, dict[str, Any]] = {
        kind: {} for kind in ("variable", "locals", "output", "module", "resource", "terraform", "provider")
    }

    def add(kind: str, name: str, body: object) -> None:
        if name in found[kind]:
            raise ValueError(f"{folder.name}: {kind} {name} stands twice")
        found[kind][name] = body

    for path in sorted(folder.glob("*.tf")):
        for kind, blocks in _parsed(path.read_text("utf-8")).items():
            if kind in _MARKS:
                continue
            if kind not in found and kind != "data":
                raise ValueError(f"{path.name}: unknown kind of block: {kind}")
            for block in blocks:
                body = _plain(block)
                if kind in ("locals", "terraform"):
                    for name, value in body.items():
                        add(kind, name, value)
                    continue
                [(name, inner)] = body.items()
                if kind in ("resource", "data"):
                    prefix = "data." if kind == "data" else ""
                    [(label, inner)] = inner.items()
                    add("resource", f"{prefix}{name}.{label}", inner)
                else:
                    add(kind, name, inner)
    return Module(
        folder,
        found["variable"],
        found["locals"],
        found["output"],
        found["module"],
        found["resource"],
        found["terraform"],
        found["provider"],
    )


@functools.lru_cache
def _parsed(text: str) -> Mapping[str, Any]:
    # Most files are read many times, and parsing is slow. `_plain` copies what it takes from the tree.
    parsed: Mapping[str, Any] = hcl2.loads(text)
    return parsed


def problems(module: Module) -> list[str]:
    """Everything that is wrong with a module, in words; nothing where it is right."""
    return [
        *_declarations(module),
        *_references(module),
        *(line for address, body in module.resources.items() for line in _against_schema(address, body)),
        *(line for name, body in module.modules.items() for line in _call(module, name, body)),
    ]


def _declarations(module: Module) -> Iterator[str]:
    for name, body in module.variables.items():
        for field in ("description", "type"):
            if field not in body:
                yield f"var.{name}: no {field}"
    for name, body in module.outputs.items():
        if "description" not in body:
            yield f"output.{name}: no description"
    if "required_version" not in module.settings:
        yield "terraform: no required_version"
    uses_aws = any(address.removeprefix("data.").startswith("aws_") for address in module.resources)
    required = module.settings.get("required_providers", [{}])[0]
    if uses_aws and "version" not in required.get("aws", {}):
        yield "terraform: the provider's version is not pinned"


def _references(module: Module) -> Iterator[str]:
    texts = list(_texts([module.locals, module.outputs, module.modules, module.resources, module.providers]))
    own = [text for body in module.variables.values() for text in _texts(body.get("validation", []))]
    used: set[tuple[str, str]] = set()
    for text in [*texts, *own]:
        for kind, name, attribute in _NAMED.findall(text):
            used.add((kind, name))
            known = {"var": module.variables, "local": module.locals, "module": module.modules}[kind]
            if name not in known:
                yield f"{kind}.{name}: not declared"
            elif kind == "module" and attribute not in load(_source(module, name)).outputs:
                yield f"module.{name}.{attribute}: no such output"
        for prefix, pattern in (("data.", _DATA), ("", _RESOURCE)):
            for type_, name, attribute in pattern.findall(text):
                address = f"{prefix}{type_}.{name}"
                used.add(("resource", address))
                if address not in module.resources:
                    yield f"{address}: not declared"
                elif attribute and attribute not in _attributes(f"{prefix}{type_}"):
                    yield f"{address}.{attribute}: no such attribute"
    read = {name for kind, name in _uses(texts) if kind == "var"}
    yield from (f"var.{name}: never used" for name in module.variables if name not in read)
    yield from (f"local.{name}: never used" for name in module.locals if ("local", name) not in used)
    yield from (
        f"{address}: never used"
        for address in module.resources
        if address.startswith("data.") and ("resource", address) not in used
    )


def _uses(texts: list[str]) -> set[tuple[str, str]]:
    return {(kind, name) for text in texts for kind, name, _ in _NAMED.findall(text)}


def _attributes(type_: str) -> set[str]:
    schema = SCHEMA.get(type_, {})
    return {*schema.get("required", ()), *schema.get("optional", ()), *schema.get("computed", ())}


def _against_schema(where: str, body: Body) -> Iterator[str]:
    type_ = where.rpartition(".")[0]
    if type_ not in SCHEMA:
        yield f"{where}: {type_} is not in aws_schema.json"
        return
    yield from _against(where, {name: value for name, value in body.items() if name not in META}, SCHEMA[type_])


def _against(where: str, body: Body, schema: Body) -> Iterator[str]:
    given = dict(body)
    for dynamic in given.pop("dynamic", []):
        [(name, inner)] = dynamic.items()
        if inner.keys() - {"iterator", "labels"} != {"for_each", "content"}:
            yield f"{where}: dynamic {name} has no for_each"
        given[name] = inner["content"]
    known = {*schema["required"], *schema["optional"]}
    yield from (f"{where}: no argument {name}" for name in given if name not in known)
    yield from (f"{where}: {name} is missing" for name in schema["required"] if name not in given)
    for name, value in given.items():
        nested = schema.get("blocks", {}).get(name)
        if nested is not None and isinstance(value, list):
            for inner in value:
                if isinstance(inner, dict):
                    yield from _against(f"{where}.{name}", inner, nested)


def _source(module: Module, name: str) -> Path:
    return (module.folder / module.modules[name]["source"]).resolve()


def _call(module: Module, name: str, body: Body) -> Iterator[str]:
    if not body["source"].startswith("../"):
        yield f"module.{name}: {body['source']} is not in this repository"
        return
    inner = load(_source(module, name))
    given = body.keys() - META - {"source"}
    yield from (f"module.{name}: no variable {each}" for each in sorted(given - inner.variables.keys()))
    yield from (
        f"module.{name}: {each} is missing"
        for each, declared in inner.variables.items()
        if "default" not in declared and each not in given
    )


def _plain(value: Any) -> Any:
    """The parser's tree without its marks; quoted texts lose their quotes, expressions stay `${…}`."""
    if isinstance(value, dict):
        return {_plain(name): _plain(inner) for name, inner in value.items() if name not in _MARKS}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1]
    return value


def _texts(value: Any) -> Iterator[str]:
    """All texts in a tree but descriptions, which are for people."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "description":
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value
