"""The local stack: up, status, down, and up again with the same keys; and what the demos are made of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from parley.cli.app import run
from parley_deploy import demo
from parley_deploy.demo import DEMOS, DemoError
from parley_deploy.local import Stack, StackError, free_port
from parley_protocol.identity import PrivateIdentity, dump_public


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "stack"
    Stack(tmp_path / "stack").stop()


def state(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    capsys.readouterr()
    code = run(["local", "status", "--dir", str(folder), "--json"])
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return code, found


def test_up_status_down_and_up_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ann.pub").write_bytes(dump_public(PrivateIdentity.generate(os.urandom).public))
    listen = f"127.0.0.1:{free_port()}"
    up = ["local", "up", "--dir", str(folder), "--listen", listen, "--allow", str(tmp_path / "ann.pub")]
    assert run(up) == 0
    said = capsys.readouterr().out
    assert listen in said and "SIMULATED" in said
    code, first = state(folder, capsys)
    assert code == 0
    assert first["address"] == listen
    kept = {name: (folder / name).read_bytes() for name in ("simulated-root.pem", "tls.crt", "root/root.key")}
    assert run(up) == 0
    assert state(folder, capsys)[1]["pid"] == first["pid"]
    assert run(["local", "down", "--dir", str(folder)]) == 0
    code, stopped = state(folder, capsys)
    assert (code, stopped["pid"]) == (4, None)
    assert run(up) == 0
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert state(folder, capsys)[1]["pid"] != first["pid"]


def test_measurements_are_those_of_the_installed_enclave(folder: Path) -> None:
    from parley_deploy.measure import image_measurements

    stack = Stack.made(folder)
    found = json.loads(stack.measurements.read_text())["Measurements"]
    assert {name: value for name, value in found.items() if name.startswith("PCR")} == {
        f"PCR{index}": value.hex() for index, value in image_measurements().items()
    }


def test_an_agreement_names_the_image_where_the_emulator_boots_one(folder: Path) -> None:
    stack = Stack.made(folder)
    assert stack.measured == stack.measurements
    (folder / "coordinator.toml").write_text('[launcher]\nkind = "qemu"\n[launcher.qemu]\nimage = "../parley.eif"\n')
    assert stack.measured == folder.resolve().parent / "parley.eif"


@pytest.mark.parametrize("kind", ["enclaves", "machines", "configured", "configured-whole"])
def test_a_stop_ends_enclaves_of_both_launchers_wherever_they_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    stack = Stack.made(folder)
    place = tmp_path / "elsewhere" if kind == "configured-whole" else folder / kind
    if kind.startswith("configured"):
        named = kind if kind == "configured" else str(place)
        (folder / "coordinator.toml").write_text(f'listen = "127.0.0.1:0"\n[launcher.local]\nfolder = "{named}"\n')
    enclave = place / "00112233"
    enclave.mkdir(parents=True)
    with subprocess.Popen(["sleep", "600"]) as process:
        threading.Thread(target=process.wait, daemon=True).start()
        (enclave / "nsm.pid").write_text(f"{process.pid}\n")
        (enclave / "enclave.sock").touch()
        assert state(folder, capsys)[1]["enclaves"] == ["00112233"]
        assert run(["local", "down", "--dir", str(folder)]) == 0
        assert process.wait(10) == -signal.SIGTERM
    assert stack.pid is None


def test_a_configuration_that_is_no_toml_is_an_error_that_names_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = Stack.made(folder)
    (folder / "coordinator.toml").write_text("listen = ")
    assert run(["local", "down", "--dir", str(folder)]) == 4
    assert "coordinator.toml" in capsys.readouterr().err
    (folder / "coordinator.toml").unlink()
    stack.stop()


def test_a_coordinator_that_does_not_start_is_an_error_that_names_the_log(folder: Path) -> None:
    stack = Stack.made(folder)
    (folder / "coordinator.toml").write_text('listen = "127.0.0.1:0"\nnonsense = 1\n')
    with pytest.raises(StackError, match="log"):
        stack.start()
    assert stack.pid is None
    assert "nonsense" in (folder / "log").read_text()


def test_a_public_key_that_is_not_there_is_a_usage_error_and_makes_nothing(folder: Path, tmp_path: Path) -> None:
    assert run(["local", "up", "--dir", str(folder), "--allow", str(tmp_path / "x.pub")]) == 2
    assert not folder.exists()


def test_a_file_that_is_no_public_key_is_an_error(folder: Path, tmp_path: Path) -> None:
    stack = Stack.made(folder)
    (tmp_path / "x.pub").write_text("nothing")
    with pytest.raises(StackError):
        stack.allow([tmp_path / "x.pub"])


@pytest.mark.parametrize(("name", "members"), [("flights", 18), ("pay", 9), ("kms", 9)])
def test_demos_know_their_members_and_rules(name: str, members: int) -> None:
    found = DEMOS[name]
    names = demo.agreement_members(found)
    assert len(names) == members and {found.starter, found.party} <= set(names)
    assert "coalition: 1" in demo.agreement_text(found)
    assert "coalition: 0" in demo.agreement_text(found, 0)
    assert "coalition: 1" not in demo.agreement_text(found, 0)


def test_a_demo_runs_in_an_empty_folder_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match="not empty"):
        demo.play("pay", tmp_path)
