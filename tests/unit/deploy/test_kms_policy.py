"""The emulated KMS's evaluation of policies: principals, actions, conditions, and what denies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from parley_deploy.kms import policy as policies
from parley_deploy.kms.errors import KmsError

ROLE = "arn:aws:iam::111122223333:role/parent"
SESSION = "arn:aws:sts::111122223333:assumed-role/parent/one"
PCR0 = "kms:RecipientAttestation:PCR0"
TIME = "aws:CurrentTime"
A, B = "a" * 96, "b" * 96


def decide(statement: Mapping[str, Any], keys: Mapping[str, str] | None = None, action: str = "kms:Decrypt") -> Any:
    """Whether a statement allows ROLE's session by name."""
    whole = {"Effect": "Allow", "Principal": {"AWS": ROLE}, "Action": "kms:Decrypt", "Resource": "*", **statement}
    whole = {name: value for name, value in whole.items() if value is not None}
    text = json.dumps({"Version": "2012-10-17", "Statement": whole})
    request = policies.Request(
        action,
        "arn:aws:kms:eu-central-1:444455556666:key/k",
        frozenset({ROLE, SESSION}),
        "111122223333",
        {name: [value] for name, value in (keys or {}).items()},
    )
    return policies.decide(policies.parse(text, resource_policy=True), request, resource_policy=True)


def condition(operator: str, value: Any, key: str = PCR0) -> dict[str, Any]:
    return {"Condition": {operator: {key: value}}}


@pytest.mark.parametrize(
    ("statement", "keys", "allowed"),
    [
        # an attestation condition holds for that register only, and not where there is no document
        (condition("StringEquals", A), {PCR0: A}, True),
        (condition("StringEquals", A), {PCR0: B}, False),
        (condition("StringEquals", A), {}, False),
        (condition("StringEquals", A.upper()), {PCR0: A}, False),
        (condition("StringEqualsIgnoreCase", A.upper()), {PCR0: A}, True),
        (condition("StringEqualsIgnoreCase", A), {"kms:RecipientAttestation:PCR1": A}, False),
        (condition("StringEqualsIgnoreCase", [A, B]), {PCR0: B}, True),
        (condition("StringEqualsIfExists", A), {}, True),
        (condition("StringEqualsIfExists", A), {PCR0: B}, False),
        (condition("StringEquals", A, key=PCR0.upper()), {PCR0: A}, True),
        # what is absent differs from everything: a negated test lets requests without document through
        (condition("StringNotEquals", A), {}, True),
        (condition("StringNotEquals", A), {PCR0: A}, False),
        (condition("StringNotEqualsIgnoreCase", [A, B]), {PCR0: B}, False),
        (condition("ForAnyValue:StringNotEquals", A), {}, False),
        (condition("ForAllValues:StringEquals", A), {}, True),
        (condition("ForAnyValue:StringEquals", A), {}, False),
        (condition("Null", "true"), {}, True),
        (condition("Null", "true"), {PCR0: A}, False),
        (condition("Null", False), {PCR0: A}, True),
        (condition("StringLike", "aaaa*"), {PCR0: A}, True),
        (condition("StringLike", "[ab]*"), {PCR0: A}, False),
        (condition("StringNotLike", "aaaa?*"), {PCR0: A}, False),
        # all operators and all keys of a condition must hold
        ({"Condition": {"StringEquals": {PCR0: A}, "DateLessThan": {TIME: "2027-01-01T00:00:00Z"}}}, {PCR0: A}, False),
        (
            {"Condition": {"StringEquals": {PCR0: A, "kms:RecipientAttestation:PCR1": B}}},
            {PCR0: A, "kms:RecipientAttestation:PCR1": A},
            False,
        ),
        (
            {"Condition": {"StringEquals": {PCR0: A}, "DateLessThan": {TIME: "2027-01-01T00:00:00Z"}}},
            {PCR0: A, TIME: "2026-12-31T23:59:59Z"},
            True,
        ),
        (condition("DateLessThan", "2027-01-01T00:00:00Z", TIME), {TIME: "2027-01-01T00:00:00Z"}, False),
        (condition("DateLessThanEquals", "2027-01-01T00:00:00Z", TIME), {TIME: "2027-01-01T00:00:00Z"}, True),
        (condition("DateLessThan", "2027-01-01T02:00:00+02:00", TIME), {TIME: "2026-12-31T23:59:59Z"}, True),
        (condition("DateGreaterThan", "2027-01-01", TIME), {TIME: "2026-12-31T23:59:59Z"}, False),
        (condition("DateLessThan", "2027-01-01", "aws:EpochTime"), {"aws:EpochTime": "1798761599"}, True),
        (condition("Bool", "false", "aws:SecureTransport"), {"aws:SecureTransport": "false"}, True),
        (condition("NumericLessThan", "10", "x"), {"x": "9"}, True),
        (condition("NumericLessThan", "10", "x"), {"x": "nine"}, False),
        (condition("StringEquals", "v", "kms:EncryptionContext:k"), {"kms:EncryptionContext:k": "v"}, True),
        (condition("StringEquals", "v", "kms:EncryptionContext:k"), {"kms:EncryptionContext:k": "w"}, False),
        (condition("ArnLike", "arn:aws:iam::*:role/parent", "aws:PrincipalArn"), {"aws:PrincipalArn": ROLE}, True),
        # actions, resources and principals
        ({"Action": "kms:de*"}, {}, True),
        ({"Action": ["kms:Encrypt", "kms:Decryp?"]}, {}, True),
        ({"Action": "kms:Encrypt"}, {}, False),
        ({"Action": None, "NotAction": "kms:Encrypt"}, {}, True),
        ({"Action": None, "NotAction": "kms:*"}, {}, False),
        ({"Resource": "arn:aws:kms:*:444455556666:key/*"}, {}, True),
        ({"Resource": "arn:aws:kms:*:999999999999:key/*"}, {}, False),
        ({"Resource": None, "NotResource": "*"}, {}, False),
        ({"Principal": "*"}, {}, True),
        ({"Principal": {"AWS": "*"}}, {}, True),
        ({"Principal": {"AWS": SESSION}}, {}, True),
        ({"Principal": {"AWS": "arn:aws:iam::111122223333:role/par*"}}, {}, False),
        ({"Principal": {"Service": "ec2.amazonaws.com"}}, {}, False),
        ({"Principal": None, "NotPrincipal": {"AWS": ROLE}}, {}, False),
        ({"Principal": None, "NotPrincipal": {"AWS": "arn:aws:iam::111122223333:role/x"}}, {}, True),
    ],
)
def test_a_statement(statement: Mapping[str, Any], keys: Mapping[str, str], allowed: bool) -> None:
    found = decide(statement, keys)
    assert found.direct is allowed and not found.denied
    # The same statement as a denial denies exactly then.
    assert decide({**statement, "Effect": "Deny"}, keys).denied is allowed


