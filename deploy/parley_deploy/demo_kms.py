"""`parley demo kms`: two parties keep their content keys in their own accounts, under an emulated KMS.

One brings its table and has no process any more until the release is there; the other changes the policy of its key after it,
so that the next session gets nothing of it and says why. The accounts are emulated; the policies that decide are the ones
that AWS would get, and what decides by them verifies the enclave's documents as everybody else does.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from typing import Final

from parley.cli.exits import Exit
from parley_deploy.demo import COMMAND_SECONDS, OPERATOR, DemoError, Member, Play
from parley_deploy.kms import process
from parley_deploy.kms.accounts import Accounts, Credentials

AWAY: Final = "mich"
"""The party that is away from its upload to the release."""
REVOKING: Final = "wisc"
"""The party that revokes after the release."""
REGION: Final = "us-east-2"
ACCOUNTS: Final = {AWAY: "222222222222", REVOKING: "333333333333"}
COORDINATOR: Final = "arn:aws:iam::111111111111:role/parley-parent"


class KmsPlay(Play):
    """The demo. Keys are made before the agreement, which names them."""

    def prepare(self) -> None:
        """Starts KMS, makes the accounts and the keys, and tells the coordinator where KMS is."""
        folder = self.folder / "aws"
        accounts = Accounts(folder)
        self.closing.callback(process.stop, folder)
        url = process.start(folder, self.stack.root)
        file = self.stack.folder / "coordinator.toml"
        text = file.read_text("utf-8")
        if '# endpoint = ""' not in text:
            raise DemoError(f"{file}: no place for KMS")
        file.write_text(text.replace('# endpoint = ""', f'endpoint = "{url}"', 1), "utf-8")
        self._administrators = {name: f"arn:aws:iam::{account}:role/privacy" for name, account in ACCOUNTS.items()}
        self._keys_of: dict[str, str] = {}
        self.environments[OPERATOR] = _environment(url, accounts.add(COORDINATOR))
        for name, arn in self._administrators.items():
            credentials = accounts.add(arn)
            self.environments[name] = _environment(url, credentials)
            self._keys_of[name] = _make_key(url, credentials, arn)

    def text(self) -> str:
        """The agreement with the keys that were made."""
        text = super().text()
        for name, arn in self._keys_of.items():
            text, count = re.subn(rf"^  {name}: arn:aws:kms:\S+$", f"  {name}: {arn}", text, flags=re.MULTILINE)
            if count != 1:
                raise DemoError(f"{self.demo.file} names no key of {name}")
        return text

    def _session(self) -> str:
        demo = self.demo
        for name, arn in self._administrators.items():
            options = ["--coordinator-role", COORDINATOR, "--admin", arn, "--put", "--yes", "--json"]
            self.screen.command(name, ["kms", "policy", demo.title, *options[:-1]])
            self.one(name, ["kms", "policy", demo.title, *options], shown=False)
            self.screen.remark(f"{name}'s key: enclaves of this agreement may decrypt until its dates, and nobody else")
        self.one(AWAY, ["kms", "check", demo.title])
        session = self._open()
        self.one(AWAY, ["submit", demo.title, *self._tables(AWAY), "--no-wait"])
        self.members.pop(AWAY).close()
        self.screen.remark(f"{AWAY} goes: no process of it runs, and its private key is nowhere here")
        self._rest(session)
        self.screen.remark(f"released; {AWAY} comes back")
        folder = self.folder / "members" / AWAY
        environment = {**self.members[demo.starter].environment, **self.environments[AWAY]}
        self.members[AWAY] = Member(self.nursery, AWAY, folder, environment)
        self.closing.callback(self.members[AWAY].close)
        return session

    def _open(self) -> str:
        starter, title = self.demo.starter, self.demo.title
        self.one(starter, ["open", title])
        return str(self.one(starter, ["status", title, "--json"], shown=False).json()[0]["session"])

    def _tables(self, name: str) -> list[str]:
        return [f"{table}={path.name}" for table, path in self.files[name].items()]

    def _rest(self, session: str) -> None:
        """The parties that are there bring their tables, and the starter starts."""
        title, starter = self.demo.title, self.demo.starter
        others = [name for name in self.files if name != AWAY]
        self.everyone(lambda name: ["submit", title, *self._tables(name), "--no-wait"], shown=REVOKING, only=others)
        self._until(session, dict.fromkeys(self.files, "joined"))
        self.one(starter, ["start", session])

    def afterwards(self) -> None:
        """The other party revokes, and the next session has nothing of it."""
        title, starter = self.demo.title, self.demo.starter
        self.one(REVOKING, ["kms", "revoke", title, "--yes"])
        session = self._open()
        others = [name for name in self.files if name not in ACCOUNTS]
        self.everyone(lambda name: ["join", session, "--no-wait"], shown=starter, only=others)
        self._until(session, {**dict.fromkeys(others, "joined"), AWAY: "joined", REVOKING: "refused"})
        self.one(starter, ["status", session])
        refused = self.one(starter, ["status", session, "--json"], shown=False).json()[0]["refused"]
        if refused != {REVOKING: "revoked"}:
            raise DemoError(f"refused: {refused}")
        self.screen.remark(f"{AWAY} is in by its key, without having done anything; {REVOKING} is not")
        self.one(starter, ["start", session], code=Exit.REFUSED)
        self.one(REVOKING, ["inbox"])

    def _until(self, session: str, wanted: Mapping[str, str]) -> None:
        """Waits until each of these parties is in its phase; the coordinator asks KMS by itself."""
        end = time.monotonic() + COMMAND_SECONDS
        arguments = ["status", session, "--json"]
        while True:
            found = self.one(self.demo.starter, arguments, shown=False).json()[0]["parties"]
            assert isinstance(found, dict), "a map from party to phase"
            if wanted.items() <= found.items():
                return
            if time.monotonic() > end:
                raise DemoError(f"the parties are {found}")
            time.sleep(0.1)


def _environment(url: str, credentials: Credentials) -> dict[str, str]:
    """In what an AWS program finds an identity, and nothing of the configuration of whoever runs the demo."""
    files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    return {
        **files,
        "AWS_ACCESS_KEY_ID": credentials.access_key,
        "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
        "AWS_ENDPOINT_URL_KMS": url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _make_key(url: str, credentials: Credentials, administrator: str) -> str:
    """The ARN of a new key that its administrator manages."""
    import boto3

    statement = {"Effect": "Allow", "Principal": {"AWS": administrator}, "Action": "kms:*", "Resource": "*"}
    client = boto3.client(
        "kms",
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
        region_name=REGION,
        endpoint_url=url,
    )
    made = client.create_key(Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    return made["KeyMetadata"]["Arn"]
