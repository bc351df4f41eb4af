"""The command line without a coordinator: keys, contacts, agreements, exit codes, help, and what errors say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from parley.cli import exits
from parley.cli.app import run
from parley_deploy.demo import DEMOS, agreement_members, agreement_text
from parley_deploy.pki import LocalRoot
from parley_protocol.identity import PrivateIdentity, dump_public

Result = tuple[int, str, str]
Parley = Callable[..., Result]


@pytest.fixture
def parley(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Parley:
    """Runs a command line in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PARLEY_")]:
        monkeypatch.delenv(name)

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = run(arguments)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def agreement_folder(folder: Path, name: str = "pay") -> Path:
    """The files of a demo's agreement with fresh keys, a fresh root and made-up measurements."""
    demo = DEMOS[name]
    (folder / "keys").mkdir(parents=True)
    for member in agreement_members(demo):
        (folder / "keys" / f"{member}.pub").write_bytes(dump_public(PrivateIdentity.generate(os.urandom).public))
    (folder / "simulated-root.pem").write_bytes(LocalRoot.create(1_790_000_000_000).pem)
    registers = {f"PCR{index}": bytes([index + 1]).hex() * 48 for index in range(3)}
    (folder / "measurements.json").write_text(json.dumps({"Measurements": registers}))
    (folder / demo.file).write_text(agreement_text(demo))
    return folder / demo.file


# Keys and contacts


def test_keygen_writes_two_files_and_says_the_fingerprint(parley: Parley, tmp_path: Path) -> None:
    code, out, _ = parley("keygen", "AA")
    assert code == 0
    assert (tmp_path / "AA.key").stat().st_mode & 0o777 == 0o600
    assert out.splitlines()[1].split()[-1].count("-") == 3
    assert "PRIVATE" not in out


def test_keygen_overwrites_nothing(parley: Parley, tmp_path: Path) -> None:
    parley("keygen", "AA")
    before = (tmp_path / "AA.key").read_bytes()
    code, _, err = parley("keygen", "AA")
    assert code == exits.Exit.USAGE
    assert "AA.key" in err
    assert (tmp_path / "AA.key").read_bytes() == before


def test_a_contact_counts_once_its_fingerprint_was_compared(parley: Parley) -> None:
    parley("keygen", "me")
    _, out, _ = parley("keygen", "BB", "--dir", "others", "--json")
    fingerprint = json.loads(out)["fingerprint"]
    assert parley("contact", "add", "others/BB.pub", "--key", "me.key")[0] == 0
    assert "not confirmed" in parley("contact", "list")[1]
    code, _, err = parley("contact", "confirm", "BB", "0000-0000-0000-0000")
    assert code == exits.Exit.REFUSED
    assert "not the one that you were told" in err
    assert parley("contact", "confirm", "BB", fingerprint)[0] == 0
    assert json.loads(parley("contact", "list", "--json")[1])["confirmed"] is True


def test_a_list_of_fingerprints_is_confirmed_as_a_whole_or_not_at_all(parley: Parley, tmp_path: Path) -> None:
    parley("keygen", "me")
    told = []
    for name in ("BB", "CC"):
        told.append((name, json.loads(parley("keygen", name, "--dir", "others", "--json")[1])["fingerprint"]))
    parley("contact", "add", "others/BB.pub", "others/CC.pub")
    wrong = f"# by phone\n{told[0][0]}  {told[0][1]}\nCC  0000-0000-0000-0000\n"
    (tmp_path / "heard").write_text(wrong)
    assert parley("contact", "confirm", "--from", "heard")[0] == exits.Exit.REFUSED
    assert parley("contact", "list")[1].count("not confirmed") == 2
    (tmp_path / "heard").write_text("".join(f"{name} {text}\n" for name, text in told))
    assert parley("contact", "confirm", "--from", "heard")[0] == 0
    assert "not confirmed" not in parley("contact", "list")[1]


def test_confirming_without_a_terminal_and_without_a_fingerprint_is_no(parley: Parley) -> None:
    parley("keygen", "me")
    parley("keygen", "BB", "--dir", "others")
    parley("contact", "add", "others/BB.pub")
    code, _, err = parley("contact", "confirm", "BB")
    assert code == exits.Exit.REFUSED
    assert "not confirmed" in err


