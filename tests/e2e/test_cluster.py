"""Two coordinators over one PostgreSQL and one bucket: whichever is asked, whichever dies or stops, a session has one of them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import grpc
import pytest
from sqlalchemy import func, select

from parley_coordinator.models import EventRow, LeaseRow, RecordRow, SessionRow
from parley_coordinator.store import Store
from parley_deploy.nsm import LocalRoot, image_measurements
from parley_deploy.pki import system_now_ms
from parley_protocol.agreement.model import Measurement
from parley_protocol.bundle import verify_bundle
from parley_protocol.v1 import coordinator_pb2 as pb
from support import image_tree, s3
from support.coordinator import Coordinator, Play, code_of, now_ms, refused
from support.enclave import Party, Simulation, agreement_of, identities, rows_of, until
from support.postgres import Cluster

pytestmark = pytest.mark.e2e

NAMES = ("ann", "bob", "cyd")
LEASE_S = 2.0
ABANDON_S = 3.0


@pytest.fixture(scope="module")
def bucket_url() -> Iterator[str]:
    with s3.server() as url:
        yield url


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for package in image_tree.PACKAGES:
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns(*image_tree.LEFT_OUT))
    shutil.copy(image_tree.LOCK, folder)
    return folder


class Pair:
    """Two coordinators with one key, store and bucket; on one machine (`shared`), or as if on two."""

    def __init__(
        self, folder: Path, tree: Path, database: str, bucket_url: str, *, shared: bool, abandon_s: float = ABANDON_S
    ) -> None:
        self.tree = tree
        self.root = folder / "root"
        self.root.mkdir(parents=True)
        LocalRoot.create(system_now_ms()).save(self.root)
        self.database = database
        bucket = s3.bucket(bucket_url)
        command = [sys.executable, "-m", "parley_deploy.enclave", "--root", str(self.root), "--workers", "1"]
        command += ["--tree", str(tree)]
        toml = (
            f'[store.s3]\nregion = "us-east-1"\nendpoint_url = "{bucket_url}"\naddressing = "path"\n'
            f"[cluster]\nlease_s = {LEASE_S}\nabandon_s = {abandon_s}\n"
        )
        self.both = [
            Coordinator(
                folder / name,
                command,
                toml,
                database=database,
                blobs=f"s3://{bucket.bucket}/{bucket.prefix}",
                enclaves=folder / "e" if shared else None,
            )
            for name in ("a", "b")
        ]
        for name in ("tls.crt", "tls.key"):
            shutil.copy(folder / "a" / name, folder / "b" / name)
        self.a, self.b = self.both

    def play(self) -> Play:
        """ann and bob bring tables, cyd is the analyst; signed through one coordinator, uploaded through the other."""
        measured = image_measurements(self.tree)
        simulation = SimpleNamespace(
            root=LocalRoot.load(self.root), measurement=Measurement(measured[0], measured[1], measured[2])
        )
        members = identities(NAMES)
        agreement = agreement_of(cast("Simulation", simulation), members, analysts=["cyd"])
        parties = {
            name: Party(agreement, name, members[name], {"visits": rows_of(number, 2000)})
            for number, name in enumerate(agreement.parties)
        }
        self.a.operators(members["ann"])
        for coordinator in self.both:
            coordinator.start()
        made = Play(self.a, agreement, members, parties)
        made.sign()
        made.coordinator = self.b
        made.upload()
        made.coordinator = self.a
        return made

    def one(self, query: object) -> object:
        """A value of the store."""
        store = Store(self.database)
        try:
            with store.read() as session:
                return session.scalar(query)  # type: ignore[call-overload]
        finally:
            store.close()

    def holder(self) -> Coordinator:
        """The one that has the lease of the newest session."""
        held = self.one(select(LeaseRow.holder).order_by(LeaseRow.number.desc()).limit(1))
        return next(one for one in self.both if (one.folder / "holder").read_text() == held)

    def check_released_once(self) -> None:
        """One record, one release, nothing lost."""
        assert self.one(select(func.count()).select_from(RecordRow)) == 1
        assert self.one(select(func.count()).select_from(EventRow).where(EventRow.kind == "released")) == 1
        assert self.one(select(func.count()).select_from(EventRow).where(EventRow.kind == "lost")) == 0


@pytest.fixture
def pair(tmp_path: Path, tree: Path, cluster: Cluster, bucket_url: str) -> Iterator[Pair]:
    made = Pair(tmp_path / "p", tree, cluster.migrated(), bucket_url, shared=True)
    with made.a, made.b:
        yield made


@pytest.fixture
def apart(tmp_path: Path, tree: Path, cluster: Cluster, bucket_url: str) -> Iterator[Pair]:
    made = Pair(tmp_path / "p", tree, cluster.migrated(), bucket_url, shared=False)
    with made.a, made.b:
        yield made


def patiently(work: object, *arguments: object, seconds: float = 60.0) -> None:
    """Does what a client does: the same call again where it is told so."""
    end = time.monotonic() + seconds
    while True:
        try:
            work(*arguments)  # type: ignore[operator]
            return
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            gone = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            assert gone and time.monotonic() < end, error
            time.sleep(0.2)


def test_crd_22_any_coordinator_answers_any_call(apart: Pair) -> None:
    """The enclave is A's alone; every call of the session is made at B."""
    made = apart.play()
    made.open()
    assert apart.a.enclaves() and not apart.b.enclaves()
    made.coordinator = apart.b
    state = made.open()
    assert state.session == made.session
    assert [made.client(name).waiting() for name in NAMES] == [["JOIN"], ["JOIN"], []]
    offer = made.offer("cyd")
    made.join(offer)
    roster = made.start(offer)
    made.countersign(offer, roster)
    assert made.wait("released").percent == 100
    verified = verify_bundle(made.client("cyd").bundle(made.session), now_ms=now_ms())
    assert verified.countersigned == ("ann", "bob")
    kinds = [event.kind for event in made.client("bob").events(2.0, made.session)]
    made.coordinator = apart.a
    assert kinds == [event.kind for event in made.client("bob").events(2.0, made.session)]
    assert (kinds[:3], kinds[-2:]) == (["opened", "joined", "joined"], ["released", "fetched"])
    assert not apart.b.enclaves()
    apart.check_released_once()


