"""A whole session with the rights of an image: the main process has three capabilities, its workers another uid."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from parley_protocol.transcript import Record
from parley_protocol.v1 import enclave_pb2 as pb
from support.enclave import Run, Simulation, agreement_of, identities, payload, released, rows_of, until
from support.uids import UID, interpreter, search_path

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

NAMES = ("amber", "birch", "cedar")


@pytest.fixture
def simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    python, setpriv = interpreter(), shutil.which("setpriv")
    rights = [setpriv or "", "--bounding-set=-all,+kill,+setgid,+setuid", "--no-new-privs", "--"]
    if setpriv is None or subprocess.run([*rights, "true"], check=False).returncode != 0:
        pytest.skip("NOT TESTED: setpriv is not here or may drop nothing")
    monkeypatch.setenv("PYTHONPATH", search_path())
    with Simulation(tmp_path, workers=2) as made:
        made.command = [*rights, python, "-s"]
        made.arguments = ["--worker-uid", str(UID)]
        made.boot()
        yield made


def _run(simulation: Simulation) -> Run:
    members = identities(NAMES)
    rows = {name: {"visits": rows_of(number, 20_000)} for number, name in enumerate(NAMES)}
    run = Run(simulation, agreement_of(simulation, members), members, rows)
    run.load()
    return run


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_a_session_with_the_rights_of_an_image(simulation: Simulation) -> None:
    run = _run(simulation)
    assert simulation.process is not None
    main = _status(simulation.process.pid)
    assert int(main["CapEff"], 16) == int(main["CapBnd"], 16) == 1 << 5 | 1 << 6 | 1 << 7
    before = simulation.worker_pids()
    assert len(before) == 2
    for pid in before:
        until(lambda pid=pid: _status(pid)["Seccomp"] == "2")  # type: ignore[misc]
        assert _status(pid)["Uid"].split() == [str(UID)] * 4

    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    release = released(run.countersign(offer, roster))
    assert Record.from_bytes(payload(release.cose)).roster == roster.digest
    found = {column.name: column.cells for column in run.open(release, "amber")["by_site"].columns}
    site = np.concatenate([run.rows[name]["visits"].site for name in NAMES])
    assert found["rows"] == tuple(int((site == place + 1).sum()) for place in range(3))

    # Their end crosses uids: the one thing that CAP_KILL is for.
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))
    after = simulation.worker_pids()
    assert len(after) == 2
    run.stored(offer, release)
    run.host.want("offered", begin=pb.Begin(request=os.urandom(16), chain=run.chain))
    simulation.end()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in after))
    run.close()
