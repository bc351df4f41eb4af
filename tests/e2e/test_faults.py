"""Processes that die: coordinator, enclave and members are killed at every step of a session and at random moments.

Whatever dies, every member ends with the release of a run in which nothing failed, byte for byte, and no byte of a table
that the coordinator had acknowledged is sent again. `PARLEY_FAULTS` says how many random moments are tried.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from support.faults import STEPS, Fault, Outcome, Plan, Stage, Trial

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MOMENTS = int(os.environ.get("PARLEY_FAULTS", "8"))
REGRESSIONS: tuple[int, ...] = ()
"""Seeds that once found something."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def undisturbed(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, float]:
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


@pytest.mark.parametrize("target", ["coordinator", "enclave"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step(
    stage: Stage, undisturbed: tuple[Outcome, float], tmp_path: Path, step: str, target: str
) -> None:
    if step == "fetching" and target == "enclave":
        pytest.skip("an enclave has ended before its release is fetched")
    with Trial(stage, tmp_path) as trial:
        fault = Fault(trial, step, target)
        releases = trial.play()
        assert fault.fired.is_set()
        assert not fault.missed, fault.missed
        trial.check(releases, undisturbed[0])
