"""Accounts: identities with their policies, access keys, and the signatures of requests.

All of it stands in one file of the emulator's folder, which whoever sets up a demo or a test writes with this class while
the server runs. An identity has a unique id beside its ARN, as in IAM: a policy keeps the id, so that a new identity of
the same name is another one, and a policy that names a deleted one shows the id.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from parley_deploy.kms.errors import KmsError
from parley_deploy.kms.files import write

FILE: Final = "accounts.json"
EVERYTHING: Final[Mapping[str, Any]] = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
}
"""The policy of an identity that may do all that the policies of keys let it do."""

_IDENTITY: Final = re.compile(r"arn:aws[a-z-]*:iam::(\d{12}):(role|user)/(?:[\w+=,.@/-]*/)?([\w+=,.@-]+)")
_AUTHORIZATION: Final = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(\w+)/(\d{8})/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request, ?"
    r"SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})"
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What boto3 needs to call as an identity: the arguments of `boto3.client`."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)

    def arguments(self) -> dict[str, str]:
        """As keyword arguments of `boto3.client` or `boto3.Session`."""
        found = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key}
        return found if self.token is None else {**found, "aws_session_token": self.token}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who signed a request. `arn`: of the session where the identity is a role."""

    identity: str
    arn: str
    account: str
    unique_id: str
    policies: tuple[Mapping[str, Any], ...] = field(repr=False)

    @property
    def names(self) -> frozenset[str]:
        """The texts by which a stored policy may name this caller."""
        return frozenset({self.unique_id, self.arn})


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a request's signature says that it goes."""

    caller: Caller
    region: str
    service: str


class Accounts:
    """The identities in a folder. Every call reads the file, so that processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(
        self, arn: str, *, policies: Sequence[Mapping[str, Any]] = (EVERYTHING,), trusts: Sequence[str] = ()
    ) -> Credentials:
        """Access keys of an identity (the ARN of a role or user), which is made where it is not there yet.

        `policies`: its own policies, without which it may do only what a key's policy of its own account allows it by
        name. `trusts`: ARNs of identities that may assume the role.
        """
        match = _IDENTITY.fullmatch(arn)
        if match is None:
            raise ValueError(f"{arn}: not the ARN of a role or user")
        with self._changing() as tree:
            kind = "AROA" if match[2] == "role" else "AIDA"
            identity = tree["identities"].setdefault(arn, {"id": _name(kind)})
            identity |= {"policies": list(policies), "trusts": list(trusts)}
            made = Credentials(_name("AKIA"), os.urandom(30).hex())
            tree["keys"][made.access_key] = {"identity": arn, "secret": made.secret_key, "session": "local"}
        return made

    def assume(self, caller: Caller, role: str, session: str) -> tuple[Credentials, str]:
        """Temporary keys of a role for one that it trusts, and the session's ARN; AccessDenied otherwise."""
        with self._changing() as tree:
            found = tree["identities"].get(role)
            if found is None or caller.identity not in found["trusts"]:
                message = f"User: {caller.arn} is not authorized to perform: sts:AssumeRole on resource: {role}"
                raise KmsError("AccessDenied", message, status=403)
            made = Credentials(_name("ASIA"), os.urandom(30).hex(), os.urandom(60).hex())
            tree["keys"][made.access_key] = {
                "identity": role,
                "secret": made.secret_key,
                "session": session,
                "token": made.token,
            }
        return made, _session_arn(role, session)

    def remove(self, arn: str) -> None:
        """Deletes an identity with its access keys; KeyError where there is none."""
        with self._changing() as tree:
            del tree["identities"][arn]
            tree["keys"] = {name: key for name, key in tree["keys"].items() if key["identity"] != arn}

    def ids(self) -> dict[str, str]:
        """The unique id of every identity's ARN."""
        return {arn: found["id"] for arn, found in self._read()["identities"].items()}

    def authenticate(self, headers: Mapping[str, str], body: bytes, *, path: str = "/") -> Scope:
        """Whose request this is, by its signature (version 4); the errors of AWS where it is nobody's."""
        match = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
        if match is None:
            raise KmsError("MissingAuthenticationTokenException", "Missing Authentication Token")
        access_key, day, region, service, signed, signature = match.groups()
        tree = self._read()
        key = tree["keys"].get(access_key)
        if key is None or key.get("token") != headers.get("x-amz-security-token"):
            raise KmsError("UnrecognizedClientException", "The security token included in the request is invalid.")
        canonical = "\n".join(
            [
                "POST",
                path,
                "",
                *(f"{name}:{' '.join(headers.get(name, '').split())}" for name in signed.split(";")),
                "",
                signed,
                hashlib.sha256(body).hexdigest(),
            ]
        )
        scope = f"{day}/{region}/{service}/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{headers.get('x-amz-date', '')}\n{scope}\n{digest}"
        secret = f"AWS4{key['secret']}".encode()
        for part in scope.split("/"):
            secret = hmac.digest(secret, part.encode(), "sha256")
        if not hmac.compare_digest(hmac.digest(secret, text.encode(), "sha256").hex(), signature):
            raise KmsError(
                "InvalidSignatureException",
                "The request signature we calculated does not match the signature you provided.",
            )
        return Scope(self._caller(tree, key), region, service)

    def _caller(self, tree: Mapping[str, Any], key: Mapping[str, str]) -> Caller:
        arn = key["identity"]
        match = _IDENTITY.fullmatch(arn)
        assert match is not None, "only identities are added"
        identity = tree["identities"][arn]
        session = _session_arn(arn, key["session"]) if match[2] == "role" else arn
        return Caller(arn, session, match[1], identity["id"], tuple(identity["policies"]))

    def _read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self._folder / FILE).read_text("utf-8"))
        except FileNotFoundError:
            return {"identities": {}, "keys": {}}
        return found

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / f"{FILE}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tree = self._read()
            yield tree
            write(self._folder / FILE, json.dumps(tree, indent=1).encode())


def _session_arn(role: str, session: str) -> str:
    match = _IDENTITY.fullmatch(role)
    assert match is not None, "only identities are added"
    return f"{role.replace(':iam:', ':sts:').split(':role/')[0]}:assumed-role/{match[3]}/{session}"


def _name(prefix: str) -> str:
    return prefix + os.urandom(8).hex().upper()