def narrow(*coordinators: Coordinator) -> None:
    """Lets each of them have one enclave at a time."""
    for coordinator in coordinators:
        file = coordinator.folder / "coordinator.toml"
        file.write_text(file.read_text().replace("[launcher.local]", "[launcher]\nenclaves = 1\n[launcher.local]"))


def another(made: Play, coordinator: Coordinator, purpose: str) -> Play:
    """The same members with another agreement."""
    found = Play(coordinator, replace(made.agreement, purpose=purpose), made.members, {})
    found.sign()
    return found


def opened(made: Play, request: bytes) -> pb.SessionState:
    """Opens a session as a client does: the same request again where it is told so."""
    end = time.monotonic() + 90
    while True:
        try:
            return made.open(request)
        except grpc.RpcError as error:
            assert code_of(error) in ("no-capacity", "unavailable") and time.monotonic() < end, error
            time.sleep(0.2)


def test_crd_22_who_has_no_place_for_an_enclave_lets_another_launch(apart: Pair) -> None:
    narrow(apart.a)
    made = apart.play()
    made.open()
    other, request = another(made, apart.a, "Another."), os.urandom(16)
    state = opened(other, request)
    assert state.phase == "open" and apart.holder() is apart.b
    assert len(apart.a.enclaves()) == len(apart.b.enclaves()) == 1
    assert other.offer().offer.session == state.session
    other.coordinator = apart.b
    assert other.open(request).session == state.session
    assert made.state().phase == "open"


def test_crd_22_no_capacity_is_answered_when_none_has_a_place(apart: Pair) -> None:
    narrow(apart.a, apart.b)
    made = apart.play()
    made.open()
    second = another(made, apart.b, "Another.")
    second.open()
    third, request = another(made, apart.a, "A third one."), os.urandom(16)
    with refused("no-capacity"):
        third.open(request)
    assert apart.one(select(func.count()).select_from(SessionRow).where(SessionRow.phase == "launching")) == 0
    os.kill(apart.b.enclave_pid(), signal.SIGKILL)
    second.wait("lost")
    assert opened(third, request).phase == "open"
    assert apart.holder() is apart.b


