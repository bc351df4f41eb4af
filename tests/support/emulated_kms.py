"""The emulated KMS as a process of its own, with boto3 in front of it and documents of `support.documents` for it.

Its clock stands near `documents.NOW`, so that those documents are genuine there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from cryptography.hazmat.primitives.asymmetric import rsa

from parley_deploy.kms import process
from parley_deploy.kms.accounts import Accounts, Credentials
from parley_deploy.kms.envelope import spki_of
from parley_deploy.pki import LocalRoot
from support import documents

if TYPE_CHECKING:
    from types_boto3_kms.client import KMSClient

REGION = "eu-central-1"
PARTY, OPERATOR = "444455556666", "111122223333"
ADMIN = f"arn:aws:iam::{PARTY}:role/key-administrator"
SEALER = f"arn:aws:iam::{PARTY}:user/statistics"
COORDINATOR = f"arn:aws:iam::{OPERATOR}:role/parley-parent"
OTHER = f"arn:aws:iam::{OPERATOR}:role/other"
ALGORITHM = "RSAES_OAEP_SHA_256"
# Made once: what is tested is never how good it is.
ENCLAVE = rsa.generate_private_key(65537, 2048)


class Kms:
    """An emulator in `folder`, and the four identities above with access keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "kms"
        self.root = folder / "root"
        self.root.mkdir(parents=True, exist_ok=True)
        LocalRoot(documents.chain()[0]).save(self.root)
        self.accounts = Accounts(self.folder)
        self.credentials: dict[str, Credentials] = {
            arn: self.accounts.add(arn) for arn in (ADMIN, SEALER, COORDINATOR, OTHER)
        }
        self._clients: dict[tuple[str, str, bool], KMSClient] = {}
        self.url = ""

    def start(self, *options: str, at_ms: int = documents.NOW) -> str:
        """Starts it, or finds it running. Its clock says `at_ms` or up to a second later, never earlier."""
        ahead = -((time.time_ns() // 1_000_000 - at_ms) // 1000)
        self.url = process.start(self.folder, self.root, "--clock-ahead", str(ahead), *options)
        return self.url

    def stop(self, **how: Any) -> None:
        """Ends it."""
        process.stop(self.folder, **how)

    def session(self, arn: str = ADMIN, credentials: Credentials | None = None) -> boto3.Session:
        """boto3 as one of the identities, or with other credentials."""
        found = credentials or self.credentials[arn]
        return boto3.Session(
            aws_access_key_id=found.access_key,
            aws_secret_access_key=found.secret_key,
            aws_session_token=found.token,
            region_name=REGION,
        )

    def client(self, arn: str = ADMIN, credentials: Credentials | None = None) -> KMSClient:
        """The same, its client of KMS, which tries once. A client takes long to make, so that it is kept."""
        name = (self.url, (credentials or self.credentials[arn]).access_key, credentials is None)
        if name not in self._clients or credentials is not None:
            config = Config(retries={"total_max_attempts": 1})
            made = self.session(arn, credentials).client("kms", endpoint_url=self.url, config=config)
            self._clients[name] = made
        return self._clients[name]

    def key(self, *statements: Mapping[str, Any]) -> str:
        """The ARN of a new key that ADMIN manages and uses, and for which these statements are written beside that."""
        rights = allow(ADMIN, "kms:*")
        policy = {"Version": "2012-10-17", "Statement": [rights, *statements]}
        return self.client().create_key(Policy=json.dumps(policy))["KeyMetadata"]["Arn"]


def allow(principal: str, action: str | Sequence[str], effect: str = "Allow", **more: Any) -> dict[str, Any]:
    """A statement. `more`: Sid, Condition."""
    return {"Effect": effect, "Principal": {"AWS": principal}, "Action": action, "Resource": "*", **more}


def recipient(document: bytes | None = None, algorithm: str = ALGORITHM, **changes: Any) -> Any:
    """The parameter, with a document for ENCLAVE's key in which `changes` are other than in `documents.document`."""
    made = documents.document(**{"public_key": spki_of(ENCLAVE.public_key()), **changes})
    return {"KeyEncryptionAlgorithm": algorithm, "AttestationDocument": made if document is None else document}


@contextmanager
def refused(code: str, text: str = "") -> Iterator[None]:
    """That a call is answered with this error code, and this in its text."""
    try:
        yield
    except ClientError as error:
        found = error.response["Error"]
        assert found["Code"] == code, found
        assert text in found["Message"], found
        assert error.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403, 412)
    else:
        raise AssertionError(f"not refused with {code}")
