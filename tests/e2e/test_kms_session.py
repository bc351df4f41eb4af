"""Whole sessions with a party that keeps its keys under KMS: real members, coordinator, enclave, and an emulated KMS."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parley import Session, Standing
from parley_deploy.nsm import LocalRoot
from parley_deploy.pki import system_now_ms
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.agreement.model import Consent
from parley_protocol.errors import RefusedError, StateError, VerificationError
from parley_protocol.transcript import NO_ROSTER_KEY, KmsJoin
from support.aws import PRINCIPALS, SEALER, Aws, aws
from support.client import Members, frame_of, members
from support.enclave import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NAMES = ("ann", "bob", "cyd")


class World:
    """ann starts and receives, bob has a KMS key, cyd joins by itself."""

    def __init__(self, made: Members, cloud: Aws, key: KeyArn) -> None:
        self.made = made
        self.aws = cloud
        self.key = key
        self.made.sign()
        cloud.agree(key, made.agreement)

    def session(self, name: str) -> Session:
        """The live session as a member sees it."""
        return self.made.connect(name).session(self.made.agreement)

    def open(self) -> Session:
        """ann opens a session."""
        return self.made.connect("ann").open(self.made.agreement)

    def bob(self, session: bytes) -> Session:
        """bob, loaded anew from his files, who knows who stands in the policy."""
        found = self.made.connect("bob").session(session)
        found.member.state.remember_principals(self.key.text, PRINCIPALS)
        return found

    def submit(self, session: bytes, rows: int = 600) -> KmsJoin:
        """bob brings his table by KMS, and goes."""
        path = self.made.csv("bob", frame_of(1, rows))
        join = self.bob(session).submit({"visits": path}, kms_key=self.aws.key(self.key))
        assert isinstance(join, KmsJoin)
        return join

    def standing(self) -> Standing:
        """What bob does without a session."""
        found = self.made.connect("bob").standing(self.made.agreement)
        found.member.state.remember_principals(self.key.text, PRINCIPALS)
        return found

    def submit_by_process(self) -> dict[str, Any]:
        """bob brings his table with a command line, which has ended when this returns; what it says of the join."""
        self.standing()
        path = self.made.csv("bob", frame_of(1))
        coordinator, sealer = self.made.coordinator, self.aws.credentials[SEALER]
        environment = {
            **os.environ,
            "PARLEY_COORDINATOR": coordinator.address,
            "PARLEY_CERT": str(coordinator.folder / "tls.crt"),
            "AWS_ENDPOINT_URL_KMS": self.aws.url,
            "AWS_ACCESS_KEY_ID": sealer.access_key,
            "AWS_SECRET_ACCESS_KEY": sealer.secret_key,
        }
        command = ["submit", self.made.agreement.title, f"visits={path.name}", "--kms-key", self.key.text, "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "parley.cli", *command],
            cwd=path.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        [said] = [json.loads(line) for line in done.stdout.splitlines()]
        assert said["step"] == "joined" and said["session"] is None and said["kms_key"] == self.key.text
        return dict(said)

    def cyd(self, session: bytes) -> None:
        """cyd joins."""
        self.made.connect("cyd").session(session).submit({"visits": self.made.csv("cyd", frame_of(2))})

    def phases(self, session: Session) -> dict[str, str]:
        return dict(session.status().parties)


Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    root = tmp_path / "c" / "root"
    root.mkdir(parents=True)
    LocalRoot.create(system_now_ms()).save(root)
    with ExitStack() as stack:

        def world(**options: Any) -> World:
            cloud = stack.enter_context(aws(tmp_path / "kms", root))
            for name, value in cloud.environment().items():
                monkeypatch.setenv(name, value)
            key = cloud.make_key()
            made = members(tmp_path, NAMES, analysts=["ann"], kms={"bob": key}, toml=cloud.toml(), **options)
            return World(stack.enter_context(made), cloud, key)

        yield world


def test_kms_17_a_party_is_away_until_the_roster(make: Make) -> None:
    world = make()
    ann = world.open()
    join = world.submit(ann.id)
    world.cyd(ann.id)
    until(lambda: world.phases(ann) == {"bob": "joined", "cyd": "joined"})
    ann.start()
    world.session("cyd").countersign()
    # bob comes back: he verifies the enclave and signs, and the next session will need him no earlier than this one.
    bob = world.bob(ann.id)
    bob.countersign()
    assert bob.wait(timeout_s=60).phase == "released"
    entry = ann.release().verified.roster.entry("bob")
    assert entry is not None and (entry.join, entry.share_digest) == (join.digest, join.share_digest)
    state = bob.member.state
    following = state.kms_join(world.made.agreement.digest)
    assert following is not None and following[0].number > join.number
    assert following[0].uploads == join.uploads and following[0].ciphertext == join.ciphertext
    assert state.has_roster_key(following[0].roster_key) and not state.has_roster_key(join.roster_key)


def test_kms_16_the_same_submit_again_changes_nothing_and_a_changed_table_is_another_join(make: Make) -> None:
    world = make()
    ann = world.open()
    first = world.submit(ann.id)
    until(lambda: world.phases(ann)["bob"] == "joined")
    assert world.submit(ann.id) == first
    second = world.submit(ann.id, rows=700)
    assert second.number > first.number and second.uploads != first.uploads and second.ciphertext != first.ciphertext
    world.cyd(ann.id)
    until(lambda: world.phases(ann)["cyd"] == "joined")

    def newest() -> bool:
        events = world.made.connect("ann").transport.events(0, ann.id, 1.0)
        return sum(event.kind == "joined" and event.member == "bob" for event in events) == 2

    until(newest)
    entry = ann.start().entry("bob")
    assert entry is not None and entry.join == second.digest


def test_kms_13_with_standing_consent_a_party_is_away_for_good_also_when_the_enclave_is_lost(make: Make) -> None:
    world = make(consent=Consent.STANDING)
    ann = world.open()
    join = world.submit(ann.id)
    assert join.roster_key == NO_ROSTER_KEY
    until(lambda: world.phases(ann)["bob"] == "joined")
    os.kill(world.made.coordinator.enclave_pid(), signal.SIGKILL)
    until(lambda: ann.status().phase == "lost")
    for number in range(2):
        session = world.open()
        world.cyd(session.id)
        until(lambda session=session: set(world.phases(session).values()) == {"joined"})  # type: ignore[misc]
        session.start()
        assert session.wait(timeout_s=60).phase == "released"
        release = session.release()
        assert release.sequence == number + 1
        entry = release.verified.roster.entry("bob")
        assert entry is not None and entry.join == join.digest
        # What bob never saw is what he allowed.
        assert world.bob(session.id).release().sequence == number + 1


def test_kms_18_with_standing_consent_a_party_brings_its_table_and_is_gone_before_an_enclave_lives(make: Make) -> None:
    world = make(consent=Consent.STANDING)
    assert world.submit_by_process()["join"] == world.submit_by_process()["join"]
    assert world.made.coordinator.enclaves() == []
    assert world.made.connect("bob").inbox() == []
    ann = world.open()
    world.cyd(ann.id)
    until(lambda: set(world.phases(ann).values()) == {"joined"})
    ann.start()
    assert ann.wait(timeout_s=60).phase == "released"
    entry = ann.release().verified.roster.entry("bob")
    state = world.made.connect("bob").member.state
    [(join, _)] = state.kms_joins(world.made.agreement.digest)
    assert entry is not None and entry.join == join.digest
    assert world.bob(ann.id).release().sequence == 1


def test_kms_18_a_party_that_came_before_the_session_is_away_until_the_roster(make: Make) -> None:
    world = make()
    world.submit_by_process()
    assert world.made.coordinator.enclaves() == []
    ann = world.open()
    until(lambda: world.phases(ann)["bob"] == "joined")
    world.cyd(ann.id)
    ann.start()
    world.session("cyd").countersign()
    bob = world.bob(ann.id)
    bob.countersign()
    assert bob.wait(timeout_s=60).phase == "released"
    assert ann.release().verified.roster.entry("bob") is not None


def test_kms_18_without_a_session_nothing_is_sealed_under_a_key_that_others_may_use(make: Make) -> None:
    world = make()
    world.aws.revoke(world.key)
    table = {"visits": world.made.csv("bob", frame_of(1))}
    bob = world.standing()
    with pytest.raises(StateError) as caught:
        bob.submit(table, kms_key=world.aws.key(world.key))
    assert caught.value.code == "policy"
    state = bob.member.state
    assert state.uploads(world.made.agreement.digest, "visits") == []
    assert state.kms_join(world.made.agreement.digest) is None
    with pytest.raises(StateError, match="names no KMS key of cyd") as none:
        world.made.connect("cyd").standing(world.made.agreement).submit({"visits": world.made.csv("cyd", frame_of(2))})
    assert none.value.code == "agreement"


def test_kms_18_without_a_session_nothing_is_sealed_under_an_agreement_that_not_all_have_signed(make: Make) -> None:
    world = make()
    signed = world.made.agreement
    following = replace(signed, version=2, replaces=signed.digest, series_digest=signed.digest, purpose="Amended.")
    world.made.connect("ann").put(following)
    world.made.connect("bob").sign(following)
    world.aws.agree(world.key, following)
    bob = world.made.connect("bob").standing(following)
    bob.member.state.remember_principals(world.key.text, PRINCIPALS)
    table = {"visits": world.made.csv("bob", frame_of(1))}
    with pytest.raises(VerificationError):
        bob.submit(table, kms_key=world.aws.key(world.key))
    # Nor under the one before, of which bob has said that it is over.
    with pytest.raises(StateError, match="you signed version 2"):
        world.standing().submit(table, kms_key=world.aws.key(world.key))
    assert bob.member.state.uploads(following.digest, "visits") == []


def test_kms_13_a_coordinator_that_is_killed_joins_the_party_anew(make: Make) -> None:
    world = make()
    ann = world.open()
    world.submit(ann.id)
    until(lambda: world.phases(ann)["bob"] == "joined")
    world.made.coordinator.kill()
    world.made.coordinator.start()
    ann = world.session("ann")
    until(lambda: world.phases(ann)["bob"] == "joined")
    world.cyd(ann.id)
    until(lambda: world.phases(ann)["cyd"] == "joined")
    assert len(ann.start().included) == 2


def test_kms_14_a_revocation_by_the_key_policy_ends_it_and_is_told_as_that(make: Make) -> None:
    world = make()
    world.made.coordinator.operators(world.made.members["ann"].identity)
    ann = world.open()
    join = world.submit(ann.id)
    until(lambda: world.phases(ann)["bob"] == "joined")
    world.aws.revoke(world.key)
    os.kill(world.made.coordinator.enclave_pid(), signal.SIGKILL)
    until(lambda: ann.status().phase == "lost")
    again = world.open()
    until(lambda: again.status().refused == {"bob": "revoked"})
    assert world.phases(again)["bob"] == "refused"
    bob = world.bob(again.id)
    with pytest.raises(RefusedError) as caught:
        bob.wait(timeout_s=20)
    assert caught.value.code == "revoked"
    assert [item.kind for item in world.made.connect("bob").inbox()] == ["join"]
    # He cannot join by KMS under that policy either: the client reads it first.
    with pytest.raises(StateError) as refused:
        bob.join_by_kms(kms_key=world.aws.key(world.key))
    assert refused.value.code == "policy" and "lacks the statement Enclave0" in refused.value.message
    # And where he changes his mind, a policy and a join later he is in.
    world.aws.agree(world.key, world.made.agreement)
    following = bob.join_by_kms(kms_key=world.aws.key(world.key))
    assert following.number > join.number and following.ciphertext == join.ciphertext
    until(lambda: world.phases(again)["bob"] == "joined")


def test_a_roster_that_ended_asks_for_nobodys_table_and_the_next_join_goes_by_itself(make: Make) -> None:
    world = make()
    ann = world.open()
    world.submit(ann.id)
    world.cyd(ann.id)
    until(lambda: world.phases(ann) == {"bob": "joined", "cyd": "joined"})
    ann.start()
    world.session("cyd").refuse()
    until(lambda: ann.status().refused == {"bob": "conflict"})
    bob = world.bob(ann.id)
    bob.wait(timeout_s=3)
    until(lambda: world.phases(ann)["bob"] == "joined")
    world.cyd(ann.id)
    roster = ann.start()
    bob.countersign()
    world.session("cyd").countersign()
    assert ann.wait(timeout_s=60).phase == "released"
    assert ann.release().verified.roster == roster


@pytest.mark.parametrize("drift", ["statement", "principal", "grant", "until", "disabled"])
def test_kms_15_drift_of_the_live_policy_stops_the_client_before_anything_is_sent(make: Make, drift: str) -> None:
    world = make()
    ann = world.open()
    policy = world.aws.policy(world.key)
    administrator = world.aws.client("arn:aws:iam::444455556666:role/key-administrator")
    enclave = next(item for item in policy["Statement"] if item["Sid"] == "Enclave0")
    match drift:
        case "statement":
            more = {"Effect": "Allow", "Principal": enclave["Principal"], "Action": "kms:Decrypt", "Resource": "*"}
            policy["Statement"].append(more)
        case "principal":
            enclave["Principal"] = {"AWS": "*"}
        case "until":
            del enclave["Condition"]["DateLessThan"]
        case "grant":
            own = world.aws.policy(world.key)
            own["Statement"].append(
                {
                    "Effect": "Allow",
                    "Principal": {"AWS": "arn:aws:iam::444455556666:role/key-administrator"},
                    "Action": "kms:CreateGrant",
                    "Resource": "*",
                }
            )
            world.aws.put(world.key, own)
            administrator.create_grant(
                KeyId=world.key.text,
                GranteePrincipal="arn:aws:iam::111122223333:role/parley-parent",
                Operations=["Decrypt"],
            )
        case _:
            administrator.disable_key(KeyId=world.key.text)
    world.aws.put(world.key, policy)
    with pytest.raises(StateError) as caught:
        world.submit(ann.id)
    assert caught.value.code == "policy"
    told = {
        "statement": "has a statement that does not belong there",
        "principal": "everybody, which does not belong there",
        "grant": "a grant goes round the policy",
        "until": "lacks the condition DateLessThan",
        "disabled": "its KeyState is Disabled, not Enabled",
    }
    assert told[drift] in caught.value.message
    assert world.phases(ann)["bob"] == "absent"
    assert world.bob(ann.id).member.state.kms_join(world.made.agreement.digest) is None


def test_kms_15_a_key_that_is_not_the_agreed_one_is_not_used(make: Make) -> None:
    world = make()
    ann = world.open()
    other = world.aws.make_key()
    path = world.made.csv("bob", frame_of(1))
    with pytest.raises(StateError, match="names another KMS key of bob"):
        world.bob(ann.id).submit({"visits": path}, kms_key=other.text)
    with pytest.raises(StateError, match="names no KMS key of cyd"):
        world.session("cyd").submit({"visits": world.made.csv("cyd", frame_of(2))}, kms_key=other.text)


def test_kms_15_who_stands_in_the_policy_must_be_known(make: Make) -> None:
    world = make()
    ann = world.open()
    bob = world.made.connect("bob").session(ann.id)
    with pytest.raises(StateError, match="who stands in the policy of .* is not known here") as caught:
        bob.submit({"visits": world.made.csv("bob", frame_of(1))}, kms_key=world.aws.key(world.key))
    assert caught.value.code == "policy"
    assert world.phases(ann)["bob"] == "absent"
