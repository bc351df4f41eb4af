"""The first tables, as programs made them before there were migrations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Makes them."""
    op.create_table(
        "agreements",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("series", sa.LargeBinary(), nullable=False),
        sa.Column("version", WHOLE, nullable=False),
        sa.Column("replaces", sa.LargeBinary(), nullable=True),
        sa.Column("canonical", sa.LargeBinary(), nullable=False),
        sa.Column("put_by", sa.LargeBinary(), nullable=False),
        sa.Column("put_ms", WHOLE, nullable=False),
        sa.Column("complete_ms", WHOLE, nullable=True),
        sa.Column("expires_ms", WHOLE, nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index(op.f("ix_agreements_series"), "agreements", ["series"], unique=False)
    op.create_table(
        "operators",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("added_ms", WHOLE, nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table("schema_version", sa.Column("version", WHOLE, nullable=False), sa.PrimaryKeyConstraint("version"))
    op.create_table(
        "events",
        sa.Column("number", WHOLE, nullable=False),
        sa.Column("agreement", sa.LargeBinary(), nullable=False),
        sa.Column("session", sa.LargeBinary(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("member", sa.Text(), nullable=False),
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("percent", WHOLE, nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(
            ["agreement"],
            ["agreements.digest"],
        ),
        sa.PrimaryKeyConstraint("number"),
        sqlite_autoincrement=True,
    )
    op.create_index("events_of_agreement", "events", ["agreement", "number"], unique=False)
    op.create_index(op.f("ix_events_session"), "events", ["session"], unique=False)
    op.create_table(
        "memberships",
        sa.Column("agreement", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["agreement"],
            ["agreements.digest"],
        ),
        sa.PrimaryKeyConstraint("agreement", "name"),
    )
    op.create_index(op.f("ix_memberships_key"), "memberships", ["key"], unique=False)
    op.create_table(
        "sessions",
        sa.Column("number", WHOLE, nullable=False),
        sa.Column("session", sa.LargeBinary(), nullable=True),
        sa.Column("agreement", sa.LargeBinary(), nullable=False),
        sa.Column("series", sa.LargeBinary(), nullable=False),
        sa.Column("begin", sa.LargeBinary(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("enclave", sa.Text(), nullable=False),
        sa.Column("offer", sa.LargeBinary(), nullable=True),
        sa.Column("document", sa.LargeBinary(), nullable=True),
        sa.Column("start", sa.LargeBinary(), nullable=True),
        sa.Column("roster", sa.LargeBinary(), nullable=True),
        sa.Column("opened_ms", WHOLE, nullable=False),
        sa.Column("deadline_ms", WHOLE, nullable=False),
        sa.Column("ended_ms", WHOLE, nullable=True),
        sa.Column("stored_told", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["agreement"],
            ["agreements.digest"],
        ),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("session"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_sessions_series"), "sessions", ["series"], unique=False)
    op.create_index(
        "one_live_session",
        "sessions",
        ["series"],
        unique=True,
        sqlite_where=sa.text("phase IN ('launching', 'open', 'rostered', 'computing')"),
        postgresql_where=sa.text("phase IN ('launching', 'open', 'rostered', 'computing')"),
    )
    op.create_table(
        "signatures",
        sa.Column("agreement", sa.LargeBinary(), nullable=False),
        sa.Column("member", sa.Text(), nullable=False),
        sa.Column("cose", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(
            ["agreement"],
            ["agreements.digest"],
        ),
        sa.PrimaryKeyConstraint("agreement", "member"),
    )
    op.create_table(
        "uploads",
        sa.Column("number", WHOLE, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("agreement", sa.LargeBinary(), nullable=False),
        sa.Column("party", sa.Text(), nullable=False),
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("cose", sa.LargeBinary(), nullable=False),
        sa.Column("owner", sa.LargeBinary(), nullable=False),
        sa.Column("size", WHOLE, nullable=False),
        sa.Column("stored", WHOLE, nullable=False),
        sa.Column("begun_ms", WHOLE, nullable=False),
        sa.Column("complete_ms", WHOLE, nullable=True),
        sa.ForeignKeyConstraint(
            ["agreement"],
            ["agreements.digest"],
        ),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("digest"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_uploads_owner"), "uploads", ["owner"], unique=False)
    op.create_index("uploads_of_party", "uploads", ["agreement", "party", "table_name"], unique=False)
    op.create_table(
        "bundles",
        sa.Column("number", WHOLE, nullable=False),
        sa.Column("size", WHOLE, nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(
            ["number"],
            ["sessions.number"],
        ),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_table(
        "fetches",
        sa.Column("number", WHOLE, nullable=False),
        sa.Column("member", sa.Text(), nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(
            ["number"],
            ["sessions.number"],
        ),
        sa.PrimaryKeyConstraint("number", "member"),
    )
    op.create_table(
        "joins",
        sa.Column("number", WHOLE, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("party", sa.Text(), nullable=False),
        sa.Column("cose", sa.LargeBinary(), nullable=False),
        sa.Column("receipt", sa.LargeBinary(), nullable=True),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(
            ["number"],
            ["sessions.number"],
        ),
        sa.PrimaryKeyConstraint("number", "digest"),
    )
    op.create_table(
        "open_requests",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("number", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(
            ["number"],
            ["sessions.number"],
        ),
        sa.PrimaryKeyConstraint("key", "request"),
    )
    op.create_table(
        "records",
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.Column("series", sa.LargeBinary(), nullable=False),
        sa.Column("sequence", WHOLE, nullable=False),
        sa.Column("previous", sa.LargeBinary(), nullable=False),
        sa.Column("agreement", sa.LargeBinary(), nullable=False),
        sa.Column("number", WHOLE, nullable=False),
        sa.Column("cose", sa.LargeBinary(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(
            ["agreement"],
            ["agreements.digest"],
        ),
        sa.ForeignKeyConstraint(
            ["number"],
            ["sessions.number"],
        ),
        sa.PrimaryKeyConstraint("head"),
        sa.UniqueConstraint("number"),
        sa.UniqueConstraint("series", "sequence"),
    )
    op.create_table(
        "rosters",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("number", WHOLE, nullable=False),
        sa.Column("cose", sa.LargeBinary(), nullable=False),
        sa.Column("expires_ms", WHOLE, nullable=False),
        sa.Column("issued_ms", WHOLE, nullable=False),
        sa.Column("ended", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["number"],
            ["sessions.number"],
        ),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index(op.f("ix_rosters_number"), "rosters", ["number"], unique=False)
    op.create_table(
        "countersignatures",
        sa.Column("roster", sa.LargeBinary(), nullable=False),
        sa.Column("party", sa.Text(), nullable=False),
        sa.Column("cose", sa.LargeBinary(), nullable=False),
        sa.Column("former", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(
            ["roster"],
            ["rosters.digest"],
        ),
        sa.PrimaryKeyConstraint("roster", "party"),
    )
    op.create_table(
        "refusals",
        sa.Column("roster", sa.LargeBinary(), nullable=False),
        sa.Column("party", sa.Text(), nullable=False),
        sa.Column("cose", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(
            ["roster"],
            ["rosters.digest"],
        ),
        sa.PrimaryKeyConstraint("roster", "party"),
    )
    op.execute("INSERT INTO schema_version (version) VALUES (1)")
