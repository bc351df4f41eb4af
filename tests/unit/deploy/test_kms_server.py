"""The emulated KMS as boto3 finds it: a process, real requests, and AWS's answers and errors."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from parley_deploy.kms import process
from parley_deploy.kms.accounts import Accounts, Credentials
from parley_deploy.kms.envelope import spki_of
from parley_deploy.kms.process import StartError
from parley_enclave.recipient import Recipient
from parley_protocol import cose
from parley_protocol.attestation.document import extended
from support import documents
from support.emulated_kms import (
    ADMIN,
    ALGORITHM,
    COORDINATOR,
    ENCLAVE,
    OTHER,
    PARTY,
    REGION,
    SEALER,
    Kms,
    allow,
    recipient,
    refused,
)

SECRET = os.urandom(64)
CONTEXT = {"parley": "test"}
BEFORE, AFTER = "2027-01-15T09:00:00Z", "2027-01-15T07:00:00Z"
"""A date that is still to come at the emulator's clock, and one that is over."""


@pytest.fixture(scope="module")
def kms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    made = Kms(tmp_path_factory.mktemp("kms"))
    made.start()
    yield made
    made.stop()


def registers(**changed: bytes) -> dict[str, str]:
    """Conditions on the registers of the documents of the tests."""
    found = {"PCR0": documents.IMAGE.pcr0, "PCR1": documents.IMAGE.pcr1, "PCR2": documents.IMAGE.pcr2}
    found |= {"PCR16": extended(documents.AGREEMENT), **changed}
    return {f"kms:RecipientAttestation:{name}": value.hex() for name, value in found.items()}


def enclave_only(until: str = BEFORE, **changed: bytes) -> dict[str, Any]:
    condition = {"StringEqualsIgnoreCase": registers(**changed), "DateLessThan": {"aws:CurrentTime": until}}
    return allow(COORDINATOR, "kms:Decrypt", Condition=condition)


def sealed(kms: Kms, key: str) -> bytes:
    return kms.client().encrypt(KeyId=key, Plaintext=SECRET, EncryptionContext=CONTEXT)["CiphertextBlob"]


def opened(answer: Any, size: int = len(SECRET)) -> bytes:
    """What the enclave makes of an answer, in which nothing stands in the clear."""
    assert not answer.get("Plaintext")
    return Recipient(ENCLAVE).open(answer["CiphertextForRecipient"], size)


def test_an_accepted_enclave_gets_what_was_encrypted(kms: Kms) -> None:
    key = kms.key(enclave_only())
    blob = sealed(kms, key)
    for _ in range(2):  # the two forms, in turn
        answer = kms.client(COORDINATOR).decrypt(
            CiphertextBlob=blob, KeyId=key, EncryptionContext=CONTEXT, Recipient=recipient()
        )
        assert opened(answer) == SECRET
        assert answer["KeyId"] == key and answer["EncryptionAlgorithm"] == "SYMMETRIC_DEFAULT"
        assert len(answer["KeyMaterialId"]) == 64
    # Without the key's name the ciphertext tells it.
    answer = kms.client(COORDINATOR).decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT, Recipient=recipient())
    assert opened(answer) == SECRET


@pytest.mark.parametrize(
    ("statement", "document"),
    [
        (enclave_only(), None),  # no document
        (enclave_only(PCR0=b"\7" * 48), {}),
        (enclave_only(PCR1=b"\7" * 48), {}),
        (enclave_only(PCR2=b"\7" * 48), {}),
        (enclave_only(PCR16=extended(b"another agreement")), {}),  # the same image under another agreement (E2)
        (enclave_only(), {"pcrs": {16: extended(b"another agreement")}}),
        (enclave_only(), {"pcrs": {16: None}}),  # not locked
        (enclave_only(), {"pcrs": {0: bytes(48), 1: bytes(48), 2: bytes(48)}}),  # a debug enclave
        (enclave_only(until=AFTER), {}),
        (allow(OTHER, "kms:Decrypt"), {}),  # another role of the operator
        (allow(COORDINATOR, "kms:Encrypt"), {}),
    ],
)
def test_others_are_denied(kms: Kms, statement: dict[str, Any], document: dict[str, Any] | None) -> None:
    key = kms.key(statement)
    parameters: Any = {"CiphertextBlob": sealed(kms, key), "KeyId": key, "EncryptionContext": CONTEXT}
    if document is not None:
        parameters["Recipient"] = recipient(**document)
    with refused("AccessDeniedException", "no resource-based policies allow access"):
        kms.client(COORDINATOR).decrypt(**parameters)
    with refused("AccessDeniedException", "assumed-role/parley-parent/local is not authorized to perform: kms:Decrypt"):
        kms.client(COORDINATOR).decrypt(**{name: value for name, value in parameters.items() if name != "KeyId"})


