"""Processes that die: coordinator, enclave and members are killed at every step of a session and at random moments.

Whatever dies, every member ends with the release of a run in which nothing failed, byte for byte, and no byte of a table
that the coordinator had acknowledged is sent again. `PARLEY_FAULTS` says how many random moments are tried; from 30 on,
each step is also tried by itself.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from support.faults import STEPS, Faults, Outcome, Plan, Stage, Trial

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MOMENTS = int(os.environ.get("PARLEY_FAULTS", "8"))
REGRESSIONS: tuple[int, ...] = ()
"""Seeds that once found something."""
Calm = tuple[Outcome, float]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def undisturbed(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """The outcome of a run in which nothing dies, and how long it took in seconds."""
    with Trial(stage, tmp_path_factory.mktemp("calm")) as trial:
        begun = time.monotonic()
        releases = trial.play()
        duration = time.monotonic() - begun
        expected = Outcome.of(releases["dan"])
        trial.check(releases, expected)
        assert trial.lost == 0
        assert (expected.record.sequence, expected.record.charged) == (1, 1)
    return expected, duration


def killed(stage: Stage, calm: Calm, folder: Path, target: str, *steps: str) -> int:
    """Plays with kills at steps; how many sessions were lost."""
    with Trial(stage, folder) as trial:
        faults = Faults(trial, target, *steps)
        releases = trial.play()
        assert faults.missed == []
        assert faults.fired == list(steps)
        trial.check(releases, calm[0])
        return trial.lost


def test_the_coordinator_killed_at_each_step(stage: Stage, undisturbed: Calm, tmp_path: Path) -> None:
    steps = [step for step in STEPS if step not in ("releasing", "released")]
    assert killed(stage, undisturbed, tmp_path, "coordinator", *steps) == 0


def test_the_enclave_killed_at_each_step(stage: Stage, undisturbed: Calm, tmp_path: Path) -> None:
    steps = ["uploading", "uploaded", "opened", "joining", "joined", "rostered", "countersigning", "computing"]
    assert killed(stage, undisturbed, tmp_path, "enclave", *steps) == len(steps)


@pytest.mark.parametrize("step", ["releasing", "released"])
@pytest.mark.parametrize("target", ["coordinator", "enclave"])
def test_killed_at_the_release(stage: Stage, undisturbed: Calm, tmp_path: Path, step: str, target: str) -> None:
    lost = killed(stage, undisturbed, tmp_path, target, step)
    # What the enclave has released and nobody has read is gone with it, and only that.
    assert lost == 0 or (lost == 1 and (step, target) == ("releasing", "enclave"))


@pytest.mark.skipif(MOMENTS < 30, reason="`make faults` tries each step by itself")
@pytest.mark.parametrize("target", ["coordinator", "enclave", "both"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_one_step(stage: Stage, undisturbed: Calm, tmp_path: Path, step: str, target: str) -> None:
    if target != "coordinator" and step == "fetching":
        pytest.skip("an enclave has ended before its release is fetched")
    lost = killed(stage, undisturbed, tmp_path, target, step)
    if target == "coordinator" or step == "released":
        assert lost == 0
    elif step != "releasing":
        assert lost == 1


@pytest.mark.parametrize("seed", [*REGRESSIONS, *range(MOMENTS)])
def test_killed_at_a_random_moment(stage: Stage, undisturbed: Calm, tmp_path: Path, seed: int) -> None:
    plan = Plan.of(seed)
    print(f"seed {seed}: {plan}")
    with Trial(stage, tmp_path) as trial:
        plan.begin(trial, undisturbed[1])
        releases = trial.play()
        trial.check(releases, undisturbed[0])
        assert trial.lost <= len(plan.kills)
