"""The address book: whose key is whose, once people have compared fingerprints. Names in agreements prove nothing (F9)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parley.disk import locked, make_folder, write_file
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import MalformedError, StateError
from parley_protocol.identity import PublicIdentity, load_public


@dataclass(frozen=True, slots=True)
class Contact:
    """A name and its key; `confirmed` once the fingerprint was compared with the owner."""

    name: str
    public: PublicIdentity
    confirmed: bool

    @property
    def fingerprint(self) -> str:
        """What people read to each other."""
        return self.public.fingerprint


class Contacts:
    """The contacts of one member, in `folder`."""

    def __init__(self, folder: Path, own: PublicIdentity) -> None:
        self._folder = folder
        self._file = folder / "contacts.json"
        self._own = own

    def list(self) -> tuple[Contact, ...]:
        """All contacts, by name."""
        return tuple(
            Contact(name, PublicIdentity.from_bytes(bytes.fromhex(entry["public"])), entry["confirmed"] is True)
            for name, entry in sorted(self._read().items())
        )

    def get(self, name: str) -> Contact:
        """The contact of this name; StateError where there is none."""
        contact = next((contact for contact in self.list() if contact.name == name), None)
        if contact is None:
            raise StateError(f"{name} is not among your contacts")
        return contact

    def add(self, path: str | Path, name: str | None = None) -> Contact:
        """Adds the key in a public file, named like the file unless `name` is given; not confirmed yet."""
        path = Path(path)
        return self.put(name or path.stem, load_public(path.read_bytes()))

    def put(self, name: str, public: PublicIdentity) -> Contact:
        """Adds a key under a name; StateError where the name stands for another key already. One's own key is left out."""
        return self.put_all({name: public})[0]

    def put_all(self, keys: Mapping[str, PublicIdentity]) -> tuple[Contact, ...]:
        """`put` for each of `keys`: all of them, or none where one is refused."""
        found = []
        with self._changing() as entries:
            for name, public in keys.items():
                if public == self._own:
                    found.append(Contact(name, public, True))
                    continue
                text = public.to_bytes().hex()
                entry = entries.setdefault(name, {"public": text, "confirmed": False})
                if entry["public"] != text:
                    raise StateError(
                        f"{name} is known with another key; remove that contact first if its owner has a new one"
                    )
                found.append(Contact(name, public, entry["confirmed"] is True))
        return tuple(found)

    def confirm(self, name: str, fingerprint: str) -> Contact:
        """Notes that `fingerprint` was compared with its owner; StateError where it is not the one of this contact."""
        return self.confirm_all({name: fingerprint})[0]

    def confirm_all(self, fingerprints: Mapping[str, str]) -> tuple[Contact, ...]:
        """`confirm` for each of `fingerprints`: all of them, or none where one is refused."""
        found = []
        with self._changing() as entries:
            known = {contact.name: contact for contact in self.list()}
            for name, fingerprint in fingerprints.items():
                contact = known.get(name) or self.get(name)
                if _digits(fingerprint) != _digits(contact.fingerprint):
                    raise StateError(
                        f"the fingerprint of {name} is {contact.fingerprint}, not the one that you were told"
                    )
                entries[name]["confirmed"] = True
                found.append(Contact(name, contact.public, True))
        return tuple(found)

    def remove(self, name: str) -> None:
        """Forgets a contact."""
        with self._changing() as entries:
            if entries.pop(name, None) is None:
                raise StateError(f"{name} is not among your contacts")

    def unconfirmed(self, agreement: Agreement) -> tuple[Contact, ...]:
        """The other members of an agreement whose key, under this name, is not confirmed."""
        confirmed = {(contact.name, contact.public) for contact in self.list() if contact.confirmed}
        return tuple(
            Contact(name, public, False)
            for name, public in agreement.members.items()
            if public != self._own and (name, public) not in confirmed
        )

    @contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The entries for a change under the lock, written at its end."""
        make_folder(self._folder)
        with locked(self._folder / "lock"):
            entries = self._read()
            yield entries
            write_file(self._file, json.dumps(entries, indent=1, sort_keys=True, ensure_ascii=False).encode())

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self._file.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise StateError(f"{self._file} is damaged") from None
        if not isinstance(found, dict):
            raise StateError(f"{self._file} is damaged")
        return found


def _digits(fingerprint: str) -> str:
    text = "".join(fingerprint.lower().replace("-", " ").split())
    if len(text) != 16 or any(digit not in "0123456789abcdef" for digit in text):
        raise MalformedError("a fingerprint has 16 digits, such as 7f3a-91c2-0b5e-d4d8")
    return text
