"""Migrations of the store's tables, by Alembic. One file of `versions` for each step; none is changed once it was released."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from parley_coordinator import log
from parley_coordinator import store as db
from parley_coordinator.config import ConfigError
from parley_coordinator.models import REVISION

FOLDER: Final = Path(__file__).resolve().parent


def configuration(connection: Connection | None = None) -> AlembicConfig:
    """Alembic's configuration, for a connection within a transaction."""
    made = AlembicConfig()
    made.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    made.attributes["connection"] = connection
    return made


def steps() -> list[str]:
    """All revisions, oldest first."""
    return [step.revision for step in ScriptDirectory.from_config(configuration()).walk_revisions()][::-1]


def check_known(found: str | None) -> None:
    """ConfigError where tables are of a revision that this program does not know: a newer one made them."""
    if found is not None and found not in steps():
        raise ConfigError(
            f"store.database: has tables of {found}, made by a newer program; this one knows {REVISION} and what was before"
        )


def upgrade(connection: Connection, to: str = REVISION) -> None:
    """Brings tables up to date, or makes them, in the transaction of `connection`; ConfigError where they are newer."""
    found = db.revision(connection)
    check_known(found)
    made = configuration(connection)
    if found == db.FIRST:
        # These tables may be older than Alembic's own.
        command.stamp(made, db.FIRST)
    command.upgrade(made, to)
    log.info("migrated", before=found or "", now=to)


def migrate(url: str) -> tuple[str | None, str]:
    """Brings the database at a URL up to date; (revision before, revision now). ConfigError where coordinators that know the
    tables as they are use them, UnavailableError where the database is away."""
    engine = db.engine_of(db.parse(url), db.VISITOR)
    try:
        with db.translated(), engine.execution_options(parley_write=True).begin() as connection:
            found = db.revision(connection)
            if found != REVISION:
                if found is not None:
                    _check_alone(connection)
                upgrade(connection)
    finally:
        engine.dispose()
    return found, REVISION


def _check_alone(connection: Connection) -> None:
    """ConfigError while others have the tables open. Whoever connects from now on waits for this transaction, and finds them
    newer than itself."""
    if connection.dialect.name == "sqlite":
        return
    if "alembic_version" in inspect(connection).get_table_names():
        # One that was cut off and connects now reads this table first.
        connection.execute(text("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE"))
    # A coordinator that runs is connected always, since it listens for events.
    others = connection.execute(
        text(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = :name AND pid <> pg_backend_pid()"
        ),
        {"name": db.APPLICATION},
    ).scalar_one()
    if others:
        raise ConfigError(
            f"store.database: its tables must be changed, and {others} connections of coordinators use them: stop all of"
            " these first; enclaves live on"
        )
