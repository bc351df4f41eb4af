"""The policy of a party's KMS key: what it must be, and how the one that stands there differs (SPEC, "Policy of a party's key").

An enclave gets what the key sealed only where the policy's condition keys hold: PCR0, 1 and 2 of one accepted image, PCR16
of this agreement, before the image's last day is over. Those who operate the coordinator can do nothing else with the key.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from parley_protocol import limits
from parley_protocol.attestation.document import ZERO_PCR, extended
from parley_protocol.attestation.policy import AGREEMENT_PCR, IMAGE_PCRS
from parley_protocol.errors import AgreementError, MalformedError, Problem

if TYPE_CHECKING:
    from parley_protocol.agreement.model import Agreement

VERSION: Final = "2012-10-17"
MANAGE: Final = "ManageWithoutUse"
SEAL: Final = "Seal"
ENCLAVE: Final = "Enclave"
"""Sid of the statement of an accepted image: this and its number, from 0."""
MANAGING: Final = (
    "kms:CancelKeyDeletion",
    "kms:DescribeKey",
    "kms:DisableKey",
    "kms:EnableKey",
    "kms:EnableKeyRotation",
    "kms:GetKeyPolicy",
    "kms:GetKeyRotationStatus",
    "kms:ListGrants",
    "kms:ListResourceTags",
    "kms:PutKeyPolicy",
    "kms:RevokeGrant",
    "kms:ScheduleKeyDeletion",
    "kms:TagResource",
    "kms:UntagResource",
    "kms:UpdateKeyDescription",
)
"""What the party's administrators may (pol-2). Changing the policy is among it, since a key whose policy nobody can change is lost."""
SEALING: Final = ("kms:DescribeKey", "kms:Encrypt", "kms:GetKeyPolicy", "kms:ListGrants")
"""What the party's client does (pol-3): it reads the policy and the grants, then encrypts."""
OPENING: Final = ("kms:Decrypt",)
"""What the coordinator may do (pol-4), with the document of an accepted enclave."""

_ROLE: Final = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+")
_IDENTITY: Final = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:(?:role|user)/[A-Za-z0-9+=,.@_/-]+")
_ACCOUNT: Final = re.compile(r"[0-9]{12}")
_UNIQUE_ID: Final = re.compile(r"A(?:IDA|ROA|GPA|IPA|NPA|NVA|SCA)[A-Z0-9]{8,}")
_OPENS: Final = frozenset(
    name.lower()
    for name in (
        *("kms:CreateGrant", "kms:Decrypt", "kms:DeriveSharedSecret", "kms:GenerateDataKey", "kms:GenerateDataKeyPair"),
        *("kms:ReEncryptFrom", "kms:ReplicateKey"),
    )
)
"""Actions by which somebody gets at what the key sealed, or lets others."""

HARMLESS_GRANTS: Final = frozenset({"DescribeKey", "Encrypt", "RetireGrant"})
"""Operations of a grant by which nobody gets at what the key sealed."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """An image that may get what the key sealed, until `until_ms` (the first millisecond at which it may not)."""

    pcr0: bytes
    pcr1: bytes
    pcr2: bytes
    until_ms: int

    def __post_init__(self) -> None:
        for name in ("pcr0", "pcr1", "pcr2"):
            value = getattr(self, name)
            if len(value) != limits.PCR_BYTES or value == ZERO_PCR:
                raise _problem(name, "not 48 bytes, or all zero, which every debug enclave has")
        if self.until_ms <= 0 or self.until_ms % 1000:
            raise _problem("until", "not a time in whole seconds")


@dataclass(frozen=True, slots=True)
class Principals:
    """Who stands in the policy (pol-1): the coordinator's role, and the party's own identities, by ARN.

    `administrators` manage the key and cannot use it; `sealers` run the party's client.
    """

    coordinator: str
    administrators: tuple[str, ...]
    sealers: tuple[str, ...]

    def __post_init__(self) -> None:
        if _ROLE.fullmatch(self.coordinator) is None:
            raise _problem("coordinator role", f"{_shown(self.coordinator)} is not the ARN of one role")
        for name in ("administrators", "sealers"):
            values = getattr(self, name)
            if not values:
                raise _problem(name, "none")
            for value in values:
                if _IDENTITY.fullmatch(value) is None:
                    raise _problem(name, f"{_shown(value)} is not the ARN of one role or user")
        if self.coordinator in (*self.administrators, *self.sealers):
            raise _problem("coordinator role", "the coordinator must neither manage the key nor seal under it")


def accepted_by(agreement: Agreement) -> tuple[Accepted, ...]:
    """The images of an agreement, none for longer than the agreement itself (pol-5)."""
    return tuple(
        Accepted(
            image.pcr0,
            image.pcr1,
            image.pcr2,
            agreement.expires_ms if image.until_ms is None else min(image.until_ms, agreement.expires_ms),
        )
        for image in agreement.measurements
    )


def key_policy(agreement: bytes, accepted: Sequence[Accepted], principals: Principals) -> dict[str, Any]:
    """The policy (pol-1 to pol-5). `agreement`: the digest that PCR16 holds; AgreementError where there is no image."""
    if len(agreement) != limits.PCR_BYTES:
        raise _problem("agreement", "not a digest of 48 bytes")
    if not accepted:
        raise _problem("measurements", "none: no enclave could be accepted")
    return {
        "Version": VERSION,
        "Statement": [
            _statement(MANAGE, principals.administrators, MANAGING),
            _statement(SEAL, principals.sealers, SEALING),
            # One statement for each image: within one, registers of one image could stand beside another's.
            *(
                {
                    **_statement(f"{ENCLAVE}{number}", (principals.coordinator,), OPENING),
                    "Condition": {
                        "StringEqualsIgnoreCase": _registers(image, agreement),
                        "DateLessThan": {"aws:CurrentTime": _time(image.until_ms)},
                    },
                }
                for number, image in enumerate(accepted)
            ),
        ],
    }


def policy_of(agreement: Agreement, principals: Principals) -> dict[str, Any]:
    """The policy of a party's key under an agreement."""
    return key_policy(agreement.digest, accepted_by(agreement), principals)


