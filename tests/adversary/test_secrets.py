"""Secrets have no text form: not in prints, logs, tracebacks and pickles, and not in what a coordinator keeps."""

from __future__ import annotations

import base64
import copy
import dataclasses
import importlib
import os
import pickle
import pkgutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import parley
import parley_coordinator
import parley_enclave
import parley_protocol
from parley.disk import Vault
from parley.member import Member
from parley.reading import PreparedTable
from parley_enclave.admission import Brought, Checked, Opened
from parley_enclave.engine.frames import Admitted, Source
from parley_enclave.keys import SessionKeys
from parley_enclave.session import Session
from parley_protocol import hpke
from parley_protocol.chain import ChainState
from parley_protocol.errors import DataError, ParleyError
from parley_protocol.secret import Secret
from parley_protocol.table import Layout
from parley_protocol.transcript import JoinKeys, SealedOutput
from support.client import frame_of, members
from support.world import World, world

ROLES: tuple[ModuleType, ...] = (parley_protocol, parley_enclave, parley_coordinator, parley)
NAMES = frozenset(
    {
        "content_key", "content_keys", "frame_key", "guard_key", "key", "keys", "noise_share", "padded", "plaintext",
        "private", "salt", "sealing_private", "secret", "share", "signing_private", "tags", "index", "rows", "shares",
        "cells", "data", "columns_data", "passphrase",
    }
)  # fmt: skip
"""Fields that hold a secret or the parties' data wherever they stand."""
PUBLIC = frozenset(
    {
        # Names and sizes that agreements state, or what a coordinator stores: not keys and not data.
        "Column", "Table", "Output", "OutputTable", "OutputColumn", "Layout", "Grouping", "Value", "Limit", "Unit",
    }
)  # fmt: skip

HARMLESS = frozenset(
    {
        # Counts that only the party itself has; a register of the module; an index that prints nothing of itself; public
        # keys of callers; the id of a KMS key.
        "parley_coordinator.events.Happened.keys",
        "parley_coordinator.guard.Call.key",
        "parley_protocol.agreement.key_arn.KeyArn.key",
        "parley.spool.SealedTable.rows",
        "parley.reading.PreparedTable.rows",
        "parley_enclave.nsm.Register.data",
        "parley_enclave.engine.planning.Input.index",
    }
)


def modules() -> Iterator[ModuleType]:
    for role in ROLES:
        for found in pkgutil.walk_packages(role.__path__, f"{role.__name__}."):
            if not found.name.endswith("__main__") and ".migrations" not in found.name and "_pb2" not in found.name:
                yield importlib.import_module(found.name)


def dataclasses_of_all_roles() -> Iterator[type[Any]]:
    for module in modules():
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__ and dataclasses.is_dataclass(value):
                yield value


def held_secrets() -> dict[str, tuple[object, list[bytes]]]:
    """An instance of each class that holds a secret, and the secrets in it."""
    w: World = world()
    key, share, salt, plain = (bytes([65 + place]) * 32 for place in range(4))
    identity = w.members["ada"]
    signing, sealing = identity.private_blocks()
    raw = Ed25519PrivateKey.generate()
    sealing_key = hpke.generate_sealing_key(os.urandom)
    header = w.uploads["ada"].header
    layout = Layout.of(header, w.agreement.tables["visits"].widths)
    brought = Brought(w.uploads["ada"], 7, key)
    opened = Opened(w.joins["ada"], (brought,), share)
    session_keys = SessionKeys(raw, sealing_key)
    running = Session(w.agreement, bytes(16), w.paper.offer, ChainState(), session_keys, key)
    numbers = np.full(4, 0x4242424242424242, "<u8")
    return {
        "PrivateIdentity": (identity, [signing, sealing, signing[-32:], sealing[:32]]),
        "SealingKey": (sealing_key, [sealing_key.private_bytes()]),
        "SessionKeys": (session_keys, [sealing_key.private_bytes(), raw.private_bytes_raw()]),
        "JoinKeys": (JoinKeys((key,), share), [key, share]),
        "SealedOutput": (SealedOutput.of(salt, plain, 100), [salt, plain]),
        "Brought": (brought, [key]),
        "Opened": (opened, [key, share]),
        "Checked": (Checked(4711, key, share), [key, share, b"4711"]),
        "Session": (running, [key, raw.private_bytes_raw(), sealing_key.private_bytes()]),
        "Source": (Source("ada", "visits", header, layout, 7, key), [key]),
        "Admitted": (Admitted(4711, key, share), [key, share, b"4711"]),
        "Vault": (Vault(identity), [identity.derive(b"parley/1/state", b"", 32)]),
        "PreparedTable": (
            PreparedTable("visits", 4, 0, 4, (), (numbers,)),
            [numbers.tobytes(), b"4702111234567890594", b"4774451407313060418"],
        ),
    }


def forms(secret: bytes) -> list[str]:
    """How a secret may stand in a text."""
    return [
        repr(secret)[2:-1],
        secret.hex(),
        secret.hex().upper(),
        base64.b64encode(secret).decode().rstrip("="),
        base64.urlsafe_b64encode(secret).decode().rstrip("="),
        str(list(secret))[1:-1],
    ]


def printed(thing: object) -> list[str]:
    """All that a program prints of something, in the frames of an error too."""

    def fails(held: object) -> None:
        raise RuntimeError(f"{held} {held!r}")

    texts = [repr(thing), str(thing), f"{thing}", f"{[thing]!r} { ({'x': thing})!r}"]
    try:
        fails(thing)
    except RuntimeError as error:
        found = traceback.TracebackException.from_exception(error, capture_locals=True)
        texts.append("".join(found.format()))
    return texts


