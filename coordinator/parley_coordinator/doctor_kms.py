"""What `doctor` says of KMS: whether the keys of parties can be asked for, as far as it shows without an enclave."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from parley_coordinator.agreements import parsed
from parley_coordinator.config import Config, KmsAccount
from parley_coordinator.doctor_store import UNANSWERED, rows
from parley_coordinator.doctor_system import Check, System, fail, ok, skip, warn
from parley_coordinator.kms import Kms
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.errors import ParleyError

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError

ATTEMPTS: Final = 2
"""Of one call: whoever runs the doctor waits for it."""
NO_KEY: Final = "00000000-0000-0000-0000-000000000000"
"""Asked for where an account is configured, and no agreement names a key of it yet: it is denied, or not found."""
_KNOWN: Final = frozenset({"", "AccessDeniedException", "NotFoundException"})
"""Answers to a caller whom KMS knows."""
_STRANGER: Final = frozenset(
    {
        *("UnrecognizedClientException", "InvalidClientTokenId", "InvalidSignatureException", "SignatureDoesNotMatch"),
        *("ExpiredTokenException", "ExpiredToken", "MissingAuthenticationTokenException", "MissingAuthenticationToken"),
        *("IncompleteSignature", "IncompleteSignatureException", "RequestExpired"),
    }
)
"""Answers to one whose credentials are of nobody, or whose clock is wrong."""
_NAME: Final = "kms"
_AGREEMENTS: Final = "SELECT canonical FROM agreements WHERE complete_ms IS NOT NULL AND expires_ms > {now}"


def kms(config: Config, system: System) -> list[Check]:
    """One check for each account and region of keys that agreements name, and for each account that is configured; none
    where there are none."""
    try:
        keys = _agreed(config, system)
    except ParleyError as error:
        return [fail(_NAME, f"an agreement in the database cannot be read: {error}", "restore it from a backup")]
    lacking = [name for name in config.kms.accounts if name not in {key.account for key in keys}]
    if not keys and not lacking:
        return []
    try:
        import boto3
    except ImportError:
        return [fail(_NAME, "boto3 is not installed", "pip install '.[coordinator]' in a checkout")]
    from botocore.exceptions import ProfileNotFound

    asked = Kms(replace(config.kms, attempts=min(ATTEMPTS, config.kms.attempts)))
    checks = [_asked(config, asked, key) for key in keys]
    for name in lacking:
        account = config.kms.accounts[name]
        try:
            region = boto3.Session(profile_name=account.profile or None).region_name
        except ProfileNotFound as error:
            checks.append(_without_credentials(f"account {name}", name, error))
            continue
        if region is None:
            checks.append(skip(_NAME, f"account {name}: no agreement names a key of it yet, and AWS_REGION is not set"))
            continue
        partition = account.role.split(":")[1] if account.role else "aws"
        checks.append(_asked(config, asked, KeyArn(partition, region, name, NO_KEY)))
    return checks


def _agreed(config: Config, system: System) -> list[KeyArn]:
    """A key for each account and region that an agreement which all have signed names, and that has not expired."""
    try:
        found = rows(config, _AGREEMENTS.format(now=int(system.now().timestamp() * 1000)))
    except UNANSWERED:
        # None has been made yet; where it is there and cannot be read, the check of the database says why.
        return []
    keys = [key for (canonical,) in found for key in parsed(bytes(canonical)).kms.values()]
    return list({(key.partition, key.account, key.region): key for key in keys}.values())


def _asked(config: Config, asked: Kms, key: KeyArn) -> Check:
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as AwsConnectionError

    account = config.kms.accounts.get(key.account, KmsAccount())
    place = f"account {key.account} in {key.region}"
    try:
        asks, code = asked.describe(key)
    except ClientError as error:
        return _not_given(place, account, error)
    except (AwsConnectionError, HTTPClientError) as error:
        return _away(place, error)
    except BotoCoreError as error:
        return _without_credentials(place, key.account, error)
    who = (
        f"asked as {asks}, whose role parties' policies name" if asks else "but STS does not tell as whom it was asked"
    )
    if code in _STRANGER:
        do = "renew the credentials that boto3 finds, and look at the clock"
        return fail(_NAME, f"{place}: KMS does not know the credentials: {code}", do)
    if code not in _KNOWN:
        return fail(
            _NAME, f"{place}: KMS answers with {code}, {who}", "look at kms.endpoint and at the account's endpoint"
        )
    if code == "NotFoundException" and key.key != NO_KEY:
        do = "ask the party whose agreement names it: it was deleted"
        return warn(_NAME, f"{place}: KMS knows no key {key.key}", do)
    return ok(_NAME, f"{place}: KMS answers, {who}")


def _not_given(place: str, account: KmsAccount, error: ClientError) -> Check:
    code = error.response.get("Error", {}).get("Code", "")
    if code in _STRANGER:
        do = "renew the credentials that boto3 finds, and look at the clock"
        return fail(_NAME, f"{place}: STS does not know the credentials: {code}", do)
    do = (
        "its trust policy has to name the role of this machine"
        + (", and the external id of the configuration" if account.external_id else "")
        + "; and that role's own policy to allow sts:AssumeRole on it"
    )
    return fail(_NAME, f"{place}: {account.role} is not given ({error.operation_name}: {code})", do)


def _away(place: str, error: BotoCoreError) -> Check:
    where = error.kwargs.get("endpoint_url", "the endpoint")
    do = "let this machine reach it (route, security group, VPC endpoint), or correct kms.endpoint and kms.sts_endpoint"
    return fail(_NAME, f"{place}: {where} is not reached: {type(error).__name__}", do)


def _without_credentials(place: str, account: str, error: BotoCoreError) -> Check:
    do = f"give the instance a role, or the coordinator a profile: kms.account.{account}.profile"
    return fail(_NAME, f"{place}: no credentials: {type(error).__name__}", do)
