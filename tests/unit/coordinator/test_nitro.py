"""The launcher `nitro` against a stand-in for nitro-cli: what it starts, finds, ends, tries again and gives up."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from parley_coordinator import nitro, nitro_cli
from parley_coordinator.config import Nitro
from parley_coordinator.images import Wanted
from parley_coordinator.launcher import EnclaveHandle
from parley_coordinator.nitro import NitroLauncher
from parley_coordinator.nitro_cli import Action
from parley_protocol.errors import RefusedError, UnavailableError
from support.enclave import until
from support.nitro_host import NitroHost, tiny_image

NOW = 1_800_000_000_000
FIRST, SECOND = b"1" * 48, b"2" * 48


class Machine:
    """A played parent, the configuration of a coordinator on it, and what its image is."""

    def __init__(self, folder: Path) -> None:
        self.host = NitroHost(folder / "host")
        self.measurement = tiny_image(folder / "parley.eif")
        self.config = Nitro(
            folder / "parley.eif",
            folder / "nitro",
            memory_mib=256,
            command=self.host.command,
            pause_s=0.01,
            start_s=20.0,
            call_s=20.0,
        )
        self.clock = NOW

    def launcher(self, most: int = 4, **changed: Any) -> NitroLauncher:
        """A coordinator's launcher, as after a start."""
        return NitroLauncher(replace(self.config, **changed), most, lambda: self.clock, self.host.address)

    def wanted(self, digest: bytes = FIRST, *, simulated: bool = False) -> Wanted:
        """What an agreement asks that accepts the image."""
        return Wanted(digest, simulated, (self.measurement,))

    def files(self) -> list[dict[str, Any]]:
        """What the launcher keeps."""
        return [json.loads(path.read_text()) for path in sorted(self.config.folder.glob("*.json"))]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    with made.host:
        yield made


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.getMessage() == event]


def test_an_enclave_is_started_found_and_ended(machine: Machine) -> None:
    launcher = machine.launcher()
    handle = launcher.launch(machine.wanted())
    (call,) = machine.host.calls("run-enclave")
    assert (call["eif_path"], call["memory"], call["cpu_count"], call["debug_mode"]) == (
        str(machine.config.image),
        256,
        2,
        False,
    )
    assert call["enclave_name"] == handle.id and handle.id.startswith(f"parley-{FIRST.hex()[:8]}-")
    assert handle == EnclaveHandle(handle.id, FIRST, machine.host.address(16, 5005))
    assert launcher.find() == [handle] and launcher.alive(handle)
    launcher.stop(handle)
    assert machine.host.running() == [] and launcher.find() == [] and machine.files() == []
    assert not launcher.alive(handle)
    launcher.stop(handle)
    assert len(machine.host.calls("terminate-enclave")) == 1


def test_the_address_is_a_vsock_of_the_enclaves_cid(machine: Machine) -> None:
    launcher = NitroLauncher(replace(machine.config, start_s=3.0, attempts=1), 4, lambda: NOW)
    # This machine has no vsock to CID 16: what is shown is where it is looked for, and that this is waited for.
    machine.config.folder.mkdir(exist_ok=True)
    name = "parley-31313131-0123456789abcdef"
    (machine.config.folder / f"{name}.json").write_text(
        json.dumps({"agreement": FIRST.hex(), "begun_ms": NOW, "id": "i-0-enc0", "cid": 16})
    )
    machine.host.set(describe="partial")
    assert launcher.find() == [EnclaveHandle(name, FIRST, "vsock:16:5005")]


def test_enclaves_are_found_by_another_coordinator(machine: Machine) -> None:
    handles = [machine.launcher().launch(machine.wanted(digest)) for digest in (FIRST, SECOND)]
    assert sorted(machine.launcher().find(), key=lambda handle: handle.agreement) == handles


