"""The command line without a coordinator: keys, contacts, agreements, exit codes, help, and what errors say."""

from __future__ import annotations

import io
import json
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from parley.cli import exits
from parley_protocol import limits
from parley_protocol.measurement import measure, measurements_json
from support.command_line import Parley, agreement_folder
from support.images import image, signer

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


# Images


def recorded(folder: Path, name: str = "x.eif", **options: Any) -> str:
    """An image in a file; its name."""
    (folder / name).write_bytes(image(**options))
    return name


def test_measure_prints_registers_and_what_is_not_measured(parley: Parley, tmp_path: Path) -> None:
    now = time.time_ns() // 1_000_000
    file = recorded(tmp_path, signed_by=signer(start_ms=now - 1000, name="the maker"))
    code, out, _ = parley("measure", file)
    assert code == 0
    pcrs = measure(io.BytesIO((tmp_path / file).read_bytes())).pcrs
    lines = out.splitlines()
    assert lines[0].startswith("image     x.eif, ") and lines[0].endswith("EIF version 4, x86_64, CRC good")
    assert lines[1:5] == [f"PCR{index}      {pcrs[index].hex()}" for index in (0, 1, 2, 8)]
    assert "cmdline   13 B: console=ttyS0" in lines
    assert any(line.startswith("metadata") and "small 7; not measured" in line for line in lines)
    assert any(line.startswith("signature") and "by CN=the maker, P-384, valid " in line for line in lines)
    assert "1,024 MiB of memory, 2 CPUs; not measured" in out
    assert "warning" not in out


def test_measure_with_json_is_what_an_agreement_takes(parley: Parley, tmp_path: Path) -> None:
    file = recorded(tmp_path)
    code, out, _ = parley("measure", file, "--json")
    assert code == 0
    found = json.loads(out)
    image_ = measure(io.BytesIO((tmp_path / file).read_bytes()))
    assert {"Measurements": found["Measurements"]} == json.loads(measurements_json(image_.pcrs))
    assert found["unmeasured"] == {"name": "small", "version": "7", "memory_bytes": 1 << 30, "cpus": 2}
    assert found["certificate"] is None and found["warnings"] == []
    draft = agreement_folder(tmp_path / "draft")
    (tmp_path / "draft" / "measurements.json").write_text(out)
    assert parley("measure", file, "--agreement", str(draft))[0] == 0


def test_measure_warns_of_one_ramdisk_and_of_a_certificate_that_is_over(parley: Parley, tmp_path: Path) -> None:
    out = parley("measure", recorded(tmp_path, ramdisks=[b"all"]))[1]
    assert "warning   one ramdisk: PCR2 is measured over nothing" in out
    out = parley("measure", recorded(tmp_path, signed_by=signer(start_ms=1_700_000_000_000, days=1)))[1]
    assert "warning   the signing certificate is not valid now" in out


def test_what_metadata_say_reaches_a_terminal_harmless(parley: Parley, tmp_path: Path) -> None:
    metadata = json.dumps({"ImageName": "\x1b]0;owned\x07\ud800", "ImageVersion": 7}).encode()
    file = recorded(tmp_path, metadata=metadata)
    code, out, _ = parley("measure", file)
    assert code == 0 and "\x1b" not in out and "?]0;owned??; not measured" in out
    assert json.loads(parley("measure", file, "--json")[1])["unmeasured"]["version"] is None


