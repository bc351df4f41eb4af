"""What stands behind coordinators: PostgreSQL and S3, one of each for all plays, and a party's KMS, anew for each."""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from botocore.exceptions import BotoCoreError, ClientError

from parley_deploy.kms import process
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.agreement.model import Agreement
from support import postgres, s3
from support.aws import SEALER, Aws
from support.postgres import Cluster
from support.simulation.front import Front

STATE: Final = ("accounts.json", "keys.json")
"""What of an emulator's folder is its state."""


class Services:
    """A PostgreSQL and an S3, started when a play first needs them. Where there is no PostgreSQL that play is skipped."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._s3 = ""

    @property
    def cluster(self) -> Cluster:
        """The server of databases."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(postgres.cluster())
        return self._cluster

    @property
    def s3(self) -> str:
        """The URL of the server of buckets."""
        if not self._s3:
            # It would write a line for each request.
            logging.getLogger("werkzeug").setLevel(logging.ERROR)
            self._s3 = self._stack.enter_context(s3.server())
        return self._s3

    def close(self) -> None:
        """Ends both."""
        self._stack.close()


class PartyKms:
    """A party's KMS in `folder`, and its key: one proxy before it for the coordinators, another one for the party."""

    def __init__(self, folder: Path, root: Path, key: KeyArn, source: Path) -> None:
        folder.mkdir(parents=True)
        for name in STATE:
            shutil.copy(source / name, folder)
        self.key = key
        self._folder = folder
        self._root = root
        self._aws = Aws(folder, root)
        self.fronts = {name: Front("kms", lambda: self._aws.url) for name in ("coordinator", "party")}
        self.revoked = False

    def kill(self) -> None:
        """kill -9."""
        process.stop(self._folder, signal_=signal.SIGKILL)

    def start(self) -> None:
        """A new start over what stands in its folder."""
        self._aws.url = process.start(self._folder, self._root)

    def revoke(self) -> bool:
        """Takes the enclaves out of the policy of the key; whether KMS did it."""
        with _asked() as done:
            self._aws.revoke(self.key)
            done.append(True)
        self.revoked = bool(done)
        return self.revoked

    def allow(self, agreement: Agreement) -> bool:
        """Puts the agreed policy in its place again; whether KMS did it."""
        with _asked() as done:
            self._aws.agree(self.key, agreement)
            done.append(True)
        return bool(done)

    def toml(self) -> str:
        """What a coordinator's configuration says of it."""
        return f'[kms]\nendpoint = "{self.fronts["coordinator"].url}"\nattempts = 2\n'

    def environment(self) -> Mapping[str, str]:
        """What a coordinator finds its credentials in; S3 takes any."""
        return {**s3.CREDENTIALS, **self._aws.environment()}

    def of_party(self) -> dict[str, str]:
        """What the party's own client finds its credentials and its KMS in."""
        found = self._aws.credentials[SEALER]
        return {
            **s3.CREDENTIALS,
            "AWS_ACCESS_KEY_ID": found.access_key,
            "AWS_SECRET_ACCESS_KEY": found.secret_key,
            "AWS_ENDPOINT_URL_KMS": self.fronts["party"].url,
        }

    def close(self) -> None:
        """Ends it."""
        for front in self.fronts.values():
            front.close()
        process.stop(self._folder, signal_=signal.SIGKILL)


@contextmanager
def _asked() -> Iterator[list[bool]]:
    """KMS may be down: what was asked for is then not done."""
    done: list[bool] = []
    with suppress(BotoCoreError, ClientError):
        yield done
