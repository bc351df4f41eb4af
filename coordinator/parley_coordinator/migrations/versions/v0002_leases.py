"""Several coordinators: leases of sessions, who writes an upload and how its blob store goes on, blobs to be deleted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Adds them; programs of before refuse the tables from now on."""
    op.add_column("uploads", sa.Column("writer", WHOLE, nullable=False, server_default="0"))
    op.add_column("uploads", sa.Column("state", sa.Text(), nullable=False, server_default=sa.text("''")))
    op.create_table(
        "leases",
        sa.Column("number", WHOLE, nullable=False, autoincrement=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("token", WHOLE, nullable=False),
        sa.Column("expires_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(["number"], ["sessions.number"]),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_index(op.f("ix_leases_holder"), "leases", ["holder"], unique=False)
    op.create_table(
        "doomed_blobs",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.execute("UPDATE schema_version SET version = 2")