def test_a_denial_beats_what_is_allowed(kms: Kms) -> None:
    deny = allow(COORDINATOR, "kms:*", "Deny", Condition={"Null": {"kms:RecipientAttestation:PCR16": "true"}})
    key = kms.key(allow(COORDINATOR, "kms:Decrypt"), deny)
    blob = sealed(kms, key)
    answer = kms.client(COORDINATOR).decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT, Recipient=recipient())
    assert opened(answer) == SECRET
    with refused("AccessDeniedException"):
        kms.client(COORDINATOR).decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)
    own = kms.key(allow(ADMIN, "kms:DescribeKey", "Deny"))
    with refused("AccessDeniedException", f"on resource: {own} with an explicit deny in a resource-based policy"):
        kms.client().describe_key(KeyId=own)


def test_image_sha384_is_pcr0_and_debug_enclaves_are_genuine(kms: Kms) -> None:
    name = "kms:RecipientAttestation:ImageSha384"
    key = kms.key(allow(COORDINATOR, "kms:Decrypt", Condition={"StringEquals": {name: "0" * 96}}))
    debug = recipient(pcrs={0: bytes(48), 1: bytes(48), 2: bytes(48)})
    call: Any = {"CiphertextBlob": sealed(kms, key), "EncryptionContext": CONTEXT}
    assert opened(kms.client(COORDINATOR).decrypt(**call, Recipient=debug)) == SECRET
    with refused("AccessDeniedException"):
        kms.client(COORDINATOR).decrypt(**call, Recipient=recipient())


def _nitrotpm() -> bytes:
    payload = documents.payload()
    payload["nitrotpm_pcrs"] = payload.pop("pcrs")
    return cose.sign(cbor2.dumps(payload), documents.chain()[-1].key)


def _altered() -> bytes:
    good = bytearray(recipient()["AttestationDocument"])
    good[-1] ^= 1
    return bytes(good)


PKCS1 = ENCLAVE.public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)
P256 = ec.generate_private_key(ec.SECP256R1()).public_key()
BAD_RECIPIENTS: dict[str, Any] = {
    "no CBOR": (lambda: recipient(b"hello"), "att-1"),
    "altered": (lambda: recipient(_altered()), "att-10"),
    "of a NitroTPM": (lambda: recipient(_nitrotpm()), "NitroTPM"),
    "of another root": (lambda: recipient(certificates=documents.altered_chain({})), "att-4"),
    "of a time to come": (
        lambda: recipient(timestamp=documents.NOW + 7_200_000, certificates=late(timedelta(hours=2))),
        "att-8",
    ),
    "of a time that is over": (lambda: recipient(certificates=late(timedelta(hours=-4))), "att-8"),
    "of a module that is not there": (lambda: recipient(pcrs={4: b"\4" * 48}), "att-11"),
    "without a key": (lambda: recipient(public_key=None), "no public key"),
    "with no key at all": (lambda: recipient(public_key=b"k" * 32), "no DER SubjectPublicKeyInfo"),
    "with an EC key": (
        lambda: recipient(public_key=P256.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)),
        "no RSA key of 2048 bits",
    ),
    "with an RSA key of 3072 bits": (
        lambda: recipient(public_key=spki_of(rsa.generate_private_key(65537, 3072).public_key())),
        "no RSA key of 2048 bits",
    ),
    "with a PKCS#1 key": (lambda: recipient(public_key=PKCS1), "no RSA key of 2048 bits"),
    "for another algorithm": (lambda: recipient(algorithm="RSAES_OAEP_SHA_1"), "keyEncryptionAlgorithm"),
}


