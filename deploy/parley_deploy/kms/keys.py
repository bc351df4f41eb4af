"""The keys, which are moto's, and their state on disk, which is not: killed and started again, the emulator has all of it.

What is encrypted is AES-256-GCM under a key's material, with the key's id in front and the encryption context as
associated data (moto's own form takes {"a": "bc"} and {"ab": "c"} for the same context).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from flask import Flask
from moto.kms.models import Grant, Key, KmsBackend, kms_backends
from moto.moto_server.werkzeug_app import create_backend_app

from parley_deploy.kms.errors import KmsError
from parley_deploy.kms.files import write

FILE: Final = "keys.json"
SYMMETRIC: Final = "SYMMETRIC_DEFAULT"
_MAGIC: Final = b"\x01parley-emulated-kms"
_ID_BYTES: Final = 36
_NONCE_BYTES: Final = 12
_FIELDS: Final = (
    *("policy", "key_usage", "key_state", "description", "enabled", "creation_date", "origin", "key_spec"),
    *("key_rotation_status",),
)


@dataclass(frozen=True, slots=True)
class Place:
    """An account's keys in a region."""

    account: str
    region: str

    @property
    def backend(self) -> KmsBackend:
        """Moto's."""
        return kms_backends[self.account][self.region]


class Keys:
    """All keys of all accounts. Moto's store is one of the process, so a process has one of these. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._moto: Flask = create_backend_app("kms")  # type: ignore[no-untyped-call,unused-ignore]
        kms_backends.reset()
        if self._path.exists():
            self._restore(json.loads(self._path.read_text("utf-8")))

    def find(self, name: str, home: Place) -> Key:
        """The key of an id, ARN, alias or alias's ARN; NotFoundException. `home`: the caller's place."""
        place, short = home, name
        if name.startswith("arn:"):
            parts = name.split(":", 5)
            if len(parts) != 6 or parts[2] != "kms":
                raise KmsError("NotFoundException", f"Invalid arn {name}")
            if parts[3] != home.region:
                raise KmsError("NotFoundException", f"Invalid arn {parts[3]}")
            place, short = Place(parts[4], parts[3]), parts[5]
        backend = place.backend
        if short.startswith("alias/"):
            # Not moto's own look-up, which makes a key of a service's where a name is reserved.
            found = [key for key in backend.keys.values() if short in key.aliases]
            if not found:
                where = f"arn:aws:kms:{place.region}:{place.account}:{short}"
                raise KmsError("NotFoundException", f"Alias {where} is not found.")
            return found[0]
        key = backend.keys.get(short.removeprefix("key/"))
        if key is None:
            where = f"arn:aws:kms:{place.region}:{place.account}:key/{short.removeprefix('key/')}"
            raise KmsError("NotFoundException", f"Key '{where}' does not exist")
        return key

    def everywhere(self) -> Iterator[Key]:
        """All keys of all accounts and regions."""
        for backend in self._backends():
            yield from backend.keys.values()

    def call(self, operation: str, parameters: Mapping[str, Any], place: Place) -> tuple[int, dict[str, Any]]:
        """Moto's answer to a call: HTTP status and JSON."""
        answer = self._moto.test_client().post(
            "/",
            data=json.dumps(parameters),
            headers={
                "X-Amz-Target": f"TrentService.{operation}",
                "Content-Type": "application/x-amz-json-1.1",
                "Authorization": f"AWS4-HMAC-SHA256 Credential=A/20270101/{place.region}/kms/aws4_request",
                "x-moto-account-id": place.account,
            },
        )
        found = json.loads(answer.data or b"null")
        return answer.status_code, found or {}

    def save(self) -> None:
        """Puts all of it on disk; to be called after each change, before it is answered."""
        tree = [
            {
                "account": key.account_id,
                "region": key.region,
                "id": key.id,
                "material": key.key_material.hex(),
                "deletion_date": key.deletion_date.isoformat() if key.deletion_date else None,
                "aliases": sorted(key.aliases),
                "tags": backend.tagger.get_tag_dict_for_resource(key.id),
                "grants": [{**grant.to_json(), "Token": grant.token} for grant in key.grants.values()],
                **{name: getattr(key, name) for name in _FIELDS},
            }
            for backend in self._backends()
            for key in backend.keys.values()
        ]
        write(self._path, json.dumps(tree, indent=1).encode())

    def _backends(self) -> Iterator[KmsBackend]:
        for regions in kms_backends.values():
            yield from regions.values()

    def _restore(self, tree: list[dict[str, Any]]) -> None:
        for item in tree:
            backend = Place(item["account"], item["region"]).backend
            key = backend.create_key(item["policy"], item["key_usage"], item["key_spec"], item["description"], None)
            del backend.keys[key.id]
            for name in _FIELDS:
                setattr(key, name, item[name])
            key.arn = f"{key.arn.rpartition('/')[0]}/{item['id']}"
            key.id = item["id"]
            key.key_material = bytes.fromhex(item["material"])
            key.deletion_date = datetime.fromisoformat(item["deletion_date"]) if item["deletion_date"] else None
            backend.keys[key.id] = key
            for alias in item["aliases"]:
                backend.create_alias(key.id, alias)
            backend.tag_resource(key.id, item["tags"])
            for found in item["grants"]:
                grant = Grant(
                    key.id,
                    found["Name"],
                    found["GranteePrincipal"],
                    found["Operations"],
                    found["Constraints"],
                    found["RetiringPrincipal"],
                )
                grant.id, grant.token = found["GrantId"], found["Token"]
                key.grants[grant.id] = grant


def encrypt(key: Key, plaintext: bytes, context: Mapping[str, str]) -> bytes:
    """`plaintext` under a key."""
    nonce = os.urandom(_NONCE_BYTES)
    head = _MAGIC + key.id.encode()
    return head + nonce + AESGCM(key.key_material).encrypt(nonce, plaintext, head + _associated(context))


def key_id_of(blob: bytes) -> str:
    """Under which key something was encrypted, as it says itself; InvalidCiphertextException."""
    start, end = len(_MAGIC), len(_MAGIC) + _ID_BYTES
    if not blob.startswith(_MAGIC) or len(blob) < end + _NONCE_BYTES + 16 or not blob[start:end].isascii():
        raise KmsError("InvalidCiphertextException")
    return blob[start:end].decode("ascii")


def decrypt(key: Key, blob: bytes, context: Mapping[str, str]) -> bytes:
    """What was encrypted under a key in this context; InvalidCiphertextException."""
    body = len(_MAGIC) + _ID_BYTES
    head, nonce, sealed = blob[:body], blob[body : body + _NONCE_BYTES], blob[body + _NONCE_BYTES :]
    try:
        return AESGCM(key.key_material).decrypt(nonce, sealed, head + _associated(context))
    except InvalidTag:
        raise KmsError("InvalidCiphertextException") from None


def material_id(key: Key) -> str:
    """`KeyMaterialId`: names the material without telling it."""
    return hashlib.sha256(b"id of key material" + key.key_material).hexdigest()


def _associated(context: Mapping[str, str]) -> bytes:
    return json.dumps(dict(context), sort_keys=True, separators=(",", ":")).encode()