def test_nobody_finds_an_enclave_that_may_be_ended(machine: Machine) -> None:
    """It is asked whether the enclave is used after all, and ended, while no coordinator looks."""
    launcher, other = machine.launcher(), machine.launcher()
    handle = launcher.launch(machine.wanted())
    launcher.stop(handle, unless=lambda: True)
    assert launcher.find() == [handle]
    looks: list[Future[list[EnclaveHandle]]] = []

    def unless() -> bool:
        looks.append(pool.submit(other.find))
        done, _ = wait(looks, timeout=0.3)
        assert not done, "it would find an enclave that is ended at once"
        return False

    with ThreadPoolExecutor(1) as pool:
        launcher.stop(handle, unless)
        assert looks[0].result(60) == []


def test_what_others_started_is_never_ended(machine: Machine) -> None:
    foreign = machine.host.foreign()
    launcher = machine.launcher()
    handle = launcher.launch(machine.wanted())
    assert launcher.find() == [handle]
    launcher.stop(EnclaveHandle(foreign, FIRST, ""))
    (described,) = [one for one in machine.host.described() if one["EnclaveName"] == foreign]
    launcher.stop(EnclaveHandle(described["EnclaveID"], FIRST, ""))
    launcher.stop(handle)
    assert machine.host.running() == [foreign]


def test_an_enclave_that_ended_by_itself_is_forgotten(machine: Machine) -> None:
    launcher = machine.launcher()
    dead, other = launcher.launch(machine.wanted()), launcher.launch(machine.wanted(SECOND))
    machine.host.kill(dead.id)
    assert not launcher.alive(dead)
    assert launcher.find() == [other] and len(machine.files()) == 1
    launcher.stop(dead)
    assert machine.host.calls("terminate-enclave") == []


def test_no_more_than_the_configuration_allows(machine: Machine) -> None:
    launcher = machine.launcher(most=1)
    handle = launcher.launch(machine.wanted())
    with pytest.raises(UnavailableError) as caught:
        launcher.launch(machine.wanted(SECOND))
    assert (caught.value.code, caught.value.retry_after_ms) == ("no-capacity", 30_000)
    launcher.stop(handle)
    assert launcher.launch(machine.wanted(SECOND)).agreement == SECOND


def test_memory_that_others_use_is_no_capacity(machine: Machine) -> None:
    machine.host.set(memory_mib=300)
    launcher = machine.launcher()
    handle = launcher.launch(machine.wanted())
    with pytest.raises(UnavailableError) as caught:
        launcher.launch(machine.wanted(SECOND))
    assert (caught.value.code, caught.value.retry_after_ms) == ("no-capacity", 30_000)
    assert launcher.find() == [handle]


def test_cpus_that_others_use_are_no_capacity(machine: Machine) -> None:
    machine.host.set(cpus=3)
    launcher = machine.launcher()
    launcher.launch(machine.wanted())
    with pytest.raises(UnavailableError) as caught:
        launcher.launch(machine.wanted(SECOND))
    assert caught.value.code == "no-capacity"


