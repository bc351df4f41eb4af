"""Two accounts before an emulated KMS: a party's, with a key, and the operator's, whose coordinator may ask for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from parley.kms import Key
from parley_deploy.kms import process
from parley_deploy.kms.accounts import Accounts, Credentials
from parley_protocol import kms_policy
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.agreement.model import Agreement
from parley_protocol.kms_policy import Principals

if TYPE_CHECKING:
    from types_boto3_kms.client import KMSClient

REGION = "eu-central-1"
PARTY, OPERATOR = "444455556666", "111122223333"
ADMINISTRATOR = f"arn:aws:iam::{PARTY}:role/key-administrator"
SEALER = f"arn:aws:iam::{PARTY}:user/statistics"
COORDINATOR = f"arn:aws:iam::{OPERATOR}:role/parley-parent"
PRINCIPALS = Principals(COORDINATOR, (ADMINISTRATOR,), (SEALER,))


class Aws:
    """An emulator at `url`."""

    def __init__(self, folder: Path, root: Path) -> None:
        accounts = Accounts(folder)
        self.credentials: Mapping[str, Credentials] = {
            arn: accounts.add(arn) for arn in (ADMINISTRATOR, SEALER, COORDINATOR)
        }
        command = [sys.executable, "-m", "parley_deploy.kms", "--dir", str(folder), "--root", str(root)]
        self.url = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def client(self, arn: str) -> KMSClient:
        """KMS as one of the three."""
        found = self.credentials[arn]
        return boto3.client(
            "kms",
            endpoint_url=self.url,
            region_name=REGION,
            config=Config(retries={"total_max_attempts": 1}),
            aws_access_key_id=found.access_key,
            aws_secret_access_key=found.secret_key,
        )

    def make_key(self) -> KeyArn:
        """A new key of the party, which nobody but its administrator may manage."""
        rights = {
            "Effect": "Allow",
            "Principal": {"AWS": [ADMINISTRATOR]},
            "Action": "kms:*",
            "Resource": "*",
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [rights]})
        made = self.client(ADMINISTRATOR).create_key(Policy=policy)["KeyMetadata"]["Arn"]
        return KeyArn.parse(made)

    def agree(self, key: KeyArn, agreement: Agreement) -> None:
        """Puts the generated policy on a key."""
        self.put(key, kms_policy.policy_of(agreement, PRINCIPALS))

    def put(self, key: KeyArn, policy: Mapping[str, Any]) -> None:
        """Puts a policy on a key."""
        self.client(ADMINISTRATOR).put_key_policy(KeyId=key.text, PolicyName="default", Policy=json.dumps(policy))

    def policy(self, key: KeyArn) -> dict[str, Any]:
        """The policy that stands there."""
        return Key(key.text, self.client(ADMINISTRATOR)).policy()

    def revoke(self, key: KeyArn) -> None:
        """Takes the enclaves out of the policy of a key."""
        left, gone = kms_policy.revoked(self.policy(key))
        assert gone
        self.put(key, left)

    def key(self, key: KeyArn) -> Key:
        """The key, as the party's client reaches it."""
        return Key(key.text, self.client(SEALER))

    def environment(self) -> dict[str, str]:
        """What the coordinator finds its credentials in."""
        found = self.credentials[COORDINATOR]
        return {"AWS_ACCESS_KEY_ID": found.access_key, "AWS_SECRET_ACCESS_KEY": found.secret_key}

    def toml(self) -> str:
        """The coordinator's configuration for it."""
        return f'[kms]\nendpoint = "{self.url}"\nattempts = 2\n'


@contextmanager
def aws(folder: Path, root: Path) -> Iterator[Aws]:
    """An emulator whose documents are certified by the local root in `root`."""
    try:
        yield Aws(folder, root)
    finally:
        process.stop(folder)
