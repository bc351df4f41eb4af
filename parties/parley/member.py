"""A member as it stands on its own machine: private key, address book, local state."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from parley.contacts import Contacts
from parley.disk import make_folder, sync_folder, write_file
from parley.state import Reached, State
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.claims import verify_agreement_signature
from parley_protocol.errors import MalformedError, RefusedError, StateError, VerificationError
from parley_protocol.identity import (
    PrivateIdentity,
    PublicIdentity,
    dump_private,
    dump_public,
    load_private,
    needs_passphrase,
)

Passphrase = str | Callable[[], str | None] | None


class Member:
    """A key holder. `name` is the name of the key's file; the name in an agreement is found by the key."""

    def __init__(self, path: Path, identity: PrivateIdentity, *, reached: Reached | None = None) -> None:
        self.path = path
        self.name = path.stem
        self.identity = identity
        self.state = State(path.with_suffix(".state"), identity, reached=reached)
        self.contacts = Contacts(self.state.folder, identity.public)

    def __repr__(self) -> str:
        return f"Member({self.name}, {self.fingerprint})"

    def __reduce__(self) -> str:
        raise TypeError("a member holds a private key, which is not pickled")

    @classmethod
    def generate(cls, name: str, folder: str | Path = ".", *, passphrase: str | None = None) -> Member:
        """Fresh keys: NAME.key, for nobody else to read (0600), NAME.pub for the others, NAME.state beside them.

        FileExistsError where one of them is there already.
        """
        folder = Path(folder)
        if not name or name != Path(name).name or name.startswith("."):
            raise MalformedError("a name is a name of a file, without a folder")
        identity = PrivateIdentity.generate(secrets.token_bytes)
        private, public = folder / f"{name}.key", folder / f"{name}.pub"
        for path in (private, public, folder / f"{name}.state"):
            if path.exists():
                raise FileExistsError(17, "is there already; a key is never overwritten", str(path))
        folder.mkdir(parents=True, exist_ok=True)
        _write_new(private, dump_private(identity, passphrase, random=secrets.token_bytes), 0o600)
        _write_new(public, dump_public(identity.public), 0o644)
        sync_folder(folder)
        make_folder(folder / f"{name}.state")
        return cls(private, identity)

    @classmethod
    def load(cls, path: str | Path, *, passphrase: Passphrase = None, reached: Reached | None = None) -> Member:
        """The member of a private file; a callable `passphrase` is asked only where the file has one.

        MalformedError where the file is none; VerificationError idn-6, code "passphrase".
        """
        path = Path(path)
        data = path.read_bytes()
        if callable(passphrase):
            passphrase = passphrase() if needs_passphrase(data) else None
        return cls(path, load_private(data, passphrase), reached=reached)

    @property
    def public(self) -> PublicIdentity:
        """What others know of this member."""
        return self.identity.public

    @property
    def fingerprint(self) -> str:
        """What people read to each other, such as "7f3a-91c2-0b5e-d4d8"."""
        return self.public.fingerprint

    def name_in(self, agreement: Agreement) -> str:
        """This member's name in an agreement; RefusedError "not-a-member" where its key is not there."""
        name = next((name for name, public in agreement.members.items() if public == self.public), None)
        if name is None:
            raise RefusedError("not-a-member", f"your key is not in {agreement.title}")
        return name

    def sign(
        self, agreement: Agreement, signed: SignedAgreement | None = None, *, trust_head: bytes | None = None
    ) -> bytes:
        """This member's signature (COSE_Sign1) of an agreement; it creates the state of the series.

        `signed`: the signatures that are known elsewhere, so that a lost state is noticed. StateError where a member's
        fingerprint is not confirmed (F9), where another version stands signed, where the state of the series is lost.
        """
        name = self.name_in(agreement)
        unconfirmed = self.contacts.unconfirmed(agreement)
        if unconfirmed:
            names = ", ".join(f"{contact.name} {contact.fingerprint}" for contact in unconfirmed[:8])
            raise StateError(f"not signed: compare these fingerprints with their owners, and confirm them: {names}")
        if signed is not None and self.state.series(agreement.series) is None and name in signed.signatures:
            try:
                verify_agreement_signature(signed.signatures[name], agreement, name)
            except (MalformedError, VerificationError):
                pass  # not ours: whoever made it, there is no lost state
            else:
                raise StateError("you signed this before, and your state of it is lost: restore it, or trust a head")
        return self.state.sign(agreement, name, trust_head=trust_head)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    if mode == 0o600:
        # Not write_file: a key must not replace one that appears meanwhile.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    else:
        write_file(path, data, mode)
