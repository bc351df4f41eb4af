"""KMS as the coordinator asks it: one request, and what each answer means. The wire is botocore's own stub."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.exceptions import ConnectTimeoutError, NoCredentialsError
from botocore.stub import Stubber

from parley_coordinator import kms as module
from parley_coordinator.config import KmsAccount, KmsConfig
from parley_coordinator.kms import Kms
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.errors import RefusedError, UnavailableError
from support.kms import arn

KEY = arn()
CONTEXT = {"parley:agreement": "ab"}
DOCUMENT = b"a document"
ANSWER = b"for the enclave alone"
REQUEST = {
    "KeyId": KEY.text,
    "CiphertextBlob": b"ciphertext",
    "EncryptionContext": CONTEXT,
    "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
    "Recipient": {"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": DOCUMENT},
}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    client = boto3.client("kms", region_name=KEY.region, aws_access_key_id="x", aws_secret_access_key="x")
    with Stubber(client) as stubber:
        monkeypatch.setattr(Kms, "_made", lambda *_: module._Client(client, float("inf")))
        yield stubber


def ask(kms: Kms | None = None) -> bytes:
    return (kms or Kms(KmsConfig())).decrypt(KEY, b"ciphertext", CONTEXT, DOCUMENT)


def test_kms_13_one_request_names_key_context_and_document(stub: Stubber) -> None:
    stub.add_response("decrypt", {"CiphertextForRecipient": ANSWER, "KeyId": KEY.text}, REQUEST)
    assert ask() == ANSWER


@pytest.mark.parametrize(
    ("code", "message", "status", "kind", "told"),
    [
        (
            "AccessDeniedException",
            "because no resource-based policy allows the kms:Decrypt action",
            400,
            RefusedError,
            "revoked",
        ),
        ("AccessDeniedException", "with an explicit deny in a resource-based policy", 400, RefusedError, "revoked"),
        (
            "AccessDeniedException",
            "because no identity-based policy allows the action",
            400,
            UnavailableError,
            "unavailable",
        ),
        *(
            ("AccessDeniedException", f"with an explicit deny in a {policy}", 400, UnavailableError, "unavailable")
            for policy in (
                "service control policy",
                "session policy",
                "permissions boundary",
                "VPC endpoint policy",
                "identity-based policy",
            )
        ),
        (
            "AccessDeniedException",
            "with an explicit deny in a resource control policy",
            400,
            RefusedError,
            "revoked",
        ),
        ("DisabledException", "is disabled", 400, RefusedError, "revoked"),
        ("KMSInvalidStateException", "is pending deletion", 400, RefusedError, "revoked"),
        ("NotFoundException", "does not exist", 400, RefusedError, "revoked"),
        ("InvalidCiphertextException", "", 400, RefusedError, "key"),
        ("IncorrectKeyException", "", 400, RefusedError, "key"),
        ("ThrottlingException", "Rate exceeded", 400, UnavailableError, "unavailable"),
        ("KMSInternalException", "", 500, UnavailableError, "unavailable"),
        ("Whatever", "", 503, UnavailableError, "unavailable"),
        ("ValidationException", "the document is malformed", 400, UnavailableError, "unavailable"),
        ("UnrecognizedClientException", "the token is invalid", 400, UnavailableError, "unavailable"),
        ("ExpiredTokenException", "the token is expired", 400, UnavailableError, "unavailable"),
    ],
)
def test_kms_14_what_kms_says_is_the_partys_or_the_operators(
    stub: Stubber, code: str, message: str, status: int, kind: type[Exception], told: str
) -> None:
    stub.add_client_error("decrypt", code, message, status)
    with pytest.raises(kind) as caught:
        ask()
    assert getattr(caught.value, "code", None) == told
    if isinstance(caught.value, UnavailableError):
        assert caught.value.retry_after_ms is not None


@pytest.mark.parametrize("answer", [{"Plaintext": b"keys"}, {"Plaintext": b"k", "CiphertextForRecipient": b"c"}, {}])
def test_an_answer_in_the_clear_is_refused(stub: Stubber, answer: dict[str, Any]) -> None:
    stub.add_response("decrypt", answer, REQUEST)
    with pytest.raises(UnavailableError, match="no KMS"):
        ask()


@pytest.mark.parametrize("error", [NoCredentialsError(), ConnectTimeoutError(endpoint_url="https://kms")])
def test_without_credentials_or_connection_it_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Client:
        def decrypt(self, **_: object) -> None:
            raise error

    monkeypatch.setattr(Kms, "_made", lambda *_: module._Client(Client(), float("inf")))  # type: ignore[arg-type]
    with pytest.raises(UnavailableError):
        ask()


def test_nothing_that_is_asked_or_answered_is_logged(stub: Stubber, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "parley_coordinator")
    stub.add_client_error("decrypt", "AccessDeniedException", f"{KEY.text} {CONTEXT['parley:agreement']} secret words")
    stub.add_response("decrypt", {"Plaintext": b"keys"}, REQUEST)
    for kind in (RefusedError, UnavailableError):
        with pytest.raises(kind):
            ask()
    lines = [(record.getMessage(), vars(record)["fields"]) for record in caplog.records if "parley" in record.name]
    assert [event for event, _ in lines] == ["kms-refuses", "kms-not-possible"]
    assert lines[0][1].keys() == {"account", "region", "operation", "error"}
    assert "secret" not in str(lines) and KEY.key not in str(lines) and "keys'" not in str(lines)


# Who asks


class _Session:
    """boto3.Session, which notes how it was made and what clients were asked of it."""

    made: list[tuple[dict[str, Any], str, dict[str, Any]]]
    expires: Callable[[], datetime]

    def __init__(self, **arguments: Any) -> None:
        self._arguments = {key: value for key, value in arguments.items() if value is not None}

    def client(self, service: str, **options: Any) -> Any:
        options.pop("config")
        type(self).made.append((self._arguments, service, options))
        session = self

        class Client:
            def assume_role(self, **wanted: Any) -> Any:
                type(session).made.append((wanted, "assume_role", {}))
                keys = {"AccessKeyId": "A", "SecretAccessKey": "S", "SessionToken": "T"}
                return {"Credentials": keys | {"Expiration": type(session).expires()}}

            def decrypt(self, **_: Any) -> Any:
                return {"CiphertextForRecipient": ANSWER}

        return Client()


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> type[_Session]:
    _Session.made = []
    _Session.expires = lambda: datetime.now(UTC) + timedelta(hours=1)
    monkeypatch.setattr(boto3, "Session", _Session)
    return _Session


def test_without_a_word_of_the_operator_the_machines_credentials_are_used(sessions: type[_Session]) -> None:
    assert ask() == ANSWER
    assert sessions.made == [({"region_name": "eu-central-1"}, "kms", {"endpoint_url": None})]


def test_a_profile_and_an_endpoint_belong_to_an_account(sessions: type[_Session]) -> None:
    account = KmsAccount(profile="p", endpoint="https://vpce.example")
    ask(Kms(KmsConfig(endpoint="https://other.example", accounts={KEY.account: account, "9" * 12: KmsAccount()})))
    arguments = {"profile_name": "p", "region_name": "eu-central-1"}
    assert sessions.made == [(arguments, "kms", {"endpoint_url": "https://vpce.example"})]


def test_a_role_is_assumed_once_and_again_before_it_ends(sessions: type[_Session]) -> None:
    now = 0.0
    role = "arn:aws:iam::111122223333:role/parley"
    config = KmsConfig(sts_endpoint="https://sts.example", accounts={KEY.account: KmsAccount(role, "e")})
    kms = Kms(config, lambda: now)
    ask(kms)
    ask(kms)
    assumed = {"RoleArn": role, "RoleSessionName": "parley-coordinator", "ExternalId": "e"}
    keys = {"aws_access_key_id": "A", "aws_secret_access_key": "S", "aws_session_token": "T"}
    first = [
        ({"region_name": "eu-central-1"}, "sts", {"endpoint_url": "https://sts.example"}),
        (assumed, "assume_role", {}),
        (keys | {"region_name": "eu-central-1"}, "kms", {"endpoint_url": None}),
    ]
    assert sessions.made == first
    now = 3400.0
    ask(kms)
    assert sessions.made == first + first


def test_an_account_whose_role_is_slow_to_come_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(KEY, account="999988887777")
    reached, free = threading.Event(), threading.Event()
    made: list[str] = []

    def slow(self: Kms, key: KeyArn) -> module._Client:
        made.append(key.account)
        if key == KEY:
            reached.set()
            assert free.wait(60)
        client: Any = type("Client", (), {"decrypt": lambda self, **_: {"CiphertextForRecipient": ANSWER}})()
        return module._Client(client, float("inf"))

    monkeypatch.setattr(Kms, "_made", slow)
    kms = Kms(KmsConfig())
    with ThreadPoolExecutor(3) as pool:
        try:
            waiting = [pool.submit(ask, kms) for _ in range(2)]
            assert reached.wait(10)
            asked = pool.submit(kms.decrypt, other, b"ciphertext", CONTEXT, DOCUMENT)
            assert asked.result(10) == ANSWER
            assert not any(one.done() for one in waiting)
        finally:
            free.set()
        assert [one.result(10) for one in waiting] == [ANSWER, ANSWER]
    assert sorted(made) == sorted([KEY.account, other.account])  # one client for both of one account


def test_a_role_that_is_not_given_is_the_operators_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    client = boto3.client("sts", region_name="eu-central-1", aws_access_key_id="x", aws_secret_access_key="x")

    class Session:
        def __init__(self, **_: Any) -> None:
            pass

        def client(self, _service: str, **_options: Any) -> Any:
            return client

    monkeypatch.setattr(boto3, "Session", Session)
    config = KmsConfig(accounts={KEY.account: KmsAccount("arn:aws:iam::111122223333:role/parley")})
    with Stubber(client) as stubber:
        stubber.add_client_error("assume_role", "AccessDenied", "not authorized to perform: sts:AssumeRole", 403)
        with pytest.raises(UnavailableError, match="AssumeRole is refused to this coordinator"):
            ask(Kms(config))


def test_without_boto3_only_kms_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "botocore.exceptions", None)
    with pytest.raises(UnavailableError, match="boto3 is not installed here"):
        ask()