@pytest.mark.parametrize(
    ("host", "config", "code", "do"),
    [
        ({"memory_mib": 200}, {}, "E27", "memory_mib in allocator.yaml"),
        ({"cpus": 1}, {}, "E22", "cpu_count in allocator.yaml"),
        ({"next": ["no-cpus"] * 3}, {}, "E29", "cpu_count in allocator.yaml"),
        ({"next": ["E19"] * 3}, {}, "E19", "/dev/nitro_enclaves"),
        ({"next": ["E59"] * 3}, {}, "E59", "signing certificate"),
        ({"next": ["E77"] * 3}, {}, "E77", "does not know"),
        ({"next": ["usage"] * 3}, {}, "", "nitro-cli 1.2 or newer"),
        ({"next": ["garbage"] * 3}, {}, "", "launcher.nitro.command"),
        ({"next": ["endless"] * 3}, {}, "", "launcher.nitro.command"),
        ({"next": ["hang"] * 3}, {"start_s": 3.0}, "", "launcher.nitro.start_s"),
        ({"next": ["deaf"] * 3}, {"start_s": 5.0}, "", "nothing listens at launcher.nitro.port"),
        ({}, {"command": ("no-such-nitro-cli",)}, "", "install nitro-cli"),
    ],
)
def test_what_only_the_operator_can_mend_is_tried_once(
    machine: Machine,
    host: dict[str, Any],
    config: dict[str, Any],
    code: str,
    do: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine.host.set(**host)
    with caplog.at_level(logging.WARNING, "parley_coordinator"), pytest.raises(UnavailableError) as caught:
        machine.launcher(**config).launch(machine.wanted())
    assert caught.value.code == "unavailable" and code in caught.value.message
    assert len(machine.host.calls("run-enclave")) == ("command" not in config)
    (given_up,) = events(caplog, "launch-given-up")
    assert given_up["code"] == code and do in given_up["do"]
    assert machine.host.running() == []


def test_too_little_memory_for_the_image_is_told(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.measurement = tiny_image(machine.config.image, size=70 << 20)
    with caplog.at_level(logging.WARNING, "parley_coordinator"), pytest.raises(UnavailableError, match="E26"):
        machine.launcher().launch(machine.wanted())
    (given_up,) = events(caplog, "launch-given-up")
    assert "4 times the size of the image" in given_up["do"]


@pytest.mark.parametrize("step", ["E36", "dies", "E39", "E11", "E29", "killed", "brief"])
def test_what_may_pass_is_tried_again(machine: Machine, step: str, caplog: pytest.LogCaptureFixture) -> None:
    machine.host.set(next=[step, step])
    launcher = machine.launcher()
    with caplog.at_level(logging.WARNING, "parley_coordinator"):
        handle = launcher.launch(machine.wanted())
    assert launcher.find() == [handle] and machine.host.running() == [handle.id]
    failed = events(caplog, "launch-failed")
    code = {"dies": "E36", "killed": "", "brief": ""}.get(step, step)
    assert [(one["code"], one["then"]) for one in failed] == [(code, "RETRY")] * 2
    assert events(caplog, "launch-given-up") == []


def test_the_attempts_have_an_end(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.host.set(enclave="dies")
    with caplog.at_level(logging.WARNING, "parley_coordinator"), pytest.raises(UnavailableError, match="E36"):
        machine.launcher(attempts=2).launch(machine.wanted())
    assert len(machine.host.calls("run-enclave")) == 2
    (given_up,) = events(caplog, "launch-given-up")
    assert "nitro-cli console" in given_up["do"]
    # What nitro-cli said is there, its reason first.
    assert given_up["said"].index("[ E36 ]") < given_up["said"].index("[ E39 ]")


def test_there_is_a_pause_between_attempts(machine: Machine) -> None:
    machine.host.set(next=["E36"])
    machine.launcher(pause_s=0.5).launch(machine.wanted())
    first, second = machine.host.calls("run-enclave")
    assert second["at"] - first["at"] > 0.5


def test_a_launch_that_was_given_up_is_remembered_until_it_can_bring_nothing(machine: Machine) -> None:
    machine.host.set(next=["hang"])
    launcher = machine.launcher(start_s=1.0)
    with pytest.raises(UnavailableError):
        launcher.launch(machine.wanted())
    (kept,) = machine.files()
    assert kept["doomed"] and launcher.find() == [] and machine.files() == [kept]
    # As if nitro-cli's process had gone on: the enclave comes under the name that was given.
    name = next(machine.config.folder.glob("*.json")).stem
    arguments = ["run-enclave", "--eif-path", str(machine.config.image), "--memory", "256", "--cpu-count", "2"]
    subprocess.run([*machine.host.command, *arguments, "--enclave-name", name], check=True, capture_output=True)
    assert machine.host.running() == [name]
    assert machine.launcher().find() == [] and machine.host.running() == [] and machine.files() == []


def test_a_launch_that_brought_nothing_is_forgotten_in_the_end(machine: Machine) -> None:
    machine.host.set(next=["hang"])
    launcher = machine.launcher(start_s=1.0)
    with pytest.raises(UnavailableError):
        launcher.launch(machine.wanted())
    machine.clock += nitro.LOST_MS + 1
    assert launcher.find() == [] and machine.files() == []


def test_an_enclave_of_a_coordinator_that_died_in_its_launch_is_adopted(machine: Machine, tmp_path: Path) -> None:
    # The process is killed while nitro-cli runs; the enclave is there, and nobody noted its id.
    script = (
        "import sys, json\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        "from parley_coordinator.config import Nitro\nfrom parley_coordinator.images import Wanted\n"
        "from parley_coordinator.nitro import NitroLauncher\nfrom parley_protocol.agreement.model import Measurement\n"
        "image, folder, p0, p1, p2, *command = sys.argv[1:]\n"
        "config = Nitro(Path(image), Path(folder), memory_mib=256, command=tuple(command))\n"
        "measured = Measurement(*(bytes.fromhex(p) for p in (p0, p1, p2)))\n"
        "NitroLauncher(config, 4, lambda: 0).launch(Wanted(b'1' * 48, False, (measured,)))\n"
    )
    machine.host.set(next=["late"])
    pcrs = [pcr.hex() for pcr in (machine.measurement.pcr0, machine.measurement.pcr1, machine.measurement.pcr2)]
    arguments = [str(machine.config.image), str(machine.config.folder), *pcrs, *machine.config.command]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.DEVNULL)
    until(lambda: machine.host.running() != [])
    process.kill()
    process.wait()
    (kept,) = machine.files()
    assert kept["id"] == ""
    (handle,) = machine.launcher().find()
    assert (handle.id, handle.agreement) == (machine.host.running()[0], FIRST)
    assert machine.files()[0]["id"] != ""
    machine.launcher().stop(handle)
    assert machine.host.running() == []


def test_an_enclave_that_could_not_be_ended_keeps_its_place_and_is_tried_again(machine: Machine) -> None:
    launcher = machine.launcher(most=1)
    handle = launcher.launch(machine.wanted())
    machine.host.set(terminate="E39")
    launcher.stop(handle)
    assert launcher.find() == [] and machine.host.running() == [handle.id]
    with pytest.raises(UnavailableError) as caught:
        launcher.launch(machine.wanted(SECOND))
    assert caught.value.code == "no-capacity"
    machine.host.set(terminate="")
    assert launcher.launch(machine.wanted(SECOND)).agreement == SECOND
    assert handle.id not in machine.host.running()


def test_an_enclave_whose_process_did_not_answer_is_not_given_up(machine: Machine) -> None:
    launcher = machine.launcher()
    handle = launcher.launch(machine.wanted())
    machine.host.set(describe="partial")
    assert launcher.find() == [handle] and launcher.alive(handle)
    launcher.stop(handle)
    machine.host.set(describe="")
    assert launcher.find() == [] and machine.host.running() == []


@pytest.mark.parametrize("mode", ["E07", "garbage"])
def test_enclaves_are_not_given_up_where_nitro_cli_does_not_tell(
    machine: Machine, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = machine.launcher()
    handle = launcher.launch(machine.wanted())
    machine.host.set(describe=mode)
    with caplog.at_level(logging.WARNING, "parley_coordinator"), pytest.raises(UnavailableError):
        launcher.find()
    assert events(caplog, "describe-failed")[0]["do"]
    assert launcher.alive(handle)
    launcher.stop(handle)
    machine.host.set(describe="")
    assert launcher.find() == [] and machine.host.running() == []


def test_without_enclaves_nitro_cli_is_not_asked(machine: Machine) -> None:
    assert machine.launcher(command=("no-such-nitro-cli",)).find() == []


def test_a_name_that_nitro_cli_changed_is_no_matter(machine: Machine) -> None:
    machine.host.set(next=["renamed"])
    launcher = machine.launcher()
    handle = launcher.launch(machine.wanted())
    assert launcher.find() == [handle] and machine.host.running() == [f"{handle.id}_1"]
    launcher.stop(handle)
    assert machine.host.running() == []


def test_debug_mode_is_for_simulated_agreements(machine: Machine) -> None:
    launcher = machine.launcher(debug=True)
    with pytest.raises(RefusedError) as caught:
        launcher.launch(machine.wanted())
    assert caught.value.code == "attestation" and machine.host.calls("run-enclave") == []
    handle = launcher.launch(machine.wanted(SECOND, simulated=True))
    (call,) = machine.host.calls("run-enclave")
    assert call["debug_mode"] and machine.host.described()[0]["Flags"] == "DEBUG_MODE"
    launcher.stop(handle)


def test_an_image_that_the_agreement_does_not_accept_is_not_started(machine: Machine) -> None:
    launcher = machine.launcher()
    other = replace(machine.measurement, pcr2=b"\0" * 48)
    with pytest.raises(RefusedError, match=r"parley\.eif") as caught:
        launcher.launch(Wanted(FIRST, False, (other,)))
    assert caught.value.code == "attestation"
    assert launcher.launch(Wanted(FIRST, False, (other, machine.measurement))).agreement == FIRST
    assert len(machine.host.calls("run-enclave")) == 1


def test_an_image_is_accepted_until_the_end_of_its_day(machine: Machine) -> None:
    launcher = machine.launcher()
    last = date(2027, 1, 15)
    wanted = Wanted(FIRST, False, (replace(machine.measurement, until=last),))
    end = replace(machine.measurement, until=last).until_ms
    assert end is not None
    machine.clock = end
    with pytest.raises(RefusedError, match="2027-01-15"):
        launcher.launch(wanted)
    machine.clock = end - 1
    launcher.launch(wanted)


def test_a_signer_that_the_agreement_names_is_needed(machine: Machine) -> None:
    signed = replace(machine.measurement, pcr8=b"8" * 48)
    with pytest.raises(RefusedError, match="does not accept the image"):
        machine.launcher().launch(Wanted(FIRST, False, (signed,)))


@pytest.mark.parametrize("step", ["hang", "late", "deaf"])
def test_closing_ends_a_launch_and_an_enclave_that_came_of_it(machine: Machine, step: str) -> None:
    machine.host.set(next=[step])
    launcher = machine.launcher(start_s=60.0)
    failed: list[UnavailableError] = []

    def launch() -> None:
        try:
            launcher.launch(machine.wanted())
        except UnavailableError as error:
            failed.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    until(lambda: (machine.host.calls("run-enclave") if step == "hang" else machine.host.running()) != [])
    began = time.monotonic()
    launcher.close()
    thread.join(timeout=40)
    assert not thread.is_alive() and time.monotonic() - began < 30
    assert "stopping" in failed[0].message and machine.host.running() == []
    assert [kept["doomed"] for kept in machine.files()] == [True] * (step == "hang")
    with pytest.raises(UnavailableError, match="stopping"):
        launcher.launch(machine.wanted())


def children() -> list[str]:
    """The processes of this one, those that ended and were not waited for too."""
    return Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split()


def test_no_process_is_left_behind(machine: Machine) -> None:
    others = children()
    machine.host.set(next=["hang", "endless", "E36"])
    launcher = machine.launcher(start_s=1.0)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            launcher.launch(machine.wanted())
    launcher.launch(machine.wanted())
    left = [pid for pid in children() if pid not in others]
    assert [Path(f"/proc/{pid}/stat").read_text() for pid in left] == []


@pytest.mark.parametrize("note", [1, 2])
def test_a_full_disk_leaves_no_enclave_that_is_not_noted(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, note: int
) -> None:
    launcher, sync, written = machine.launcher(), os.fsync, itertools.count(1)

    def full(descriptor: int) -> None:
        if next(written) >= note:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnavailableError, match="disk") as caught:
        launcher.launch(machine.wanted())
    assert caught.value.retry_after_ms is not None
    assert len(machine.host.calls("run-enclave")) == note - 1
    assert machine.host.running() == [] and machine.files() == []
    monkeypatch.setattr(os, "fsync", sync)
    assert launcher.find() == [] and launcher.launch(machine.wanted()).agreement == FIRST


def test_foreign_files_are_no_enclaves(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    launcher = machine.launcher()
    (machine.config.folder / "x.json").write_text("{}")
    (machine.config.folder / "parley-31313131-0123456789abcdef.json").write_text('{"agreement": "zz", "begun_ms": 1}')
    with caplog.at_level(logging.WARNING, "parley_coordinator"):
        assert launcher.find() == []
    assert len(events(caplog, "launcher-file-unknown")) == 2


OUTPUT = {"EnclaveName": "n", "EnclaveID": "i-0-enc1", "EnclaveCID": 16}


@pytest.mark.parametrize(
    "output",
    [
        "",
        "null",
        "[]",
        "{",
        '{"EnclaveID": "i-0-enc1", "EnclaveID": "i-0-enc1", "EnclaveCID": 16}',
        '{"EnclaveID": "i-0-enc1", "EnclaveCID": NaN}',
        json.dumps({**OUTPUT, "EnclaveID": "i-0"}),
        json.dumps({**OUTPUT, "EnclaveID": "--all-enc1\n"}),
        json.dumps({**OUTPUT, "EnclaveID": 5}),
        json.dumps({**OUTPUT, "EnclaveCID": 3}),
        json.dumps({**OUTPUT, "EnclaveCID": 2**32 - 1}),
        json.dumps({**OUTPUT, "EnclaveCID": "16"}),
        json.dumps({**OUTPUT, "EnclaveCID": True}),
        json.dumps({"EnclaveID": "i-0-enc1"}),
        "[" * 100_000,
    ],
)
def test_what_is_not_nitro_clis_json_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "out").write_text(output)
    script = f"import sys; sys.stdout.write(open({str(tmp_path / 'out')!r}).read())"
    cli = nitro_cli.NitroCli([sys.executable, "-c", script], 20.0, threading.Event())
    with pytest.raises(nitro_cli.NitroError) as caught:
        cli.run_enclave(image=tmp_path / "i", memory_mib=64, cpus=2, name="n", debug=False, timeout_s=20.0)
    assert caught.value.row is nitro_cli.GARBAGE


@pytest.mark.parametrize(
    "listed", ['{"a": 1}', "[1]", '[{"EnclaveID": "i-0-enc1", "EnclaveCID": 16, "State": "RUNNING"}]']
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, listed: str) -> None:
    cli = nitro_cli.NitroCli([sys.executable, "-c", f"print({listed!r})"], 20.0, threading.Event())
    with pytest.raises(nitro_cli.NitroError) as caught:
        cli.describe()
    assert caught.value.row is nitro_cli.GARBAGE


def test_an_old_description_without_names_is_read(tmp_path: Path) -> None:
    listed = '[{"EnclaveID": "i-0-enc1f", "EnclaveCID": 0, "State": "TERMINATING", "Flags": "NONE"}]'
    cli = nitro_cli.NitroCli([sys.executable, "-c", f"print({listed!r})"], 20.0, threading.Event())
    assert cli.describe().enclaves == (nitro_cli.Described("i-0-enc1f", None, 0, "TERMINATING", "NONE"),)


def test_children_that_keep_the_pipes_do_not_hold_a_call(tmp_path: Path) -> None:
    script = (
        "import os, time\nif os.fork() == 0:\n    time.sleep(30)\nelse:\n    print('[]', flush=True)\n    os._exit(0)"
    )
    cli = nitro_cli.NitroCli([sys.executable, "-c", script], 20.0, threading.Event())
    began = time.monotonic()
    assert cli.describe().enclaves == ()
    assert time.monotonic() - began < 15


def test_the_page_of_the_operator_has_every_code_with_what_follows(repository: Path) -> None:
    words = {
        Action.RETRY: "tried again",
        Action.BUSY: "`no-capacity` where other enclaves run, else given up",
        Action.FINAL: "given up",
    }
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (repository / "coordinator/README.md").read_text().splitlines()
        if line.startswith("| `E")
    ]
    told = {code: row[2] for row in rows if " with " not in row[0] for code in re.findall(r"`(E[0-9]{2})`", row[0])}
    assert told == {code: words[row.action] for code, row in nitro_cli.ACTIONS.items()}
    (busy,) = [row for row in rows if nitro_cli.NO_CPUS in row[0]]
    assert busy[2] == words[nitro_cli.BUSY_CPUS.action]