def late(shift: timedelta) -> tuple[Any, ...]:
    """The chain of the tests whose last certificate is of another time: under the same root, so only its time is wrong."""
    root, region, zone, instance, _ = documents.chain()
    start = documents.moment(documents.NOW) + shift
    level = documents._LEVELS[4]
    leaf = documents.issue(
        level["name"], instance, **{"start": start, **{k: v for k, v in level.items() if k != "name"}}
    )
    return root, region, zone, instance, leaf


@pytest.mark.parametrize("name", BAD_RECIPIENTS)
def test_a_recipient_that_is_none_is_refused_before_the_policy_is_asked(kms: Kms, name: str) -> None:
    make, text = BAD_RECIPIENTS[name]
    made = make()
    for arn in (ADMIN, COORDINATOR):  # one who may decrypt, and one who may not
        with refused("ValidationException", text):
            kms.client(arn).generate_random(NumberOfBytes=32, Recipient=made)
    with refused("ValidationException", text):
        kms.client().generate_data_key(KeyId="alias/none", KeySpec="AES_256", Recipient=made)


def test_data_keys_and_randomness_for_an_enclave(kms: Kms) -> None:
    key = kms.key()
    answer: Any = kms.client().generate_data_key(
        KeyId=key, KeySpec="AES_256", EncryptionContext=CONTEXT, Recipient=recipient()
    )
    data_key = opened(answer, 32)
    call: Any = {"CiphertextBlob": answer["CiphertextBlob"], "EncryptionContext": CONTEXT}
    assert kms.client().decrypt(**call)["Plaintext"] == data_key
    answer = kms.client().generate_random(NumberOfBytes=33, Recipient=recipient())
    assert len(set(opened(answer, 33))) > 5
    assert len(kms.client().generate_random(NumberOfBytes=17)["Plaintext"]) == 17
    plain = kms.client().generate_data_key(KeyId=key, NumberOfBytes=24)
    assert kms.client().decrypt(CiphertextBlob=plain["CiphertextBlob"])["Plaintext"] == plain["Plaintext"]
    silent = kms.client().generate_data_key_without_plaintext(KeyId=key, KeySpec="AES_128")
    assert "Plaintext" not in silent
    assert len(kms.client().decrypt(CiphertextBlob=silent["CiphertextBlob"])["Plaintext"]) == 16


def test_what_is_not_a_ciphertext_of_the_key_is_refused(kms: Kms) -> None:
    key, other = kms.key(), kms.key()
    blob = sealed(kms, key)
    admin = kms.client()
    assert admin.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"] == SECRET
    for wrong in ({}, {"parley": "tes", "t": ""}, {**CONTEXT, "more": "x"}, {"parle": "ytest"}):
        with refused("InvalidCiphertextException"):
            admin.decrypt(CiphertextBlob=blob, EncryptionContext=wrong)
    with refused("InvalidCiphertextException"):
        admin.decrypt(CiphertextBlob=blob[:-1] + bytes([blob[-1] ^ 1]), EncryptionContext=CONTEXT)
    with refused("InvalidCiphertextException"):
        admin.decrypt(CiphertextBlob=b"nothing", KeyId=key)
    with refused("IncorrectKeyException"):
        admin.decrypt(CiphertextBlob=blob, KeyId=other, EncryptionContext=CONTEXT)
    gone = blob.replace(key[-36:].encode(), b"0" * 36)
    with refused("AccessDeniedException", "does not exist in this region"):
        admin.decrypt(CiphertextBlob=gone, EncryptionContext=CONTEXT)
    with refused("InvalidKeyUsageException"):
        admin.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT, EncryptionAlgorithm="RSAES_OAEP_SHA_256")
    with refused("ValidationException", "ciphertextBlob"):
        admin.decrypt(CiphertextBlob=b"x" * 6144 + b"y")
    with refused("DryRunOperationException"):
        admin.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT, DryRun=True)


