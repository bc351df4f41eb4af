"""Sealing: what stands in a blob, that nothing is sealed twice, and what a crash leaves."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parley import reading
from parley.kms import CheckedKey
from parley.sealing import seal
from parley.spool import content_key, spooled
from parley_protocol import table
from parley_protocol.claims import verify_upload
from parley_protocol.errors import DataError, StateError
from parley_protocol.transcript import Upload, frame_key, key_commitment
from support.client import frame_of
from support.paperwire import Desk, session_of


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    made = Desk(tmp_path)
    made.sign()
    return made


@pytest.mark.parametrize(
    ("rows", "groups", "group_rows"), [(3, 1, 1024), (1024, 1, 1024), (1025, 1, 4096), (40_000, 3, 16384)]
)
def test_tab_3_a_blob_holds_what_the_table_holds(desk: Desk, rows: int, groups: int, group_rows: int) -> None:
    session = session_of(desk, "ada", desk.wire.open())
    frame = frame_of(1, rows, people=rows)
    (sealed,) = session.seal({"visits": frame})
    state = desk.members["ada"].state
    ((entry, _),) = state.uploads(desk.agreement.digest, "visits")
    upload = verify_upload(sealed.cose, desk.agreement)
    assert isinstance(upload, Upload) and upload.digest == sealed.upload
    header = upload.header
    assert (header.groups, header.group_rows, header.party) == (groups, group_rows, "ada")
    blob = sealed.blob.read_bytes()
    spec = desk.agreement.tables["visits"]
    layout = table.Layout.of(header, spec.widths)
    assert len(blob) == layout.size == sealed.size
    digests = blob[slice(*layout.digest_range)]
    assert table.frames_digest(digests) == upload.frames_digest
    key = content_key(entry, state.vault)
    assert key_commitment(key) == header.key_commitment
    frames = AESGCM(frame_key(key, upload.header_bytes))

    def part(offset: int, length: int) -> bytes:
        return blob[offset : offset + length]

    assert table.open_manifest(frames, part(*layout.manifest_range)) == rows == sealed.rows
    columns: list[list[Any]] = [[] for _ in layout.widths]
    for group in range(groups):
        for column, values in enumerate(columns):
            frame_bytes = part(*layout.frame_range(group, column))
            index = layout.frame_index(group, column)
            assert hashlib.sha256(frame_bytes).digest() == digests[index * 32 : index * 32 + 32]
            dtype = "<u8" if column == 0 else spec.columns[column - 1].dtype
            values.append(np.frombuffer(table.open_frame(frames, group, column, frame_bytes), dtype))
    keys, amount, score, site = (np.concatenate(values) for values in columns)
    assert (np.diff(keys[:rows].astype(object)) >= 0).all() and (keys[rows:] == table.KEY_PAD).all()
    for agreed, found in zip(spec.columns, (amount, score, site), strict=True):
        pad = found[rows:]
        assert (np.isnan(pad) if agreed.type == "float" else pad == agreed.null_value).all()
    cents = [round(float(value) * 100) for value in frame["amount"]]
    assert sorted(amount[:rows].tolist()) == sorted(cents)
    assert sorted(score[:rows].tolist()) == pytest.approx(sorted(frame["score"]), abs=0)
    assert sealed.units == len(np.unique(keys[:rows]))


def test_tab_8_nothing_is_sealed_twice_and_a_changed_file_gets_a_new_key(desk: Desk, tmp_path: Path) -> None:
    opened = desk.wire.open()
    path = tmp_path / "visits.csv"
    frame_of(1).to_csv(path, index=False)
    first = session_of(desk, "ada", opened).seal({"visits": path})[0]
    before = first.blob.read_bytes()
    assert session_of(desk, "ada", opened).seal({"visits": str(path)})[0].upload == first.upload
    assert first.blob.read_bytes() == before
    frame_of(2).to_csv(path, index=False)
    second = session_of(desk, "ada", opened).seal({"visits": path})[0]
    assert second.upload != first.upload
    entries = [entry for entry, _ in spooled(desk.members["ada"].state.spool)]
    vault = desk.members["ada"].state.vault
    assert len({content_key(entry, vault) for entry in entries}) == 2
    # A frame is known by its content.
    frames = [session_of(desk, "ada", opened).seal({"visits": frame_of(seed)})[0] for seed in (5, 5, 6)]
    assert frames[0].upload == frames[1].upload != frames[2].upload


def test_a_file_that_changes_while_it_is_read_is_refused(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "visits.csv"
    frame_of(1).to_csv(path, index=False)
    honest = reading.prepare

    def prepare(*arguments: Any, **options: Any) -> Any:
        found = honest(*arguments, **options)
        frame_of(2).to_csv(path, index=False)
        return found

    monkeypatch.setattr(reading, "prepare", prepare)
    with pytest.raises(DataError, match=r"visits.csv: the file was changed while it was read"):
        session_of(desk, "ada", desk.wire.open()).seal({"visits": path})
    assert not list(desk.members["ada"].state.spool.iterdir())


def test_an_interrupted_sealing_leaves_nothing_that_counts(desk: Desk) -> None:
    session = session_of(desk, "ada", desk.wire.open())

    def stop(step: str, done: int, _total: int) -> None:
        if step == "seal":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.seal({"visits": frame_of(1)}, stop)
    spool = desk.members["ada"].state.spool
    assert not list(spool.iterdir())
    # A kill leaves a draft, which is no upload, and which the next sealing removes; one whose process lives stays.
    for name in (".0123", ".4567"):
        (spool / name).mkdir()
        (spool / name / "blob").touch()
    descriptor = os.open(spool / ".4567", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert spooled(spool) == []
        (sealed,) = session.seal({"visits": frame_of(1)})
        assert {path.name for path in spool.iterdir()} == {".4567", sealed.upload.hex()}
    finally:
        os.close(descriptor)


def test_a_damaged_blob_is_not_sent(desk: Desk) -> None:
    session = session_of(desk, "ada", desk.wire.open())
    (sealed,) = session.seal({"visits": frame_of(1)})
    sealed.blob.write_bytes(b"short")
    with pytest.raises(StateError, match="damaged"):
        session_of(desk, "ada", desk.wire.open()).seal({"visits": frame_of(1)})


def test_the_wrong_tables_are_named(desk: Desk) -> None:
    session = session_of(desk, "ada", desk.wire.open())
    for tables in ({}, {"else": frame_of(1)}, {"visits": frame_of(1), "else": frame_of(1)}):
        with pytest.raises(DataError, match="you bring visits, not") as caught:
            session.seal(tables)
        assert caught.value.code == "schema"


def test_only_a_verified_offer_is_sealed_for(desk: Desk) -> None:
    with pytest.raises(AttributeError):
        seal(pd.DataFrame(), desk.agreement, "ada", *(None for _ in range(3)), source=b"")  # type: ignore[arg-type]


def test_kms_18_a_checked_key_comes_from_the_check_and_from_nowhere_else(desk: Desk) -> None:
    with pytest.raises(TypeError, match="from nowhere else"):
        CheckedKey(desk.agreement, "arn:aws:kms:eu-central-1:444455556666:key/a", object())
