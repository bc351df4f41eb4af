"""The local state: what a crash at any step leaves, what is never on the disk in the clear, what a backup holds."""

from __future__ import annotations

import copy
import pickle
import secrets
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parley import Member, backup, restore
from parley.disk import Vault, locked, write_file
from parley.spool import content_key
from parley.state import Joined, SignedRoster
from parley_protocol.chain import ChainState
from parley_protocol.errors import MalformedError, StateError, VerificationError
from parley_protocol.identity import PrivateIdentity
from parley_protocol.transcript import Countersignature, Join, Receipt
from support.client import frame_of
from support.paperwire import Desk, PaperSession, both_join, session_of

CHILD = """
import os, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from parley import Member
from parley.state import Joined, State
from parley_protocol.chain import ChainState

key, step, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def reached(name):
    if name == step:
        os.kill(os.getpid(), 9)

state = Member.load(key, reached=reached).state
if kind == "join":
    joined = Joined.from_bytes(Path(sys.argv[4]).read_bytes())
    private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(sys.argv[5]))
    state.begin_join(joined, private, ChainState())
else:
    joined = state.joined(bytes.fromhex(sys.argv[4]))
    state.sign_roster(joined, Path(sys.argv[5]).read_bytes(), lambda key, former: bytes.fromhex(sys.argv[6]))
print("done")
"""


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    made = Desk(tmp_path)
    made.sign()
    return made