@pytest.mark.parametrize("name", list(held_secrets()))
def test_no_secret_is_printed_logged_or_pickled(name: str) -> None:
    thing, secrets = held_secrets()[name]
    for text in printed(thing):
        for secret in secrets:
            shown = [form for form in (forms(secret) if len(secret) > 20 else [secret.decode()]) if form in text]
            assert not shown, f"{name} prints a secret"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError):
            pickle.dumps(thing, protocol)
    with pytest.raises(TypeError):
        copy.copy(thing)
    with pytest.raises(TypeError):
        copy.deepcopy(thing)


def test_fields_that_hold_secrets_do_not_print() -> None:
    found = list(dataclasses_of_all_roles())
    assert len(found) > 60
    shown = [
        f"{kind.__module__}.{kind.__name__}.{field.name}"
        for kind in found
        if kind.__name__ not in PUBLIC
        for field in dataclasses.fields(kind)
        if field.name in NAMES and field.repr and "Callable" not in str(field.type)
    ]
    assert not set(shown) - HARMLESS


def test_every_class_that_holds_a_key_is_a_secret() -> None:
    keys = {"content_key", "content_keys", "frame_key", "guard_key", "noise_share"}
    for kind in dataclasses_of_all_roles():
        if keys & {field.name for field in dataclasses.fields(kind)}:
            assert issubclass(kind, Secret), kind


def test_errors_tell_no_value_of_a_table(tmp_path: Path) -> None:
    """A file that is wrong in each way gets a message with its place, and without what stands there."""
    from parley.reading import prepare

    w = world()
    good = "id,amount,score,site\n" + "".join(f"secret-person-{n},12.00,0.5,north\n" for n in range(5))
    spoiled = {
        "amount": good + "secret-person-9,777123secret,0.5,north\n",
        "range": good + "secret-person-9,99999999.25,0.5,north\n",
        "score": good + "secret-person-9,1.00,7771234.5,north\n",
        "category": good + "secret-person-9,1.00,0.5,secretplace\n",
        "column": good.replace("site", "secretcolumn"),
        "ragged": good + "secret-person-9,1.00\n",
    }
    told = 0
    for name, text in spoiled.items():
        path = tmp_path / f"{name}.csv"
        path.write_text(text)
        with pytest.raises((DataError, ParleyError)) as caught:
            prepare(path, w.agreement, "visits")
        shown = "".join(traceback.format_exception(caught.value))
        for value in ("secret-person", "777123", "99999999", "secretplace"):
            assert value not in shown.split("DataError")[-1], (name, value)
        told += "row" in str(caught.value)
    assert told >= 3


def test_a_session_leaves_no_key_value_or_name_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A whole session on the real system, then a search through all that coordinator and enclave keep, log and print."""
    secrets: dict[str, bytes] = {}
    with members(tmp_path, ("ann", "bob"), start=("ann",)) as made:
        made.sign()
        frames = {name: marked(name, frame_of(seed, 400)) for seed, name in enumerate(("ann", "bob"))}
        session = made.connect("ann").open(made.agreement)
        for name, frame in frames.items():
            mine = made.connect(name).session(session.id)
            mine.submit({"visits": made.csv(name, frame)})
            state = mine.member.state
            secrets |= secrets_of(name, mine.member)
            joined = state.joined(session.id)
            assert joined is not None
            public = joined.join.roster_key
            sealed = (state.folder / "roster-keys" / public.hex()).read_bytes()
            secrets[f"{name}'s one-time key"] = state.vault.open(sealed, b"roster-key" + public)
        made.connect("ann").session(session.id).start()
        for name in frames:
            made.connect(name).session(session.id).countersign()
        made.connect("bob").session(session.id).wait(timeout_s=60)
        release = made.connect("bob").session(session.id).release()
        total = {str(row["site"]): str(row["total"]) for row in release["by_site"].rows}
    assert len(set(total.values())) == 3
    values = [*total.values(), "MARKED-PERSON", "4321.09"]
    found = search([tmp_path / "c"], secrets, values)
    assert not found
    out, err = capfd.readouterr()
    for text in (out, err):
        assert not any(value in text for value in values)
    # The members' own states keep the keys sealed and the tables nowhere but in the files that they brought.
    for name in frames:
        kept = search([tmp_path / name / f"{name}.state"], secrets, ["MARKED-PERSON", "4321.09"])
        assert not kept
    # The search finds what is there: the file that ann brought, and the key that she holds.
    assert search([tmp_path / "ann"], secrets, ["MARKED-PERSON"])


def marked(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """A table whose identifiers and one amount are easily found."""
    frame["id"] = [f"MARKED-PERSON-{value}" for value in frame["id"]]
    frame.loc[0, "amount"] = "4321.09"
    return frame


def secrets_of(name: str, member: Member) -> dict[str, bytes]:
    """The keys of a member: its identity, the content keys of its uploads, its noise share's parent."""
    from parley.spool import content_key

    signing, sealing = member.identity.private_blocks()
    found = {f"{name}'s signing key": signing[-32:], f"{name}'s sealing key": sealing}
    state = member.state
    for folder in state.spool.iterdir():
        entry = state.upload(bytes.fromhex(folder.name))
        found[f"{name}'s content key"] = content_key(entry, state.vault)
    return found


def search(folders: list[Path], secrets: dict[str, bytes], values: list[str]) -> list[str]:
    """Where a secret or a value stands in a file, in any of its forms."""
    wanted = {f"{what}: {form[:4]}": form.encode() for what, secret in secrets.items() for form in forms(secret)}
    wanted |= {f"{what} raw": secret for what, secret in secrets.items()}
    wanted |= {value: value.encode() for value in values}
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_socket():
                data = path.read_bytes()
                found += [f"{path.name}: {what}" for what, form in wanted.items() if form in data]
    return found
