"""Events in memory: what all who watch read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from parley_coordinator import events
from parley_coordinator import store as db
from parley_coordinator.agreements import Parsed
from parley_coordinator.events import Events, Happened, Tail
from parley_protocol.v1.coordinator_pb2 import Event
from support.desk import MEMBERS, NOW, STRANGER, Desk, key, make_agreement

AGREEMENT = make_agreement()
SESSION, OTHER = b"s" * 16, b"o" * 16


def numbers(tail: Tail, who: bytes, after: int, session: bytes = b"") -> list[int]:
    return [event.number for event in tail.after(who, after, session)]


def filled(desk: Desk, count: int) -> list[Happened]:
    """That many events of the agreement, of two sessions in turn."""
    desk.agreements.put(key("ann"), AGREEMENT.canonical)
    with desk.store.write() as session:
        for number in range(count):
            db.happened(session, "joined", AGREEMENT.digest, NOW, of=OTHER if number % 2 else SESSION, member="ann")
    found: list[Happened] = []
    while page := Events(desk.store).since(found[-1].row.number if found else 0):
        found += page
    return found


def test_a_tail_has_what_the_store_has_for_each_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PAGE", 7)
    desk = Desk(tmp_path)
    happened = filled(desk, 30)
    tail = Tail(0)
    tail.add(happened)
    assert tail.last == Events(desk.store).newest() == happened[-1].row.number
    monkeypatch.setattr(events, "PAGE", 500)
    for name in MEMBERS:
        for session in (b"", SESSION, OTHER, b"x" * 16):
            for after in (0, 13, tail.last - 1, tail.last):
                stored = Events(desk.store).after(key(name), after, session)
                assert numbers(tail, key(name), after, session) == [row.number for row in stored]
    assert numbers(tail, STRANGER.public.signing, 0) == []
    desk.store.close()


def test_a_tail_forgets_and_says_from_where_on_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEPT", 10)
    desk = Desk(tmp_path)
    happened = filled(desk, 30)
    tail = Tail(happened[4].row.number)
    assert tail.first == tail.last + 1
    tail.add(happened[5:])
    assert numbers(tail, key("bob"), 0) == [one.row.number for one in happened[-10:]]
    assert tail.first == happened[-10].row.number
    tail.add([])
    assert tail.last == happened[-1].row.number
    desk.store.close()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 20])
def test_crd_18_a_message_holds_one_event_or_several(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(events, "PAGE", 7)
    told = [Event(number=number + 1, kind="joined", member="ann") for number in range(count)]
    assert list(events.messages(told, several=False)) == told
    found = list(events.messages(told, several=True))
    assert [event.number for message in found for event in (message, *message.more)] == [one.number for one in told]
    assert all(len(message.more) < 7 for message in found) and len(found) == -(-count // 7)
    assert not any(one.more for one in told), "an event that others are told too was changed"


def test_agreements_are_parsed_once_as_long_as_there_is_room() -> None:
    other = make_agreement(max_releases=5)
    size = len(AGREEMENT.canonical)
    roomy, narrow = Parsed(4 * size), Parsed(size + 10)
    for kept, count in ((roomy, 2), (narrow, 1)):
        first = kept.get(AGREEMENT.canonical)
        assert kept.get(AGREEMENT.canonical) is first
        assert kept.get(other.canonical).digest == other.digest
        assert len(kept) == count
    assert roomy.get(AGREEMENT.canonical) is roomy.get(bytes(AGREEMENT.canonical))
