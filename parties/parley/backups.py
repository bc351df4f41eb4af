"""Backup and restore: a member's key and state as one encrypted file.

A backup holds neither one-time roster keys nor sealed tables. Without the keys a restored state cannot sign a roster that the
original may have signed meanwhile (F7): it joins again. Without the tables it joins with what the coordinator has already.
Two living copies of one member are still two: each remembers what it signed, not what the other did. Use one at a time.
"""

from __future__ import annotations

import io
import os
import secrets
import tarfile
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from parley.disk import locked, make_folder, sync_folder, write_file
from parley.member import Member
from parley.spool import BLOB
from parley_protocol import limits
from parley_protocol.errors import MalformedError, VerificationError

_MAGIC: Final = b"parley/1/backup\n"
_SALT_BYTES: Final = 16
_NONCE_BYTES: Final = 12
_LEFT_OUT: Final = ("roster-keys", "lock", "uploads.lock")


def backup(member: Member, path: str | Path, passphrase: str) -> None:
    """Writes key and state of a member to one file that `passphrase` opens (scrypt, AES-256-GCM).

    FileExistsError where it is there; VerificationError idn-6 for an empty or endless passphrase.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(17, "is there already; a backup is not overwritten", str(path))
    buffer = io.BytesIO()
    make_folder(member.state.folder)
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar, locked(member.state.folder / "lock"):
        _add(tar, member.path, member.path.name)
        public = member.path.with_suffix(".pub")
        if public.is_file():
            _add(tar, public, public.name)
        for file in sorted(member.state.folder.rglob("*")):
            inner = file.relative_to(member.state.folder)
            kept = (
                file.is_file() and inner.parts[0] not in _LEFT_OUT and not any(p.startswith(".") for p in inner.parts)
            )
            if kept and file.name != BLOB:
                _add(tar, file, f"{member.state.folder.name}/{inner.as_posix()}")
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    sealed = AESGCM(_key(passphrase, salt)).encrypt(nonce, buffer.getvalue(), _MAGIC)
    write_file(path, _MAGIC + salt + nonce + sealed)


def restore(path: str | Path, folder: str | Path, passphrase: str) -> Path:
    """Puts a backup's files into `folder` and returns the path of the key. Nothing that is there is replaced.

    MalformedError where the file is none; VerificationError idn-6, code "passphrase"; FileExistsError.
    """
    data, folder = Path(path).read_bytes(), Path(folder)
    start = len(_MAGIC) + _SALT_BYTES + _NONCE_BYTES
    if not data.startswith(_MAGIC) or len(data) < start:
        raise MalformedError("not a backup")
    salt, nonce = data[len(_MAGIC) : start - _NONCE_BYTES], data[start - _NONCE_BYTES : start]
    try:
        plain = AESGCM(_key(passphrase, salt)).decrypt(nonce, data[start:], _MAGIC)
    except InvalidTag:
        raise VerificationError("idn-6", "the passphrase is wrong, or the file is damaged", code="passphrase") from None
    with tarfile.open(fileobj=io.BytesIO(plain), mode="r:gz") as tar:
        members = tar.getmembers()
        keys = [member.name for member in members if member.name.endswith(".key") and "/" not in member.name]
        if len(keys) != 1 or not all(member.isfile() for member in members):
            raise MalformedError("not a backup")
        for name in (keys[0], Path(keys[0]).with_suffix(".pub").name, Path(keys[0]).with_suffix(".state").name):
            if (folder / name).exists():
                raise FileExistsError(17, "is there already; a restore replaces nothing", str(folder / name))
        folder.mkdir(parents=True, exist_ok=True)
        # The key last: a state without its key is nothing, a key without its state could begin anew.
        for member in sorted(members, key=lambda member: member.name in keys):
            target = (folder / member.name).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise MalformedError("not a backup")
            file = tar.extractfile(member)
            assert file is not None
            make_folder(target.parent)
            write_file(target, file.read())
            os.utime(target, (member.mtime, member.mtime))
    sync_folder(folder)
    return folder / keys[0]


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    entry = tarfile.TarInfo(name)
    data = path.read_bytes()
    entry.size, entry.mode, entry.mtime = len(data), 0o600, path.stat().st_mtime
    tar.addfile(entry, io.BytesIO(data))


def _key(passphrase: str, salt: bytes) -> bytes:
    secret = passphrase.encode("utf-8", "surrogatepass")
    if not 0 < len(secret) <= limits.PASSPHRASE_BYTES:
        raise VerificationError("idn-6", f"a passphrase has 1 to {limits.PASSPHRASE_BYTES} bytes", code="passphrase")
    return Scrypt(salt=salt, length=32, n=limits.SCRYPT_N, r=8, p=1).derive(secret)
