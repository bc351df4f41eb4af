"""KMS: the keys of parties, asked with an enclave's document; the one module that speaks to it.

What comes back opens in the enclave alone. Neither ciphertexts nor documents nor answers are logged, and an answer in the
clear, which only something that is no KMS would give, is refused and not kept. boto3 is imported at the first call, so that a
coordinator whose agreements name no key needs none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

from parley_coordinator import log
from parley_coordinator.config import KmsAccount, KmsConfig
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.errors import RefusedError, UnavailableError

if TYPE_CHECKING:
    import boto3
    from botocore.config import Config as BotoConfig
    from types_boto3_kms import KMSClient
    from types_boto3_sts import STSClient

ALGORITHM: Final = "RSAES_OAEP_SHA_256"
REVOKED: Final = frozenset(
    {"AccessDeniedException", "DisabledException", "KMSInvalidStateException", "NotFoundException"}
)
"""What a key says that its owner has closed: by its policy, by disabling it, by deleting it."""
WRONG: Final = frozenset({"InvalidCiphertextException", "IncorrectKeyException", "InvalidKeyUsageException"})
"""What a key says of a ciphertext that is not its own, or of another context."""
BUSY: Final = frozenset(
    {"ThrottlingException", "LimitExceededException", "DependencyTimeoutException", "KMSInternalException"}
)
_OPERATORS: Final = (
    "identity-based policy",
    "permissions boundary",
    "service control policy",
    "session policy",
    "VPC endpoint policy",
)
"""Stand in a denial by what binds the caller itself, which is the operator's. Resource-based and resource control policies are
of the key's own account and organisation."""
RETRY_MS: Final = 5_000
OPERATOR_RETRY_MS: Final = 60_000
"""What only the operator can mend is not asked for every few seconds."""
_EARLY_S: Final = 300.0
"""Assumed roles are renewed so long before they end."""


class Keys(Protocol):
    """What sessions ask for."""

    def decrypt(self, key: KeyArn, ciphertext: bytes, context: Mapping[str, str], document: bytes) -> bytes:
        """CiphertextForRecipient. RefusedError "revoked" where the key's owner has closed it, "key" where the ciphertext is
        not this key's; UnavailableError with a time to wait for all else (kms-14)."""


@dataclass(frozen=True, slots=True)
class _Client:
    client: KMSClient
    ends: float
    """By the monotonic clock."""


@dataclass(slots=True)
class _Place:
    """An account and region. The lock is held while its client is made, for which STS may take its time."""

    lock: threading.Lock
    client: _Client | None = None