def test_keys_that_are_disabled_or_about_to_go(kms: Kms) -> None:
    key = kms.key(enclave_only())
    blob = sealed(kms, key)
    admin, coordinator = kms.client(), kms.client(COORDINATOR)

    def decrypt() -> bytes:
        answer = coordinator.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT, Recipient=recipient())
        return opened(answer)

    admin.disable_key(KeyId=key)
    with refused("DisabledException", f"{key} is disabled."):
        decrypt()
    admin.enable_key(KeyId=key)
    assert decrypt() == SECRET
    with refused("ValidationException", "pendingWindowInDays"):
        admin.schedule_key_deletion(KeyId=key, PendingWindowInDays=6)
    assert admin.schedule_key_deletion(KeyId=key, PendingWindowInDays=7)["KeyId"] == key
    with refused("KMSInvalidStateException", f"{key} is pending deletion."):
        decrypt()
    with refused("KMSInvalidStateException"):
        admin.put_key_policy(KeyId=key, PolicyName="default", Policy="{}")
    admin.cancel_key_deletion(KeyId=key)
    with refused("DisabledException"):
        decrypt()


def test_keys_by_every_name(kms: Kms) -> None:
    key = kms.key()
    admin = kms.client()
    admin.create_alias(AliasName="alias/of-tests", TargetKeyId=key)
    arn = f"arn:aws:kms:{REGION}:{PARTY}:alias/of-tests"
    for name in (key, key.rpartition("/")[2], "alias/of-tests", arn):
        assert admin.describe_key(KeyId=name)["KeyMetadata"]["Arn"] == key
    assert {"AliasName": "alias/of-tests", "AliasArn": arn, "TargetKeyId": key[-36:]} in admin.list_aliases()["Aliases"]
    assert key in [item["KeyArn"] for item in admin.list_keys()["Keys"]]
    for name, text in (
        ("alias/none", "Alias arn:aws:kms:eu-central-1:444455556666:alias/none is not found."),
        ("0" * 36, "does not exist"),
        ("arn:aws:s3:::x", "Invalid arn"),
        (key.replace(REGION, "us-east-1"), "Invalid arn us-east-1"),
    ):
        with refused("NotFoundException", text):
            admin.describe_key(KeyId=name)
    # An id alone is one of the caller's own account.
    with refused("NotFoundException"):
        kms.client(COORDINATOR).decrypt(CiphertextBlob=sealed(kms, key), KeyId=key[-36:])
    admin.delete_alias(AliasName="alias/of-tests")
    with refused("NotFoundException"):
        admin.describe_key(KeyId=arn)


def test_grants_go_round_a_policy_until_they_are_revoked(kms: Kms) -> None:
    key = kms.key()
    blob = sealed(kms, key)
    admin, coordinator = kms.client(), kms.client(COORDINATOR)
    with refused("InvalidArnException"):
        admin.create_grant(KeyId=key, GranteePrincipal=f"{COORDINATOR}x", Operations=["Decrypt"])
    made = admin.create_grant(
        KeyId=key,
        GranteePrincipal=COORDINATOR,
        Operations=["Decrypt"],
        Constraints={"EncryptionContextSubset": CONTEXT},
    )
    assert coordinator.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"] == SECRET
    other = admin.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    for call in (
        lambda: coordinator.decrypt(CiphertextBlob=other),
        lambda: coordinator.encrypt(KeyId=key, Plaintext=b"x"),
        lambda: coordinator.list_grants(KeyId=key),
    ):
        with refused("AccessDeniedException"):
            call()
    [grant] = admin.list_grants(KeyId=key)["Grants"]
    assert (grant["GranteePrincipal"], grant["KeyId"], grant["GrantId"]) == (COORDINATOR, key, made["GrantId"])
    admin.revoke_grant(KeyId=key, GrantId=made["GrantId"])
    with refused("AccessDeniedException"):
        coordinator.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)


