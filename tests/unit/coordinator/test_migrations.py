"""Migrations: from every former step to the tables of today, once, and no further than this program knows."""

from __future__ import annotations

import re
import sqlite3
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from parley_coordinator import migrations
from parley_coordinator import store as db
from parley_coordinator.__main__ import main
from parley_coordinator.config import ConfigError
from parley_coordinator.models import REVISION, Base, Operator, SchemaVersion, SessionRow, UploadRow
from parley_coordinator.store import Store
from parley_protocol.errors import UnavailableError
from support.enclave import until
from support.postgres import Cluster

ROOT = Path(__file__).resolve().parent.parent.parent
FIRST = (ROOT / "vectors" / "coordinator_v1.sql").read_text("utf-8")
"""A database as `parley-coordinator` made it before there were migrations, with one row of most kinds."""


KMS_JOINS = """
CREATE TABLE kms_joins (
    agreement BLOB NOT NULL, party TEXT NOT NULL, digest BLOB NOT NULL, number INTEGER NOT NULL, cose BLOB NOT NULL,
    at_ms INTEGER NOT NULL, PRIMARY KEY (agreement, party), FOREIGN KEY(agreement) REFERENCES agreements (digest)
);
INSERT INTO kms_joins VALUES (X'61', 'ann', X'64', 1, X'63', 8);
"""
"""What the last programs before migrations had besides."""


@pytest.fixture(params=["first", "last"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.executescript(FIRST + (KMS_JOINS if request.param == "last" else ""))
    connection.close()
    return f"sqlite:///{tmp_path / 'old.db'}"


def differences(url: str) -> list[object]:
    engine = db.engine_of(db.parse(url))
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "compare_server_default": True}
            )
            return list(compare_metadata(context, Base.metadata))
    finally:
        engine.dispose()


def test_the_newest_step_is_the_models() -> None:
    assert migrations.steps()[0] == db.FIRST
    assert migrations.steps()[-1] == REVISION


def test_no_drift(database: str) -> None:
    Store(database).close()
    assert differences(database) == []


def test_drift_shows(database: str) -> None:
    Store(database).close()
    engine = db.engine_of(db.parse(database))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE more (number INTEGER)"))
    engine.dispose()
    assert len(differences(database)) == 1


def test_a_database_of_before_is_brought_up_to_date(old: str) -> None:
    store = Store(old)
    with store.read() as session:
        upload = session.get_one(UploadRow, 7)
        assert (upload.size, upload.stored, upload.writer, upload.state) == (5 << 32, 3 << 32, 0, "")
        assert session.get_one(SessionRow, 3).phase == "open"
        assert session.query(Operator).one().label == "ann"
        assert session.query(SchemaVersion).one().version == 2
    with store.write() as session:
        session.delete(session.get_one(UploadRow, 7))
        session.add(
            UploadRow(
                digest=b"n",
                agreement=b"a",
                party="p",
                table_name="t",
                cose=b"",
                owner=b"",
                size=1,
                stored=0,
                begun_ms=1,
            )
        )
        session.flush()
        # Numbers name blobs: none is used twice.
        assert session.query(UploadRow).one().number == 8
    store.close()
    assert differences(old) == []
    Store(old).close()


def test_each_step_by_itself(database: str) -> None:
    engine = db.engine_of(db.parse(database))
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
        Base.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
    for step in migrations.steps():
        with engine.execution_options(parley_write=True).begin() as connection:
            migrations.upgrade(connection, step)
            assert db.revision(connection) == step
    engine.dispose()
    assert differences(database) == []


