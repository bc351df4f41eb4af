"""Whole sessions of the client library: real coordinator, real enclave, real files."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from parley import RefusedError, Release, StateError, save_signed
from parley.session import Session
from parley_protocol.errors import DataError
from support.client import Members, frame_of, members
from support.enclave import until
from support.paperwire import NoEvents

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
NAMES = ("ann", "bob", "cyd")


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Members]:
    with members(tmp_path, NAMES, analysts=["cyd"], start=("ann", "cyd")) as made:
        made.sign()
        yield made


def run(*work: Callable[[], object]) -> list[object]:
    """Runs each in a thread of its own; the first error is raised."""
    results: list[object] = [None] * len(work)
    errors: list[BaseException] = []

    def one(place: int) -> None:
        try:
            results[place] = work[place]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def check(release: Release, frames: list[pd.DataFrame]) -> None:
    """The release against pandas on the plaintext."""
    whole = pd.concat(frames).reset_index(drop=True)
    whole["cents"] = (whole["amount"].astype(float) * 100).round().astype(int)
    found = {row["site"]: row for row in release["by_site"].rows}
    assert set(found) == {"north", "south", "west"}
    for site, part in whole.groupby("site"):
        assert found[site]["rows"] == len(part)
        assert found[site]["people"] == part["id"].nunique()
        assert found[site]["total"] == Decimal(int(part["cents"].sum())) / 100
        assert found[site]["mean_score"] == pytest.approx(part["score"].mean(), rel=1e-9)


def played(three: Members, frames: dict[str, pd.DataFrame], opener: str = "ann") -> Session:
    """A session from opening to release, ann and bob bring tables."""
    session = three.connect(opener).open(three.agreement)
    for name, frame in frames.items():
        three.connect(name).session(session.id).submit({"visits": frame})
    session.start()
    waits = [three.connect(name).session(session.id).wait for name in frames]
    run(*waits)
    return session


def test_a_session_of_three_members(three: Members) -> None:
    frames = {"ann": frame_of(1), "bob": frame_of(2)}
    ann, bob, cyd = (three.connect(name) for name in NAMES)
    assert [item.kind for item in ann.inbox()] == ["upload"]
    with pytest.raises(RefusedError, match="no session"):
        bob.session(three.agreement)
    opened = ann.open(three.agreement)
    sessions = [connection.session(three.agreement) for connection in (ann, bob, cyd)]
    assert {session.id for session in sessions} == {opened.id}
    steps: list[str] = []
    receipt = sessions[0].submit({"visits": three.csv("ann", frames["ann"])}, lambda step, _d, _t: steps.append(step))
    assert list(dict.fromkeys(steps)) == ["verify", "read", "sort", "seal", "upload", "join"]
    assert receipt.party == "ann"
    # The same line again sends nothing and gives the same receipt.
    steps.clear()
    again = three.connect("ann").session(opened.id)
    assert again.submit({"visits": three.csv("ann", frames["ann"])}, lambda step, _d, _t: steps.append(step)) == receipt
    assert "seal" not in steps and "upload" not in steps
    sessions[1].submit({"visits": frames["bob"]})
    assert [kept.receipt.party for kept in three.members["ann"].state.receipts()] == ["ann"]
    assert sessions[0].roster() is None
    roster = sessions[2].start()
    assert [entry.party for entry in roster.included] == ["ann", "bob"]
    assert sessions[1].roster() == roster
    progress: list[tuple[str, int, int]] = []
    run(lambda: sessions[0].wait(lambda *told: progress.append(told)), sessions[1].wait, sessions[2].wait)
    for name, session in zip(NAMES, sessions, strict=True):
        release = session.release()
        assert release.simulated and release.sequence == 1
        check(release, list(frames.values()))
        state = three.members[name].state.series(three.agreement.series)
        assert state is not None and (state.sequence, state.head) == (1, release.verified.record.record.head)
    text = release.explain()
    assert "SIMULATED" in text and "3 of 3 combinations are shown" in text
    # A bundle for strangers: closed it shows nothing, open it shows what the record commits to.
    closed = sessions[0].fetch(three.folder / "closed.bundle")
    assert dict(Release.read((three.folder / "closed.bundle").read_bytes())) == {}
    sessions[0].fetch(three.folder / "open.bundle", opened=True)
    assert Release.read((three.folder / "open.bundle").read_bytes())["by_site"].rows == closed["by_site"].rows
    frame = closed["by_site"].to_pandas()
    assert list(frame["site"]) == ["north", "south", "west"]


def test_an_analyst_finds_the_live_session_however_slow_events_are(three: Members) -> None:
    ann, cyd = three.connect("ann"), three.connect("cyd")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(cyd.transport), "events", lambda *_: NoEvents())
        assert cyd.live(three.agreement.digest) is None
        with pytest.raises(RefusedError, match="no session"):
            cyd.session(three.agreement)
        opened = ann.open(three.agreement)
        assert cyd.session(three.agreement).id == opened.id == cyd.live(three.agreement.digest)
        # A coordinator that does not know the agreement has no session of it.
        assert cyd.live(b"?" * 48) is None
        three.coordinator.end_enclaves()
        until(lambda: cyd.live(three.agreement.digest) is None)


def test_nobody_listens_any_more_when_a_wait_is_over(three: Members) -> None:
    def listening() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "parley-events"]

    session = three.connect("ann").open(three.agreement)
    for _ in range(3):
        assert session.wait(timeout_s=0.5).phase == "open"
        assert listening() == []
    three.coordinator.end_enclaves()
    with pytest.raises(RefusedError, match="lost"):
        session.wait(timeout_s=60)
    assert listening() == []


def test_a_second_session_follows_the_head_and_state_lost_is_noticed(three: Members) -> None:
    frames = {"ann": frame_of(1), "bob": frame_of(2)}
    first = played(three, frames)
    # bob did not fetch: the head of the next offer is a descendant of what bob knows.
    three.connect("ann").session(first.id).release()
    second = three.connect("ann").open(three.agreement)
    assert second.id != first.id
    bob = three.connect("bob").session(second.id)
    offer = bob.verify()
    assert offer.offer.head == three.members["ann"].state.series(three.agreement.series).head  # type: ignore[union-attr]
    bob.submit({"visits": frames["bob"]})
    three.connect("ann").session(second.id).submit({"visits": frames["ann"]})
    three.connect("cyd").session(second.id).start()
    run(*(three.connect(name).session(second.id).wait for name in frames))
    release = three.connect("bob").session(second.id).release()
    assert release.sequence == 2
    check(release, list(frames.values()))
    # The older release is still fetched and fits the chain that is known.
    assert three.connect("bob").session(first.id).release().sequence == 1


def test_a_bad_table_sends_nothing(three: Members) -> None:
    session = three.connect("ann").open(three.agreement)
    frame = frame_of(1)
    frame.loc[16, "score"] = 1e6
    with pytest.raises(DataError, match=r"visits.csv, row 17, column 'score': above the agreed max \(10\)"):
        session.submit({"visits": three.csv("ann", frame)})
    assert dict(session.status().parties)["ann"] == "absent"
    assert not list(three.members["ann"].state.spool.iterdir())


def test_a_changed_file_is_a_new_upload(three: Members) -> None:
    session = three.connect("ann").open(three.agreement)
    path = three.csv("ann", frame_of(1))
    first = session.submit({"visits": path})
    three.csv("ann", frame_of(3))
    second = session.submit({"visits": path})
    assert first.uploads != second.uploads
    uploads = three.members["ann"].state.uploads(three.agreement.digest, "visits")
    assert len({entry.key for entry, _ in uploads}) == 2
    frames = {"ann": frame_of(3), "bob": frame_of(2)}
    three.connect("bob").session(session.id).submit({"visits": frames["bob"]})
    session.start()
    run(*(three.connect(name).session(session.id).wait for name in frames))
    check(session.release(), list(frames.values()))


def test_a_lost_enclave_costs_a_join_and_no_upload(three: Members) -> None:
    frames = {"ann": frame_of(1), "bob": frame_of(2)}
    first = three.connect("ann").open(three.agreement)
    for name, frame in frames.items():
        three.connect(name).session(first.id).submit({"visits": frame})
    three.coordinator.end_enclaves()
    with pytest.raises(RefusedError, match="lost"):
        three.connect("ann").session(first.id).wait(timeout_s=60)
    second = three.connect("ann").open(three.agreement)
    assert second.id != first.id
    steps: list[str] = []
    for name in frames:
        three.connect(name).session(second.id).join(progress=lambda step, _d, _t: steps.append(step))
    assert "upload" not in steps
    second.start()
    run(*(three.connect(name).session(second.id).wait for name in frames))
    check(second.release(), list(frames.values()))


def test_a_refused_roster_ends_and_everybody_joins_again(three: Members) -> None:
    frames = {"ann": frame_of(1), "bob": frame_of(2)}
    session = three.connect("ann").open(three.agreement)
    for name, frame in frames.items():
        three.connect(name).session(session.id).submit({"visits": frame})
    before = session.start()
    three.connect("ann").session(session.id).countersign()
    with pytest.raises(StateError, match="you have signed this roster"):
        three.connect("ann").session(session.id).refuse()
    three.connect("bob").session(session.id).refuse()
    assert session.status().phase == "open"
    for name in frames:
        three.connect(name).session(session.id).join()
    after = session.start()
    assert after.digest != before.digest and after.inputs_digest == before.inputs_digest
    run(*(three.connect(name).session(session.id).wait for name in frames))
    release = session.release()
    check(release, list(frames.values()))
    # The same inputs: the roster that ann signed before costs nothing.
    assert release.verified.record.record.body.charged == 1


def test_the_example_of_the_page_runs(three: Members, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (repository / "parties/README.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    folder = three.folder / "ann"
    save_signed(folder / "smoking.parley", three.connect("ann").agreement(three.agreement.digest).signed)
    (folder / "beijing.key").symlink_to(folder / "ann.key")
    (folder / "beijing.state").symlink_to(folder / "ann.state")
    (folder / "coordinator.crt").symlink_to(three.coordinator.folder / "tls.crt")
    frames = {"ann": frame_of(1), "bob": frame_of(2)}
    frames["ann"].to_parquet(folder / "patients.parquet")
    for before, after in (
        ("coordinator:7443", three.coordinator.address),
        ('"patients"', '"visits"'),
        ("odds_ratio", "by_site"),
    ):
        assert before in example
        example = example.replace(before, after)
    monkeypatch.chdir(folder)
    session = three.connect("ann").open(three.agreement)
    three.connect("bob").session(session.id).submit({"visits": frames["bob"]})

    def close_the_inputs() -> None:
        while {phase for _, phase in session.status().parties} != {"joined"}:
            time.sleep(0.1)
        session.start()

    names: dict[str, Any] = {}
    run(lambda: exec(example, names), close_the_inputs, three.connect("bob").session(session.id).wait)
    check(names["release"], list(frames.values()))
    assert list(names["table"]["site"]) == ["north", "south", "west"]
