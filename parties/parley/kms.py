"""A party's KMS key, as its own client uses it: the policy, the grants, and what is encrypted under it.

boto3 (extra `kms`) finds credentials, region and endpoint as for any AWS program: AWS_PROFILE, AWS_ENDPOINT_URL_KMS and
the rest. The coordinator's side of KMS is the coordinator's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from parley_protocol import kms_policy
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import StateError, UnavailableError
from parley_protocol.kms_policy import Principals

if TYPE_CHECKING:
    from types_boto3_kms.client import KMSClient

_POLICY: Final = "default"
"""The name of a key's only policy."""
_LATER: Final = frozenset(
    {
        *("DependencyTimeoutException", "KMSInternalException", "KeyUnavailableException", "LimitExceededException"),
        *("ThrottlingException", "RequestExpired", "ServiceUnavailable"),
    }
)


_TOKEN: Final = object()


@dataclass(frozen=True, slots=True)
class CheckedKey:
    """A key that was read now, and opens to nobody but the enclaves of an agreement (kms-15): what is sealed for it needs no
    enclave that lives."""

    agreement: Agreement
    arn: str
    # Not a field: `dataclasses.replace` must not carry it over to a changed copy.
    token: InitVar[object]

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("a CheckedKey comes from `checked` and from nowhere else")


@dataclass(frozen=True, slots=True)
class Grant:
    """A permission beside the policy: to whom, and for which operations."""

    id: str
    grantee: str
    operations: tuple[str, ...]

    @property
    def opens(self) -> bool:
        """Whether by it somebody could get at what the key sealed."""
        return not kms_policy.HARMLESS_GRANTS.issuperset(self.operations)

    def __str__(self) -> str:
        return f"{self.grantee}: {', '.join(self.operations)} (grant {self.id})"


class Key:
    """One key. Methods raise UnavailableError where KMS is away, StateError where it says no."""

    def __init__(self, arn: str, client: KMSClient) -> None:
        self.arn: Final = arn
        self._client = client

    @classmethod
    def connect(cls, arn: str, *, profile: str | None = None) -> Self:
        """The key `arn`, in its own region. `profile`: of the AWS configuration; StateError without boto3 or profile."""
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError:
            raise StateError("a KMS key needs boto3: pip install '.[kms]' in a checkout of Parley") from None
        region = arn.split(":")[3]
        config = Config(connect_timeout=10, read_timeout=30, retries={"mode": "standard", "max_attempts": 4})
        try:
            session = boto3.Session(profile_name=profile, region_name=region)
            return cls(arn, session.client("kms", config=config))
        except BotoCoreError as error:
            raise StateError(f"AWS: {error}") from None

    def policy(self) -> dict[str, Any]:
        """The policy that stands there now; MalformedError where it is none."""
        with _said(self.arn):
            answer = self._client.get_key_policy(KeyId=self.arn, PolicyName=_POLICY)
        return kms_policy.read(answer["Policy"])

    def put_policy(self, policy: Mapping[str, Any]) -> None:
        """Puts another policy in its place. KMS refuses one under which the caller could not change it any more."""
        with _said(self.arn):
            self._client.put_key_policy(KeyId=self.arn, PolicyName=_POLICY, Policy=json.dumps(policy))

    def grants(self) -> tuple[Grant, ...]:
        """All grants on the key."""
        found: list[Grant] = []
        with _said(self.arn):
            for page in self._client.get_paginator("list_grants").paginate(KeyId=self.arn):
                found += [
                    Grant(item["GrantId"], item.get("GranteePrincipal", "?"), tuple(item.get("Operations", [])))
                    for item in page["Grants"]
                ]
        return tuple(found)

    def facts(self) -> tuple[str, ...]:
        """What of the key itself is not as it must be, in words (kms-15)."""
        with _said(self.arn):
            found = dict(self._client.describe_key(KeyId=self.arn)["KeyMetadata"])
        wanted = {
            "Arn": self.arn,
            "KeyState": "Enabled",
            "KeyUsage": "ENCRYPT_DECRYPT",
            "KeySpec": "SYMMETRIC_DEFAULT",
            "KeyManager": "CUSTOMER",
            "Origin": "AWS_KMS",
        }
        return tuple(
            f"its {name} is {found.get(name)}, not {value}"
            for name, value in wanted.items()
            if found.get(name) != value
        )

    def encrypt(self, plaintext: bytes, context: Mapping[str, str]) -> bytes:
        """`plaintext`, at most 4,096 bytes, under the key, bound to `context`."""
        with _said(self.arn):
            answer = self._client.encrypt(KeyId=self.arn, Plaintext=plaintext, EncryptionContext=context)
        return answer["CiphertextBlob"]


def check(key: Key, wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a key, its policy and its grants is not as it must be, in words; nothing where it may be used (kms-15)."""
    found = kms_policy.differences(key.policy(), wanted)
    return (*key.facts(), *found, *(f"a grant goes round the policy, {grant}" for grant in key.grants() if grant.opens))


def checked(key: Key, agreement: Agreement, principals: Principals) -> CheckedKey:
    """The proof of `check`, under an agreement; StateError, code "policy", with everything that is otherwise."""
    found = check(key, kms_policy.policy_of(agreement, principals))
    if found:
        raise StateError(f"{key.arn} is not as agreed, nothing is sent: {'; '.join(found)}", code="policy")
    return CheckedKey(agreement, key.arn, _TOKEN)


Connect = Callable[[str], Key]
"""How a key is reached, by its ARN."""


@contextmanager
def _said(arn: str) -> Iterator[None]:
    """Errors of boto3 as this package's own."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as AwsConnectionError

    try:
        yield
    except ClientError as error:
        found = error.response.get("Error", {})
        code, text = found.get("Code", "?"), found.get("Message", "")
        # A balancer in front of KMS has no code of KMS.
        if code in _LATER or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400) >= 500:
            raise UnavailableError(f"{arn}: KMS cannot answer now: {code}") from None
        raise StateError(f"{arn}: KMS refuses: {code}: {text}".removesuffix(": ")) from None
    except (AwsConnectionError, HTTPClientError) as error:
        raise UnavailableError(f"{arn}: KMS cannot be reached: {error}") from None
    except BotoCoreError as error:
        raise StateError(f"{arn}: AWS: {error}") from None