@pytest.mark.parametrize("data", [b"", b"not an image", b".eif"])
def test_measure_refuses_what_is_no_image(parley: Parley, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.eif").write_bytes(data)
    code, out, err = parley("measure", "x.eif")
    assert (code, out) == (exits.Exit.REFUSED, "")
    assert err.startswith("x.eif: image: ")
    assert parley("measure", "missing.eif")[0] == exits.Exit.USAGE


def test_measure_says_whether_an_agreement_accepts_the_image(parley: Parley, tmp_path: Path) -> None:
    draft = agreement_folder(tmp_path / "draft")
    text = draft.read_text()
    now = time.time_ns() // 1_000_000
    maker = signer(start_ms=now - 1000)
    names = ["one", "two", "three"]
    files = [recorded(tmp_path / "draft", f"{name}.eif", ramdisks=[b"boot", name.encode()]) for name in names]
    recorded(tmp_path / "draft", "signed.eif", ramdisks=[b"boot", b"three"], signed_by=maker)
    soon = (datetime.now(UTC) + timedelta(days=3)).date().isoformat()
    listed = f"[one.eif, {{file: two.eif, until: {soon}}}, {{file: signed.eif, until: 2026-01-31}}]"
    assert "measurements: [measurements.json]" in text
    draft.write_text(text.replace("measurements: [measurements.json]", f"measurements: {listed}"))

    def ask(name: str) -> tuple[int, str, Any]:
        arguments = ("measure", str(tmp_path / "draft" / name), "--agreement", str(draft))
        code, out, err = parley(*arguments)
        said = json.loads(parley(*arguments, "--json")[1])["agreement"]
        return code, out + err, said

    code, out, said = ask(files[0])
    assert code == 0 and "measurement 1 of 3 in the agreement (PCR0 " in out and "warning" not in out
    assert (said["accepted"], said["measurement"], said["measurements"], said["until"]) == (True, 1, 3, None)
    code, out, said = ask(files[1])
    assert code == 0 and f"measurement 2 of 3 in the agreement, until {soon} (PCR0 " in out
    assert f"warning   this image is accepted until {soon} (3 more days)" in out
    assert (said["accepted"], said["measurement"], said["until"]) == (True, 2, soon)
    code, out, said = ask(files[2])
    assert code == exits.Exit.REFUSED and "accepted only when another certificate has signed it (PCR8)" in out
    assert said["accepted"] is False and "measurement" not in said
    code, out, said = ask("signed.eif")
    assert code == exits.Exit.REFUSED and "no longer accepted: measurement 3 of 3" in out
    assert "warning" not in out
    assert (said["accepted"], said["measurement"], said["until"]) == (False, 3, "2026-01-31")
    recorded(tmp_path / "draft", "other.eif", ramdisks=[b"boot", b"other"])
    code, out, said = ask("other.eif")
    assert code == exits.Exit.REFUSED and "none of its 3 measurements is of this image" in out
    assert "not accepted by" in out and said["accepted"] is False


def test_an_agreement_takes_its_measurements_from_images(parley: Parley, tmp_path: Path) -> None:
    draft = agreement_folder(tmp_path / "draft")
    maker = signer(start_ms=time.time_ns() // 1_000_000)
    recorded(tmp_path / "draft", "a.eif", signed_by=maker)
    draft.write_text(draft.read_text().replace("[measurements.json]", "[{file: a.eif, until: 2027-01-31}]"))
    pcrs = measure(io.BytesIO((tmp_path / "draft" / "a.eif").read_bytes())).pcrs
    out = parley("agreement", "show", str(draft))[1]
    for index in (0, 1, 2, 8):
        assert f"PCR{index}: {pcrs[index].hex()}" in out
    assert "until: 2027-01-31" in out
    assert f"SIMULATED enclave {pcrs[0][:2].hex()}...{pcrs[0][-2:].hex()} (until 2027-01-31)" in out


def test_a_bad_image_in_an_agreement_is_named_with_line_and_field(parley: Parley, tmp_path: Path) -> None:
    draft = agreement_folder(tmp_path / "draft")
    recorded(tmp_path / "draft", "a.eif")
    data = bytearray((tmp_path / "draft" / "a.eif").read_bytes())
    data[-1] ^= 1
    (tmp_path / "draft" / "a.eif").write_bytes(data)
    draft.write_text(draft.read_text().replace("[measurements.json]", "[measurements.json, a.eif]"))
    line = next(number for number, row in enumerate(draft.read_text().splitlines(), 1) if "a.eif" in row)
    code, out, _ = parley("agreement", "check", str(draft))
    assert code == exits.Exit.DATA
    assert out.splitlines()[0].startswith(f"{draft}:{line}  measurements[1]: 'a.eif': image: damaged: its CRC is ")


def test_an_image_of_any_size_is_measured_for_an_agreement(parley: Parley, tmp_path: Path) -> None:
    draft = agreement_folder(tmp_path / "draft")
    recorded(tmp_path / "draft", "a.eif", ramdisks=[b"boot", bytes(limits.REFERENCED_FILE_BYTES + 1)])
    draft.write_text(draft.read_text().replace("[measurements.json]", "[a.eif]"))
    assert parley("agreement", "check", str(draft))[0] == 0


def test_new_with_images_names_them(parley: Parley, tmp_path: Path) -> None:
    first, second = recorded(tmp_path, "a b: #.eif"), recorded(tmp_path, 'q"ü.eif', ramdisks=[b"boot", b"next"])
    assert parley("agreement", "new", "mine", "--image", first, "--image", second)[0] == 0
    for name in ("north", "south", "west", "east", "analyst"):
        parley("keygen", name, "--dir", "keys")
    code, out, _ = parley("agreement", "check", "mine.yaml")
    assert code == 0 and "simulated" not in out
    out = parley("agreement", "show", "mine.yaml")[1]
    assert "platform: nitro" in out
    for file in (first, second):
        assert measure(io.BytesIO((tmp_path / file).read_bytes())).pcrs[0].hex() in out
    (tmp_path / "bad.eif").write_bytes(b".eif")
    assert parley("agreement", "new", "other", "--image", "bad.eif")[0] == exits.Exit.REFUSED
    assert not (tmp_path / "other.yaml").exists()


def test_check_notes_an_image_whose_pcr2_says_nothing(parley: Parley, tmp_path: Path) -> None:
    draft = agreement_folder(tmp_path / "draft")
    recorded(tmp_path / "draft", "a.eif", ramdisks=[b"all"])
    draft.write_text(draft.read_text().replace("[measurements.json]", "[a.eif]"))
    assert "the image has one ramdisk, so its PCR2 says nothing" in parley("agreement", "check", str(draft))[1]


def test_diff_says_what_an_amendment_changes(parley: Parley, tmp_path: Path) -> None:
    draft = agreement_folder(tmp_path / "draft")
    digest = json.loads(parley("agreement", "check", str(draft), "--json")[1])["digest"]
    recorded(tmp_path / "draft", "next.eif")
    text = draft.read_text().replace("version: 1", f"version: 2\nseries: {digest}\nreplaces: {digest}", 1)
    amended = draft.with_name("amended.yaml")
    amended.write_text(text.replace("[measurements.json]", "[{file: measurements.json, until: 2027-01-31}, next.eif]"))
    code, out, _ = parley("agreement", "diff", str(draft), str(amended))
    assert code == 0
    lines = out.splitlines()
    assert lines[0].endswith(": version 2 amends version 1")
    assert "+ measurements.0101...0101.until: 2027-01-31" in lines
    pcr0 = measure(io.BytesIO((tmp_path / "draft" / "next.eif").read_bytes())).pcrs[0].hex()
    assert any(line.startswith("+ measurements.") and line.endswith(f".PCR0: {pcr0}") for line in lines)
    assert all(line[:2] in ("+ ", "~ ") for line in lines[1:])
    found = json.loads(parley("agreement", "diff", str(draft), str(amended), "--json")[1])
    assert found["amends"] is True and found["old"] == digest
    assert {"path": ["version"], "old": "1", "new": "2"} in found["changes"]
    assert "the other way round" in parley("agreement", "diff", str(amended), str(draft))[1]
    assert parley("agreement", "diff", str(draft), str(draft))[1] == "the same agreement\n"


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
        *("watch", "fetch", "show", "verify", "receipts", "measure", "backup", "restore", "demo", "local"),
    ):
        assert f"\n  {name} " in out, name
    for exit_code in exits.Exit:
        assert exits.MEANING[exit_code] in out


@pytest.mark.parametrize(
    "group",
    [
        ("agreement", "new check show diff put get sign"),
        ("contact", "add confirm list"),
        ("roster", "show sign refuse"),
    ],
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
    assert [line.split()[0] for line in out.splitlines()] == ["flights", "pay", "kms"]
