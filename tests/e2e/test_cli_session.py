"""A session by command lines alone: by hand, step by step, and by itself with a member who presses Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parley.cli.app import run
from parley.cli.exits import Exit
from parley_protocol.agreement.model import Measurement
from support.client import Members, frame_of, members
from support.enclave import until

NAMES = ("analyst", "north", "south", "west")
LIMIT_S = 120
Answer = tuple[int, list[Any], str]
Parley = Callable[..., Answer]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Members]:
    with members(tmp_path, NAMES, analysts=["analyst"], start=("analyst",)) as found:
        yield found


@pytest.fixture
def parley(made: Members, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Parley:
    """Runs a member's command with --json in this process: exit code, its values, its standard error."""
    for name, value in environment(made).items():
        monkeypatch.setenv(name, value)

    def call(member: str, *arguments: str) -> Answer:
        monkeypatch.chdir(made.folder / member)
        capsys.readouterr()
        code = run([*arguments, "--json"])
        shown = capsys.readouterr()
        return code, [json.loads(line) for line in shown.out.splitlines()], shown.err

    return call


def environment(made: Members) -> dict[str, str]:
    return {"PARLEY_COORDINATOR": made.coordinator.address, "PARLEY_CERT": str(made.coordinator.folder / "tls.crt")}


def kinds(answer: Answer) -> list[str]:
    """What waits, from an inbox."""
    assert answer[0] == 0, answer
    return [item["kind"] for item in answer[1]]