def test_a_step_that_fails_changes_nothing(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = db.engine_of(db.parse(database))
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE IF EXISTS alembic_version"))

    def fail(*arguments: object, **more: object) -> None:
        raise RuntimeError("cut")

    monkeypatch.setattr(migrations.log, "info", fail)
    with pytest.raises(RuntimeError, match="cut"), engine.execution_options(parley_write=True).begin() as connection:
        migrations.upgrade(connection)
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == []
    engine.dispose()


def alter(url: str, statement: str) -> None:
    engine = db.engine_of(db.parse(url))
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_newer_tables_are_refused(database: str) -> None:
    Store(database).close()
    alter(database, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigError, match=r"store\.database: has tables of 9999, made by a newer program"):
        Store(database)
    with pytest.raises(ConfigError, match="made by a newer program"):
        migrations.migrate(database)


def test_tables_of_an_unknown_version_without_a_revision_are_refused(old: str) -> None:
    alter(old, "UPDATE schema_version SET version = 99")
    with pytest.raises(ConfigError, match="version 99"):
        Store(old)


def test_programs_of_before_refuse_what_they_do_not_know(old: str) -> None:
    """They compare this number with 1."""
    store = Store(old)
    with store.read() as session:
        assert session.query(SchemaVersion).one().version != 1
    store.close()


def test_postgresql_is_migrated_by_its_operator_alone(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = cluster.database()
    with pytest.raises(ConfigError, match=r"has no tables, this program needs \d+: run `parley-coordinator migrate`"):
        Store(url)
    assert main(["init", "--dir", str(tmp_path)]) == 0
    path = tmp_path / "coordinator.toml"
    path.write_text(path.read_text().replace('"coordinator.db"', f'"{url}"', 1))
    assert main(["operators", "list", "--dir", str(tmp_path)]) == 2
    assert "run `parley-coordinator migrate`" in capsys.readouterr().err
    assert main(["migrate", "--dir", str(tmp_path)]) == 0
    assert f"empty -> {REVISION}" in capsys.readouterr().out
    assert main(["migrate", "--dir", str(tmp_path)]) == 0
    assert f"{REVISION}: nothing to do" in capsys.readouterr().out
    assert main(["operators", "list", "--dir", str(tmp_path)]) == 0
    alter(url, "UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(ConfigError, match="has tables of revision 0001"):
        Store(url)


def outdated(cluster: Cluster) -> str:
    """A database with the tables of the step before the last."""
    url = cluster.database()
    engine = db.engine_of(db.parse(url))
    with engine.begin() as connection:
        migrations.upgrade(connection, migrations.steps()[-2])
    engine.dispose()
    return url


def test_tables_in_use_are_not_changed(cluster: Cluster) -> None:
    """A coordinator of the version before runs: it is connected, since it listens for events."""
    url = cluster.migrated()
    store = Store(url)
    store.on_event(lambda: None)
    assert migrations.migrate(url) == (REVISION, REVISION), "nothing is changed"
    before = migrations.steps()[-2]
    alter(url, f"UPDATE alembic_version SET version_num = '{before}'")
    with pytest.raises(ConfigError, match="connections of coordinators use them: stop all of these first"):
        migrations.migrate(url)
    store.close()
    assert migrations.migrate(outdated(cluster)) == (before, REVISION)


def test_two_that_migrate_wait_for_one_another(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the lock while the first looks who uses the tables."""
    url, check = outdated(cluster), migrations._check_alone
    waiting = "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database"
    waiting += f" WHERE locktype = 'advisory' AND NOT granted AND datname = '{db.parse(url).database}'"
    before = migrations.steps()[-2]
    with ThreadPoolExecutor(1) as pool:
        second: list[Future[tuple[str | None, str]]] = []

        def look(connection: Connection) -> None:
            monkeypatch.undo()
            second.append(pool.submit(migrations.migrate, url))
            until(lambda: cluster.execute(waiting) == [(1,)])
            check(connection)

        monkeypatch.setattr(migrations, "_check_alone", look)
        assert migrations.migrate(url) == (before, REVISION)
        assert second[0].result() == (REVISION, REVISION)


def test_no_url_hides_a_coordinator(cluster: Cluster) -> None:
    """Whatever name the URL gives to connections."""
    url = cluster.migrated()
    store = Store(f"{url}&application_name=prod")
    alter(url, f"UPDATE alembic_version SET version_num = '{migrations.steps()[-2]}'")
    with pytest.raises(ConfigError, match="connections of coordinators use them: stop all of these first"):
        migrations.migrate(url)
    store.close()


def test_who_was_cut_off_while_tables_were_changed_does_not_go_on(cluster: Cluster) -> None:
    """A coordinator counts for nothing between its connections; what it finds when it is back it need not know."""
    url = cluster.migrated()
    store = Store(url)
    store.on_event(lambda: None)
    here = f"FROM pg_stat_activity WHERE datname = '{db.parse(url).database}'"
    alter(url, "UPDATE alembic_version SET version_num = '9999'")
    ended = {pid for pid, _ in cluster.execute(f"SELECT pid, pg_terminate_backend(pid) {here}")}
    until(lambda: not ended & {pid for (pid,) in cluster.execute(f"SELECT pid {here}")})
    for transaction in (store.read, store.write):
        with pytest.raises(UnavailableError, match="other tables than this program knows"), transaction() as session:
            session.query(Operator).all()
    until(lambda: cluster.execute(f"SELECT count(*) {here}") == [(0,)])
    alter(url, f"UPDATE alembic_version SET version_num = '{REVISION}'")
    with store.write() as session:
        session.add(Operator(key=b"k", label="", added_ms=0))
    store.close()


def test_who_connects_while_tables_are_changed_waits_and_finds_them_newer(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is counted who comes after the count: so nobody gets in before the change is over."""
    url, change = outdated(cluster), migrations.upgrade
    before, here = migrations.steps()[-2], f"datname = '{db.parse(url).database}'"
    waiting = f"SELECT count(*) FROM pg_stat_activity WHERE {here} AND wait_event_type = 'Lock'"
    # A program for which these tables are the right ones, and all whose connections were lost.
    monkeypatch.setattr(db, "REVISION", before)
    store = Store(url)
    ended = {
        pid for pid, _ in cluster.execute(f"SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE {here}")
    }
    until(lambda: not ended & {pid for (pid,) in cluster.execute(f"SELECT pid FROM pg_stat_activity WHERE {here}")})

    def read() -> None:
        with store.read() as session:
            session.query(Operator).all()

    with ThreadPoolExecutor(1) as pool:
        reading: list[Future[None]] = []

        def changed(connection: Connection) -> None:
            reading.append(pool.submit(read))
            until(lambda: cluster.execute(waiting) == [(1,)])
            change(connection)

        monkeypatch.setattr(migrations, "upgrade", changed)
        assert migrations.migrate(url) == (before, REVISION)
        with pytest.raises(UnavailableError, match="other tables than this program knows"):
            reading[0].result()
    store.close()


def test_a_database_that_is_away_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--dir", str(tmp_path)]) == 0
    path = tmp_path / "coordinator.toml"
    url = f"postgresql://parley@/parley?host={tmp_path}"
    path.write_text(path.read_text().replace('"coordinator.db"', f'"{url}"', 1))
    assert main(["migrate", "--dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "parley-coordinator: the database of the coordinator does not answer"
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [("mysql://h/d", "mysql is neither"), ("nonsense://", "nonsense|no URL"), ("://", "no URL")],
)
def test_other_databases_are_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        db.parse(url)


def test_steps_name_no_model() -> None:
    """A step that used the models would change when they do."""
    for path in (migrations.FOLDER / "versions").glob("v*.py"):
        assert not re.search(r"parley_coordinator", path.read_text("utf-8")), path.name