def test_events_of_one_arrive_at_the_other_at_once(apart: Pair) -> None:
    made = apart.play()
    watcher = apart.b.client(made.members["bob"])
    stream = watcher.stub.Watch(pb.WatchRequest(after=0), metadata=watcher.metadata(), timeout=30)
    seen: list[str] = []
    while seen.count("uploaded") < 2:
        seen.append(next(stream).kind)
    made.open()
    opened = time.monotonic()
    assert next(stream).kind == "opened"
    assert time.monotonic() - opened < 5
    stream.cancel()


@pytest.mark.parametrize("step", ["open", "joined", "rostered", "countersigned"])
def test_crd_22_another_takes_over_from_one_that_was_killed(pair: Pair, step: str) -> None:
    made = pair.play()
    made.open()
    assert pair.holder() is pair.a
    offer = made.offer()
    if step != "open":
        made.join(offer, "ann")
    if step in ("rostered", "countersigned"):
        made.join(offer, "bob")
        roster = made.start(offer)
    if step == "countersigned":
        made.countersign(offer, roster, ["ann"])
    pair.a.kill()
    made.coordinator = pair.b
    until(lambda: pair.holder() is pair.b, 30)
    if step in ("open", "joined"):
        patiently(made.join, offer)
        roster = made.start(offer)
    patiently(made.countersign, offer, roster)
    made.wait("released")
    pair.check_released_once()
    pair.a.start()
    made.coordinator = pair.a
    assert verify_bundle(made.client("cyd").bundle(made.session), now_ms=now_ms()).roster == roster
    until(lambda: not pair.a.enclaves())
    assert "enclave-without-session" not in pair.a.log + pair.b.log


def test_crd_22_one_that_was_stopped_and_goes_on_changes_nothing(pair: Pair) -> None:
    made = pair.play()
    made.open()
    offer = made.offer()
    made.join(offer, "ann")
    process = pair.a.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    made.coordinator = pair.b
    until(lambda: pair.holder() is pair.b, 30)
    token = pair.one(select(LeaseRow.token))
    patiently(made.join, offer)
    roster = made.start(offer)
    process.send_signal(signal.SIGCONT)
    made.coordinator = pair.a
    patiently(made.countersign, offer, roster)
    made.wait("released")
    until(lambda: "overtaken" in pair.a.log, 30)
    assert pair.one(select(LeaseRow.token)) == token == 2
    assert pair.holder() is pair.b
    pair.check_released_once()
    made.coordinator = pair.b
    assert verify_bundle(made.client("cyd").bundle(made.session), now_ms=now_ms()).roster == roster


def test_one_that_was_stopped_within_a_transaction_holds_nothing_up(pair: Pair) -> None:
    """Stopped again and again at any moment, while the other one works."""
    made = pair.play()
    made.open()
    offer = made.offer()
    process = pair.a.process
    assert process is not None
    made.coordinator = pair.b
    for _ in range(6):
        process.send_signal(signal.SIGSTOP)
        time.sleep(LEASE_S * 0.7)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.1)
    patiently(made.join, offer)
    patiently(lambda: made.countersign(offer, made.start(offer)))
    made.wait("released")
    pair.check_released_once()


def test_an_upload_goes_on_at_another_coordinator(pair: Pair) -> None:
    made = pair.play()
    party = Party(made.agreement, "bob", made.members["bob"], {"visits": rows_of(7, 500_000)})
    (sealed,) = party.sealed
    assert len(sealed.blob) > 10 << 20
    half = made.client("bob").upload(sealed, 0, 9 << 20)
    assert (half.stored, half.complete) == (9 << 20, False)
    pair.a.kill()
    made.coordinator = pair.b
    reference = pb.UploadRef(upload=sealed.upload.digest)
    assert made.client("bob").call("GetUpload", reference).stored == half.stored
    assert made.client("bob").upload(sealed, int(half.stored)).complete