def test_a_session_by_hand(made: Members, parley: Parley) -> None:
    title = made.agreement.title
    made.connect("analyst").put(made.agreement)
    for name in NAMES:
        assert kinds(parley(name, "inbox")) == ["sign"]
        code, values, _ = parley(name, "agreement", "sign", title, "--yes")
        assert code == 0 and values[0]["member"] == name and values[0]["changes"] is None
    assert values[0]["missing"] == []
    code, values, err = parley("north", "submit", title, "visits=visits.csv")
    assert code == Exit.USAGE and "no such file" in err
    for seed, name in enumerate(NAMES[1:]):
        made.csv(name, frame_of(seed))
    assert parley("north", "submit", title, "visits=visits.csv")[0] == Exit.USAGE  # no session is open

    code, values, _ = parley("analyst", "open", title)
    assert code == 0
    session = values[0]["session"]
    assert parley("analyst", "open", title)[1][0]["session"] == session
    code, values, _ = parley("north", "attest", title)
    assert code == 0 and values[0]["simulated"] is True and values[0]["head"] == "00" * 48
    image = {"measurement": 1, "measurements": 1, "until": None}
    assert image.items() <= values[0].items()

    # A bad table: file, row and column, and nothing is sent.
    bad = frame_of(0)
    bad.loc[17, "score"] = 4711.0
    made.csv("north", bad)
    code, values, err = parley("north", "submit", title, "visits=visits.csv")
    error = json.loads(err)["error"]
    assert code == Exit.DATA
    assert (error["row"], error["column"], error["code"]) == (18, "score", "range")
    assert "Nothing was sent" in error["message"] and "4711" not in err
    assert parley("analyst", "status", session[:8])[1][0]["parties"]["north"] == "absent"

    made.csv("north", frame_of(0))
    receipts = {}
    for name in NAMES[1:]:
        code, values, _ = parley(name, "submit", title, "visits=visits.csv", "--no-wait")
        assert code == 0
        assert values[-1]["tables"]["visits"]["rows"] == 600 and image.items() <= values[-1].items()
        receipts[name] = values[-1]["receipt"]
    # The same line again is the same receipt; nothing is uploaded twice.
    assert parley("north", "submit", title, "visits=visits.csv", "--no-wait")[1][-1]["receipt"] == receipts["north"]
    assert parley("north", "join", session[:8], "--no-wait")[1][-1]["receipt"] == receipts["north"]
    assert [value["receipt"] for value in parley("north", "receipts")[1]] == [receipts["north"]]

    assert parley("north", "roster", "show", session)[0] == Exit.UNAVAILABLE
    assert parley("north", "start", session)[0] == Exit.REFUSED  # it is the analyst's to start
    assert kinds(parley("analyst", "inbox")) == ["start"]
    code, values, _ = parley("analyst", "start", session, "--no-wait")
    assert code == 0 and values[0]["absent"] == []
    roster = values[0]["roster"]
    assert parley("north", "roster", "show", title)[1][0]["roster"] == roster
    assert parley("north", "roster", "sign", title)[0] == Exit.REFUSED  # asked without a terminal, the answer is no
    for name in NAMES[1:]:
        assert kinds(parley(name, "inbox")) == ["countersign"]
        assert parley(name, "roster", "sign", session, "--yes")[0] == 0
    until(lambda: parley("analyst", "status", session)[1][0]["phase"] == "released")

    assert kinds(parley("west", "inbox")) == ["fetch"]
    assert parley("west", "show")[0] == Exit.UNAVAILABLE  # not fetched yet
    assert parley("west", "show", title)[0] == Exit.UNAVAILABLE
    assert parley("west", "show", "no-such-title")[0] == Exit.USAGE
    digest = made.agreement.digest.hex()
    code, values, _ = parley("west", "fetch", title, "--out", "sealed.bundle")
    assert code == 0 and values[0]["outputs"] == ["by_site"] and image.items() <= values[0].items()
    assert image.items() <= parley("west", "status", session)[1][0].items()
    assert kinds(parley("west", "inbox")) == []
    tables = [
        parley("west", "show", *which)[1][0] for which in ([], [session[:8]], [title], [digest[:12]], ["sealed.bundle"])
    ]
    assert all(table == tables[0] for table in tables)
    assert [row[0] for row in tables[0]["rows"]] == ["north", "south", "west"]
    assert sum(row[1] for row in tables[0]["rows"]) == 1800

    # An amendment adds an image: who signs it is told so.
    first = made.agreement
    accepted = (*first.measurements, Measurement(b"\1" * 48, b"\2" * 48, b"\3" * 48))
    second = replace(first, version=2, series_digest=first.digest, replaces=first.digest, measurements=accepted)
    made.connect("analyst").put(second)
    code, values, _ = parley("north", "agreement", "sign", second.digest.hex(), "--yes")
    assert code == 0 and "+ measurements.0101...0101.PCR0: " + "01" * 48 in values[0]["changes"]

    # A stranger verifies both forms, and reads the open one.
    assert parley("west", "fetch", session[:8], "--open", "--out", "open.bundle")[0] == 0
    stranger = made.folder / "stranger"
    stranger.mkdir()
    for bundle, opened in (("sealed.bundle", []), ("open.bundle", ["by_site"])):
        (stranger / bundle).write_bytes((made.folder / "west" / bundle).read_bytes())
        code, values, _ = parley("stranger", "verify", bundle)
        assert code == 0 and values[0]["simulated"] is True and image.items() <= values[0].items()
        assert values[0]["opened"] == opened and values[0]["countersigned"] == ["north", "south", "west"]
    assert parley("stranger", "show", "open.bundle")[1][0]["rows"] == tables[0]["rows"]
    assert parley("stranger", "show", "sealed.bundle")[0] == Exit.REFUSED
    damaged = bytearray((stranger / "open.bundle").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (stranger / "damaged.bundle").write_bytes(damaged)
    assert parley("stranger", "verify", "damaged.bundle")[0] == Exit.REFUSED


def begin(made: Members, member: str, *arguments: str) -> subprocess.Popen[str]:
    """A member's command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "parley.cli", *arguments],
        cwd=made.folder / member,
        env={**os.environ, **environment(made), "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        # Its fault handler writes where each thread stands.
        process.send_signal(signal.SIGABRT)
        out, err = process.communicate(timeout=LIMIT_S)
        pytest.fail(f"{process.args!r} did not end in {LIMIT_S} s; it said\n{out}\n{err}")
    return process.returncode, out, err


def test_a_session_by_itself_with_an_interruption(made: Members, parley: Parley) -> None:
    made.sign()
    title = made.agreement.title
    assert parley("analyst", "open", title)[0] == 0
    for seed, name in enumerate(NAMES[1:]):
        made.csv(name, frame_of(seed))
    submit = ["submit", title, "visits=visits.csv"]
    first = begin(made, "north", *submit)
    assert first.stdout is not None
    said = iter(first.stdout)
    line = next(said)
    while not line.startswith("waiting"):
        line = next(said)
    assert "Ctrl-C is safe" in line
    first.send_signal(signal.SIGINT)
    code, _, err = ended(first)
    assert code == Exit.STOPPED
    assert "run the same line again" in err and "Traceback" not in err

    parties = {name: begin(made, name, *submit) for name in NAMES[1:]}
    watching = begin(made, "analyst", "watch", title, "--json")
    until(lambda: set(parley("analyst", "status", title)[1][0]["parties"].values()) == {"joined"})
    code, values, _ = parley("analyst", "start", title)
    assert code == 0
    assert [value["step"] for value in values] == ["rostered", "released"]
    for process in parties.values():
        code, out, err = ended(process)
        assert (code, err) == (0, "")
        assert "3 parties, no absentee; countersigned" in out
        assert "image     measurement 1 of 1 in the agreement (PCR0 " in out
        assert "parley fetch" in out
    assert parley("analyst", "fetch", title, "--out", "x.bundle")[0] == 0
    watching.send_signal(signal.SIGINT)
    code, out, _ = ended(watching)
    assert code == Exit.STOPPED
    events = [json.loads(line)["kind"] for line in out.splitlines()]
    assert [kind for kind in ("opened", "rostered", "released") if kind in events] == ["opened", "rostered", "released"]


def test_a_refused_roster_ends_for_all_and_the_refusal_has_a_name(made: Members, parley: Parley) -> None:
    made.sign()
    title = made.agreement.title
    parley("analyst", "open", title)
    for seed, name in enumerate(NAMES[1:]):
        made.csv(name, frame_of(seed))
        assert parley(name, "submit", title, "visits=visits.csv", "--no-wait")[0] == 0
    assert parley("analyst", "start", title, "--no-wait")[0] == 0
    assert parley("south", "roster", "refuse", title, "--yes")[0] == 0
    until(lambda: parley("north", "roster", "show", title)[0] == Exit.UNAVAILABLE)
    assert parley("analyst", "status", title)[1][0]["phase"] == "open"


def test_nobody_signs_with_a_fingerprint_that_was_not_compared(made: Members, parley: Parley) -> None:
    made.connect("analyst").put(made.agreement)
    made.members["north"].contacts.remove("west")
    code, _, err = parley("north", "agreement", "sign", made.agreement.title, "--yes")
    assert code == Exit.REFUSED
    assert "west is not confirmed" in err
    status = made.connect("north").agreement(made.agreement.digest)
    assert "north" in status.missing