def child(member: Member, step: str, *arguments: object) -> int:
    """Runs one change of the state in a process that is killed when it has reached `step`."""
    command = [sys.executable, "-c", CHILD, str(member.path), step, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


def rostered(desk: Desk) -> PaperSession:
    opened = desk.wire.open()
    both_join(desk, opened)
    opened.issue()
    return opened


@pytest.mark.parametrize("step", ["roster-signature", "roster-key-removed", "nowhere"])
def test_a_crash_while_a_roster_is_signed_leaves_one_signature_and_no_key(
    desk: Desk, tmp_path: Path, step: str
) -> None:
    opened = rostered(desk)
    ada, roster = desk.members["ada"], opened.roster
    assert roster is not None
    # What the child will have signed; the parent must send exactly that, and never make another.
    cose_file = tmp_path / "roster"
    cose_file.write_bytes(opened.roster_cose)
    statement = Countersignature(roster.digest, "ada", (), b"\1" * 64)
    signed = ada.identity.sign(statement.to_bytes())
    session = opened.paper.offer.session.hex()
    assert child(ada, step, "roster", session, cose_file, signed.hex()) == (0 if step == "nowhere" else -9)
    if step == "roster-signature":
        assert ada.state.has_roster_key(opened.joins["ada"].roster_key), "killed before the key was unlinked"
    session_of(desk, "ada", opened).countersign()
    assert not ada.state.has_roster_key(opened.joins["ada"].roster_key)
    assert [sent for kind, sent in desk.wire.sent if kind == "countersignature"] == [signed]
    # Another roster of the same join gets nothing.
    opened.issue(expires_at=roster.expires_at + 1)
    with pytest.raises(StateError, match="used up"):
        session_of(desk, "ada", opened).countersign()


@pytest.mark.parametrize("step", ["roster-key", "join", "nowhere"])
def test_a_crash_while_joining_leaves_a_join_that_can_be_sent_or_made_anew(
    desk: Desk, tmp_path: Path, step: str
) -> None:
    opened = desk.wire.open()
    made = session_of(desk, "ada", opened).submit({"visits": frame_of(1)})
    ada = desk.members["ada"]
    session = opened.paper.offer.session
    joined = ada.state.joined(session)
    assert joined is not None and isinstance(made, Receipt) and made.join == joined.join.digest
    # A second join, of which the process is killed.
    roster_key = Ed25519PrivateKey.generate()
    public = roster_key.public_key().public_bytes_raw()
    before = joined.join
    assert isinstance(before, Join)
    join = Join(before.offer, before.party, before.uploads, before.sealed_keys, before.share_digest, public)
    again = Joined(
        *(joined.session, joined.series, joined.agreement, joined.head, joined.offer, joined.document, joined.view),
        ada.identity.sign(join.to_bytes()),
        b"",
    )
    (tmp_path / "joined").write_bytes(again.to_bytes())
    private = roster_key.private_bytes_raw().hex()
    code = child(ada, step, "join", tmp_path / "joined", private)
    assert code == (0 if step == "nowhere" else -9)
    kept = ada.state.joined(session)
    assert kept is not None and ada.state.has_roster_key(kept.join.roster_key), "a kept join can sign its roster"
    assert kept.join.roster_key == (before.roster_key if step == "roster-key" else public)
    session_of(desk, "ada", opened).join()
    session_of(desk, "bea", opened).submit({"visits": frame_of(2)})
    if step != "roster-key":
        assert opened.joins["ada"] == join, "the join on disk is the one that was sent"
    opened.issue()
    session_of(desk, "ada", opened).countersign()


def test_a_join_that_was_never_kept_is_never_sent(desk: Desk) -> None:
    class Stop(Exception):
        pass

    def stop(step: str) -> None:
        if step in ("roster-key", "join"):
            raise Stop

    opened = desk.wire.open()
    with pytest.raises(Stop):
        session_of(desk, "ada", opened, reached=stop).submit({"visits": frame_of(1)})
    assert not [kind for kind, _ in desk.wire.sent if kind == "join"]
    session_of(desk, "ada", opened).submit({"visits": frame_of(1)})


def test_two_processes_change_one_state_one_after_the_other(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from parley.disk import locked
with locked(Path({str(tmp_path / "lock")!r})):
    Path({str(tmp_path / "held")!r}).touch()
    time.sleep(0.5)
    Path({str(tmp_path / "let go")!r}).touch()
"""
    other = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "held").exists():
        assert other.poll() is None
    with locked(tmp_path / "lock"):
        assert (tmp_path / "let go").exists()
    assert other.wait() == 0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    monkeypatch.setattr("parley.disk.os.fsync", _fails)
    with pytest.raises(OSError, match="no space"):
        write_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o600


def _fails(_descriptor: int) -> None:
    raise OSError(28, "no space")


def test_a_damaged_state_is_told_and_not_guessed(desk: Desk) -> None:
    opened = rostered(desk)
    state = desk.members["ada"].state
    for name in (f"series/{desk.agreement.series.hex()}", f"sessions/{opened.paper.offer.session.hex()}"):
        path = state.folder / name
        kept = path.read_bytes()
        path.write_bytes(kept[:-1])
        with pytest.raises(StateError, match="damaged"):
            session_of(desk, "ada", opened).join()
        path.write_bytes(kept)


def test_the_head_never_goes_back(desk: Desk) -> None:
    state, series = desk.members["ada"].state, desk.agreement.series
    state.move_head(series, ChainState(b"\2" * 48, 2, 2, 1))
    for chain in (ChainState(b"\1" * 48, 1, 1, 1), ChainState(b"\3" * 48, 2, 2, 1)):
        with pytest.raises(StateError) as caught:
            state.move_head(series, chain)
        assert caught.value.code == "head"
    with pytest.raises(StateError, match="nothing is known here"):
        state.move_head(b"\x09" * 48, ChainState())
    with pytest.raises(StateError, match="a head is trusted only where it is lost"):
        state.trust(desk.agreement, b"\1" * 48)


def test_a_join_does_not_move_to_a_fork_that_another_process_did_not_follow(desk: Desk) -> None:
    state, series = desk.members["ada"].state, desk.agreement.series
    opened = desk.wire.open()
    both_join(desk, opened)
    joined = state.joined(opened.paper.offer.session)
    assert joined is not None
    state.move_head(series, ChainState(b"\2" * 48, 2, 2, 1))
    fork = ChainState(b"\3" * 48, 2, 2, 1)
    with pytest.raises(StateError) as caught:
        state.begin_join(replace(joined, head=fork.head), Ed25519PrivateKey.generate(), fork)
    assert caught.value.code == "head"
    known = state.series(series)
    assert known is not None and known.head == b"\2" * 48


# Secrets


def test_no_secret_in_repr_str_pickle_or_copy(desk: Desk) -> None:
    opened = rostered(desk)
    session_of(desk, "ada", opened).countersign()
    ada = desk.members["ada"]
    (entry, sealed), *_ = ada.state.uploads(desk.agreement.digest, "visits")
    key = content_key(entry, ada.state.vault)
    assert len(key) == 32
    joined = ada.state.joined(opened.paper.offer.session)
    signed = ada.state.signed_roster(opened.roster.digest)  # type: ignore[union-attr]
    shown = "".join(f"{thing!r}{thing}" for thing in (ada, ada.state, ada.state.vault, entry, sealed, joined, signed))
    for secret in (key, entry.key, ada.identity.derive(b"parley/1/state", b"", 32)):
        assert secret.hex() not in shown and repr(secret)[2:-1] not in shown
    for thing in (ada, ada.identity, ada.state.vault, ada.state):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
        with pytest.raises(TypeError):
            copy.deepcopy(thing)


def test_no_content_key_and_no_one_time_key_stands_in_the_clear(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []
    honest = Ed25519PrivateKey.generate

    def generate() -> Ed25519PrivateKey:
        key = honest()
        made.append(key.private_bytes_raw())
        return key

    monkeypatch.setattr("parley.session.Ed25519PrivateKey", _Keys(generate))
    session_of(desk, "ada", desk.wire.open()).submit({"visits": frame_of(1)})
    state = desk.members["ada"].state
    (entry, _), *_ = state.uploads(desk.agreement.digest, "visits")
    kept = [*made, content_key(entry, state.vault)]
    assert len(kept) == 2
    for path in state.folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, f"{path} is readable by others"
        if path.is_file():
            data = path.read_bytes()
            assert not any(secret in data or secret.hex().encode() in data for secret in kept), path


class _Keys:
    """Stands for Ed25519PrivateKey and remembers what it made."""

    def __init__(self, generate: Any) -> None:
        self.generate = generate


def test_a_vault_opens_for_its_member_and_purpose_alone() -> None:
    mine, other = (Vault(PrivateIdentity.generate(secrets.token_bytes)) for _ in range(2))
    sealed = mine.seal(b"secret", b"purpose")
    assert mine.open(sealed, b"purpose") == b"secret"
    for vault, purpose, data in ((other, b"purpose", sealed), (mine, b"else", sealed), (mine, b"purpose", b"")):
        with pytest.raises(StateError, match="damaged, or of another key"):
            vault.open(data, purpose)


# Backup


def test_a_backup_restores_key_and_state_but_neither_one_time_keys_nor_tables(desk: Desk, tmp_path: Path) -> None:
    opened = rostered(desk)
    ada = desk.members["ada"]
    file = tmp_path / "ada.backup"
    backup(ada, file, "correct horse")
    with pytest.raises(FileExistsError):
        backup(ada, file, "correct horse")
    assert b"BEGIN" not in file.read_bytes() and file.stat().st_mode & 0o777 == 0o600
    path = restore(file, tmp_path / "other machine", "correct horse")
    restored = Member.load(path)
    assert restored.public == ada.public
    assert restored.contacts.list() == ada.contacts.list()
    session = opened.paper.offer.session
    assert restored.state.joined(session) == ada.state.joined(session)
    assert not restored.state.has_roster_key(opened.joins["ada"].roster_key)
    assert not list(restored.state.folder.rglob("blob"))
    # Two clients cannot both sign for one join (F7) ...
    desk.members["ada"] = restored
    with pytest.raises(StateError, match="used up; join again"):
        session_of(desk, "ada", opened).countersign()
    # ... but the restored one can join again with what the coordinator has.
    other = desk.wire.open()
    opened.phase = "lost"
    session_of(desk, "ada", other).join()
    assert other.joins["ada"].uploads == opened.joins["ada"].uploads


def test_a_restore_replaces_nothing_and_needs_the_passphrase(desk: Desk, tmp_path: Path) -> None:
    ada, file = desk.members["ada"], tmp_path / "ada.backup"
    backup(ada, file, "right")
    with pytest.raises(FileExistsError):
        restore(file, ada.path.parent, "right")
    for passphrase in ("wrong", ""):
        with pytest.raises(VerificationError) as caught:
            restore(file, tmp_path / "new", passphrase)
        assert caught.value.code == "passphrase"
    assert not (tmp_path / "new").exists()
    file.write_bytes(b"no backup")
    with pytest.raises(MalformedError, match="not a backup"):
        restore(file, tmp_path / "new", "right")


# Members and contacts


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    made = Member.generate("zoe", tmp_path, passphrase="open sesame")
    assert made.path.stat().st_mode & 0o777 == 0o600
    assert made.state.folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FileExistsError):
        Member.generate("zoe", tmp_path)
    asked: list[str] = []

    def passphrase() -> str:
        asked.append("asked")
        return "open sesame"

    assert Member.load(made.path, passphrase=passphrase).fingerprint == made.fingerprint
    with pytest.raises(VerificationError) as caught:
        Member.load(made.path)
    assert caught.value.code == "passphrase"
    plain = Member.generate("yan", tmp_path)
    Member.load(plain.path, passphrase=passphrase)
    assert asked == ["asked"]
    for name in ("", "a/b", ".hidden", ".."):
        with pytest.raises(MalformedError):
            Member.generate(name, tmp_path)


def test_contacts(tmp_path: Path) -> None:
    ada, bea, eve = (Member.generate(name, tmp_path) for name in ("ada", "bea", "eve"))
    contacts = ada.contacts
    assert contacts.list() == ()
    added = contacts.add(tmp_path / "bea.pub")
    assert (added.name, added.fingerprint, added.confirmed) == ("bea", bea.fingerprint, False)
    with pytest.raises(StateError, match=f"the fingerprint of bea is {bea.fingerprint}"):
        contacts.confirm("bea", eve.fingerprint)
    with pytest.raises(MalformedError, match="16 digits"):
        contacts.confirm("bea", "7f3a")
    assert contacts.confirm("bea", bea.fingerprint.upper().replace("-", " ")).confirmed
    assert contacts.add(tmp_path / "bea.pub").confirmed, "added again it stays confirmed"
    with pytest.raises(StateError, match="known with another key"):
        contacts.put("bea", eve.public)
    assert contacts.add(tmp_path / "ada.pub").confirmed and len(contacts.list()) == 1, "one's own key is left out"
    with pytest.raises(MalformedError):
        contacts.add(tmp_path / "eve.key")
    contacts.remove("bea")
    with pytest.raises(StateError, match="not among your contacts"):
        contacts.get("bea")


def test_what_is_kept_parses_strictly() -> None:
    for kind in (Joined, SignedRoster):
        with pytest.raises(MalformedError):
            kind.from_bytes(b"")
