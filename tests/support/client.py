"""Members with keys, tables and an agreement, before a coordinator with simulated enclaves: for tests of the client."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd

from parley import Connection, Member, connect
from parley_deploy.nsm import LocalRoot, image_measurements
from parley_deploy.pki import system_now_ms
from parley_protocol.agreement.model import Agreement, Measurement, Normalise, Unit
from support import image_tree
from support.coordinator import Coordinator
from support.enclave import Simulation, agreement_of

SITES = ("north", "south", "west")


def frame_of(seed: int, rows: int = 600, people: int = 60) -> pd.DataFrame:
    """A `visits` table with `id` as the identifier."""
    numbers = [(seed * 7919 + row * 104_729) % 1_000_003 for row in range(rows)]
    return pd.DataFrame(
        {
            "id": [f"person {number % people}@{seed % 2}" for number in numbers],
            "amount": [f"{number % 90_000 / 100:.2f}" for number in numbers],
            "score": [(number % 1700) / 100 - 8.5 for number in numbers],
            "site": [SITES[number % 3] for number in numbers],
        }
    )


class Members:
    """Members beside one coordinator. The first one may put agreements and open sessions."""

    def __init__(
        self,
        folder: Path,
        coordinator: Coordinator,
        names: Sequence[str],
        *,
        analysts: Sequence[str] = (),
        **session: Any,
    ) -> None:
        self.folder = folder
        self.coordinator = coordinator
        self.members: dict[str, Member] = {name: Member.generate(name, folder / name) for name in names}
        measured = image_measurements(coordinator.tree)
        simulation = SimpleNamespace(
            root=LocalRoot.load(coordinator.folder / "root"),
            measurement=Measurement(measured[0], measured[1], measured[2]),
        )
        identities = {name: member.identity for name, member in self.members.items()}
        made = agreement_of(cast("Simulation", simulation), identities, analysts=analysts, **session)
        self.agreement: Agreement = replace(made, unit=Unit("person", Normalise.EXACT))
        coordinator.operators(identities[names[0]])
        coordinator.start()
        self.connections: list[Connection] = []

    def confirm(self) -> None:
        """Everybody has compared all fingerprints."""
        for member in self.members.values():
            for name, other in self.members.items():
                if other is not member:
                    member.contacts.put(name, other.public)
                    member.contacts.confirm(name, other.fingerprint)

    def connect(self, name: str) -> Connection:
        """A connection of one member, loaded anew from its files as another process would."""
        member = Member.load(self.members[name].path)
        made = connect(self.coordinator.address, member, self.coordinator.folder / "tls.crt", patience_s=30)
        self.connections.append(made)
        return made

    def sign(self, agreement: Agreement | None = None) -> None:
        """Everybody signs."""
        agreement = agreement or self.agreement
        for name in agreement.members:
            status = self.connect(name).sign(agreement)
        assert status.complete, status.missing

    def csv(self, name: str, frame: pd.DataFrame) -> Path:
        """A member's table as a file."""
        path = self.folder / name / "visits.csv"
        frame.to_csv(path, index=False)
        return path

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


@contextlib.contextmanager
def members(
    folder: Path,
    names: Sequence[str],
    *,
    toml: str = "",
    database: str | None = None,
    blobs: str = "blobs",
    **options: Any,
) -> Iterator[Members]:
    """Members and a running coordinator with its own simulated root, or the one that stands in its folder already."""
    root = folder / "c" / "root"
    if not root.exists():
        root.mkdir(parents=True)
        LocalRoot.create(system_now_ms()).save(root)
    # A copy of the image's tree: whoever edits the sources meanwhile changes no measurement.
    tree = folder / "tree"
    for package in image_tree.PACKAGES:
        shutil.copytree(package, tree / package.name, ignore=shutil.ignore_patterns(*image_tree.LEFT_OUT))
    shutil.copy(image_tree.LOCK, tree)
    command = [
        sys.executable,
        "-m",
        "parley_deploy.enclave",
        "--root",
        str(root),
        "--workers",
        "1",
        "--tree",
        str(tree),
    ]
    with Coordinator(folder / "c", command, toml, database=database, blobs=blobs) as coordinator:
        coordinator.tree = tree
        made = Members(folder, coordinator, names, **options)
        made.confirm()
        try:
            yield made
        finally:
            made.close()


def shown(rows: list[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The rows of the output by site."""
    return {str(row["site"]): row for row in rows}
