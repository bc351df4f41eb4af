"""Sealed tables straight from `parley_protocol`, a host in memory, and the engine over them: no session, no sockets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parley_enclave import engine
from parley_enclave.engine import Admitted, FrameError, Source
from parley_protocol import table
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.schema import Table
from parley_protocol.agreement.source import build
from parley_protocol.identity import PrivateIdentity, PublicIdentity, dump_public
from parley_protocol.output import OutputTable
from parley_protocol.table import Layout
from parley_protocol.transcript import UploadHeader, frame_key, key_commitment

Array = np.ndarray[Any, Any]
GUARD_KEY = b"guard-key" + bytes(23)


@cache
def _public(name: str) -> PublicIdentity:
    return PrivateIdentity.generate(os.urandom).public


def agreement_of(
    members: Sequence[str],
    tables: Mapping[str, Any],
    outputs: Mapping[str, Any],
    rules: Mapping[str, Any] | None = None,
) -> Agreement:
    """An agreement in the words of the language: numbers may be numbers here, all else is as people write it."""
    tree = {
        "parley": 1,
        "version": 1,
        "title": "engine",
        "purpose": "A test.",
        "expires": "2099-12-31",
        "platform": "simulated",
        "root": b"r" * 32,
        "measurements": [{"PCR0": b"0" * 48, "PCR1": b"1" * 48, "PCR2": b"2" * 48}],
        "members": {name: name for name in members},
        "unit": {"name": "person", "normalise": "exact"},
        "tables": tables,
        "outputs": {name: {"kind": "aggregate", "to": list(members), **output} for name, output in outputs.items()},
        "rules": rules or {"everyone": {"min_units": 2, "min_parties": 1, "coalition": 0}},
        "session": {"start": members[0], "quorum": "all", "max_releases": 1},
    }
    return build(_texts(tree), lambda name: dump_public(_public(name)))


def _texts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _texts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_texts(item) for item in value]
    return value if isinstance(value, str | bytes) else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass
class Blob:
    """One sealed table: where the host keeps it, what its party signed, and what stands in it."""

    source: Source
    frames_digest: bytes
    data: bytes = field(repr=False)


@dataclass
class Host:
    """Blobs by number, and whatever a test makes of a pull."""

    blobs: dict[int, bytes] = field(default_factory=dict, repr=False)
    pulls: list[tuple[int, tuple[tuple[int, int], ...]]] = field(default_factory=list, repr=False)
    twist: Callable[[int, int, bytes], bytes] = lambda blob, offset, data: data

    def pull(self, blob: int, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The ranges, as the host of an enclave answers them."""
        self.pulls.append((blob, tuple(ranges)))
        data = self.blobs.get(blob, b"")
        found = []
        for offset, length in ranges:
            if offset + length > len(data):
                raise FrameError("the host does not hold a range")
            found.append(memoryview(self.twist(blob, offset, data[offset : offset + length])))
        return found


def seal(
    agreement: Agreement,
    party: str,
    name: str,
    keys: Array,
    columns: Sequence[Array],
    *,
    number: int = 0,
    rows: int | None = None,
    size: tuple[int, int] | None = None,
    change: Callable[[list[Array]], None] | None = None,
) -> Blob:
    """Seals physical values, nulls included, sorted by key.

    `rows`, `size` (groups, rows of a group) and `change` (of the padded columns, the key first) lie where they are given.
    """
    spec = agreement.tables[name]
    groups, group_rows = size or table.bucket(len(keys))
    padded = pad(spec, keys, columns, groups * group_rows)
    if change is not None:
        change(padded)
    content_key = hashlib.sha256(f"{party} {name} {number}".encode()).digest()
    header = UploadHeader(
        agreement.digest, party, name, spec.schema_digest, groups, group_rows, bytes(16), key_commitment(content_key)
    )
    layout = Layout.of(header, spec.widths)
    key = frame_key(content_key, header.to_bytes())
    aead = AESGCM(key)
    frames = [table.seal_manifest(aead, len(keys) if rows is None else rows)]
    for group in range(groups):
        part = slice(group * group_rows, (group + 1) * group_rows)
        frames += [table.seal_frame(aead, group, place, column[part].tobytes()) for place, column in enumerate(padded)]
    hashes = b"".join(hashlib.sha256(frame).digest() for frame in frames)
    source = Source(party=party, table=name, header=header, layout=layout, blob=number, frame_key=key)
    return Blob(source, table.frames_digest(hashes), hashes + b"".join(frames))


def pad(spec: Table, keys: Array, columns: Sequence[Array], total: int) -> list[Array]:
    """The columns of a sealed table, the key first, padded to `total` rows."""
    padded = [np.full(total, table.KEY_PAD, "<u8")]
    padded += [np.full(total, column.null_value, column.dtype) for column in spec.columns]
    for whole, values in zip(padded, (keys, *columns), strict=True):
        whole[: len(values)] = values
    return padded


def admit(agreement: Agreement, blob: Blob, host: Host) -> Admitted:
    """Puts a blob at the host and admits it."""
    host.blobs[blob.source.blob] = blob.data
    return engine.admit(blob.source, agreement, blob.frames_digest, GUARD_KEY, host.pull, lambda percent: None)


Tables = Mapping[tuple[str, str], tuple[Array, Sequence[Array]]]
"""(party, table) to keys and physical columns, sorted by key."""


@dataclass
class Run:
    """A computation: its plan, its host, the state of each range."""

    plan: engine.Plan
    host: Host

    def scan(self, number: int) -> bytes:
        """The partial state of a range."""
        return engine.scan(self.plan, number, GUARD_KEY, self.host.pull, lambda percent: None)

    def partials(self, order: Sequence[int] | None = None) -> list[bytes]:
        """The partial states of all ranges, computed in `order`."""
        found = {number: self.scan(number) for number in order or range(self.plan.ranges)}
        return [found[number] for number in range(self.plan.ranges)]

    def outputs(self, order: Sequence[int] | None = None) -> list[OutputTable]:
        """The outputs."""
        return engine.finish(self.plan, self.partials(order))


def prepare(agreement: Agreement, tables: Tables) -> Run:
    """Seals, admits and plans."""
    host = Host()
    sources = []
    for number, ((party, name), (keys, columns)) in enumerate(tables.items()):
        blob = seal(agreement, party, name, keys, columns, number=number)
        sources.append((blob.source, admit(agreement, blob, host)))
    return Run(engine.plan(agreement, sources), host)


def compute(agreement: Agreement, tables: Tables) -> dict[str, OutputTable]:
    """The outputs by name."""
    return {output.name: output for output in prepare(agreement, tables).outputs()}
