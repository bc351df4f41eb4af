"""The canonical form of an agreement: what members sign, what PCR16 holds, what names a series (SPEC, "Agreements").

`parse` turns it back into the language and through every check of `source`, and then compares: only the bytes that
`canonical` would write for the agreement that they say are accepted.
"""

from __future__ import annotations

import errno
from functools import lru_cache
from typing import NoReturn

from parley_protocol import limits
from parley_protocol.agreement.model import LABEL, Agreement
from parley_protocol.agreement.source import Tree, build
from parley_protocol.encoding import Value, decode
from parley_protocol.errors import AgreementError, MalformedError


def canonical(agreement: Agreement) -> bytes:
    """The bytes of an agreement: deterministic CBOR with the label first."""
    return agreement.canonical


def parse(data: bytes) -> Agreement:
    """The agreement whose canonical form is `data`; MalformedError for anything else."""
    # Agreements are immutable, and a client meets the same one in every step of a session.
    return _parse(bytes(data))


@lru_cache(maxsize=4)
def _parse(data: bytes) -> Agreement:
    value = decode(data, limit=limits.AGREEMENT_BYTES)  # agr-4
    if type(value) is not list or len(value) != 2 or value[0] != LABEL or type(value[1]) is not dict:
        raise MalformedError("not an agreement")
    try:
        agreement = build(_language(value[1]), _no_file, most=1)  # agr-5
    except AgreementError as error:
        raise MalformedError(f"not a valid agreement: {error.problems[0]}") from None
    if agreement.canonical != data:  # agr-6
        raise MalformedError("not the canonical form of the agreement that it says")
    return agreement


def _no_file(name: str) -> NoReturn:
    raise FileNotFoundError(errno.ENOENT, "the canonical form names no file", name)


def _language(form: Value) -> Tree:
    """The map of the canonical form as people could have written it, with keys and digests as bytes in their places."""
    tree: dict[str, Tree] = {}
    for key, value in _map(form).items():
        if key in ("members", "groups", "rules", "kms"):
            tree[key] = _pairs(value)
        elif key == "tables":
            tree[key] = {name: _table(item) for name, item in _named(value).items()}
        elif key == "outputs":
            tree[key] = {name: _output(item) for name, item in _named(value).items()}
        elif key == "session":
            tree[key] = {name: _session(name, item) for name, item in _map(value).items()}
        else:
            tree[key] = _scalars(value)
    return tree


def _table(form: dict[str, Value]) -> Tree:
    columns = {
        name: {key: _scalars(value) for key, value in column.items()}
        for name, column in _named(form.get("columns")).items()
    }
    return {**{key: _scalars(value) for key, value in form.items()}, "columns": columns}


def _output(form: dict[str, Value]) -> Tree:
    tree: dict[str, Tree] = {key: _scalars(value) for key, value in form.items()}
    tree["join"] = _pairs(form.get("join"))
    tree["values"] = _pairs(form.get("values"))
    tree["by"] = {name: _grouping(grouping) for name, grouping in _named(form.get("by")).items()}
    return tree


def _grouping(form: dict[str, Value]) -> Tree:
    if "edges" not in form:
        return _scalars(form.get("column"))
    return {("bin" if key == "column" else key): _scalars(value) for key, value in form.items()}


def _session(name: str, value: Value) -> Tree:
    if name in ("deadline", "countersign_within") and type(value) is int:
        return f"{value} milliseconds"
    return _scalars(value)


def _scalars(value: Value) -> Tree:
    """Numbers and truth values as the texts that stand for them."""
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int:
        return str(value)
    if type(value) is list:
        return [_scalars(item) for item in value]
    if type(value) is dict:
        return {key: _scalars(item) for key, item in _map(value).items()}
    if type(value) is str or type(value) is bytes:
        return value
    raise MalformedError("null in an agreement")


def _map(value: Value) -> dict[str, Value]:
    if type(value) is not dict:
        raise MalformedError("not a map of an agreement")
    found: dict[str, Value] = {}
    for key, item in value.items():
        if type(key) is not str:
            raise MalformedError("not a map of an agreement")
        found[key] = item
    return found


def _list(value: Value) -> list[Value]:
    if type(value) is not list:
        raise MalformedError("not a list of an agreement")
    return value


def _pairs(value: Value) -> dict[str, Tree]:
    """The items of [[name, value], ...], each name once."""
    found: dict[str, Tree] = {}
    for item in _list(value):
        if type(item) is not list or len(item) != 2 or type(item[0]) is not str or item[0] in found:
            raise MalformedError("not a list of names with values, each once")
        found[item[0]] = _scalars(item[1])
    return found


def _named(value: Value) -> dict[str, dict[str, Value]]:
    """The maps of [{"name": ..., ...}, ...] by name, each name once."""
    found: dict[str, dict[str, Value]] = {}
    for item in _list(value):
        form = _map(item)
        name = form.pop("name", None)
        if type(name) is not str or name in found:
            raise MalformedError("not a list of maps with names, each once")
        found[name] = form
    return found
