"""The operations: who may, under which key, and what the answer is."""

from __future__ import annotations

import base64
import binascii
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from moto.kms.models import Grant, Key

from parley_deploy.kms import keys as keys_module
from parley_deploy.kms import policy as policies
from parley_deploy.kms import recipient as recipients
from parley_deploy.kms.accounts import Accounts, Caller, Scope
from parley_deploy.kms.envelope import FORMS, Form, seal
from parley_deploy.kms.errors import KmsError, constraint, invalid, malformed_policy
from parley_deploy.kms.keys import Keys, Place
from parley_deploy.kms.recipient import Recipient

PLAINTEXT_BYTES: Final = 4096
CIPHERTEXT_BYTES: Final = 6144
RANDOM_BYTES: Final = 1024
CONTEXT_BYTES: Final = 8192

_OF_MOTO: Final[Mapping[str, tuple[str, bool]]] = {
    # operation: what the key must be ("enabled", "present": not about to be deleted, "any"), and whether it changes it
    "CancelKeyDeletion": ("any", True),
    "CreateAlias": ("present", True),
    "CreateGrant": ("present", True),
    "DeleteAlias": ("any", True),
    "DisableKey": ("present", True),
    "DisableKeyRotation": ("enabled", True),
    "EnableKey": ("present", True),
    "EnableKeyRotation": ("enabled", True),
    "GetKeyRotationStatus": ("any", False),
    "ListGrants": ("any", False),
    "ListKeyPolicies": ("any", False),
    "ListResourceTags": ("any", False),
    "RetireGrant": ("any", True),
    "RevokeGrant": ("any", True),
    "ScheduleKeyDeletion": ("present", True),
    "TagResource": ("present", True),
    "UntagResource": ("present", True),
    "UpdateKeyDescription": ("present", True),
}
"""What moto serves for one key, once the caller may."""
_NOT_SERVED: Final = frozenset(
    {
        *("DeriveSharedSecret", "GenerateDataKeyPair", "GenerateDataKeyPairWithoutPlaintext", "GenerateMac"),
        *("GetParametersForImport", "GetPublicKey", "ImportKeyMaterial", "ReplicateKey", "RotateKeyOnDemand"),
        *("Sign", "UpdatePrimaryRegion", "Verify", "VerifyMac", "ListKeyRotations", "DeleteImportedKeyMaterial"),
        *("CreateCustomKeyStore", "DescribeCustomKeyStores", "UpdateAlias", "ListRetirableGrants", "ReEncrypt"),
    }
)
"""Operations of AWS KMS that are refused here with its own error for what a key or a parameter does not support."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an emulator is started with. `forms`: of the envelopes, in turn; `now_ms` and `random` are its own."""

    root_sha256: bytes
    now_ms: Callable[[], int]
    random: Callable[[int], bytes] = os.urandom
    forms: tuple[Form, ...] = FORMS


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated request."""

    operation: str
    parameters: Mapping[str, Any]
    scope: Scope

    @property
    def caller(self) -> Caller:
        """Who signed it."""
        return self.scope.caller

    @property
    def home(self) -> Place:
        """The account and region that names without either belong to."""
        return Place(self.caller.account, self.scope.region)

    def bytes_of(self, name: str) -> bytes:
        """A parameter that is base64 on the wire."""
        try:
            return base64.b64decode(self.parameters.get(name) or "", validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise KmsError("SerializationException", f"{name} is not base64") from None

    @property
    def context(self) -> Mapping[str, str]:
        """The encryption context."""
        found = self.parameters.get("EncryptionContext") or {}
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise KmsError("SerializationException", "EncryptionContext is not a map of texts")
        if len(json.dumps(found)) > CONTEXT_BYTES:
            raise invalid("The encryption context is too large")
        return found


class Service:
    """KMS for all accounts in a folder. Threads may share it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._settings = settings
        self._accounts = Accounts(folder)
        self._keys = Keys(folder)
        self._mutex = threading.Lock()
        self._turn = 0
        self._own: Final[Mapping[str, Callable[[Call], dict[str, Any]]]] = {
            "CreateKey": self._create_key,
            "Decrypt": self._decrypt,
            "DescribeKey": self._describe_key,
            "Encrypt": self._encrypt,
            "GenerateDataKey": self._generate_data_key,
            "GenerateDataKeyWithoutPlaintext": self._generate_data_key,
            "GenerateRandom": self._generate_random,
            "GetKeyPolicy": self._get_key_policy,
            "ListAliases": self._of_account,
            "ListKeys": self._of_account,
            "PutKeyPolicy": self._put_key_policy,
        }

    def answer(self, operation: str, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
        """The JSON of the answer to one request; KmsError where the answer is an error."""
        scope = self._accounts.authenticate(headers, body)
        try:
            parameters = json.loads(body or b"{}")
        except ValueError:
            raise KmsError("SerializationException", "The request is not valid JSON") from None
        if not isinstance(parameters, dict):
            raise KmsError("SerializationException", "The request is not a structure")
        call = Call(operation, parameters, scope)
        if operation in _NOT_SERVED:
            raise KmsError("UnsupportedOperationException", f"{operation} is not supported here.")
        with self._mutex:
            if operation in self._own:
                return self._own[operation](call)
            if operation in _OF_MOTO:
                return self._of_key(call)
        raise KmsError("UnknownOperationException")

    # Who may

    def _authorise(
        self,
        call: Call,
        key: Key | None,
        *,
        action: str | None = None,
        recipient: Recipient | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing where the caller may; AccessDeniedException with AWS's words otherwise."""
        caller = call.caller
        action = action or f"kms:{call.operation.removesuffix('WithoutPlaintext')}"
        if call.operation == "GenerateDataKeyWithoutPlaintext":
            action = "kms:GenerateDataKeyWithoutPlaintext"
        request = policies.Request(
            action=action,
            resource=key.arn if key is not None else "*",
            names=caller.names,
            account=caller.account,
            keys=self._conditions(call, key, recipient, keys or {}),
        )
        own = [policies.decide(each, request, resource_policy=False) for each in caller.policies]
        allowed = any(each.direct for each in own)
        who = f"User: {caller.arn} is not authorized to perform: {action}"
        if any(each.denied for each in own):
            on = f" on resource: {key.arn}" if key is not None else ""
            raise KmsError("AccessDeniedException", f"{who}{on} with an explicit deny in an identity-based policy")
        if key is None:
            if not allowed:
                reason = f"because no identity-based policy allows the {action} action"
                raise KmsError("AccessDeniedException", f"{who} {reason}")
            return
        of_key = policies.decide(json.loads(key.policy), request, resource_policy=True)
        granted = any(_grants(grant, call, request) for grant in key.grants.values())
        stranger = caller.account != key.account_id
        named = of_key.direct or granted
        if not of_key.denied and ((named and not stranger) or ((named or of_key.account) and allowed)):
            return
        if not of_key.denied and (named or of_key.account):
            reason = f"because no identity-based policy allows the {action} action"
        elif stranger:
            raise _no_access(call, who, key)
        elif of_key.denied:
            reason = "with an explicit deny in a resource-based policy"
        else:
            reason = f"because no resource-based policy allows the {action} action"
        raise KmsError("AccessDeniedException", f"{who} on resource: {key.arn} {reason}")

    def _conditions(
        self, call: Call, key: Key | None, recipient: Recipient | None, more: Mapping[str, str]
    ) -> dict[str, list[str]]:
        now = datetime.fromtimestamp(self._settings.now_ms() // 1000, UTC)
        found = {
            "aws:CurrentTime": [now.strftime("%Y-%m-%dT%H:%M:%SZ")],
            "aws:EpochTime": [str(int(now.timestamp()))],
            "aws:PrincipalAccount": [call.caller.account],
            "aws:PrincipalArn": [call.caller.identity],
            "aws:RequestedRegion": [call.scope.region],
            "aws:SecureTransport": ["false"],
            "kms:CallerAccount": [call.caller.account],
        }
        if key is not None:
            found |= {
                "kms:KeyOrigin": [key.origin],
                "kms:KeySpec": [key.key_spec],
                "kms:KeyUsage": [key.key_usage],
                "kms:ResourceAliases": sorted(key.aliases),
            }
        name = call.parameters.get("KeyId")
        if isinstance(name, str) and "alias/" in name:
            found["kms:RequestAlias"] = [name[name.index("alias/") :]]
        if context := call.context:
            found["kms:EncryptionContextKeys"] = sorted(context)
            found |= {f"kms:EncryptionContext:{each}": [value] for each, value in context.items()}
        if recipient is not None:
            found |= {name: [value] for name, value in recipient.conditions().items()}
        return found | {name: [value] for name, value in more.items()}

    # Which key

    def _key(self, call: Call, *, name: str = "KeyId") -> Key:
        value = call.parameters.get(name)
        if not isinstance(value, str) or not value:
            raise constraint(value, name[0].lower() + name[1:], "not be null")
        return self._keys.find(value, call.home)

    def _recipient(self, call: Call) -> Recipient | None:
        return recipients.read(
            call.parameters.get("Recipient"),
            root_sha256=self._settings.root_sha256,
            now_ms=self._settings.now_ms(),
        )

    def _seal(self, plaintext: bytes, recipient: Recipient | None) -> dict[str, str | None]:
        """The fields of an answer that carry a secret: in the clear, or for the enclave alone."""
        if recipient is None:
            return {"Plaintext": _base64(plaintext)}
        forms = self._settings.forms
        form = forms[self._turn % len(forms)]
        self._turn += 1
        sealed = seal(plaintext, recipient.spki, recipient.key, form=form, random=self._settings.random)
        return {"CiphertextForRecipient": _base64(sealed)}

    # Operations of our own

    def _encrypt(self, call: Call) -> dict[str, Any]:
        plaintext = call.bytes_of("Plaintext")
        if not 1 <= len(plaintext) <= PLAINTEXT_BYTES:
            raise constraint("…", "plaintext", f"have length greater than or equal to 1 and at most {PLAINTEXT_BYTES}")
        key = self._key(call)
        self._authorise(call, key, keys=_algorithm(call))
        _usable(key)
        _dry(call)
        blob = keys_module.encrypt(key, plaintext, call.context)
        return {"CiphertextBlob": _base64(blob), "KeyId": key.arn, "EncryptionAlgorithm": keys_module.SYMMETRIC}

    def _decrypt(self, call: Call) -> dict[str, Any]:
        blob = call.bytes_of("CiphertextBlob")
        if not 1 <= len(blob) <= CIPHERTEXT_BYTES:
            raise constraint("…", "ciphertextBlob", f"have length from 1 to {CIPHERTEXT_BYTES}")
        recipient = self._recipient(call)
        named = self._key(call) if call.parameters.get("KeyId") else None
        key = named or self._of_blob(call, blob)
        self._authorise(call, key, recipient=recipient, keys=_algorithm(call))
        _usable(key)
        if keys_module.key_id_of(blob) != key.id:
            text = "The key ID in the request does not identify a CMK that can perform this operation."
            raise KmsError("IncorrectKeyException", text)
        plaintext = keys_module.decrypt(key, blob, call.context)
        _dry(call)
        return {
            "KeyId": key.arn,
            "EncryptionAlgorithm": keys_module.SYMMETRIC,
            "KeyMaterialId": keys_module.material_id(key),
            **self._seal(plaintext, recipient),
        }

    def _of_blob(self, call: Call, blob: bytes) -> Key:
        key_id = keys_module.key_id_of(blob)
        for key in self._keys.everywhere():
            if key.id == key_id and key.region == call.scope.region:
                return key
        raise KmsError(
            "AccessDeniedException",
            "The ciphertext refers to a customer master key that does not exist, does not exist in this region, "
            "or you are not allowed to access.",
        )

    def _generate_data_key(self, call: Call) -> dict[str, Any]:
        spec, count = call.parameters.get("KeySpec"), call.parameters.get("NumberOfBytes")
        if (spec is None) is (count is None):
            raise invalid("Please specify either number of bytes or key spec.")
        if spec not in (None, "AES_256", "AES_128"):
            raise constraint(spec, "keySpec", "satisfy enum value set: [AES_256, AES_128]")
        size = {"AES_256": 32, "AES_128": 16}.get(spec or "") or _count(count)
        silent = call.operation == "GenerateDataKeyWithoutPlaintext"
        recipient = None if silent else self._recipient(call)
        key = self._key(call)
        self._authorise(call, key, recipient=recipient, keys=_algorithm(call))
        _usable(key)
        _dry(call)
        plaintext = self._settings.random(size)
        return {
            "CiphertextBlob": _base64(keys_module.encrypt(key, plaintext, call.context)),
            "KeyId": key.arn,
            "KeyMaterialId": keys_module.material_id(key),
            **({} if silent else self._seal(plaintext, recipient)),
        }

    def _generate_random(self, call: Call) -> dict[str, Any]:
        count = _count(call.parameters.get("NumberOfBytes"))
        if call.parameters.get("CustomKeyStoreId") is not None:
            raise KmsError("CustomKeyStoreNotFoundException", "There are no custom key stores here.")
        recipient = self._recipient(call)
        self._authorise(call, None, recipient=recipient)
        return dict(self._seal(self._settings.random(count), recipient))

    def _create_key(self, call: Call) -> dict[str, Any]:
        parameters = dict(call.parameters)
        spec = parameters.get("KeySpec") or parameters.get("CustomerMasterKeySpec") or keys_module.SYMMETRIC
        if (
            spec != keys_module.SYMMETRIC
            or parameters.get("KeyUsage", "ENCRYPT_DECRYPT") != "ENCRYPT_DECRYPT"
            or parameters.get("MultiRegion")
            or parameters.get("Origin", "AWS_KMS") != "AWS_KMS"
        ):
            text = "Only symmetric encryption keys of one region are supported here."
            raise KmsError("UnsupportedOperationException", text)
        self._authorise(call, None)
        parameters |= {"KeyUsage": "ENCRYPT_DECRYPT", "KeySpec": spec}
        if parameters.get("Policy") is not None:
            parameters["Policy"] = self._stored(call, parameters["Policy"])
        return self._moto(call, parameters, call.home, changes=True)

    def _describe_key(self, call: Call) -> dict[str, Any]:
        key = self._key(call)
        self._authorise(call, key)
        return key.to_dict()

    def _of_account(self, call: Call) -> dict[str, Any]:
        parameters = dict(call.parameters)
        if call.operation == "ListAliases" and "KeyId" in parameters:
            parameters["KeyId"] = self._key(call).id
        self._authorise(call, None)
        return self._moto(call, parameters, call.home, changes=False)

    def _get_key_policy(self, call: Call) -> dict[str, Any]:
        key = self._key(call)
        self._authorise(call, key)
        if call.parameters.get("PolicyName", "default") != "default":
            raise KmsError("NotFoundException", "No such policy exists")
        arns = {unique: arn for arn, unique in self._accounts.ids().items()}
        text = json.dumps(_renamed(json.loads(key.policy), arns), indent=2, separators=(",", " : "))
        return {"Policy": text, "PolicyName": "default"}

    def _put_key_policy(self, call: Call) -> dict[str, Any]:
        key = self._key(call)
        self._authorise(call, key)
        if call.parameters.get("PolicyName", "default") != "default":
            raise KmsError("NotFoundException", "No such policy exists")
        _not_deleted(key)
        text = call.parameters.get("Policy")
        if not isinstance(text, str) or not text:
            raise constraint(text, "policy", "not be null")
        key.policy = self._stored(call, text)
        self._keys.save()
        return {}

    def _stored(self, call: Call, text: str) -> str:
        """A key policy as KMS keeps it: readable, its principals known and by their ids, not locking the caller out."""
        policy = policies.parse(text, resource_policy=True)
        ids = self._accounts.ids()
        accounts = {arn.split(":")[4] for arn in ids}
        for statement in policies.statements(policy):
            for name in policies.principals(statement):
                account = policies.account_of(name)
                if name != "*" and name not in ids and account not in accounts and not policies.is_session(name):
                    raise malformed_policy("Policy contains a statement with one or more invalid principals.")
        stored = _compact(_renamed(policy, ids))
        if not call.parameters.get("BypassPolicyLockoutSafetyCheck"):
            request = policies.Request(
                "kms:PutKeyPolicy", "*", call.caller.names, call.caller.account, self._conditions(call, None, None, {})
            )
            after = policies.decide(stored, request, resource_policy=True)
            if after.denied or not (after.direct or after.account):
                raise malformed_policy("The new key policy will not allow you to update the key policy in the future.")
        return json.dumps(stored)

    # Operations of moto

    def _of_key(self, call: Call) -> dict[str, Any]:
        wanted, changes = _OF_MOTO[call.operation]
        if call.operation == "DeleteAlias":
            key = self._key(call, name="AliasName")
        else:
            key = self._key(call, name="TargetKeyId" if call.operation == "CreateAlias" else "KeyId")
        self._authorise(call, key)
        if wanted == "enabled":
            _usable(key)
        elif wanted == "present":
            _not_deleted(key)
        parameters = {name: value for name, value in call.parameters.items() if name != "DryRun"}
        parameters |= {name: key.id for name in ("KeyId", "TargetKeyId") if name in parameters}
        if call.operation == "CancelKeyDeletion" and key.key_state != "PendingDeletion":
            raise KmsError("KMSInvalidStateException", f"{key.arn} is not pending deletion.")
        if call.operation == "ScheduleKeyDeletion":
            days = parameters.get("PendingWindowInDays", 30)
            if days not in range(7, 31):
                raise constraint(days, "pendingWindowInDays", "have value from 7 to 30")
        if call.operation == "CreateGrant":
            parameters["GranteePrincipal"] = self._grantee(parameters.get("GranteePrincipal"))
        _dry(call)
        answer = self._moto(call, parameters, Place(key.account_id, key.region), changes=changes)
        if answer.get("KeyId") == key.id:
            answer["KeyId"] = key.arn
        arns = {unique: arn for arn, unique in self._accounts.ids().items()}
        for grant in answer.get("Grants", []):
            grant |= {
                "KeyId": key.arn,
                "GranteePrincipal": arns.get(grant["GranteePrincipal"], grant["GranteePrincipal"]),
            }
        return answer

    def _grantee(self, arn: object) -> str:
        found = self._accounts.ids().get(str(arn))
        if found is None:
            raise KmsError("InvalidArnException", f"ARN does not refer to a valid principal: {arn}")
        return found

    def _moto(self, call: Call, parameters: Mapping[str, Any], place: Place, *, changes: bool) -> dict[str, Any]:
        status, answer = self._keys.call(call.operation, parameters, place)
        if status >= 300:
            code, text = answer.get("__type", "KMSInternalException"), answer.get("message") or answer.get("Message")
            raise KmsError(code, text, status=status)
        if changes:
            self._keys.save()
        return answer


def _grants(grant: Grant, call: Call, request: policies.Request) -> bool:
    constraints = grant.constraints or {}
    subset, equal = constraints.get("EncryptionContextSubset"), constraints.get("EncryptionContextEquals")
    return (
        grant.grantee_principal in request.names
        and request.action.removeprefix("kms:") in grant.operations
        and (subset is None or subset.items() <= call.context.items())
        and (equal is None or equal == call.context)
    )


def _no_access(call: Call, who: str, key: Key) -> KmsError:
    on = "the resource associated with this ciphertext" if not call.parameters.get("KeyId") else f"resource: {key.arn}"
    return KmsError(
        "AccessDeniedException",
        f"{who} on {on} because the resource does not exist in this Region, no resource-based policies allow access, "
        "or a resource-based policy explicitly denies access",
    )


def _usable(key: Key) -> None:
    _not_deleted(key)
    if not key.enabled:
        raise KmsError("DisabledException", f"{key.arn} is disabled.")


def _not_deleted(key: Key) -> None:
    if key.key_state == "PendingDeletion":
        raise KmsError("KMSInvalidStateException", f"{key.arn} is pending deletion.")


def _dry(call: Call) -> None:
    if call.parameters.get("DryRun"):
        text = "The request would have succeeded, but the DryRun option is set."
        raise KmsError("DryRunOperationException", text, status=412)


def _algorithm(call: Call) -> dict[str, str]:
    algorithm = call.parameters.get("EncryptionAlgorithm", keys_module.SYMMETRIC)
    if algorithm != keys_module.SYMMETRIC:
        text = f"The algorithm {algorithm} is incompatible with the key spec {keys_module.SYMMETRIC}."
        raise KmsError("InvalidKeyUsageException", text)
    return {"kms:EncryptionAlgorithm": algorithm}


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= RANDOM_BYTES:
        raise constraint(value, "numberOfBytes", f"have value from 1 to {RANDOM_BYTES}")
    return value


def _renamed(policy: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A policy whose AWS principals have other names where `names` has one."""

    def statement(found: Mapping[str, Any]) -> dict[str, Any]:
        renamed = dict(found)
        for field in ("Principal", "NotPrincipal"):
            if isinstance(found.get(field), dict) and "AWS" in found[field]:
                values = [names.get(item, item) for item in policies.listed(found[field]["AWS"])]
                renamed[field] = {**found[field], "AWS": values[0] if len(values) == 1 else values}
        return renamed

    return {**policy, "Statement": [statement(each) for each in policies.statements(policy)]}


def _compact(value: Any) -> Any:
    """A policy as AWS gives it back: a list of one value is that value (but for the statements)."""
    if isinstance(value, dict):
        return {
            name: [_compact(each) for each in policies.listed(inner)] if name == "Statement" else _compact(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return _compact(value[0]) if len(value) == 1 else [_compact(each) for each in value]
    return value


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
