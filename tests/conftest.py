"""What all tests share: repository paths, hypothesis without a deadline (two cores are shared), a clean environment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support import postgres
from support.image_tree import ImageTree, make_image_tree

settings.register_profile("parley", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("parley")

# A shell that starts a job in the background has it ignore Ctrl-C, and whatever that starts; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> ImageTree:
    """The tree of the image with an interpreter that has the image's locked packages only."""
    return make_image_tree(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[postgres.Cluster]:
    """A PostgreSQL."""
    with postgres.cluster() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, of each engine in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'c.db'}"
    cluster: postgres.Cluster = request.getfixturevalue("cluster")
    return cluster.migrated()
