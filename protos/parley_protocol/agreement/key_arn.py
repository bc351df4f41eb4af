"""Names of KMS keys: the form of an ARN that an agreement takes, so that it names one key with one policy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_ARN: Final = re.compile(
    r"arn:(aws|aws-cn|aws-us-gov):kms:([a-z]{2}(?:-[a-z]{2,12}){1,3}-[1-9]):([0-9]{12})"
    r":key/((?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})|mrk-[0-9a-f]{32})"
)


@dataclass(frozen=True, slots=True)
class KeyArn:
    """One customer managed key: `partition` aws, aws-cn or aws-us-gov, `region`, `account` (12 digits), `key` (its id)."""

    partition: str
    region: str
    account: str
    key: str

    @classmethod
    def parse(cls, text: str) -> KeyArn:
        """ValueError, whose message completes "`text` ...", where it is not the ARN of one key."""
        found = _ARN.fullmatch(text)
        if found is None:
            if ":alias/" in text:
                raise ValueError("is an alias, which can be moved to another key: name the key itself")
            raise ValueError("is not the ARN of a KMS key, arn:aws:kms:REGION:ACCOUNT:key/ID")
        if found[4].startswith("mrk-"):
            raise ValueError("is a multi-Region key: its replicas open the same ciphertext under policies of their own")
        return cls(*found.groups())

    @property
    def text(self) -> str:
        """The ARN."""
        return f"arn:{self.partition}:kms:{self.region}:{self.account}:key/{self.key}"

    def __str__(self) -> str:
        return self.text