def _statement(sid: str, principals: Sequence[str], actions: Sequence[str]) -> dict[str, Any]:
    return {
        "Sid": sid,
        "Effect": "Allow",
        "Principal": {"AWS": list(principals)},
        "Action": list(actions),
        "Resource": "*",
    }


def _registers(image: Accepted, agreement: bytes) -> dict[str, str]:
    values = dict(zip(IMAGE_PCRS, (image.pcr0, image.pcr1, image.pcr2), strict=True))
    values[AGREEMENT_PCR] = extended(agreement)
    return {f"kms:RecipientAttestation:PCR{index}": value.hex() for index, value in values.items()}


def _time(ms: int) -> str:
    return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms):%Y-%m-%dT%H:%M:%SZ}"


def read(text: str) -> dict[str, Any]:
    """A policy as KMS gives it; MalformedError where it is none, or where one field stands twice."""
    if len(text) > limits.KEY_POLICY_BYTES:
        raise MalformedError(f"key policy: more than {limits.KEY_POLICY_BYTES} bytes")
    try:
        policy = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise MalformedError("key policy: not JSON") from None
    statements = policy.get("Statement") if isinstance(policy, dict) else None
    if isinstance(statements, dict):
        policy["Statement"] = statements = [statements]
    if not isinstance(statements, list) or not all(isinstance(item, dict) for item in statements):
        raise MalformedError("key policy: no statements")
    return dict(policy)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedError("key policy: a field stands twice")
    return found


@dataclass(frozen=True, slots=True)
class _Facts:
    """A statement with everything in it that could be written in another way reduced to one form; its Sid says nothing."""

    effect: str
    principals: frozenset[str]
    actions: frozenset[str]
    resources: frozenset[str]
    conditions: frozenset[tuple[str, str, frozenset[str]]]
    others: frozenset[tuple[str, str]]
    sid: str = field(compare=False)

    @classmethod
    def of(cls, statement: Mapping[str, Any]) -> _Facts:
        known = ("Sid", "Effect", "Principal", "Action", "Resource", "Condition")
        return cls(
            effect=str(statement.get("Effect")),
            principals=frozenset(_principals(statement.get("Principal"))),
            actions=frozenset(_folded(statement.get("Action", []))),
            resources=frozenset(map(str, _list(statement.get("Resource", [])))),
            conditions=frozenset(_conditions(statement.get("Condition", {}))),
            others=frozenset(
                (name, json.dumps(statement[name], sort_keys=True)) for name in statement.keys() - set(known)
            ),
            sid=str(statement.get("Sid", "")),
        )

    def __str__(self) -> str:
        name = f"{_shown(self.sid)}: " if self.sid else ""
        verb = "denies" if self.effect == "Deny" else "allows"
        what = ", ".join(sorted(map(_shown, self.actions))) or "actions that it does not list"
        who = ", ".join(sorted(map(_who, self.principals))) or "principals that it does not list"
        under = ", ".join(sorted({_shown(key) for _, key, _ in self.conditions}))
        return f"{name}{verb} {what} to {who}" + (f" under conditions on {under}" if under else "")


