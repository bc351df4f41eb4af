"""The policy of a party's KMS key: what it says, how another one differs, and that terraform's template says the same."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from parley_deploy.kms import policy as policies
from parley_deploy.kms.service import _compact
from parley_protocol import kms_policy, limits
from parley_protocol.agreement.model import Measurement
from parley_protocol.attestation.document import extended
from parley_protocol.encoding import sha384
from parley_protocol.errors import AgreementError, MalformedError
from parley_protocol.kms_policy import (
    Accepted,
    Principals,
    accepted_by,
    differences,
    key_policy,
    openers,
    read,
    revoked,
)
from support.desk import make_agreement

COORDINATOR = "arn:aws:iam::111122223333:role/parley-parent"
ADMIN = "arn:aws:iam::444455556666:role/key-administrator"
SEALER = "arn:aws:iam::444455556666:user/statistics"
WHO = Principals(COORDINATOR, (ADMIN,), (SEALER,))
AGREEMENT = sha384(b"an agreement")
DAY = 86_400_000
UNTIL = int(datetime(2027, 7, 1, tzinfo=UTC).timestamp()) * 1000
TERRAFORM = Path(__file__).resolve().parents[3] / "deploy" / "terraform"


def image(byte: int, until_ms: int = UNTIL) -> Accepted:
    return Accepted(bytes([byte]) * 48, bytes([byte + 1]) * 48, bytes([byte + 2]) * 48, until_ms)


WANTED = key_policy(AGREEMENT, (image(1), image(0x10, UNTIL + DAY)), WHO)


def decide(policy: dict[str, Any], principal: str, action: str, document: dict[int, bytes] | None, at: str) -> bool:
    """Whether the evaluation of the emulated KMS lets a principal of the policy do something."""
    keys = {"aws:CurrentTime": [at]}
    for index, value in (document or {}).items():
        keys[f"kms:RecipientAttestation:PCR{index}"] = [value.hex()]
    request = policies.Request(action, "*", frozenset({principal}), principal.split(":")[4], keys)
    found = policies.decide(policies.parse(json.dumps(policy), resource_policy=True), request, resource_policy=True)
    return found.direct and not found.denied


def pcrs(byte: int, agreement: bytes = AGREEMENT) -> dict[int, bytes]:
    return {index: bytes([byte + index]) * 48 for index in range(3)} | {16: extended(agreement)}


EARLY, LATE, OVER = "2027-06-30T23:59:59Z", "2027-07-01T00:00:00Z", "2027-07-02T00:00:00Z"


@pytest.mark.parametrize(
    ("document", "at", "allowed"),
    [
        (pcrs(1), EARLY, True),
        (pcrs(1), LATE, False),
        (pcrs(0x10), LATE, True),
        (pcrs(0x10), OVER, False),
        (pcrs(0x20), EARLY, False),
        (pcrs(1, sha384(b"another agreement")), EARLY, False),
        (pcrs(1) | {1: b"\x11" * 48}, EARLY, False),  # registers of two images
        (pcrs(1) | {0: bytes(48), 1: bytes(48), 2: bytes(48)}, EARLY, False),
        ({index: value for index, value in pcrs(1).items() if index != 16}, EARLY, False),
        ({index: value for index, value in pcrs(1).items() if index != 2}, EARLY, False),
        (None, EARLY, False),
    ],
)
def test_pol_4_only_an_accepted_enclave_of_the_agreement_decrypts_until_its_day_is_over(
    document: dict[int, bytes] | None, at: str, allowed: bool
) -> None:
    assert decide(WANTED, COORDINATOR, "kms:Decrypt", document, at) is allowed
    for other in (ADMIN, SEALER, COORDINATOR.replace("parent", "other")):
        assert not decide(WANTED, other, "kms:Decrypt", document, at)


def test_pol_3_a_client_encrypts_and_reads_and_does_no_more() -> None:
    for action in ("Encrypt", "DescribeKey", "GetKeyPolicy", "ListGrants"):
        assert decide(WANTED, SEALER, f"kms:{action}", None, EARLY), action
    for action in (*kms_policy.MANAGING, "kms:Decrypt", "kms:CreateGrant", "kms:ReEncryptFrom", "kms:GenerateDataKey"):
        assert decide(WANTED, SEALER, action, None, EARLY) is (action in kms_policy.SEALING), action


def test_pol_2_nobody_who_operates_can_change_the_policy_or_do_more() -> None:
    for action in ("PutKeyPolicy", "CreateGrant", "Encrypt", "ReEncryptFrom", "GenerateDataKey", "DisableKey"):
        assert not decide(WANTED, COORDINATOR, f"kms:{action}", pcrs(1), EARLY), action
    for statement in WANTED["Statement"]:
        assert "kms:CreateGrant" not in statement["Action"]
        assert all("*" not in item and ":root" not in item for item in statement["Principal"]["AWS"])
        assert all("*" not in item for item in statement["Action"])
    assert decide(WANTED, ADMIN, "kms:PutKeyPolicy", None, OVER) and decide(WANTED, SEALER, "kms:Encrypt", None, OVER)
    assert not decide(WANTED, SEALER, "kms:PutKeyPolicy", None, EARLY)
    assert openers(WANTED) == tuple(
        f"Enclave{number}: allows kms:decrypt to {COORDINATOR} under conditions on aws:currenttime,"
        " kms:recipientattestation:pcr0, kms:recipientattestation:pcr1, kms:recipientattestation:pcr16,"
        " kms:recipientattestation:pcr2"
        for number in range(2)
    )


def test_pol_5_no_image_is_accepted_for_longer_than_the_agreement() -> None:
    agreement = make_agreement()
    day = agreement.expires.replace(year=agreement.expires.year - 1)
    first = agreement.measurements[0]
    with_days = [replace(first, until=None), replace(first, until=day), replace(first, until=agreement.expires)]
    later = replace(first, until=agreement.expires.replace(year=agreement.expires.year + 1))
    found = accepted_by(replace(agreement, measurements=(*with_days, later)))
    own = replace(first, until=day).until_ms
    assert [item.until_ms for item in found] == [agreement.expires_ms, own, agreement.expires_ms, agreement.expires_ms]
    policy = kms_policy.policy_of(agreement, WHO)
    [enclave] = policy["Statement"][2:]
    condition = enclave["Condition"]
    assert condition["DateLessThan"]["aws:CurrentTime"].endswith("T00:00:00Z")
    assert condition["StringEqualsIgnoreCase"] == {
        "kms:RecipientAttestation:PCR0": first.pcr0.hex(),
        "kms:RecipientAttestation:PCR1": first.pcr1.hex(),
        "kms:RecipientAttestation:PCR2": first.pcr2.hex(),
        "kms:RecipientAttestation:PCR16": extended(agreement.digest).hex(),
    }
    assert isinstance(first, Measurement)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Principals("*", (ADMIN,), (SEALER,)), "coordinator role"),
        (lambda: Principals("arn:aws:iam::111122223333:root", (ADMIN,), (SEALER,)), "coordinator role"),
        (lambda: Principals(f"{COORDINATOR}*", (ADMIN,), (SEALER,)), "coordinator role"),
        (lambda: Principals("arn:aws:iam::111122223333:user/x", (ADMIN,), (SEALER,)), "coordinator role"),
        (lambda: Principals(COORDINATOR, (), (SEALER,)), "administrators"),
        (lambda: Principals(COORDINATOR, ("arn:aws:iam::444455556666:root",), (SEALER,)), "administrators"),
        (lambda: Principals(COORDINATOR, (ADMIN, "*"), (SEALER,)), "administrators"),
        (lambda: Principals(COORDINATOR, (ADMIN,), ()), "sealers"),
        (lambda: Principals(COORDINATOR, (COORDINATOR,), (SEALER,)), "neither manage"),
        (lambda: Principals(COORDINATOR, (ADMIN,), (COORDINATOR,)), "neither manage"),
        (lambda: key_policy(AGREEMENT, (), WHO), "measurements"),
        (lambda: key_policy(b"short", (image(1),), WHO), "agreement"),
        (lambda: replace(image(1), pcr0=bytes(48)), "pcr0"),
        (lambda: replace(image(1), pcr2=b"short"), "pcr2"),
        (lambda: replace(image(1), until_ms=UNTIL + 1), "until"),
        (lambda: replace(image(1), until_ms=0), "until"),
    ],
)
def test_pol_1_a_policy_that_protects_nothing_cannot_be_made(make: Callable[[], object], field: str) -> None:
    with pytest.raises(AgreementError, match=field):
        make()


# What stands there


def changed(change: Callable[[list[dict[str, Any]]], object]) -> dict[str, Any]:
    """The wanted policy as AWS gives it back, and then changed."""
    policy: dict[str, Any] = copy.deepcopy(_compact(WANTED))
    change(policy["Statement"])
    return read(json.dumps(policy))


def enclave(statements: list[dict[str, Any]]) -> dict[str, Any]:
    return next(item for item in statements if item["Sid"] == "Enclave0")


SAME: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "as it is": lambda s: None,
    "in another order": lambda s: s.reverse(),
    "with other names": lambda s: [item.update(Sid=f"s{number}") for number, item in enumerate(s)],
    "without names": lambda s: [item.pop("Sid") for item in s],
    "with lists of one": lambda s: enclave(s).update(Action=["kms:Decrypt"], Resource=["*"]),
    "with other letters": lambda s: enclave(s).update(Action="KMS:decrypt"),
    "with large digits": lambda s: enclave(s)["Condition"]["StringEqualsIgnoreCase"].update(
        {"kms:RecipientAttestation:PCR0": ["01" * 48]}
    ),
    "with other letters in a key": lambda s: enclave(s)["Condition"].update(
        DateLessThan={"AWS:currenttime": enclave(s)["Condition"]["DateLessThan"]["aws:CurrentTime"]}
    ),
    "with actions in another order": lambda s: s[0]["Action"].reverse(),
}


@pytest.mark.parametrize("name", SAME)
def test_pol_6_another_spelling_is_no_difference(name: str) -> None:
    live = changed(SAME[name])
    assert differences(live, WANTED) == ()
    assert differences(WANTED, live | {"Version": "2012-10-17"}) == ()


EXTRA = {"Effect": "Allow", "Principal": "*", "Action": "kms:*", "Resource": "*"}
DRIFT: dict[str, tuple[Callable[[list[dict[str, Any]]], object], list[str]]] = {
    "an open door": (
        lambda s: s.append(EXTRA),
        ["has a statement that does not belong there, allows kms:* to everybody"],
    ),
    "the account's own policies": (
        lambda s: s.append(EXTRA | {"Sid": "Iam", "Principal": {"AWS": "444455556666"}}),
        ["has a statement that does not belong there, Iam: allows kms:* to arn:aws:iam::444455556666:root"],
    ),
    "an image that went": (
        lambda s: s.remove(enclave(s)),
        [f"lacks the statement Enclave0: allows kms:decrypt to {COORDINATOR} under conditions on"],
    ),
    "an image twice": (lambda s: s.append(enclave(s)), ["has a statement that does not belong there, Enclave0:"]),
    "another image": (
        lambda s: enclave(s)["Condition"]["StringEqualsIgnoreCase"].update(
            {"kms:RecipientAttestation:PCR1": "ab" * 48}
        ),
        [
            (
                "statement Enclave0: the condition StringEqualsIgnoreCase on kms:recipientattestation:pcr1 is"
                f" {'ab' * 48}, not {'02' * 48}"
            )
        ],
    ),
    "two images in one": (
        lambda s: enclave(s)["Condition"]["StringEqualsIgnoreCase"].update(
            {"kms:RecipientAttestation:PCR1": ["02" * 48, "ab" * 48]}
        ),
        [f"is {'02' * 48}, {'ab' * 48}, not {'02' * 48}"],
    ),
    "no agreement": (
        lambda s: enclave(s)["Condition"]["StringEqualsIgnoreCase"].pop("kms:RecipientAttestation:PCR16"),
        ["statement Enclave0: lacks the condition StringEqualsIgnoreCase on kms:recipientattestation:pcr16"],
    ),
    "a later day": (
        lambda s: enclave(s)["Condition"].update(DateLessThan={"aws:CurrentTime": "2099-01-01T00:00:00Z"}),
        ["the condition DateLessThan on aws:currenttime is 2099-01-01T00:00:00Z, not 2027-07-01T00:00:00Z"],
    ),
    "no day": (lambda s: enclave(s)["Condition"].pop("DateLessThan"), ["lacks the condition DateLessThan on"]),
    "where there is one": (
        lambda s: enclave(s).update(
            Condition={"StringEqualsIgnoreCaseIfExists": enclave(s)["Condition"]["StringEqualsIgnoreCase"]}
        ),
        ["has a condition StringEqualsIgnoreCaseIfExists on kms:recipientattestation:pcr0 that does not belong there"],
    ),
    "another role": (
        lambda s: enclave(s).update(Principal={"AWS": [COORDINATOR, f"{COORDINATOR}-2"]}),
        [f"statement Enclave0: has the principal {COORDINATOR}-2, which does not belong there"],
    ),
    "everybody": (
        lambda s: enclave(s).update(Principal={"AWS": "*"}),
        ["has the principal everybody, which does not", f"lacks the principal {COORDINATOR}"],
    ),
    "a role that was deleted": (
        lambda s: enclave(s).update(Principal={"AWS": "AROA0123456789ABCDEF"}),
        ["has the principal AROA0123456789ABCDEF (an identity that was deleted), which", "lacks the principal"],
    ),
    "a service": (
        lambda s: enclave(s).update(Principal={"AWS": COORDINATOR, "Service": "ec2.amazonaws.com"}),
        ["has the principal Service ec2.amazonaws.com, which"],
    ),
    "more actions": (
        lambda s: enclave(s).update(Action=["kms:Decrypt", "kms:CreateGrant"]),
        ["statement Enclave0: has the action kms:creategrant, which does not belong there"],
    ),
    "all but some actions": (
        lambda s: [enclave(s).pop("Action"), enclave(s).update(NotAction="kms:Encrypt")],
        ["lacks the action kms:decrypt", "has a field that does not belong there, NotAction"],
    ),
    "a denial": (lambda s: enclave(s).update(Effect="Deny"), ["statement Enclave0: says Deny, not Allow"]),
    "control codes": (
        lambda s: s.append(EXTRA | {"Sid": "\x1b[2J" + "x" * 500}),
        ["?[2Jxxxx", "xxx...: allows kms:* to everybody"],
    ),
}


@pytest.mark.parametrize("name", DRIFT)
def test_pol_6_drift_is_told_in_words(name: str) -> None:
    change, words = DRIFT[name]
    found = differences(changed(change), WANTED)
    assert found
    for word in words:
        assert any(word in line for line in found), found
    assert all(line.isprintable() for line in found)


def test_an_older_version_of_the_language_is_drift() -> None:
    live = read(json.dumps(WANTED | {"Version": "2008-10-17"}))
    assert differences(live, WANTED) == ("its version is 2008-10-17, not 2012-10-17",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"Statement": 1}',
        '{"Statement": [1]}',
        '{"Statement": [], "Statement": [{}]}',
        '{"Statement": [{"Effect": "Deny", "Effect": "Allow"}]}',
        "[" * 100_000,
        " " * (limits.KEY_POLICY_BYTES + 1),
    ],
)
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(MalformedError, match="key policy"):
        read(text)


def test_a_lone_statement_is_read_as_one() -> None:
    assert read(json.dumps({"Statement": EXTRA}))["Statement"] == [EXTRA]


def test_pol_7_revoking_takes_out_what_opens_and_leaves_the_rest() -> None:
    escrow = {"Effect": "Allow", "Principal": {"AWS": SEALER}, "Action": ["kms:Decrypt"], "Resource": "*"}
    door = EXTRA | {"Sid": "Iam", "Principal": {"AWS": "444455556666"}}
    deny = {"Effect": "Deny", "Principal": "*", "Action": "kms:Decrypt", "Resource": "*"}
    live = changed(lambda s: s.extend([escrow, door, deny]))
    left, gone = revoked(live)
    assert [item.partition(":")[0] for item in gone[:2]] == ["Enclave0", "Enclave1"] and len(gone) == 3
    assert left["Statement"] == [*live["Statement"][:2], door, deny]
    assert openers(left) == ("Iam: allows kms:* to arn:aws:iam::444455556666:root",)
    assert not decide(left, COORDINATOR, "kms:Decrypt", pcrs(1), EARLY)
    assert openers(revoked(WANTED)[0]) == () and revoked(revoked(WANTED)[0]) == (revoked(WANTED)[0], ())


@pytest.mark.parametrize(
    "action", ["*", "kms:*", "kms:De*", "kms:?ecrypt", "KMS:CREATEGRANT", ["kms:Encrypt", "kms:re*"]]
)
def test_who_could_open_is_seen_through_wildcards(action: Any) -> None:
    assert len(openers({"Statement": [EXTRA | {"Action": action}]})) == 1
    harmless = EXTRA | {"Action": ["kms:Encrypt", "kms:DescribeKey", "kms:Get*"]}
    assert openers({"Statement": [harmless, EXTRA | {"Effect": "Deny"}]}) == ()


# Terraform's template


def test_the_template_names_the_same_actions() -> None:
    text = (TERRAFORM / "modules/key-policy/main.tf").read_text("utf-8")
    lists = [tuple(re.findall(r'"(kms:\w+)"', each)) for each in re.findall(r"Action\s+= \[(.*?)\]", text, re.DOTALL)]
    assert lists == [kms_policy.MANAGING, kms_policy.SEALING, kms_policy.OPENING]


def test_the_template_makes_the_same_policy(tmp_path: Path) -> None:
    program = shutil.which("terraform")
    if program is None:
        pytest.skip("NO TERRAFORM: it is not installed")
    folder = tmp_path / "key-policy"
    shutil.copytree(
        TERRAFORM / "modules/key-policy", folder, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*")
    )
    accepted = [
        {
            **{f"pcr{index}": getattr(item, f"pcr{index}").hex().upper() for index in range(3)},
            "pcr16": extended(AGREEMENT).hex(),
            "until": until,
        }
        for item, until in ((image(1), "2027-07-01T00:00:00Z"), (image(0x10), "2027-07-02T00:00:00Z"))
    ]
    values = {"accepted": accepted, "coordinator_role": COORDINATOR, "administrators": [ADMIN], "sealers": [SEALER]}
    (folder / "terraform.tfvars.json").write_text(json.dumps(values), encoding="utf-8")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CHECKPOINT_DISABLE": "1"}
    for command in (["init", "-backend=false"], ["apply", "-auto-approve"], ["output", "-raw", "json"]):
        done = subprocess.run(
            [program, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == WANTED
    assert differences(read(done.stdout), WANTED) == ()
