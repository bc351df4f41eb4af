"""What `doctor` says of the database and of a bucket: whether they answer, keep what they are told, and fit this program."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from parley_coordinator import store as db
from parley_coordinator.config import S3, Config, ConfigError
from parley_coordinator.doctor_system import Check, fail, ok
from parley_coordinator.models import REVISION

PROBE_S: Final = 3.0
SERVER: Final = 130000
"""PostgreSQL 13, the oldest that is tried."""
_SQLITE: Final = "sqlite:///"
UNANSWERED: Final = (sqlite3.Error, SQLAlchemyError, ImportError, ConfigError)
"""What `rows` raises where it gets no answer."""
_MIGRATE: Final = "parley-coordinator migrate"


def database(config: Config) -> Check:
    """The database answers, keeps what was committed, and has the tables of this program or will."""
    if config.database.startswith(_SQLITE):
        return _sqlite(Path(config.database.removeprefix(_SQLITE)))
    engine = None
    try:
        engine = db.engine_of(db.parse(config.database), db.VISITOR)
        with engine.connect() as opened:
            found = db.revision(opened)
            version = int(opened.execute(text("SHOW server_version_num")).scalar_one())
            lossy = [
                name for name in ("fsync", "full_page_writes") if opened.execute(text(f"SHOW {name}")).scalar() == "off"
            ]
    except (SQLAlchemyError, ImportError, ConfigError) as error:
        # The URL holds a password, and the message may hold the URL.
        return fail(
            "database", f"{type(error).__name__} at the URL in store.database", "look at the server and the URL"
        )
    finally:
        if engine is not None:
            engine.dispose()
    said = f"postgresql {version // 10000} answers"
    if version < SERVER:
        return fail("database", said, f"use PostgreSQL {SERVER // 10000} or newer")
    if lossy:
        return fail(
            "database",
            f"{said}, with {' and '.join(lossy)} off: a power cut loses what members were told is stored",
            f"set {lossy[0]} = on in postgresql.conf",
        )
    return _judged(said, found, migrates=False)


def rows(config: Config, query: str) -> Sequence[Sequence[Any]]:
    """What the database answers; UNANSWERED. An SQLite file is neither changed nor made."""
    if config.database.startswith(_SQLITE):
        with closing(_opened(Path(config.database.removeprefix(_SQLITE)))) as connection:
            return connection.execute(query).fetchall()
    engine = db.engine_of(db.parse(config.database), db.VISITOR)
    try:
        with engine.connect() as opened:
            return [tuple(row) for row in opened.execute(text(query)).all()]
    finally:
        engine.dispose()


def _opened(path: Path) -> sqlite3.Connection:
    # Without a log nobody has it open; then it is read without making one, which might belong to another user.
    mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "mode=ro&immutable=1"
    return sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, timeout=PROBE_S)


def _sqlite(path: Path) -> Check:
    if not path.exists():
        return ok("database", f"{path} will be made")
    try:
        with closing(_opened(path)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            found = None
            if "alembic_version" in names:
                found = connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]
            elif names:
                found = db.FIRST
    except sqlite3.Error as error:
        return fail("database", f"{path}: {error}", "restore it from a backup, or let the user read it")
    return _judged(f"{path} opens", found, migrates=True)


def _judged(said: str, found: str | None, *, migrates: bool) -> Check:
    if found == REVISION:
        return ok("database", f"{said}, tables of revision {found}")
    from parley_coordinator import migrations

    try:
        migrations.check_known(found)
    except ConfigError:
        return fail("database", f"{said}, tables of revision {found}: newer than this program", "update this program")
    tables = "no tables" if found is None else f"tables of revision {found}"
    if migrates:
        return ok("database", f"{said}, {tables}, which the start brings to {REVISION}")
    return fail("database", f"{said}, {tables}; this program needs {REVISION}", _MIGRATE)


def bucket(config: S3) -> list[Check]:
    """The bucket takes, gives and forgets an object, and tells which uploads are under way."""
    from botocore.exceptions import BotoCoreError, ClientError

    from parley_coordinator.s3 import client

    key, data = f"{config.prefix}doctor-{secrets.token_hex(8)}", secrets.token_bytes(64)
    sealed = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": config.kms_key} if config.kms_key else {}
    doing = "opened"
    try:
        opened = client(config)
        try:
            opened.head_bucket(Bucket=config.bucket)
            doing = "written (s3:PutObject)"
            opened.put_object(Bucket=config.bucket, Key=key, Body=data, **sealed)  # type: ignore[arg-type]
            doing = "read (s3:GetObject)"
            whole = opened.get_object(Bucket=config.bucket, Key=key)["Body"].read() == data
            doing = "deleted from (s3:DeleteObject)"
            opened.delete_object(Bucket=config.bucket, Key=key)
            doing = "listed (s3:ListBucket, s3:ListBucketMultipartUploads)"
            opened.list_objects_v2(Bucket=config.bucket, Prefix=config.prefix, MaxKeys=1)
            opened.list_multipart_uploads(Bucket=config.bucket, Prefix=config.prefix, MaxUploads=1)
        finally:
            opened.close()
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        return [
            fail(
                "bucket", f"{config.bucket} cannot be {doing}: {code}", "look at store.blobs, and at the role's policy"
            )
        ]
    except BotoCoreError as error:
        return [
            fail(
                "bucket",
                f"{config.bucket} cannot be {doing}: {type(error).__name__}",
                "look at store.s3 and at the credentials that boto3 finds",
            )
        ]
    if not whole:
        return [fail("bucket", f"{config.bucket} gives other bytes than it took", "look at store.s3.endpoint_url")]
    sealing = f", sealed under {config.kms_key}" if config.kms_key else ""
    return [ok("bucket", f"{config.bucket} can be written, read, deleted from and listed{sealing}")]
