"""What all tests share: repository paths, hypothesis without a deadline (two cores are shared), a clean environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("parley", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("parley")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
