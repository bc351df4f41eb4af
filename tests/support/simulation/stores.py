"""What coordinators of a simulation have stored, as it stands on disks and in buckets: nothing is asked of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Protocol

from sqlalchemy import create_engine, insert, select, text
from sqlalchemy.exc import OperationalError

from parley_coordinator.blobs import Directory, upload_name
from parley_coordinator.config import S3
from parley_coordinator.models import Base, SchemaVersion
from parley_coordinator.s3 import Bucket
from support import s3
from support.postgres import Cluster
from support.simulation.front import Front

APPLICATION: Final = "parley-coordinator"
"""What connections of coordinators are called."""


class Store(Protocol):
    """One store, whoever serves it."""

    label: str

    @property
    def there(self) -> bool:
        """Whether it has been made."""

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """What its database holds; `?` stands for a value."""

    def blob(self, name: str) -> bytes:
        """A blob."""

    def lacks(self, number: int, stored: int, size: int, state: str, *, complete: bool) -> str:
        """What of the first `stored` bytes of an upload is not there; empty where all are."""

    def dump(self) -> Iterator[tuple[str, bytes]]:
        """All that stands in it: (where, bytes)."""


class Folder:
    """SQLite and a folder of blobs, in a coordinator's own folder."""

    def __init__(self, label: str, folder: Path) -> None:
        self.label = label
        self._folder = folder

    @property
    def there(self) -> bool:
        return (self._folder / "coordinator.db").exists()

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        address = f"file:{self._folder / 'coordinator.db'}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=30)) as connection:
            return connection.execute(query, values).fetchall()

    def blob(self, name: str) -> bytes:
        reader = Directory(self._folder / "blobs").reader(name)
        try:
            return reader.read(0, reader.size)
        finally:
            reader.close()

    def lacks(self, number: int, stored: int, size: int, state: str, *, complete: bool) -> str:
        found = len(self.blob(upload_name(number)))
        return f"its blob has {found} bytes" if found < stored else ""

    def dump(self) -> Iterator[tuple[str, bytes]]:
        """Nothing: it stands in the coordinator's folder, with all else of that."""
        yield from ()


class Shared:
    """A database of PostgreSQL and a bucket, behind a proxy, for any number of coordinators."""

    def __init__(self, cluster: Cluster, template: str, s3_url: str) -> None:
        self.label = "shared"
        self.there = True
        self.cluster = cluster
        self.database = cluster.database(template)
        self.front = Front("s3", lambda: s3_url)
        self.bucket = s3.bucket(s3_url)
        # For the witness, which nothing is done to.
        self._engine = create_engine(self.database, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
        self._blobs = Bucket(self.bucket)

    def toml(self) -> str:
        """What a coordinator's configuration says of it."""
        found: S3 = self.bucket
        return (
            f'[store]\ndatabase = "{self.database}"\nblobs = "s3://{found.bucket}/{found.prefix}"\n'
            f'[store.s3]\nregion = "{found.region}"\nendpoint_url = "{self.front.url}"\naddressing = "path"\n'
        )

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        # Not under a name that `cut` looks for.
        try:
            with self._engine.connect() as connection:
                return [tuple(row) for row in connection.exec_driver_sql(query.replace("?", "%s"), values)]
        except OperationalError as error:
            raise OSError("the database does not answer") from error

    def blob(self, name: str) -> bytes:
        reader = self._blobs.reader(name)
        return reader.read(0, reader.size)

    def lacks(self, number: int, stored: int, size: int, state: str, *, complete: bool) -> str:
        if complete:
            found = self._blobs.reader(upload_name(number)).size
            return f"its object has {found} bytes" if found != size else ""
        try:
            # It finds the parts and the tail that a stream would go on after.
            self._blobs.writer(upload_name(number), stored, size, state).close()
        except OSError as error:
            return str(error)
        return ""

    def dump(self) -> Iterator[tuple[str, bytes]]:
        for table in Base.metadata.sorted_tables:
            rows = self.rows(f"SELECT * FROM {table.name}")
            yield table.name, b"\0".join(_bytes(value) for row in rows for value in row)
        client = self._blobs.client
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket.bucket):
            for found in page.get("Contents", ()):
                body = client.get_object(Bucket=self.bucket.bucket, Key=found["Key"])["Body"].read()
                yield found["Key"], body

    def cut(self) -> int:
        """Ends all connections of coordinators; how many there were."""
        query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = ?"
        ((count,),) = self.rows(query, APPLICATION)
        return int(count)

    def close(self) -> None:
        """Removes it."""
        self._engine.dispose()
        client = self._blobs.client
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket.bucket):
            for found in page.get("Contents", ()):
                client.delete_object(Bucket=self.bucket.bucket, Key=found["Key"])
        self._blobs.close()
        self.front.close()
        name = self.database.partition("@/")[2].partition("?")[0]
        self.cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def copied(cluster: Cluster, database: Path) -> str:
    """The name of a new database of PostgreSQL with all that stands in one of SQLite."""
    url = cluster.migrated()
    source, target = create_engine(f"sqlite:///{database}"), create_engine(url)
    tables = [table for table in Base.metadata.sorted_tables if table is not SchemaVersion.__table__]
    try:
        with source.connect() as reading, target.begin() as writing:
            for table in tables:
                rows: Sequence[Any] = reading.execute(select(table)).mappings().all()
                if rows:
                    writing.execute(insert(table), [dict(row) for row in rows])
            for name in ("uploads", "sessions", "events"):
                writing.execute(
                    text(
                        f"SELECT setval(pg_get_serial_sequence('{name}', 'number'), max(number)) FROM {name}"
                        " HAVING max(number) IS NOT NULL"
                    )
                )
    finally:
        source.dispose()
        target.dispose()
    return url.partition("@/")[2].partition("?")[0]
