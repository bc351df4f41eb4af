"""Plays of the randomised fault simulation: those that once found something, and small ones in each kind of world; `make soak`
plays new ones for as long as one likes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.simulation.plan import Plan, World
from support.simulation.runner import fails
from support.simulation.theatre import Stages

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SEEDS: Final = Path(__file__).with_name("soak_seeds.txt")


def regressions() -> list[Plan]:
    """The plans in the file of seeds."""
    return [Plan.parse(line) for line in SEEDS.read_text().splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    made = Stages(tmp_path_factory.mktemp("s"))
    yield made
    made.close()


@pytest.mark.parametrize("plan", regressions(), ids=lambda plan: f"{plan.seed}-{plan.numbers}")
def test_a_plan_holds(stages: Stages, tmp_path: Path, plan: Plan) -> None:
    found = fails(stages, tmp_path / "p", plan, print)
    assert not found.error
    assert found.releases >= 4 * plan.rounds


def test_a_plan_is_the_same_for_the_same_seed() -> None:
    assert Plan.of(7) == Plan.of(7)
    assert Plan.of(7) != Plan.of(8)
    assert Plan.parse(Plan.of(7).to_json()) == Plan.of(7)
    assert Plan.of(7, World("apart", kms=True)).world == World.parse("apart kms")