def differences(live: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the policy that stands there (`read`) is not as it must be, in words; nothing where they say the same (pol-6).

    Order, the names of statements and lists of one are no differences. What AWS shows by an id is an identity that was
    deleted, whatever it was called.
    """
    found: list[str] = []
    if live.get("Version") != wanted["Version"]:
        found.append(f"its version is {_shown(str(live.get('Version')))}, not {wanted['Version']}")
    there = Counter(map(_Facts.of, live["Statement"]))
    must = Counter(map(_Facts.of, wanted["Statement"]))
    extra, missing = list((there - must).elements()), list((must - there).elements())
    for one in missing:
        other = next((item for item in extra if item.sid == one.sid), None)
        if other is None:
            found.append(f"lacks the statement {one}")
        else:
            extra.remove(other)
            found += [f"statement {_shown(one.sid)}: {line}" for line in _between(other, one)]
    found += [f"has a statement that does not belong there, {one}" for one in extra]
    return tuple(found)


def _between(live: _Facts, wanted: _Facts) -> Iterator[str]:
    if live.effect != wanted.effect:
        yield f"says {_shown(live.effect)}, not {wanted.effect}"
    yield from _sets(live.principals, wanted.principals, "principal", _who)
    yield from _sets(live.actions, wanted.actions, "action", _shown)
    yield from _sets(live.resources, wanted.resources, "resource", _shown)
    there = {(operator, key): values for operator, key, values in live.conditions}
    must = {(operator, key): values for operator, key, values in wanted.conditions}
    for operator, key in sorted(there.keys() | must.keys()):
        what = f"condition {_shown(operator)} on {_shown(key)}"
        if (operator, key) not in must:
            yield f"has a {what} that does not belong there"
        elif (operator, key) not in there:
            yield f"lacks the {what}"
        elif there[operator, key] != must[operator, key]:
            one, other = (", ".join(sorted(map(_shown, side[operator, key]))) for side in (there, must))
            yield f"the {what} is {one}, not {other}"
    for name, _ in sorted(live.others ^ wanted.others):
        yield f"has a field that does not belong there, {_shown(name)}"


def _sets(live: frozenset[str], wanted: frozenset[str], what: str, show: Callable[[str], str]) -> Iterator[str]:
    yield from (f"has the {what} {show(item)}, which does not belong there" for item in sorted(live - wanted))
    yield from (f"lacks the {what} {show(item)}" for item in sorted(wanted - live))


def revoked(live: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The policy that stands there without the statements that let enclaves decrypt, and what they said (pol-7)."""
    kept: list[Mapping[str, Any]] = []
    gone: list[Mapping[str, Any]] = []
    for statement in live["Statement"]:
        (gone if _lets_enclaves(statement) else kept).append(statement)
    return {**live, "Statement": kept}, tuple(str(_Facts.of(statement)) for statement in gone)


def openers(policy: Mapping[str, Any]) -> tuple[str, ...]:
    """The statements by which somebody could get at what the key sealed, or let others; none after `revoked` as it should be."""
    return tuple(
        str(_Facts.of(statement))
        for statement in policy["Statement"]
        if statement.get("Effect") != "Deny" and ("NotAction" in statement or _matches(statement, _OPENS))
    )


def _lets_enclaves(statement: Mapping[str, Any]) -> bool:
    if statement.get("Effect") != "Allow":
        return False
    attested = any("recipientattestation" in key for _, key, _ in _conditions(statement.get("Condition", {})))
    actions = set(_folded(statement.get("Action", [])))
    return attested or (bool(actions) and actions <= _OPENS)


def _matches(statement: Mapping[str, Any], names: Iterable[str]) -> bool:
    patterns = [
        re.compile(re.escape(action).replace(r"\*", ".*").replace(r"\?", "."))
        for action in _folded(statement.get("Action", []))
    ]
    return any(pattern.fullmatch(name) for pattern in patterns for name in names)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _folded(value: object) -> Iterator[str]:
    yield from (str(item).lower() for item in _list(value))


def _principals(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for kind, names in value.items():
            for name in map(str, _list(names)):
                if kind != "AWS":
                    yield f"{kind} {name}"
                else:
                    yield f"arn:aws:iam::{name}:root" if _ACCOUNT.fullmatch(name) else name
    elif value is not None:
        yield str(value)


def _conditions(value: object) -> Iterator[tuple[str, str, frozenset[str]]]:
    if not isinstance(value, dict):
        yield "?", "?", frozenset({json.dumps(value)})
        return
    for operator, tests in value.items():
        for key, wanted in (tests if isinstance(tests, dict) else {"?": tests}).items():
            values = [item if isinstance(item, str) else json.dumps(item) for item in _list(wanted)]
            if "IgnoreCase" in operator:
                values = [item.lower() for item in values]
            yield str(operator), str(key).lower(), frozenset(values)


def _who(name: str) -> str:
    if name == "*":
        return "everybody"
    if _UNIQUE_ID.fullmatch(name):
        return f"{name} (an identity that was deleted)"
    return _shown(name)


def _shown(text: str) -> str:
    """What others wrote, fit to be shown."""
    line = "".join(character if character.isprintable() else "?" for character in text)
    return line if len(line) <= 160 else f"{line[:157]}..."


def _problem(path: str, message: str) -> AgreementError:
    return AgreementError([Problem(path, None, message)])
