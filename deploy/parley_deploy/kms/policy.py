"""Policies as IAM evaluates them: principals, actions, conditions; what is denied stays denied.

Source: the IAM reference on policy evaluation and on condition operators, the KMS guide on key policies. Pure: the time
and all else that is known of a request come in as condition keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from parley_deploy.kms.errors import malformed_policy

POLICY_BYTES: Final = 32_768
"""Longest key policy that KMS takes."""
_ACCOUNT: Final = re.compile(r"arn:aws[a-z-]*:iam::(\d{12}):root|(\d{12})")
_SESSION: Final = re.compile(r"arn:aws[a-z-]*:sts::\d{12}:assumed-role/[\w+=,.@-]+/[\w+=,.@-]+")
_FIELDS: Final = frozenset(
    {"Sid", "Effect", "Principal", "NotPrincipal", "Action", "NotAction", "Resource", "NotResource", "Condition"}
)

Statement = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What a policy is asked. `names`: the texts by which a policy may name the caller; `keys`: condition keys."""

    action: str
    resource: str
    names: frozenset[str]
    account: str
    keys: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """What the statements of one policy say. `direct`: they allow the caller by name; `account`: the caller's account."""

    denied: bool
    direct: bool
    account: bool


def statements(policy: Mapping[str, Any]) -> list[Statement]:
    """The statements of a policy, of which a lone one may stand without its list."""
    found = policy.get("Statement", [])
    return list(found) if isinstance(found, list) else [found]


def parse(text: str, *, resource_policy: bool) -> dict[str, Any]:
    """A policy that can be evaluated; MalformedPolicyDocumentException otherwise."""
    if len(text.encode()) > POLICY_BYTES:
        raise malformed_policy("Policy document is too large")
    try:
        policy = json.loads(text)
    except ValueError:
        raise malformed_policy("Policy document is not valid JSON") from None
    if not isinstance(policy, dict) or not statements(policy):
        raise malformed_policy("Policy document has no statements")
    if policy.get("Version", "2012-10-17") not in ("2012-10-17", "2008-10-17"):
        raise malformed_policy("Policy document has an unknown version")
    for statement in statements(policy):
        _check(statement, resource_policy=resource_policy)
    return policy


def _check(statement: object, *, resource_policy: bool) -> None:
    if not isinstance(statement, dict) or statement.keys() - _FIELDS:
        raise malformed_policy("Policy contains a statement with unknown fields")
    if statement.get("Effect") not in ("Allow", "Deny"):
        raise malformed_policy("Policy contains a statement with neither Allow nor Deny")
    for pair in (("Action", "NotAction"), ("Resource", "NotResource")):
        if len(statement.keys() & set(pair)) != 1:
            raise malformed_policy(f"Policy contains a statement with no {pair[0]}, or with two")
        if not all(
            isinstance(item, str) and item for item in listed(statement[next(p for p in pair if p in statement)])
        ):
            raise malformed_policy(f"Policy contains a statement whose {pair[0]} is no text")
    named = statement.keys() & {"Principal", "NotPrincipal"}
    if len(named) != int(resource_policy):
        raise malformed_policy("Policy contains a statement with no principal, or with one where none belongs")
    conditions = statement.get("Condition", {})
    if not isinstance(conditions, dict) or not all(isinstance(tests, dict) for tests in conditions.values()):
        raise malformed_policy("Policy contains a statement whose Condition is no structure")
    for operator, tests in conditions.items():
        base = _base(operator)
        if base not in _OPERATORS and base != "Null":
            raise malformed_policy(f"Policy contains an unknown condition operator: {operator}")
        for value in tests.values():
            for item in listed(value):
                _readable(base, item)


def _readable(base: str, item: object) -> None:
    if not isinstance(item, (str, bool, int, float)):
        raise malformed_policy("Policy contains a condition whose value is no text")
    if base.startswith("Date") and _moment(str(item)) is None:
        raise malformed_policy(f"Policy contains a condition whose value is no date: {item}")


def listed(value: object) -> list[Any]:
    """What may stand alone or in a list, as a list."""
    return value if isinstance(value, list) else [value]


def principals(statement: Statement) -> Iterator[str]:
    """The texts by which a statement names AWS principals; "*" for everybody."""
    named = statement.get("Principal", statement.get("NotPrincipal"))
    if isinstance(named, str):
        yield named
    elif isinstance(named, dict):
        yield from (str(item) for item in listed(named.get("AWS", [])))


def account_of(name: str) -> str | None:
    """The account that a principal's text stands for as a whole; None where it names an identity."""
    match = _ACCOUNT.fullmatch(name)
    return match and (match[1] or match[2])


def is_session(name: str) -> bool:
    """Whether a principal's text names one session of a role, which KMS takes without knowing it."""
    return _SESSION.fullmatch(name) is not None


