"""STS, as far as a caller of KMS needs it: AssumeRole and GetCallerIdentity."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from parley_deploy.kms.accounts import Accounts, Caller
from parley_deploy.kms.errors import KmsError

SECONDS: Final = 3600
_SESSION: Final = re.compile(r"[\w+=,.@-]{2,64}")


class TokenService:
    """STS for the accounts in a folder. `now_ms`: the emulator's clock. Temporary keys do not end."""

    def __init__(self, accounts: Accounts, now_ms: Callable[[], int]) -> None:
        self._accounts = accounts
        self._now_ms = now_ms

    def answer(self, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        """The answer to one request: HTTP status and XML."""
        try:
            caller = self._accounts.authenticate(headers, body).caller
            found = {name: values[-1] for name, values in parse_qs(body.decode("ascii", "replace")).items()}
            action = found.get("Action", "")
            if action == "GetCallerIdentity":
                inner = self._identity(caller)
            elif action == "AssumeRole":
                inner = self._assume(caller, found)
            else:
                raise KmsError("InvalidAction", f"Could not find operation {action}")
        except KmsError as error:
            text = f"<Code>{escape(error.code)}</Code><Message>{escape(error.message or '')}</Message>"
            return error.status, f"<ErrorResponse><Error><Type>Sender</Type>{text}</Error></ErrorResponse>".encode()
        answer = f"<{action}Response><{action}Result>{inner}</{action}Result></{action}Response>"
        return 200, answer.encode()

    def _identity(self, caller: Caller) -> str:
        return (
            f"<Arn>{escape(caller.arn)}</Arn><UserId>{escape(caller.unique_id)}</UserId>"
            f"<Account>{caller.account}</Account>"
        )

    def _assume(self, caller: Caller, found: Mapping[str, str]) -> str:
        session = found.get("RoleSessionName", "")
        if _SESSION.fullmatch(session) is None:
            raise KmsError("ValidationError", "RoleSessionName is not a session's name")
        made, arn = self._accounts.assume(caller, found.get("RoleArn", ""), session)
        end = datetime.fromtimestamp(self._now_ms() // 1000 + SECONDS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return (
            f"<Credentials><AccessKeyId>{made.access_key}</AccessKeyId>"
            f"<SecretAccessKey>{made.secret_key}</SecretAccessKey><SessionToken>{made.token}</SessionToken>"
            f"<Expiration>{end}</Expiration></Credentials>"
            f"<AssumedRoleUser><Arn>{escape(arn)}</Arn><AssumedRoleId>{made.access_key}:{session}</AssumedRoleId>"
            "</AssumedRoleUser>"
        )