@pytest.mark.parametrize("keys", [[], ["AA", "BB"]])
def test_the_key_must_be_clear(parley: Parley, keys: list[str]) -> None:
    for name in keys:
        parley("keygen", name)
    code, _, err = parley("contact", "list")
    assert code == exits.Exit.USAGE
    assert "PARLEY_KEY" in err


def test_the_key_may_come_from_the_environment(parley: Parley, monkeypatch: pytest.MonkeyPatch) -> None:
    parley("keygen", "AA")
    parley("keygen", "BB")
    monkeypatch.setenv("PARLEY_KEY", "BB.key")
    assert parley("receipts")[0] == 0


def test_a_passphrase_is_asked_for_and_never_shown(parley: Parley, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_PASSPHRASE", "correct horse")
    code, out, err = parley("keygen", "AA", "--passphrase")
    assert code == 0
    assert parley("receipts")[0] == 0
    monkeypatch.setenv("PARLEY_PASSPHRASE", "wrong horse")
    code, out, err = parley("receipts")
    assert code == exits.Exit.REFUSED
    assert "horse" not in out + err
    monkeypatch.delenv("PARLEY_PASSPHRASE")
    code, _, err = parley("receipts")
    assert code == exits.Exit.USAGE
    assert "PARLEY_PASSPHRASE" in err


def test_backup_and_restore_bring_key_and_state_back(
    parley: Parley, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parley("keygen", "AA")
    parley("keygen", "BB", "--dir", "others")
    parley("contact", "add", "others/BB.pub")
    assert parley("backup", "AA.backup")[0] == exits.Exit.USAGE
    monkeypatch.setenv("PARLEY_BACKUP_PASSPHRASE", "a long one")
    assert parley("backup", "AA.backup")[0] == 0
    assert parley("backup", "AA.backup")[0] == exits.Exit.USAGE
    assert parley("restore", "AA.backup", "--dir", "there")[0] == 0
    assert (tmp_path / "there" / "AA.key").read_bytes() == (tmp_path / "AA.key").read_bytes()
    assert "BB" in parley("contact", "list", "--key", "there/AA.key")[1]
    monkeypatch.setenv("PARLEY_BACKUP_PASSPHRASE", "another one")
    assert parley("restore", "AA.backup", "--dir", "elsewhere")[0] == exits.Exit.REFUSED


# Agreements


def test_check_names_file_line_and_field(parley: Parley, tmp_path: Path) -> None:
    file = agreement_folder(tmp_path / "draft")
    assert parley("agreement", "check", str(file))[0] == 0
    text = file.read_text()
    file.write_text(text.replace("max: 500000", "max: 5"))
    line = next(number for number, row in enumerate(text.splitlines(), 1) if "max: 500000" in row)
    code, out, _ = parley("agreement", "check", str(file))
    assert code == exits.Exit.DATA
    assert out.splitlines()[0].startswith(f"{file}:{line}  tables.staff.columns.salary.max: ")
    assert out.splitlines()[-1] == "1 error"


def test_check_says_digest_and_notes(parley: Parley, tmp_path: Path) -> None:
    file = agreement_folder(tmp_path / "draft", "flights")
    code, out, _ = parley("agreement", "check", str(file))
    assert code == 0
    assert out.startswith("flights-by-engine, version 1: 18 members, 2 tables, 1 output.  Digest ")
    assert "registry receives no output" in out
    facts = json.loads(parley("agreement", "check", str(file), "--json")[1])
    assert len(facts["digest"]) == 96
    assert facts["parties"][-1] == "registry"


def test_show_prints_effective_rules_and_what_they_mean(parley: Parley, tmp_path: Path) -> None:
    file = agreement_folder(tmp_path / "draft", "flights")
    code, out, _ = parley("agreement", "show", str(file))
    assert code == 0
    assert "max_releases: 4" in out
    assert "10 aircraft and 4 carriers behind each value (10 and 3, whichever one of them is taken away)" in out
    assert "SIMULATED" in out


def test_the_draft_of_new_is_right_but_for_its_files(parley: Parley, tmp_path: Path) -> None:
    assert parley("agreement", "new", "mine")[0] == 0
    code, out, _ = parley("agreement", "check", "mine.yaml")
    assert code == exits.Exit.DATA
    assert all("cannot be read" in line for line in out.splitlines()[:-1])
    agreement_folder(tmp_path / "draft")
    for name in ("simulated-root.pem", "measurements.json"):
        shutil.copy(tmp_path / "draft" / name, tmp_path)
    for name in ("north", "south", "west", "east", "analyst"):
        parley("keygen", name, "--dir", "keys")
    assert parley("agreement", "check", "mine.yaml")[0] == 0
    assert parley("agreement", "new", "mine")[0] == exits.Exit.USAGE


def test_a_missing_file_is_one_line(parley: Parley) -> None:
    code, out, err = parley("agreement", "check", "nothing.yaml")
    assert code == exits.Exit.USAGE
    assert out == ""
    assert err.splitlines() == ["nothing.yaml: No such file or directory"]


# Errors, help


def test_without_a_coordinator_used_before_the_line_says_so(parley: Parley) -> None:
    parley("keygen", "AA")
    code, _, err = parley("inbox")
    assert code == exits.Exit.REFUSED
    assert "host:port" in err


def test_errors_are_json_with_json(parley: Parley) -> None:
    code, out, err = parley("receipts", "--json")
    assert out == ""
    error = json.loads(err)["error"]
    assert error["exit"] == code == exits.Exit.USAGE
    assert error["message"]


def test_a_file_that_is_no_bundle_is_refused(parley: Parley, tmp_path: Path) -> None:
    (tmp_path / "x.bundle").write_bytes(b"\x00" * 100)
    code, _, err = parley("verify", "x.bundle")
    assert code == exits.Exit.REFUSED
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("tables", ["flights", "=x", "flights=", "flights=missing.csv"])
def test_submit_refuses_what_is_no_table(parley: Parley, tables: str) -> None:
    parley("keygen", "AA")
    assert parley("submit", "some-agreement", tables)[0] == exits.Exit.USAGE


def test_a_fault_shows_its_type_alone_and_a_traceback_only_with_debug(
    parley: Parley, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parley.state import State

    def broken(self: State) -> None:
        raise RuntimeError("4711 is in the data")

    monkeypatch.setattr(State, "receipts", broken)
    parley("keygen", "AA")
    code, _, err = parley("receipts")
    assert code == exits.Exit.INTERNAL
    assert "RuntimeError" in err and "4711" not in err
    assert "Traceback" in parley("--debug", "receipts")[2]
    assert "Traceback" not in parley("receipts")[2]


def test_ctrl_c_ends_with_its_code_and_says_what_to_do(parley: Parley, monkeypatch: pytest.MonkeyPatch) -> None:
    from parley.state import State

    def interrupted(self: State) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(State, "receipts", interrupted)
    parley("keygen", "AA")
    code, _, err = parley("receipts")
    assert code == exits.Exit.STOPPED
    assert "run the same line again" in err


def test_control_codes_of_the_other_side_reach_no_terminal(parley: Parley, monkeypatch: pytest.MonkeyPatch) -> None:
    from parley.state import State
    from parley_protocol.errors import RefusedError

    def hostile(self: State) -> None:
        raise RefusedError("internal", "\x1b]0;owned\x07 fine")

    monkeypatch.setattr(State, "receipts", hostile)
    parley("keygen", "AA")
    assert "\x1b" not in parley("receipts")[2]


def test_help_lists_every_command_and_every_exit_code(parley: Parley) -> None:
    code, out, _ = parley("--help")
    assert code == 0
    for name in (
        *("keygen", "contact", "agreement", "inbox", "open", "attest", "submit", "join", "start", "roster", "status"),
        *("watch", "fetch", "show", "verify", "receipts", "backup", "restore", "demo", "local"),
    ):
        assert f"\n  {name} " in out, name
    for exit_code in exits.Exit:
        assert exits.MEANING[exit_code] in out


@pytest.mark.parametrize(
    "group",
    [("agreement", "new check sign show put get"), ("contact", "add confirm list"), ("roster", "show sign refuse")],
)
def test_help_of_groups(parley: Parley, group: tuple[str, str]) -> None:
    code, out, _ = parley(group[0], "--help")
    assert code == 0
    assert all(f"\n  {name} " in out for name in group[1].split())


def test_unknown_commands_and_options_are_usage(parley: Parley) -> None:
    assert parley("sumbit")[0] == exits.Exit.USAGE
    assert parley("inbox", "--nonsense")[0] == exits.Exit.USAGE


def test_demos_are_listed(parley: Parley) -> None:
    code, out, _ = parley("demo", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["flights", "pay"]