class Kms:
    """KMS by boto3, with a client for each account and region."""

    def __init__(self, config: KmsConfig, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._monotonic = monotonic
        # Held while the table is looked at, never while AWS is asked: one account that does not answer stops no other.
        self._lock = threading.Lock()
        self._places: dict[tuple[str, str, str], _Place] = {}

    def decrypt(self, key: KeyArn, ciphertext: bytes, context: Mapping[str, str], document: bytes) -> bytes:
        """See `Keys`."""
        try:
            import botocore.exceptions as errors
        except ImportError:
            raise _operator("boto3 is not installed here", key) from None
        try:
            answer = self._client(key).decrypt(
                KeyId=key.text,
                CiphertextBlob=ciphertext,
                EncryptionContext=context,
                EncryptionAlgorithm="SYMMETRIC_DEFAULT",
                Recipient={"KeyEncryptionAlgorithm": ALGORITHM, "AttestationDocument": document},
            )
        except errors.ClientError as error:
            raise self._told(error.response, error.operation_name, key) from None
        except (errors.NoCredentialsError, errors.PartialCredentialsError, errors.ProfileNotFound) as error:
            raise _operator(f"no credentials: {type(error).__name__}", key) from None
        except errors.BotoCoreError as error:
            log.warning("kms-away", account=key.account, region=key.region, error=type(error).__name__)
            raise UnavailableError("KMS does not answer", retry_after_ms=RETRY_MS) from None
        found = answer.get("CiphertextForRecipient")
        if not found or answer.get("Plaintext"):
            raise _operator("what answers is no KMS: it does not know recipients", key)
        return found

    def describe(self, key: KeyArn) -> tuple[str, str]:
        """Who asks for a key ("" where STS does not tell), and the code with which KMS refuses to describe it ("" where it does
        not). No right is needed for either: whom KMS denies, it knows. Errors of botocore where it is not reached so far.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        session, _ = self._session(key)
        try:
            asks = self._sts(session).get_caller_identity()["Arn"]
        except (BotoCoreError, ClientError):
            # KMS may be reached where STS is not, as by a VPC endpoint; with a wrong key it says so below.
            asks = ""
        try:
            self._kms(session, key).describe_key(KeyId=key.text)
        except ClientError as error:
            return asks, str(error.response.get("Error", {}).get("Code", ""))
        return asks, ""

    def _told(self, response: Mapping[str, Any], operation: str, key: KeyArn) -> RefusedError | UnavailableError:
        found = response.get("Error", {})
        code, message = str(found.get("Code", "")), str(found.get("Message", ""))
        log.warning("kms-refuses", account=key.account, region=key.region, operation=operation, error=code)
        if operation != "Decrypt" or (
            code == "AccessDeniedException" and any(policy in message for policy in _OPERATORS)
        ):
            # The operator's own role or policies; nothing that a party could have revoked.
            return _operator(f"{operation} is refused to this coordinator: {code}", key)
        if code in REVOKED:
            return RefusedError("revoked", f"the key of account {key.account} refuses: {code}")
        if code in WRONG:
            return RefusedError("key", f"the ciphertext is not of the key of account {key.account}")
        if code in BUSY or int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)) >= 500:
            return UnavailableError("KMS is busy", retry_after_ms=RETRY_MS)
        return _operator(f"KMS refuses the request: {code}", key)

    def _client(self, key: KeyArn) -> KMSClient:
        with self._lock:
            place = self._places.setdefault((key.partition, key.account, key.region), _Place(threading.Lock()))
        with place.lock:
            if place.client is None or self._monotonic() > place.client.ends:
                place.client = self._made(key)
            return place.client.client

    def _made(self, key: KeyArn) -> _Client:
        session, ends = self._session(key)
        return _Client(self._kms(session, key), ends)

    def _kms(self, session: boto3.Session, key: KeyArn) -> KMSClient:
        endpoint = self._account(key).endpoint or self._config.endpoint or None
        return session.client("kms", endpoint_url=endpoint, config=self._options())

    def _account(self, key: KeyArn) -> KmsAccount:
        return self._config.accounts.get(key.account, KmsAccount())

    def _options(self) -> BotoConfig:
        from botocore.config import Config

        # Standard mode waits between attempts by exponential back-off with jitter, 20 s at most.
        return Config(
            connect_timeout=self._config.connect_s,
            read_timeout=self._config.read_s,
            retries={"mode": "standard", "total_max_attempts": self._config.attempts},
        )

    def _sts(self, session: boto3.Session) -> STSClient:
        return session.client("sts", endpoint_url=self._config.sts_endpoint or None, config=self._options())

    def _session(self, key: KeyArn) -> tuple[boto3.Session, float]:
        """A session with what the key's account is asked with, and when that ends."""
        import boto3

        account = self._account(key)
        session = boto3.Session(profile_name=account.profile or None, region_name=key.region)
        if not account.role:
            return session, float("inf")
        wanted: dict[str, Any] = {"RoleArn": account.role, "RoleSessionName": self._config.session}
        if account.external_id:
            wanted["ExternalId"] = account.external_id
        found = self._sts(session).assume_role(**wanted)["Credentials"]
        seconds = (found["Expiration"] - datetime.now(UTC)).total_seconds()
        made = boto3.Session(
            aws_access_key_id=found["AccessKeyId"],
            aws_secret_access_key=found["SecretAccessKey"],
            aws_session_token=found["SessionToken"],
            region_name=key.region,
        )
        return made, self._monotonic() + max(0.0, seconds - _EARLY_S)


def _operator(what: str, key: KeyArn) -> UnavailableError:
    log.warning("kms-not-possible", account=key.account, region=key.region, why=what)
    return UnavailableError(
        f"keys of account {key.account} cannot be asked for: {what}", retry_after_ms=OPERATOR_RETRY_MS
    )