def test_policies_are_checked_kept_and_given_back_as_aws_does(kms: Kms) -> None:
    key = kms.key()
    admin = kms.client()

    def put(*statements: Any) -> None:
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        admin.put_key_policy(KeyId=key, PolicyName="default", Policy=policy)

    rights = allow(ADMIN, ["kms:*"])
    guest = f"arn:aws:iam::{PARTY}:role/guest"
    kms.accounts.add(guest)
    put(rights, allow(guest, "kms:Decrypt"))
    found = json.loads(admin.get_key_policy(KeyId=key, PolicyName="default")["Policy"])
    assert found["Statement"][0]["Action"] == "kms:*", "a list of one comes back as that one"
    assert found["Statement"][1]["Principal"] == {"AWS": guest}
    kms.accounts.remove(guest)
    found = json.loads(admin.get_key_policy(KeyId=key)["Policy"])
    assert found["Statement"][1]["Principal"]["AWS"].startswith("AROA"), "a deleted identity is shown by its id"
    credentials = kms.accounts.add(guest)
    kms.credentials[guest] = credentials
    with refused("AccessDeniedException"):
        kms.client(guest).decrypt(CiphertextBlob=sealed(kms, key), EncryptionContext=CONTEXT)
    with refused("MalformedPolicyDocumentException", "invalid principals"):
        put(rights, allow(f"arn:aws:iam::{PARTY}:role/nobody", "kms:Decrypt"))
    with refused("MalformedPolicyDocumentException", "will not allow you to update the key policy"):
        put(allow(ADMIN, "kms:Decrypt"))
    with refused("MalformedPolicyDocumentException", "will not allow you"):
        put(rights, allow(ADMIN, "kms:PutKeyPolicy", "Deny"))
    assert len(json.loads(admin.get_key_policy(KeyId=key)["Policy"])["Statement"]) == 2, (
        "what is refused changes nothing"
    )
    with refused("NotFoundException"):
        admin.get_key_policy(KeyId=key, PolicyName="other")
    with refused("AccessDeniedException"):
        kms.client(COORDINATOR).put_key_policy(KeyId=key, PolicyName="default", Policy="{}")


def test_an_account_in_a_key_policy_leaves_it_to_the_policies_of_its_identities(kms: Kms) -> None:
    weak, strong = (f"arn:aws:iam::{PARTY}:user/{name}" for name in ("weak", "strong"))
    kms.credentials[weak] = kms.accounts.add(weak, policies=[])
    statement = {"Effect": "Allow", "Action": "kms:Decrypt", "Resource": "*"}
    kms.credentials[strong] = kms.accounts.add(strong, policies=[{"Version": "2012-10-17", "Statement": statement}])
    key = kms.client().create_key()["KeyMetadata"]["Arn"]  # AWS's own default policy: the account
    blob = sealed(kms, key)
    assert kms.client(strong).decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"] == SECRET
    with refused("AccessDeniedException", "because no identity-based policy allows the kms:Decrypt action"):
        kms.client(weak).decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)
    named = kms.key(allow(weak, "kms:Decrypt"))
    assert kms.client(weak).decrypt(CiphertextBlob=sealed(kms, named), EncryptionContext=CONTEXT)["Plaintext"] == SECRET
    with refused("AccessDeniedException", "because no resource-based policy allows the kms:Decrypt action"):
        kms.client(strong).decrypt(CiphertextBlob=sealed(kms, named), EncryptionContext=CONTEXT)
    with refused("AccessDeniedException", "no identity-based policy allows the kms:CreateKey action"):
        kms.client(strong).create_key()


