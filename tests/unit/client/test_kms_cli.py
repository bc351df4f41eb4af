"""`parley kms`: against a key of the emulated KMS, with the credentials and the endpoint of the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.config import Config

from parley import kms as key_module
from parley.cli.exits import Exit
from parley.kms import Key
from parley_deploy.demo import DEMOS
from parley_protocol.errors import StateError, UnavailableError
from support.command_line import Parley, agreement_folder
from support.emulated_kms import ADMIN, COORDINATOR, OTHER, SEALER, Kms, allow, refused
from support.simulation.front import Front, FrontRule

WHO = ("--coordinator-role", COORDINATOR, "--admin", ADMIN, "--sealer", SEALER)


@pytest.fixture(scope="module")
def kms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    made = Kms(tmp_path_factory.mktemp("kms"))
    made.start()
    yield made
    made.stop()


class Party:
    """`mich` of the pay agreement, with a key of its own: its files stand in the current folder."""

    def __init__(self, kms: Kms, call: Parley, folder: Path) -> None:
        self.kms, self.call = kms, call
        self.key = kms.key()
        agreement_folder(folder)
        self.file = folder / DEMOS["pay"].file
        assert call("keygen", "mich")[0] == 0
        (folder / "mich.pub").replace(folder / "keys/mich.pub")
        self.file.write_text(self.file.read_text("utf-8") + f"\nkms:\n  mich: {self.key}\n", encoding="utf-8")

    def live(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kms.client().get_key_policy(KeyId=self.key)["Policy"])
        return found

    def put(self, policy: Any) -> None:
        self.kms.client().put_key_policy(KeyId=self.key, PolicyName="default", Policy=json.dumps(policy))


@pytest.fixture
def as_admin(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    use(kms, monkeypatch, ADMIN)


def use(kms: Kms, monkeypatch: pytest.MonkeyPatch, arn: str) -> None:
    """The environment of one who runs as this identity."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    credentials = kms.credentials[arn]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", credentials.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", credentials.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", kms.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def party(kms: Kms, parley: Parley, tmp_path: Path, as_admin: None) -> Party:
    return Party(kms, parley, tmp_path)


def test_a_policy_is_printed_put_checked_and_revoked(
    party: Party, kms: Kms, parley: Parley, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = parley("kms", "policy", str(party.file), *WHO)
    assert code == 0, err
    wanted = json.loads(out)
    assert [item["Sid"] for item in wanted["Statement"]] == ["ManageWithoutUse", "Seal", "Enclave0"]
    assert json.loads(parley("kms", "policy", str(party.file), *WHO, "--json")[1]) == wanted
    before = party.live()
    code, _, err = parley("kms", "check", str(party.file), *WHO)
    assert code == Exit.REFUSED and "not the policy of big9-pay, version 1" in err
    code, out, err = parley("kms", "policy", str(party.file), *WHO, "--put")
    assert code == Exit.REFUSED and "stays as it was" in err, "no terminal, so the answer is no"
    assert "does not belong there" in err and party.live() == before
    code, out, err = parley("kms", "policy", str(party.file), *WHO, "--put", "--yes")
    assert code == 0, err
    # Who stands in it is known from here on, and the sealer may look too.
    use(kms, monkeypatch, SEALER)
    code, out, err = parley("kms", "check", str(party.file))
    assert code == 0 and "only enclaves of big9-pay, version 1, may decrypt" in out, err
    assert parley("kms", "policy", str(party.file))[1] == json.dumps(wanted, indent=2) + "\n"
    code, _, err = parley("kms", "revoke", str(party.file), "--yes")
    assert code == Exit.REFUSED and "kms:PutKeyPolicy" in err, "but only an administrator revokes"
    use(kms, monkeypatch, ADMIN)
    code, out, err = parley("kms", "revoke", str(party.file))
    assert code == Exit.REFUSED and "nothing is revoked" in err and "Enclave0" in out
    code, out, err = parley("kms", "revoke", str(party.file), "--yes")
    assert code == 0 and "no enclave gets keys from it" in out, err
    assert [item["Sid"] for item in party.live()["Statement"]] == ["ManageWithoutUse", "Seal"]
    code, out, _ = parley("kms", "check", str(party.file), "--json")
    assert code == Exit.REFUSED
    [difference] = json.loads(out)["differences"]
    assert difference.startswith("lacks the statement Enclave0: allows kms:decrypt to arn:aws:iam::111122223333:role/")
    # Once more changes nothing, and putting it back opens it again.
    assert parley("kms", "revoke", str(party.file), "--yes")[0] == 0
    assert parley("kms", "policy", str(party.file), "--put", "--yes")[0] == 0
    assert parley("kms", "check", str(party.file))[0] == 0


def test_what_goes_round_the_policy_is_told(party: Party, kms: Kms, parley: Parley) -> None:
    assert parley("kms", "policy", str(party.file), *WHO, "--put", "--yes")[0] == 0
    wanted = party.live()
    party.put({**wanted, "Statement": [*wanted["Statement"], allow(OTHER, "kms:Decrypt", Sid="Door")]})
    code, out, _ = parley("kms", "check", str(party.file))
    assert code == Exit.REFUSED
    assert f"has a statement that does not belong there, Door: allows kms:decrypt to {OTHER}" in out
    party.put({**wanted, "Statement": [*wanted["Statement"], allow(ADMIN, "kms:CreateGrant")]})
    kms.client().create_grant(KeyId=party.key, GranteePrincipal=OTHER, Operations=["Decrypt"])
    kms.client().create_grant(KeyId=party.key, GranteePrincipal=COORDINATOR, Operations=["Encrypt"])
    party.put(wanted)
    code, out, _ = parley("kms", "check", str(party.file), "--json")
    assert code == Exit.REFUSED
    [difference] = json.loads(out)["differences"]
    assert difference.startswith(f"a grant goes round the policy, {OTHER}: Decrypt (grant ")
    code, out, err = parley("kms", "revoke", str(party.file), "--yes")
    assert code == Exit.REFUSED and "others can still decrypt" in err and f"grant {OTHER}: Decrypt" in out


def test_a_role_that_was_made_anew_is_another_one(party: Party, kms: Kms, parley: Parley) -> None:
    again = f"{COORDINATOR}-2"
    kms.accounts.add(again)
    who = ("--coordinator-role", again, "--admin", ADMIN)
    assert parley("kms", "policy", str(party.file), *who, "--put", "--yes")[0] == 0
    assert parley("kms", "check", str(party.file))[0] == 0
    kms.accounts.remove(again)
    kms.accounts.add(again)
    code, out, _ = parley("kms", "check", str(party.file))
    assert code == Exit.REFUSED and "(an identity that was deleted)" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("policy",), "give --coordinator-role and --admin once"),
        (("check",), "give --coordinator-role and --admin once"),
        (("policy", "--admin", ADMIN), "give --coordinator-role and --admin together"),
        (("policy", "--coordinator-role", COORDINATOR), "give --coordinator-role and --admin together"),
        (("policy", "--coordinator-role", "*", "--admin", ADMIN), "coordinator role: * is not the ARN of one role"),
        (("policy", "--coordinator-role", COORDINATOR, "--admin", COORDINATOR), "must neither manage the key nor seal"),
    ],
)
def test_who_stands_in_it_must_be_said(party: Party, parley: Parley, arguments: tuple[str, ...], text: str) -> None:
    command, *rest = arguments
    code, out, err = parley("kms", command, str(party.file), *rest)
    assert code != 0 and text in err and out == ""