def test_two_streams_of_an_upload_at_two_coordinators(pair: Pair) -> None:
    """The newer one has it; the older one is told so when it stores."""
    made = pair.play()
    party = Party(made.agreement, "bob", made.members["bob"], {"visits": rows_of(8, 300_000)})
    (sealed,) = party.sealed
    bob, other = pair.a.client(made.members["bob"]), pair.b.client(made.members["bob"])
    go = threading.Event()

    def slowly() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(begin=pb.UploadBegin(cose=sealed.cose))
        yield pb.UploadRequest(chunk=pb.Chunk(offset=0, data=sealed.blob[: 1 << 20]))
        assert go.wait(30)

    call = bob.stub.Upload.future(slowly(), metadata=bob.metadata(), timeout=60)
    store = Store(pair.database)
    from parley_coordinator.models import UploadRow

    def writers() -> int:
        with store.read() as session:
            return session.query(UploadRow).filter_by(digest=sealed.upload.digest).one_or_none() is not None

    until(lambda: bool(writers()))
    assert other.upload(sealed).complete
    go.set()
    error = call.exception(timeout=30)
    assert isinstance(error, grpc.RpcError) and code_of(error) == "busy"
    store.close()


def test_crd_22_an_enclave_that_no_coordinator_reaches_is_given_up(apart: Pair) -> None:
    made = apart.play()
    made.open()
    first = made.session
    offer = made.offer()
    made.join(offer)
    apart.a.kill()
    made.coordinator = apart.b
    # The other one tells what is stored, and lets callers of the enclave wait.
    assert made.state().phase == "open"
    with refused("unavailable"):
        made.offer()
    assert made.wait("lost", seconds=30).code == "lost"
    assert [made.client(name).waiting() for name in NAMES] == [[], [], []]
    made.open()
    assert made.session != first
    offer = made.offer()
    made.join(offer)
    apart.a.start()
    until(lambda: not apart.a.enclaves())
    assert "enclave-without-session" in apart.a.log
    made.countersign(offer, made.start(offer))
    made.wait("released")
    assert apart.one(select(func.count()).select_from(RecordRow)) == 1


def test_a_coordinator_that_comes_back_in_time_goes_on(
    tmp_path: Path, tree: Path, cluster: Cluster, bucket_url: str
) -> None:
    apart = Pair(tmp_path / "p", tree, cluster.migrated(), bucket_url, shared=False, abandon_s=60)
    with apart.a, apart.b:
        made = apart.play()
        made.open()
        offer = made.offer()
        made.join(offer)
        apart.a.kill()
        time.sleep(LEASE_S + 1)
        apart.a.start()
        made.coordinator = apart.b
        patiently(lambda: made.countersign(offer, made.start(offer)))
        made.wait("released")
        apart.check_released_once()


def test_the_end_in_order_hands_over_at_once(pair: Pair) -> None:
    made = pair.play()
    made.open()
    offer = made.offer()
    assert pair.a.stop() == 0
    made.coordinator = pair.b
    started = time.monotonic()
    patiently(made.join, offer)
    assert time.monotonic() - started < LEASE_S + 8
    assert pair.holder() is pair.b


def test_one_folder_has_one_coordinator(pair: Pair) -> None:
    import subprocess

    pair.a.start()
    second = subprocess.run(
        [sys.executable, "-m", "parley_coordinator", "run", "--dir", str(pair.a.folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 2
    assert "another coordinator runs in this folder" in second.stderr


def test_a_session_is_launched_once(apart: Pair) -> None:
    """Opened at both at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    made = apart.play()

    def opened(coordinator: Coordinator) -> bytes:
        client = coordinator.client(made.members["ann"])
        request = pb.OpenSessionRequest(request_id=os.urandom(16), agreement=made.agreement.digest)
        found: bytes = client.call("OpenSession", request).session
        return found

    with ThreadPoolExecutor(6) as pool:
        sessions = set(pool.map(opened, [apart.a, apart.b] * 3))
    assert len(sessions) == 1
    assert len(apart.a.enclaves()) + len(apart.b.enclaves()) == 1
    assert apart.one(select(func.count()).select_from(SessionRow)) == 1
