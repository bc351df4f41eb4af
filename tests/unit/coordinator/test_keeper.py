"""The keeper: what is due is deleted, what a session may need is not, and a crash leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from parley_coordinator import store as db
from parley_coordinator.blobs import BlobStore, Directory, bundle_name, upload_name
from parley_coordinator.config import Keep
from parley_coordinator.keeper import Keeper
from parley_coordinator.models import BundleRow, DoomedBlob, KmsJoinRow, SessionRow, UploadRow
from parley_coordinator.s3 import GAP, Bucket, Progress
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import RefusedError, UnavailableError
from support import s3
from support.desk import NOW, Desk, key, make_agreement
from support.enclave import Sealed

DAY = 86_400_000
KEEP = Keep(uploads_s=30 * 86400, bundles_s=90 * 86400, parts_s=7 * 86400)


@pytest.fixture(scope="module")
def bucket_url() -> Iterator[str]:
    with s3.server() as url:
        yield url


@pytest.fixture(params=["directory", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, bucket_url: str) -> Iterator[BlobStore]:
    made: BlobStore = Directory(tmp_path / "blobs") if request.param == "directory" else Bucket(s3.bucket(bucket_url))
    yield made
    made.close()


@pytest.fixture
def desk(tmp_path: Path, database: str, blobs: BlobStore) -> Iterator[Desk]:
    made = Desk(tmp_path, database=database, blobs=blobs)
    yield made
    made.store.close()


@pytest.fixture
def agreement(desk: Desk) -> Agreement:
    made = make_agreement()
    desk.sign(made)
    return made


@pytest.fixture
def sealed(desk: Desk, agreement: Agreement) -> Sealed:
    made = desk.sealed(agreement, "bob")
    assert desk.upload(made, "bob").complete
    return made


@pytest.fixture
def keeper(desk: Desk) -> Keeper:
    return Keeper(desk.store, desk.blobs, KEEP, desk.clock)


def add_session(desk: Desk, agreement: Agreement, phase: str, ended_ms: int | None = None) -> int:
    with desk.store.write() as session:
        row = SessionRow(
            session=b"s" * 16,
            agreement=agreement.digest,
            series=agreement.series,
            begin=b"",
            phase=phase,
            opened_ms=NOW,
            ended_ms=ended_ms,
        )
        session.add(row)
        session.flush()
        if phase == "released":
            session.add(BundleRow(number=row.number, size=6, at_ms=ended_ms or 0))
            desk.blobs.put(bundle_name(b"s" * 16), [b"bundle"])
        return row.number


def uploads(desk: Desk) -> list[int]:
    with desk.store.read() as session:
        return list(session.scalars(select(UploadRow.number)))


def there(desk: Desk, name: str) -> bool:
    try:
        desk.blobs.reader(name).close()
    except FileNotFoundError:
        return False
    return True


def test_tables_go_some_time_after_the_last_release(
    desk: Desk, agreement: Agreement, sealed: Sealed, keeper: Keeper
) -> None:
    (number,) = uploads(desk)
    add_session(desk, agreement, "released", NOW + DAY)
    for now, left in ((NOW + 31 * DAY - 1, [number]), (NOW + 31 * DAY, [])):
        desk.now = now
        keeper.look()
        assert uploads(desk) == left
        assert there(desk, upload_name(number)) == bool(left)
    # They can be brought anew, and the inbox asks for them.
    with pytest.raises(RefusedError) as caught:
        desk.uploads.get(key("bob"), sealed.upload.digest)
    assert caught.value.code == "unknown-upload"
    assert "UPLOAD" in desk.waiting("bob")
    assert desk.upload(sealed, "bob").complete
    assert uploads(desk) != [number]


def test_tables_of_a_join_by_kms_that_stands_stay_until_the_agreement_ends(
    desk: Desk, agreement: Agreement, sealed: Sealed, keeper: Keeper
) -> None:
    add_session(desk, agreement, "released", NOW + DAY)
    desk.upload(desk.sealed(agreement, "ann"), "ann")
    with desk.store.write() as session:
        session.add(KmsJoinRow(agreement=agreement.digest, party="bob", digest=b"j", number=1, cose=b"", at_ms=NOW))
    desk.now = NOW + 31 * DAY
    keeper.look()
    with desk.store.read() as session:
        assert list(session.scalars(select(UploadRow.party))) == ["bob"]
    desk.now = agreement.expires_ms + 30 * DAY
    keeper.look()
    assert uploads(desk) == []


@pytest.mark.parametrize("name", ["upload-" + "f" * 64, "upload-" + "f" * 16, "bundle-ff"])
def test_a_name_that_no_upload_has_is_not_growing(keeper: Keeper, name: str) -> None:
    assert keeper._growing(name) is None


def test_what_is_newer_than_the_release_stays(desk: Desk, agreement: Agreement, keeper: Keeper) -> None:
    add_session(desk, agreement, "released", NOW)
    desk.now = NOW + 29 * DAY
    desk.upload(desk.sealed(agreement, "bob"), "bob")
    desk.now = NOW + 40 * DAY
    keeper.look()
    assert len(uploads(desk)) == 1


@pytest.mark.parametrize("phase", ["launching", "open", "rostered", "computing"])
def test_what_a_session_needs_stays(
    desk: Desk, agreement: Agreement, sealed: Sealed, keeper: Keeper, phase: str
) -> None:
    add_session(desk, agreement, phase)
    desk.now = agreement.expires_ms + 400 * DAY
    keeper.look()
    assert len(uploads(desk)) == 1


def test_without_a_release_tables_stay_as_long_as_the_agreement(
    desk: Desk, agreement: Agreement, sealed: Sealed, keeper: Keeper
) -> None:
    half = desk.sealed(agreement, "ann")
    desk.upload(half, "ann", 0, 1000)
    numbers = uploads(desk)
    desk.now = agreement.expires_ms + 30 * DAY - 1
    keeper.look()
    assert uploads(desk) == numbers
    desk.now += 1
    keeper.look()
    assert uploads(desk) == []
    assert not any(there(desk, upload_name(number)) for number in numbers)


def test_bundles_go_and_it_is_said(desk: Desk, agreement: Agreement, keeper: Keeper) -> None:
    add_session(desk, agreement, "released", NOW)
    desk.now = NOW + 90 * DAY - 1
    keeper.look()
    assert desk.releases.bundle(key("cyd"), b"s" * 16).size == 6
    desk.now += 1
    keeper.look()
    assert not there(desk, bundle_name(b"s" * 16))
    with pytest.raises(RefusedError) as caught:
        desk.releases.bundle(key("cyd"), b"s" * 16)
    assert caught.value.code == "expired"


def test_for_ever_is_for_ever(desk: Desk, agreement: Agreement, sealed: Sealed) -> None:
    add_session(desk, agreement, "released", NOW)
    desk.now = agreement.expires_ms + 10_000 * DAY
    Keeper(desk.store, desk.blobs, Keep(uploads_s=0, bundles_s=0), desk.clock).look()
    assert len(uploads(desk)) == 1
    assert there(desk, bundle_name(b"s" * 16))


def test_a_crash_between_note_and_deletion_is_made_up(
    desk: Desk, agreement: Agreement, sealed: Sealed, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    (number,) = uploads(desk)
    desk.now = agreement.expires_ms + 30 * DAY

    def away(*arguments: Any) -> None:
        raise UnavailableError("cut")

    with monkeypatch.context() as patched:
        patched.setattr(type(desk.blobs), "delete", away)
        with pytest.raises(UnavailableError):
            keeper.look()
    assert uploads(desk) == []
    assert there(desk, upload_name(number))
    keeper.look()
    assert not there(desk, upload_name(number))
    with desk.store.read() as session:
        assert session.query(DoomedBlob).count() == 0


@pytest.mark.parametrize("blobs", ["s3"], indirect=True)
def test_streams_reserve_part_numbers_and_give_back_what_they_did_not_use(
    desk: Desk, agreement: Agreement, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = desk.sealed(agreement, "bob")
    upload = Progress("u", ((1, 2, 100),), 0, "", floor=3)
    row = desk.uploads.begin(key("bob"), sealed.cose)
    with desk.store.write() as session:
        stored = session.get_one(UploadRow, row.number)
        stored.stored, stored.state = 100, upload.dump()

    def floor() -> int:
        with desk.store.read() as session:
            return Progress.load(session.get_one(UploadRow, row.number).state).floor

    def away(*_: object) -> Any:
        raise UnavailableError("cut")

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "writer", away)
        for _ in range(3):
            with pytest.raises(UnavailableError), desk.uploads.writing(row):
                pass
    assert floor() == 3
    parts: dict[int, tuple[int, dict[str, str]]] = {1: (50, {}), 2: (50, {})}
    monkeypatch.setattr(Bucket, "parts", lambda *_: parts)
    with desk.uploads.writing(row):
        assert floor() == 3 + GAP
        # It is stopped: nothing is told.
    with desk.uploads.writing(row) as writing:
        assert floor() == 3 + 2 * GAP
        writing.sync()
    assert floor() == 3 + GAP


def test_a_stream_whose_upload_was_deleted_is_told(desk: Desk, agreement: Agreement, keeper: Keeper) -> None:
    sealed = desk.sealed(agreement, "bob")
    row = desk.uploads.begin(key("bob"), sealed.cose)
    with desk.uploads.writing(row) as writing:
        writing.write(0, sealed.blob[:100])
        desk.now = agreement.expires_ms + 30 * DAY
        keeper.look()
        with pytest.raises(RefusedError) as caught:
            writing.sync()
        assert caught.value.code == "unknown-upload"


def test_it_runs_by_itself_and_goes_on_after_a_fault(
    desk: Desk, agreement: Agreement, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.enclave import until

    desk.now = agreement.expires_ms + 30 * DAY
    keeper = Keeper(desk.store, desk.blobs, Keep(every_s=0.02), desk.clock)
    real = keeper._doom
    failed: list[int] = []

    def fail_once() -> bool:
        if not failed:
            failed.append(1)
            raise RuntimeError
        return real()

    monkeypatch.setattr(keeper, "_doom", fail_once)
    keeper.start()
    until(lambda: uploads(desk) == [])
    keeper.close()
    assert failed


def test_a_deleted_bundle_is_not_a_lost_session(desk: Desk, agreement: Agreement) -> None:
    add_session(desk, agreement, "lost")
    with desk.store.read() as session, pytest.raises(RefusedError) as caught:
        db.bundle_of(session, session.query(SessionRow).one())
    assert caught.value.code == "lost"