def test_who_has_no_key_in_the_agreement_is_told(party: Party, parley: Parley) -> None:
    parley("keygen", "osu", "--dir", "other")
    code, _, err = parley("kms", "check", str(party.file), "--key", "other/osu.key", *WHO)
    assert code == Exit.USAGE and "big9-pay names no KMS key of osu" in err


def test_errors_of_aws_are_our_own(kms: Kms, monkeypatch: pytest.MonkeyPatch, as_admin: None) -> None:
    arn = kms.key()
    wanted: dict[str, Any] = {"Version": "2012-10-17", "Statement": []}
    assert key_module.check(Key.connect(arn), wanted)
    blob = Key.connect(arn).encrypt(b"secret", {"a": "b"})
    assert kms.client().decrypt(CiphertextBlob=blob, EncryptionContext={"a": "b"})["Plaintext"] == b"secret"
    with pytest.raises(StateError, match="does not exist"):
        Key.connect(arn[:-4] + "0000").policy()
    with pytest.raises(StateError, match="will not allow you to update the key policy"):
        Key.connect(arn).put_policy({"Version": "2012-10-17", "Statement": [allow(OTHER, "kms:*")]})
    with pytest.raises(StateError, match="AWS: The config profile \\(none\\) could not be found"):
        Key.connect(arn, profile="none")
    use(kms, monkeypatch, OTHER)
    with pytest.raises(StateError, match="KMS refuses: AccessDeniedException: User: "):
        Key.connect(arn).policy()
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="KMS cannot be reached"):
        Key.connect(arn).grants()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    with pytest.raises(StateError, match="Unable to locate credentials"):
        Key.connect(arn).grants()
    with refused("NotFoundException"):
        kms.client().describe_key(KeyId=arn[:-4] + "0000")


@pytest.mark.parametrize("fault", ["throttled", "failed", "bare"])
def test_a_kms_that_cannot_answer_now_is_away_whoever_says_so(kms: Kms, fault: str) -> None:
    """KMS itself, or a balancer in front of it that knows no code of KMS."""
    arn = kms.key()
    front = Front("kms", lambda: kms.url)
    try:
        once = Config(retries={"total_max_attempts": 1})
        key = Key(arn, kms.session().client("kms", endpoint_url=front.url, config=once))
        front.arm(FrontRule(fault))
        with pytest.raises(UnavailableError, match="KMS cannot answer now"):
            key.policy()
        assert key.policy()["Version"] == "2012-10-17"
    finally:
        front.close()