def test_a_key_policy_does_not_suffice_in_another_account(kms: Kms) -> None:
    helpless = "arn:aws:iam::999999999999:role/helpless"
    kms.credentials[helpless] = kms.accounts.add(helpless, policies=[])
    key = kms.key(allow(helpless, "kms:Decrypt"))
    blob = sealed(kms, key)
    with refused("AccessDeniedException", "because no identity-based policy allows the kms:Decrypt action"):
        kms.client(helpless).decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)
    deny = {"Effect": "Deny", "Action": "kms:*", "Resource": "*"}
    kms.credentials[SEALER] = kms.accounts.add(SEALER, policies=[{"Statement": deny}])
    with refused("AccessDeniedException", "with an explicit deny in an identity-based policy"):
        kms.client(SEALER).decrypt(CiphertextBlob=sealed(kms, kms.key(allow(SEALER, "kms:*"))), KeyId=key)
    kms.credentials[SEALER] = kms.accounts.add(SEALER)


def test_what_is_not_served_is_refused_with_an_error_of_aws(kms: Kms) -> None:
    key = kms.key()
    admin: Any = kms.client()
    with refused("UnsupportedOperationException"):
        admin.generate_data_key_pair(KeyId=key, KeyPairSpec="RSA_2048", Recipient=recipient())
    with refused("UnsupportedOperationException"):
        admin.derive_shared_secret(KeyId=key, KeyAgreementAlgorithm="ECDH", PublicKey=b"x" * 91)
    with refused("UnsupportedOperationException"):
        admin.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")
    with refused("UnsupportedOperationException"):
        admin.create_key(MultiRegion=True)
    with refused("ValidationException"):
        admin.generate_data_key(KeyId=key)
    with refused("ValidationException", "numberOfBytes"):
        admin._make_api_call("GenerateRandom", {})


def test_only_who_signs_is_answered(kms: Kms) -> None:
    kms.key()
    good = kms.credentials[ADMIN]
    for credentials, code in (
        (Credentials("AKIA0000", good.secret_key), "UnrecognizedClientException"),
        (Credentials(good.access_key, "another"), "InvalidSignatureException"),
        (Credentials(good.access_key, good.secret_key, "a token"), "UnrecognizedClientException"),
    ):
        with refused(code):
            kms.client(credentials=credentials).list_keys()
    for headers, code in (
        ({"X-Amz-Target": "TrentService.ListKeys"}, "MissingAuthenticationTokenException"),
        ({"X-Amz-Target": "Other.ListKeys"}, "UnknownOperationException"),
        ({}, "UnknownOperationException"),
    ):
        request = urllib.request.Request(kms.url, data=b"{}", headers={"Content-Type": "x", **headers})
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request)
        assert json.loads(raised.value.read())["__type"] == code
        raised.value.close()


def test_a_role_is_assumed_by_whom_it_trusts(kms: Kms) -> None:
    role = f"arn:aws:iam::{PARTY}:role/path/for-parley"
    kms.accounts.add(role, trusts=[COORDINATOR])
    key = kms.key(allow(role, "kms:Decrypt"))
    sts = kms.session(COORDINATOR).client("sts", endpoint_url=kms.url)
    assert sts.get_caller_identity()["Arn"] == "arn:aws:sts::111122223333:assumed-role/parley-parent/local"
    found = sts.assume_role(RoleArn=role, RoleSessionName="parley")
    assert found["AssumedRoleUser"]["Arn"] == f"arn:aws:sts::{PARTY}:assumed-role/for-parley/parley"
    made = found["Credentials"]
    assumed = Credentials(made["AccessKeyId"], made["SecretAccessKey"], made["SessionToken"])
    client = kms.client(credentials=assumed)
    blob = sealed(kms, key)
    assert client.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"] == SECRET
    other = kms.session(OTHER).client("sts", endpoint_url=kms.url)
    with refused("AccessDenied", "sts:AssumeRole"):
        other.assume_role(RoleArn=role, RoleSessionName="parley")


