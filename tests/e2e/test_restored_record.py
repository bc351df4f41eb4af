"""A coordinator whose database was restored from a backup that is older than a release: the series stops, and goes on."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from parley import Session
from parley_protocol.bundle import Bundle
from parley_protocol.errors import RefusedError, VerificationError
from support.client import Members, frame_of, members
from support.enclave import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
FRAMES = {"ann": frame_of(1), "bob": frame_of(2)}


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Members]:
    with members(tmp_path, ("ann", "bob", "cyd"), analysts=["cyd"], start=("ann", "cyd")) as made:
        made.sign()
        yield made


def played(three: Members) -> Session:
    """A session from opening to its release, as ann sees it."""
    session = three.connect("ann").open(three.agreement)
    for name, frame in FRAMES.items():
        three.connect(name).session(session.id).submit({"visits": frame})
    session.start()
    for name in FRAMES:
        three.connect(name).session(session.id).countersign()
    assert session.wait(timeout_s=120).phase == "released"
    return session


def back_up(three: Members, to: Path) -> None:
    """As parley-backup does, while the coordinator runs: the database first, then the blobs."""
    to.mkdir()
    with (
        closing(sqlite3.connect(three.coordinator.folder / "coordinator.db")) as database,
        closing(sqlite3.connect(to / "coordinator.db")) as copy,
    ):
        database.backup(copy)
    shutil.copytree(three.coordinator.folder / "blobs", to / "blobs")


def put_back(three: Members, backup: Path) -> None:
    """The parent is gone, with its enclaves: another one begins with the backup."""
    three.coordinator.kill()
    three.coordinator.end_enclaves()
    folder = three.coordinator.folder
    for name in ("coordinator.db", "coordinator.db-wal", "coordinator.db-shm"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "blobs")
    shutil.copy(backup / "coordinator.db", folder)
    shutil.copytree(backup / "blobs", folder / "blobs")
    three.coordinator.start()


def test_crd_24_a_series_whose_release_was_restored_goes_on_and_charges_none_twice(three: Members) -> None:
    played(three).release()
    backup = three.folder / "backup"
    back_up(three, backup)
    second = played(three)
    kept = three.folder / "kept.bundle"
    three.connect("cyd").session(second.id).fetch(kept, opened=True)
    head = second.release().verified.record.record.head
    put_back(three, backup)

    # Whoever has seen the release joins nothing any more.
    stuck = three.connect("ann").open(three.agreement)
    for name in ("ann", "cyd"):
        with pytest.raises(VerificationError) as caught:
            three.connect(name).session(stuck.id).verify()
        assert caught.value.code == "head"
    with pytest.raises(RefusedError) as unknown:
        three.connect("bob").session(second.id)
    assert unknown.value.code == "unknown-session"

    # The operator takes it back while the coordinator runs; the session under the old head ends.
    arguments = ("restore-record", str(kept), "--dir", str(three.coordinator.folder))
    said = three.coordinator.run_command(*arguments)
    assert said.split()[0] == second.id.hex() and said.endswith("restored\n") and "record 2 " in said
    assert three.coordinator.run_command(*arguments).endswith("was here\n")
    # Whoever brings the same record with outputs that are none spoils nothing, and the operator may say which are to be stored.
    bundle = Bundle.from_bytes(kept.read_bytes())
    zeros = tuple(replace(item, sealed=bytes(len(item.sealed))) for item in bundle.sealed)
    spoiled = three.folder / "spoiled.bundle"
    spoiled.write_bytes(replace(bundle, sealed=zeros).to_bytes())
    brought = ("restore-record", str(spoiled), "--dir", str(three.coordinator.folder))
    assert three.coordinator.run_command(*brought).endswith("was here\n")
    assert three.coordinator.run_command(*brought, "--replace-outputs").endswith("was here, its outputs stored\n")
    with pytest.raises(VerificationError) as unopened:
        three.connect("bob").session(second.id).release()
    assert unopened.value.code == "key"
    assert three.coordinator.run_command(*arguments, "--replace-outputs").endswith("was here, its outputs stored\n")
    status = three.connect("ann").session(stuck.id).status()
    assert (status.phase, status.code) == ("lost", "head")

    # bob had not seen it: it is the release that the others have, and the store holds no plaintext.
    assert three.connect("bob").session(second.id).release().verified.record.record.head == head
    [stored] = (three.coordinator.folder / "blobs").rglob(f"bundle-{second.id.hex()}")
    assert Bundle.from_bytes(kept.read_bytes()).opened and not Bundle.from_bytes(stored.read_bytes()).opened

    # And the series goes on after it.
    third = played(three)
    assert third.id not in (second.id, stuck.id)
    record = third.release().verified.record.record.body
    assert (record.sequence, record.charged, record.previous) == (3, 3, head)
    assert three.connect("cyd").session(third.id).release().sequence == 3
    # The enclave of the session that ended is not left behind.
    until(lambda: three.coordinator.enclaves() == [], 60)
