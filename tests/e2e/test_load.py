"""Load on a coordinator, small enough for every run of the tests; `make load` has the same with its full numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import large, load
from support.client import members
from support.load import Stage, Watchers

pytestmark = pytest.mark.e2e

MEMBERS = 20
WATCHERS = 60
UPLOADS = 8
UPLOAD_BYTES = 48 << 20
SESSIONS = 30
TABLE_BYTES = 120_000_000
COLUMNS = 59
ENCLAVE_BYTES = 250 << 20
"""What 17 parties and two workers may need; here are two parties and one worker."""
HANDSHAKE_S, REQUEST_S, IDLE_S = 2.0, 2.0, 3.0
DEADLINE = f"handshake_s = {HANDSHAKE_S}\nrequest_s = {REQUEST_S}\nidle_s = {IDLE_S}\n"
SLOWEST_S = HANDSHAKE_S + REQUEST_S + IDLE_S + 15
STREAM_BYTES = 16 << 20
"""What a coordinator may hold of one upload: messages that wait for the disk, and those on their way."""
BASE_BYTES = 96 << 20
"""What it may need besides, more than when it has just started: threads, caches, statements."""


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    database = request.getfixturevalue("cluster").migrated() if request.param == "postgresql" else None
    folder = tmp_path_factory.mktemp("load") / "c"
    with Stage(folder, MEMBERS, deadline=DEADLINE, database=database) as made:
        load.fill(made, dict(list(made.members.items())[:3]), SESSIONS)
        made.start()
        with made.crowd() as crowd:
            crowd.all("sign")
        yield made
        assert "rpc-failed" not in made.coordinator.log


def test_a_session_of_many_members_before_many_watchers(stage: Stage) -> None:
    """Nobody gets an error, every watcher sees every event once and in order, and memory stays where it was."""
    names = list(stage.members)
    with load.memory(stage.pid) as memory, stage.crowd() as crowd:
        crowd.all("upload")
        watchers = Watchers(stage, names, WATCHERS, load.last_event(stage.coordinator.database) - 1)
        try:
            session = load.opened(stage)
            transport = stage.transport()
            with load.asking(transport, session):
                crowd.all("join", session)
                load.started(stage, session)
                crowd.all("countersign", session)
                load.released(stage, session)
                crowd.all("fetch", session)
            transport.close()
            watched = watchers.stop(load.last_event(stage.coordinator.database))
        finally:
            watchers.kill()
    assert (watched.errors, watched.disorder, watched.behind) == ([], 0, 0)
    # The first one of each stream is the one that showed that it watches. opened, rostered, computing, released, and the
    # joins, countersignatures and fetches of all.
    assert watched.events >= WATCHERS * (1 + 4 + 3 * MEMBERS)
    assert memory.most - memory.before < BASE_BYTES


def test_parallel_uploads_all_go_on(stage: Stage, tmp_path: Path) -> None:
    """When half of them are done no other one has been left behind; others are answered meanwhile, in bounded memory."""
    rows, size = load.rows_for(stage.agreement, UPLOAD_BYTES)
    blob = tmp_path / "blob"
    load.noise(blob, size)
    transport = stage.transport()
    names = list(stage.members)[:UPLOADS]
    with (
        stage.crowd(names) as crowd,
        load.memory(stage.pid) as memory,
        load.asking(transport),
    ):
        told = crowd.stream(blob, rows)
        client = crowd.peak()
    transport.close()
    assert all(len(one.marks) == load.MARKS for one in told)
    # With equal shares that is nearly 1; whoever waits until the others are done has nothing.
    assert load.least_share(told, 0.5) >= 0.1
    assert memory.most - memory.before < BASE_BYTES + UPLOADS * STREAM_BYTES
    assert client < 400 << 20


def test_who_is_slow_is_cut_off_and_who_says_too_much_is_refused(stage: Stage) -> None:
    """Nobody else notices."""
    transport = stage.transport()
    with load.memory(stage.pid) as memory, load.asking(transport) as took:
        slow = load.slowly(stage, 30, 30, 30, seconds=4 * SLOWEST_S)
        answers = load.oversized(stage, 2)
    transport.close()
    assert math.inf not in slow.all, "a slow caller is still there"
    assert max(slow.all) < 2 * SLOWEST_S
    assert min(slow.dribbling) > REQUEST_S / 2
    assert set(answers) == {"RESOURCE_EXHAUSTED"}
    assert memory.most - memory.before < BASE_BYTES
    assert load.quantile(took, 0.5) < 5


def test_many_sessions_in_the_store(stage: Stage) -> None:
    """A member of all of them is told of all of them."""
    transport = stage.transport()
    items = transport.inbox().items
    assert len({item.agreement for item in items}) >= SESSIONS
    last = load.last_event(stage.coordinator.database)
    assert load.replayed(transport, last) >= 4 * SESSIONS
    transport.close()


def test_a_table_from_the_file_to_the_release(tmp_path: Path) -> None:
    """Sealed by the client, opened by an enclave: neither the coordinator nor the enclave holds it, and every sum is right."""
    with members(tmp_path, ("ann", "bob")) as made:
        rows, size = load.rows_for(large.wide(made.agreement, COLUMNS), TABLE_BYTES)
        way = large.travel(made, rows, COLUMNS)
        assert "rpc-failed" not in made.coordinator.log
    assert way.size == size >= TABLE_BYTES
    assert way.coordinator.most - way.coordinator.before < TABLE_BYTES / 2
    assert way.enclave < ENCLAVE_BYTES