@pytest.mark.parametrize("account", ["111122223333", "arn:aws:iam::111122223333:root"])
def test_an_account_is_not_one_of_its_identities(account: str) -> None:
    found = decide({"Principal": {"AWS": account}})
    assert (found.direct, found.account, found.denied) == (False, True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "no statements"),
        ('{"Statement": []}', "no statements"),
        ('{"Version": "2030-01-01", "Statement": [{}]}', "unknown version"),
        ('{"Statement": [1]}', "unknown fields"),
        ('{"Statement": [{"Effect": "Allow", "Extra": 1}]}', "unknown fields"),
        ('{"Statement": [{"Effect": "Maybe"}]}', "neither Allow nor Deny"),
        ('{"Statement": [{"Effect": "Allow", "Resource": "*"}]}', "no Action"),
        ('{"Statement": [{"Effect": "Allow", "Action": "*", "NotAction": "*", "Resource": "*"}]}', "no Action"),
        ('{"Statement": [{"Effect": "Allow", "Action": 5, "Resource": "*"}]}', "Action is no text"),
        ('{"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}', "no principal"),
        (" " * 40_000, "too large"),
    ],
)
def test_a_policy_that_cannot_be_evaluated(text: str, message: str) -> None:
    with pytest.raises(KmsError, match=message) as raised:
        policies.parse(text, resource_policy=True)
    assert raised.value.code == "MalformedPolicyDocumentException"


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"StringSounds": {PCR0: A}}, "operator: StringSounds"),
        ({"DateLessThan": {TIME: "soon"}}, "no date: soon"),
        ({"StringEquals": {PCR0: [A, None]}}, "no text"),
        ({"StringEquals": A}, "Condition is no structure"),
    ],
)
def test_a_condition_that_cannot_be_evaluated(test: Mapping[str, Any], message: str) -> None:
    with pytest.raises(KmsError, match=message):
        decide({"Condition": test})
