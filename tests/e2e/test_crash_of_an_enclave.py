"""An enclave that is gone, whenever it is: a new one is launched, its members verify it and join again by themselves.

What that costs is measured on the wire: a join of about 2 kB, and no byte of a table. What may be signed again, and what is
charged, is decided by the rosters that were signed (DESIGN 5.7); the same inputs make the same record body, byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from parley_protocol.cose import payload_unverified
from parley_protocol.transcript import GENESIS, Countersignature, RecordBody
from parley_protocol.v1 import coordinator_pb2 as pb
from support.enclave import until
from support.simulation.calls import Observed, Rule
from support.simulation.link import LinkRule
from support.simulation.moments import MOMENTS, Killer
from support.simulation.plan import PARTIES
from support.simulation.theatre import Stage, Theatre, observed_by

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

JOIN_BYTES: Final = 3000
"""A join with everything around it: sealed keys of 1.2 kB, a signature, digests."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("s"))
    yield made
    made.close()


def sessions_of(theatre: Theatre) -> list[tuple[str, str]]:
    """(phase, code) of each session."""
    return [(phase, code) for phase, code in theatre.node.rows("SELECT phase, code FROM sessions ORDER BY number")]


def table_bytes(seen: list[Observed]) -> int:
    """Bytes of tables that members sent."""
    requests = [request for call in seen if call.method == "Upload" for request in call.requests]
    return sum(len(pb.UploadRequest.FromString(request).chunk.data) for request in requests)


def join_sizes(seen: list[Observed]) -> list[int]:
    """Bytes of each join that members sent."""
    return [len(request) for call in seen if call.method == "PutJoin" for request in call.requests]


def body_of(theatre: Theatre) -> RecordBody:
    """The record body that all members hold."""
    bodies = {line[2] for name in (*PARTIES, "dan") for line in theatre.log(name) if line[0] == "released"}
    (found,) = bodies
    return RecordBody.from_bytes(bytes.fromhex(found))


@pytest.mark.parametrize("name", ["adm-7-join-answered", "ses-6-last-countersign-asked", "eng-1-last-pull-asked"])
def test_members_join_the_next_enclave_and_send_no_table_again(stage: Stage, tmp_path: Path, name: str) -> None:
    with Theatre(stage, tmp_path / "p") as theatre:
        seen = observed_by(theatre.calls)
        killer = Killer(theatre, "enclave", [moment for moment in MOMENTS if str(moment) == name])
        theatre.begin()
        theatre.finish()
        assert (killer.missed, killer.nobody) == ([], [])
        assert sessions_of(theatre) == [("lost", "lost"), ("released", "")]
        # Every table went over the wire once.
        assert table_bytes(seen) == sum(size for (size,) in theatre.node.rows("SELECT size FROM uploads"))
        joins = join_sizes(seen)
        assert len(joins) > len(PARTIES)
        assert 1000 < max(joins) < JOIN_BYTES
        assert body_of(theatre) == stage.oracle((0, 0, 0)).body


def test_the_same_rosters_again_are_charged_once(stage: Stage, tmp_path: Path) -> None:
    with Theatre(stage, tmp_path / "p") as theatre:
        seen = observed_by(theatre.calls)
        again = [moment for moment in MOMENTS if str(moment) == "ses-12-last-countersign-answered"]
        killer = Killer(theatre, "enclave", again * 2)
        theatre.begin()
        theatre.finish()
        assert (killer.missed, killer.nobody) == ([], [])
        # Two enclaves had released, and died before anybody had the release: the third one's is the same.
        assert [phase for phase, _ in sessions_of(theatre)] == ["lost", "lost", "released"]
        signed = [
            Countersignature.from_bytes(
                payload_unverified(pb.PutCountersignatureRequest.FromString(call.requests[0]).cose)
            )
            for call in seen
            if call.method == "PutCountersignature" and call.member == "bob" and not call.code
        ]
        assert [len(consent.former) for consent in signed] == [0, 1, 2]
        body = body_of(theatre)
        assert (body.sequence, body.charged, body.previous) == (1, 1, GENESIS)
        assert body == stage.oracle((0, 0, 0)).body


def test_other_inputs_after_a_signed_roster_are_signed_by_hand_and_charged(stage: Stage, tmp_path: Path) -> None:
    with Theatre(stage, tmp_path / "p") as theatre:

        def die() -> None:
            theatre.kill_enclave()
            # bob found an error in its table; ann and cyd had signed for the old one.
            theatre.changed_file("bob")

        theatre.links.arm(LinkRule("answered", "countersign", only=theatre.all_consent, drop=True, act=die))
        theatre.begin()
        theatre.finish()
        # The enclave had computed the first roster: what it released could have been kept by the host.
        body = body_of(theatre)
        assert (body.sequence, body.charged) == (1, 2)
        assert [line for line in theatre.log("ann") if line[0] == "by-hand"]
        expected = stage.oracle((0, 1, 0))
        released = next(line for line in theatre.log("ann") if line[0] == "released")
        assert [plain for *_, plain in released[3]] == [plain for *_, plain in expected.plaintexts]


def test_a_member_gone_between_its_join_and_the_receipt_until_its_roster_has_lapsed(
    stage: Stage, tmp_path: Path
) -> None:
    """Not the enclave but a member dies; its join stood in a roster that it never saw, and is refused ever after."""
    with Theatre(stage, tmp_path / "p") as theatre:
        theatre.calls.arm(Rule("answered", "PutJoin", "bob", act=lambda: theatre.end_member("bob")))
        theatre.begin()
        until(lambda: theatre.node.rows("SELECT 1 FROM rosters WHERE ended = 'lapsed'"), 60)
        theatre.start_member("bob")
        theatre.finish()
        assert sessions_of(theatre) == [("released", "")]


def test_an_enclave_whose_machine_is_silent_is_not_given_up(stage: Stage, tmp_path: Path) -> None:
    """One that answers late lives: nobody joins anew."""
    with Theatre(stage, tmp_path / "p", patience_s=30.0) as theatre:
        theatre.links.arm(LinkRule("held", "join", 4.0))
        started = time.monotonic()
        theatre.begin()
        theatre.finish()
        assert time.monotonic() - started > 4.0
        assert sessions_of(theatre) == [("released", "")]