def decide(policy: Mapping[str, Any], request: Request, *, resource_policy: bool) -> Decision:
    """What `policy` says of a request. A policy of an identity has no principals: it speaks of its holder."""
    denied = direct = account = False
    for statement in statements(policy):
        by_name, by_account = _caller(statement, request) if resource_policy else (True, False)
        if not (by_name or by_account) or not _concerns(statement, request) or not _holds(statement, request):
            continue
        if statement["Effect"] == "Deny":
            denied = True
        else:
            direct, account = direct or by_name, account or by_account
    return Decision(denied, direct, account)


def _caller(statement: Statement, request: Request) -> tuple[bool, bool]:
    named = set(principals(statement))
    by_account = request.account in {account_of(name) for name in named}
    by_name = bool(named & request.names) or "*" in named
    if "NotPrincipal" in statement:
        return not (by_name or by_account), False
    return by_name, by_account


def _concerns(statement: Statement, request: Request) -> bool:
    actions = [str(item).lower() for item in listed(statement.get("Action", statement.get("NotAction")))]
    resources = [str(item) for item in listed(statement.get("Resource", statement.get("NotResource")))]
    action = any(_like(request.action.lower(), pattern) for pattern in actions)
    resource = any(_like(request.resource, pattern) for pattern in resources)
    return action is ("Action" in statement) and resource is ("Resource" in statement)


def _holds(statement: Statement, request: Request) -> bool:
    keys = {name.lower(): list(values) for name, values in request.keys.items()}
    return all(
        _test(operator, keys.get(name.lower(), []), [_text(item) for item in listed(wanted)])
        for operator, tests in statement.get("Condition", {}).items()
        for name, wanted in tests.items()
    )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _base(operator: str) -> str:
    return operator.removeprefix("ForAllValues:").removeprefix("ForAnyValue:").removesuffix("IfExists")


def _test(operator: str, found: Sequence[str], wanted: Sequence[str]) -> bool:
    base = _base(operator)
    if base == "Null":
        return any((item == "true") is not bool(found) for item in wanted)
    compare, negated = _OPERATORS[base]

    def one(value: str) -> bool:
        return any(compare(value, item) for item in wanted) is not negated

    if operator.startswith("ForAllValues:"):
        return all(one(value) for value in found)
    if not found:
        # A key that the request lacks equals nothing, so that it also differs from everything.
        return operator.endswith("IfExists") or (negated and not operator.startswith("ForAnyValue:"))
    return any(one(value) for value in found)


def _like(value: str, pattern: str) -> bool:
    # IAM knows `*` and `?`; brackets are themselves.
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), value, re.DOTALL) is not None


def _moment(text: str) -> float | None:
    if re.fullmatch(r"\d{9,}", text):
        return float(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _dates(compare: Callable[[float, float], bool]) -> Callable[[str, str], bool]:
    def both(value: str, wanted: str) -> bool:
        left, right = _moment(value), _moment(wanted)
        return left is not None and right is not None and compare(left, right)

    return both


def _numbers(compare: Callable[[float, float], bool]) -> Callable[[str, str], bool]:
    def both(value: str, wanted: str) -> bool:
        try:
            return compare(float(value), float(wanted))
        except ValueError:
            return False

    return both


_COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "Equals": lambda left, right: left == right,
    "LessThan": lambda left, right: left < right,
    "LessThanEquals": lambda left, right: left <= right,
    "GreaterThan": lambda left, right: left > right,
    "GreaterThanEquals": lambda left, right: left >= right,
}
_OPERATORS: Final[Mapping[str, tuple[Callable[[str, str], bool], bool]]] = {
    "StringEquals": (lambda value, wanted: value == wanted, False),
    "StringNotEquals": (lambda value, wanted: value == wanted, True),
    "StringEqualsIgnoreCase": (lambda value, wanted: value.lower() == wanted.lower(), False),
    "StringNotEqualsIgnoreCase": (lambda value, wanted: value.lower() == wanted.lower(), True),
    "StringLike": (_like, False),
    "StringNotLike": (_like, True),
    "ArnEquals": (_like, False),
    "ArnLike": (_like, False),
    "ArnNotEquals": (_like, True),
    "ArnNotLike": (_like, True),
    "Bool": (lambda value, wanted: value.lower() == wanted.lower(), False),
    **{f"Date{name}": (_dates(compare), False) for name, compare in _COMPARISONS.items()},
    "DateNotEquals": (_dates(_COMPARISONS["Equals"]), True),
    **{f"Numeric{name}": (_numbers(compare), False) for name, compare in _COMPARISONS.items()},
    "NumericNotEquals": (_numbers(_COMPARISONS["Equals"]), True),
}
"""Operators of conditions: how one value is compared, and whether the outcome is turned round."""