def test_a_killed_emulator_comes_back_with_all_that_it_answered(tmp_path: Path) -> None:
    kms = Kms(tmp_path)
    url = kms.start("--form", "implicit")
    try:
        key = kms.key(enclave_only())
        blob = sealed(kms, key)
        admin = kms.client()
        admin.create_alias(AliasName="alias/kept", TargetKeyId=key)
        admin.tag_resource(KeyId=key, Tags=[{"TagKey": "a", "TagValue": "b"}])
        admin.create_grant(KeyId=key, GranteePrincipal=OTHER, Operations=["DescribeKey"])
        disabled = kms.key()
        admin.disable_key(KeyId=disabled)
        before = json.loads((kms.folder / "keys.json").read_text())
        kms.stop(signal_=signal.SIGKILL)
        assert process.serving(kms.folder) is None
        assert kms.start() == url, "clients know it by its address"
        # Its clock is not part of its state, and neither are the forms of its answers.
        admin.update_key_description(KeyId=key, Description="changed")
        after = json.loads((kms.folder / "keys.json").read_text())
        assert [{**item, "description": ""} for item in after] == [{**item, "description": ""} for item in before]
        assert kms.client(OTHER).describe_key(KeyId=key)["KeyMetadata"]["Description"] == "changed"
        assert admin.list_resource_tags(KeyId="alias/kept")["Tags"] == [{"TagKey": "a", "TagValue": "b"}]
        with refused("DisabledException"):
            admin.encrypt(KeyId=disabled, Plaintext=b"x")
        answer = kms.client(COORDINATOR).decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT, Recipient=recipient())
        assert opened(answer) == SECRET
    finally:
        kms.stop()


def test_an_emulator_is_started_once_and_says_why_it_does_not_start(tmp_path: Path) -> None:
    kms = Kms(tmp_path)
    urls: list[str] = []
    starts = [threading.Thread(target=lambda: urls.append(kms.start())) for _ in range(3)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    try:
        assert len(set(urls)) == 1 and len(urls) == 3
        with pytest.raises(StartError, match="not HOST:PORT"):
            process.start(tmp_path / "other", kms.root, "--listen", "nowhere")
        with pytest.raises(StartError, match="no local root"):
            process.start(tmp_path / "other", tmp_path / "none")
        with pytest.raises(StartError, match="in use"):
            process.start(tmp_path / "other", kms.root, "--listen", urls[0].removeprefix("http://"))
    finally:
        kms.stop()


def test_a_condition_on_the_context_and_on_the_time_of_a_later_start(tmp_path: Path) -> None:
    kms = Kms(tmp_path)
    kms.start()
    try:
        statement = allow(
            COORDINATOR, "kms:Decrypt", Condition={"StringEquals": {"kms:EncryptionContext:parley": "test"}}
        )
        key, dated = kms.key(statement), kms.key(enclave_only())
        other = kms.client().encrypt(KeyId=key, Plaintext=b"x", EncryptionContext={"parley": "other"})
        coordinator = kms.client(COORDINATOR)
        blob = sealed(kms, dated)
        assert coordinator.decrypt(CiphertextBlob=sealed(kms, key), EncryptionContext=CONTEXT)["Plaintext"] == SECRET
        with refused("AccessDeniedException"):
            coordinator.decrypt(CiphertextBlob=other["CiphertextBlob"], EncryptionContext={"parley": "other"})
        call: Any = {"CiphertextBlob": blob, "EncryptionContext": CONTEXT, "Recipient": recipient()}
        assert opened(coordinator.decrypt(**call)) == SECRET
        kms.stop()
        kms.start(at_ms=documents.NOW + 3_600_000)
        with refused("AccessDeniedException"):
            coordinator.decrypt(**call)
    finally:
        kms.stop()


def test_accounts_take_only_identities(tmp_path: Path) -> None:
    for arn in ("*", f"arn:aws:iam::{PARTY}:root", "arn:aws:sts::444455556666:assumed-role/a/b", "ann"):
        with pytest.raises(ValueError, match="not the ARN of a role or user"):
            Accounts(tmp_path).add(arn)
    assert ALGORITHM == "RSAES_OAEP_SHA_256"
