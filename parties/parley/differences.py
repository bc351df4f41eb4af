"""What differs between two agreements, every field of it: what an amendment changes is read before it is signed.

It is told from the canonical forms, so that nothing which the digest covers is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from parley.agreements import duration
from parley_protocol.agreement.model import Agreement

_Tree: TypeAlias = "str | dict[str, _Tree]"
_Path: TypeAlias = tuple[str, ...]

_HERE: Final = ""
"""What stands for an item of a list beside its name."""
_DURATIONS: Final = ("deadline", "countersign_within")


@dataclass(frozen=True, slots=True)
class Change:
    """One field: `old` is None where it is new, `new` is None where it is gone. Items of a list are the last of `path`."""

    path: _Path
    old: str | None
    new: str | None

    def __str__(self) -> str:
        sign = "+" if self.old is None else "-" if self.new is None else "~"
        values = [value for value in (self.old, self.new) if value is not None]
        if values == [_HERE]:
            return f"{sign} {'.'.join(self.path[:-1])}: {self.path[-1]}"
        return f"{sign} {'.'.join(self.path)}: {' -> '.join(values)}"


def changes(old: Agreement, new: Agreement) -> tuple[Change, ...]:
    """Every field in which `new` is another agreement than `old`; empty only where they are the same."""
    found = tuple(_compare((), _agreement(old), _agreement(new)))
    if not found and old != new:
        return (Change(("digest",), old.digest.hex(), new.digest.hex()),)
    return found


def amends(old: Agreement, new: Agreement) -> bool:
    """Whether `new` is the next version after `old`."""
    return new.replaces == old.digest and new.version == old.version + 1


def _compare(path: _Path, old: _Tree | None, new: _Tree | None) -> Iterator[Change]:
    if isinstance(old, str) or isinstance(new, str):
        if isinstance(old, dict) or isinstance(new, dict):
            yield from _compare(path, old, None)
            yield from _compare(path, None, new)
        elif old != new:
            yield Change(path, old, new)
        return
    before, after = old or {}, new or {}
    if not before and not after and old != new:
        yield Change(path, None if old is None else "nothing", None if new is None else "nothing")
    for name in (*before, *(name for name in after if name not in before)):
        yield from _compare((*path, name), before.get(name), after.get(name))
    kept, now = [name for name in before if name in after], [name for name in after if name in before]
    if kept != now:
        yield Change((*path, "order"), ", ".join(kept), ", ".join(now))


def _agreement(agreement: Agreement) -> _Tree:
    form = _tree(agreement.to_value())
    assert isinstance(form, dict)
    form["members"] = {
        name: f"{member.fingerprint}, SHA-256 {hashlib.sha256(member.to_bytes()).hexdigest()}"
        for name, member in agreement.members.items()
    }
    return form


def _tree(value: object) -> _Tree:
    """A canonical form as names and texts: what stands in a list goes by its name, its register or itself."""
    if isinstance(value, Mapping):
        return {
            str(name): duration(item) if name in _DURATIONS and isinstance(item, int) else _tree(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        found: dict[str, _Tree] = {}
        for item in value:
            name, content = _item(item)
            unique, count = name, 1
            while unique in found:
                count += 1
                unique = f"{name} ({count})"
            found[unique] = content
        return found
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def _item(item: object) -> tuple[str, _Tree]:
    if isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str):
        return item[0], _tree(item[1])
    if isinstance(item, Mapping) and isinstance(item.get("name"), str):
        return str(item["name"]), _tree({key: part for key, part in item.items() if key != "name"})
    if isinstance(item, Mapping) and isinstance(item.get("PCR0"), bytes):
        pcr0 = item["PCR0"]
        return f"{pcr0[:2].hex()}...{pcr0[-2:].hex()}", _tree(item)
    content = _tree(item)
    return (content, _HERE) if isinstance(content, str) else ("item", content)
