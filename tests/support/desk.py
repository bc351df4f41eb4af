"""The coordinator's parts in this process, without server and enclave, and an agreement of two parties and an analyst."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from parley_coordinator.agreements import Agreements
from parley_coordinator.blobs import BlobStore, Directory
from parley_coordinator.config import Quotas
from parley_coordinator.inbox import Inbox
from parley_coordinator.leases import Lease, Leases
from parley_coordinator.models import Operator, SessionRow
from parley_coordinator.node import Identity
from parley_coordinator.releases import Releases
from parley_coordinator.store import Store
from parley_coordinator.uploads import Uploads, UploadView
from parley_deploy.nsm import LocalRoot, image_measurements
from parley_protocol.agreement.model import Agreement, Measurement
from parley_protocol.agreement.signed import sign
from parley_protocol.identity import PrivateIdentity
from support.enclave import Party, Sealed, Simulation, agreement_of, identities, rows_of

NOW = 1_800_000_000_000
SESSION = b"s" * 16
MEMBERS: Mapping[str, PrivateIdentity] = identities(["ann", "bob", "cyd"])
STRANGER = PrivateIdentity.generate(os.urandom)
MEASURED = image_measurements(None)
SIMULATION = cast(
    "Simulation",
    SimpleNamespace(root=LocalRoot.create(NOW), measurement=Measurement(MEASURED[0], MEASURED[1], MEASURED[2])),
)


def make_agreement(**session: Any) -> Agreement:
    """ann and bob bring `visits`, cyd is the analyst; ann starts."""
    return agreement_of(SIMULATION, MEMBERS, analysts=["cyd"], **session)


def key(name: str) -> bytes:
    """A member's signing key."""
    return MEMBERS[name].public.signing


class Desk:
    """Store, blobs and what works on them; `now` is the clock. ann's key is the operator's only one."""

    def __init__(
        self, folder: Path, quotas: Quotas = Quotas(), *, database: str | None = None, blobs: BlobStore | None = None
    ) -> None:  # frozen
        self.now = NOW
        self.store = Store(database or f"sqlite:///{folder / 'c.db'}")
        self.blobs = blobs or Directory(folder / "blobs")
        self.agreements = Agreements(self.store, quotas, self.clock)
        self.uploads = Uploads(self.store, self.blobs, quotas, self.clock, handover_s=1.0)
        self.releases = Releases(self.store, self.blobs, self.clock)
        self.inbox = Inbox(self.store, self.clock)
        self.leases = Leases(self.store, Identity("holder", "node"), lease_s=10, abandon_s=60)
        with self.store.write() as session:
            session.add(Operator(key=key("ann"), label="ann", added_ms=NOW))

    def clock(self) -> int:
        """The time."""
        return self.now

    def sign(self, agreement: Agreement, *names: str) -> None:
        """Puts an agreement and signs it, by all when none is named."""
        self.agreements.put(key("ann"), agreement.canonical)
        for name in names or agreement.members:
            self.agreements.sign(key(name), agreement.digest, name, sign(agreement, name, MEMBERS[name]))

    def open(self, agreement: Agreement) -> tuple[int, Lease]:
        """An open session of an agreement that is here, with no enclave behind it: its number and its lease."""
        with self.store.write() as session:
            row = SessionRow(
                session=SESSION,
                agreement=agreement.digest,
                series=agreement.series,
                begin=b"b" * 16,
                phase="open",
                offer=b"o",
                document=b"d",
                start=None,
                roster=None,
                opened_ms=NOW,
                ended_ms=None,
            )
            session.add(row)
            session.flush()
            return row.number, self.leases.add(session, row.number)

    def sealed(self, agreement: Agreement, name: str, rows: int = 1000) -> Sealed:
        """A party's sealed table."""
        return Party(agreement, name, MEMBERS[name], {"visits": rows_of(1, rows)}).sealed[0]

    def upload(self, sealed: Sealed, name: str, start: int = 0, end: int | None = None) -> UploadView:
        """Writes bytes of a blob as one stream does."""
        row = self.uploads.begin(key(name), sealed.cose)
        with self.uploads.writing(row) as writing:
            stop = len(sealed.blob) if end is None else end
            for at in range(start, stop, 1 << 20):
                writing.write(at, sealed.blob[at : min(at + (1 << 20), stop)])
            return writing.sync()

    def waiting(self, name: str) -> list[str]:
        """Kinds of what waits for a member."""
        from parley_protocol.v1.coordinator_pb2 import InboxItem

        return [InboxItem.Kind.Name(item.kind).removeprefix("KIND_") for item in self.inbox.items(key(name))]
